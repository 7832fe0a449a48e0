"""What may be applied, by whom, and the way back: the same tests on SQLite and PostgreSQL."""
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta

import numpy as np
import pandas as pd
import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st
from test_history import SEVEN, old_table, url  # noqa: F401

from volcal.market.pricing import black76_price
from volcal.ops.history import get_calibration, insert_calibration_history
from volcal.ops.policy import (
    NothingToApplyError,
    applied_connection,
    apply_run,
    current_applied,
    decide,
    decision_on,
    ewma,
    list_applied,
    load_applied,
    multipliers_in_force,
    revert_applied,
    runs_to_smooth,
    use_latest,
)
from volcal.settings import Settings
from volcal.units import GuardrailError, HistoryError
from volcal.vol.overrides import clear_iv_multiplier_overrides, get_iv_multiplier_override, set_iv_multiplier_override
from volcal.vol.surface import VolSurface, applied_surface, compute_synthetic_iv_with_skew, get_synthetic_iv, set_applied_surface

NOON = datetime(2025, 12, 1, 12, tzinfo=UTC)
GOOD = {**SEVEN, "vega_weighted_mae_pct": 5.0, "source": "harvested", "status": "ok", "reason": "every check passed", "config_hash": "a1"}


@pytest.fixture(autouse=True)
def nothing_applied():
    """Each test begins and ends with nothing applied in this process."""
    def clear():
        clear_iv_multiplier_overrides()
        for asset in ("BTC", "ETH"):
            set_applied_surface(asset, None)
    clear()
    yield
    clear()


def put(url, day, multiplier, vega_sum=3.0, bands=(), **change):  # noqa: F811
    """Record a run of a night and read it back."""
    found = [{"name": name, "min_dte": 3, "max_dte": 10, "recommended_iv_multiplier": value} for name, value in bands]
    row = {**GOOD, "multiplier": multiplier, "created_at": NOON + timedelta(days=day),
           "details": {"recommended_metrics": {"vega_sum": vega_sum}, "bands": found}, **change}
    return get_calibration(insert_calibration_history(row, url), url)


def smoothed(url, entry):  # noqa: F811
    return ewma([one.multiplier for one in runs_to_smooth(entry, url)], 0.3)[-1]


@given(st.lists(st.floats(0.7, 1.6), min_size=1, max_size=40), st.floats(0.01, 1.0))
def test_smoothing_is_pandas_ewm(values, alpha):
    assert np.allclose(ewma(values, alpha), pd.Series(values).ewm(alpha=alpha, adjust=False).mean(), rtol=1e-12)


def test_a_jump_shows_thirty_percent_the_same_day_however_often_that_day_is_run(url):  # noqa: F811
    for day in range(5):
        put(url, day, 1.0)
    for hour in range(4):
        entry = put(url, 5, 1.2, created_at=NOON + timedelta(days=5, hours=hour))
        assert smoothed(url, entry) == pytest.approx(1.06)
    assert smoothed(url, put(url, 6, 1.2)) == pytest.approx(0.3 * 1.2 + 0.7 * 1.06)


def test_the_last_ok_run_of_a_day_counts(url):  # noqa: F811
    put(url, 0, 1.0)
    put(url, 1, 1.5)
    put(url, 1, 1.1, created_at=NOON + timedelta(days=1, hours=1))
    put(url, 1, 0.5, created_at=NOON + timedelta(days=1, hours=2), status="failed")
    assert smoothed(url, put(url, 2, 1.0)) == pytest.approx(0.3 * 1.0 + 0.7 * (0.3 * 1.1 + 0.7 * 1.0))


def test_only_runs_of_the_same_kind_enter(url):  # noqa: F811
    put(url, 0, 1.0)
    others = {"underlying": "ETH"}, {"source": "live"}, {"dte_max": 30}, {"config_hash": "b2"}, {"config_hash": None}, {"status": None}, {"status": "degraded"}
    for change in others:
        put(url, 1, 1.5, **change)
    put(url, 1, None, status="failed", num_samples=0)
    put(url, -14, 1.5)
    entry = put(url, 2, 1.2)
    assert [one.multiplier for one in runs_to_smooth(entry, url)] == [1.0, 1.2]


def test_a_replayed_night_belongs_to_its_market(url):  # noqa: F811
    for day, level in ((0, 1.0), (1, 1.2)):
        end = (NOON + timedelta(days=day)).isoformat()
        entry = put(url, 9, level, details={"time_range": {"end": end}, "recommended_metrics": {"vega_sum": 1}})
    assert smoothed(url, entry) == pytest.approx(1.06)


