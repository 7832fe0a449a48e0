"""What a lesson cannot show: processes killed while they write, readers beside writers, every state that a day can be in."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from volcal.market import store as room
from volcal.market.store import COLUMN_KINDS, REQUIRED_COLUMNS, Store, select_snapshots
from volcal.settings import real_data_root
from volcal.units import SchemaError, StoreError

DAY = "2026-02-01"
MIDNIGHT = pd.Timestamp(DAY, tz="UTC")


def snapshot(minute: int, rows: int = 6, forward: float = 90_000.0) -> pd.DataFrame:
    """A snapshot that tells its minute and forward in every row."""
    strike = 80_000.0 + 1_000 * np.arange(rows)
    return pd.DataFrame({
        "harvest_time": MIDNIGHT + pd.Timedelta(minutes=minute, seconds=7), "instrument_name": [f"BTC-27MAR26-{k:.0f}-C" for k in strike],
        "underlying": "BTC", "expiry": "2026-03-27", "expiry_timestamp": pd.Timestamp("2026-03-27T08:00Z").timestamp(), "option_type": "C",
        "strike": strike, "underlying_price": forward, "mark_price": 0.01 + minute / 1e5, "best_bid_price": np.nan, "best_ask_price": 0.02,
        "mark_iv": 45.0, "open_interest": 1.0, "volume": 0.0,
    })


def put(root: Path, minute: int, frame: pd.DataFrame | pa.Table | bytes) -> Path:
    """A small file as some harvester leaves it."""
    path = root / f"BTC/2026/02/01/BTC_{DAY}_{minute // 60:02d}{minute % 60:02d}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(frame, bytes):
        path.write_bytes(frame)
    elif isinstance(frame, pa.Table):
        pq.write_table(frame, path)
    else:
        frame.to_parquet(path)
    return path


def day_of(store: Store) -> room.RawBatch:
    return store.read_batch(store.find("BTC", DAY, f"{DAY}T23:59:59"))


def as_rows(batch: room.RawBatch) -> pd.DataFrame:
    text = {c: str for c in batch.frame.columns[batch.frame.dtypes == "category"]}
    return batch.frame.astype(text).assign(minute=[batch.refs[i].time for i in batch.frame.snapshot])


# --- finding -------------------------------------------------------------------------------------------------------


def test_nothing_outside_the_window_is_opened(tmp_path, monkeypatch):
    for minute in range(0, 60, 5):
        put(tmp_path, minute, snapshot(minute) if 20 <= minute <= 40 else b"garbage")
    (tmp_path / "BTC/2026/02/02").mkdir()
    (tmp_path / "BTC/2026/02/02/BTC_2026-02-02.parquet").write_bytes(b"garbage of another day")
    opened: list[str] = []
    real = room._LocalLooking.read
    monkeypatch.setattr(room._LocalLooking, "read", lambda self, path: opened.append(path) or real(self, path))
    monkeypatch.setattr(room._LocalLooking, "open", lambda self, path: pytest.fail(f"opened {path}"))
    store = Store(tmp_path)
    refs = store.find("BTC", f"{DAY}T00:20:59", f"{DAY}T00:40:00")
    assert not opened
    batch = store.read_batch(refs, on_schema_error="raise")
    assert [r.time.minute for r in batch.refs] == [20, 25, 30, 35, 40]
    assert len(opened) == 5


@pytest.mark.parametrize("name", ["notes.txt", f".BTC_{DAY}_0001.parquet.1-ab.tmp", f"ETH_{DAY}_0001.parquet", f"BTC_{DAY}_2460.parquet",
                                  f"BTC_{DAY}_001.parquet", f"BTC_{DAY}_0001.parquet.tmp", "BTC_2026-02-02_0001.parquet", "part-0.parquet"])
def test_foreign_names_are_no_snapshots(tmp_path, name):
    put(tmp_path, 0, snapshot(0)).with_name(name).write_bytes(b"foreign")
    assert [r.time for r in Store(tmp_path).find("BTC")] == [MIDNIGHT]


def test_odd_folders_are_passed_over(tmp_path):
    put(tmp_path, 0, snapshot(0))
    for odd in ("_history", ".cache", "docs", "EMPTY", "BTC/latest", "BTC/2026/13/01", "BTC/2026/02/31"):
        (tmp_path / odd).mkdir(parents=True)
    (tmp_path / "README.md").write_text("x")
    (tmp_path / "BTC/2026/03").write_text("a file, not a month")
    store = Store(str(tmp_path) + "/")
    assert store.assets() == ["BTC"]
    assert len(store.find("BTC")) == 1


def test_missing_places_are_named(tmp_path):
    with pytest.raises(StoreError, match="no folder"):
        Store(tmp_path / "gone").find("BTC")
    put(tmp_path, 0, snapshot(0))
    with pytest.raises(StoreError, match="this root has BTC"):
        Store(tmp_path).find("SOL_USDC")


# --- one set of types ----------------------------------------------------------------------------------------------

PLAIN = pa.Table.from_pandas(snapshot(0), preserve_index=False).replace_schema_metadata(None)


def with_column(name: str, values: pa.Array | pa.ChunkedArray) -> pa.Table:
    return PLAIN.set_column(PLAIN.column_names.index(name), name, values)


EXPIRY = pd.Timestamp("2026-03-27T08:00Z")
VARIANTS = {
    "ints": with_column("strike", PLAIN["strike"].cast(pa.int32())),
    "float32": with_column("open_interest", PLAIN["open_interest"].cast(pa.float32())),
    "decimals": with_column("strike", PLAIN["strike"].cast(pa.decimal128(20, 4))),
    "large strings": with_column("instrument_name", PLAIN["instrument_name"].cast(pa.large_string())),
    "string views": with_column("instrument_name", PLAIN["instrument_name"].cast(pa.string_view())),
    "dictionaries": with_column("option_type", PLAIN["option_type"].dictionary_encode()),
    "large dictionaries": with_column("instrument_name", PLAIN["instrument_name"].cast(pa.large_string()).dictionary_encode()),
    "naive times": with_column("harvest_time", PLAIN["harvest_time"].cast(pa.timestamp("us", "UTC")).cast(pa.timestamp("us"))),
    "times in ms": with_column("harvest_time", PLAIN["harvest_time"].cast(pa.timestamp("ms", "UTC"), safe=False)),
    "times elsewhere": with_column("harvest_time", PLAIN["harvest_time"].cast(pa.timestamp("us", "Asia/Tokyo"))),
    "expiry ms": with_column("expiry_timestamp", pa.array([EXPIRY.value // 10**6] * 6)),
    "expiry us": with_column("expiry_timestamp", pa.array([EXPIRY.value // 10**3] * 6)),
    "expiry ns": with_column("expiry_timestamp", pa.array([EXPIRY.value] * 6)),
    "expiry time": with_column("expiry_timestamp", pa.array([EXPIRY.to_pydatetime()] * 6, pa.timestamp("s", "UTC"))),
    "expiry date": with_column("expiry", pa.array([EXPIRY.date()] * 6)).drop_columns("expiry_timestamp"),
    "expiry text only": PLAIN.drop_columns("expiry_timestamp"),
    "expiry text with time": with_column("expiry", pa.array(["2026-03-27T08:00:00Z"] * 6)).drop_columns("expiry_timestamp"),
    "expiry token": with_column("expiry", pa.array(["27MAR26"] * 6)).drop_columns("expiry_timestamp"),
    "expiry number only": PLAIN.drop_columns("expiry"),
    "null bids": with_column("best_bid_price", pa.nulls(6)),
    "extra columns": PLAIN.append_column("note", pa.array([{"any": "thing"}] * 6)),
    "other order": PLAIN.select(PLAIN.column_names[::-1]),
    "optional columns": PLAIN.append_column("bid_iv", pa.nulls(6, pa.float64())),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "among others"])
def test_any_type_of_the_right_kind_reads_the_same(tmp_path, variant, beside):
    put(tmp_path, 0, VARIANTS[variant])
    if beside:
        put(tmp_path, 1, PLAIN)
        put(tmp_path, 2, VARIANTS[variant])
    batch = Store(tmp_path).read_batch(Store(tmp_path).find("BTC"), on_schema_error="raise")
    put(tmp_path / "plain", 0, PLAIN)
    plain = day_of(Store(tmp_path / "plain"))
    for i in range(len(batch.refs)):
        got = batch.frame[batch.frame.snapshot == i].drop(columns="snapshot").reset_index(drop=True)
        got["harvest_time"] = got.harvest_time.dt.floor("s")
        want = plain.frame.drop(columns="snapshot").assign(harvest_time=plain.frame.harvest_time.dt.floor("s"))
        pd.testing.assert_frame_equal(got, want, check_categorical=False)


@pytest.mark.parametrize(("content", "reason"), [
    (b"", "unreadable"), (b"PAR1", "unreadable"), (b"garbage" * 99, "unreadable"), ("cut", "unreadable"),
    (PLAIN.drop_columns("mark_iv"), "missing_columns"), (PLAIN.drop_columns(["expiry", "expiry_timestamp"]), "missing_columns"),
    (pa.table({"a": [1]}), "missing_columns"), (pa.table({}), "missing_columns"), (PLAIN.slice(0, 0), "no_rows"),
    (with_column("strike", pa.array(["x"] * 6)), "wrong_kind"), (with_column("harvest_time", pa.array(["2026-02-01"] * 6)), "wrong_kind"),
    (with_column("harvest_time", pa.array([1 << 40] * 6, pa.timestamp("s"))), "unreadable"),
])
def test_a_bad_file_is_a_failure_and_its_neighbours_are_read(tmp_path, content, reason):
    for minute in (0, 2):
        put(tmp_path, minute, PLAIN)
    path = put(tmp_path, 1, PLAIN if isinstance(content, str) else content)
    if isinstance(content, str):
        path.write_bytes(path.read_bytes()[:-200])
    store = Store(tmp_path)
    batch = day_of(store)
    assert [(f.time.minute, f.reason) for f in batch.failures] == [(1, reason)]
    assert [r.time.minute for r in batch.refs] == [0, 2]
    assert len(batch.frame) == 12
    with pytest.raises(SchemaError, match=path.name):
        store.read_batch(store.find("BTC"), on_schema_error="raise")


def test_bytes_flipped_inside_never_crash(tmp_path):
    whole = bytearray(put(tmp_path, 0, PLAIN).read_bytes())
    rng = np.random.default_rng(7)
    store = Store(tmp_path)
    for _ in range(60):
        broken = whole.copy()
        for at in rng.integers(0, len(whole), 20):
            broken[at] ^= 0xFF
        put(tmp_path, 0, bytes(broken))
        batch = day_of(store)
        assert len(batch.refs) + len(batch.failures) == 1


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 200), step=st.integers(1, 9), most=st.integers(1, 50))
def test_thinning_keeps_the_ends_and_spreads_evenly(n, step, most):
    refs = [room.SnapshotRef("BTC", MIDNIGHT + pd.Timedelta(minutes=i), str(i), MIDNIGHT.date()) for i in range(n)]
    stepped = refs[::step]
    kept = select_snapshots(refs[::-1], step, most)
    assert len(kept) == min(most, len(stepped)) == len(set(kept))
    assert kept[-1] == stepped[-1] and (most == 1 or kept[0] == stepped[0])
    gaps = np.diff([stepped.index(r) for r in kept])
    assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1


# --- every state of a day reads the same ---------------------------------------------------------------------------

MIX = [PLAIN, *(VARIANTS[v] for v in ("dictionaries", "times in ms", "ints", "naive times", "optional columns"))]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    steps=st.lists(st.one_of(st.sets(st.integers(0, 11), min_size=1, max_size=5), st.just("compact"), st.just("killed"))),
    split=st.integers(0, 12),
)
def test_any_state_of_compaction_reads_the_same_rows(steps, split):
    with tempfile.TemporaryDirectory() as folder:
        store, plain = Store(f"{folder}/a"), Store(f"{folder}/b")
        arrived: set[int] = set()
        for step in [*steps, set(range(12))]:
            if isinstance(step, str):
                if arrived:
                    with_kill(store, kill=step == "killed")
            else:
                for minute in step - arrived:
                    table = MIX[minute % 6]
                    table = table.set_column(table.column_names.index("mark_price"), "mark_price", pa.array([minute / 100] * 6))
                    put(Path(store.root), minute, table)
                    put(Path(plain.root), minute, table)
                arrived |= step
        want, got = as_rows(day_of(plain)), as_rows(day_of(store))
        pd.testing.assert_frame_equal(got, want)
        refs = store.find("BTC")
        parts = [as_rows(store.read_batch(p)) for p in (refs[:split], refs[split:])]
        joined = pd.concat(parts).drop(columns="snapshot").reset_index(drop=True)
        pd.testing.assert_frame_equal(joined, want.drop(columns="snapshot"), check_dtype=False)
        backwards = store.read_batch(refs[::-1])
        assert [r.time for r in backwards.refs] == [r.time for r in refs[::-1]]
        for ref in refs:
            pd.testing.assert_frame_equal(store.read(ref), plain.read(plain.find("BTC", ref.time, ref.time)[0]), check_dtype=False)


def with_kill(store: Store, kill: bool) -> None:
    """Compact; where asked, as if killed after the second small file was removed."""
    removed = [0]
    real = room._LocalFiles.remove

    def remove(self, path):
        removed[0] += 1
        if kill and removed[0] > 2:
            raise KeyboardInterrupt
        real(self, path)

    room._LocalFiles.remove = remove
    try:
        store.compact("BTC", DAY)
    except KeyboardInterrupt:
        pass
    finally:
        room._LocalFiles.remove = real


def test_a_failed_verification_changes_nothing(tmp_path, monkeypatch):
    for minute in range(4):
        put(tmp_path, minute, snapshot(minute))
    before = sorted(p.name for p in (tmp_path / "BTC/2026/02/01").iterdir())
    honest = room._day_bytes
    monkeypatch.setattr(room, "_day_bytes", lambda table, index, day: honest(table.slice(1), index, day))
    with pytest.raises(StoreError, match="nothing was changed"):
        Store(tmp_path).compact("BTC", DAY)
    assert sorted(p.name for p in (tmp_path / "BTC/2026/02/01").iterdir()) == before


def test_integers_that_floats_cannot_hold_stay_beside(tmp_path):
    odd = with_column("volume", pa.array([2**53 + 1] * 6))
    put(tmp_path, 0, PLAIN)
    put(tmp_path, 1, odd)
    report = Store(tmp_path).compact("BTC", DAY)
    assert report.snapshots == 1 and [f.reason for f in report.left] == ["incompatible"]
    assert len(day_of(Store(tmp_path)).refs) == 2


def test_a_damaged_day_file_is_never_written_over(tmp_path):
    put(tmp_path, 0, PLAIN)
    store = Store(tmp_path)
    store.compact("BTC", DAY)
    day_file = tmp_path / f"BTC/2026/02/01/BTC_{DAY}.parquet"
    day_file.write_bytes(day_file.read_bytes()[:-50])
    assert [f.reason for f in day_of(store).failures] == ["unreadable"]
    put(tmp_path, 5, PLAIN)
    for act in (lambda: store.write_snapshot(snapshot(9), "BTC", f"{DAY}T00:09"), lambda: store.compact("BTC", DAY)):
        with pytest.raises(Exception, match="(?i)parquet|read"):
            act()
    assert [r.time.minute for r in day_of(store).refs] == [5]


def in_pages(whole: bytes, rng: np.random.Generator) -> bytes:
    """A Parquet file with one bit of its pages turned; the footer is as it was."""
    pages = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    damaged = bytearray(whole)
    damaged[rng.integers(4, pages)] ^= 1 << rng.integers(8)
    return bytes(damaged)


@pytest.mark.parametrize("compacted", [False, True])
def test_a_turned_bit_makes_a_file_unreadable_and_never_other_numbers(tmp_path, compacted):
    store = Store(tmp_path)
    for minute in (0, 5):
        store.write_snapshot(snapshot(minute, rows=40), "BTC", MIDNIGHT + pd.Timedelta(minutes=minute))
    if compacted:
        store.compact("BTC", DAY)
    path, good, rng, lost = Path(store.find("BTC")[0].path), as_rows(day_of(store)), np.random.default_rng(0), 0
    whole = path.read_bytes()
    for _ in range(200):
        path.write_bytes(in_pages(whole, rng))
        found = day_of(Store(tmp_path))
        assert {f.reason for f in found.failures} <= {"unreadable"}
        lost += len(found.failures) > 0
        if len(found):
            now = as_rows(found)
            expected = good[good["minute"].isin(now["minute"])]
            pd.testing.assert_frame_equal(now.drop(columns="snapshot"), expected.drop(columns="snapshot").reset_index(drop=True))
        else:
            assert len(found.failures) == 2
    assert lost > 100


def test_a_damaged_day_file_is_not_merged_into_a_new_one(tmp_path):
    store = Store(tmp_path)
    put(tmp_path, 0, snapshot(0, rows=40))
    store.compact("BTC", DAY)
    path, rng = Path(store.find("BTC")[0].path), np.random.default_rng(1)
    whole, damaged = path.read_bytes(), b""
    while not day_of(Store(tmp_path)).failures:
        path.write_bytes(damaged := in_pages(whole, rng))
    late = put(tmp_path, 5, PLAIN)
    with pytest.raises(StoreError, match="checksum|read"):
        store.compact("BTC", DAY)
    assert path.read_bytes() == damaged and late.exists()


def test_a_text_whose_number_has_no_text_is_counted(tmp_path):
    """Files of writers without checksums: a number beyond the dictionary is seen before it is looked up."""
    plain = pa.Table.from_pandas(snapshot(0, rows=40), preserve_index=False).replace_schema_metadata(None)
    whole = put(tmp_path, 0, plain).read_bytes()
    rng, seen = np.random.default_rng(2), set()
    for _ in range(400):
        put(tmp_path, 0, in_pages(whole, rng))
        seen |= {failure.detail for failure in day_of(Store(tmp_path)).failures}
    assert any("dictionary" in detail or "ndex" in detail for detail in seen)


@pytest.mark.parametrize(("said", "damaged"), [
    (b'"rows": [40, 40]', b'"rows": [42, 40]'), (b'"rows": [40, 40]', b'"rows": [48, 32]'), (b'"rows": [40, 40]', b'"rows": [40,4.0]'),
    (b'"schema_of": [0, 0]', b'"schema_of": [0, 1]'), (b'"minutes": ["0000", "0005"]', b'"minutes": ["0001", "0005"]'),
    (b'"day": "2026-02-01"', b'"day": "2026-02-03"'), (b'"minutes": ["0000"', b'"minutes": [["000"'), (b"open_interest", b"opEn_interest"),
])
def test_a_damaged_footer_is_no_day(tmp_path, said, damaged):
    """Pages have checksums, the footer has not: what it says of the snapshots has one of its own."""
    store = Store(tmp_path)
    for minute in (0, 5):
        put(tmp_path, minute, snapshot(minute, rows=40))
    store.compact("BTC", DAY)
    path = Path(store.find("BTC")[0].path)
    whole = path.read_bytes()
    assert said in whole
    path.write_bytes(broken := whole.replace(said, damaged))
    found = day_of(Store(tmp_path))
    assert len(found) == 0 and {f.reason for f in found.failures} <= {"unreadable", "missing_columns"} and found.failures
    late = put(tmp_path, 7, PLAIN)
    with pytest.raises(StoreError, match="cannot be read"):
        Store(tmp_path).compact("BTC", DAY)
    assert path.read_bytes() == broken and late.exists()


def test_a_day_takes_in_nothing_that_it_could_not_give_back(tmp_path):
    """A small file whose values cannot be read stays beside the day, which keeps the others."""
    table = pa.Table.from_pandas(snapshot(0), preserve_index=False)
    names = pa.array([b"BTC-27MAR26-80000-C", *5 * [b"BTC-\xff"]], pa.binary()).cast(pa.string(), safe=False)
    odd = {1: table.set_column(1, "instrument_name", names), 2: table.set_column(0, "harvest_time", pa.array(6 * [1 << 40], pa.timestamp("s", "UTC")))}
    for minute, content in {0: snapshot(0), 3: snapshot(3), **odd}.items():
        put(tmp_path, minute, content)
    assert [f.reason for f in day_of(Store(tmp_path)).failures] == 2 * ["unreadable"]
    report = Store(tmp_path).compact("BTC", DAY)
    assert (report.snapshots, [f.reason for f in report.left]) == (2, 2 * ["unreadable"])
    found = day_of(Store(tmp_path))
    assert len(found) == 12 and len(found.failures) == 2
    with pytest.raises(SchemaError, match="not written"):
        Store(tmp_path).write_snapshot(odd[1], "BTC", f"{DAY}T00:09")


def test_texts_that_are_not_read_as_dictionaries_are_read_plainly(tmp_path):
    """Encodings of other writers, DuckDB's second format among them."""
    table = pa.Table.from_pandas(snapshot(0), preserve_index=False)
    for minute in (0, 1):
        encoding = {"use_dictionary": False, "column_encoding": {"instrument_name": "DELTA_LENGTH_BYTE_ARRAY"}} if minute else {}
        pq.write_table(table, put(tmp_path, minute, PLAIN), **encoding)
    found = day_of(Store(tmp_path))
    assert not found.failures and list(found.frame["instrument_name"][:6]) == list(found.frame["instrument_name"][6:])


