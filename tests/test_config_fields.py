"""No field of a config is ignored in silence: each changes what it should change, and nothing that it should not."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from test_historical import calibrate, leaves, write_candles, write_harvest, write_raw

from volcal.calibration import sums
from volcal.calibration.config import describe_config
from volcal.calibration.result import CalibrationResult
from volcal.units import ConfigError, SchemaError
from volcal.vol.regimes import RegimeModel
from volcal.vol.sensors import harvest_sensor_table

BASE: dict[str, Any] = {
    "min_dte": 3, "max_dte": 30, "option_types": ["C", "P"], "fit_skew": True, "bands": True, "bucket_by_dte": True, "bucket_by_abs_delta": True,
    "error_ladder": True, "skew": {"min_dte": 3, "max_dte": 14}}
BANDS = [{"name": "weekly", "min_dte": 3, "max_dte": 10}, {"name": "monthly", "min_dte": 20, "max_dte": 40},
         {"name": "quarterly", "min_dte": 60, "max_dte": 100}]


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Harvests: plain; linear; with a broken file and forwards off by 1 %; without candles; and another price history."""
    places = {name: tmp_path_factory.mktemp(name) for name in ("plain", "linear", "odd", "bare", "prices")}
    times = write_harvest(places["plain"])
    write_harvest(places["linear"], "XRP_USDC", number=12, rate=0.05)
    shutil.copytree(places["plain"], places["odd"], dirs_exist_ok=True)
    path = min(places["odd"].glob("BTC/**/*_0210.parquet"))
    path.write_bytes(path.read_bytes()[:2000])
    for path in places["odd"].glob("BTC/**/*_1[02]10.parquet"):
        frame = pd.read_parquet(path)
        frame["underlying_price"] *= 1.01
        frame.to_parquet(path, index=False)
    shutil.copytree(places["plain"], places["bare"], dirs_exist_ok=True)
    shutil.rmtree(places["bare"] / "_history")
    write_candles(places["prices"], "BTC")
    candles = places["prices"] / "_history" / "BTC_ohlc.parquet"
    history = pd.read_parquet(candles)
    history["close"] = history["close"].iloc[0] * (history["close"] / history["close"].iloc[0]) ** 1.2
    history.to_parquet(candles, index=False)
    assert len(times) == 24
    return places


@pytest.fixture(scope="module")
def run(roots: dict[str, Path]) -> Callable[..., dict[str, Any]]:
    """The leaves of a result; results are remembered."""
    known: dict[str, dict[str, Any]] = {}

    def result(root: str = "plain", **changes: Any) -> dict[str, Any]:
        config = {**BASE, **changes}
        if repr((root, config)) not in known:
            given = {k: str(roots[v]) if k == "data_root" else v for k, v in config.pop("harvest", {}).items()}
            known[repr((root, {**BASE, **changes}))] = leaves(calibrate(roots[root], harvest=given, **config).to_dict())
        return known[repr((root, {**BASE, **changes}))]

    return result


HEADLINE = ("count", "mae_pct", "recommended_iv_multiplier", "global_metrics.vega_weighted_mae_pct")
SURFACE = ("recommended_vol_surface.iv_multiplier", "recommended_skew.anchor_ratios_by_side.put.0.15")
DATA = ("snapshot_count", "data_quality.num_snapshots", "reproducibility.harvest_files_hash")
INPUT = ("count", "atm_iv", "spot", *DATA)

