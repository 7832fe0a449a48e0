"""Data that is broken, empty or odd leads to the right status and a plain message, and never to `ok` by accident."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from test_historical import START, calibrate, snapshot, write_candles, write_harvest, write_raw

from volcal.calibration.guardrails import assess_calibration_realism, assess_job
from volcal.calibration.result import CalibrationResult
from volcal.ops import report
from volcal.units import ConfigError, NoUsableDataError, SchemaError, StoreError, VolcalError

TIMES = pd.date_range(START, periods=12, freq="4h")
FIT: dict[str, Any] = {"min_dte": 3, "max_dte": 30, "option_types": ["C", "P"], "fit_skew": True, "bands": True}


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("clean")
    write_harvest(root, number=len(TIMES), every="4h")
    return root


@pytest.fixture
def copy(clean: Path, tmp_path: Path) -> Path:
    shutil.copytree(clean, tmp_path / "harvest")
    return tmp_path / "harvest"


def files(root: Path) -> list[Path]:
    return sorted(root.glob("BTC/**/BTC_*.parquet"))


def change(root: Path, how: Callable[[pd.DataFrame], pd.DataFrame], which: slice = slice(None)) -> Path:
    """Rewrite some files of a harvest."""
    for path in files(root)[which]:
        how(pd.read_parquet(path)).to_parquet(path, index=False)
    return root


def run(root: Path, **changes: Any) -> CalibrationResult:
    return calibrate(root, **{**FIT, **changes})


def verdict(result: CalibrationResult) -> tuple[str, str]:
    """The job's verdict, never better than the guardrails'."""
    metrics = result.recommended_metrics
    assert metrics is not None
    plain = assess_calibration_realism(result.recommended_iv_multiplier, metrics.mae_pct, metrics.vega_weighted_mae_pct, result.data_quality)
    status, reason = assess_job(result)
    assert ("ok", "degraded", "failed").index(status) >= ("ok", "degraded", "failed").index(plain[0])
    return status, reason


def codes(result: CalibrationResult) -> dict[str, int]:
    assert result.data_quality is not None
    return {issue["code"]: issue["count"] for issue in result.data_quality["issues"]}


def column(name: str, value: Any) -> Callable[[pd.DataFrame], pd.DataFrame]:
    return lambda frame: frame.assign(**{name: value(frame) if callable(value) else value})


def test_the_clean_harvest_is_ok(clean: Path) -> None:
    """What the others are compared with; otherwise nothing would be shown by them."""
    result = run(clean)
    assert verdict(result)[0] == "ok" and codes(result) == {} and result.recommended_metrics.vega_weighted_mae_vol_points < 5


def raised(kind: type[VolcalError], root: Path, **changes: Any) -> str:
    with pytest.raises(kind) as caught:
        run(root, **changes)
    assert isinstance(caught.value, VolcalError) and len(str(caught.value)) > 40
    return str(caught.value)


def test_empty_window(clean: Path) -> None:
    told = raised(NoUsableDataError, clean, harvest={"start_time": "2026-05-01", "end_time": "2026-05-02"})
    assert "2026-05-01" in told and "12 snapshots from 2026-03-02 00:10" in told


def test_missing_root(tmp_path: Path) -> None:
    assert "nowhere" in raised(StoreError, tmp_path / "nowhere")


def test_missing_asset(clean: Path) -> None:
    told = raised(StoreError, clean, underlying="DOGE")
    assert "DOGE" in told and "BTC" in told


def test_empty_root(tmp_path: Path) -> None:
    assert "BTC" in raised(StoreError, tmp_path)


def test_asset_folder_without_snapshots(tmp_path: Path) -> None:
    (tmp_path / "BTC" / "2026" / "03" / "02").mkdir(parents=True)
    assert "no snapshot of BTC" in raised(NoUsableDataError, tmp_path)


FOREIGN = pd.DataFrame({"name": ["a", "b"], "value": [1.0, 2.0]})


def test_folder_of_foreign_parquet(tmp_path: Path) -> None:
    """Foreign files under our names fail and are named; under their own names they are none of ours."""
    for time in TIMES:
        write_raw(tmp_path, "BTC", time, FOREIGN)
    assert "BTC_2026-03-02_0010.parquet" in raised(NoUsableDataError, tmp_path)
    for path in files(tmp_path):
        path.rename(path.with_name(path.name.replace("BTC_", "trades_")))
    assert "no snapshot of BTC" in raised(NoUsableDataError, tmp_path)


@pytest.mark.parametrize(("spoiled", "status"), [(1, "degraded"), (3, "failed")])
@pytest.mark.parametrize("kind", ["truncated", "zero bytes", "foreign", "text"])
def test_files_that_are_no_snapshots(copy: Path, kind: str, spoiled: int, status: str) -> None:
    """Up to a fifth of the files is degraded, more is failed; each is named."""
    for path in files(copy)[2 : 2 + spoiled]:
        whole = path.read_bytes()
        write_raw(copy, "BTC", pd.to_datetime(path.stem[4:], format="%Y-%m-%d_%H%M"),
                  {"truncated": whole[: len(whole) // 2], "zero bytes": b"", "foreign": FOREIGN, "text": b"<html>502 Bad Gateway</html>"}[kind])
    result = run(copy)
    told = verdict(result)
    assert told[0] == status and f"BTC_{TIMES[2]:%Y-%m-%d_%H%M}.parquet" in told[1]
    assert result.data_quality["num_schema_failures"] == spoiled and result.snapshot_count == len(TIMES) - spoiled


def test_every_file_truncated(copy: Path) -> None:
    for path in files(copy):
        path.write_bytes(path.read_bytes()[:500])
    raised(NoUsableDataError, copy)


def test_half_written_files_are_never_read(copy: Path, clean: Path) -> None:
    """Temporary names begin with a dot: whatever they hold, nothing changes."""
    for path in files(copy)[:3]:
        (path.parent / f".{path.name}.123-abc.tmp").write_bytes(path.read_bytes()[:700])
        (path.parent / f".{path.stem[:-4]}2359.parquet").write_bytes(b"PAR1")
        (path.parent / f"{path.name}.part").write_bytes(b"PAR1")
    one, other = run(clean), run(copy)
    assert one.rows == other.rows and one.data_quality == other.data_quality


def test_strange_names_are_none_of_ours(copy: Path, clean: Path) -> None:
    day = files(copy)[0].parent
    for name in ("x" * 240 + ".parquet", "BTC_2026-03-02_9999.parquet", "BTC_2026-03-02_0010 (1).parquet", "BTC_2026-13-41_0010.parquet",
                 "ETH_2026-03-02_0010.parquet", "btc_2026-03-02_0010.parquet", "BTC_2026-03-02_0010.parquet.bak", "späße.parquet", "desktop.ini"):
        (day / name).write_bytes(b"nothing")
    (copy / "BTC" / "2026" / "xx").mkdir()
    (copy / "README.txt").write_text("hello")
    assert run(copy).rows == run(clean).rows


def test_a_folder_where_a_file_should_be(copy: Path) -> None:
    (files(copy)[0].parent / "BTC_2026-03-02_0015.parquet").mkdir()
    result = run(copy)
    assert verdict(result)[0] == "degraded" and result.data_quality["num_schema_failures"] == 1


def legacy(time: Any, columns: int) -> pd.DataFrame:
    """As an older harvester wrote: few columns, few rows, nothing parsed."""
    kept = ["harvest_time", "instrument_name", "underlying_price", "mark_price", "best_bid_price", "best_ask_price", "mark_iv", "open_interest",
            "volume", "underlying", "expiry", "expiry_timestamp", "option_type", "strike"]
    return snapshot(time)[kept[:columns]].head(15).assign(**({"strike": np.nan, "option_type": None} if columns == 14 else {}))


def test_legacy_files_inside_the_window(copy: Path) -> None:
    for minute in (40, 45):
        write_raw(copy, "BTC", START.replace(minute=minute), legacy(START.replace(minute=minute), 8))
    result = run(copy, harvest={"expected_step_minutes": 240})
    status, reason = verdict(result)
    assert status == "degraded" and "missing_columns" in reason and "_0040.parquet" in reason
    assert result.data_quality["num_schema_failures"] == 2 and result.count == run(copy, harvest={"start_time": START + pd.Timedelta("1h")}).count \
        + len(run(copy, harvest={"end_time": START}).rows)


def test_legacy_files_outside_the_window(copy: Path, clean: Path) -> None:
    for hour in range(6):
        write_raw(copy, "BTC", START - pd.Timedelta(hours=5 + hour), legacy(START, 8))
    window = {"start_time": START, "end_time": TIMES[-1]}
    one, other = run(clean, harvest=window), run(copy, harvest=window)
    assert verdict(other)[0] == "ok" and other.rows == one.rows and other.data_quality == one.data_quality
    assert verdict(run(copy))[0] == "failed"


def test_small_legacy_snapshots_with_all_columns(copy: Path) -> None:
    """Fifteen options without strike and type: repaired from their names, but no surface."""
    for path, time in zip(files(copy)[:4], TIMES, strict=False):
        legacy(time, 14).to_parquet(path, index=False)
    result = run(copy)
    assert verdict(result)[0] == "degraded" and codes(result)["low_quality_snapshots"] == 4 and codes(result)["repaired_from_name"] > 0


def test_iv_in_decimals(copy: Path, clean: Path) -> None:
    """Not believed: solved from the marks, so that the fit is right, and said."""
    result, good = run(change(copy, column("mark_iv", lambda f: f["mark_iv"] / 100))), run(clean)
    assert verdict(result)[0] == "degraded" and codes(result)["iv_unit_suspect"] > 0
    assert result.recommended_iv_multiplier == pytest.approx(good.recommended_iv_multiplier, rel=0.01)


def test_iv_in_decimals_in_some_files(copy: Path, clean: Path) -> None:
    result, good = run(change(copy, column("mark_iv", lambda f: f["mark_iv"] / 100), slice(3, 5))), run(clean)
    assert verdict(result)[0] == "degraded" and "decimals" in verdict(result)[1]
    assert result.recommended_iv_multiplier == pytest.approx(good.recommended_iv_multiplier, rel=0.01)


@pytest.mark.parametrize("guise", ["milliseconds", "milliseconds, whole", "nanoseconds", "text only", "timestamp", "missing"])
def test_expiries_in_any_guise(copy: Path, clean: Path, guise: str) -> None:
    how: dict[str, Callable[[pd.DataFrame], pd.DataFrame]] = {
        "milliseconds": column("expiry_timestamp", lambda f: f["expiry_timestamp"] * 1e3),
        "milliseconds, whole": column("expiry_timestamp", lambda f: (f["expiry_timestamp"] * 1e3).astype("int64")),
        "nanoseconds": column("expiry_timestamp", lambda f: (f["expiry_timestamp"] * 1e9).astype("int64")),
        "text only": lambda f: f.drop(columns="expiry_timestamp"),
        "timestamp": column("expiry_timestamp", lambda f: pd.to_datetime(f["expiry_timestamp"], unit="s", utc=True)),
        "missing": lambda f: f.assign(expiry_timestamp=np.nan, expiry=None, strike=np.nan, option_type=None)}
    one, other = run(clean), run(change(copy, how[guise], slice(0, None, 2)))
    assert verdict(other)[0] == "ok" and other.recommended_iv_multiplier == pytest.approx(one.recommended_iv_multiplier, rel=1e-9)
    assert other.count == one.count and (codes(other) == {} or guise == "missing" and set(codes(other)) == {"repaired_from_name"})


def test_crossed_quotes(copy: Path, clean: Path) -> None:
    result = run(change(copy, lambda f: f.assign(best_bid_price=f["best_ask_price"], best_ask_price=f["best_bid_price"])))
    assert verdict(result)[0] == "degraded" and "bid above the ask" in verdict(result)[1]
    assert result.recommended_metrics.two_sided_count == 0 and result.recommended_metrics.inside_bid_ask_pct is None
    assert result.recommended_iv_multiplier == pytest.approx(run(clean).recommended_iv_multiplier, rel=1e-12)


def test_duplicate_rows(copy: Path, clean: Path) -> None:
    result, good = run(change(copy, lambda f: pd.concat([f, f.iloc[::3]]))), run(clean)
    assert verdict(result)[0] == "degraded" and codes(result)["duplicate_instrument"] > 0 and "repeat an instrument" in verdict(result)[1]
    assert result.count == good.count and result.recommended_iv_multiplier == pytest.approx(good.recommended_iv_multiplier, rel=1e-12)


def test_marks_in_dollars_in_an_inverse_file(copy: Path) -> None:
    usd = column("mark_price", lambda f: f["mark_price"] * f["underlying_price"])
    assert "unit" in raised(NoUsableDataError, change(copy, usd))


def test_marks_in_dollars_in_some_inverse_files(copy: Path, clean: Path) -> None:
    result = run(change(copy, column("mark_price", lambda f: f["mark_price"] * f["underlying_price"]), slice(2, 4)))
    assert verdict(result)[0] == "degraded" and "unit" in verdict(result)[1] and codes(result)["dropped_mark_unit"] > 0
    assert result.recommended_iv_multiplier == pytest.approx(run(clean).recommended_iv_multiplier, rel=0.05)


def test_marks_in_coin_in_a_linear_file(tmp_path: Path) -> None:
    write_harvest(tmp_path, "XRP_USDC", number=4)
    for path in tmp_path.glob("XRP_USDC/**/*.parquet"):
        frame = pd.read_parquet(path)
        frame.assign(mark_price=frame["mark_price"] / frame["underlying_price"] / 100).to_parquet(path, index=False)
    raised(NoUsableDataError, tmp_path, underlying="XRP_USDC")


def test_one_expiry_only(copy: Path) -> None:
    result = run(change(copy, lambda f: f[f["expiry"] == f["expiry"].unique()[4]]), bands=None)
    assert verdict(result)[0] == "degraded" and "expiries" in verdict(result)[1]


def test_all_expired(copy: Path) -> None:
    later = column("harvest_time", lambda f: f["harvest_time"] + pd.Timedelta(days=100))
    told = raised(NoUsableDataError, change(copy, later))
    assert "expired" in told or "harvested_outside_window" in told or "window" in told


def test_old_chains_under_new_names(tmp_path: Path) -> None:
    """A harvester that writes a stale answer again and again: its options expire one by one, then nothing is left."""
    stale = snapshot("2026-02-20T00:10Z").query("expiry < '2026-03-02'")
    for time in TIMES:
        write_raw(tmp_path, "BTC", time, stale.assign(harvest_time=time))
    write_candles(tmp_path, "BTC")
    assert "expired" in raised(NoUsableDataError, tmp_path)


@pytest.mark.parametrize("value", [0.0, np.nan, -1.0])
def test_no_usable_marks(copy: Path, value: float) -> None:
    assert "mark" in raised(NoUsableDataError, change(copy, column("mark_price", value)))


def test_many_zero_marks(copy: Path) -> None:
    rng = np.random.default_rng(3)
    result = run(change(copy, column("mark_price", lambda f: np.where(rng.random(len(f)) < 0.3, 0.0, f["mark_price"]))))
    assert verdict(result)[0] == "degraded" and "exactly 0" in verdict(result)[1]


def test_forwards_missing_are_taken_from_parity(copy: Path, clean: Path) -> None:
    result, good = run(change(copy, column("underlying_price", np.nan))), run(clean)
    assert codes(result)["parity_forward_used"] > 0
    assert result.recommended_iv_multiplier == pytest.approx(good.recommended_iv_multiplier, rel=0.01)
    raised(NoUsableDataError, copy, harvest={"forward": "quoted"})


def test_forwards_of_the_index_for_every_expiry(copy: Path) -> None:
    """One price for all expiries: off by the carry, which parity shows."""
    result = run(change(copy, column("underlying_price", lambda f: f["index_price"] * 0.99)))
    assert codes(result)["forward_mismatch"] > 0 and verdict(result)[0] == "degraded"


@pytest.mark.parametrize("guise", ["naive", "text", "epoch ms", "seconds precision", "other zone"])
def test_times_in_any_guise(copy: Path, clean: Path, guise: str) -> None:
    how = {"naive": lambda t: t.dt.tz_localize(None), "text": lambda t: t.astype(str), "epoch ms": lambda t: t.dt.as_unit("ms").astype("int64"),
           "seconds precision": lambda t: t.dt.as_unit("s"), "other zone": lambda t: t.dt.tz_convert("Asia/Tokyo")}[guise]
    change(copy, column("harvest_time", lambda f: how(pd.to_datetime(f["harvest_time"]))))
    try:
        result = run(copy)
    except VolcalError as error:
        assert guise in ("text", "epoch ms") and ("harvest_time" in str(error) or "schema" in str(error))
        return
    assert result.rows == run(clean).rows and verdict(result)[0] == "ok"


def test_harvest_time_missing(copy: Path) -> None:
    result = run(change(copy, column("harvest_time", pd.NaT), slice(0, 2)))
    assert verdict(result)[0] == "degraded"
    raised(NoUsableDataError, change(copy, column("harvest_time", pd.NaT)))


@pytest.mark.parametrize("jump", ["3h", "-3h", "2D", "-400D"])
def test_clock_jump(copy: Path, jump: str) -> None:
    """A harvest_time far from the file's name is a wrong clock: the time to expiry of its options cannot be believed."""
    result = run(change(copy, column("harvest_time", lambda f: f["harvest_time"] + pd.Timedelta(jump)), slice(4, 6)))
    status, reason = verdict(result)
    assert status != "ok", reason


