"""Sensors: independent oracles, no look-ahead whatever the data, reasons for everything missing, harvests of every kind."""
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from volcal.market.chain import normalize_chain, sample_snapshot
from volcal.market.store import Store
from volcal.settings import real_data_root
from volcal.units import NS_PER_DAY, NoUsableDataError, epoch_ns
from volcal.vol.realized import PriceSeries, from_candles
from volcal.vol.sensors import (
    ADX_BARS,
    RSI_BARS,
    SENSORS,
    SensorReason,
    chain_levels,
    daily_bars,
    expiry_groups,
    expiry_table,
    finish_sensors,
    forward_levels,
    harvest_sensor_table,
    harvest_sensors,
    index_levels,
    iv_history_of,
    iv_rank,
    level_columns,
    snapshot_sensors,
    wilder_adx,
    wilder_rsi,
)

START = pd.Timestamp("2026-01-01", tz="UTC")


def candles(hours: int, seed: int = 0, vol: float = 0.005, start: pd.Timestamp = START, step: str = "1h") -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    close = 100 * np.exp(np.cumsum(vol * rng.standard_normal(hours)))
    opened = np.append(100.0, close[:-1])
    wide = np.exp(vol * rng.random((2, hours)))
    high, low = np.maximum(opened, close) * wide[0], np.minimum(opened, close) / wide[1]
    return pd.DataFrame({"timestamp": pd.date_range(start, periods=hours, freq=step), "open": opened, "high": high, "low": low, "close": close})


# Wilder's averages


@pytest.mark.parametrize("seed", range(5))
def test_adx_and_rsi_agree_with_ta_lib(seed):
    talib = pytest.importorskip("talib", reason="TA-Lib's wheel is not installed")
    bars = candles(600, seed, vol=0.03)
    high, low, close = (bars[c].to_numpy() for c in ("high", "low", "close"))
    np.testing.assert_allclose(wilder_adx(high, low, close), talib.ADX(high, low, close, 14), rtol=1e-10, equal_nan=True)
    np.testing.assert_allclose(wilder_rsi(close), talib.RSI(close, 14), rtol=1e-10, equal_nan=True)


def plain_rsi(close, n=14):
    moves = np.diff(close)
    up, down = np.clip(moves, 0, None), np.clip(-moves, 0, None)
    gain, loss, out = up[:n].mean(), down[:n].mean(), []
    for i in range(n, len(moves) + 1):
        if i > n:
            gain, loss = (gain * (n - 1) + up[i - 1]) / n, (loss * (n - 1) + down[i - 1]) / n
        out.append(100 - 100 / (1 + gain / loss) if loss else 100.0)
    return np.append(np.full(n, np.nan), out)


def plain_adx(high, low, close, n=14):
    """With true ranges and both directional indicators, as the book has it, seeded as TA-Lib does."""
    up, down = np.diff(high), -np.diff(low)
    reach = np.maximum(high[1:], close[:-1]) - np.minimum(low[1:], close[:-1])
    plus, minus = np.where((up > down) & (up > 0), up, 0.0), np.where((down > up) & (down > 0), down, 0.0)
    sums, dx = [x[: n - 1].sum() for x in (plus, minus, reach)], []
    for i in range(n - 1, len(up)):
        sums = [s - s / n + x[i] for s, x in zip(sums, (plus, minus, reach), strict=True)]
        di_plus, di_minus = 100 * sums[0] / sums[2], 100 * sums[1] / sums[2]
        dx.append(100 * abs(di_plus - di_minus) / (di_plus + di_minus))
    adx = [float(np.mean(dx[:n]))]
    for one in dx[n:]:
        adx.append((adx[-1] * (n - 1) + one) / n)
    return np.append(np.full(2 * n - 1, np.nan), adx)


@pytest.mark.parametrize("seed", range(5))
def test_adx_and_rsi_agree_with_a_plain_implementation(seed):
    bars = candles(400, seed, vol=0.03)
    high, low, close = (bars[c].to_numpy() for c in ("high", "low", "close"))
    np.testing.assert_allclose(wilder_adx(high, low, close), plain_adx(high, low, close), rtol=1e-10, equal_nan=True)
    np.testing.assert_allclose(wilder_rsi(close), plain_rsi(close), rtol=1e-10, equal_nan=True)


def test_the_documented_minimum_of_bars_is_exact():
    bars = candles(40, 1, vol=0.03)
    adx, rsi = wilder_adx(bars["high"], bars["low"], bars["close"]), wilder_rsi(bars["close"])
    assert np.flatnonzero(np.isfinite(adx))[0] + 1 == ADX_BARS and np.flatnonzero(np.isfinite(rsi))[0] + 1 == RSI_BARS