# field: (base of the comparison, the change, what must differ, what must not)
TABLE: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[str, ...], tuple[str, ...]]] = {
    "min_dte": ({}, {"min_dte": 5}, (*HEADLINE, "min_dte"),
                ("bands.0.count", "bands.0.mae_pct", "bands.0.multiplier_candidates.mean", "buckets.0.count", *DATA)),
    "max_dte": ({}, {"max_dte": 12}, (*HEADLINE, "max_dte"), ("bands.1.count", "buckets.2.count", *DATA)),
    "iv_multiplier": ({}, {"iv_multiplier": 0.8},
                      ("mae_pct", "bias_pct", "iv_multiplier", "global_metrics.mae_vol_points", "residuals_summary.p50_pct_error",
                       "vol_surface_diff.iv_multiplier_delta", "current_vol_surface.iv_multiplier", "error_ladder.0.mae_pct"),
                      ("recommended_iv_multiplier", "recommended_metrics.mae_pct", "error_ladder.1.mae_pct", "rv_annualized", *SURFACE, *INPUT)),
    "default_iv": ({"min_rv_n_eff": 10**6}, {"default_iv": 0.45}, ("mae_pct", "recommended_iv_multiplier", "rv_annualized", "rv_source"),
                   ("bands.0.count", "count", *DATA)),
    "rv_window_days": ({}, {"rv_window_days": 3}, ("rv_annualized", "rv_stderr", "recommended_iv_multiplier", "recommended_vol_surface.rv_window_days"),
                       INPUT[:1] + INPUT[2:]),
    "risk_free_rate": ({"root": "linear", "underlying": "XRP_USDC"}, {"risk_free_rate": 0.05},
                       ("mae_pct", "recommended_metrics.mae_pct"), ("count", "snapshot_count", "rv_stderr")),
    "max_samples": ({}, {"max_samples": 40}, ("count", "mae_pct", "buckets.0.count", "bands.0.count", "events.not_sampled"), DATA),
    "skew.enabled": ({"fit_skew": False}, {"skew": {"enabled": False, "min_dte": 3, "max_dte": 14}},
                     ("mae_pct", "recommended_iv_multiplier", "recommended_vol_surface.skew.enabled"), INPUT),
    "skew.min_dte": ({}, {"skew": {"min_dte": 8, "max_dte": 14}}, ("mae_pct", "recommended_iv_multiplier", "recommended_skew.min_dte",
                                                                  "recommended_skew.counts.call.0.15"), INPUT),
    "skew.max_dte": ({}, {"skew": {"min_dte": 3, "max_dte": 30}}, ("mae_pct", "recommended_iv_multiplier", "recommended_skew.max_dte",
                                                                  "recommended_skew.counts.call.0.15"), INPUT),
    "harvest.data_root": ({}, {"harvest": {"data_root": "odd"}}, ("mae_pct", "snapshot_count", "data_quality.num_schema_failures"), ("min_dte",)),
    "harvest.underlying": ({"root": "linear", "underlying": "XRP_USDC"}, {"root": "linear", "underlying": "XRP", "harvest": {"underlying": "XRP_USDC"}},
                           ("underlying",), ("count", "mae_pct", "recommended_iv_multiplier")),
    "harvest.start_time": ({}, {"harvest": {"start_time": "2026-03-02T12:00Z"}}, ("count", "mae_pct", "time_range.start", *DATA), ("spot", "time_range.end")),
    "harvest.end_time": ({}, {"harvest": {"end_time": "2026-03-03T12:00Z"}}, ("count", "mae_pct", "time_range.end", "as_of", *DATA), ("time_range.start",)),
    "harvest.snapshot_step": ({}, {"harvest": {"snapshot_step": 3}}, ("count", "mae_pct", *DATA), ("time_range.start",)),
    "harvest.max_snapshots": ({}, {"harvest": {"max_snapshots": 5}}, ("count", "mae_pct", *DATA), ("time_range.start", "time_range.end")),
    "harvest.price_history": ({}, {"harvest": {"price_history": "prices"}}, ("rv_annualized", "recommended_iv_multiplier", "rv_source"),
                              ("count", "spot", *DATA)),
    "harvest.forward": ({"root": "odd"}, {"harvest": {"forward": "quoted"}}, ("mae_pct", "recommended_skew.anchor_ratios_by_side.put.0.15"), DATA),
    "harvest.expected_step_minutes": ({}, {"harvest": {"expected_step_minutes": 30}},
                                      ("data_quality.coverage_fraction", "data_quality.status"), (*HEADLINE, "snapshot_count")),
    "vol_surface": ({}, {"vol_surface": {"iv_multiplier": 0.8, "dte_bands": [{"name": "weekly", "min_dte": 3, "max_dte": 10, "iv_multiplier": 1.1}]}},
                    ("mae_pct", "bias_pct", "iv_multiplier", "current_vol_surface.dte_bands.0.iv_multiplier", "vol_surface_diff.iv_multiplier_delta",
                     "vol_surface_diff.band_multiplier_delta.weekly", "error_ladder.0.mae_pct"),
                    ("recommended_iv_multiplier", "recommended_metrics.mae_pct", "rv_annualized", *SURFACE, *INPUT)),
    "option_types": ({}, {"option_types": ["C"]}, (*HEADLINE, "option_types_used.1", "recommended_skew.anchor_ratios.0.15", "bands.0.count"), DATA),
    "bands": ({}, {"bands": None}, ("bands.0.count", "recommended_vol_surface.dte_bands.0.iv_multiplier"),
              ("count", "mae_pct", "recommended_iv_multiplier", "error_ladder.4.mae_pct")),
    "bands.name": ({"bands": BANDS}, {"bands": [BANDS[0] | {"name": "short"}, *BANDS[1:]]}, ("bands.0.name",), ("bands.0.count", *HEADLINE)),
    "bands.min_dte": ({"bands": BANDS}, {"bands": [BANDS[0] | {"min_dte": 5}, *BANDS[1:]]}, ("bands.0.count", "bands.0.min_dte"), ("bands.1.count", *HEADLINE)),
    "bands.max_dte": ({"bands": BANDS}, {"bands": [BANDS[0] | {"max_dte": 7}, *BANDS[1:]]}, ("bands.0.count", "bands.0.max_dte"), ("bands.1.count", *HEADLINE)),
    "bands.max_samples": ({"bands": BANDS}, {"bands": [BANDS[0] | {"max_samples": 10}, *BANDS[1:]]}, ("bands.0.count", "bands.0.mae_pct"),
                          ("bands.1.count", "bands.1.mae_pct", *HEADLINE)),
    "bucket_by_dte": ({}, {"bucket_by_dte": [0, 10, 40]}, ("buckets.0.name", "buckets.0.count"), HEADLINE),
    "bucket_by_abs_delta": ({}, {"bucket_by_abs_delta": [0, 0.3, 1]}, ("residuals_summary.by_delta_bucket.abs_delta_0.00_0.30.count",), HEADLINE),
    "filters.min_mark_price": ({}, {"filters": {"min_mark_price": 0.002}}, (*HEADLINE, "liquidity_filters.dropped_by_reason.min_mark_price",
                                                                          "liquidity_filters.dropped_count", "bands.0.count", "buckets.0.count"), DATA),
    "filters.min_open_interest": ({}, {"filters": {"min_open_interest": 10}}, (*HEADLINE, "liquidity_filters.dropped_by_reason.min_open_interest"), DATA),
    "filters.min_vega": ({}, {"filters": {"min_vega": 20.0}}, (*HEADLINE, "liquidity_filters.dropped_by_reason.min_vega"), DATA),
    "filters.max_abs_moneyness": ({}, {"filters": {"max_abs_moneyness": 0.08}}, (*HEADLINE, "liquidity_filters.dropped_by_reason.max_abs_moneyness"), DATA),
    "filters.require_two_sided": ({}, {"filters": {"require_two_sided": True}}, (*HEADLINE, "liquidity_filters.dropped_by_reason.require_two_sided"), DATA),
    "fit_skew": ({}, {"fit_skew": False}, ("recommended_skew.anchor_ratios_by_side.put.0.15", "recommended_iv_multiplier", "recommended_metrics.mae_pct",
                                           "skew_misfit.max_abs_diff"), ("count", "mae_pct", "rv_annualized", "current_skew.anchor_ratios.0.15")),
    "return_rows": ({}, {"return_rows": False}, ("rows.0.mark_iv",), ("rows_total", *HEADLINE, *SURFACE)),
    "emit_recommended_vol_surface": ({}, {"emit_recommended_vol_surface": False}, ("recommended_vol_surface.iv_multiplier",
                                                                                 "vol_surface_diff.iv_multiplier_delta"), HEADLINE),
    "multiplier_method": ({}, {"multiplier_method": "mean"}, ("recommended_iv_multiplier", *SURFACE[:1], "recommended_metrics.mae_pct",
                                                              "bands.0.recommended_iv_multiplier", "error_ladder.3.mae_pct"),
                          ("mae_pct", "multiplier_candidates.vega_weighted", "multiplier_candidates.min_mae", "error_ladder.1.mae_pct")),
    "validation_fraction": ({}, {"validation_fraction": 0.4}, ("out_of_sample_metrics.mae_pct", "out_of_sample_metrics.recommended_iv_multiplier"),
                            (*HEADLINE, *SURFACE)),
    "min_rv_coverage": ({"root": "bare", "min_rv_coverage": 0.05, "min_rv_n_eff": 3}, {"min_rv_coverage": 0.2},
                        ("count", "rv_annualized", "events.snapshots_without_trusted_rv"), DATA),
    "min_rv_n_eff": ({"root": "bare", "min_rv_coverage": 0.05, "min_rv_n_eff": 3}, {"min_rv_n_eff": 12},
                     ("count", "rv_annualized", "events.snapshots_without_trusted_rv"), DATA),
    "error_ladder": ({}, {"error_ladder": False}, ("error_ladder.0.mae_pct",), (*HEADLINE, *SURFACE)),
    "seed": ({"max_samples": 40}, {"seed": 43}, ("mae_pct", "recommended_metrics.mae_pct"), ("count", "snapshot_count")),
}