def test_rows_of_several_moments(copy: Path) -> None:
    spread = column("harvest_time", lambda f: f["harvest_time"] + pd.to_timedelta(np.arange(len(f)) * 10, unit="s"))
    result = run(change(copy, spread))
    assert verdict(result)[0] == "degraded" and codes(result)["slow_sweep"] > 0


def test_snapshots_out_of_order(copy: Path) -> None:
    """Two files that changed places: each is harvested hours from its name."""
    a, b = files(copy)[2], files(copy)[8]
    one, other = a.read_bytes(), b.read_bytes()
    a.write_bytes(other)
    b.write_bytes(one)
    assert verdict(run(copy))[0] != "ok"


@pytest.mark.parametrize("iv", [0.0, -5.0, 5_000.0, 1e12, np.inf])
def test_absurd_ivs(copy: Path, clean: Path, iv: float) -> None:
    """Out of range: solved from the marks instead, and said."""
    result = run(change(copy, column("mark_iv", lambda f: np.where(np.arange(len(f)) % 3 == 0, iv, f["mark_iv"]))))
    told = codes(result)  # an infinite one is as good as none
    assert told["iv_solved"] > 0 and (iv == np.inf or verdict(result)[0] == "degraded" and told["iv_out_of_range"] > 0)
    assert result.recommended_iv_multiplier == pytest.approx(run(clean).recommended_iv_multiplier, rel=0.02)


