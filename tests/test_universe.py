"""The universe returns what it was given: levels, anchors, regimes and dynamics, over many seeds; files and bytes."""
import hashlib
import json
import math
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from volcal.calibration.historical import run_historical_calibration_from_harvest
from volcal.market.chain import normalize_chain
from volcal.market.pricing import black76_price
from volcal.market.store import Store
from volcal.settings import real_data_root
from volcal.units import ConfigError
from volcal.universe.chains import SyntheticConfig, SyntheticUniverse, arbitrage_report, build_chain, load_synthetic_config, simulate
from volcal.universe.paths import SpotPath, simulate_paths
from volcal.universe.regime_builder import build_regimes, synthetic_block, write_calibrated_regimes, write_yaml_block
from volcal.universe.twins import Clock, quick_twin
from volcal.vol.clusters import fit_ar1, linked_pairs, smoothed_transitions, transition_counts
from volcal.vol.overrides import clear_iv_multiplier_overrides, set_iv_multiplier_override
from volcal.vol.regimes import RegimeModel, RegimeParams, fit_regimes, sample_sensors
from volcal.vol.sensors import harvest_sensors
from volcal.vol.surface import VolSurface, compute_synthetic_iv_with_skew, set_applied_surface, template_skew

SEEDS = 50
MULTIPLIER = 0.95
SIDES = {"call": {0.15: 0.99, 0.25: 0.985, 0.35: 0.99}, "put": {0.15: 1.15, 0.25: 1.08, 0.35: 1.035}}
SMILE = {0.05: 1.06, 0.10: 1.015, 0.90: 1.20, 0.95: 1.28}
SURFACE = {"rv_window_days": 7, "iv_multiplier": MULTIPLIER,
           "skew": {"enabled": True, "min_dte": 3, "max_dte": 14, "anchor_ratios_by_side": SIDES, "smile_ratios": SMILE}}
REGIMES = [{"name": "calm", "vol": 0.35, "phi_iv": 0.9, "sigma_iv": 0.02}, {"name": "storm", "vol": 0.8, "phi_iv": 0.9, "sigma_iv": 0.04}]
MOVES = {"calm": {"calm": 0.99, "storm": 0.01}, "storm": {"calm": 0.03, "storm": 0.97}}


def market(seed, noise, **changes):
    return SyntheticConfig.model_validate({
        "seed": seed, "iv_noise": noise, "max_expiry_days": 30, "strike_width": 0.6, "warmup_days": 15, "vol_surface": SURFACE,
        "spot_path": {"start_spot": 90_000, "regimes": REGIMES, "regime_transitions": MOVES}, **changes})


def calibrated(tmp_path, seed, noise):
    root = tmp_path / f"{seed}_{noise}"
    universe = SyntheticUniverse(market(seed, noise), days=4)
    simulate(universe.config, days=4, every="6h", out=root)
    config = {"underlying": "BTC", "source": "harvested", "min_dte": 3, "max_dte": 14, "max_samples": 0, "option_types": ["C", "P"],
              "fit_skew": True, "harvest": {"data_root": str(root)}}
    return run_historical_calibration_from_harvest(config), universe


def test_recovery_without_noise_over_seeds(tmp_path):
    results = [calibrated(tmp_path, seed, False)[0] for seed in range(SEEDS)]
    found = np.array([r["recommended_iv_multiplier"] for r in results])
    assert np.abs(found / MULTIPLIER - 1).max() <= 0.01
    for side, anchors in SIDES.items():
        fitted = np.array([[r.recommended_skew.anchor_ratios_by_side[side][f"{d:.2f}"] for d in anchors] for r in results])
        assert np.abs(fitted.mean(axis=0) - list(anchors.values())).max() <= 0.01
        assert np.quantile(np.abs(fitted - list(anchors.values())), 0.9) <= 0.01
    far = np.array([[r.recommended_skew.smile_ratios[f"{c:.2f}"] for c in SMILE] for r in results])
    assert np.abs(far.mean(axis=0) - list(SMILE.values())).max() <= 0.02


