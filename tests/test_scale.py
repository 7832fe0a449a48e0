"""Days from a cache, from processes, from a cluster, from object stores: the same bytes, and what went wrong is said."""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from datetime import datetime
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from test_historical import ASSETS, FULL, START, differences, same, snapshot, write_harvest, write_raw
from typer.testing import CliRunner

from volcal.calibration import cache as cache_room
from volcal.calibration import executors, historical, sums
from volcal.calibration.cache import SUMS, DayCache, DayWork
from volcal.calibration.days import DayResult, DayTask
from volcal.calibration.executors import ClusterPool, LocalPool, open_executor
from volcal.calibration.historical import run_historical_calibration_from_harvest
from volcal.calibration.result import CalibrationResult
from volcal.market import store as store_room
from volcal.market.deribit import Deribit
from volcal.market.harvester import harvest_once
from volcal.market.replay import ReplayExchange
from volcal.market.store import Store
from volcal.ops.cli import app
from volcal.units import ConfigError, JobError, StoreError
from volcal.vol.regimes import RegimeModel
from volcal.vol.sensors import harvest_sensor_table

DAYS = 4


def calibrate(root: Path | str, executor: Any = None, cache: Any = None, **changes: Any) -> CalibrationResult:
    harvest = {"data_root": str(root), **changes.pop("harvest", {})}
    config = {"underlying": "BTC", "source": "harvested", "max_samples": 0, "harvest": harvest, **changes}
    return run_historical_calibration_from_harvest(config, executor, cache=cache)


def same_but(one: CalibrationResult, other: CalibrationResult, *events: str) -> bool:
    """Equal apart from these events, which only one of them has."""
    found = differences(one.to_dict(), other.to_dict())
    assert found == sorted(f"events.{event}" for event in events), found
    return True


def day_paths(root: Path, number: int) -> list[Path]:
    """The files of a day of the harvest."""
    return sorted((root / "BTC" / f"{START + pd.Timedelta(days=number):%Y/%m/%d}").iterdir())


def write_history(root: Path | str) -> None:
    """Hourly candles from a month before the harvest to a week after it."""
    times = pd.date_range(START.floor("h") - pd.Timedelta(days=30), START + pd.Timedelta(days=DAYS + 7), freq="1h")
    close = 90_000 * np.exp(np.cumsum(np.random.default_rng(3).normal(0, 0.006, len(times))))
    Store(str(root)).write_history("BTC", "ohlc", pd.DataFrame({"timestamp": times, "open": close, "high": close, "low": close, "close": close}))