def test_columns_that_stand_there_twice_are_refused_when_written(tmp_path):
    times = pd.date_range(DAY, periods=3, freq="1h", tz="UTC")
    candles = pd.DataFrame(1.0, index=range(3), columns=["open", "high", "low", "close", "close"]).assign(timestamp=times)
    doubled = pa.Table.from_pandas(snapshot(0).assign(own=1.0), preserve_index=False).append_column("own", pa.array(6 * [2.0]))
    for act in (lambda: Store(tmp_path).write_history("BTC", "ohlc", candles), lambda: Store(tmp_path).write_snapshot(doubled, "BTC", DAY)):
        with pytest.raises(SchemaError, match="more than once|duplicate"):
            act()


# --- killed processes ----------------------------------------------------------------------------------------------

# Children come from a server that has imported everything before, so that killing many of them is cheap.

SPAWN = multiprocessing.get_context("forkserver")
SPAWN.set_forkserver_preload(["volcal.market.store", "pytest", "hypothesis"])


def write_on(root: str, first: int, ready) -> None:
    ready.send("go")
    for minute in range(first, 1440):
        Store(root).write_snapshot(snapshot(minute, 400), "BTC", MIDNIGHT + pd.Timedelta(minutes=minute))


def compact_day(root: str, ready) -> None:
    ready.send("go")
    Store(root).compact("BTC", DAY)


