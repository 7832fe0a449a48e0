"""The command line: what goes to stdout, what to stderr, and how it exits."""
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml
from typer.testing import CliRunner

from volcal.calibration.config import describe_config
from volcal.calibration.result import CalibrationResult
from volcal.ops import jobs
from volcal.ops.cli import app

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = str(ROOT / "data" / "sample")
AS_OF = "2025-10-15T23:00Z"
HEAVY = ("numpy", "pandas", "numba", "scipy", "matplotlib", "sqlalchemy", "papermill", "pyarrow", "nbconvert")


def volcal(*words: str) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout, done.stderr


@pytest.fixture
def config(tmp_path):
    """A config of the sample that calibrates well."""
    path = tmp_path / "calibrate.yaml"
    harvest = {"data_root": SAMPLE, "start_time": "2025-10-02T00:00Z", "end_time": AS_OF}
    path.write_text(yaml.safe_dump({"underlying": "BTC", "source": "harvested", "max_dte": 10, "fit_skew": True, "harvest": harvest}))
    return path


@pytest.mark.parametrize("words", [["--help"], [], ["auto-calibrate", "--help"], ["--version"]])
def test_help_loads_nothing_heavy(words):
    code = f"import sys; sys.argv = ['volcal', *{words}]\nfrom volcal.ops.cli import app\ntry: app()\nexcept SystemExit: pass\n"
    code += f"print('loaded', [name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "loaded []"


def test_help_lists_the_commands_and_exit_codes():
    code, out, _ = volcal("--help")
    assert code == 0
    for command in ("auto-calibrate", "calibrate", "quality", "compact", "history", "update-vol-surface", "demo", "auto-calibrate-all",
                    "apply", "panel", "serve", "Exit codes"):
        assert command in out


def test_auto_calibrate_has_the_options_of_the_specification():
    out = volcal("auto-calibrate", "--help")[1]
    for option in ("underlying", "dte-min", "dte-max", "lookback-days", "max-samples", "data-dir", "as-of", "option-types", "snapshot-step", "max-snapshots",
                   "price-history", "db", "report-dir", "apply", "dry-run", "json"):
        assert f"--{option}" in out, option


def test_calibrate_help_describes_every_field():
    out = " ".join(volcal("calibrate", "--help")[1].split())
    for entry in describe_config():
        assert entry["field"] in out
        assert " ".join(entry["description"].split())[:40] in out, entry["field"]