def test_recovery_with_noise_over_seeds(tmp_path):
    gaps = []
    for seed in range(SEEDS):
        result, universe = calibrated(tmp_path, seed, True)
        times = pd.date_range(universe.config.start_time, periods=16, freq="6h")
        rv = np.array([universe.realized(t) for t in times])
        iv = rv * MULTIPLIER * np.exp([universe.path.iv_noise[universe.at(t)] for t in times])
        gaps.append(result["recommended_iv_multiplier"] / (iv.mean() / rv.mean()) - 1)
    gaps = np.array(gaps)
    assert abs(gaps.mean()) <= 2 * gaps.std(ddof=1) / math.sqrt(SEEDS)


def test_regime_means_within_two_standard_errors():
    means = []
    for seed in range(SEEDS):
        sensors, _ = sample_sensors(700, seed)
        model = fit_regimes(sensors, features=("vrp_30d", "skew_25d", "rv_30d"), k=3)
        means.append([r.sensor_means["rv_30d"] for r in model.regimes])
    means = np.array(means)
    truth = np.array([0.3, 0.5, 0.7]) * math.exp(0.05**2 / 2)
    assert (np.abs(means.mean(axis=0) - truth) <= 2 * means.std(axis=0, ddof=1) / math.sqrt(SEEDS)).all()


def test_transitions_within_their_confidence_intervals():
    truth = np.array([[0.98, 0.02], [0.05, 0.95]])
    spec = SpotPath(start_spot=1, regimes=[{"name": "a", "vol": 0.3}, {"name": "b", "vol": 0.6}],
                    regime_transitions={"a": {"a": 0.98, "b": 0.02}, "b": {"a": 0.05, "b": 0.95}})
    labels = simulate_paths(spec, 200, 1500, seed=9).regime
    inside = []
    for row in labels:
        linked = linked_pairs(np.arange(row.size) * 10**9)
        counts = transition_counts(row, linked, 2)
        found, n = smoothed_transitions(counts), counts.sum(axis=1, keepdims=True)
        inside.append(np.abs(found - truth) <= 1.96 * np.sqrt(truth * (1 - truth) / n))
    share = np.mean(inside)
    assert 0.90 <= share <= 0.99


def test_phi_and_sigma_are_unbiased():
    spec = SpotPath(start_spot=1, regimes=[{"name": "a", "vol": 0.3, "phi_iv": 0.9, "sigma_iv": 0.03}])
    x = simulate_paths(spec, 400, 400, seed=4, burn=100).iv
    fits = [fit_ar1(row, np.ones(row.size, dtype=bool)) for row in x]
    phi, sigma = np.array([f.phi for f in fits]), np.array([f.sigma for f in fits])
    assert abs(phi.mean() - 0.9) <= 3 * phi.std() / 20 + 1e-3
    assert abs(sigma.mean() - 0.03) <= 3 * sigma.std() / 20 + 1e-4
    assert np.median([f.stationary for f in fits]) == pytest.approx(0.03 / math.sqrt(0.19), rel=0.03)


@pytest.mark.parametrize("innovations", ["gaussian", "student_t", "bootstrap"])
def test_same_seed_same_bytes_and_another_seed_others(tmp_path, innovations):
    sensors, _ = sample_sensors(500)
    fit_regimes(sensors, features=("vrp_30d", "rv_30d"), k=2).to_json(tmp_path / "model.json")
    path = {"start_spot": 90_000, "model": str(tmp_path / "model.json"), "step": "6h", "innovations": innovations}
    config = {"spot_path": path, "vol_surface": SURFACE, "max_expiry_days": 20}
    digests = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        simulate(config, days=1, out=tmp_path / name, seed=seed)
        files = sorted(p for p in (tmp_path / name).rglob("*.parquet"))
        digests.append([hashlib.sha256(p.read_bytes()).hexdigest() for p in files])
    assert digests[0] == digests[1] != digests[2]


