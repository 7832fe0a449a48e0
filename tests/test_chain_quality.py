"""Properties of the chain and quality rooms: what must hold for any file, not only for those of the lessons."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from volcal.market.chain import DROPS, Count, epoch_to_ns, harmonise, normalize_chain, parity_forward, sample_snapshot
from volcal.market.quality import MIN_COVERAGE, TOLERATED, assess_snapshot, assess_window, in_window, measure_coverage
from volcal.market.store import Store
from volcal.settings import real_data_root

SAMPLES = {"BTC": sample_snapshot(), "XRP_USDC": sample_snapshot("XRP_USDC", spot=2.0)}
few = settings(max_examples=40, deadline=None)
needs_real_data = pytest.mark.skipif(real_data_root() is None, reason="no real data beside this checkout (VOLCAL_REAL_DATA)")

GUISES = {
    "harvest_time": [lambda c: c.dt.tz_localize(None), lambda c: c.dt.tz_convert("Asia/Tokyo"), lambda c: c.astype(str),
                     lambda c: c.astype("datetime64[ms, UTC]"), lambda c: c.astype("datetime64[ms, UTC]").astype("int64")],
    "instrument_name": [lambda c: c.astype("category"), lambda c: c.astype(object), lambda c: c.astype("string")],
    "expiry_timestamp": [lambda c: c * 1000, lambda c: (c * 1000).astype("int64"), lambda c: c.astype("int64").astype(str),
                         lambda c: pd.to_datetime(c, unit="s", utc=True)],
    "option_type": [lambda c: c.map({"C": "call", "P": "put"}), lambda c: c.astype("category"), lambda c: c.str.lower()],
    "strike": [lambda c: c.astype(str), lambda c: c.astype("Float64")],
    "mark_iv": [lambda c: c.astype(str), lambda c: c.astype("Float64"), lambda c: c.astype(object)],
    "mark_price": [lambda c: c.astype(str), lambda c: c.astype("category")],
}


@few
@given(st.sampled_from(sorted(SAMPLES)), st.dictionaries(st.sampled_from(sorted(GUISES)), st.integers(0, 9)), st.integers(0, 99))
def test_the_guise_of_a_column_does_not_matter(asset: str, chosen: dict[str, int], seed: int) -> None:
    frame = SAMPLES[asset].copy()
    for name, which in chosen.items():
        guise = GUISES[name][which % len(GUISES[name])]
        frame[name] = guise(frame[name])
    frame = frame[list(np.random.default_rng(seed).permutation(frame.columns))].assign(unheard_of=1)
    got, want = normalize_chain(frame), normalize_chain(SAMPLES[asset])
    assert got.counts == want.counts
    pd.testing.assert_frame_equal(got.frame, want.frame, check_categorical=False, rtol=1e-12)


def spoil(frame: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Random damage of every kind, a few rows of each."""
    rng, n = np.random.default_rng(seed), len(frame)
    frame = frame.copy()
    numbers = ["underlying_price", "mark_price", "best_bid_price", "best_ask_price", "mark_iv", "strike", "index_price",
               "expiry_timestamp"]
    for name in rng.choice(numbers, 4):
        frame.loc[rng.integers(0, n, 6), name] = rng.choice([np.nan, 0.0, -1.0, np.inf, 1e9, 1e-9], 6)
    frame.loc[rng.integers(0, n, 2), "instrument_name"] = rng.choice(["BTC-PERPETUAL", "", "ETH-13DEC25-3000-C"], 2)
    frame.loc[rng.integers(0, n, 3), "harvest_time"] = pd.Timestamp("2026-03-03T07:45Z")
    frame.loc[rng.integers(0, n), "harvest_time"] = pd.NaT
    return pd.concat([frame, frame.iloc[rng.integers(0, n, 3)]], ignore_index=True)


@few
@given(seed=st.integers(0, 10**6), mode=st.sampled_from(["quoted", "parity", "auto"]), asset=st.sampled_from(sorted(SAMPLES)))
def test_every_row_is_accounted_for_and_usable_rows_are_sound(seed: int, mode: str, asset: str) -> None:
    chain = normalize_chain(spoil(SAMPLES[asset], seed), forward=mode)  # type: ignore[arg-type]
    counts, f = chain.counts, chain.frame
    assert counts["rows"] == counts["usable"] + sum(counts[reason.name] for reason in DROPS) and counts["usable"] == len(f)
    assert counts["complete_after"] <= counts["rows"] and counts["crossed_quotes"] <= counts["two_sided"]
    assert {c.name: int(chain.snapshots[c.name].sum()) for c in Count} == counts
    for name in ["strike", "forward", "mark_price", "mark_usd", "mark_iv", "t", "dte"]:
        assert np.isfinite(f[name]).all() and (f[name] > 0).all(), name
    assert f["mark_iv"].between(0.01, 10).all() and f["abs_delta"].between(0, 1).all() and (f["vega"] >= 0).all()
    assert not f.duplicated(["snapshot", "instrument_name"]).any()
    assert not (f["best_bid_price"] > f["best_ask_price"]).any()