def test_scale_does_not_matter_and_a_mirror_turns_rsi_over():
    bars = candles(100, 2, vol=0.03)
    high, low, close = (bars[c].to_numpy() for c in ("high", "low", "close"))
    np.testing.assert_allclose(wilder_adx(high, low, close), wilder_adx(1e3 * high, 1e3 * low, 1e3 * close), rtol=1e-9)
    np.testing.assert_allclose(wilder_rsi(close), 100 - wilder_rsi(-close), rtol=1e-9)
    np.testing.assert_allclose(wilder_adx(high, low, close), wilder_adx(-low, -high, -close), rtol=1e-9)


def test_a_long_hole_begins_the_averages_anew_and_a_short_one_does_not():
    bars = candles(100, 3, vol=0.03)
    day = np.arange(100)
    short, long = np.where(day >= 50, day + 3, day), np.where(day >= 50, day + 4, day)
    close = bars["close"].to_numpy()
    np.testing.assert_array_equal(wilder_rsi(close, day=short), wilder_rsi(close))
    broken = wilder_rsi(close, day=long)
    assert np.isnan(broken[50:64]).all()
    np.testing.assert_array_equal(broken[50:], wilder_rsi(close[50:]))


# Bars


@pytest.mark.parametrize("step, per_day", [("15min", 96), ("1h", 24), ("4h", 6), ("6h", 4), ("1D", 1)])
def test_bars_of_any_candle_are_the_same_days(step, per_day):
    hourly = candles(24 * 4 * 20, 4, step="15min")
    grouped = hourly.set_index("timestamp").resample(step).agg({"open": "first", "high": "max", "low": "min", "close": "last"}).reset_index()
    a, b = daily_bars(hourly), daily_bars(grouped)
    for name in ("day", "known_ns", "open", "high", "low", "close"):
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=1e-12)


def test_daily_candles_that_close_in_the_morning_are_known_in_the_morning():
    shifted = candles(30, 5, start=START + pd.Timedelta("8h"), step="1D")
    bars = daily_bars(shifted)
    assert (bars.known_ns % NS_PER_DAY == NS_PER_DAY // 3).all()


def test_bad_candles_are_passed_over():
    bad = candles(24 * 10, 6)
    bad.loc[30, ["high", "low"]] = [np.nan, -1.0]
    bad.loc[31, "close"] = 0.0
    bars = daily_bars(bad.sample(frac=1, random_state=1))
    assert len(bars) == 10 and (bars.low > 0).all() and np.isfinite(bars.high).all()
    assert len(daily_bars(bad.iloc[:0])) == 0 and len(daily_bars(bad.iloc[:1])) == 0


# Nothing is seen ahead


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 10_000), st.integers(5, 300), st.floats(0.0, 0.3), st.floats(0.2, 12.0))
def test_appending_future_rows_changes_nothing(seed, cut, missing, hours):
    rng = np.random.default_rng(seed)
    times = START + pd.to_timedelta(np.cumsum(rng.exponential(hours, 320)), unit="h")
    levels = pd.DataFrame({"time": times, "spot": 100.0, **{n: rng.uniform(0.2, 0.9, 320) for n in ("iv_7d", "iv_30d", "skew_25d")}})
    levels = levels.mask(rng.random(levels.shape) < missing).assign(time=times)
    history = candles(24 * 260, seed, start=START - pd.Timedelta(days=230))
    history = history[rng.random(len(history)) > missing]
    dvol = pd.DataFrame({"time": pd.date_range(START - pd.Timedelta(days=60), periods=600, freq="6h"), "iv_30d": rng.uniform(0.3, 0.6, 600)})
    series, until = from_candles(history), levels["time"].iloc[cut - 1]

    def sensors(k, end):
        known = series.time_ns <= end.value
        prices = PriceSeries(series.time_ns[known], series.log_price[known], "candles")
        return finish_sensors(levels.iloc[:k], prices, daily_bars(history[history["timestamp"] + pd.Timedelta("1h") <= end]), dvol[dvol["time"] <= end])

    part, whole = sensors(cut, until), sensors(320, times[-1] + pd.Timedelta(days=400))
    pd.testing.assert_frame_equal(part.frame, whole.frame.iloc[:cut], rtol=1e-9, atol=1e-9)
    pd.testing.assert_frame_equal(part.why, whole.why.iloc[:cut])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(0.0, 3.0), st.one_of(st.none(), st.floats(0.05, 3.0))), max_size=150), st.floats(2.0, 60.0))