def test_a_chain_does_not_depend_on_those_before():
    one, two = SyntheticUniverse(market(3, True), days=3), SyntheticUniverse(market(3, True), days=3)
    for hour in range(0, 40, 3):
        build_chain(one, pd.Timestamp("2025-10-01", tz="UTC") + pd.Timedelta(hours=hour))
    pd.testing.assert_frame_equal(build_chain(one, "2025-10-03"), build_chain(two, "2025-10-03"))


@pytest.mark.parametrize("asset,spot", [("BTC", 90_000), ("ETH", 3_000), ("XRP_USDC", 2.1), ("SOL_USDC", 140)])
def test_no_arbitrage_and_parity(asset, spot):
    config = market(5, True, asset=asset, max_expiry_days=400, spot_path={"start_spot": spot, "regimes": REGIMES, "regime_transitions": MOVES})
    universe = SyntheticUniverse(config, days=10)
    for time in pd.date_range("2025-10-01T00:30", periods=12, freq="19h"):
        report = arbitrage_report(build_chain(universe, time))
        assert report["butterflies"] > 300 and report["calendars"] > 50
        assert report["butterfly_arbitrages"] == report["calendar_arbitrages"] == 0
        assert report["largest_parity_gap"] <= 1.01e-6 * 2


def test_chain_reads_like_the_market():
    chain = build_chain(SyntheticUniverse(market(1, True, max_expiry_days=400), days=2), "2025-10-02T12:00")
    read = normalize_chain(chain)
    assert read.counts["forward_mismatch"] == read.counts["crossed_quotes"] == read.counts["duplicate_instrument"] == 0
    f = read.frame[read.frame["mark_price"] > 0.005]
    again = black76_price(f["forward"], f["strike"], f["t"], f["mark_iv"], f["option_type"].astype(str)) / f["forward"]
    assert np.median(np.abs(again / f["mark_price"] - 1)) < 2e-4


ACTIVE = {"vrp": 0.1, "iv_multiplier": 1.3, "iv_multiplier_by_band": {"weekly": 1.2}, "skew_mode": "call_heavy", "skew_scale": 2.0,
          "calibrated_iv_multiplier": 1.1, "calibrated_skew_scale": 3.0}


@pytest.mark.parametrize("field", sorted(ACTIVE))
def test_every_regime_field_changes_a_price(field):
    surface = VolSurface(iv_multiplier=0.9, use_regime_vrp=True, skew=template_skew(min_dte=1, max_dte=30),
                         dte_bands=[{"name": "weekly", "min_dte": 3, "max_dte": 10, "iv_multiplier": 1.0}])
    def iv(**fields):
        return compute_synthetic_iv_with_skew(surface, 0.5, 90_000, 80_000, 7, regime=RegimeParams(name="r", **fields))[()]
    assert abs(iv(**{field: ACTIVE[field]}) - iv()) > 1e-3


SURFACE_FIELDS = {
    "iv_mode": {"iv_mode": "fixed", "fixed_iv": 0.9}, "fixed_iv": {"iv_mode": "fixed", "fixed_iv": 0.8}, "iv_multiplier": {"iv_multiplier": 1.4},
    "dte_bands": {"dte_bands": [{"name": "weekly", "min_dte": 3, "max_dte": 10, "iv_multiplier": 1.4}]}, "term_multipliers": {"term_multipliers": {7: 1.4}},
    "use_regime_vrp": {"use_regime_vrp": True}, "rv_window_days": {"rv_window_days": 14}, "skew": {"skew": template_skew(enabled=False)},
    "skew.min_dte": {"skew": template_skew(min_dte=8)}, "skew.max_dte": {"skew": template_skew(max_dte=5)},
    "skew.anchor_ratios": {"skew": {"anchor_ratios": {0.25: 1.3}}}, "skew.anchor_ratios_by_side": {"skew": {"anchor_ratios_by_side": {"put": {0.25: 1.3}}}},
    "skew.smile_ratios": {"skew": template_skew(smile_ratios={0.97: 1.6})},
    "skew.call_premium_ratios": {"skew": template_skew(call_premium_ratios={"call": {0.25: 1.5}, "put": {0.25: 1.5}})},
}