def test_ivs_that_contradict_the_marks(copy: Path) -> None:
    """Neither can be believed."""
    raised(NoUsableDataError, change(copy, column("mark_iv", lambda f: f["mark_iv"] * 2.5)))


def test_absurd_prices_in_a_few_rows(copy: Path, clean: Path) -> None:
    """One mark a thousand times too large does not carry the fit away unseen."""
    def spoil(frame: pd.DataFrame) -> pd.DataFrame:
        frame.loc[frame.index[40], "mark_price"] *= 1000
        return frame

    result = run(change(copy, spoil))
    assert result.recommended_iv_multiplier == pytest.approx(run(clean).recommended_iv_multiplier, rel=0.02)


def test_a_market_far_from_its_realized_vol_fails(tmp_path: Path) -> None:
    write_harvest(tmp_path, number=6, level=1.8)
    status, reason = verdict(run(tmp_path))
    assert status == "failed" and "1.6" in reason


def test_without_prices_it_is_degraded(copy: Path) -> None:
    shutil.rmtree(copy / "_history")
    status, reason = verdict(run(change(copy, lambda f: f.drop(columns="index_price"))))
    assert status == "degraded" and "default_iv" in reason


@pytest.mark.parametrize("candles", ["stale", "future", "flat", "foreign", "truncated", "gap"])
def test_bad_candles(copy: Path, candles: str) -> None:
    """A history that does not serve is passed over or told; RV is never made from it in silence."""
    path = copy / "_history" / "BTC_ohlc.parquet"
    frame = pd.read_parquet(path)
    day = pd.Timedelta(days=1)
    if candles == "truncated":
        path.write_bytes(path.read_bytes()[:300])
    else:
        {"stale": frame.assign(timestamp=frame["timestamp"] - 90 * day), "future": frame.assign(timestamp=frame["timestamp"] + 90 * day),
         "flat": frame.assign(close=90_000.0), "foreign": FOREIGN, "gap": frame[frame["timestamp"] < START - 4 * day]}[candles].to_parquet(path)
    try:
        status, reason = verdict(run(copy))
    except VolcalError as error:
        status, reason = "raised", str(error)
    assert status != "ok" and len(reason) > 40, reason


