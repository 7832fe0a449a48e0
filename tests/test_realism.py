"""The realism check: refusals, thin data, determinism, its own model not rejected, and the order of markets on real data."""
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from volcal.ops.cli import app
from volcal.settings import real_data_root
from volcal.units import ConfigError, NoUsableDataError, StoreError
from volcal.universe.chains import simulate
from volcal.universe.judge import Judge, Null, comparable_sensors, market_standing, model_null, pair_score, standing
from volcal.universe.paths import path_model
from volcal.universe.realism import RealismParameters, RealismResult, realism_check, realism_from_json, realism_summary, refused
from volcal.universe.rows import block_days, deal_blocks, thin_factor
from volcal.universe.twins import Clock, baseline_configs, fit_twin_model, model_config, quick_twin, white_noise
from volcal.vol.regimes import fit_regimes, sample_sensors
from volcal.vol.sensors import SENSORS, harvest_sensor_table

SMALL = {"pairs": 20, "samples": 20}


@pytest.fixture(scope="module")
def truth():
    sensors, _ = sample_sensors(600)
    return model_config(fit_regimes(sensors, features=("rv_7d", "vrp_7d", "skew_25d"), k=3), "BTC", 90_000.0), Clock("BTC", pd.DatetimeIndex(sensors["time"]))


@pytest.fixture(scope="module")
def harvest(tmp_path_factory, truth) -> Path:
    """Twelve days of a made-up market, written as chains."""
    root = tmp_path_factory.mktemp("harvest")
    simulate(truth[0].model_copy(update={"start_time": "2026-01-01T00:00+00:00"}), 12, root, every="4h", seed=3)
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    sensors, _ = sample_sensors(600)
    path = tmp_path_factory.mktemp("model") / "btc.json"
    fit_regimes(sensors, features=("rv_7d", "vrp_7d", "skew_25d"), k=2, provenance={"asset": "BTC"}).to_json(path)
    return path


@pytest.fixture(scope="module")
def thin(harvest, model) -> RealismResult:
    return realism_check(underlying="BTC", data_dir=str(harvest), model=str(model), **SMALL)


def test_thin_data_is_scored_degraded_with_wide_bands(thin):
    assert thin.status == "degraded" and "weeks" in thin.reason
    assert 0 < thin.realism_score <= 1 and thin.score_low <= thin.realism_score <= thin.score_high
    ns = pd.DatetimeIndex(thin.market["time"]).as_unit("ns").asi8
    assert thin_factor(ns) > 3 and block_days(ns) < 7


def test_sensors_that_cannot_be_computed_are_left_out_on_both_sides_and_listed(thin):
    assert set(thin.sensors) | set(thin.left_out) == set(SENSORS) and not set(thin.sensors) & set(thin.left_out)
    assert all(thin.market[n].notna().any() and thin.runs[0][n].notna().any() for n in thin.sensors)
    assert {"levels", "dynamics", "returns", "surface"} <= set(thin.universe.families)
    assert all(r.name.split(" ")[0] not in thin.left_out for r in thin.metrics)


def test_both_sides_stand_at_the_same_times(thin):
    assert (pd.DatetimeIndex(thin.market["time"]) == pd.DatetimeIndex(thin.runs[0]["time"])).all()


def test_readings_are_complete_and_json_is_plain(thin):
    told = json.loads(thin.to_json())
    assert told["status"] == "degraded" and told["realism_score"] == thin.realism_score
    for reading in told["metrics"]:
        assert reading["means"] and reading["direction"] == "lower is more alike" and reading["distance"] >= 0 and reading["typical"] > 0
        assert reading["high"] is None or reading["distance"] <= reading["high"] + 1e-9
    assert [r.ratio for r in thin.metrics] == sorted((r.ratio for r in thin.metrics), reverse=True)
    assert set(told["baselines"]) == {"fitted here", "one regime", "Gaussian", "mis-scaled", "white noise"}


def test_the_same_seed_gives_the_same_bytes(thin, harvest, model):
    again = realism_check(RealismParameters(underlying="BTC", data_dir=str(harvest), model=str(model), **SMALL))
    assert again.to_json() == thin.to_json()