@pytest.mark.parametrize("field", sorted(SURFACE_FIELDS))
def test_every_surface_field_changes_a_chain(field):
    assert {f.split(".")[0] for f in SURFACE_FIELDS} == set(VolSurface.model_fields)
    regime = {"name": "r", "vol": 0.5, "vrp": 0.1, "skew_mode": "call_heavy" if "call_premium" in field else "put_heavy"}
    def chain(**changes):
        surface = VolSurface(**({"rv_window_days": 7, "iv_multiplier": 1.0, "skew": template_skew()} | changes))
        config = SyntheticConfig(vol_surface=surface, spot_path={"start_spot": 90_000, "regimes": [regime]}, max_expiry_days=30)
        return build_chain(SyntheticUniverse(config, days=2), "2025-10-02T12:00")["mark_iv"].to_numpy()
    if field == "skew.min_dte":  # the universe tapers instead of the plain surface's gate
        plain = [compute_synthetic_iv_with_skew(VolSurface(skew=template_skew(min_dte=m)), 0.5, 90_000, 80_000, 7)[()] for m in (3, 8)]
        assert plain[0] != plain[1]
    else:
        assert np.abs(chain(**SURFACE_FIELDS[field]) - chain()).max() > 0.01


PATH_FIELDS = {"drift": 2.0, "vol": 0.9, "weight": 9.0, "mean_duration": 500.0, "phi_iv": 0.9, "sigma_iv": 0.1, "phi_skew": 0.9, "sigma_skew": 0.1,
               "spot_iv_corr": -0.9, "iv_rv_beta": -0.9, "iv_multiplier": 2.0}
BANDS = [{"name": "weekly", "min_dte": 0, "max_dte": 15, "iv_multiplier": 1.0}, {"name": "monthly", "min_dte": 15, "max_dte": 50, "iv_multiplier": 1.0}]


def test_bands_of_a_regime_and_the_fade_change_a_chain():
    """Term multipliers per regime act in a simulated chain, and later expiries follow a departure of IV less."""
    def front_and_back(**fields):
        regime = {**REGIMES[0], "sigma_iv": 0.1, **fields}
        universe = SyntheticUniverse(market(4, True, max_expiry_days=60, vol_surface={**SURFACE, "dte_bands": BANDS},
                                            spot_path={"start_spot": 90_000, "regimes": [regime]}), days=2)
        chain = build_chain(universe, "2025-10-02T12:00")
        near = (chain["strike"] / chain["underlying_price"] - 1).abs() < 0.02
        days = pd.to_datetime(chain["expiry"]).map(lambda d: (d.tz_localize("UTC") - pd.Timestamp("2025-10-02T12:00Z")).days)
        return np.array([chain["mark_iv"][near & (days > a) & (days < b)].mean() for a, b in ((4, 12), (25, 45))])
    flat, steep, fading = front_and_back(), front_and_back(iv_multiplier_by_band={"weekly": 1.0, "monthly": 1.2}), front_and_back(iv_fade=0.2)
    assert steep[0] == pytest.approx(flat[0]) and steep[1] == pytest.approx(1.2 * flat[1], rel=0.02)
    assert fading[0] == pytest.approx(flat[0], rel=0.03) and abs(fading[1] / flat[1] - 1) > 0.03


def test_priority_of_multipliers_in_a_simulated_chain():
    """Override, regime's calibrated, regime's band, regime's own, applied surface's, config's; each one cleared gives the next."""
    def iv(**fields):
        config = market(4, False, vol_surface={**SURFACE, "dte_bands": BANDS}, spot_path={"start_spot": 90_000, "regimes": [{**REGIMES[0], **fields}]})
        chain = build_chain(SyntheticUniverse(config, days=2), "2025-10-02T12:00")
        return chain.loc[(chain["strike"] / chain["underlying_price"] - 1).abs().idxmin(), "mark_iv"]
    own, band, calibrated = {"iv_multiplier": 1.1}, {"iv_multiplier_by_band": {"weekly": 1.2}}, {"calibrated_iv_multiplier": 1.3}
    plain = iv()
    try:
        set_applied_surface("BTC", {**SURFACE, "iv_multiplier": 1.05})
        assert iv() == pytest.approx(1.05 * plain, rel=1e-3)
        set_applied_surface("BTC", None)
        ladder = [iv(), iv(**own), iv(**own, **band), iv(**own, **band, **calibrated)]
        set_iv_multiplier_override("BTC", 0, 10, 1.4)
        ladder.append(iv(**own, **band, **calibrated))
    finally:
        set_applied_surface("BTC", None)
        clear_iv_multiplier_overrides("BTC")
    assert np.array(ladder) / plain == pytest.approx([1.0, 1.1, 1.2, 1.3, 1.4], rel=1e-3)


