"""Live calibration over real HTTP against the replay exchange: equal to the store, bounded in time, clear when it fails."""
import asyncio
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from volcal.calibration.config import CalibrationConfig
from volcal.calibration.live import STALE_MINUTES, fetch_live, read_config, run_calibration, run_calibration_extended
from volcal.calibration.result import CalibrationResult
from volcal.market.chain import sample_snapshot
from volcal.market.deribit import CreditBucket, Deribit, RetryPolicy
from volcal.market.replay import FAULT_KINDS, Fault, ReplayExchange
from volcal.market.store import Store
from volcal.settings import real_data_root
from volcal.units import ConfigError, DeribitError, NoUsableDataError, VolcalError

SAMPLE = Path(__file__).resolve().parents[1] / "data" / "sample"
CONFIGS = SAMPLE.parent / "configs"
NOON = pd.Timestamp("2025-10-14T12:00Z")
WHOLE = {"option_types": "C,P", "min_dte": 1, "max_dte": 90, "max_samples": 0, "fit_skew": True, "bands": True, "bucket_by_dte": True,
         "bucket_by_abs_delta": True, "error_ladder": True}
APART = (".data_quality", ".events", ".reproducibility")  # ages, counts of repaired names, paths


def client(exchange, **policy):
    kept = dict(base_seconds=0.001, cap_seconds=0.01, timeout_seconds=1.0, max_attempts=4) | policy
    return Deribit(exchange.url, retry=RetryPolicy(**kept), bucket=CreditBucket(1e12, 1e12), seed=1)


def numbers(content, path=""):
    if isinstance(content, dict):
        return {k: v for name, part in content.items() for k, v in numbers(part, f"{path}.{name}").items()}
    if isinstance(content, list):
        return {k: v for i, part in enumerate(content) for k, v in numbers(part, f"{path}[{i}]").items()}
    return {path: float(content)} if isinstance(content, int | float) and not isinstance(content, bool) else {}


def compare(root, asset, minute, **more):
    """Both results, after every number of them has been found equal."""
    config = {"underlying": asset, **WHOLE, **more}
    at = minute + pd.Timedelta("59s")
    with ReplayExchange(root, at=at) as exchange:
        live = run_calibration(config, client=client(exchange))
    stored = run_calibration(config, source="harvested", harvest={"data_root": str(root), "start_time": minute, "end_time": at})
    a, b = ({k: v for k, v in numbers(r.to_dict()).items() if not k.startswith(APART)} for r in (live, stored))
    assert set(a) == set(b) and live.count > 0
    off = {k: abs(a[k] - b[k]) / max(1.0, abs(b[k])) for k in a}
    assert max(off.values()) <= 1e-9, max(off.items(), key=lambda item: item[1])
    return live, stored


def candles(days, start, level, step="1h", seed=1):
    times = pd.date_range(start, periods=days * int(pd.Timedelta("1D") / pd.Timedelta(step)), freq=step)
    close = level * np.exp(np.cumsum(0.006 * np.random.default_rng(seed).standard_normal(len(times))))
    return pd.DataFrame({"timestamp": times, "open": close, "high": close * 1.002, "low": close * 0.998, "close": close})


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """An inverse and a linear asset, snapshots at odd seconds, hourly candles of 420 days, a volatility index."""
    store = Store(tmp_path_factory.mktemp("both"))
    for asset, spot in (("BTC", 90_000.0), ("SOL_USDC", 140.0)):
        for when in map(pd.Timestamp, ("2026-03-02T12:05:07.123456Z", "2026-03-02T12:20:58Z")):
            store.write_snapshot(sample_snapshot(asset, when, spot, level=0.5 + when.minute / 1000), asset, when.floor("min"))
        store.write_history(asset, "ohlc", candles(427, "2025-01-01T00:00Z", spot))
    store.write_history("BTC", "dvol", candles(60, "2026-01-02T00:00Z", 55.0))
    return store


# Equal to the store


@pytest.mark.parametrize("asset", ["BTC", "SOL_USDC"])
@pytest.mark.parametrize("minute", ["2026-03-02T12:05Z", "2026-03-02T12:20Z"])
@pytest.mark.parametrize("more", [{}, {"max_samples": 12}, {"risk_free_rate": 0.05, "multiplier_method": "atm"},
                                  {"filters": {"max_abs_moneyness": 0.1, "require_two_sided": True}, "option_types": "P"}])