def start(target, *args):
    here, there = SPAWN.Pipe()
    process = SPAWN.Process(target=target, args=(*args, there), daemon=True)
    process.start()
    assert here.poll(60) and here.recv() == "go"
    return process


def test_a_writer_killed_at_any_time_leaves_whole_files_only(tmp_path):
    rng = np.random.default_rng(1)
    store, count = Store(tmp_path), 0
    store.write_snapshot(snapshot(0, 400), "BTC", DAY)
    for i in range(8):
        process = start(write_on, str(tmp_path), count)
        until = time.monotonic() + 0.02 + 0.3 * rng.random()
        while time.monotonic() < until:
            if i % 2:  # a reader beside the writer
                assert not day_of(store).failures
        process.kill()
        process.join()
        batch = store.read_batch(store.find("BTC"), on_schema_error="raise")
        assert (batch.frame.groupby("snapshot").size() == 400).all()
        assert len(batch.refs) >= count
        count = len(batch.refs)
    assert count > 8


def test_a_compactor_killed_at_any_time_loses_and_doubles_nothing(tmp_path):
    rng = np.random.default_rng(2)
    source, seen = tmp_path / "source", set()
    for minute in range(60):
        put(source, minute, snapshot(minute, 100))
    want = as_rows(day_of(Store(source)))
    for i in range(12):
        root = tmp_path / str(i)
        shutil.copytree(source, root)
        store, folder = Store(root), root / "BTC/2026/02/01"
        process = start(compact_day, str(root))
        until = time.monotonic() + (60 if i % 2 else 0.15 * rng.random())  # odd: the instant that the day file appears
        while time.monotonic() < until and process.is_alive() and not (folder / f"BTC_{DAY}.parquet").exists():
            if i % 4 == 0:  # a reader beside the compactor
                pd.testing.assert_frame_equal(as_rows(day_of(store)), want)
        process.kill()
        process.join()
        pd.testing.assert_frame_equal(as_rows(day_of(store)), want)
        names = [n for n in os.listdir(folder) if not n.startswith(".")]
        seen.add((f"BTC_{DAY}.parquet" in names, len(names) > 1))
        store.compact("BTC", DAY)
        pd.testing.assert_frame_equal(as_rows(day_of(store)), want)
        assert [n for n in os.listdir(folder) if not n.startswith(".")] == [f"BTC_{DAY}.parquet"]
    assert len(seen) > 1