def test_an_override_moves_the_marks_of_a_synthetic_chain_and_clearing_restores_them():
    universe = SyntheticUniverse(market(1, True), days=2)
    def marks(): return build_chain(universe, "2025-10-02T12:00").set_index("instrument_name")["mark_price"]
    before = marks()
    try:
        set_iv_multiplier_override("BTC", 3, 10, 1.5 * MULTIPLIER)
        during = marks()
    finally:
        clear_iv_multiplier_overrides("BTC")
    dte = pd.to_datetime(before.index.str.split("-").str[1], format="%d%b%y") - pd.Timestamp("2025-10-02T04:00")
    inside = (dte >= pd.Timedelta(days=3)) & (dte <= pd.Timedelta(days=10))
    assert (during[inside] > before[inside]).mean() > 0.9 and during[dte < pd.Timedelta(days=3)].equals(before[dte < pd.Timedelta(days=3)])
    assert marks().equals(before)


def test_spot_stands_at_start_spot_when_the_first_snapshot_is_written():
    universe = SyntheticUniverse(market(11, True), days=1)
    assert build_chain(universe, universe.config.start_time)["index_price"].iloc[0] == 90_000


@pytest.mark.parametrize("field", sorted(PATH_FIELDS))
def test_every_dynamic_field_changes_a_path(field):
    plain = {"vol": 0.4, "mean_duration": 20.0, "phi_iv": 0.5, "sigma_iv": 0.03, "phi_skew": 0.5, "sigma_skew": 0.02, "iv_multiplier": 1.0}
    def paths(**changes):
        regimes = [{"name": n, **plain, "vol": v} for n, v in (("a", 0.4), ("b", 0.6), ("c", 0.8))]
        regimes[0] |= changes
        return simulate_paths(SpotPath(start_spot=1, regimes=regimes), 20, 400, seed=1)
    a, b = paths(), paths(**{field: PATH_FIELDS[field]})
    assert any(not np.array_equal(getattr(a, n), getattr(b, n)) for n in ("regime", "log_return", "iv", "skew"))


CONFIG_FIELDS = {"seed": 99, "iv_noise": False, "carry": 0.2, "carry_front": 0.2, "max_expiry_days": 10, "strike_width": 1.5, "skew_taper_power": 0.9,
                 "warmup_days": 20, "start_time": "2025-11-03", "asset": "ETH", "vol_surface": {**SURFACE, "iv_multiplier": 1.2},
                 "quotes": {"short_dte_power": 1.0}, "spot_path": {"start_spot": 50_000, "regimes": REGIMES}}


@pytest.mark.parametrize("field", sorted(CONFIG_FIELDS))
def test_every_config_field_changes_the_market(field):
    assert set(CONFIG_FIELDS) == set(SyntheticConfig.model_fields)
    def chain(config):
        return build_chain(SyntheticUniverse(config, days=2), pd.Timestamp(config.start_time) + pd.Timedelta(hours=30))
    base = market(1, True)
    changed = SyntheticConfig.model_validate({**base.model_dump(), field: CONFIG_FIELDS[field]})
    assert not chain(base).equals(chain(changed))


