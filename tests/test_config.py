"""The calibration config: old files load, every field has its default, every mistake is named."""
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from volcal.calibration.config import CalibrationConfig, HarvestConfig, config_hash, describe_config, load_config, nearest_key, recipe_hash
from volcal.units import ConfigError

NINE = {"underlying": "BTC", "min_dte": 3, "max_dte": 30, "iv_multiplier": 1.0, "default_iv": 0.6, "rv_window_days": 7,
        "risk_free_rate": 0.0, "max_samples": 80, "skew": {"enabled": True, "min_dte": 3, "max_dte": 14}}
DEFAULTS = {**NINE, "source": "live", "harvest": None, "vol_surface": None, "option_types": ["C"], "bands": None, "bucket_by_dte": None,
            "bucket_by_abs_delta": None, "fit_skew": False, "return_rows": True, "emit_recommended_vol_surface": True, "regimes": None,
            "multiplier_method": "vega_weighted", "validation_fraction": 0.0, "min_rv_coverage": 0.5, "min_rv_n_eff": 20,
            "exact_metrics": False, "error_ladder": False, "seed": 42,
            "filters": {"min_mark_price": None, "min_open_interest": None, "min_vega": None, "max_abs_moneyness": None,
                        "require_two_sided": False}}
CONFIGS = Path(__file__).parents[1] / "data" / "configs"


def test_old_config_loads_unchanged_from_every_form(tmp_path):
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(NINE))
    (tmp_path / "old.json").write_text(json.dumps(NINE))
    forms = [NINE, str(tmp_path / "old.yaml"), tmp_path / "old.json", CalibrationConfig(**NINE), {"underlying": "btc"}]
    assert len({config_hash(load_config(form)) for form in forms}) == 1


def test_defaults_are_the_documented_ones():
    assert CalibrationConfig(underlying="BTC").model_dump() == DEFAULTS


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.[yj]*")), ids=lambda path: path.name)
def test_example_configs_load(path):
    data = yaml.safe_load(path.read_text())
    if "underlying" not in data:
        pytest.skip("not a calibration config")
    assert load_config(path).underlying == data["underlying"]


def test_every_field_has_a_description():
    assert all(len(entry["description"]) > 5 for entry in describe_config())


@pytest.mark.parametrize(("change", "words"), [
    ({"undrlying": "BTC"}, "did you mean underlying?"),
    ({"harvest": {"snapshot_stp": 2}}, "harvest.snapshot_stp is not a key of HarvestConfig, so it would change nothing; did you"),
    ({"skew": {"mindte": 2}}, "skew.mindte is not a key of SkewConfig, so it would change nothing; did you mean min_dte?"),
    ({"bands": [{"name": "a", "min_dte": 1, "max_dte": 2, "max_sample": 3}]}, "bands.0.max_sample"),
    ({"filters": {"min_vegas": 1}}, "did you mean min_vega?"),
    ({"min_dte": 31}, "31 and 30"),
    ({"min_dte": -1}, "min_dte = -1"),
    ({"validation_fraction": 0.91}, "validation_fraction = 0.91"),
    ({"multiplier_method": "median"}, "'min_mae'"),
    ({"option_types": ["C", "X"]}, "option_types.1 = 'X'"),
    ({"option_types": []}, "option_types"),
    ({"bucket_by_abs_delta": [0, 1.2]}, "[0, 1]"),
    ({"bucket_by_dte": [7]}, "at least two ascending"),
    ({"source": "harvested"}, "add harvest"),
    ({"underlying": "BTC-USD"}, "underlying = 'BTC-USD'"),
    ({"default_iv": float("nan")}, "default_iv = nan"),
    ({"seed": True}, "True is no number"),
    ({"bands": [{"name": "a", "min_dte": 1, "max_dte": 2}] * 2}, "give each its own name"),
    ({"harvest": {"start_time": "2025-12-12", "end_time": "2025-12-10"}}, "the window is empty"),
    ({"harvest": {"end_time": 1765000000}}, "write ISO"),
])
def test_a_mistake_is_named(change, words):
    with pytest.raises(ConfigError) as caught:
        load_config({**NINE, **change})
    assert words in str(caught.value)


def test_all_mistakes_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        CalibrationConfig(underlying="BTC", min_dte=-1, seed="x", harvest={"forward": "spot", "data_rot": "."})
    assert len(caught.value.failures) == 4


def test_times_are_utc_and_the_harvest_inherits_the_underlying():
    config = CalibrationConfig(underlying="eth", harvest={"start_time": "2025-12-10T01:00+01:00", "end_time": "2025-12-10"})
    assert config.harvest.start_time == config.harvest.end_time
    assert config.harvest.start_time.utcoffset().total_seconds() == 0
    assert config.harvest.underlying == "ETH"
    assert CalibrationConfig(underlying="BTC", harvest={"underlying": "BTC_USDC"}).harvest.underlying == "BTC_USDC"


def test_data_root_default_is_the_settings(monkeypatch):
    from volcal.settings import get_settings
    monkeypatch.setenv("VOLCAL_DATA_ROOT", "s3://desk/harvest")
    get_settings(reload=True)
    try:
        assert HarvestConfig().data_root == "s3://desk/harvest"
    finally:
        monkeypatch.undo()
        get_settings(reload=True)


def test_yaml_anchors_work_and_repeated_keys_do_not(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("underlying: BTC\nbands:\n- &a {name: a, min_dte: 3, max_dte: 10}\n- {<<: *a, name: b}\n")
    assert [band.name for band in load_config(path).bands] == ["a", "b"]
    path.write_text("underlying: BTC\nskew:\n  min_dte: 3\n  min_dte: 4\n")
    with pytest.raises(ConfigError, match="min_dte stands twice"):
        load_config(path)
    (tmp_path / "c.json").write_text('{"underlying": "BTC", "underlying": "ETH"}')
    with pytest.raises(ConfigError, match="underlying stands twice"):
        load_config(tmp_path / "c.json")


def test_hash_is_the_same_in_another_process_and_pickles():
    config = load_config({**NINE, "bands": True, "harvest": {"data_root": "x", "start_time": "2025-12-10"}})
    assert pickle.loads(pickle.dumps(config)) == config
    code = ("import sys, json; from volcal.calibration.config import *; print(config_hash(load_config(json.loads(sys.argv[1]))))")
    told = subprocess.run([sys.executable, "-c", code, config.model_dump_json()], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == config_hash(config)


def test_recipe_hash_ignores_window_and_place_only():
    harvest = {"data_root": "a", "start_time": "2025-12-10", "snapshot_step": 2}
    one = load_config({**NINE, "harvest": harvest})
    assert recipe_hash(one) == recipe_hash(load_config({**NINE, "harvest": {**harvest, "data_root": "b", "start_time": "2025-12-11"}}))
    assert recipe_hash(one) != recipe_hash(load_config({**NINE, "harvest": {**harvest, "snapshot_step": 3}}))


ANYTHING = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.lists(st.floats(), max_size=3),
                     st.dictionaries(st.text(max_size=3), st.integers(), max_size=2))


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from([*DEFAULTS, "nonsense"]), ANYTHING, max_size=5))
def test_any_dict_gives_a_config_or_a_config_error(data):
    try:
        config = load_config(data)
    except ConfigError:
        return
    assert load_config(json.loads(config.model_dump_json())) == config


def test_nearest_key():
    assert nearest_key("Harvst", ["harvest", "seed"]) == "did you mean harvest?"
    assert nearest_key("zzz", ["harvest", "seed"]) == "known keys: harvest, seed"