@pytest.mark.parametrize("words, told", [
    (["auto-calibrate", "--dte-min", "10", "--dte-max", "3"], "swap"), (["auto-calibrate", "--as-of", "soon"], "ISO"),
    (["auto-calibrate", "--lookback-days", "0"], "lookback_days"), (["auto-calibrate", "--option-types", "X"], "option_types"),
    (["auto-calibrate", "--max-samples", "-1"], "max_samples"), (["auto-calibrate", "--max-samples", "some"], "max-samples"),
    (["auto-calibrate", "--apply", "--dry-run"], "recorded run"), (["auto-calibrate", "--lookback", "3"], "--lookback"), (["calibrate"], "CONFIG"),
    (["apply"], "exactly one"), (["apply", "--latest", "--run", "3"], "exactly one"), (["auto-calibrate-all", "--underlyings", ","], "no underlying"),
    (["history", "--limit", "0"], "limit"), (["recalibrate"], "recalibrate"), (["compact", "BTC", "--day", "today"], "YYYY-MM-DD"),
    (["compact", "BTC", "--data-dir", SAMPLE, "--day", "2999-01-01"], "is not over"), (["compact", "../BTC", "--data-dir", SAMPLE], "has BTC"),
    (["quality", "B T C", "--data-dir", SAMPLE], "has BTC"), (["quality", "BTC", "--start", "2026-01-02", "--end", "2026-01-01"], "swap them"),
    (["quality", "BTC", "--as-of", "None"], "--as-of"), (["history", "--db", "mysql://x/y"], "not supported"), (["history", "--db", "foo"], "cannot be read"),
    (["auto-calibrate", "--db", "foo"], "cannot be read"),
    (["auto-calibrate-all", "--db", "foo"], "cannot be read"), (["apply", "--revert", "--db", "foo"], "cannot be read"),
    (["auto-calibrate", "--price-history", "no_candles.parquet"], "--price-history"), (["auto-calibrate", "--lookback-days", "1e300"], "lookback_days"),
    (["harvest", "--once", "--every", "7x"], "interval"), (["harvest", "--once", "--status"], "one of them"),
    (["harvest", "--once", "--assets", "B/C"], "asset"),
    (["harvest", "--once", "--url", "https://www.deribit.com"], "/api/v2"), (["harvest", "--once", "--url", "deribit"], "no address"),
    (["harvest", "--once", "--url", "http://[::1"], "no address"),
    (["backfill", "--start", "2026-01-02", "--end", "2026-01-01"], "swap them"), (["backfill", "--resolution", "7"], "not offered"),
    (["backfill", "--end", "tomorrow"], "--end"), (["replay", "--port", "99999"], "65535"), (["replay", "--speed", "nan"], "speed"),
    (["replay", "--fault", "drop@nothing"], "never strike"), (["simulate", "c.yaml", "--seed", str(10**30)], "--seed"),
    (["build-regimes", "--start", "2026-01-02", "--end", "2026-01-01"], "swap them"), (["quality", "BTC", "--start", "9999-12-31"], "--start"),
    (["realism-check", "--days", "1e9"], "--days"), (["auto-calibrate", "--as-of", "1500-01-01"], "1678"),
    (["replay", "--fault", "gremlins"], "gremlins"), (["replay", "--at", "never"], "--at"), (["simulate", "c.yaml", "--days", "-1"], "--days"),
    (["simulate", "c.yaml", "--every", "7x"], "interval"), (["simulate", "c.yaml", "--seed", "-1"], "seed"), (["build-regimes", "--start", "soon"], "ISO"),
    (["calibrate", "c.yaml", "--out", "/"], "is a folder"), (["update-vol-surface", "c.yaml", "--out", "/"], "is a folder"),
    (["history", "--db", f"sqlite:///{__file__}/h.db"], "no folder"), (["serve", "--port", "99999"], "65535"), (["panel", "--port", "0"], "65535"),
])
def test_usage_errors_exit_2_and_say_what_is_wrong(words, told):
    code, out, err = volcal(*words)
    assert (code, out) == (2, "")
    assert told in err and "Traceback" not in err


def test_domain_errors_exit_1_with_one_plain_message(tmp_path):
    bad = tmp_path / "bad.yaml"
    bad.write_text("underlying: BTC\nmax_dt: 3\n")
    for words, told in [(["calibrate", bad], "did you mean max_dte"), (["calibrate", tmp_path / "none.yaml"], "cannot be read"),
                        (["quality", "BTC", "--data-dir", tmp_path / "none"], "none"), (["quality", "DOGE", "--data-dir", SAMPLE], "this root has BTC"),
                        (["harvest", "--status", "--assets", "ETH", "--data-dir", SAMPLE], "this root has BTC")]:
        code, out, err = volcal(*words)
        assert (code, out) == (1, "")
        assert err.startswith("volcal: ") and told in err and "Traceback" not in err
    shown = subprocess.run([sys.executable, "-c", "from volcal.ops.cli import app; app()", "--debug", "calibrate", str(bad)], capture_output=True, text=True)
    assert shown.returncode == 1 and "Traceback" in shown.stderr


def test_auto_calibrate_json_is_the_whole_result(tmp_path):
    words = ("auto-calibrate", "--data-dir", SAMPLE, "--as-of", AS_OF, "--report-dir", tmp_path / "r", "--db", f"sqlite:///{tmp_path}/h.db", "--json")
    code, out, err = volcal(*words)
    content = json.loads(out)
    assert (code, err) == (0, "")
    assert (content["status"], content["history_id"]) == ("ok", 1) and content["reason"]
    assert Path(content["report"]).is_dir()
    assert CalibrationResult(**{name: content[name] for name in CalibrationResult.model_fields}).count == content["count"]
    code, out, _ = volcal("history", "BTC", "--db", f"sqlite:///{tmp_path}/h.db", "--json")
    assert [row["id"] for row in json.loads(out)] == [1]
    assert "OK" in volcal("history", "--db", f"sqlite:///{tmp_path}/h.db")[1]


