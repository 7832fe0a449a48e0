"""The job: what it leaves behind when all is well, and when it is not."""
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from volcal.calibration.result import result_from_json
from volcal.ops.history import get_calibration, list_recent_calibrations
from volcal.ops.jobs import AutoCalibrateParameters, auto_calibrate, run_auto_calibrate

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = str(ROOT / "data" / "sample")
AS_OF = "2025-10-15T23:00Z"


@pytest.fixture
def place(tmp_path):
    """Where reports and history of a test go."""
    return {"report_dir": tmp_path / "reports", "db": f"sqlite:///{tmp_path / 'history.db'}"}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """One whole run on the sample, shared by the tests that only look."""
    tmp_path = tmp_path_factory.mktemp("good")
    db = f"sqlite:///{tmp_path / 'history.db'}"
    return run_auto_calibrate({"data_dir": SAMPLE, "as_of": AS_OF}, tmp_path / "reports", db), db


def folders(place) -> list[str]:
    """The runs of BTC; the lock of the underlying lies beside them."""
    return sorted(path.name for path in (Path(place["report_dir"]) / "BTC").iterdir() if path.name != ".lock")


def test_a_good_run_leaves_a_report_a_result_and_a_row(good):
    run, db = good
    assert (run.result.status, run.exit_code, run.problems) == ("ok", 0, [])
    assert sorted(path.name for path in run.report.iterdir()) == ["auto_calibrate.html", "auto_calibrate.ipynb", "auto_calibrate.json"]
    assert [path.name for path in run.report.parent.iterdir()] == [run.report.name], "no partial folder stays"
    row = get_calibration(run.history_id, db)
    assert (row.status, row.multiplier, row.report) == ("ok", run.result.recommended_iv_multiplier, str(run.report))
    assert result_from_json(run.report / "auto_calibrate.json") == run.result
    assert abs(run.result.recommended_iv_multiplier / 0.93 - 1) < 0.01


def test_the_page_is_whole_and_shows_no_code(good):
    page = good[0].page.read_text(encoding="utf-8")
    assert page.index(">OK<") < page.index("<img"), "the verdict comes before the pictures"
    assert page.count("<img") == page.count('alt="') == 6
    for unwanted in ("<script", "http://", "https://", "output_stream", "Warning", "Traceback", "from volcal", "result_path", "&lt;Figure"):
        assert unwanted not in page, unwanted
    for wanted in ("vol_surface:", "config hash", "Data health", "out of sample", "iv_multiplier"):
        assert wanted in page, wanted


def test_the_executed_notebook_is_clean_and_parameterised(good):
    notebook = json.loads(next(good[0].report.glob("*.ipynb")).read_text(encoding="utf-8"))
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    assert outputs and not [o for o in outputs if o["output_type"] in ("stream", "error")]
    assert sum("injected-parameters" in cell["metadata"].get("tags", []) for cell in notebook["cells"]) == 1


def test_the_same_window_gives_the_same_bytes(good):
    again = auto_calibrate({"data_dir": SAMPLE, "as_of": AS_OF})
    assert again.to_json() == (good[0].report / "auto_calibrate.json").read_text(encoding="utf-8")


def test_max_samples_caps_the_window_and_spreads_over_it():
    few = auto_calibrate({"data_dir": SAMPLE, "as_of": AS_OF, "max_samples": 100})
    assert 50 <= few.count <= 100
    days = {row["harvest_time"][:10] for row in few.rows}
    assert len(days) >= 13, "the whole window is sampled, not its beginning"
    every = auto_calibrate({"data_dir": SAMPLE, "as_of": AS_OF, "max_samples": 0})
    assert every.count > 5000 and "not_sampled" not in every.events


def test_plain_papermill_runs_the_notebook(tmp_path):
    out, left = tmp_path / "out.ipynb", tmp_path / "left.json"
    source = ROOT / "nbs" / "jobs" / "auto_calibrate.ipynb"
    words = [sys.executable, "-m", "papermill", str(source), str(out), "-p", "lookback_days", "2", "-p", "result_path", str(left)]
    subprocess.run(words, check=True, capture_output=True, cwd=ROOT)
    assert result_from_json(left).snapshot_count == 49


def test_stale_data_degrades(place):
    result = auto_calibrate({"data_dir": SAMPLE, "as_of": "2025-10-18T00:00Z"})
    assert result.status == "degraded"
    assert "stale" in {issue["code"] for issue in result.data_quality["issues"]}


