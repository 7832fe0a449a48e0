"""A window of a harvest becomes the same result whoever computes it, in whatever order the files lie, in bounded memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from volcal.calibration.historical import run_historical_calibration_from_harvest
from volcal.calibration.result import CalibrationResult
from volcal.market.instruments import format_instrument
from volcal.market.pricing import black76_price
from volcal.market.store import Store
from volcal.settings import real_data_root
from volcal.units import to_utc, year_fraction

SAMPLE = Path(__file__).parents[1] / "data" / "sample"
START = to_utc("2026-03-02T00:10Z")
DAYS_TO_EXPIRY = (1, 4, 6, 9, 12, 20, 27, 55, 88)
ASSETS = {"BTC": 90_000.0, "ETH": 3_000.0, "XRP_USDC": 2.0}


def hourly_closes(spot: float, days: int = 30) -> pd.Series:
    """A seeded path of hourly closes that ends near `spot` two days after START; the second half is the livelier one."""
    times = pd.date_range(START.floor("h") - pd.Timedelta(days=days - 2), periods=24 * days, freq="1h")
    vol = np.where(np.arange(times.size) < times.size * 0.8, 0.4, 0.7)
    steps = np.random.default_rng(5).standard_normal(times.size) * vol / np.sqrt(8760)
    return pd.Series(spot * np.exp(np.cumsum(steps) - steps.sum()), index=times)


def snapshot(time: Any, asset: str = "BTC", level: float = 0.62, rate: float = 0.0,
             days: tuple[int, ...] = DAYS_TO_EXPIRY) -> pd.DataFrame:
    """A chain in the harvest layout with a smile, a term slope, noise, holes in the quotes and open interest."""
    when = to_utc(time)
    rng, spot = np.random.default_rng(when.value // 10**9), float(hourly_closes(ASSETS[asset]).asof(when.floor("h") - pd.Timedelta(hours=1)))
    z = np.linspace(-2.2, 2.2, 15)
    number, ahead = len(days), np.repeat(days, 2 * z.size)
    expiry = when.normalize() + pd.Timedelta(hours=8) + pd.to_timedelta(ahead, unit="D")
    kind, t = np.tile(["C", "P"], z.size * number), year_fraction(when, expiry)
    forward = spot * np.exp(0.04 * t)
    atm = level * (1.15 - 0.03 * np.sqrt(ahead))
    strike = np.array([float(f"{x:.4g}") for x in forward * np.exp(np.tile(np.repeat(z, 2), number) * atm * np.sqrt(t))])
    score = np.log(strike / forward) / (atm * np.sqrt(t))
    by_strike = np.repeat(rng.normal(0, 0.003, z.size * number), 2)
    iv = np.round(atm * (1 - 0.04 * score + 0.05 * score**2) + by_strike, 4)
    unit = np.exp(-rate * t) if "_" in asset else 1.0 / forward
    half = 0.004 + 0.01 * np.abs(score)

    def price(v: np.ndarray) -> np.ndarray:
        return black76_price(forward, strike, t, v, kind) * unit

    names = [format_instrument(asset, *row) for row in zip(expiry, strike, kind, strict=True)]
    quoted = rng.random(iv.size) > 0.1
    return pd.DataFrame({
        "harvest_time": when, "instrument_name": names, "underlying": asset, "expiry": expiry.strftime("%Y-%m-%d"),
        "expiry_timestamp": expiry.as_unit("s").asi8.astype(float), "option_type": kind, "strike": strike, "underlying_price": forward,
        "mark_price": price(iv), "best_bid_price": np.where(quoted, price(iv - half), np.nan), "best_ask_price": price(iv + half),
        "mark_iv": 100 * iv, "open_interest": rng.integers(0, 50, iv.size).astype(float), "volume": 1.0, "index_price": spot})


def write_raw(root: Path, asset: str, time: Any, content: pd.DataFrame | bytes) -> Path:
    """A snapshot file, written by no store: anything goes."""
    when = to_utc(time)
    path = root / asset / f"{when:%Y/%m/%d}" / f"{asset}_{when:%Y-%m-%d_%H%M}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content.to_parquet(path, index=False)
    return path


def write_candles(root: Path, asset: str) -> None:
    closes = hourly_closes(ASSETS[asset])
    frame = pd.DataFrame({"timestamp": closes.index, "open": closes, "high": closes, "low": closes, "close": closes, "volume": 1.0})
    Store(str(root)).write_history(asset, "ohlc", frame.reset_index(drop=True))


def write_harvest(root: Path, asset: str = "BTC", number: int = 24, every: str = "2h", candles: bool = True, **market: Any) -> list[pd.Timestamp]:
    """A small harvest from START on; the times of its snapshots."""
    times = list(pd.date_range(START, periods=number, freq=every))
    for time in times:
        write_raw(root, asset, time, snapshot(time, asset, **market))
    if candles:
        write_candles(root, asset)
    return times


def calibrate(root: Path | str, executor: Executor | None = None, **changes: Any) -> CalibrationResult:
    """Calibrate a harvest; `harvest` among the changes is merged into its section."""
    harvest = {"data_root": str(root), **changes.pop("harvest", {})}
    config = {"underlying": "BTC", "source": "harvested", "max_samples": 0, "harvest": harvest, **changes}
    return run_historical_calibration_from_harvest(config, executor)


FULL: dict[str, Any] = {
    "min_dte": 3, "max_dte": 14, "option_types": ["C", "P"], "fit_skew": True, "bands": True, "bucket_by_dte": True, "bucket_by_abs_delta": True,
    "error_ladder": True, "validation_fraction": 0.3, "max_samples": 60}


def content(result: CalibrationResult) -> str:
    """The result as JSON, byte for byte; a result holds no time of its making."""
    return result.to_json()


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """The plain values of nested JSON by dotted path."""
    if isinstance(value, (dict, list)):
        inside = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for name, part in inside for k, v in leaves(part, f"{path}.{name}".lstrip(".")).items()} or {path: type(value)()}
    return {path: value}


def differences(one: Any, other: Any) -> list[str]:
    """Paths at which two JSON values differ, or that only one has."""
    a, b = leaves(one), leaves(other)
    return sorted(k for k in {*a, *b} if k not in a or k not in b or a[k] != b[k])


def same(one: CalibrationResult, other: CalibrationResult) -> bool:
    where = differences(json.loads(content(one)), json.loads(content(other)))
    assert not where, f"{len(where)} values differ, first {where[:8]}"
    return content(one) == content(other)


@pytest.fixture(scope="module")
def harvest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("harvest")
    write_harvest(root, number=30)
    return root


@pytest.fixture(scope="module")
def sample_pass() -> CalibrationResult:
    return calibrate(SAMPLE, **FULL)


class Backwards(Executor):
    """Computes what it was given last first, as a cluster may."""

    def __init__(self) -> None:
        self.calls: list[tuple[Future, Any]] = []

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future:
        executor = self

        class Waiting(Future):
            def result(self, timeout: float | None = None) -> Any:
                while executor.calls:
                    future, call = executor.calls.pop()
                    future.set_result(call())
                return super().result(timeout)

        future = Waiting()
        self.calls.append((future, lambda: fn(*args, **kwargs)))
        return future


@pytest.mark.parametrize("sides", [
    {"call": {0.25: 0.9}, "put": {0.25: 1.1}}, {"call": {0.15: 0.9, 0.25: 0.95}, "put": {0.25: 1.1, 0.35: 1.05}}, {"put": {0.25: 1.1}}, {},
])
def test_a_surface_without_all_anchors_is_judged(sides: dict[str, Any]) -> None:
    """A fit on thin data leaves anchors out, and the next run judges what it left."""
    skew = calibrate(SAMPLE, vol_surface={"skew": {"anchor_ratios_by_side": sides}}, option_types=["C", "P"]).current_skew
    for delta in (0.15, 0.25, 0.35):
        known = [table.get(delta) for table in sides.values()]
        assert skew.anchor_ratios[str(delta)] == (None if not known or None in known else pytest.approx(sum(known) / len(known)))
    assert {side: {float(d): r for d, r in table.items() if r is not None} for side, table in skew.anchor_ratios_by_side.items()} == sides


def test_two_runs_give_the_same_bytes(sample_pass: CalibrationResult) -> None:
    assert same(sample_pass, calibrate(SAMPLE, **FULL))


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_threads_change_no_byte(sample_pass: CalibrationResult, workers: int) -> None:
    with ThreadPoolExecutor(workers) as pool:
        assert same(sample_pass, calibrate(SAMPLE, pool, **FULL))


def test_processes_change_no_byte(harvest: Path) -> None:
    one_pass, context = calibrate(harvest, **FULL), get_context("forkserver")
    context.set_forkserver_preload(["volcal.calibration.historical"])
    for workers in (2, 3):
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            assert same(one_pass, calibrate(harvest, pool, **FULL))


def test_the_order_in_which_days_are_computed_changes_no_byte(sample_pass: CalibrationResult) -> None:
    assert same(sample_pass, calibrate(SAMPLE, Backwards(), **FULL))


def test_a_fresh_process_gives_the_same_bytes(harvest: Path) -> None:
    script = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from test_historical import *; " \
             f"sys.stdout.write(content(calibrate({str(harvest)!r}, **FULL)))"
    env = {**os.environ, "PYTHONHASHSEED": "7", "NUMBA_NUM_THREADS": "1"}
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=env, cwd=Path(__file__).parents[1])
    assert not differences(json.loads(content(calibrate(harvest, **FULL))), json.loads(told.stdout))


def test_the_order_of_files_on_disk_changes_no_byte(harvest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = sorted(harvest.rglob("*.parquet"))
    for path in np.random.default_rng(1).permutation(np.array(files, dtype=object)):
        copy = tmp_path / path.relative_to(harvest)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    listed = os.listdir
    monkeypatch.setattr(os, "listdir", lambda folder=".": listed(folder)[::-1])
    one, other = calibrate(harvest, **FULL), calibrate(tmp_path, **FULL)
    assert differences(one.to_dict(), other.to_dict()) == ["reproducibility.config.harvest.data_root", "reproducibility.config_hash"]


def test_the_order_of_rows_in_a_file_changes_no_number(harvest: Path, tmp_path: Path) -> None:
    """Sums of the same numbers in another order agree to rounding; what counts rows agrees exactly."""
    shutil.copytree(harvest, tmp_path, dirs_exist_ok=True)
    for number, path in enumerate(sorted(tmp_path.glob("BTC/**/*.parquet"))):
        pd.read_parquet(path).sample(frac=1, random_state=number).to_parquet(path, index=False)
    one, other = calibrate(harvest, **FULL), calibrate(tmp_path, **FULL)
    assert one.count == other.count and one.events == other.events
    a, b = leaves(one.to_dict()), leaves(other.to_dict())
    assert a.keys() == b.keys()
    numbers = [k for k, v in a.items() if isinstance(v, float) and k != "multiplier_candidates.min_mae"]
    assert {k: b[k] for k in numbers} == pytest.approx({k: a[k] for k in numbers}, rel=1e-9, abs=1e-12)
    assert b["multiplier_candidates.min_mae"] == pytest.approx(a["multiplier_candidates.min_mae"], abs=1e-4)


PEAK = """
import resource, sys
sys.path.insert(0, sys.argv[1])
from test_historical import calibrate
result = calibrate(sys.argv[2], min_dte=0, max_dte=1000, option_types=["C", "P"], fit_skew=True, bands=True, error_ladder=True,
                   harvest={"start_time": sys.argv[3], "end_time": sys.argv[4]})