def test_a_reader_beside_a_compactor_sees_each_snapshot_once(tmp_path):
    for minute in range(60):
        put(tmp_path, minute, snapshot(minute, 20))
    store, reads = Store(tmp_path), 0
    found = store.find("BTC")
    want = as_rows(day_of(store))
    process = start(compact_day, str(tmp_path))
    while process.is_alive():
        pd.testing.assert_frame_equal(as_rows(day_of(store)), want)
        reads += 1
    assert reads and process.exitcode == 0
    assert len(store.read_batch(found, on_schema_error="raise").refs) == 60


def test_a_killed_writers_draft_is_swept_later(tmp_path):
    draft = put(tmp_path, 0, PLAIN).with_name(f".BTC_{DAY}_0001.parquet.1-ab.tmp")
    draft.write_bytes(b"half")
    Store(tmp_path).compact("BTC", DAY)
    assert draft.exists()
    os.utime(draft, (0, 0))
    Store(tmp_path).compact("BTC", DAY)
    assert not draft.exists()


def _race(root: str, forward: float, start_at: float) -> str:
    time.sleep(max(0.0, start_at - time.time()))
    try:
        Store(root).write_snapshot(snapshot(0, 50, forward), "BTC", DAY)
    except StoreError:
        return "refused"
    return "written"


