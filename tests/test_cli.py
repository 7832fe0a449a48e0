"""The command line: what goes to stdout, what to stderr, and how it exits."""
import json
import shutil
import subprocess
import sys
from pathlib import Path

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
                   "db", "report-dir", "apply", "dry-run", "json"):
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
])
def test_usage_errors_exit_2_and_say_what_is_wrong(words, told):
    code, out, err = volcal(*words)
    assert (code, out) == (2, "")
    assert told in err and "Traceback" not in err


def test_domain_errors_exit_1_with_one_plain_message(tmp_path):
    bad = tmp_path / "bad.yaml"
    bad.write_text("underlying: BTC\nmax_dt: 3\n")
    for words, told in [(["calibrate", bad], "did you mean max_dte"), (["calibrate", tmp_path / "none.yaml"], "cannot be read"),
                        (["quality", "BTC", "--data-dir", tmp_path / "none"], "none"), (["history", "--db", "mysql://x/y"], "not supported")]:
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
        monkeypatch.setattr(jobs, "calibrate_config", lambda *a, s=status: judged(*a).with_verdict(s, "as the test wants"))
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