@pytest.fixture
def harvest(tmp_path: Path) -> Path:
    write_harvest(tmp_path / "harvest", number=4 * DAYS, every="6h", candles=False)
    write_history(tmp_path / "harvest")
    return tmp_path / "harvest"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The days that pass 1 computes, as they come."""
    seen: list[str] = []

    def counting(task: DayTask) -> DayResult:
        seen.append(f"{task.refs[0].day}")
        return SUMS.compute(task)

    monkeypatch.setattr(historical, "SUMS", dataclasses.replace(SUMS, compute=counting))
    return seen


# The cache


def test_cold_warm_and_off_are_the_same_bytes(harvest: Path, place: Path, computed: list[str]) -> None:
    off, cold = calibrate(harvest, **FULL), calibrate(harvest, cache=place, **FULL)
    assert len(computed) == 2 * DAYS
    warm = calibrate(harvest, cache=place, **FULL)
    assert len(computed) == 2 * DAYS
    assert same(off, cold) and same(off, warm)


def test_a_further_day_computes_one_day(harvest: Path, place: Path, computed: list[str]) -> None:
    calibrate(harvest, cache=place)
    computed.clear()
    for time_ in pd.date_range(START + pd.Timedelta(days=DAYS), periods=4, freq="6h"):
        write_raw(harvest, "BTC", time_, snapshot(time_))
    further = calibrate(harvest, cache=place)
    assert computed == [f"{START + pd.Timedelta(days=DAYS):%Y-%m-%d}"]
    assert same(further, calibrate(harvest))


def test_a_window_that_moves_on_keeps_its_inner_days(harvest: Path, place: Path, computed: list[str]) -> None:
    def window(days: int) -> dict[str, Any]:
        return {"start_time": START + pd.Timedelta(days=days, hours=3), "end_time": START + pd.Timedelta(days=days + 3, hours=3)}

    calibrate(harvest, cache=place, harvest=window(0))
    computed.clear()
    moved = calibrate(harvest, cache=place, harvest=window(1))
    assert len(computed) == 2  # its first day, and the one of which the last window saw only a part
    assert same(moved, calibrate(harvest, harvest=window(1)))


def rewrite(root: Path) -> None:
    path = day_paths(root, 2)[1]
    frame = pd.read_parquet(path)
    frame.assign(mark_price=frame["mark_price"] * 1.01).to_parquet(path, index=False)


def rewrite_at_the_same_time(root: Path) -> None:
    path = day_paths(root, 2)[1]
    before = path.stat()
    pd.read_parquet(path).iloc[:-1].to_parquet(path, index=False)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def touch(root: Path) -> None:
    os.utime(day_paths(root, 2)[1])


def remove(root: Path) -> None:
    day_paths(root, 2)[1].unlink()


def add(root: Path) -> None:
    when = START + pd.Timedelta(days=2, hours=1)
    write_raw(root, "BTC", when, snapshot(when))


def damage(root: Path) -> None:
    day_paths(root, 2)[1].write_bytes(b"PAR1")


def compact(root: Path) -> None:
    Store(root).compact("BTC", (START + pd.Timedelta(days=2)).date())


@pytest.mark.parametrize("change", [rewrite, rewrite_at_the_same_time, touch, remove, add, damage, compact])
def test_a_changed_file_costs_its_day(change: Callable[[Path], None], harvest: Path, place: Path, computed: list[str]) -> None:
    first = calibrate(harvest, cache=place)
    computed.clear()
    change(harvest)
    after = calibrate(harvest, cache=place)
    assert computed == [f"{START + pd.Timedelta(days=2):%Y-%m-%d}"]
    assert same(after, calibrate(harvest))
    assert change in (touch, compact) or differences(first.to_dict(), after.to_dict())


def test_another_price_costs_the_days_that_look_back_on_it(harvest: Path, place: Path, computed: list[str]) -> None:
    calibrate(harvest, cache=place, rv_window_days=2)
    computed.clear()
    store, last = Store(str(harvest)), START.floor("h") + pd.Timedelta(days=1)
    store.write_history("BTC", "ohlc", pd.DataFrame({"timestamp": [last], "open": 9e4, "high": 9e4, "low": 9e4, "close": 9.1e4}))
    after = calibrate(harvest, cache=place, rv_window_days=2)
    assert 0 < len(computed) < DAYS and computed[0] == f"{START + pd.Timedelta(days=1):%Y-%m-%d}"
    assert same(after, calibrate(harvest, rv_window_days=2))


CHANGES: list[dict[str, Any]] = [
    {"min_dte": 4}, {"iv_multiplier": 1.1}, {"max_samples": 20}, {"option_types": ["C", "P"]}, {"error_ladder": True}, {"skew": {"max_dte": 10}},
    {"filters": {"min_open_interest": 5}}, {"harvest": {"forward": "parity"}},
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: next(iter(change)))
def test_another_config_computes_every_day(change: dict[str, Any], harvest: Path, place: Path, computed: list[str]) -> None:
    calibrate(harvest, cache=place)
    computed.clear()
    after = calibrate(harvest, cache=place, **change)
    assert len(computed) == DAYS and same(after, calibrate(harvest, **change))


@pytest.mark.parametrize("change", [{"return_rows": False}, {"min_rv_coverage": 0.4}, {"harvest": {"expected_step_minutes": 360}}], ids=str)
def test_what_only_the_end_reads_computes_no_day(change: dict[str, Any], harvest: Path, place: Path, computed: list[str]) -> None:
    calibrate(harvest, cache=place)
    computed.clear()
    after = calibrate(harvest, cache=place, **change)
    assert not computed and same(after, calibrate(harvest, **change))


def test_other_code_computes_every_day(harvest: Path, place: Path, computed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    calibrate(harvest, cache=place)
    computed.clear()
    monkeypatch.setattr(cache_room, "CODE_VERSION", "later")
    calibrate(harvest, cache=place)
    assert len(computed) == DAYS


def test_the_code_version_is_of_every_computing_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("calibration", "market", "vol"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "room.py").write_text("x = 1\n")
    monkeypatch.setattr(cache_room.volcal, "__file__", str(tmp_path / "__init__.py"))
    seen = {cache_room._source_version()}
    for name in ("calibration", "market", "vol"):
        (tmp_path / name / "room.py").write_text("x = 2\n")
        seen.add(cache_room._source_version())
    assert len(seen) == 4


def spoil_end(data: bytes) -> bytes:
    return data[:-7]


def spoil_bit(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :]


@pytest.mark.parametrize("spoil", [spoil_end, spoil_bit, lambda data: b"", lambda data: b"\x80\x04cos\nsystem\n"])
def test_a_corrupt_entry_is_computed_again_and_said(spoil: Callable[[bytes], bytes], harvest: Path, place: Path, computed: list[str]) -> None:
    first = calibrate(harvest, cache=place)
    computed.clear()
    path = sorted((place / "BTC").iterdir())[1]
    path.write_bytes(spoil(path.read_bytes()))
    again = calibrate(harvest, cache=place)
    assert again.events["cache_corrupt"] == 1 and same_but(first, again, "cache_corrupt")
    assert computed == [path.name.split(".")[0]]


def test_an_entry_under_another_name_is_not_believed(harvest: Path, place: Path) -> None:
    first = calibrate(harvest, cache=place)
    one, other, *_ = sorted((place / "BTC").iterdir())
    one.write_bytes(other.read_bytes())
    assert same_but(first, calibrate(harvest, cache=place), "cache_corrupt")


def test_today_is_not_kept(harvest: Path, place: Path, computed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Then(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return (START + pd.Timedelta(days=DAYS - 1, hours=20)).to_pydatetime()

    monkeypatch.setattr(cache_room, "datetime", Then)
    calibrate(harvest, cache=place)
    calibrate(harvest, cache=place)
    today = f"{START + pd.Timedelta(days=DAYS - 1):%Y-%m-%d}"
    assert len(computed) == DAYS + 1 and computed[-1] == today
    assert not any(path.name.startswith(today) for path in (place / "BTC").iterdir())


@pytest.mark.parametrize("what", ["a file comes while it is computed", "a writer is at work"])
def test_a_day_whose_files_are_coming_is_not_kept(what: str, harvest: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    busy = day_paths(harvest, 1)[0].parent

    def coming(task: DayTask) -> DayResult:
        if what.startswith("a file") and busy.as_posix() in task.refs[0].path:
            (busy / "BTC_later.parquet").write_bytes(b"x")
        return SUMS.compute(task)

    if what.startswith("a writer"):
        (busy / ".BTC.parquet.1-2.tmp").write_bytes(b"x")
    monkeypatch.setattr(historical, "SUMS", dataclasses.replace(SUMS, compute=coming))
    calibrate(harvest, cache=place)
    kept = {path.name.split(".")[0] for path in (place / "BTC").iterdir()}
    assert len(kept) == DAYS - 1 and f"{START + pd.Timedelta(days=1):%Y-%m-%d}" not in kept


def test_a_cache_that_cannot_be_written_costs_no_number(harvest: Path, place: Path) -> None:
    place.write_text("a file where a folder should be")
    assert same_but(calibrate(harvest), found := calibrate(harvest, cache=place), "cache_not_written", *_unreadable(harvest, place))
    assert found.events["cache_not_written"] == DAYS


def _unreadable(harvest: Path, place: Path) -> list[str]:
    return [name for name in calibrate(harvest, cache=place).events if name == "cache_unreadable"]


def run_with_cache(root: str, place: str) -> str:
    return calibrate(root, cache=place).to_json()


def forkserver() -> Any:
    context = get_context("forkserver")
    context.set_forkserver_preload(["volcal.calibration.historical"])
    return context


def test_several_writers_do_not_disturb_each_other(harvest: Path, place: Path, computed: list[str]) -> None:
    with ProcessPoolExecutor(2, mp_context=forkserver()) as pool:
        runs = [pool.submit(run_with_cache, str(harvest), str(place)) for _ in range(2)]
        texts = {run.result() for run in runs}
    after = calibrate(harvest, cache=place)
    assert texts == {after.to_json()} and not computed and "cache_corrupt" not in after.events
    assert len(list((place / "BTC").iterdir())) == DAYS


def test_a_longer_window_keeps_fewer_rows_of_a_cached_day(
    harvest: Path, place: Path, computed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sums, "SAMPLE_ROWS", 100)
    short, whole = ({"end_time": START + pd.Timedelta(days=days, hours=20)} for days in (1, DAYS))
    calibrate(harvest, cache=place, harvest=short, **FULL)
    computed.clear()
    long = calibrate(harvest, cache=place, harvest=whole, **FULL)
    assert len(computed) == DAYS - 2 and same(long, calibrate(harvest, harvest=whole, **FULL))
    computed.clear()
    assert same(calibrate(harvest, cache=place, harvest=short, **FULL), calibrate(harvest, harvest=short, **FULL))


@pytest.mark.parametrize("source", ["index_price", "nearest_forward"])
def test_prices_and_sensors_of_known_days_are_not_read_again(tmp_path: Path, place: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without candles and with a regime model a run reads the window three times, with index prices or without; a warm one only its two probes."""
    root = tmp_path / "bare"
    write_harvest(root, number=4 * DAYS, every="6h", candles=False)
    if source == "nearest_forward":
        for path in root.rglob("BTC_*.parquet"):
            pq.write_table(pq.read_table(path).drop_columns("index_price"), path)
    table = harvest_sensor_table(Store(root), "BTC").frame
    RegimeModel.fit(table, features=("iv_7d", "iv_30d"), k=2, provenance={"asset": "BTC"}).to_json(tmp_path / "model.json")
    config = {"regimes": str(tmp_path / "model.json"), "rv_window_days": 1, "min_rv_n_eff": 2}
    read: list[int] = []
    batch = Store.read_batch
    monkeypatch.setattr(Store, "read_batch", lambda self, refs, *more, **named: read.append(1) or batch(self, refs, *more, **named))
    off, cold, warm = calibrate(root, **config), calibrate(root, cache=place, **config), len(read)
    assert warm == 2 * (3 * DAYS + 2)
    assert same(off, cold) and same(off, calibrate(root, cache=place, **config))
    assert len(read) == warm + 2 and len(off.environment_summary) == 2 and off.rv_source == source