@pytest.mark.parametrize("missing", ["mark_iv", "mark_price", "underlying_price", "harvest_time", "instrument_name"])
def test_a_missing_column_is_named(copy: Path, missing: str) -> None:
    change(copy, lambda f: f.drop(columns=missing))
    told = raised(NoUsableDataError, copy)
    assert missing in told
    with pytest.raises(SchemaError, match=missing):
        run(copy, harvest={"on_schema_error": "raise"})


def test_columns_of_another_kind(copy: Path) -> None:
    change(copy, lambda f: f.assign(mark_iv="high", strike=f["strike"]), slice(0, 1))
    result = run(copy)
    assert verdict(result)[0] == "degraded" and "mark_iv" in verdict(result)[1]


def test_another_asset_in_the_folder(copy: Path) -> None:
    """ETH options under BTC's names are left out, not priced as BTC."""
    for path, time in zip(files(copy), TIMES, strict=True):
        snapshot(time, "ETH").to_parquet(path, index=False)
    raised(NoUsableDataError, copy)


def test_every_second_snapshot_missing(copy: Path) -> None:
    for path in files(copy)[1:9]:
        path.unlink()
    result = run(copy, harvest={"expected_step_minutes": 240})
    assert verdict(result)[0] == "degraded" and "expected snapshots" in verdict(result)[1]