def test_a_model_of_another_underlying_is_refused(harvest, model, tmp_path):
    other = tmp_path / "eth.json"
    other.write_text(model.read_text().replace('"asset": "BTC"', '"asset": "ETH"'))
    with pytest.raises(ConfigError, match="is of ETH, but the market is BTC"):
        realism_check(underlying="BTC", data_dir=str(harvest), model=str(other), **SMALL)


def test_a_config_of_another_underlying_is_refused(harvest, truth, tmp_path):
    path = tmp_path / "eth.json"
    path.write_text(truth[0].model_copy(update={"asset": "ETH"}).model_dump_json())
    with pytest.raises(ConfigError, match="is of ETH, but the market is BTC"):
        realism_check(underlying="BTC", data_dir=str(harvest), config=str(path), **SMALL)


def test_an_empty_window_and_a_missing_folder_are_refused(harvest, model, tmp_path):
    with pytest.raises(NoUsableDataError, match="no snapshot of BTC"):
        realism_check(underlying="BTC", data_dir=str(harvest), model=str(model), start="2027-01-01T00:00Z", **SMALL)
    with pytest.raises(StoreError):
        realism_check(underlying="BTC", data_dir=str(tmp_path / "nowhere"), model=str(model), **SMALL)


def test_two_snapshots_are_refused_saying_what_is_needed(harvest, model):
    with pytest.raises(NoUsableDataError, match="needed"):
        realism_check(underlying="BTC", data_dir=str(harvest), model=str(model), start="2026-01-01T00:00Z", end="2026-01-01T04:30Z", **SMALL)


def test_damaged_files_are_refused_for_their_quality(tmp_path, harvest, model):
    for path in sorted(harvest.rglob("BTC_*.parquet"))[:6]:
        if "_history" in path.parts:
            continue
        target = tmp_path / path.relative_to(harvest)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(b"PAR1 torn")
    with pytest.raises(NoUsableDataError, match="quality is failed"):
        realism_check(underlying="BTC", data_dir=str(tmp_path), model=str(model), **SMALL)


def volcal(*words) -> tuple[int, str, str]:
    """Exit code, stdout, stderr of the command line."""
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout, done.stderr


def test_command_line_scores_thin_data_leaves_a_report_and_exits_degraded(harvest, model, tmp_path):
    code, out, err = volcal("realism-check", "--data-dir", harvest, "--model", model, "--days", "6", "--report-dir", tmp_path, "--json")
    told = json.loads(out)
    assert (code, told["status"], err) == (3, "degraded", "") and 0 < told["realism_score"] <= 1
    page = Path(told["report"])
    assert page.parent.parent == tmp_path / "BTC" / "realism" and "Where it differs, worst first" in page.read_text(encoding="utf-8")
    left = realism_from_json(page.with_suffix(".json"))
    text = realism_summary(left)
    assert left.realism_score == told["realism_score"] and f"{left.realism_score:.2f}" in text and "white noise" in text and "DEGRADED" in text


def test_command_line_refuses_a_harvest_of_nothing_and_says_what_is_needed(harvest, model, tmp_path):
    window = ("--start", "2026-01-01", "--end", "2026-01-01T04:30")
    code, out, err = volcal("realism-check", "--data-dir", harvest, "--model", model, *window, "--report-dir", tmp_path)
    assert code == 1 and "FAILED" in out and "needed" in err and "Traceback" not in err
    assert [p.suffix for p in (tmp_path / "BTC" / "realism").iterdir()] == [".failed"]


@pytest.mark.parametrize("words, told", [
    (("--model", "a.json", "--config", "b.yaml"), "give one of them"), (("--start", "2026-02-01", "--end", "2026-01-01"), "swap them"),
    (("--start", "2026-01-01", "--days", "3"), "give one of them"), (("--days", "0"), "days"), (("--start", "soon"), "ISO"), (("--seed", "-1"), "seed"),
    (("--underlying", "no such"), "underlying"), (("--models", "a.json"), "--models"),
])
def test_command_line_mistakes_are_usage(words, told):
    code, out, err = volcal("realism-check", *words)
    assert (code, out) == (2, "") and told in err and "Traceback" not in err


