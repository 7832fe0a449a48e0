"""Pass 1 against sums written out row by row, also where a chain has more cells than there is room for; the skew's solver against its own equation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtr

from volcal.calibration import sums as room
from volcal.calibration.buckets import MANY_CELLS, bucket_of
from volcal.calibration.config import CalibrationConfig
from volcal.calibration.residuals import COL
from volcal.market.chain import normalize_chain
from volcal.market.store import Store
from volcal.vol.surface import skew_ratio_scalar, skewed_iv_kernel

SAMPLE = Path(__file__).parent.parent / "data" / "sample"
DAY = normalize_chain(Store(SAMPLE).read_batch(Store(SAMPLE).find("BTC", "2025-10-03", "2025-10-12T23:59")).columns, quote_iv=False)


def plan_of(regimes: int = 0, **changes: object) -> room.Plan:
    config = {"underlying": "BTC", "option_types": ["C", "P"], "max_samples": 0, "min_dte": 1, "max_dte": 200, **changes}
    return room.make_plan(CalibrationConfig(**config), 0, tuple(f"r{i}" for i in range(regimes)))


def test_every_group_has_the_sums_of_its_own_rows():
    bands = [{"name": "near", "min_dte": 2, "max_dte": 9}, {"name": "far", "min_dte": 7, "max_dte": 90}]
    plan = plan_of(2, bands=bands, bucket_by_dte=[0, 7, 30, 200], bucket_by_abs_delta=[0.0, 0.25, 0.5, 1.0])
    snapshots = len(DAY.tallies["snapshot"])
    rv, regime = np.full(snapshots, 0.5), np.arange(snapshots) % 3 - 1
    rv[::4] = np.nan
    found = room.chain_sums(DAY, rv, plan, regime)
    ready = room.prepare(DAY, plan)
    rows = np.arange(len(DAY))
    c = room.row_values(DAY, ready, plan, rv, regime, rows)
    _, pct, ive = room.errors_of(c, room.surface_iv(plan.surface, c))
    good = np.isfinite(pct) & np.isfinite(ive)
    headline, buckets = ready.selected("headline") & good, ready.selected("buckets") & good
    dte, delta = bucket_of(c["dte"], [0, 7, 30, 200]), bucket_of(c["abs_delta"], [0.0, 0.25, 0.5, 1.0])
    expected = {("headline", "all"): headline, ("type", "P"): headline & (c["sign"] < 0), ("regime", "r1"): headline & (c["regime"] == 1),
                ("weekday", "friday"): headline & (c["weekday"] == 4), ("dte", "dte_7_30"): buckets & (dte == 1),
                ("joint", "dte_30_200_abs_delta_0.00_0.25"): buckets & (dte == 2) & (delta == 0),
                ("band:far", "all"): ready.selected("band:far") & good, ("band_type:near", "C"): ready.selected("band:near") & good & (c["sign"] > 0)}
    for (partition, group), mask in expected.items():
        line = found.groups[plan.layout.number(partition, group)]
        assert line[COL["count"]] == mask.sum() > 100, (partition, group)
        np.testing.assert_allclose(line[COL["abs_pct"]], np.abs(pct[mask]).sum(), rtol=1e-11)
        np.testing.assert_allclose(line[COL["vega_mark_iv"]], (c["vega"] * c["mark_iv"])[mask].sum(), rtol=1e-11)
        number = plan.layout.number(partition, group)
        some = mask & np.isfinite(c["rv"]) & (c["in_window"] | (not plan.surface.skew.enabled) | (np.abs(c["call_delta"] - 0.5) <= 0.10))
        np.testing.assert_allclose(found.positions[number].sum(), (c["vega"] * c["mark_iv"])[some].sum(), rtol=1e-11)
        np.testing.assert_allclose(found.position_rv[number], (c["vega"] * c["rv"])[some].sum(), rtol=1e-11)


def test_more_cells_than_there_is_room_for_are_added_up_in_turns():
    snapshots = len(DAY.tallies["snapshot"])
    regime = np.arange(snapshots) % 20
    edges = {"bucket_by_dte": [*np.linspace(0, 200, 90).tolist()], "bucket_by_abs_delta": [*np.linspace(0, 1, 60).tolist()]}
    fine, coarse = (room.chain_sums(DAY, np.full(snapshots, 0.5), plan, regime) for plan in (plan_of(20, min_dte=0, **edges), plan_of(20, min_dte=0)))
    joint = plan_of(20, **edges).layout
    start, size = joint.start["joint"], len(joint.partitions["joint"])
    inside = fine.groups[start : start + size, COL["count"]]
    ready = room.prepare(DAY, plan_of(20, min_dte=0, **edges))
    keys = np.stack([bucket_of(DAY.columns[name], edges[by]) for name, by in (("dte", "bucket_by_dte"), ("abs_delta", "bucket_by_abs_delta"))])
    met = np.unique(np.vstack([keys, regime[ready.place], ready.sign])[:, ready.member != 0], axis=1).shape[1]
    assert met > MANY_CELLS  # else nothing was tried
    assert inside.sum() == coarse.groups[0, COL["count"]] == fine.groups[0, COL["count"]]
    np.testing.assert_allclose(fine.groups[:20], coarse.groups[:20], rtol=1e-10)
    np.testing.assert_allclose(fine.positions[0], coarse.positions[0], rtol=1e-10, atol=1e-9)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.001, 0.999), st.floats(0.5, 2.5)), max_size=14, unique_by=lambda node: node[0]),
    st.lists(st.tuples(st.floats(0.02, 5.0), st.floats(-6.0, 6.0), st.floats(1e-5, 3.0)), min_size=1, max_size=600),
)
def test_the_skewed_iv_solves_its_equation(nodes, rows):
    deltas, ratios = (np.array(side, dtype=float) for side in zip(*sorted(nodes), strict=True)) if nodes else (np.zeros(0), np.zeros(0))
    level, score, t = (np.array(column) for column in zip(*rows, strict=True))
    forward = np.full(level.size, 50_000.0)
    strike, iv = forward * np.exp(score * level * np.sqrt(t)), np.empty(level.size)
    skewed_iv_kernel(level, forward, strike, t, np.full(level.size, 5.0), 3.0, 14.0, deltas, ratios, iv)
    root = iv * np.sqrt(t)
    c, money = ndtr(-np.log(strike / forward) / root + 0.5 * root), ndtr(0.5 * level * np.sqrt(t))
    wanted = level * np.array([skew_ratio_scalar(*pair, deltas, ratios)[0] for pair in zip(c, money, strict=True)]) if nodes else level
    at_the_money = strike == forward
    np.testing.assert_array_equal(iv[at_the_money], level[at_the_money])
    np.testing.assert_allclose(iv[~at_the_money], wanted[~at_the_money], rtol=1e-9)


@pytest.mark.parametrize("column", ["level", "forward", "strike", "t"])
@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf])
def test_what_no_option_has_keeps_its_level(column, value):
    given_ = {"level": np.full(3, 0.5), "forward": np.full(3, 100.0), "strike": np.full(3, 90.0), "t": np.full(3, 0.02)}
    given_[column][1] = value
    iv = np.empty(3)
    skewed_iv_kernel(*given_.values(), np.full(3, 5.0), 3.0, 14.0, np.array([0.25, 0.75]), np.array([1.1, 1.2]), iv)
    np.testing.assert_array_equal(iv[1], given_["level"][1])
    assert iv[0] == iv[2] > 0.5
