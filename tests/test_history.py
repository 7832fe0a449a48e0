"""The calibration history, the same tests on SQLite and PostgreSQL: many writers, kills, upgrades, a database that is down."""
import math
import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import uuid
from datetime import UTC, datetime, timedelta

import pandas as pd
import pytest
import sqlalchemy as sa

from volcal.calibration.result import CalibrationResult
from volcal.ops.history import (
    SCHEMA_VERSION,
    CalibrationHistoryEntry,
    entry_from_result,
    find_calibrations,
    get_calibration,
    get_latest_calibration,
    history_connection,
    history_frame,
    history_url,
    insert_calibration_history,
    list_recent_calibrations,
    mark_applied,
)
from volcal.units import ConfigError, HistoryError

SEVEN = {"underlying": "BTC", "dte_min": 3, "dte_max": 10, "lookback_days": 14, "multiplier": 0.951, "mae_pct": 7.1, "num_samples": 412}
NOON = datetime(2025, 12, 10, 12, tzinfo=UTC)
WRITERS, ROWS = map(int, os.environ.get("VOLCAL_TEST_WRITERS", "4x25").split("x"))  # 8x200 for the full proof


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    """A history of its own: a file, or a schema of its own in the PostgreSQL of VOLCAL_TEST_DATABASE_URL."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/desk/history.db"
        return
    server = os.environ.get("VOLCAL_TEST_DATABASE_URL", "")
    if not server:
        pytest.skip("VOLCAL_TEST_DATABASE_URL is not set: no PostgreSQL to test on")
    schema, engine = f"volcal_{uuid.uuid4().hex[:12]}", sa.create_engine(history_url(server))
    with engine.begin() as connection:
        connection.exec_driver_sql(f"CREATE SCHEMA {schema}")
    yield history_url(server).update_query_dict({"options": f"-csearch_path={schema}"}).render_as_string(hide_password=False)
    with engine.begin() as connection:
        connection.exec_driver_sql(f"DROP SCHEMA {schema} CASCADE")
    engine.dispose()


def test_seven_fields_come_back(url):
    before = datetime.now(UTC)
    number = insert_calibration_history(CalibrationHistoryEntry(**SEVEN), url)
    found = get_calibration(number, url)
    assert found.model_dump(include=set(SEVEN)) == SEVEN
    assert before <= found.created_at <= datetime.now(UTC) and found.created_at.utcoffset() == timedelta(0)
    assert (found.status, found.applied, found.details, found.source) == (None, False, {}, None)


def test_every_field_comes_back(url):
    full = CalibrationHistoryEntry(
        **{**SEVEN, "mae_pct": 1.7976931348623157e308, "multiplier": 0.1 + 0.2},
        created_at="2025-12-10T13:00:00.123456+01:00", source="harvested", vega_weighted_mae_pct=4.9, bias_pct=-1e-300,
        status="degraded", reason="a gap of 5.2 h; größer als üblich ’", applied=True,
        config_hash="0123456789abcdef", report="reports/BTC/x",
        details={"bands": [{"name": "weekly", "min_dte": 3, "max_dte": 10, "m": math.nan}], "0.15": {"ü": [1, None, True]}})
    found = get_calibration(insert_calibration_history(full, url), url)
    assert found.model_copy(update={"id": None}) == full
    assert found.details["bands"][0]["m"] is None


def test_empty_metrics_of_a_failed_run(url):
    empty = {"multiplier": math.nan, "mae_pct": None, "lookback_days": None, "num_samples": 0}
    failed = {**SEVEN, **empty, "status": "failed", "reason": "no data"}
    found = get_calibration(insert_calibration_history(failed, url), url)
    assert (found.multiplier, found.mae_pct, found.num_samples, found.status) == (None, None, 0, "failed")


def test_newest_first_and_latest(url):
    def put(day, **change):
        return insert_calibration_history({**SEVEN, "created_at": NOON + timedelta(days=day), "status": "ok", **change}, url)

    ids = {"old": put(0), "later": put(2), "failed": put(3, status="failed"), "eth": put(9, underlying="eth"), "wide": put(5, dte_max=30),
           "live": put(1, source="live"), "tie": put(2)}
    order = [entry.id for entry in list_recent_calibrations("btc", url=url)]
    assert order == [ids[name] for name in ("wide", "failed", "tie", "later", "live", "old")]
    assert get_latest_calibration("BTC", 3, 10, url=url).id == ids["tie"]
    assert get_latest_calibration("BTC", 3, 10, include_failed=True, url=url).id == ids["failed"]
    assert get_latest_calibration("BTC", 3, 10, source="live", url=url).id == ids["live"]
    assert get_latest_calibration("BTC", 3, 11, url=url) is None
    window = find_calibrations("BTC", since=NOON + timedelta(days=1), until="2025-12-12T12:00Z", statuses=("ok",), url=url)
    assert [entry.id for entry in window] == [ids["tie"], ids["later"], ids["live"]]
    assert len(list_recent_calibrations(limit=3, url=url)) == 3
    with pytest.raises(ConfigError, match="limit is 0"):
        list_recent_calibrations(limit=0, url=url)


def test_a_frame_for_notebooks(url):
    assert history_frame(url=url).empty
    insert_calibration_history({**SEVEN, "created_at": NOON}, url)
    frame = history_frame("BTC", url=url)
    assert str(frame["created_at"].dt.tz) == "UTC" and frame["created_at"].iloc[0] == pd.Timestamp(NOON)


def test_applied_is_noted(url):
    number = insert_calibration_history({**SEVEN, "details": {"events": [1]}}, url)
    mark_applied(number, "desk", url)
    found = get_calibration(number, url)
    assert found.applied and found.details["applied"]["by"] == "desk" and found.details["events"] == [1]
    with pytest.raises(HistoryError, match="no run 999"):
        mark_applied(999, url=url)


def test_a_result_becomes_a_row(url):
    result = CalibrationResult(underlying="ETH", min_dte=3, max_dte=10, recommended_iv_multiplier=0.78, status="ok", reason="x",
                               recommended_metrics={"count": 60, "mae_pct": 5.0}, data_quality={"status": "ok", "gaps": [math.nan]})
    found = get_calibration(insert_calibration_history(entry_from_result(result, 14), url), url)
    assert (found.num_samples, found.mae_pct, found.details["data_quality"]) == (60, 5.0, {"status": "ok", "gaps": [None]})


def old_table(url):
    """What the first version made: nine columns, none of them optional, times without a zone."""
    postgres = url.startswith("postgresql")
    if not postgres:
        path = history_url(url).database
        os.makedirs(os.path.dirname(path), exist_ok=True)
    key, when, real = ("SERIAL PRIMARY KEY", "TIMESTAMP", "REAL") if postgres else ("INTEGER PRIMARY KEY AUTOINCREMENT", "DATETIME", "REAL")
    engine = sa.create_engine(history_url(url))
    with engine.begin() as connection:
        connection.exec_driver_sql(
            f"CREATE TABLE calibration_history (id {key}, created_at {when} NOT NULL, underlying TEXT NOT NULL, dte_min INTEGER NOT NULL, "
            f"dte_max INTEGER NOT NULL, lookback_days INTEGER NOT NULL, multiplier {real} NOT NULL, mae_pct {real} NOT NULL, "
            "num_samples INTEGER NOT NULL)")
        for day in (29, 30):
            connection.exec_driver_sql(
                "INSERT INTO calibration_history (created_at, underlying, dte_min, dte_max, lookback_days, multiplier, mae_pct, "
                "num_samples) "
                f"VALUES ('2025-11-{day} 23:30:00', 'BTC', 3, 10, 14, 0.75, 8.5, 300)")
    engine.dispose()


def test_an_old_table_is_upgraded_in_place(url):
    old_table(url)
    found = list_recent_calibrations("BTC", url=url)
    assert [(e.id, e.multiplier, e.status, e.applied) for e in found] == [(2, 0.75, None, False), (1, 0.75, None, False)]
    assert found[0].created_at == datetime(2025, 11, 30, 23, 30, tzinfo=UTC)
    new = insert_calibration_history({**SEVEN, "dte_min": 2.5, "multiplier": None, "mae_pct": 0.1, "status": "failed"}, url)
    assert new == 3 and get_calibration(3, url).dte_min == 2.5 and get_calibration(3, url).mae_pct == 0.1
    assert [e.id for e in find_calibrations("BTC", statuses=("ok", "degraded"), url=url)] == []


def test_old_rows_without_status_never_count_as_ok(url):
    old_table(url)
    assert get_latest_calibration("BTC", 3, 10, url=url).status is None


def test_a_history_of_the_future_is_left_alone(url):
    insert_calibration_history(SEVEN, url)
    with history_connection(url, write=True) as connection:
        connection.exec_driver_sql(f"UPDATE volcal_schema SET version = {SCHEMA_VERSION + 1}")
    with pytest.raises(HistoryError, match="update volcal"):
        insert_calibration_history(SEVEN, url)


def test_a_failing_transaction_leaves_nothing(url):
    insert_calibration_history(SEVEN, url)
    with pytest.raises(HistoryError, match="cannot be written"), history_connection(url, write=True) as connection:
        connection.exec_driver_sql("UPDATE calibration_history SET multiplier = 2")
        connection.exec_driver_sql("SELECT * FROM nowhere")
    assert get_calibration(1, url).multiplier == 0.951


def write_rows(url, writer, rows, start):
    start.wait()
    for n in range(rows):
        insert_calibration_history({**SEVEN, "underlying": f"W{writer}", "num_samples": n, "details": {"text": "x" * 2000}}, url)


@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "old table"])
def test_many_processes_lose_nothing(url, fresh):
    if not fresh:
        old_table(url)
    context = multiprocessing.get_context("fork")
    start = context.Event()
    workers = [context.Process(target=write_rows, args=(url, writer, ROWS, start)) for writer in range(WRITERS)]
    for worker in workers:
        worker.start()
    start.set()
    for worker in workers:
        worker.join(300)
    assert [worker.exitcode for worker in workers] == [0] * WRITERS
    found = list_recent_calibrations(limit=None, url=url)
    assert len({entry.id for entry in found}) == len(found) == WRITERS * ROWS + (0 if fresh else 2)
    for writer in range(WRITERS):
        assert sorted(e.num_samples for e in found if e.underlying == f"W{writer}") == list(range(ROWS))
    assert_whole(url)


def assert_whole(url):
    if url.startswith("sqlite"):
        with history_connection(url) as connection:
            assert connection.exec_driver_sql("PRAGMA integrity_check").scalar() == "ok"
            assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"


def test_a_kill_in_the_middle_leaves_a_readable_history(url):
    code = ("import sys\nfrom volcal.ops.history import insert_calibration_history as put\n"
            f"entry = {SEVEN!r}\nentry['details'] = {{'text': 'x' * 20000}}\nwhile True: print(put(entry, sys.argv[1]), flush=True)")
    for _ in range(3):
        victim = subprocess.Popen([sys.executable, "-c", code, url], stdout=subprocess.PIPE, text=True)
        told = [int(victim.stdout.readline()) for _ in range(5)]
        time.sleep(0.05)
        victim.send_signal(signal.SIGKILL)
        told += [int(line) for line in victim.stdout.read().splitlines()]
        victim.wait()
        assert set(told) <= {entry.id for entry in list_recent_calibrations(limit=None, url=url)}
    assert insert_calibration_history(SEVEN, url) > max(told)
    assert_whole(url)


def test_a_forked_process_may_write_too(url):
    insert_calibration_history(SEVEN, url)
    context = multiprocessing.get_context("fork")
    start = context.Event()
    start.set()
    child = context.Process(target=write_rows, args=(url, 0, 3, start))
    child.start()
    insert_calibration_history(SEVEN, url)
    child.join(60)
    assert child.exitcode == 0 and len(list_recent_calibrations(url=url)) == 5


def test_a_database_that_is_down_is_told_without_its_password():
    with pytest.raises(HistoryError) as caught:
        insert_calibration_history(SEVEN, "postgresql://desk:sesame@127.0.0.1:9/vol?application_name=sesame")
    assert "127.0.0.1:9" in str(caught.value) and "sesame" not in str(caught.value) and "is up" in str(caught.value)


def test_a_place_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(HistoryError, match="cannot be made"):
        insert_calibration_history(SEVEN, f"sqlite:///{tmp_path}/file/history.db")
    (tmp_path / "torn.db").write_bytes(b"SQLite format 3\x00" + b"torn" * 500)
    with pytest.raises(HistoryError, match="cannot be read"):
        list_recent_calibrations(url=f"sqlite:///{tmp_path}/torn.db")


@pytest.mark.parametrize("change", ["details = '{torn'", "details = '[1, 2]'", "details = X'00ff'", "multiplier = 'much'", "multiplier = 'NaN'",
                                    "created_at = 'yesterday'", "created_at = 1e300", "num_samples = 'many'", "dte_min = 'x'", "reason = X'ff'",
                                    """details = '{"time_range": 5}'""", """details = '{"bands": [5]}'""", "underlying = ''",
                                    """details = '{"recommended_metrics": {"vega_sum": "lots"}}'"""])
def test_a_damaged_row_hides_no_other_and_is_never_used(tmp_path, change):
    url = f"sqlite:///{tmp_path}/h.db"
    for _ in range(3):
        insert_calibration_history({**SEVEN, "status": "ok"}, url)
    with history_connection(url, write=True) as connection:
        connection.exec_driver_sql(f"UPDATE calibration_history SET {change} WHERE id = 2")
    found = {entry.id: entry for entry in list_recent_calibrations(url=url)}
    assert {number: entry.status for number, entry in found.items()} == {1: "ok", 2: "failed", 3: "ok"}
    assert found[2].reason.startswith("this row cannot be read: ") and change.split()[0] in found[2].reason
    assert get_latest_calibration("BTC", 3, 10, url=url).id == 3


def test_text_that_no_database_keeps_is_marked(url):
    found = get_calibration(insert_calibration_history({**SEVEN, "reason": "a\x00b\ud800c 😀", "details": {"\ud800": "\x00"}}, url), url)
    assert found.reason == "a\ufffdb\ufffdc 😀" and found.details == {"\ud800": "\x00"}
    assert find_calibrations("\ud800\x00", url=url) == []


@pytest.mark.parametrize("change", [{"underlying": "X" * 33}, {"num_samples": 2**31}, {"num_samples": -1}, {"config_hash": "x" * 65}, {"dte_min": math.nan},
                                    {"dte_max": math.inf}, {"lookback_days": 10**400}, {"created_at": "soon"}, {"details": [1]}])
def test_what_a_column_cannot_hold_is_refused_alike(url, change):
    with pytest.raises(HistoryError, match=f"nothing was written: {next(iter(change))} = "):
        insert_calibration_history({**SEVEN, **change}, url)


def test_numbers_beyond_a_column(url):
    insert_calibration_history({**SEVEN, "created_at": "1700-01-01T00:00:00Z"}, url)
    assert get_calibration(1, url).created_at.year == 1700 and len(list_recent_calibrations(limit=2**70, url=url)) == 1
    with pytest.raises(HistoryError, match="there is no run 1180591620717411303424"):
        get_calibration(2**70, url)
    with pytest.raises(ConfigError, match="'soon' is not a point in time"):
        find_calibrations(since="soon", url=url)


def test_a_locked_history_is_read_and_its_writers_are_told(tmp_path, monkeypatch):
    url = f"sqlite:///{tmp_path}/h.db"
    insert_calibration_history(SEVEN, url)
    monkeypatch.setattr("volcal.ops.history.BUSY_SECONDS", 0.2)
    holder = sqlite3.connect(tmp_path / "h.db", isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    assert len(list_recent_calibrations(url=url)) == 1
    with pytest.raises(HistoryError, match="cannot be written: database is locked"):
        insert_calibration_history(SEVEN, url)
    holder.close()
    assert insert_calibration_history(SEVEN, url) == 2


def as_nobody(url, answers):
    """What a user without rights is told; run in a child of its own."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    for task in (lambda: len(list_recent_calibrations(url=url)), lambda: insert_calibration_history(SEVEN, url)):
        try:
            answers.put(task())
        except HistoryError as error:
            answers.put(str(error))