@few
@given(seed=st.integers(0, 10**6))
def test_a_batch_is_its_snapshots_one_by_one(seed: int) -> None:
    parts = [spoil(SAMPLES["BTC"], seed + i).assign(snapshot=7 * i + 2) for i in range(3)]
    shuffled = pd.concat(parts, ignore_index=True).sample(frac=1, random_state=seed % 97)
    batch = normalize_chain(shuffled.sort_values("snapshot", kind="stable"))
    mixed = normalize_chain(pd.concat(parts[::-1], ignore_index=True))
    singles = [normalize_chain(part) for part in parts]
    assert mixed.counts == {name: sum(s.counts[name] for s in singles) for name in mixed.counts}
    assert batch.counts["rows"] == mixed.counts["rows"] and mixed.snapshots["snapshot"].tolist() == [2, 9, 16]
    together = pd.concat([s.frame for s in singles], ignore_index=True)
    pd.testing.assert_frame_equal(mixed.frame, together, check_categorical=False, check_dtype=False)


@few
@given(f=st.floats(1.0, 2e5), k=st.floats(0.7, 1.4), call=st.floats(0.01, 0.4), linear=st.booleans())
def test_parity_returns_the_forward_it_came_from(f: float, k: float, call: float, linear: bool) -> None:
    put = call * f - (f - k * f) if linear else call - (1 - k)
    assert parity_forward(k * f, call * f if linear else call, put, linear) == pytest.approx(f, rel=1e-9)


@few
@given(st.integers(10**9, 4 * 10**9), st.sampled_from([1, 10**3, 10**6, 10**9]))
def test_an_epoch_of_any_unit_is_the_same_instant(seconds: int, unit: int) -> None:
    assert epoch_to_ns([float(seconds * unit)])[0] == seconds * 10**9


@pytest.mark.parametrize("asset", sorted(SAMPLES))
@pytest.mark.parametrize("drop_iv", [False, True])
@pytest.mark.parametrize("drop_forward", [False, True])
def test_marks_in_the_other_unit_are_never_calibrated(asset: str, drop_iv: bool, drop_forward: bool) -> None:
    good = SAMPLES[asset]
    scale = good["underlying_price"] ** (1 if asset == "BTC" else -1)
    bad = good.assign(mark_price=good["mark_price"] * scale)
    bad = bad.drop(columns=["mark_iv"] * drop_iv + ["underlying_price"] * drop_forward)
    assert normalize_chain(bad).counts["usable"] == 0
    assert assess_snapshot(normalize_chain(bad)).status == "failed"


def test_put_in_coin_may_cost_more_than_one_coin() -> None:
    chain = normalize_chain(SAMPLES["BTC"])
    deep = SAMPLES["BTC"].iloc[[-1]].assign(instrument_name="BTC-24APR26-300000-P", strike=300_000.0, mark_price=2.3, mark_iv=60.0,
                                            best_bid_price=np.nan)
    with_deep = normalize_chain(pd.concat([SAMPLES["BTC"], deep], ignore_index=True))
    assert with_deep.counts["usable"] == chain.counts["usable"] + 1


def day(n: int = 24, step: str = "h") -> tuple[pd.DataFrame, pd.DatetimeIndex]:
    times = pd.date_range("2026-03-02", periods=n, freq=step, tz="UTC")
    table = pd.concat([normalize_chain(SAMPLES["BTC"], quote_iv=False).snapshots] * n, ignore_index=True)
    return table.assign(snapshot=range(n), time=times, first_time=times), times


RANK = {"ok": 0, "degraded": 1, "failed": 2}
FAULTS = [c.name for c in TOLERATED] + ["crossed_quotes", "forward_mismatch", "mark_inconsistent", "sweep_seconds"]


@few
@given(st.dictionaries(st.sampled_from(FAULTS), st.integers(0, 60), max_size=4), st.sets(st.integers(0, 23), max_size=9), st.integers(0, 8))
def test_more_faults_never_make_data_better(faults: dict[str, int], lost: set[int], failed: int) -> None:
    table, times = day()
    window = {"start": times[0], "end": times[-1], "as_of": times[-1], "step": pd.Timedelta("1h")}
    clean = assess_window(table, [], **window)
    kept = table.drop(index=sorted(lost))
    holed = assess_window(kept, [], **window)
    for name, count in faults.items():
        kept = kept.assign(**{name: kept[name] + (10 * count if name == "sweep_seconds" else count)})
    worse = assess_window(kept, ["x.parquet: unreadable"] * failed, **window)
    assert clean.status == "ok" and RANK[holed.status] <= RANK[worse.status]
    assert failed == 0 or worse.status != "ok"
    assert worse.coverage_fraction >= MIN_COVERAGE or worse.status != "ok"
    block = worse.to_dict()
    assert list(block) == ["num_snapshots", "num_schema_failures", "num_low_quality_snapshots", "overall_non_null_core_fraction",
                           "coverage_fraction", "gaps", "status", "issues"]
    json.dumps(block)
    assert all(issue["sentence"] and issue["code"] and isinstance(issue["count"], int) for issue in block["issues"])