def test_live_equals_the_stored_snapshot(both, asset, minute, more):
    live, stored = compare(both.root, asset, pd.Timestamp(minute), **more)
    assert live.rv_source == f"candles of {asset}-PERPETUAL" and stored.rv_source == "history"
    sensors = live.snapshot_sensors
    assert all(sensors[n].last is not None for n in ("vrp_30d", "vrp_7d", "chop_factor", "adx_14", "skew_25d", "term_slope"))
    assert (sensors["iv_rank_30d"].last is not None) == (asset == "BTC")


def test_the_sample_at_every_hour_of_a_day():
    for hour in range(0, 24, 6):
        live, _ = compare(SAMPLE, "BTC", pd.Timestamp("2025-10-10T00:00Z") + pd.Timedelta(hours=hour), max_dte=14)
        assert live["recommended_iv_multiplier"] == pytest.approx(0.93, abs=0.01)


def test_without_candles_both_use_default_iv_and_say_so(tmp_path):
    store = Store(tmp_path)
    store.write_snapshot(sample_snapshot("SOL_USDC", "2026-03-02T12:05:07Z", 140.0), "SOL_USDC", pd.Timestamp("2026-03-02T12:05Z"))
    live, stored = compare(tmp_path, "SOL_USDC", pd.Timestamp("2026-03-02T12:05Z"), default_iv=0.55)
    assert live.rv_source == stored.rv_source == "default_iv = 0.55" and live.data_quality["status"] == "degraded"
    assert any("exchange has none of SOL_USDC-PERPETUAL" in note for note in live.notes)


REAL = real_data_root()
needs_real = pytest.mark.skipif(REAL is None or not (REAL / "live_deribit").is_dir(), reason="no real data beside this checkout (VOLCAL_REAL_DATA)")


@needs_real
@pytest.mark.parametrize("folder, asset, place", [("live_deribit", "BTC", -5), ("live_deribit", "SOL_USDC", -5), ("live_deribit", "XRP_USDC", -9),
                                                  ("live_deribit", "ETH", 40), ("deribit_6h", "BTC", 150), ("deribit_6h", "ETH", 300)])
def test_real_snapshots_live_and_stored(tmp_path, folder, asset, place):
    source, store = Store(REAL / folder), Store(tmp_path)
    ref = source.find(asset)[place]
    path = tmp_path / Path(ref.path).relative_to(REAL / folder)
    path.parent.mkdir(parents=True)
    path.symlink_to(ref.path)
    if asset == "BTC":
        store.write_history(asset, "ohlc", pd.read_parquet(REAL / "history" / "BTC_ohlc_1h.parquet"))
    live, _ = compare(tmp_path, asset, ref.time)
    assert np.isfinite(live["recommended_iv_multiplier"])


def test_candles_that_end_before_the_book_serve_neither(tmp_path):
    store = Store(tmp_path)
    store.write_snapshot(sample_snapshot("BTC", "2026-03-02T12:05:07Z"), "BTC", pd.Timestamp("2026-03-02T12:05Z"))
    store.write_history("BTC", "ohlc", candles(60, "2026-01-01T00:00Z", 90_000.0))  # ends at midnight
    live, _ = compare(tmp_path, "BTC", pd.Timestamp("2026-03-02T12:05Z"))
    assert live.rv_source == "default_iv = 0.6" and any("passed over" in note for note in live.notes)


# Forms of the config


def test_every_form_of_a_config(both, tmp_path):
    fields = {"underlying": "BTC", "max_dte": 30, "max_samples": 0}
    path = tmp_path / "c.json"
    path.write_text(json.dumps(fields))
    with ReplayExchange(both.root, at="2026-03-02T12:05:30Z") as exchange:
        asked = [((fields,), {}), ((CalibrationConfig(**fields),), {}), ((path,), {}), ((str(path),), {}), ((), fields),
                 (({"underlying": "ETH", "max_samples": 0},), {"underlying": "BTC", "max_dte": 30})]
        found = [run_calibration(*args, client=client(exchange), **keywords).to_json() for args, keywords in asked]
        extended = run_calibration_extended(fields, client=exchange.url).to_json()
        in_loop = asyncio.run(_inside_a_loop(fields, exchange))
    assert len({*found, extended, in_loop}) == 1


async def _inside_a_loop(fields, exchange):
    return run_calibration(fields, client=client(exchange).aio).to_json()


def test_the_nine_fields_and_the_old_keys(both):
    with ReplayExchange(both.root, at="2026-03-02T12:05:30Z") as exchange:
        result = run_calibration(CONFIGS / "nine_fields.yaml", client=client(exchange))
    for key in ("mae_pct", "bias_pct", "count", "rv_annualized", "atm_iv", "recommended_iv_multiplier"):
        assert result[key] == result.get(key) and np.isfinite(result[key])
    assert {"strike", "dte", "mark_price", "mark_iv"} <= set(result["rows"][0]) and result.source == "live"
    assert CalibrationResult.from_json(result.to_json()).to_json() == result.to_json()