@pytest.mark.parametrize("change,action,told", [
    ({"multiplier": 1.03}, "apply", "1.000 to 1.030"),
    ({"multiplier": 1.029}, "hold", "below 0.03"),
    ({"multiplier": 0.97}, "apply", "0.970"),
    ({"multiplier": 1.2, "num_samples": 50}, "apply", "1.200"),
    ({"multiplier": 1.2, "num_samples": 49}, "hold", "49 options are fewer than 50"),
    ({"multiplier": 1.2, "vega_sum": 0.01}, "apply", "1.200"),
    ({"multiplier": 1.2, "vega_sum": 0.009}, "hold", "0.009 is below 0.01"),
    ({"multiplier": 1.2, "vega_sum": None}, "hold", "vega is not known"),
    ({"multiplier": 1.0, "bands": [("weekly", 1.05)]}, "apply", "weekly 1.000 to 1.050"),
    ({"multiplier": 1.2, "status": "degraded", "reason": "thin data"}, "reject", "thin data"),
    ({"multiplier": 1.2, "status": "failed"}, "reject", "failed the guardrails"),
    ({"multiplier": 1.2, "status": None}, "reject", "no status"),
    ({"multiplier": 0.5}, "reject", "at or below 0.7"),
    ({"multiplier": 1.6}, "reject", "at or above 1.6"),
    ({"multiplier": None}, "reject", "missing"),
    ({"multiplier": 1.2, "vega_weighted_mae_pct": 250.0}, "reject", "exceeds 200"),
    ({"multiplier": 1.2, "mae_pct": None, "vega_weighted_mae_pct": None}, "reject", "neither MAE"),
])
def test_decisions(url, change, action, told):  # noqa: F811
    entry = put(url, 0, **change)
    decision, state = apply_run(entry, "nightly", url=url)
    assert decision.action == action and told in decision.reason
    assert (state is not None) == (action == "apply") == (current_applied("BTC", url) is not None) == get_calibration(entry.id, url).applied


def test_force_skips_thresholds_not_guardrails(url):  # noqa: F811
    decision, state = apply_run(put(url, 0, 1.01, num_samples=1, vega_sum=None), "desk", by_hand=True, force=True, url=url)
    assert decision.action == "apply" and decision.forced and state.multiplier == pytest.approx(1.01)
    for change in ({"status": "failed"}, {"status": None}, {"multiplier": 0.4}):
        with pytest.raises(GuardrailError):
            apply_run(put(url, 1, **{"multiplier": 1.3, **change}), "desk", by_hand=True, force=True, url=url)
    assert current_applied("BTC", url).multiplier == pytest.approx(1.01)


def test_degraded_is_applied_by_hand_only_with_a_warning(url):  # noqa: F811
    entry = put(url, 0, 1.2, status="degraded", reason="a gap of 9 h")
    assert apply_run(entry, "nightly", force=True, url=url)[1] is None
    decision, state = apply_run(entry, "desk", by_hand=True, url=url)
    assert state.by == "desk" and "a gap of 9 h" in decision.warning


def test_a_surface_that_cannot_be_used_is_not_applied(url):  # noqa: F811
    entry = put(url, 0, 1.2, details={"recommended_metrics": {"vega_sum": 3.0}, "recommended_vol_surface": {"skew": 5}})
    for by_hand in (False, True):
        with pytest.raises(GuardrailError, match="cannot be used .* run the calibration again"):
            apply_run(entry, "desk", by_hand=by_hand, url=url)
    assert current_applied("BTC", url) is None and not get_calibration(entry.id, url).applied


def test_a_wild_band_is_not_applied_automatically(url):  # noqa: F811
    decision, state = apply_run(put(url, 0, 1.2, bands=[("weekly", 5.0)]), "nightly", url=url)
    assert (decision.action, state) == ("reject", None) and "multiplier of band weekly 5 is at or above 1.6" in decision.reason


def test_looking_writes_nothing(url):  # noqa: F811
    entry = put(url, 0, 1.2)
    assert decision_on(entry, url=url).action == "apply" and current_applied("BTC", url) is None and load_applied(url) == {}
    with applied_connection(url) as connection:
        assert connection.scalars(sa.text("SELECT component FROM volcal_schema")).all() == ["calibration_history"]


def test_thresholds_are_settings(url):  # noqa: F811
    decision = decide([put(url, 0, 1.04)], settings=Settings(policy_min_delta=0.05))
    assert decision.action == "hold" and decision.thresholds["min_delta"] == 0.05


def test_an_older_market_does_not_replace_a_newer_one(url):  # noqa: F811
    apply_run(put(url, 5, 1.2), url=url)
    decision, state = apply_run(put(url, 3, 0.9), url=url)
    assert (decision.action, state) == ("hold", None) and "which is newer" in decision.reason
    assert apply_run(put(url, 3, 0.9), by_hand=True, force=True, url=url)[1].multiplier == pytest.approx(0.9)