def test_the_cache_stays_in_its_bound(harvest: Path, place: Path) -> None:
    calibrate(harvest, cache=place)
    size = sum(path.stat().st_size for path in place.rglob("*.*"))
    calibrate(harvest, cache=DayCache(place, max_bytes=size), seed=1)
    assert sum(path.stat().st_size for path in place.rglob("*.*")) <= size


# Processes


def killed_once(task: DayTask, number: int = 2) -> DayResult:
    """A day whose first worker is killed."""
    mark = Path(task.root) / ".killed"
    if parent_process() is not None and task.refs[0].day == (START + pd.Timedelta(days=number)).date() and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return SUMS.compute(task)


def tenth_killed_once(task: DayTask) -> DayResult:
    return killed_once(task, 9)


def always_killed(task: DayTask, number: int = 2) -> DayResult:
    if parent_process() is not None and task.refs[0].day == (START + pd.Timedelta(days=number)).date():
        os.kill(os.getpid(), signal.SIGKILL)
    return SUMS.compute(task)


def tenth_always_killed(task: DayTask) -> DayResult:
    return always_killed(task, 9)


def use(monkeypatch: pytest.MonkeyPatch, compute: Any) -> None:
    monkeypatch.setattr(historical, "SUMS", dataclasses.replace(SUMS, compute=compute))