@pytest.mark.parametrize("case", ["empty_window", "missing_root", "missing_asset", "foreign_parquet", "truncated"])
def test_a_window_without_data_is_a_recorded_failed_run(case, place, tmp_path):
    given = {"data_dir": SAMPLE, "as_of": AS_OF}
    day = tmp_path / "harvest" / "BTC" / "2025" / "10" / "15"
    day.mkdir(parents=True)
    if case == "empty_window":
        given["as_of"] = "2024-01-01T00:00Z"
    elif case == "missing_root":
        given["data_dir"] = str(tmp_path / "nowhere")
    elif case == "missing_asset":
        given["underlying"] = "SOL_USDC"
    else:
        given["data_dir"] = str(tmp_path / "harvest")
        file = day / "BTC_2025-10-15_2200.parquet"
        pd.DataFrame({"a": np.arange(5)}).to_parquet(file)
        if case == "truncated":
            file.write_bytes(file.read_bytes()[:100])
    run = run_auto_calibrate(given, **place)
    assert (run.result.status, run.exit_code) == ("failed", 4)
    assert run.report.name.endswith(".failed") and run.page.is_file() and (run.report / "auto_calibrate.json").is_file()
    row = list_recent_calibrations(url=place["db"])[0]
    assert (row.id, row.status, row.multiplier) == (run.history_id, "failed", None)
    assert row.reason and row.reason == run.result.reason
    page = run.page.read_text(encoding="utf-8")
    assert ">FAILED<" in page and "Traceback" not in page


def test_bad_parameters_run_nothing(place):
    with pytest.raises(ValueError, match="did you mean lookback_days"):
        run_auto_calibrate({"lookback_day": 3}, **place)
    assert not Path(place["report_dir"]).exists()


def test_a_crash_is_recorded_and_keeps_its_evidence(place, tmp_path):
    given = {"data_dir": SAMPLE, "as_of": AS_OF, "price_history": str(tmp_path / "no_candles.parquet")}
    source = tmp_path / "broken.ipynb"
    source.write_text((ROOT / "nbs" / "jobs" / "auto_calibrate.ipynb").read_text(encoding="utf-8").replace("report.tiles(result)", "report.tile(result)"))
    run = run_auto_calibrate({**given, "price_history": ""}, **place, source=source)
    assert (run.exit_code, run.result.status) == (1, "failed")
    assert "AttributeError" in run.problems[0]
    assert "AttributeError" in (run.report / "error.txt").read_text() and run.report.name.endswith(".failed")
    assert list_recent_calibrations(url=place["db"])[0].status == "failed", "a result left before the crash does not make it a good run"


def test_a_database_that_is_down_costs_the_row_not_the_report(place):
    run = run_auto_calibrate({"data_dir": SAMPLE, "as_of": AS_OF, "lookback_days": 2}, place["report_dir"], "postgresql://nobody@127.0.0.1:1/none")
    assert run.exit_code == 1 and run.history_id is None
    assert run.page.is_file() and "not recorded" in run.problems[0]
    assert not run.report.name.endswith((".failed", ".partial"))


def test_a_report_dir_that_cannot_be_written_is_an_error(tmp_path):
    file = tmp_path / "reports"
    file.write_text("not a folder")
    with pytest.raises(OSError):
        run_auto_calibrate({"data_dir": SAMPLE, "as_of": AS_OF}, file)


def wait_for(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


@pytest.mark.parametrize("sign, suffix", [(signal.SIGKILL, ".partial"), (signal.SIGTERM, ".failed")])
def test_a_killed_run_leaves_nothing_that_looks_like_a_report(sign, suffix, place, tmp_path):
    words = ["auto-calibrate", "--data-dir", SAMPLE, "--as-of", AS_OF, "--report-dir", str(place["report_dir"]), "--db", place["db"]]
    process = subprocess.Popen([sys.executable, "-c", "from volcal.ops.cli import app; app()", *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    base = Path(place["report_dir"]) / "BTC"
    wait_for(lambda: base.is_dir() and folders(place))
    time.sleep(1.0)
    process.send_signal(sign)
    assert process.wait(60) != 0
    assert [Path(name).suffix for name in folders(place)] == [suffix]
    assert not (tmp_path / "history.db").exists() or not list_recent_calibrations(url=place["db"])


def test_two_runs_of_one_second_keep_apart(tmp_path):
    from datetime import UTC, datetime

    from volcal.ops.jobs import new_folder

    now = datetime(2026, 1, 1, tzinfo=UTC)
    names = [new_folder(tmp_path, now).name for _ in range(3)]
    assert len(set(names)) == 3
    (tmp_path / names[0]).rename(tmp_path / names[0].replace(".partial", ".failed"))
    assert new_folder(tmp_path, now).name not in names


def test_parameters_of_another_day_have_the_same_recipe(good):
    from volcal.ops.jobs import job_hash

    other = AutoCalibrateParameters(data_dir="elsewhere", as_of="2025-10-14")
    assert get_calibration(good[0].history_id, good[1]).config_hash == job_hash(other)


def test_written_files_keep_their_permissions_and_survive_a_failure(tmp_path, monkeypatch):
    from volcal.ops.jobs import write_atomically

    file = tmp_path / "config.yaml"
    file.write_text("a: 1\n")
    file.chmod(0o640)
    write_atomically(file, "a: 2\n")
    assert (file.read_text(), stat.S_IMODE(file.stat().st_mode)) == ("a: 2\n", 0o640)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError):
        write_atomically(file, "a: 3\n")
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"] and file.read_text() == "a: 2\n"
    link = tmp_path / "link.yaml"
    monkeypatch.undo()
    link.symlink_to(file)
    write_atomically(link, "a: 4\n")
    assert link.is_symlink() and file.read_text() == "a: 4\n"
    shutil.rmtree(tmp_path)