def test_of_two_writers_of_one_minute_one_is_refused(tmp_path):
    with SPAWN.Pool(3) as pool:
        for i in range(5):
            at = time.time() + 0.05
            outcomes = pool.starmap(_race, [(str(tmp_path / str(i)), f, at) for f in (1.0, 2.0, 3.0)], chunksize=1)
            assert sorted(outcomes) == ["refused", "refused", "written"]


# --- object stores, histories, real data -----------------------------------------------------------------------------


def test_an_object_store_reads_and_compacts_as_a_folder_does(tmp_path):
    local, remote = Store(tmp_path), Store(f"memory://{tmp_path.name}")
    for minute in range(5):
        for store in (local, remote):
            store.write_snapshot(snapshot(minute), "BTC", MIDNIGHT + pd.Timedelta(minutes=minute))
    with pytest.raises(StoreError, match="not overwritten"):
        remote.write_snapshot(snapshot(0, forward=1.0), "BTC", DAY)
    want = as_rows(day_of(local))
    pd.testing.assert_frame_equal(as_rows(day_of(remote)), want)
    remote.compact("BTC", DAY)
    pd.testing.assert_frame_equal(as_rows(day_of(remote)), want)
    assert len(remote._files.all_names(remote._day_folder("BTC", MIDNIGHT.date()))) == 1
    remote.write_snapshot(snapshot(7), "BTC", MIDNIGHT + pd.Timedelta(minutes=7))
    assert remote.compact("BTC", DAY).snapshots == 6 and len(day_of(remote).refs) == 6
    assert Store(f"file://{tmp_path}").find("BTC") == local.find("BTC")
    remote.write_history("BTC", "dvol", pd.DataFrame({"timestamp": [MIDNIGHT], "close": [45.0]}))
    history = remote.read_history("BTC", "dvol")
    assert history is not None and len(history) == 1 and remote.assets() == ["BTC"]