def test_rank_is_what_its_definition_says(rows, window):
    days = np.cumsum([gap for gap, _ in rows]) if rows else np.zeros(0)
    ns, iv = (days * NS_PER_DAY).astype(np.int64), np.array([np.nan if v is None else v for _, v in rows], dtype=np.float64)
    rank, code = iv_rank(ns, iv, window)
    span = int(window * NS_PER_DAY)
    for i in range(len(iv)):
        inside = np.isfinite(iv) & (ns > ns[i] - span) & (np.arange(len(iv)) <= i)
        w, reach = iv[inside], (ns[i] - ns[inside].min()) if inside.any() else 0
        if not np.isfinite(iv[i]):
            expected, reason = np.nan, SensorReason.part_missing
        elif len(w) < 20 or reach < int(0.8 * span):
            expected, reason = np.nan, SensorReason.rank_window_thin
        elif w.max() == w.min():
            expected, reason = np.nan, SensorReason.rank_window_flat
        else:
            expected, reason = (iv[i] - w.min()) / (w.max() - w.min()), SensorReason.ok
        assert code[i] == reason
        np.testing.assert_allclose(rank[i], expected)


# Reasons


def test_every_missing_value_has_its_reason_and_no_other_has():
    chain = normalize_chain(sample_snapshot())
    for table in (snapshot_sensors(chain), snapshot_sensors(chain, candles(24 * 10, start=chain.snapshots["time"][0] - pd.Timedelta(days=10)))):
        for name in SENSORS:
            assert bool(table.reason(name)) == (not np.isfinite(table.vector()[name])), name
        assert table.missing() == {n: {SensorReason(int(table.why[n].iloc[0])).name: 1} for n in SENSORS if not np.isfinite(table.vector()[n])}


def test_no_sensor_is_a_constant_where_there_is_nothing():
    flat = pd.DataFrame({"timestamp": pd.date_range("2025-06-01", "2026-03-02", freq="1h", tz="UTC"), "close": 100.0})
    table = snapshot_sensors(normalize_chain(sample_snapshot(days=(12,))), flat)
    v = table.vector()
    assert np.isnan([v["adx_14"], v["rsi_14"], v["term_slope"], v["iv_rank_30d"], v["iv_30d"]]).all()
    assert table.missing()["adx_14"] == {"bars_flat": 1} and "did not move" in table.reason("rsi_14d")


def test_the_volatility_index_ranks_only_while_the_own_window_is_thin():
    times = pd.date_range(START, periods=200, freq="6h")
    rng = np.random.default_rng(0)
    levels = pd.DataFrame({"time": times, "spot": 100.0, "iv_7d": 0.5, "iv_30d": rng.uniform(0.3, 0.6, 200), "skew_25d": 0.01})
    index = pd.DataFrame({"timestamp": pd.date_range(START - pd.Timedelta(days=40), periods=24 * 60, freq="1h"), "close": rng.uniform(40, 60, 24 * 60)})
    own, helped = finish_sensors(levels).frame["iv_rank_30d"], finish_sensors(levels, iv_history=iv_history_of(index)).frame["iv_rank_30d"]
    assert own.isna().sum() == 96 and helped[:85].notna().all() and helped[85:96].isna().all()  # the index is a day old on day 21
    np.testing.assert_array_equal(own[96:], helped[96:])


# Harvests


def write(root, asset, times, spot=90_000.0, index=True):
    store = Store(root)
    for i, when in enumerate(times):
        frame = sample_snapshot(asset, when, spot * (1 + 0.001 * np.sin(i)), level=0.5 + 0.05 * np.sin(i / 3))
        store.write_snapshot(frame if index else frame.drop(columns="index_price"), asset, when)
    return store


@pytest.mark.parametrize("asset, index, source", [("BTC", True, "index_price"), ("SOL_USDC", False, "nearest_forward")])
def test_a_harvest_is_its_snapshots_one_by_one(tmp_path, asset, index, source):
    times = pd.date_range("2026-03-02T00:05Z", periods=10, freq="7h")
    store = write(tmp_path, asset, times, index=index)
    frame = harvest_sensors(store, asset)
    assert list(frame) == ["time", "spot", *SENSORS] and frame.attrs["price_source"] == source
    for i, ref in enumerate(store.find(asset)):
        levels, _ = chain_levels(normalize_chain(store.read(ref), quote_iv=False))
        for name in ("spot", "iv_7d", "iv_30d", "skew_25d"):
            np.testing.assert_allclose(frame[name][i], levels[name][0], rtol=1e-12)


def test_a_bad_file_is_passed_over_and_all_bad_is_an_error(tmp_path):
    times = pd.date_range("2026-03-02T00:05Z", periods=3, freq="1h")
    store = write(tmp_path, "BTC", times)
    paths = [ref.path for ref in store.find("BTC")]
    with open(paths[1], "wb") as file:
        file.write(b"no parquet")
    assert len(harvest_sensors(store, "BTC")) == 2
    for path in paths:
        with open(path, "wb") as file:
            file.write(b"no parquet")
    with pytest.raises(NoUsableDataError, match="3 files failed"):
        harvest_sensors(store, "BTC")