def test_dry_run_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = volcal("auto-calibrate", "--data-dir", SAMPLE, "--as-of", AS_OF, "--dry-run")
    assert (code, err) == (0, "") and "multiplier            0.93" in out
    assert list(tmp_path.iterdir()) == []


def test_the_summary_says_what_the_specification_wants(tmp_path):
    out = volcal("auto-calibrate", "--data-dir", SAMPLE, "--as-of", AS_OF, "--dry-run")[1]
    for name in ("underlying", "3 to 10 days", "lookback", "samples", "multiplier", "vega-weighted MAE", "weekly", "monthly", "quarterly",
                 "skew misfit", "status", "reason", "history row", "report"):
        assert name in out, name
    failed = volcal("auto-calibrate", "--data-dir", SAMPLE, "--as-of", "2024-01-01", "--dry-run")
    assert failed[0] == 4 and "must not be used" in failed[1]


def test_calibrate_prints_a_summary_or_json(config, tmp_path):
    code, out, err = volcal("calibrate", config)
    assert (code, err) == (0, "") and "recommended" in out and "status OK" in out
    code, out, _ = volcal("calibrate", config, "--json", "--out", tmp_path / "result.json")
    assert json.loads(out) == json.loads((tmp_path / "result.json").read_text())


def test_calibrate_without_data_is_an_error(config):
    config.write_text(config.read_text().replace("2025-10", "2024-10"))
    code, out, err = volcal("calibrate", config)
    assert (code, out) == (1, "") and "no snapshot of BTC" in err


def test_degraded_and_failed_exit_3_and_4(config, monkeypatch):
    judged = jobs.calibrate_config
    for status, code in (("degraded", 3), ("failed", 4)):
        monkeypatch.setattr(jobs, "calibrate_config", lambda *a, s=status, **k: judged(*a, **k).with_verdict(s, "as the test wants"))
        assert volcal("calibrate", config)[0] == code
        assert volcal("update-vol-surface", config)[0] == code


def test_update_vol_surface_changes_only_vol_surface(config, tmp_path):
    desk = tmp_path / "desk.yaml"
    text = "# our desk\nspot_path:   # keep\n  start_spot: 90000\n\n"
    text += "vol_surface:\n  # old\n  iv_multiplier: 1.0\n\n  use_regime_vrp: true\n\n# the seed\nseed: 7\n"
    desk.write_text(text)
    code, out, err = volcal("update-vol-surface", config, "--into", desk, "--out", tmp_path / "block.json")
    after = desk.read_text()
    assert (code, out) == (0, "") and "wrote vol_surface" in err
    head, tail = text.split("vol_surface:")[0], text[text.index("\n# the seed"):]
    assert after.startswith(head) and after.endswith(tail)
    surface = yaml.safe_load(after)["vol_surface"]
    assert abs(surface["iv_multiplier"] / 0.93 - 1) < 0.01
    assert json.loads((tmp_path / "block.json").read_text())["vol_surface"] == surface
    assert volcal("update-vol-surface", config, "--into", desk)[0] == 0 and desk.read_text() == after, "doing it twice changes nothing"


def test_update_vol_surface_refuses_a_failed_run(config, tmp_path, monkeypatch):
    judged = jobs.calibrate_config
    monkeypatch.setattr(jobs, "calibrate_config", lambda *a: judged(*a).with_verdict("failed", "multiplier 2.1 is at or above 1.6"))
    desk = tmp_path / "desk.yaml"
    desk.write_text("seed: 7\n")
    code, out, err = volcal("update-vol-surface", config, "--into", desk, "--out", tmp_path / "block.yaml")
    assert (code, out) == (4, "") and "never applied" in err
    assert desk.read_text() == "seed: 7\n" and not (tmp_path / "block.yaml").exists()


