"""What must hold for every price series and every smile, not only for the examples of the notebooks."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from volcal.settings import real_data_root
from volcal.units import DAYS_PER_YEAR, NS_PER_DAY, to_utc
from volcal.vol.realized import PriceSeries, from_candles, from_forwards, from_index, realized_vol
from volcal.vol.smile import (
    AtmReason,
    SviStatus,
    atm_iv,
    constant_maturity,
    constant_maturity_groups,
    delta_iv,
    fit_svi,
    svi_fit_groups,
    svi_iv,
    svi_total_variance,
)

HOUR = NS_PER_DAY // 24
START = to_utc("2025-12-01").value
FIELDS = ("rv", "n_returns", "covered_days", "largest_gap_days", "n_eff", "stderr", "trusted")
seeds = st.integers(0, 2**32 - 1)
quick = settings(max_examples=60, deadline=None)


def random_series(rng, n=200, breaks=False):
    gaps = np.where(rng.random(n) < 0.1, rng.integers(1, 60, n), 1) * HOUR
    log_price = np.cumsum(0.01 * rng.standard_normal(n))
    return PriceSeries(START + np.cumsum(gaps), log_price, "random", {}, rng.random(n) < 0.05 if breaks else None)


def by_hand(s, as_of, window_days):
    """The definition, read word by word."""
    inside = np.flatnonzero((s.time_ns > as_of - window_days * NS_PER_DAY) & (s.time_ns <= as_of))
    linked = [i for i in inside[1:] if s.breaks is None or not s.breaks[i]]
    dt = np.array([s.time_ns[i] - s.time_ns[i - 1] for i in linked]) / NS_PER_DAY
    squares = np.array([(s.log_price[i] - s.log_price[i - 1]) ** 2 for i in linked])
    gaps = np.diff(s.time_ns[inside]) / NS_PER_DAY
    covered = gaps.sum()
    if not linked:
        return np.nan, 0, covered, 0.0
    return np.sqrt(squares.sum() / (dt.sum() / DAYS_PER_YEAR)), len(linked), covered, dt.sum() ** 2 / (dt**2).sum(), gaps.max()


@quick
@given(seeds, st.floats(0.1, 20.0), st.booleans())
def test_running_sums_give_what_the_definition_says(seed, window, breaks):
    rng = np.random.default_rng(seed)
    s = random_series(rng, breaks=breaks)
    as_of = rng.integers(START - NS_PER_DAY, s.time_ns[-1] + 3 * NS_PER_DAY, 20)
    found = realized_vol(s, as_of, window)
    for i, when in enumerate(as_of):
        rv, n, covered, n_eff, *gap = by_hand(s, when, window)
        np.testing.assert_allclose(found.rv[i], rv, rtol=1e-9, equal_nan=True)
        assert found.n_returns[i] == n
        np.testing.assert_allclose([found.covered_days[i], found.n_eff[i]], [covered, n_eff], rtol=1e-9, atol=1e-12)
        if gap:
            np.testing.assert_allclose(found.largest_gap_days[i], gap[0])


@quick
@given(seeds)
def test_appending_the_future_changes_nothing(seed):
    rng = np.random.default_rng(seed)
    n = 150
    times = START + np.cumsum(rng.integers(1, 30, n)) * HOUR // 6
    price = 100 * np.exp(np.cumsum(0.02 * rng.standard_normal(n)))
    cut = int(rng.integers(20, n))
    as_of = np.sort(rng.integers(times[0], times[cut], 15))
    expiry = np.repeat(times, 2) + np.tile([3, 40], n) * NS_PER_DAY // 2 // HOUR * HOUR
    for past, full in ((from_index(times[:cut], price[:cut]), from_index(times, price)),
                       (from_forwards(np.repeat(times, 2)[: 2 * cut], expiry[: 2 * cut], np.repeat(price, 2)[: 2 * cut]),
                        from_forwards(np.repeat(times, 2), expiry, np.repeat(price, 2)))):
        before = realized_vol(past, as_of[as_of < times[cut]])
        after = realized_vol(full, as_of[as_of < times[cut]])
        for name in FIELDS:
            np.testing.assert_array_equal(getattr(before, name), getattr(after, name))


@quick
@given(seeds, st.integers(30, 119), st.floats(0.01, 0.99))
def test_a_candle_that_has_not_closed_is_not_read(seed, opened, part):
    rng = np.random.default_rng(seed)
    hours = pd.date_range("2025-12-01", periods=120, freq="h", tz="UTC")
    frame = pd.DataFrame({"timestamp": hours, "close": np.exp(0.01 * rng.standard_normal(120))})
    as_of = START + opened * HOUR + int(part * HOUR)
    absurd = frame.assign(close=np.where(np.arange(120) >= opened, 1e9, frame["close"]))
    found = [realized_vol(from_candles(f), as_of) for f in (frame[:opened], frame, absurd, absurd.sample(frac=1, random_state=1))]
    for name in FIELDS:
        assert len({float(getattr(f, name)[0]) for f in found}) == 1


@quick
@given(seeds, st.floats(1e-6, 1e6), st.floats(0.1, 10.0))
def test_scale_of_price_does_not_matter_and_scale_of_returns_does(seed, price_scale, return_scale):
    s = random_series(np.random.default_rng(seed))
    base = realized_vol(s, s.time_ns[-1])
    shifted = realized_vol(PriceSeries(s.time_ns, s.log_price + np.log(price_scale), "x"), s.time_ns[-1])
    longer = realized_vol(PriceSeries(s.time_ns, s.log_price * return_scale, "x"), s.time_ns[-1])
    np.testing.assert_allclose(shifted.rv, base.rv, rtol=1e-9)
    np.testing.assert_allclose(longer.rv, base.rv * return_scale, rtol=1e-9)


@quick
@given(seeds)
def test_gaps_lower_trust_but_not_the_mean(seed):
    rng = np.random.default_rng(seed)
    n = 24 * 30
    times, path = START + np.arange(n) * HOUR, np.cumsum(rng.choice([-0.01, 0.01], n))
    keep = np.sort(rng.choice(n, n // 4, replace=False))
    whole, part = (realized_vol(PriceSeries(times[i], path[i], "x"), times[-1], 30) for i in (slice(None), keep))
    np.testing.assert_allclose(whole.rv, np.sqrt(1e-4 * 24 * 365), rtol=1e-9)
    assert part.n_eff[0] <= part.n_returns[0] < whole.n_returns[0] and part.n_eff[0] < whole.n_eff[0]
    assert abs(part.rv[0] / whole.rv[0] - 1) < 6 * part.stderr[0]


def test_nothing_in_nothing_out():
    empty = from_index([], [])
    found = realized_vol(empty, [START, START + 1])
    assert np.isnan(found.rv).all() and not found.trusted.any() and (found.n_returns == 0).all()
    assert len(from_forwards([], [], [])) == 0
    assert len(from_candles(pd.DataFrame({"timestamp": [], "close": []}))) == 0
    assert len(realized_vol(empty, []).rv) == 0


def random_smiles(rng, n_groups=6):
    group = np.sort(rng.integers(0, n_groups, 120))
    k = np.round(rng.normal(0, 0.2, 120), 2) + rng.normal(0, 0.001, n_groups)[group]
    return group, k, 0.5 + 0.1 * rng.random(120), np.where(rng.random(120) < 0.5, 1.0, -1.0)


@quick
@given(seeds)
def test_atm_is_what_a_sort_would_give(seed):
    rng = np.random.default_rng(seed)
    group, k, iv, _ = random_smiles(rng)
    found = atm_iv(group, 7, k, iv)
    for g in range(7):
        mean = pd.Series(iv[group == g]).groupby(np.round(k[group == g], 8)).mean()
        if mean.index.min() <= 0 <= mean.index.max():
            np.testing.assert_allclose(found.iv[g], np.interp(0.0, mean.index, mean), rtol=1e-6)
            assert found.reason[g] == AtmReason.ok
        elif len(mean) == 0:
            assert found.reason[g] == AtmReason.no_rows


@quick
@given(seeds)
def test_the_order_of_rows_does_not_matter(seed):
    rng = np.random.default_rng(seed)
    group, k, iv, sign = random_smiles(rng)
    c = 1 / (1 + np.exp(8 * k))
    order = rng.permutation(len(k))
    np.testing.assert_allclose(atm_iv(group[order], 7, k[order], iv[order]).iv, atm_iv(group, 7, k, iv).iv, rtol=1e-9)
    c = c + 1e-6 * rng.random(len(c))
    a, b = (delta_iv(group[o], 7, c[o], iv[o], sign[o], (0.1, 0.25, 0.5, 0.75)) for o in (order, np.arange(len(k))))
    np.testing.assert_array_equal(a.iv, b.iv)
    np.testing.assert_array_equal(a.reason, b.reason)


@quick
@given(seeds)
def test_delta_iv_lies_between_its_neighbours(seed):
    rng = np.random.default_rng(seed)
    c, iv = rng.random(40), 0.3 + rng.random(40)
    found = delta_iv(np.zeros(40), 1, c, iv, np.where(c <= 0.5, 1, -1), c)
    np.testing.assert_allclose(found.iv[0], iv, rtol=1e-12)
    order = np.argsort(c)
    np.testing.assert_allclose(delta_iv(np.zeros(40), 1, c, iv, np.where(c <= 0.5, 1, -1), 0.5).iv[0, 0],
                               np.interp(0.5, c[order], iv[order]) if c.min() < 0.5 < c.max() else np.nan, rtol=1e-9)


@quick
@given(seeds, st.floats(0.001, 2.0))
def test_constant_maturity_is_linear_in_total_variance(seed, target):
    rng = np.random.default_rng(seed)
    t, iv = np.sort(rng.random(6)) + 0.01, 0.3 + rng.random(6)
    found = constant_maturity(t, iv, target)
    if t[0] <= target <= t[-1]:
        np.testing.assert_allclose(found.iv**2 * target, np.interp(target, t, iv**2 * t), rtol=1e-9)
        assert found.flag == 0
    else:
        assert found.iv == (iv[0] if target < t[0] else iv[-1]) and found.flag in (1, 2)
    order = rng.permutation(6)
    grouped = constant_maturity_groups([0, 6, 12], np.r_[t, t[order]], np.r_[iv, iv[order]], target)
    np.testing.assert_array_equal(grouped.iv[0], grouped.iv[1])


TRUE = np.array([0.010, 0.12, -0.30, 0.02, 0.15])


@quick
@given(st.floats(0.02, 0.4), st.floats(-0.8, 0.8), st.floats(-0.1, 0.1), st.floats(0.05, 0.4), st.floats(0.02, 1.0))
def test_svi_smiles_are_recovered(b, rho, m, sigma, t):
    params = np.array([0.2 * t, b * t, rho, m, sigma])
    k = np.linspace(-0.5, 0.5, 25)
    fit = svi_fit_groups([0, 25], k, svi_iv(params, k, t), t)
    np.testing.assert_allclose(svi_iv(fit.params[0], k, t), svi_iv(params, k, t), atol=2e-5)


@settings(max_examples=20, deadline=None)
@given(seeds)
def test_svi_ignores_order_and_scale_of_weights_and_bad_rows(seed):
    rng = np.random.default_rng(seed)
    k, t = np.linspace(-0.5, 0.4, 31), 30 / 365
    iv, weight = svi_iv(TRUE, k, t) + 0.005 * rng.standard_normal(31), 1 + rng.random(31)
    base = svi_iv(svi_fit_groups([0, 31], k, iv, t, weight).params[0], k, t)
    order = rng.permutation(31)
    shuffled = svi_fit_groups([0, 31], k[order], iv[order], t, weight[order]).params[0]
    scaled = svi_fit_groups([0, 31], k, iv, t, 1e4 * weight).params[0]
    spoiled = svi_fit_groups([0, 33], np.r_[k, 0.1, np.nan], np.r_[iv, np.nan, 0.5], t, np.r_[weight, 1, 1]).params[0]
    for params in (shuffled, scaled, spoiled):
        np.testing.assert_allclose(svi_iv(params, k, t), base, atol=1e-5)


def test_svi_of_many_slices_is_svi_of_each():
    rng = np.random.default_rng(3)
    k = np.linspace(-0.4, 0.4, 21)
    t = np.array([7, 30, 90]) / 365
    iv = np.concatenate([svi_iv(TRUE * [x * 12, x * 12, 1, 1, 1], k, x) for x in t]) + 0.003 * rng.standard_normal(63)
    together = svi_fit_groups([0, 21, 42, 63], np.tile(k, 3), iv, t)
    for i in range(3):
        alone = fit_svi(k, iv[21 * i: 21 * (i + 1)], t[i], weight=np.ones(21))
        np.testing.assert_array_equal(alone.params, together.params[i])


def chain_of(asset, start, end):
    root = real_data_root()
    if root is None or not (root / "live_deribit" / asset / "2025" / "12" / "12").is_dir():
        pytest.skip("no real data beside this checkout")
    from volcal.market.chain import normalize_chain
    from volcal.market.store import Store

    store = Store(root / "live_deribit")
    return normalize_chain(store.read_batch(store.find(asset, start, end)).frame).frame


def test_weekend_expiry_eth_2025_12_13():
    """The Saturday expiry, on its last day: at-the-money volatility in every snapshot, and by night half the Friday's after next."""
    frame = chain_of("ETH", "2025-12-12", "2025-12-12T23:59")
    atm = {}
    for day in ("2025-12-13", "2025-12-26"):
        x = frame[frame["expiry"] == pd.Timestamp(day, tz="UTC") + pd.Timedelta(hours=8)]
        atm[day] = atm_iv(x["snapshot"], int(frame["snapshot"].max()) + 1, x["log_moneyness"], x["mark_iv"])
        assert (atm[day].reason == AtmReason.ok).all()
    assert atm["2025-12-13"].iv[-1] < 0.6 * atm["2025-12-26"].iv[-1]