@pytest.mark.parametrize("file_mode,folder_mode,read,write", [
    (0o444, 0o777, 1, "attempt to write a readonly database"), (0o000, 0o777, "unable to open database file", "unable to open database file"),
    (0o666, 0o700, "Permission denied", "Permission denied")], ids=["read-only", "unreadable", "closed folder"])
def test_a_history_without_rights_is_told(file_mode, folder_mode, read, write):
    if os.geteuid() and folder_mode == 0o700:
        pytest.skip("only root can make a folder that another user may not enter")
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{folder}/h.db"
        insert_calibration_history(SEVEN, url)
        os.chmod(f"{folder}/h.db", file_mode)
        os.chmod(folder, folder_mode)
        context = multiprocessing.get_context("fork")
        answers = context.Queue()
        child = context.Process(target=as_nobody, args=(url, answers))
        child.start()
        for wanted in (read, write):
            found = answers.get(timeout=60)
            assert found == wanted if isinstance(wanted, int) else wanted in found
        child.join(60)


@pytest.mark.parametrize("url,told", [
    ("history.db", "cannot be read"), (" ", "cannot be read"), ("postgresql://h:port/x", "cannot be read"), ("mysql://u@h/x", "use SQLite or PostgreSQL"),
    ("postgresql+asyncpg://127.0.0.1/x", "write the URL without a driver"), ("sqlite:////proc/none/h.db", "cannot be made"),
    ("sqlite:////dev/full", "full"), ("postgresql://none.invalid/x", "none.invalid")])
def test_a_bad_url_is_told(url, told):
    with pytest.raises(HistoryError, match=told):
        insert_calibration_history(SEVEN, url)


def test_reading_creates_nothing(tmp_path):
    assert list_recent_calibrations(url=f"sqlite:///{tmp_path}/none/history.db") == []
    assert not (tmp_path / "none").exists()


def test_default_url_is_the_settings(tmp_path, monkeypatch):
    from volcal.settings import get_settings
    monkeypatch.setenv("VOLCAL_DATABASE_URL", f"sqlite:///{tmp_path}/here.db")
    get_settings(reload=True)
    try:
        insert_calibration_history(SEVEN)
        assert (tmp_path / "here.db").exists() and len(list_recent_calibrations()) == 1
    finally:
        monkeypatch.undo()
        get_settings(reload=True)


def test_memory_history_lives_as_long_as_the_process():
    assert insert_calibration_history(SEVEN, "sqlite://") == 1
    assert get_calibration(1, "sqlite://").underlying == "BTC"