def test_update_vol_surface_into_json(config, tmp_path):
    desk = tmp_path / "desk.json"
    desk.write_text('{\n  "seed": 7,\n  "vol_surface": {"iv_multiplier": 1.0}\n}\n')
    assert volcal("update-vol-surface", config, "--into", desk)[0] == 0
    content = json.loads(desk.read_text())
    assert list(content) == ["seed", "vol_surface"] and content["vol_surface"]["iv_multiplier"] < 1.0


def test_quality_says_ok_stale_and_failed():
    code, out, _ = volcal("quality", "btc", "--data-dir", SAMPLE, "--end", AS_OF, "--json")
    assert (code, json.loads(out)["status"]) == (0, "ok")
    code, out, _ = volcal("quality", "BTC", "--data-dir", SAMPLE)
    assert code == 3 and "stale" in out and "DEGRADED" in out
    assert volcal("quality", "BTC", "--data-dir", SAMPLE, "--start", "2024-01-01", "--end", "2024-01-02")[0] == 4


def test_update_then_calibrate_judges_what_was_written(config):
    """A config of all nine old fields, as desks have them."""
    config.write_text(config.read_text() + "iv_multiplier: 1.0\nrv_window_days: 7\nskew: {enabled: true, min_dte: 3, max_dte: 14}\n")
    assert "(now 1.000)" in volcal("calibrate", config)[1]
    assert volcal("update-vol-surface", config, "--into", config)[0] == 0
    code, out, _ = volcal("calibrate", config)
    assert code == 0 and "(now 0.93" in out
    after = json.loads(volcal("calibrate", config, "--json")[1])
    assert after["global_metrics"]["vega_weighted_mae_pct"] == pytest.approx(after["recommended_metrics"]["vega_weighted_mae_pct"], rel=1e-6)


def test_a_damaged_surface_in_the_target_is_an_error(config, tmp_path):
    desk = tmp_path / "desk.yaml"
    for text in ("vol_surface: {iv_multiplyer: 1.0}\n", "vol_surface: high\n"):
        desk.write_text(text)
        code, out, err = volcal("update-vol-surface", config, "--into", desk)
        assert (code, out, desk.read_text()) == (1, "", text) and "is no surface" in err


def test_the_job_judges_what_is_applied(tmp_path):
    place = ("--db", f"sqlite:///{tmp_path}/h.db", "--report-dir", tmp_path / "r", "--data-dir", SAMPLE, "--as-of", AS_OF, "--lookback-days", "4")
    first = json.loads(volcal("auto-calibrate", *place, "--apply", "--json")[1])
    assert first["surface_source"] == "configured" and first["iv_multiplier"] == 1.0 and first["applied"]["run_id"] == 1
    code, out, _ = volcal("auto-calibrate", *place)
    assert code == 0 and "run 1" in next(line for line in out.splitlines() if line.startswith("judged surface"))
    assert f"2 in sqlite:///{tmp_path}/h.db" in out and "from history" in out
    rows = json.loads(volcal("history", "--db", f"sqlite:///{tmp_path}/h.db", "--json")[1])
    assert len({row["config_hash"] for row in rows}) == 1, "the judged surface splits no smoothing"
    second = json.loads(volcal("auto-calibrate", *place, "--dry-run", "--json")[1])
    assert second["iv_multiplier"] == first["recommended_iv_multiplier"] == second["recommended_iv_multiplier"]
    assert second["global_metrics"]["mae_pct"] < first["global_metrics"]["mae_pct"]
    page = next(Path(tmp_path / "r").glob("BTC/*/auto_calibrate.html")).parent.parent
    assert any(", run 1" in path.read_text() for path in page.glob("*/auto_calibrate.html"))