@pytest.mark.parametrize("change,words", [
    ({"regime_transitions": {"calm": {"calm": 0.9}, "storm": {"storm": 1.0}}}, "sum to 0.9"),
    ({"regime_transitions": {"calm": {"calm": 1.0}, "storm": {"gale": 1.0}}}, "gale"),
    ({"regime_transitions": {"calm": {"calm": 1.5, "storm": -0.5}, "storm": {"storm": 1.0}}}, "negative"),
    ({"regimes": [{**REGIMES[0], "skew_mode": "smirk"}]}, "put_heavy"),
    ({"regimes": [{**REGIMES[0], "volatility": 0.3}]}, "volatility"),
])
def test_wrong_configs_are_named(change, words):
    path = {"start_spot": 90_000, "regimes": REGIMES, **change}
    with pytest.raises(ConfigError, match=words):
        load_synthetic_config({"spot_path": path})


def test_older_model_files_load_with_a_warning(tmp_path):
    old = {"regimes": [{"name": n, "mu_rv_30d": rv, "mu_vrp_30d": 0.04, "iv_level_sigma": 0.05, "skew_template": s, "phi_iv": 0.9, "phi_skew": 0.8}
                       for n, rv, s in (("calm", 0.35, "neutral"), ("storm", 0.8, "put_heavy"))], "transition_matrix": [[0.9, 0.1], [0.3, 0.7]]}
    file = tmp_path / "old.json"
    file.write_text(json.dumps(old))
    with pytest.warns(UserWarning, match="mu_rv_30d became vol.*iv_level_sigma became sigma_iv"):
        model = RegimeModel.from_json(file)
    assert model.names == ["calm", "storm"] and model.matrix[1, 0] == pytest.approx(0.3)
    assert [r.stationary_iv for r in model.regimes] == pytest.approx([0.05 / 0.39, 0.05 / 0.84])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert RegimeModel.from_json(model.to_json()) == model


def test_written_harvest_is_whole(tmp_path):
    told = simulate(Path(__file__).parents[1] / "data" / "configs" / "synthetic.yaml", days=1, every="6h", out=tmp_path)
    store = Store(str(tmp_path))
    assert told["snapshots"] == len(store.find("BTC")) == 4
    assert store.read_batch(store.find("BTC")).failures == []
    assert store.read_history("BTC")["timestamp"].is_monotonic_increasing


def test_from_a_simulated_harvest_to_regimes_and_back(tmp_path):
    """Simulate, learn, write the config block, simulate that: the learned market has the levels of the first."""
    regimes = [{**REGIMES[0], "iv_multiplier": 1.15, "sigma_iv": 0.005}, {**REGIMES[1], "iv_multiplier": 0.85, "sigma_iv": 0.005, "skew_scale": 1.5}]
    moves = {"calm": {"calm": 0.997, "storm": 0.003}, "storm": {"calm": 0.006, "storm": 0.994}}
    config = market(12, True, warmup_days=60, spot_path={"start_spot": 90_000, "regimes": regimes, "regime_transitions": moves})
    simulate(config, days=75, every="6h", out=tmp_path / "a")
    build = build_regimes({"data_dir": str(tmp_path / "a"), "features": "rv_7d,vrp_7d,skew_25d", "k": 2, "out": str(tmp_path / "model.json")})
    assert RegimeModel.from_json(tmp_path / "model.json") == build.model
    truth = SyntheticUniverse(config, days=75).path
    times = pd.DatetimeIndex(build.sensors["time"]).as_unit("ns").asi8
    real = truth.regime[np.searchsorted(truth.time_ns, times, side="right") - 1]
    assert max((build.labels == real).mean(), (build.labels != real).mean()) > 0.6
    assert build.model.regimes[0].iv_multiplier_by_band["weekly"] > build.model.regimes[1].iv_multiplier_by_band["weekly"]
    block = write_yaml_block(build, tmp_path / "block.yaml")
    assert "regime_transitions" in block
    told = simulate(tmp_path / "block.yaml", days=2, every="6h", out=tmp_path / "b")
    assert told["snapshots"] == 8
    overall = yaml.safe_load(block)["vol_surface"]["iv_multiplier"]
    assert 0.85 < overall < 1.15