@pytest.mark.parametrize("name", ["live_full.yaml", "harvested_full.yaml"])
def test_the_example_configs_run(name, both):
    more = {} if name.startswith("live") else {"harvest": {"data_root": str(SAMPLE), "start_time": NOON, "end_time": NOON}, "regimes": None}
    with ReplayExchange(SAMPLE, at=NOON) as exchange:
        result = run_calibration(CONFIGS / name, client=client(exchange), **more)
    assert result.count > 0 and result.snapshot_sensors


def test_a_config_that_cannot_be_asks_nobody(both):
    with ReplayExchange(both.root) as exchange:
        for args, keywords, told in [((), {}, "there is no config"), (({"underlying": "BTC", "min_dtee": 1},), {}, "min_dte"),
                                     (("/no/such.yaml",), {}, "cannot be read"), ((), {"underlying": "BTC", "deadline": -1}, "leaves no time"),
                                     ((), {"underlying": "BTC", "source": "harvested"}, "no harvest section"),
                                     ((), {"underlying": "BTC", "regimes": "/no/such.json"}, "no/such.json")]:
            with pytest.raises(ConfigError, match=told):
                run_calibration(*args, client=client(exchange), **keywords)
        assert not exchange.requests


def test_a_price_history_replaces_the_candles(both, tmp_path):
    path = tmp_path / "mine.parquet"
    candles(60, "2026-01-03T00:00Z", 90_000.0, seed=9).to_parquet(path)
    with ReplayExchange(both.root, at="2026-03-02T12:05:30Z", faults=["maintenance@get_tradingview_chart_data"]) as exchange:
        result = run_calibration(underlying="BTC", harvest={"price_history": str(path)}, client=client(exchange))
    assert result.rv_source == "price_history" and any("daily bars" in note for note in result.notes)


def test_what_one_moment_cannot_give_is_said(both):
    with ReplayExchange(both.root, at="2026-03-02T12:05:30Z") as exchange:
        result = run_calibration(underlying="BTC", validation_fraction=0.3, client=client(exchange), harvest={"start_time": "2026-03-01"})
    assert result.out_of_sample_metrics is None
    assert any("validation_fraction" in n for n in result.notes) and any("window is not read" in n for n in result.notes)


def test_merging_keeps_what_was_set_and_only_that():
    config = CalibrationConfig(underlying="BTC", source="harvested", harvest={"data_root": "here", "underlying": "BTC"}, seed=7)
    merged = read_config(config, {"underlying": "ETH"})
    assert (merged.seed, merged.harvest.data_root, merged.harvest.underlying) == (7, "here", "ETH")


# What the exchange says


def test_one_book_call_and_one_of_each_other(both):
    with ReplayExchange(both.root, at="2026-03-02T12:05:30Z") as exchange:
        run_calibration(underlying="BTC", client=client(exchange))
        asked = [request.method for request in exchange.requests]
    assert asked.count("get_book_summary_by_currency") == 1 and len(asked) <= 9 and asked.count("ticker") == 1


def test_a_stale_book_is_degraded(both):
    with ReplayExchange(both.root, at=pd.Timestamp("2026-03-02T12:21Z") + pd.Timedelta(minutes=STALE_MINUTES + 1)) as exchange:
        result = run_calibration(underlying="BTC", client=client(exchange))
    assert result.data_quality["status"] == "degraded" and "stale" in {issue["code"] for issue in result.data_quality["issues"]}


def test_an_asset_that_is_not_listed(both):
    with ReplayExchange(both.root) as exchange:
        with pytest.raises(DeribitError, match="SOL"):
            run_calibration(underlying="SOL", client=client(exchange))
        with pytest.raises(NoUsableDataError, match="lists no option of XRP_USDC"):
            run_calibration(underlying="XRP_USDC", client=client(exchange))


# Faults and the deadline


@pytest.mark.parametrize("kind", sorted(FAULT_KINDS))
def test_a_fault_of_everything_ends_in_a_clear_error_in_time(both, kind):
    with ReplayExchange(both.root, at="2026-03-02T12:05:30Z", faults=[Fault(kind, seconds=30.0)]) as exchange:
        started = time.monotonic()
        with pytest.raises((DeribitError, NoUsableDataError)) as caught:
            run_calibration(underlying="BTC", client=client(exchange), deadline=1.5)
        assert time.monotonic() - started < 3.0 and len(str(caught.value)) > 20