def unchanged(value: Any) -> Any:
    """Equal to a value but for the rounding of its sums: rows are added up by cells, and more groups make other cells."""
    return pytest.approx(value, rel=1e-12, abs=0.0, nan_ok=True) if isinstance(value, float) else value


@pytest.mark.parametrize("field", sorted(TABLE))
def test_a_field_changes_what_it_should_and_nothing_else(field: str, run: Callable[..., dict[str, Any]], roots: dict[str, Path]) -> None:
    base, change, differs, stays = TABLE[field]
    if "price_history" in change.get("harvest", {}):
        change = {"harvest": {"price_history": str(roots["prices"] / "_history" / "BTC_ohlc.parquet")}}
    one, other = run(**base), run(**{**base, **change})
    for path in (*differs, "reproducibility.config_hash"):
        assert path in one or path in other, f"{path} is in neither result"
        assert one.get(path) != other.get(path), f"{field}: {path} is {one.get(path)} both times"
    for path in stays:
        assert path in one and other.get(path) == unchanged(one[path]), f"{field}: {path} was {one.get(path)} and is {other.get(path)}"


def test_the_table_names_every_field() -> None:
    elsewhere = {"underlying", "source", "harvest", "skew", "filters", "regimes", "exact_metrics", "harvest.on_schema_error"}
    assert {entry["field"] for entry in describe_config()} == {*TABLE, *elsewhere}