def test_a_calibration_by_regime_is_written_back(tmp_path):
    regimes = [{**REGIMES[0], "iv_multiplier": 1.15, "sigma_iv": 0.0}, {**REGIMES[1], "iv_multiplier": 0.85, "sigma_iv": 0.0}]
    config = market(3, True, warmup_days=60, spot_path={"start_spot": 90_000, "regimes": regimes, "regime_transitions": MOVES})
    simulate(config, days=20, every="6h", out=tmp_path / "h")
    build = build_regimes({"data_dir": str(tmp_path / "h"), "features": "rv_7d,vrp_7d", "k": 2, "out": str(tmp_path / "model.json")})
    result = run_historical_calibration_from_harvest({
        "underlying": "BTC", "source": "harvested", "min_dte": 3, "max_dte": 14, "max_samples": 0, "option_types": ["C", "P"],
        "regimes": str(tmp_path / "model.json"), "harvest": {"data_root": str(tmp_path / "h")}})
    found = {name: entry.multiplier for name, entry in result.environment_summary.items()}
    calibrated_model = write_calibrated_regimes(build.model, result.environment_summary, tmp_path / "calibrated.json")
    assert RegimeModel.from_json(tmp_path / "calibrated.json") == calibrated_model
    assert {r.name: r.calibrated_iv_multiplier for r in calibrated_model.regimes} == pytest.approx(found)


REAL = real_data_root()
SENSORS: dict[str, pd.DataFrame] = {}


def real_sensors(asset):
    if asset not in SENSORS:
        history = REAL / "history" / "BTC_ohlc_1h.parquet"
        options = {"price_history": str(history)} if asset == "BTC" and history.exists() else {}
        SENSORS[asset] = harvest_sensors(str(REAL / "deribit_6h"), asset, **options)
    return SENSORS[asset]


def moments(x, returns, log_iv, linked):
    """Spread and first autocorrelation of x, correlation of the return with the move of ln IV."""
    pairs = linked[1:]
    return np.array([x.std(), np.corrcoef(x[1:][pairs], x[:-1][pairs])[0, 1], np.corrcoef(returns[1:][pairs], np.diff(log_iv)[pairs])[0, 1]])


needs_real = pytest.mark.skipif(REAL is None or not (REAL / "deribit_6h").is_dir(), reason="real data is not here (VOLCAL_REAL_DATA)")


@needs_real
@pytest.mark.parametrize("asset", ["BTC", "ETH"])
def test_regimes_of_the_market_are_firm_or_say_so(asset):
    model = fit_regimes(real_sensors(asset))
    assert min(model.occupancy().values()) >= 0.03 and np.diag(model.matrix).max() < 1
    assert {n for n, v in model.evidence["visits"].items() if v < 3} == set(model.evidence["transitions_not_estimable"])
    assert model.stationary() == pytest.approx(model.occupancy(), abs=1e-6)
    chosen = [row for row in model.evidence["k"] if row["chosen"]]
    assert len(chosen) == 1 and chosen[0]["seed_agreement"] >= 0.8
    again = RegimeModel.from_json(model.to_json())
    assert np.array_equal(again.predict(real_sensors(asset)), model.predict(real_sensors(asset)))