def test_one_snapshot_only(copy: Path) -> None:
    for path in files(copy)[1:]:
        path.unlink()
    assert run(copy).snapshot_count == 1
    window = {"start_time": START - pd.Timedelta("1h"), "end_time": START + pd.Timedelta(days=2)}
    assert verdict(run(copy, harvest=window))[0] == "degraded"


def test_a_stale_window(clean: Path) -> None:
    result = run(clean, harvest={"start_time": START, "end_time": "2026-03-08"})
    assert verdict(result)[0] == "degraded" and "older than" in verdict(result)[1]


def test_filters_that_leave_nothing_say_so(clean: Path) -> None:
    told = raised(NoUsableDataError, clean, filters={"min_open_interest": 1e9})
    assert "min_open_interest" in told


def test_a_config_that_cannot_be(clean: Path) -> None:
    raised(ConfigError, clean, harvest={"start_time": "2026-03-04", "end_time": "2026-03-01"})


def test_candles_of_another_asset(copy: Path) -> None:
    """Prices at another level than the market's own are not its prices."""
    path = copy / "_history" / "BTC_ohlc.parquet"
    frame = pd.read_parquet(path)
    frame.assign(close=frame["close"] / 30).to_parquet(path)
    assert verdict(run(copy))[0] != "ok"