@pytest.mark.parametrize("fault", ["iv_unit_suspect", "quote_iv_unit_suspect", "duplicate_instrument", "dropped_mark_unit",
                                   "dropped_negative_mark"])
def test_what_betrays_a_broken_harvester_is_never_ok(fault: str) -> None:
    table, times = day()
    table.loc[5, fault] = 1
    verdict = assess_window(table, [], times[0], times[-1], as_of=times[-1])
    assert verdict.status == "degraded" and fault in [issue.code for issue in verdict.issues]


@few
@given(st.lists(st.floats(0, 1), max_size=60), st.floats(0.002, 0.5))
def test_coverage_is_a_share_and_gaps_lie_in_the_window(places: list[float], step: float) -> None:
    start = pd.Timestamp("2026-03-02", tz="UTC")
    end = start + pd.Timedelta("1D")
    times = [start + p * pd.Timedelta("1D") for p in places]
    coverage = measure_coverage(pd.DatetimeIndex(times, tz="UTC") if times else [], start, end, step * pd.Timedelta("1D"))
    assert 0 <= coverage.fraction <= 1 and (coverage.filled > 0) == bool(places)
    assert all(start <= gap.start < gap.end <= end and gap.steps > 3 for gap in coverage.gaps)


def test_a_window_judges_only_what_is_inside_it() -> None:
    table, times = day()
    table.loc[20:, "duplicate_instrument"] = 50
    assert assess_window(table, [], times[0], times[15], as_of=times[15]).status == "ok"
    assert len(in_window(table, "2026-03-02T03:00", "2026-03-02T05:00Z")) == 3
    never = pd.Series(pd.NaT, index=table.index, dtype="datetime64[ns, UTC]")
    lost = table.assign(time=never, first_time=never)
    assert assess_window(lost, [], times[0], times[-1]).status != "ok"


def test_an_old_window_is_stale_unless_its_end_is_the_present() -> None:
    table, times = day()
    assert assess_window(table, [], times[0], times[-1]).status == "degraded"
    assert assess_window(table, [], times[0], times[-1], as_of=times[-1]).status == "ok"


@needs_real_data
@pytest.mark.parametrize("folder, asset, day_of", [("live_deribit", "BTC", "2025-12-10"), ("live_deribit", "XRP_USDC", "2025-12-12"),
                                                   ("deribit_6h", "ETH", "2026-02-05"), ("orderbook_2023", "ETH", "2023-04-12")])
def test_the_store_and_a_plain_reader_give_the_same_chain(folder: str, asset: str, day_of: str) -> None:
    root = real_data_root() / folder  # type: ignore[operator]
    store = Store(root)
    refs = store.find(asset, day_of, f"{day_of}T23:59")[:4]
    plain = pd.concat([pd.read_parquet(ref.path).assign(snapshot=i) for i, ref in enumerate(refs)], ignore_index=True)
    by_store, by_hand = normalize_chain(store.read_batch(refs).frame), normalize_chain(plain)
    assert by_store.counts == by_hand.counts
    pd.testing.assert_frame_equal(by_store.frame, by_hand.frame, check_categorical=False)
    pd.testing.assert_frame_equal(by_store.snapshots, by_hand.snapshots)


@needs_real_data
def test_real_iv_in_decimals_is_solved_and_flagged() -> None:
    ref = Store(real_data_root() / "live_deribit").find("ETH", "2025-12-11", "2025-12-12")[0]  # type: ignore[operator]
    raw = pd.read_parquet(ref.path)
    told, solved = normalize_chain(raw).frame, normalize_chain(raw.assign(mark_iv=raw["mark_iv"] / 100))
    both = told.merge(solved.frame, on="instrument_name", suffixes=("", "_solved"))
    near = both[both["abs_delta"].between(0.1, 0.9)]
    assert (near["mark_iv"] - near["mark_iv_solved"]).abs().median() < 1e-4
    assert assess_snapshot(solved).status == "degraded"


def test_harmonise_is_idempotent() -> None:
    once = pd.DataFrame(harmonise(SAMPLES["XRP_USDC"]))
    pd.testing.assert_frame_equal(pd.DataFrame(harmonise(once)), once)