print(result.snapshot_count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak(root: Path, start: str, end: str) -> tuple[int, int]:
    """Snapshots of a window, and the largest memory of a process that calibrates it."""
    told = subprocess.run([sys.executable, "-c", PEAK, str(Path(__file__).parent), str(root), start, end], capture_output=True, text=True, check=True)
    count, size = told.stdout.split()
    return int(count), int(size)


def four_a_day(root: Path) -> Path:
    """Sixty days, four snapshots a day of 600 options that outlive them."""
    market = snapshot(START, days=tuple(range(70, 270, 10)))
    for time in pd.date_range(START, periods=240, freq="6h"):
        write_raw(root, "BTC", time, market.assign(harvest_time=time, index_price=90_000 * (1 + 0.01 * np.sin(time.value / 1e14))))
    return root


def test_memory_does_not_grow_with_the_window(tmp_path: Path) -> None:
    """The peak of sixty days is at most 1.3 times that of fifteen; on real data where there is some."""
    real = real_data_root()
    root, start = (real / "deribit_6h", "2026-01-01") if real else (four_a_day(tmp_path), "2026-03-02")
    ends = [(pd.Timestamp(start) + pd.Timedelta(days=days)).isoformat() for days in (15, 60)]
    (few, small), (many, large) = (peak(root, start, end) for end in ends)
    assert many > 3.5 * few and large <= 1.3 * small