def test_candles_are_preferred_and_named(tmp_path):
    times = pd.date_range("2026-03-02T00:05Z", periods=5, freq="6h")
    store = write(tmp_path, "BTC", times)
    store.write_history("BTC", "ohlc", candles(24 * 260, start=pd.Timestamp("2025-06-20", tz="UTC")))
    table = harvest_sensor_table(store, "BTC")
    assert (table.price_source, table.bar_source) == ("history", "candles")
    assert table.frame[["rv_7d", "rv_30d", "adx_14", "rsi_14", "price_vs_ma200"]].notna().all().all()
    path = tmp_path / "mine.parquet"
    candles(24 * 300, 7, start=pd.Timestamp("2025-06-20", tz="UTC")).to_parquet(path)
    other = harvest_sensor_table(store, "BTC", price_history=path)
    assert other.price_source == "price_history" and not np.allclose(other.frame["rv_7d"], table.frame["rv_7d"])


def test_groups_that_are_known_already_give_the_same():
    chain = normalize_chain(pd.concat([sample_snapshot(time=t).assign(snapshot=i) for i, t in enumerate(pd.date_range("2026-03-02", periods=4, freq="5h"))]))
    pd.testing.assert_frame_equal(chain_levels(chain)[0], pd.DataFrame(level_columns(chain, expiry_table(chain.columns, expiry_groups(chain.columns)))))


REAL = real_data_root()


@pytest.mark.skipif(REAL is None or not (REAL / "deribit_6h").is_dir(), reason="no real data beside this checkout (VOLCAL_REAL_DATA)")
@pytest.mark.parametrize("asset", ["BTC", "ETH"])
def test_february_2026_spike_on_the_real_market(asset):
    frame = harvest_sensors(REAL / "deribit_6h", asset, "2026-02-01", "2026-02-10", warmup_days=33)
    worst = frame.loc[frame["iv_7d"].idxmax()]
    assert worst["term_slope"] > 0.1 and worst["skew_25d"] > 0.08 and worst["iv_rank_30d"] == 1.0
    assert frame["iv_rank_30d"].notna().all()
    whole = harvest_sensors(REAL / "deribit_6h", asset, end="2026-02-10")
    joined = frame.merge(whole, on="time", suffixes=("", "_whole"))
    for name in ("iv_7d", "iv_30d", "skew_25d", "iv_rank_30d"):
        np.testing.assert_allclose(joined[name], joined[f"{name}_whole"], rtol=1e-9)


def test_times_need_not_be_nanoseconds():
    levels = pd.DataFrame({"time": pd.date_range(START, periods=3, freq="1h").as_unit("us"), "spot": 100.0, "iv_7d": 0.5, "iv_30d": 0.4, "skew_25d": 0.01})
    table = finish_sensors(levels, from_candles(candles(24 * 60, start=START - pd.Timedelta(days=58))))
    assert np.isfinite(table.vector()["vrp_30d"]) and (epoch_ns(table.frame["time"]) == epoch_ns(levels["time"])).all()


@pytest.mark.parametrize("seed", range(6))
def test_prices_of_snapshots_are_the_medians_of_pandas(seed: int) -> None:
    rng, n = np.random.default_rng(seed), 400
    snapshot = np.sort(rng.integers(0, 9, n)).astype(np.int32)
    time = pd.Timestamp("2026-03-02", tz="UTC") + pd.to_timedelta(15 * snapshot, "min") + pd.to_timedelta(rng.integers(0, 90, n), "s")
    expiry = pd.Timestamp("2026-03-03T08:00Z") + pd.to_timedelta(rng.integers(0, 1 + 90 * (seed % 3), n), "D")
    frame = pd.DataFrame({"snapshot": snapshot, "harvest_time": time.as_unit("ns"), "expiry": expiry.as_unit("ns"),
                          "underlying_price": rng.choice([0.0, -1.0, np.nan, *rng.uniform(1, 2, 30)], n), "index_price": rng.choice([np.nan, 1.0, 2.0], n)})
    frame.loc[rng.random(n) < 0.1, "harvest_time"] = pd.NaT
    frame.loc[rng.random(n) < 0.1, "expiry"] = pd.NaT
    frame.loc[frame["snapshot"] == 4, "index_price"] = np.nan
    index, dated = index_levels(frame).to_pandas(), frame[frame["harvest_time"].notna()]
    by = dated.groupby("snapshot")
    np.testing.assert_array_equal(index["index_price"], by["index_price"].median())
    assert index["time"].tolist() == by["harvest_time"].max().tolist()
    found = forward_levels(frame).to_pandas()
    forwards = dated[dated["underlying_price"] > 0].groupby(["snapshot", "expiry"])["underlying_price"].median()
    np.testing.assert_array_equal(found["forward"], forwards)
    assert pd.to_datetime(found["expiry_ns"], utc=True).tolist() == forwards.index.get_level_values("expiry").tolist()