@pytest.mark.parametrize("text", ["[]", "{}", "not json", '{"regimes": "none"}', '{"regimes": [{"name": "a"}]}', '{"spot_path": {}}', "42", ""])
@pytest.mark.parametrize("option", ["--model", "--config"])
def test_command_line_refuses_foreign_files_before_anything_runs(option, text, tmp_path):
    file = tmp_path / "given.json"
    file.write_text(text)
    code, out, err = volcal("realism-check", "--data-dir", tmp_path, option, file, "--report-dir", tmp_path / "reports")
    assert (code, out) == (1, "") and err.startswith("volcal: ") and "Traceback" not in err
    assert not (tmp_path / "reports").exists()


def test_parameters_that_contradict_are_refused():
    with pytest.raises(ConfigError, match="give one of them"):
        RealismParameters(model="a.json", config="b.yaml")
    with pytest.raises(ConfigError, match="give one of them"):
        RealismParameters(start="2026-01-01T00:00Z", days=3)


def test_a_refusal_leaves_a_failed_result():
    told = json.loads(refused(RealismParameters(), NoUsableDataError("nothing")).to_json())
    assert told["status"] == "failed" and told["reason"] == "nothing" and told["realism_score"] is None


def test_deals_never_give_a_block_to_both_hands():
    ns = pd.date_range("2026-01-01", periods=500, freq="6h", tz="UTC").as_unit("ns").asi8
    deals = deal_blocks(ns, 50, seed=1)
    assert not ((deals.a > 0) & (deals.b > 0)).any()
    for row in np.vstack([deals.a, deals.b]):
        change = np.flatnonzero(np.diff(row)) + 1
        assert np.diff(change).min(initial=28) >= 28  # a week of six-hourly rows at least


def test_another_run_of_the_model_is_seldom_rejected(truth):
    config, clock = truth
    rejected = 0
    for i in range(6):
        market, other = (quick_twin(config, clock, 700 + 2 * i + j) for j in (0, 1))
        judge = Judge(market, comparable_sensors(market, other)[0], samples=30)
        null = model_null(judge, lambda s: quick_twin(config, clock, s), pairs=40, seed=5)
        rows = judge.rows(other)
        auc = judge.auc(rows)
        rejected += null.p_value(pair_score(judge, rows, auc), auc) <= 0.05
    assert rejected <= 2


def test_runs_of_one_model_share_its_pilot(truth):
    spec = truth[0].spot_path
    assert spec.iv_target is not None and path_model(spec) is path_model(spec)


def test_null_p_value_is_two_sided_over_score_and_auc():
    null = Null(np.linspace(0.5, 0.9, 99), np.linspace(0.4, 0.6, 99))
    assert null.p_value(0.1) == pytest.approx(0.01) and null.p_value(0.1, 0.5) == pytest.approx(0.02)
    assert null.p_value(0.95, 0.99) == pytest.approx(0.02) and null.p_value(0.7, 0.5) == 1.0
    assert null.p_value(0.7, math.nan) == pytest.approx(0.51, abs=0.02)


@pytest.mark.parametrize("asset", ["BTC", "ETH"])
def test_order_of_markets_fitted_on_the_first_part_and_judged_on_the_rest(asset):
    root = real_data_root()
    if root is None or not (Path(root) / "deribit_6h").is_dir():
        pytest.skip("the real six-hourly data is absent; set VOLCAL_REAL_DATA")
    sensors = harvest_sensor_table(str(Path(root) / "deribit_6h"), asset).frame
    split = int(0.7 * len(sensors))
    before, market = sensors[:split].reset_index(drop=True), sensors[split:].reset_index(drop=True)
    clock = Clock(asset, pd.DatetimeIndex(sensors["time"]), split)
    configs = baseline_configs(before, asset)
    runs = {n: [quick_twin(configs[n], clock, 900 + s) for s in range(3)] for n in ("fitted here", "mis-scaled")}
    runs["white noise"] = [white_noise(before, market, s) for s in range(3)]
    judge = Judge(market, comparable_sensors(market, runs["fitted here"][0])[0], samples=60)
    scores = {n: standing(judge, [judge.rows(f) for f in frames]).score for n, frames in runs.items()}
    itself = market_standing(judge).score
    assert itself > 0.85
    assert itself > scores["fitted here"] > scores["mis-scaled"] > scores["white noise"], scores


def test_few_rows_make_one_regime_and_unknown_features_are_not_used():
    sensors, _ = sample_sensors(100)
    assert len(fit_twin_model(sensors, "BTC").regimes) == 1