@needs_real
@pytest.mark.parametrize("step", ["6h", "1h"])
@pytest.mark.parametrize("innovations", ["gaussian", "student_t", "bootstrap"])
@pytest.mark.parametrize("asset", ["BTC", "ETH"])
def test_simulated_iv_moves_like_the_fitted_market(tmp_path, asset, innovations, step):
    """Means over 200 paths, looked at every six hours, within 10 % of the data's."""
    sensors = real_sensors(asset)
    model = fit_regimes(sensors)
    model.to_json(tmp_path / "model.json")
    level = np.log([r.iv_multiplier for r in model.regimes])
    labels, ratio = model.predict(sensors), np.log(sensors["iv_7d"] / sensors["rv_7d"]).to_numpy()
    kept = (labels >= 0) & np.isfinite(ratio)
    spot, iv = (np.log(sensors[c].to_numpy()[kept]) for c in ("spot", "iv_7d"))
    time_ns = pd.DatetimeIndex(sensors["time"][kept]).as_unit("ns").asi8
    data = moments(ratio[kept] - level[labels[kept]], np.diff(spot, prepend=spot[0]), iv, linked_pairs(time_ns))
    n, every = int(kept.sum()), {"6h": 1, "1h": 6}[step]
    window = 28 * every
    spec = SpotPath(start_spot=1, model=str(tmp_path / "model.json"), step=step, innovations=innovations)
    paths = simulate_paths(spec, 200, n * every + window, seed=5, burn=400 * every)
    squares = np.cumsum(np.diff(paths.log_return, axis=1, prepend=0.0) ** 2, axis=1)
    rv = 0.5 * np.log(squares[:, window:] - squares[:, :-window])[:, ::every]
    spots, x, regime = (a[:, window::every] for a in (paths.log_return, paths.iv, paths.regime))
    rows, whole = zip(x, spots, rv, regime, strict=True), np.ones(n, dtype=bool)
    found = np.mean([moments(a, np.diff(s, prepend=s[0]), v + a + level[g], whole) for a, s, v, g in rows], axis=0)
    assert np.abs(found / data - 1).max() <= 0.10, (found, data)


@needs_real
@pytest.mark.parametrize("asset", ["BTC", "ETH"])
def test_a_learned_universe_has_the_market_s_term_structure(asset):
    """Slope per regime, as the model labels both; what a move of the front does to the slope and to 30 days."""
    history = REAL / "history" / "BTC_ohlc_1h.parquet"
    build = build_regimes({"underlying": asset, "data_dir": str(REAL / "deribit_6h"), "out": "",
                           "price_history": str(history) if asset == "BTC" and history.exists() else ""})
    clock = Clock(asset, pd.DatetimeIndex(build.sensors["time"]), 0, "candles" if asset == "BTC" else "index_price")
    config = load_synthetic_config(synthetic_block(build))
    twins = [quick_twin(config, clock, seed) for seed in range(6)]
    def answer(f):
        front, slope, later = (f[c].diff().to_numpy()[1:] for c in ("iv_7d", "term_slope", "iv_30d"))
        return np.array([np.corrcoef(front, slope)[0, 1], front @ later / (front @ front)])
    real, found = answer(build.sensors), np.mean([answer(t) for t in twins], axis=0)
    assert np.abs(found - real).max() <= 0.10, (found, real)
    labels = np.concatenate([build.model.predict(t) for t in twins])
    slopes = np.concatenate([t["term_slope"] for t in twins])
    for i, r in enumerate(build.model.regimes):
        assert abs(slopes[labels == i].mean() - r.sensor_means["term_slope"]) <= 0.04, r.name
    assert np.corrcoef([slopes[labels == i].mean() for i in range(len(build.model.regimes))],
                       [r.sensor_means["term_slope"] for r in build.model.regimes])[0, 1] > 0.9


def test_simulate_prices_by_what_is_applied(tmp_path, monkeypatch):
    """The command loads applied surfaces, uses that of the asset, and says so."""
    from typer.testing import CliRunner

    import volcal.ops.policy as policy
    from volcal.ops.cli import app

    config = tmp_path / "market.json"
    config.write_text(market(1, False).model_dump_json())
    def told(name):
        done = CliRunner().invoke(app, ["simulate", str(config), "--days", "0.25", "--out", str(tmp_path / name), "--json"])
        store = Store(str(tmp_path / name))
        return json.loads(done.stdout)["surface"], store.read_batch(store.find("BTC")).frame["mark_iv"].median()
    monkeypatch.setattr(policy, "load_applied", lambda *_: {})
    plain = told("a")
    monkeypatch.setattr(policy, "load_applied", lambda *_: set_applied_surface("BTC", {**SURFACE, "iv_multiplier": 1.3 * MULTIPLIER}))
    try:
        applied = told("b")
    finally:
        set_applied_surface("BTC", None)
    assert plain[0] == "of the config" and applied[0].startswith("applied to BTC")
    assert applied[1] == pytest.approx(1.3 * plain[1], rel=0.02)