def test_regimes_label_and_report_and_change_no_fit(roots: dict[str, Path], run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    sensors = harvest_sensor_table(str(roots["plain"]), "BTC").frame
    model = RegimeModel.fit(sensors, features=["vrp_7d", "rv_7d"], k=2)
    model.to_json(tmp_path / "model.json")
    one, other = run(), run(regimes=str(tmp_path / "model.json"))
    for path in (*HEADLINE, *SURFACE, *DATA):
        assert other[path] == unchanged(one[path]), path
    shares = {name: other[f"environment_summary.{name}.share"] for name in model.names}
    assert shares == pytest.approx({name: (model.predict(sensors) == i).mean() for i, name in enumerate(model.names)})
    assert sum(other[f"environment_summary.{name}.count"] for name in model.names) == other["count"]
    assert other["rows.0.regime"] in model.names and one["rows.0.regime"] is None
    assert other["reproducibility.regime_model_hash"] and not one["reproducibility.regime_model_hash"]


def test_underlying_chooses_the_market(run: Callable[..., dict[str, Any]]) -> None:
    assert run("linear", underlying="XRP_USDC")["spot"] < 10 < run()["spot"]


def test_on_schema_error_skips_or_stops(roots: dict[str, Path]) -> None:
    assert calibrate(roots["odd"], harvest={"on_schema_error": "skip"}).data_quality["num_schema_failures"] == 1
    with pytest.raises(SchemaError, match="_0210.parquet"):
        calibrate(roots["odd"], harvest={"on_schema_error": "raise"})


def test_exact_metrics_measure_every_row(roots: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The sample of pass 2 is made small here, so that there is something to lose by sampling."""
    full = calibrate(roots["plain"], **BASE)
    monkeypatch.setattr(sums, "SAMPLE_ROWS", 500)
    sampled, exact = calibrate(roots["plain"], **BASE), calibrate(roots["plain"], **BASE, exact_metrics=True)
    assert full.recommended_metrics == exact.recommended_metrics and exact.recommended_metrics.count == full.count
    assert 300 < sampled.recommended_metrics.count < full.count and len(sampled.rows) < len(exact.rows)
    assert sampled.mae_pct == exact.mae_pct and sampled.recommended_iv_multiplier == exact.recommended_iv_multiplier
    assert sampled.recommended_metrics.mae_pct == pytest.approx(exact.recommended_metrics.mae_pct, rel=0.15)


def test_every_multiplier_method_recommends_its_own_candidate(run: Callable[..., dict[str, Any]]) -> None:
    for method in ("vega_weighted", "mean", "atm", "min_mae"):
        found = run(multiplier_method=method)
        assert found["recommended_iv_multiplier"] == found[f"multiplier_candidates.{method}"] == found["recommended_vol_surface.iv_multiplier"]
        assert found["bands.0.recommended_iv_multiplier"] == found[f"bands.0.multiplier_candidates.{method}"]
    assert run(multiplier_method="min_mae")["recommended_metrics.mae_pct"] <= run(multiplier_method="mean")["recommended_metrics.mae_pct"]


def test_vol_surface_says_what_the_plain_fields_say(run: Callable[..., dict[str, Any]]) -> None:
    plain = run(iv_multiplier=0.8)
    whole = run(iv_multiplier=1.3, vol_surface={"iv_multiplier": 0.8})
    for path in (*HEADLINE, *SURFACE, "bias_pct", "iv_multiplier", "error_ladder.0.mae_pct"):
        assert plain[path] == whole[path], path


def test_a_fixed_surface_is_judged_without_realized_vol(run: Callable[..., dict[str, Any]]) -> None:
    off = {"enabled": False, "min_dte": 3, "max_dte": 14}
    found = run(vol_surface={"iv_mode": "fixed", "fixed_iv": 0.55, "iv_multiplier": 1.0, "skew": off})
    assert found["rows.0.synthetic_iv"] == 0.55


def test_the_first_nine_fields_are_enough(roots: dict[str, Path]) -> None:
    nine = {"min_dte": 3, "max_dte": 30, "iv_multiplier": 1.0, "default_iv": 0.6, "rv_window_days": 7, "risk_free_rate": 0.0, "max_samples": 80,
            "skew": {"enabled": True, "min_dte": 3, "max_dte": 14}}
    result = calibrate(roots["plain"], **nine)
    assert isinstance(result, CalibrationResult) and result["count"] == 24 * 80 and result.get("mae_pct") > 0
    assert 0.5 < result["recommended_iv_multiplier"] < 2 and result["option_types_used"] == ["C"] and result["rows"]


def test_without_a_harvest_section_it_says_what_to_add() -> None:
    from volcal.calibration.historical import run_historical_calibration_from_harvest

    with pytest.raises(ConfigError, match="harvest"):
        run_historical_calibration_from_harvest({"underlying": "BTC"})


def test_a_broken_file_of_another_window_is_not_read(roots: dict[str, Path]) -> None:
    after = {"start_time": "2026-03-03T00:00Z"}
    one, other = calibrate(roots["plain"], harvest=after, **BASE), calibrate(roots["odd"], harvest=after, **BASE)
    assert one.data_quality["num_schema_failures"] == other.data_quality["num_schema_failures"] == 0
    write_raw(roots["odd"], "BTC", "2026-03-09T00:00Z", b"not parquet at all")
    assert calibrate(roots["odd"], harvest={**after, "end_time": "2026-03-04"}, **BASE).count == other.count