def test_one_underlying_does_not_touch_another(url):  # noqa: F811
    apply_run(put(url, 0, 1.2), url=url)
    apply_run(put(url, 0, 0.8, underlying="ETH"), url=url)
    assert (current_applied("BTC", url).multiplier, current_applied("ETH", url).multiplier) == pytest.approx((1.2, 0.8))
    revert_applied("ETH", "desk", url)
    assert current_applied("BTC", url).multiplier == pytest.approx(1.2) and current_applied("ETH", url).surface is None


def test_revert_walks_back_one_change_at_a_time(url):  # noqa: F811
    for day, level in enumerate((1.2, 0.9, 1.3)):
        apply_run(put(url, day, level), smooth=False, url=url)
    back = [revert_applied("BTC", "desk", url).multiplier for _ in range(2)]
    apply_run(put(url, 4, 1.1), smooth=False, url=url)
    back += [revert_applied("BTC", "desk", url).multiplier for _ in range(2)]
    assert back == [0.9, 1.2, 1.2, None]
    with pytest.raises(NothingToApplyError, match="nothing to take back"):
        revert_applied("BTC", "desk", url)
    assert len(list_applied("BTC", None, url)) == 8 and {one.by for one in list_applied("BTC", None, url)} == {"volcal", "desk"}


def test_a_history_without_the_table_gains_it_in_place(url):  # noqa: F811
    old_table(url)
    assert current_applied("BTC", url) is None
    with pytest.raises(GuardrailError, match="no status"):
        apply_run(1, "desk", by_hand=True, force=True, url=url)
    apply_run(put(url, 0, 1.2), url=url)
    assert current_applied("BTC", url).multiplier == pytest.approx(1.2)


def test_a_table_of_the_future_is_left_alone(url):  # noqa: F811
    apply_run(put(url, 0, 1.2), url=url)
    with applied_connection(url, write=True) as connection:
        connection.exec_driver_sql("UPDATE volcal_schema SET version = 99 WHERE component = 'applied_surface'")
    with pytest.raises(HistoryError, match="update volcal"):
        load_applied(url)


@pytest.mark.parametrize("damage", ['{"iv_multiplier": "torn"}', '{"iv_multiplier": 1.1, "of_the_future": 1}', "[1, 2]", '"text"', "null",
                                    '{"iv_multiplier": 0.4}', '{"iv_multiplier": 1e999}', '{"iv_mult'])
def test_the_last_good_state_loads_past_a_damaged_one(url, damage, caplog):  # noqa: F811
    if damage == '{"iv_mult' and url.startswith("postgresql"):
        pytest.skip("PostgreSQL takes no torn JSON")
    apply_run(put(url, 0, 1.2), url=url)
    with applied_connection(url, write=True) as connection:
        connection.execute(sa.text("INSERT INTO applied_surface (at, underlying, action, by, multiplier, surface) "
                                   "VALUES (:at, 'BTC', 'apply', 'x', 1.1, :surface)"), {"at": "2025-12-09T00:00:00.000000+00:00", "surface": damage})
    set_applied_surface("BTC", None)
    assert load_applied(url)["BTC"].id == 1 and "applied surface 2 of BTC cannot be used, an earlier one serves" in caplog.text
    assert load_applied(url)["BTC"].multiplier == pytest.approx(1.2) == applied_surface("BTC").iv_multiplier
    assert apply_run(put(url, 1, 0.8), smooth=False, url=url)[1].multiplier == 0.8


def chain_of(asset):
    """Prices of a small synthetic chain under whatever is in force."""
    strike, dte = np.array([80e3, 90e3, 100e3, 80e3, 90e3, 100e3]), np.repeat([7.0, 30.0], 3)
    iv = compute_synthetic_iv_with_skew(VolSurface(), 0.45, 90e3, strike, dte, asset)
    return black76_price(90e3, strike, dte / 365, iv, "C")


def test_applied_means_used(url):  # noqa: F811
    def iv(asset="BTC"):
        return float(get_synthetic_iv(VolSurface(), 0.45, 7, asset)[()])

    configured, prices = iv(), chain_of("BTC")
    apply_run(put(url, 0, 1.2), url=url)
    assert iv() == pytest.approx(0.45 * 1.2) and (chain_of("BTC") > prices).all()
    assert iv("ETH") == configured and np.array_equal(chain_of("ETH"), prices)
    set_iv_multiplier_override("BTC", 3, 10, 0.8)
    changed = chain_of("BTC")
    assert iv() == pytest.approx(0.45 * 0.8) and (changed[:3] < prices[:3]).all() and (changed[3:] > prices[3:]).all()
    assert [one.source for one in multipliers_in_force("BTC", url=url)] == ["override"]
    clear_iv_multiplier_overrides()
    assert iv() == pytest.approx(0.45 * 1.2)
    revert_applied("BTC", "desk", url)
    assert iv() == configured and np.array_equal(chain_of("BTC"), prices)