def test_svi_on_real_slices_is_as_good_as_scipy():
    from scipy.optimize import least_squares

    frame = chain_of("BTC", "2025-12-12T00:00", "2025-12-12T00:10")
    frame = frame[(frame["snapshot"] == 0) & ((frame["option_type"] == "C") == (frame["log_moneyness"] > 0))]
    for _, x in list(frame.groupby("expiry", observed=True))[::3]:
        k, iv, t = x["log_moneyness"].to_numpy(), x["mark_iv"].to_numpy(), float(x["t"].iloc[0])

        def miss(p, k=k, iv=iv, t=t):
            return (svi_total_variance(p, k) - iv**2 * t) / (2 * iv * t)

        ours = fit_svi(k, iv, t)
        start = np.clip(ours.params, [-0.9, 1e-6, -0.99, -2.9, 1.1e-4], [0.9, 4.9, 0.99, 2.9, 9.9])
        starts = (start, [(iv.min() ** 2) * t / 2, 0.1, 0.0, 0.0, 0.1], [(iv.min() ** 2) * t / 2, 0.05, -0.3, 0.05, 0.3])
        scale = dict(bounds=([-1, 0, -0.999, -3, 1e-4], [1, 5, 0.999, 3, 10]), x_scale=[0.01, 0.1, 0.3, 0.1, 0.1])
        best = min(2 * least_squares(miss, s, **scale).cost for s in starts)
        bound = 1.2 if ours.status == SviStatus.at_bound else 1.01  # scipy's box is wider than ours
        assert (miss(ours.params) ** 2).sum() <= best * bound + 1e-10
