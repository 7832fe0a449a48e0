"""The sample harvest has a known truth: it is made again from its seed, and a calibration finds it."""
import json
from pathlib import Path

import pandas as pd
import pytest

from volcal.calibration.config import load_config
from volcal.calibration.historical import run_historical_calibration_from_harvest
from volcal.market.store import Store, same_content
from volcal.universe.chains import build_chain, load_synthetic_config, sample_truth, sample_universe

DATA = Path(__file__).parents[1] / "data"
SAMPLE = DATA / "sample"
TRUTH = json.loads((SAMPLE / "truth.json").read_text())


@pytest.fixture(scope="module")
def universe():
    return sample_universe()


@pytest.fixture(scope="module")
def result():
    return run_historical_calibration_from_harvest({
        "underlying": "BTC", "source": "harvested", "min_dte": 3, "max_dte": 14, "max_samples": 0, "option_types": ["C", "P"],
        "fit_skew": True, "bands": True, "harvest": {"data_root": str(SAMPLE)}})


def test_size_in_git():
    assert sum(p.stat().st_size for p in SAMPLE.rglob("*") if p.is_file()) <= 5e6


def test_truth_is_of_this_seed(universe):
    assert sample_truth(universe) == TRUTH


@pytest.mark.parametrize("day", ["2025-10-06", "2025-10-15"])
def test_a_day_made_again_is_the_same(universe, tmp_path, day):
    again, store = Store(str(tmp_path)), Store(str(SAMPLE))
    hours = pd.date_range(day, periods=24, freq="1h", tz="UTC")
    for hour in hours:
        again.write_snapshot(build_chain(universe, hour), "BTC", hour)
    if day != "2025-10-15":
        again.compact("BTC", day)
    kept, made = store.find("BTC", hours[0], hours[-1]), again.find("BTC", hours[0], hours[-1])
    assert [ref.time for ref in kept] == [ref.time for ref in made] == list(hours)
    for a, b in zip(kept, made, strict=True):
        assert same_content(store._raw(a), again._raw(b))
    if _writer(made[0].path) == _writer(kept[0].path):
        assert all(Path(a.path).read_bytes() == Path(b.path).read_bytes() for a, b in zip(kept, made, strict=True))


def _writer(path):
    import pyarrow.parquet as pq

    return pq.read_metadata(path).created_by


def test_candles_are_of_this_seed_and_reach_back(universe):
    history = Store(str(SAMPLE)).read_history("BTC")
    pd.testing.assert_series_equal(history["close"], universe.candles["close"][: len(history)], check_names=False)
    assert history["timestamp"].iloc[0] <= pd.Timestamp(TRUTH["first_snapshot"]) - pd.Timedelta(days=2 * TRUTH["rv_window_days"])


def test_multiplier_is_recovered(result):
    assert result["recommended_iv_multiplier"] == pytest.approx(TRUTH["iv_multiplier"], rel=0.01)
    assert all(band.recommended_iv_multiplier == pytest.approx(TRUTH["iv_multiplier"], rel=0.01) for band in result.bands)


def test_anchors_are_recovered(result):
    found, smile = result.recommended_skew.anchor_ratios_by_side, result.recommended_skew.smile_ratios
    for side, anchors in TRUTH["skew"]["anchor_ratios_by_side"].items():
        assert {d: found[side][d] for d in anchors} == pytest.approx(anchors, abs=0.01)
    assert {d: smile[d] for d in TRUTH["skew"]["smile_ratios"]} == pytest.approx(TRUTH["skew"]["smile_ratios"], abs=0.02)


def test_quality_is_ok_and_the_surface_fits(result):
    assert result.data_quality["status"] == "ok"
    assert result.recommended_metrics.vega_weighted_mae_vol_points < 0.15
    assert result.recommended_metrics.inside_bid_ask_pct > 99


def test_synthetic_config_loads():
    config = load_synthetic_config(DATA / "configs" / "synthetic.yaml")
    assert [r.name for r in config.spot_path.regimes] == ["calm", "lively", "storm"]


@pytest.mark.parametrize("name", ["nine_fields", "live_full", "harvested_full"])
def test_calibration_configs_load(name):
    assert load_config(DATA / "configs" / f"{name}.yaml").underlying == "BTC"