def test_use_latest_is_an_override_unless_kept(url):  # noqa: F811
    put(url, 0, 1.2)
    put(url, 1, 0.5, status="failed")
    used = use_latest("btc", 3, 10, url=url)
    assert (used.underlying, used.multiplier, used.status, used.num_samples) == ("BTC", 1.2, "ok", 412) and "passed over" in used.warning
    assert get_iv_multiplier_override("BTC", 3, 10) == 1.2 and current_applied("BTC", url) is None
    assert use_latest("BTC", 3, 10, "desk", keep=True, url=url).kept and current_applied("BTC", url).by == "desk"


def test_use_latest_has_nothing_to_apply(url):  # noqa: F811
    with pytest.raises(NothingToApplyError, match="it has no run"):
        use_latest("BTC", 3, 10, url=url)
    put(url, 0, 0.5, status="failed", reason="data quality is failed")
    with pytest.raises(NothingToApplyError, match=r"failed \(data quality is failed\)"):
        use_latest("BTC", 3, 10, url=url)
    assert get_iv_multiplier_override("BTC", 3, 10) is None


RESTART = """import sys
from volcal.ops.policy import load_applied
from volcal.vol.overrides import active_iv_multiplier_overrides
from volcal.vol.surface import VolSurface, get_synthetic_iv
load_applied(sys.argv[1])
print(float(get_synthetic_iv(VolSurface(), 1.0, 7, "BTC")[()]), len(active_iv_multiplier_overrides()))"""


def test_after_a_restart_the_applied_is_back_and_the_override_gone(url):  # noqa: F811
    apply_run(put(url, 0, 1.2), url=url)
    set_iv_multiplier_override("BTC", None, None, 1.5)
    done = subprocess.run([sys.executable, "-c", RESTART, url], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["1.2", "0"], done.stderr


def apply_often(url, number, runs, start):  # noqa: F811
    start.wait()
    for entry in runs:
        apply_run(entry, f"writer {number}", force=True, url=url)


def test_two_that_apply_at_once_make_one_chain(url):  # noqa: F811
    runs = [put(url, day, 1.0 + day / 100) for day in range(6)]
    context = multiprocessing.get_context("fork")
    start = context.Event()
    workers = [context.Process(target=apply_often, args=(url, number, runs, start)) for number in range(3)]
    for worker in workers:
        worker.start()
    start.set()
    for worker in workers:
        worker.join(120)
    states = list_applied("BTC", None, url)
    assert [worker.exitcode for worker in workers] == [0] * 3 and len(states) == 18
    assert [one.before for one in states] == [one.id for one in states[1:]] + [None]


def revert_often(url, times, start):  # noqa: F811
    start.wait()
    for _ in range(times):
        try:
            revert_applied("BTC", "reverter", url)
        except NothingToApplyError:
            pass


def test_applying_and_reverting_at_once_keep_one_way_back(url):  # noqa: F811
    runs = [put(url, day, 1.0 + day / 100) for day in range(6)]
    context = multiprocessing.get_context("fork")
    start = context.Event()
    workers = [context.Process(target=apply_often, args=(url, number, runs, start)) for number in range(2)]
    workers += [context.Process(target=revert_often, args=(url, 8, start)) for _ in range(2)]
    for worker in workers:
        worker.start()
    start.set()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0] * 4
    known, previous = {}, None
    for state in reversed(list_applied("BTC", None, url)):
        if state.action == "apply":
            assert state.before == (previous.id if previous else None)
        else:
            target = known.get(previous.before)
            assert (state.surface, state.before) == ((target.surface, target.before) if target else (None, None))
        known[state.id] = previous = state
    assert len([one for one in known.values() if one.action == "apply"]) == 12


def test_a_kill_in_the_middle_leaves_the_last_state_whole(url):  # noqa: F811
    runs = [put(url, 0, 1.2).id, put(url, 0, 0.8).id]
    code = ("import sys\nfrom volcal.ops.policy import apply_run\nwhile True:\n    for run in map(int, sys.argv[2:]):\n"
            "        print(apply_run(run, 'nightly', by_hand=True, force=True, smooth=False, url=sys.argv[1])[1].id, flush=True)")
    victim = subprocess.Popen([sys.executable, "-c", code, url, *map(str, runs)], stdout=subprocess.PIPE, text=True, env=dict(os.environ))
    told = [int(victim.stdout.readline()) for _ in range(4)]
    time.sleep(0.03)
    victim.send_signal(signal.SIGKILL)
    told += [int(line) for line in victim.stdout.read().splitlines()]
    victim.wait()
    states = list_applied("BTC", None, url)
    assert set(told) <= {one.id for one in states} and states[0].multiplier in (1.2, 0.8)
    assert load_applied(url)["BTC"].id == states[0].id and get_calibration(states[0].run_id, url).applied