def test_required_columns_are_the_layout_less_the_optional():
    assert list(REQUIRED_COLUMNS) == [c for c in PLAIN.column_names] == [c for c in COLUMN_KINDS if c in REQUIRED_COLUMNS]


REAL = real_data_root()


@pytest.mark.skipif(REAL is None, reason="no real market data beside the checkout (VOLCAL_REAL_DATA)")
def test_real_harvests_read_the_same_when_compacted(tmp_path):
    assert REAL is not None
    days = [("live_deribit", "ETH", "2025/12/07"), ("live_deribit", "XRP_USDC", "2025/12/10"), ("orderbook_2023", "BTC", "2023/04/12")]
    for folder, asset, day in days:
        shutil.copytree(REAL / folder / asset / day, tmp_path / folder / asset / day)
        store = Store(tmp_path / folder)
        before = store.read_batch(store.find(asset))
        report = store.compact(asset, day.replace("/", "-"))
        after = store.read_batch(store.find(asset))
        assert report.bytes_after < report.bytes_before and report.snapshots == len(before.refs)
        pd.testing.assert_frame_equal(as_rows(after), as_rows(before))
        assert [f.reason for f in after.failures] == [f.reason for f in before.failures]


@pytest.mark.parametrize("tell_arrow", [True, False], ids=["with the Arrow schema in the footer", "without, as other writers"])
def test_files_alike_are_judged_once_but_each_that_differs_on_its_own(tmp_path, monkeypatch, tell_arrow):
    judged = []
    monkeypatch.setattr(room, "check_schema", lambda schema, judge=room.check_schema: judged.append(schema) or judge(schema))
    monkeypatch.setattr(room, "_SHAPES", {})
    def write(minute: int, frame: pd.DataFrame) -> None:
        path = put(tmp_path, minute, frame)
        pq.write_table(pa.Table.from_pandas(frame, preserve_index=False), path, store_schema=tell_arrow)
    for minute in range(0, 40, 2):
        write(minute, snapshot(minute))
    write(1, snapshot(1).assign(strike="a lot"))
    write(3, snapshot(3).drop(columns="mark_iv"))
    write(5, snapshot(5).assign(strike=np.arange(6, dtype="int32") + 1))
    batch = day_of(Store(tmp_path))
    assert [(f.time.minute, f.reason, f.columns) for f in batch.failures] == [(1, "wrong_kind", ("strike",)), (3, "missing_columns", ("mark_iv",))]
    assert len(batch.refs) == 21 and len(judged) < 10
    assert as_rows(batch).query("minute.dt.minute == 5")["strike"].tolist() == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]


def test_columns_asked_for_are_those_of_a_whole_reading(tmp_path):
    store, wanted = Store(tmp_path), ["harvest_time", "expiry", "mark_price"]
    for minute in (0, 15, 30):
        put(tmp_path, minute, snapshot(minute))
    for _ in range(2):  # as small files, then compacted
        few, every = (store.read_batch(store.find("BTC"), columns).frame for columns in (wanted, None))
        pd.testing.assert_frame_equal(few, every[["snapshot", *wanted]])
        store.compact("BTC", DAY)


def test_a_field_within_a_column_says_nothing_of_the_column_of_its_name(tmp_path):
    table = pa.Table.from_pandas(snapshot(5), preserve_index=False)
    nested = pa.array([{"mark_iv": None, "instrument_name": None}] * len(table), pa.struct([("mark_iv", pa.float64()), ("instrument_name", pa.string())]))
    put(tmp_path, 5, table.append_column("extra", nested))
    store = Store(tmp_path)
    small = as_rows(day_of(store))
    assert small["mark_iv"].eq(45.0).all()
    store.compact("BTC", DAY)
    pd.testing.assert_frame_equal(as_rows(day_of(store)), small)
