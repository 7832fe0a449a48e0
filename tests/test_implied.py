"""Implied vol and pricing: properties over the whole domain, and the compiled code reloaded from its cache."""
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from volcal.market.implied import ImpliedReason, implied_vol, implied_vol_scalar, information_bound
from volcal.market.pricing import black76_greeks, black76_price
from volcal.units import PricingError

ANY = st.one_of(st.floats(), st.sampled_from([0.0, -0.0, 1.0, 100.0, float("inf"), float("-inf"), float("nan"), 5e-324]))
SIGN = st.sampled_from([1.0, -1.0])
LOG_MONEYNESS = st.floats(-6.0, 6.0)
STDEV = st.floats(np.log(1e-4), np.log(8.0)).map(np.exp)
YEARS = st.floats(1e-5, 5.0)
quick = settings(max_examples=400, deadline=None)


def expected_reason(price, f, k, t, sign):
    """The reason by definition, in the order of the documentation; None where the solver must decide."""
    known = all(np.isfinite(x) for x in (price, f, k, t)) and price >= 0 and f > 0 and k > 0 and sign in (1.0, -1.0)
    if not known:
        return ImpliedReason.invalid_input
    if t <= 0:
        return ImpliedReason.expired
    if price <= max(sign * (f - k), 0.0):
        return ImpliedReason.below_intrinsic
    if price >= (f if sign > 0 else k):
        return ImpliedReason.above_maximum
    return None


@quick
@example(1e14, 1e14, 1.0, 1.0, 1.0)  # at the maximum and within rounding of the intrinsic value
@given(ANY, ANY, ANY, ANY, st.one_of(SIGN, ANY))
def test_every_input_has_a_reason_and_nan_unless_ok(price, f, k, t, sign):
    iv, reason = implied_vol(price, f, k, t, np.array(sign))
    expected = expected_reason(price, f, k, t, sign)
    assert (reason == ImpliedReason.ok) == bool(np.isfinite(iv) and iv > 0)
    if expected is not None:
        assert reason == expected
    assert (float(iv), int(reason)) == pytest.approx(implied_vol_scalar(price, f, k, t, sign), rel=0, abs=0, nan_ok=True)


@quick
@given(LOG_MONEYNESS, STDEV, YEARS, SIGN, st.floats(1e-3, 1e6))
def test_round_trip_to_what_the_price_knows(x, s, t, sign, f):
    k, iv = f * np.exp(x), s / np.sqrt(t)
    greeks = black76_greeks(f, k, t, iv, sign)
    solved, reason = implied_vol(greeks.price, f, k, t, sign)
    bound = information_bound(greeks.price, greeks.vega)
    time_value = black76_price(f, k, t, iv, 1.0 if k >= f else -1.0)
    if time_value > 1e-14 * f and bound < 1e-10 and t > 1e-3:
        assert reason == ImpliedReason.ok and abs(solved - iv) <= 1e-10
    if reason == ImpliedReason.ok and greeks.price > 1e-300:
        assert abs(solved - iv) <= 1e-12 / np.sqrt(t) + bound
    assert reason in (ImpliedReason.ok, ImpliedReason.below_intrinsic, ImpliedReason.above_maximum)


@quick
@given(LOG_MONEYNESS, STDEV, SIGN, st.floats(1e-6, 0.5))
def test_a_dearer_option_has_a_higher_vol(x, s, sign, more):
    k = 100 * np.exp(x)
    price = float(black76_price(100.0, k, 1.0, s, sign))
    most = 100.0 if sign > 0 else k
    low, high = (implied_vol(p, 100.0, k, 1.0, sign) for p in (price, price + more * (most - price)))
    if low.reason == high.reason == ImpliedReason.ok:
        assert high.iv >= low.iv


@quick
@given(LOG_MONEYNESS, st.floats(0.0, 10.0), st.floats(0.0, 3.0), st.floats(-0.1, 0.2))
def test_parity_and_bounds_of_price(x, iv, t, r):
    k, discount = 100 * np.exp(x), np.exp(-r * t)
    call, put = (float(black76_price(100.0, k, t, iv, kind, r)) for kind in "CP")
    assert call - put == pytest.approx(discount * (100.0 - k), rel=1e-12, abs=1e-12 * max(100.0, k))
    for price, intrinsic, most in [(call, max(100 - k, 0), 100.0), (put, max(k - 100, 0), k)]:
        assert discount * intrinsic * (1 - 1e-15) <= price <= discount * most * (1 + 1e-15)


@quick
@given(LOG_MONEYNESS, STDEV, st.floats(1e-6, 1.0), SIGN)
def test_price_rises_with_volatility(x, s, more, sign):
    k = 100 * np.exp(x)
    low, high = (float(black76_price(100.0, k, 1.0, v, sign)) for v in (s, s * (1 + more)))
    assert high >= low * (1 - 1e-15) - 1e-13


def test_the_same_numbers_whatever_the_split_and_the_type():
    rng = np.random.default_rng(42)
    k, s = 100 * np.exp(rng.uniform(-3, 3, 20_011)), np.exp(rng.uniform(-6, 1.5, 20_011))
    sign = rng.choice([1.0, -1.0], k.size)
    price = black76_price(100.0, k, 1.0, s, sign)
    whole = implied_vol(price, 100.0, k, 1.0, sign)
    slices = [slice(i, i + 777) for i in range(0, k.size, 777)]
    parts = [implied_vol(price[i], 100.0, k[i], 1.0, np.where(sign[i] > 0, "C", "P")) for i in slices]
    np.testing.assert_array_equal(whole.iv, np.concatenate([part.iv for part in parts]))
    np.testing.assert_array_equal(whole.reason, np.concatenate([part.reason for part in parts]))
    one_by_one = [implied_vol_scalar(*row) for row in zip(price[:500], np.full(500, 100.0), k[:500], np.ones(500), sign[:500], strict=True)]
    np.testing.assert_array_equal(whole.iv[:500], [iv for iv, _ in one_by_one])


def test_shapes_that_clash_are_named():
    with pytest.raises(PricingError, match=r"price \(2,\).*strike \(3,\)"):
        implied_vol([1.0, 2.0], 100.0, [1.0, 2.0, 3.0], 1.0, "C")
    assert implied_vol(np.ones((2, 1)), 100.0, np.full((1, 3), 120.0), 1.0, "C").iv.shape == (2, 3)
    assert implied_vol([], [], [], [], []).iv.shape == (0,)


CACHED = """
import numpy as np
from volcal.market.implied import implied_vol, implied_vol_loop
from volcal.market.pricing import black76_price
rng = np.random.default_rng(7)
k, s = 100 * np.exp(rng.uniform(-3, 3, 5000)), np.exp(rng.uniform(-6, 2, 5000))
answer = implied_vol(black76_price(100.0, k, 1.0, s, "C"), 100.0, k, 1.0, "C")
print(sum(implied_vol_loop.stats.cache_hits.values()), answer.iv.tobytes().hex()[:80000], answer.reason.tobytes().hex())
"""


def test_compiled_once_and_the_same_from_the_cache(tmp_path):
    cached = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    runs = [subprocess.run([sys.executable, "-c", CACHED], capture_output=True, text=True, check=True, env=cached) for _ in range(2)]
    (first, *fresh), (second, *reloaded) = (run.stdout.split() for run in runs)
    assert (first, second) == ("0", "1")
    assert fresh == reloaded