def test_dropped_prices_are_counted(copy: Path) -> None:
    path = copy / "_history" / "BTC_ohlc.parquet"
    frame = pd.read_parquet(path)
    frame.loc[frame.index[::7], "close"] = 0.0
    frame.to_parquet(path)
    result = run(copy)
    assert any("price" in event and count >= 100 for event, count in result.events.items()), result.events


def test_no_quotes_at_all(copy: Path) -> None:
    result = run(change(copy, lambda f: f.assign(best_bid_price=0.0, best_ask_price=np.nan)))
    assert result.recommended_metrics.inside_bid_ask_pct is None and any("quote" in code for code in codes(result)), codes(result)


def test_a_chain_that_is_half_expired(copy: Path) -> None:
    """A harvester that repeats an old list of instruments is told before nothing is left."""
    for path, time in zip(files(copy), TIMES, strict=True):
        old = snapshot(time - pd.Timedelta(days=10)).query(f"expiry < '{time:%Y-%m-%d}'").assign(harvest_time=time)
        pd.concat([snapshot(time), old], ignore_index=True).drop_duplicates("instrument_name").to_parquet(path, index=False)
    result = run(copy)
    assert result.events["dropped_expired"] > 1000 and verdict(result)[0] == "degraded" and "expired" in verdict(result)[1]


@pytest.mark.parametrize("which", [[0], [5], [-1], [2, 7]])
def test_a_report_of_snapshots_without_a_time(copy: Path, which: list[int]) -> None:
    for at in which:
        change(copy, lambda frame: frame.assign(harvest_time=pd.Series(pd.NaT, frame.index, dtype="datetime64[ns, UTC]")), slice(at, at + 1 or None))
    drawn(run(copy), len(TIMES) - len(which))


@pytest.mark.parametrize("minutes", [0, -4])
def test_a_report_of_snapshots_in_another_order_than_their_names(clean: Path, tmp_path: Path, minutes: int) -> None:
    """A file made again a few minutes later, whose rows say the time of the one before, or an earlier one."""
    root = tmp_path / "harvest"
    shutil.copytree(clean, root)
    frame = pd.read_parquet(files(root)[5])
    again = frame.assign(harvest_time=frame["harvest_time"] + pd.Timedelta(minutes=minutes))
    write_raw(root, "BTC", TIMES[5] + pd.Timedelta(minutes=5), again)
    drawn(run(root), len(TIMES) + 1)


def drawn(result: CalibrationResult, dated: int) -> None:
    """Every part of a report that reads the timeline."""
    quotes = report.window_quotes(result)
    assert len(report.dated_timeline(result)) == dated and len(quotes) and quotes["rv"].notna().all()
    assert isinstance(report.timeline_figure(result), report.Picture)