def test_every_underlying_in_error_is_an_error(tmp_path):
    (tmp_path / "r").write_text("a file")
    db = f"sqlite:///{tmp_path}/h.db"
    code, out, _ = volcal("auto-calibrate-all", "--underlyings", "BTC,ETH", "--report-dir", tmp_path / "r", "--data-dir", SAMPLE, "--db", db)
    assert code == 1 and out.count("ERROR") == 2 and "Errno" not in out


def test_files_for_folders_are_told_in_words(config, tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    db = f"sqlite:///{tmp_path}/h.db"
    for words in (["auto-calibrate", "--report-dir", file, "--data-dir", SAMPLE, "--as-of", AS_OF, "--db", db], ["demo", "--report-dir", file],
                  ["quality", "BTC", "--data-dir", file], ["harvest", "--status", "--data-dir", file], ["compact", "BTC", "--data-dir", file],
                  ["simulate", ROOT / "data" / "configs" / "synthetic.yaml", "--out", file, "--days", "1"], ["calibrate", tmp_path],
                  ["replay", "--data-dir", file]):
        code, out, err = volcal(*words)
        assert (code, out) == (1, ""), words
        assert err.startswith("volcal: ") and "Errno" not in err and "Traceback" not in err, (words, err)


def test_quality_without_snapshots_says_what_there_is():
    code, out, err = volcal("quality", "BTC", "--data-dir", SAMPLE, "--start", "2030-01-01")
    assert code == 4 and "no snapshot" in out and "2025-10-15 23:00" in err and "None" not in out + err


def test_history_of_an_unknown_asset_says_which_are_there(tmp_path):
    db = f"sqlite:///{tmp_path}/h.db"
    assert "no calibration of DOGE is recorded" in volcal("history", "doge", "--db", db)[2]


def test_files_that_can_never_be_merged_do_not_degrade_every_night(tmp_path):
    day = tmp_path / "harvest" / "BTC" / "2025" / "10" / "15"
    day.mkdir(parents=True)
    pd.DataFrame({"name": ["x"]}).to_parquet(day / "BTC_2025-10-15_0000.parquet")
    for _ in range(2):
        code, out, err = volcal("compact", "BTC", "--data-dir", tmp_path / "harvest")
        assert code == 0 and "lack columns" in err and "1 left" in out
    (day / "BTC_2025-10-15_0100.parquet").write_bytes(b"torn")
    assert volcal("compact", "BTC", "--data-dir", tmp_path / "harvest")[0] == 3


def test_a_damaged_day_file_does_not_keep_other_days_from_being_compacted(tmp_path):
    root = tmp_path / "harvest"
    shutil.copytree(SAMPLE, root)
    (root / "BTC" / "2025" / "10" / "03" / "BTC_2025-10-03.parquet").write_bytes(b"torn")
    code, out, err = volcal("compact", "BTC", "--data-dir", root)
    assert code == 1 and "BTC_2025-10-03.parquet cannot be read" in err and "2025-10-15  24 snapshots" in out


def test_an_unknown_kind_of_url_is_an_error():
    code, out, err = volcal("quality", "BTC", "--data-dir", "s3x://bucket")
    assert (code, out) == (1, "") and "cannot be opened" in err


def test_compact_merges_a_day_once(tmp_path):
    root = tmp_path / "harvest"
    shutil.copytree(SAMPLE, root)
    before = volcal("quality", "BTC", "--data-dir", root, "--end", AS_OF, "--json")[1]
    code, out, _ = volcal("compact", "BTC", "--data-dir", root, "--day", "2025-10-15", "--json")
    assert code == 0 and json.loads(out)[0]["removed"] == 24
    assert volcal("quality", "BTC", "--data-dir", root, "--end", AS_OF, "--json")[1] == before
    code, out, _ = volcal("compact", "BTC", "--data-dir", root)
    assert code == 0 and len(out.splitlines()) == 15


def test_demo_leaves_a_report_and_a_history_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = volcal("demo")
    assert code == 0 and "0.93" in err
    page = Path(out.splitlines()[-1].split()[-1])
    assert page.is_file() and page.suffix == ".html" and page.is_relative_to("reports")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["reports"], "the desk's history is left alone"