def test_a_killed_worker_costs_its_day_only(harvest: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = calibrate(harvest, **FULL)
    use(monkeypatch, killed_once)
    with open_executor(2) as pool:
        found = calibrate(harvest, pool, place, **FULL)
    assert found.events["days_done_again"] == 1 and same_but(alone, found, "days_done_again")
    assert same(alone, calibrate(harvest, cache=place, **FULL))


@pytest.mark.parametrize("limit, started", [(8, True), (100_000, False)])
def test_many_files_go_to_processes_unless_told(harvest: Path, monkeypatch: pytest.MonkeyPatch, limit: int, started: bool) -> None:
    monkeypatch.setattr(executors, "MANY_FILES", limit)
    with open_executor("auto") as pool:
        found = calibrate(harvest, pool)
        assert bool(pool._all) is started
    assert same(calibrate(harvest), found)


def test_many_files_of_an_object_store_stay_here(harvest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executors, "MANY_FILES", 1)
    alone, root = calibrate(harvest), copied(harvest, "memory://many")
    with open_executor("auto") as pool:
        found = calibrate(root, pool)
        assert not pool._all
    assert found.count == alone.count and found.recommended_iv_multiplier == alone.recommended_iv_multiplier


def test_a_broken_plain_pool_leaves_its_days_to_us(harvest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = calibrate(harvest)
    use(monkeypatch, killed_once)
    with ProcessPoolExecutor(1, mp_context=forkserver()) as pool:
        assert same_but(alone, calibrate(harvest, pool), "days_done_again")


def test_a_day_that_kills_every_worker_is_named(harvest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, always_killed)
    with open_executor(2) as pool, pytest.raises(JobError, match="BTC 2026-03-04"):
        calibrate(harvest, pool)


def test_an_error_in_a_worker_is_the_error_of_the_run(harvest: Path) -> None:
    damage(harvest)
    with open_executor(2) as pool, pytest.raises(Exception, match="cannot serve as a snapshot"):
        calibrate(harvest, pool, harvest={"on_schema_error": "raise"})


ORPHANS = """
import os, signal, sys, time
from concurrent.futures import wait
from volcal.calibration.executors import LocalPool
if __name__ == "__main__":
    pool = LocalPool(1)
    print(pool.submit(os.getpid).result(), flush=True)
    pool.submit(time.sleep, 60)
    time.sleep(0.2)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_end_with_their_parent(tmp_path: Path) -> None:
    import subprocess
    import sys

    (tmp_path / "orphans.py").write_text(ORPHANS)
    told = subprocess.run([sys.executable, str(tmp_path / "orphans.py")], stdout=subprocess.PIPE, text=True)
    worker = int(told.stdout)
    until = time.monotonic() + 10
    while alive(worker) and time.monotonic() < until:
        time.sleep(0.05)
    assert told.returncode == -signal.SIGKILL and not alive(worker)


def alive(process: int) -> bool:
    """Whether it runs; one that waits to be reaped does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# The command line


def command(*words: str) -> tuple[int, str]:
    root = logging.getLogger()
    handlers = root.handlers[:]
    found = CliRunner().invoke(app, list(words))
    root.handlers[:] = handlers  # not the command's: its stderr is closed now
    return found.exit_code, found.output


def test_the_command_line_keeps_days_unless_told_not_to(harvest: Path, tmp_path: Path) -> None:
    words = ("auto-calibrate", "--dry-run", "--data-dir", str(harvest), "--as-of", f"{START + pd.Timedelta(days=3)}", "--lookback-days", "3", "--json")
    place = ("--cache", str(tmp_path / "kept"))
    told = [command(*words, *more) for more in (("--no-cache",), place, place, ("--workers", "2", "--no-cache"))]
    texts = {text.replace(str(tmp_path / "kept"), "") for _, text in told}
    assert len(texts) == 1 and {code for code, _ in told} <= {0, 3, 4}
    assert len(list((tmp_path / "kept" / "BTC").iterdir())) == 4


@pytest.mark.parametrize(("words", "told"), [
    (("--cluster", "tcp://a:1", "--workers", "2"), "give one of them"), (("--cache", "x", "--no-cache"), "give one of them"),
    (("--workers", "-1"), "Invalid value")])  # fmt: skip
def test_what_cannot_compute_is_a_usage_error(words: tuple[str, ...], told: str) -> None:
    code, text = command("auto-calibrate", "--dry-run", *words)
    assert code == 2 and told in text


# A cluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Two workers in processes of their own."""
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0", silence_logs=50) as running:
        yield running.scheduler_address


def both_workers(cluster: str) -> None:
    """Wait for the one that replaces a worker that was killed."""
    distributed = pytest.importorskip("distributed")
    with distributed.Client(cluster, set_as_default=False) as client:
        client.wait_for_workers(2, timeout=60)


def test_four_assets_through_a_cluster_are_the_same_bytes(cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ASSETS, "SOL_USDC", 140.0)
    for number, asset in enumerate(ASSETS):
        write_harvest(tmp_path, asset, number=4 + 2 * number, every="7h", candles=asset != "ETH")
    assert len(ASSETS) == 4
    with open_executor(cluster=cluster) as pool:
        for asset in ASSETS:
            assert same(calibrate(tmp_path, **FULL, underlying=asset), calibrate(tmp_path, pool, **FULL, underlying=asset))


def test_a_killed_cluster_worker_costs_its_day_only(cluster: str, harvest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = calibrate(harvest)
    use(monkeypatch, killed_once)
    with open_executor(cluster=cluster) as pool:
        found = calibrate(harvest, pool)
    assert 1 <= found.events["days_done_again"] <= 2 and same_but(alone, found, "days_done_again")


@pytest.fixture
def many_days(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sixteen days, whose calls hold as many as they may once the first is back."""
    write_harvest(tmp_path, number=32, every="12h", candles=False)
    for pool in (ClusterPool, LocalPool):
        monkeypatch.setattr(pool, "call_seconds", 1e9)
    return tmp_path


def watched(monkeypatch: pytest.MonkeyPatch, pool: Any) -> list[int]:
    """Days of each call that a pool is given from now on."""
    sent, submit = list[int](), pool.submit
    monkeypatch.setattr(pool, "submit", lambda fn, work, days, most: sent.append(len(days)) or submit(fn, work, days, most))
    return sent


def test_a_killed_worker_costs_the_days_of_its_calls(cluster: str, many_days: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """First for prices and then for sums."""
    both_workers(cluster)
    alone = calibrate(many_days)
    use(monkeypatch, tenth_killed_once)
    with open_executor(cluster=cluster) as pool:
        sent = watched(monkeypatch, pool)
        found = calibrate(many_days, pool)
    assert sent == 2 * [1, 1, 1, 1, 1, 1, 2, 2, 1, 1, 1, 1, 1, 1]
    assert 2 <= found.events["days_done_again"] <= 4 and same_but(alone, found, "days_done_again")


@pytest.mark.parametrize("kills, again", [(tenth_killed_once, 2), (tenth_always_killed, 0)])
def test_a_killed_process_costs_its_call(many_days: Path, monkeypatch: pytest.MonkeyPatch, kills: Any, again: int) -> None:
    """Where it is always the same day that kills, that day is named, whoever travelled with it."""
    alone = calibrate(many_days)
    use(monkeypatch, kills)
    with open_executor(2) as pool:
        if not again:
            with pytest.raises(JobError, match="given BTC 2026-03-11 died"):
                calibrate(many_days, pool)
            return
        found = calibrate(many_days, pool)
    assert found.events["days_done_again"] == again and same_but(alone, found, "days_done_again")


def test_a_day_that_kills_every_cluster_worker_is_named(many_days: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    distributed = pytest.importorskip("distributed")
    dask = pytest.importorskip("dask")
    use(monkeypatch, tenth_always_killed)
    patient = {"distributed.deploy.lost-worker-timeout": "300s"}  # a busy machine takes its time to replace eight workers
    with dask.config.set(patient), distributed.LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=":0", silence_logs=50) as own:
        with open_executor(cluster=own.scheduler_address) as pool, pytest.raises(JobError, match="given BTC 2026-03-11 died"):
            calibrate(many_days, pool)


class AccusesNeighbours(Executor):
    """A scheduler's habit: a day that is with a worker when another kills it is accused too; alone it is not."""

    def __init__(self) -> None:
        self.accused: list[int] = []

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future:
        day, out = args[1][0], Future()
        if day == 3 or (day in (2, 4) and day not in self.accused):
            self.accused.append(day)
            out.set_exception(executors._WorkersLost(f"day {day}"))
        else:
            out.set_result(fn(*args, **kwargs))
        return out


def test_a_day_that_is_accused_beside_the_killer_is_done_alone() -> None:
    pool, found = AccusesNeighbours(), []
    with pytest.raises(JobError, match="day 3"):
        for one in executors.spread(abs, range(9), pool, Counter()):
            found.append(one)
    assert found == [0, 1, 2] and pool.accused.count(3) == 2


def test_outcomes_that_were_taken_are_not_kept(tmp_path: Path) -> None:
    """Neither here nor by dask, without any garbage collection; so nobody waits for them when the workers are gone."""
    import gc

    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=":0", silence_logs=50) as own:
        with open_executor(cluster=own.scheduler_address) as pool:
            gc.disable()
            try:
                assert list(executors.spread(abs, range(200), pool, Counter())) == list(range(200))
                until = time.monotonic() + 10
                while pool._client.futures and time.monotonic() < until:
                    time.sleep(0.05)
                assert not pool._client.futures
            finally:
                gc.enable()
            own.scale(0)


def test_a_failing_day_gives_up_no_day_before_it(many_days: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was computed is kept in the cache, whatever calls it travelled in."""
    place = tmp_path_factory.mktemp("kept")
    use(monkeypatch, tenth_always_killed)
    with open_executor(2) as pool, pytest.raises(JobError, match="given BTC 2026-03-11 died"):
        calibrate(many_days, pool, place)
    assert sum(".sums." in entry.name for entry in (place / "BTC").iterdir()) == 9


def test_a_root_that_a_worker_does_not_see(cluster: str, harvest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def elsewhere(task: DayTask) -> DayResult:
        return SUMS.compute(dataclasses.replace(task, root="/not/here"))

    use(monkeypatch, elsewhere)
    with open_executor(cluster=cluster) as pool, pytest.raises(StoreError, match="sees no folder /not/here"):
        calibrate(harvest, pool)


def test_workers_of_another_version_are_refused(cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    both_workers(cluster)
    monkeypatch.setattr("volcal.calibration.executors.SOURCE_VERSION", "later")
    with pytest.raises(ConfigError, match="2 of 2 workers run another volcal"):
        ClusterPool(cluster)


def test_a_cluster_that_loses_its_workers_says_so_and_goes_on_with_the_next(
    harvest: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    distributed = pytest.importorskip("distributed")
    monkeypatch.setattr(executors, "WAIT_SECONDS", 0.3)
    with distributed.LocalCluster(n_workers=1, processes=False, dashboard_address=":0", silence_logs=50) as running:
        with open_executor(cluster=running.scheduler_address) as pool:
            running.scale(0)
            with ThreadPoolExecutor(1) as aside, caplog.at_level(logging.WARNING, "volcal.executors"):
                waiting = aside.submit(calibrate, harvest, pool)
                until = time.monotonic() + 60
                while "has no workers left" not in caplog.text and time.monotonic() < until:
                    time.sleep(0.1)
                running.scale(1)
                found = waiting.result(120)
    assert "has no workers left" in caplog.text and same(calibrate(harvest), found)


def test_a_cluster_without_workers_is_refused() -> None:
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(n_workers=0, dashboard_address=":0", silence_logs=50) as idle:
        with pytest.raises(ConfigError, match="has no workers"):
            ClusterPool(idle.scheduler_address, seconds=1.0)


def test_a_cluster_needs_dask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "distributed", None)
    with pytest.raises(ConfigError, match="pip install 'volcal\\[distributed\\]'"):
        ClusterPool("tcp://127.0.0.1:8786")


# Object stores


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """A bucket on an S3 server of this machine."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    s3fs = pytest.importorskip("s3fs")
    server.start()
    host, port = server.get_host_and_port()
    told = {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in told.items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir("market")
        yield "s3://market"
        s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


@pytest.fixture(params=["memory", "s3"])
def remote(request: pytest.FixtureRequest) -> Iterator[str]:
    """An object store, emptied afterwards."""
    base = "memory://market" if request.param == "memory" else request.getfixturevalue("s3")
    yield base
    fs, path = fsspec.core.url_to_fs(base)
    if fs.exists(path):
        for file in fs.find(path):
            fs.rm_file(file)


def copied(root: Path, url: str) -> str:
    fs, path = fsspec.core.url_to_fs(url)
    for file in root.rglob("*.parquet"):
        fs.pipe_file(f"{path}/{file.relative_to(root)}", file.read_bytes())
    return url


WHERE = ["reproducibility.config.harvest.data_root", "reproducibility.config_hash"]


def test_the_whole_way_through_an_object_store(remote: str, harvest: Path) -> None:
    """Harvested into it, read, calibrated, compacted, and calibrated again: what the same files on disk give."""
    root, local, times = f"{remote}/harvest", str(harvest.parent / "local"), pd.date_range(START, periods=4, freq="6h")
    for when in times:
        with ReplayExchange(harvest, at=when) as exchange:
            for place in (root, local):
                (entry,) = harvest_once(place, ["BTC"], Deribit(exchange.url))
                assert entry.status == "present"
    for place in (root, local):
        write_history(place)
    on_disk, there = calibrate(local), calibrate(root)
    assert differences(on_disk.to_dict(), there.to_dict()) == WHERE and there.count > 100
    report = Store(root).compact("BTC", START.date())
    assert (report.added, report.removed) == (4, 4) and len(Store(root).find("BTC")) == 4
    assert same(there, calibrate(root))
    assert (again := Store(root).compact("BTC", START.date())).added == 0 and again.snapshots == 4


def test_the_promises_of_the_store_hold_there(remote: str) -> None:
    store, frame = Store(f"{remote}/promises"), snapshot(START)
    path = store.write_snapshot(frame, "BTC", START)
    assert store.write_snapshot(frame, "BTC", START) == path
    with pytest.raises(StoreError, match="not overwritten"):
        store.write_snapshot(frame.assign(mark_iv=50.0), "BTC", START)
    later = START + pd.Timedelta(minutes=15)
    store.write_snapshot(snapshot(later), "BTC", later)
    (ref, _), before = store.find("BTC"), store.read_batch(store.find("BTC")).frame
    store.compact("BTC", START.date())
    assert Store(store.root).read_batch([ref]).frame.equals(before[before["snapshot"] == 0])  # found before, read after it was compacted
    pd.testing.assert_frame_equal(store.read_batch(store.find("BTC")).frame, before)
    assert store.write_snapshot(frame, "BTC", START).endswith("BTC_2026-03-02.parquet")
    with pytest.raises(StoreError, match="not overwritten"):
        store.write_snapshot(frame.assign(mark_iv=50.0), "BTC", START)
    assert [ref.time for ref in store.find("BTC", START, START)] == [START.floor("min")]
    with pytest.raises(StoreError, match="no folder"):
        Store(f"{remote}/nothing").find("BTC")


def test_a_day_file_that_another_process_replaced_is_read_whole(s3: str, harvest: Path) -> None:
    """What was listed before says nothing about the size of what is there now."""
    s3fs = pytest.importorskip("s3fs")
    store = Store(f"{s3}/replaced")
    for hours in (0, 6):
        store.write_snapshot(snapshot(START + pd.Timedelta(hours=hours)), "BTC", START + pd.Timedelta(hours=hours))
    store.compact("BTC", START.date())
    refs = store.find("BTC")
    other = s3fs.S3FileSystem(skip_instance_cache=True)
    local = Store(harvest)
    local.compact("BTC", START.date())
    other.pipe_file(refs[0].path.removeprefix("s3://"), day_paths(harvest, 0)[0].read_bytes())
    assert len(store.read_batch(refs).refs) == 2


@pytest.mark.parametrize("remote", ["memory", "s3"], indirect=True)
def test_a_cache_in_an_object_store(remote: str, harvest: Path, computed: list[str]) -> None:
    root, place = copied(harvest, f"{remote}/harvest"), f"{remote}/cache"
    off, cold = calibrate(root), calibrate(root, cache=place)
    assert same(off, cold) and len(computed) == 2 * DAYS
    assert same(off, calibrate(root, cache=place)) and len(computed) == 2 * DAYS
    fs, path = fsspec.core.url_to_fs(f"{root}/BTC/{START:%Y/%m/%d}")
    file = fs.ls(path, detail=False)[0]
    fs.pipe_file(file, fs.cat_file(file))
    assert same(off, calibrate(root, cache=place)) and len(computed) == 2 * DAYS + (remote.startswith("memory"))
    entry = sorted(fs.find(fsspec.core.url_to_fs(place)[1]))[-1]
    fs.pipe_file(entry, b"nothing")
    assert same_but(off, calibrate(root, cache=place), "cache_corrupt")


def test_workers_read_an_object_store(s3: str, harvest: Path) -> None:
    root = copied(harvest, f"{s3}/workers")
    alone = calibrate(root)
    with LocalPool(1) as pool:
        assert same(alone, calibrate(root, pool))


def test_a_task_is_small(harvest: Path) -> None:
    """Prices and models stay where they are: what travels is names, two numbers per snapshot and the plan."""
    import pickle

    sent: list[int] = []

    def measuring(task: DayTask) -> DayResult:
        sent.append(len(pickle.dumps(task)))
        return SUMS.compute(task)

    with pytest.MonkeyPatch.context() as patch:
        use(patch, measuring)
        calibrate(harvest, **FULL)
    assert max(sent) < 20_000


@pytest.mark.parametrize("with_candles", [True, False])
def test_a_file_that_could_not_be_read_once_is_not_remembered(
    harvest: Path, place: Path, with_candles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not with_candles:
        (harvest / "_history" / "BTC_ohlc.parquet").unlink()
    broken, read = day_paths(harvest, 1)[0], store_room._LocalLooking.read

    def failing(self: Any, path: str) -> Any:
        if Path(path) == broken:
            raise OSError(5, "the disc did not answer")
        return read(self, path)

    with monkeypatch.context() as patch:
        patch.setattr(store_room._LocalLooking, "read", failing)
        hurt = calibrate(harvest, cache=DayCache(place))
    assert hurt.events["schema_failures"] == 1
    healed = calibrate(harvest, cache=DayCache(place))
    assert same_but(healed, calibrate(harvest)) and healed.snapshot_count == hurt.snapshot_count + 1


def test_work_is_plain(harvest: Path) -> None:
    """What is sent to workers can be imported by them."""
    for work in (cache_room.SUMS, cache_room.PRICES, cache_room.FORWARDS, cache_room.LEVELS):
        assert isinstance(work, DayWork) and work.compute.__module__ == "volcal.calibration.days"
    assert np.isfinite(calibrate(harvest).mae_pct)