@pytest.mark.parametrize("seed", range(6))
def test_a_fifth_of_all_answers_spoilt_still_gives_the_same_result(both, seed):
    with ReplayExchange(both.root, at="2026-03-02T12:05:30Z") as exchange:
        clean = run_calibration(underlying="BTC", client=client(exchange))
    with ReplayExchange(both.root, at="2026-03-02T12:05:30Z", faults=[Fault("all", 0.2, seconds=0.05)], seed=seed) as exchange:
        result = run_calibration(underlying="BTC", client=client(exchange, max_attempts=40, shape_attempts=40, timeout_seconds=3.0), deadline=20.0)
    assert result["recommended_iv_multiplier"] == clean["recommended_iv_multiplier"] and result["mae_pct"] == clean["mae_pct"]


@pytest.mark.parametrize("method, kept", [("get_index_price", True), ("get_instruments", True), ("ticker", True), ("get_volatility_index_data", True),
                                          ("get_tradingview_chart_data", False), ("get_book_summary_by_currency", False), ("get_time", False)])
@pytest.mark.parametrize("kind", ["html", "server_error", "wrong_type"])
def test_what_may_fail_and_what_may_not(both, method, kept, kind):
    if (method, kind) == ("get_time", "wrong_type"):
        pytest.skip("get_time answers one number, which this fault does not spoil")
    with ReplayExchange(both.root, at="2026-03-02T12:05:30Z", faults=[Fault(kind, method=method)]) as exchange:
        if kept:
            result = run_calibration(underlying="BTC", client=client(exchange), deadline=5.0)
            assert np.isfinite(result["recommended_iv_multiplier"]) and result.notes
        else:
            with pytest.raises(DeribitError, match=method):
                run_calibration(underlying="BTC", client=client(exchange), deadline=5.0)


def test_a_port_where_nobody_listens_and_one_that_never_answers():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/api/v2"
        started = time.monotonic()
        with pytest.raises(DeribitError, match="get_time"):
            run_calibration(underlying="BTC", client=url, deadline=1.0)
        free.listen()
        with pytest.raises(DeribitError):
            run_calibration(underlying="BTC", client=url, deadline=1.0)
        assert time.monotonic() - started < 4.0


def test_many_calibrations_at_once_share_a_client(both):
    with ReplayExchange(both.root, at="2026-03-02T12:05:30Z") as exchange:
        shared = client(exchange, timeout_seconds=20.0)
        with ThreadPoolExecutor(6) as pool:
            found = list(pool.map(lambda _: run_calibration(underlying="BTC", client=shared).to_json(), range(12)))
    assert len(set(found)) == 1


def test_nothing_is_left_running(both):
    with ReplayExchange(both.root, at="2026-03-02T12:05:30Z") as exchange:
        run_calibration(underlying="BTC", client=exchange.url)
        before = threading.active_count()
        for _ in range(5):
            run_calibration(underlying="BTC", client=exchange.url)
        assert threading.active_count() <= before + 5  # the server's own, one per open connection


def test_the_market_can_be_fetched_without_calibrating(both):
    with ReplayExchange(both.root, at="2026-03-02T12:05:30Z") as exchange:
        market = fetch_live(CalibrationConfig(underlying="SOL_USDC"), client(exchange))
    assert market.dvol is None and len(market.frame) and market.candles is not None and np.isnan(market.funding)


def test_errors_are_of_the_family():
    assert issubclass(DeribitError, VolcalError) and issubclass(NoUsableDataError, VolcalError) and issubclass(ConfigError, VolcalError)


# Regimes


def test_the_moment_has_a_regime_where_a_model_is_given(both, tmp_path):
    from volcal.vol.regimes import fit_regimes, sample_sensors

    features = ("vrp_30d", "vrp_7d", "skew_25d", "term_slope", "rv_30d")
    path = tmp_path / "regimes.json"
    path.write_text(fit_regimes(sample_sensors()[0], features, k=3, provenance={"underlying": "BTC", "start": "2026-01-01", "end": "2026-04-01"}).to_json())
    with ReplayExchange(both.root, at="2026-03-02T12:05:30Z") as exchange:
        result = run_calibration(underlying="BTC", regimes=str(path), client=client(exchange))
        with pytest.raises(ConfigError, match="trained on BTC, not on SOL_USDC"):
            run_calibration(underlying="SOL_USDC", regimes=str(path), client=client(exchange))
    here = [name for name, part in result.environment_summary.items() if part.count]
    assert len(here) == 1 and {row["regime"] for row in result.rows} == set(here) and any("in-sample" in note for note in result.notes)
    assert result.reproducibility.regime_model_hash
