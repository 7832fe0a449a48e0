"""Client, harvester and replay exchange over real HTTP: faults, kills, signals, concurrency, rates."""
import asyncio
import itertools
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from volcal.market.deribit import CreditBucket, Deribit, DeribitCallError, RetryPolicy, index_of, shared_bucket
from volcal.market.harvester import (
    Book,
    Manifest,
    backfill,
    harvest_once,
    harvest_status,
    keep_book,
    recover,
    run_harvester,
    snapshot_frame,
)
from volcal.market.pricing import black76_price
from volcal.market.replay import FAULT_KINDS, Fault, ReplayExchange, differences, lowest_credits
from volcal.market.store import Store, harvest_table
from volcal.units import StoreError

START = pd.Timestamp("2026-03-02T08:00:07.123456Z")
MINUTE = pd.Timedelta(minutes=1)
LEVELS = {"BTC": 90_000.0, "ETH": 3_000.0, "SOL_USDC": 140.0, "XRP_USDC": 2.0}


def unlimited() -> CreditBucket:
    return CreditBucket(1e12, 1e12)


def stubborn(url: str, **kwargs) -> Deribit:
    policy = dict(base_seconds=0.001, cap_seconds=0.004, deadline_seconds=30.0, timeout_seconds=5.0, max_attempts=40, shape_attempts=40)
    return Deribit(url, retry=RetryPolicy(**(policy | kwargs)), bucket=unlimited(), seed=3)


def book_rows(asset: str, when: pd.Timestamp, level: float, strikes: int = 4) -> list[dict]:
    """A book as the exchange sends it: three expiries, calls and puts."""
    rows, linear = [], asset.endswith("_USDC")
    for expiry in pd.to_datetime(["2026-03-06T08:00Z", "2026-03-27T08:00Z", "2026-06-26T08:00Z"]):
        t = (expiry - when) / pd.Timedelta(days=365)
        forward = level * float(np.exp(0.05 * t))
        for k, side in itertools.product(np.linspace(0.8, 1.25, strikes), "CP"):
            strike = float(f"{LEVELS[asset] * k:.3g}")
            name = f"{asset}-{expiry.day}{expiry:%b%y}-{strike:g}-{side}".upper().replace(".", "d")
            iv = 45.0 + round(30 * float(np.log(strike / forward)) ** 2, 2)
            mark = float(black76_price(forward, strike, t, iv / 100, side)) / (1 if linear else forward)
            quotes = {"bid_price": mark * 0.97 if mark > 1e-4 else None, "ask_price": mark * 1.03, "open_interest": 5.0, "volume": 0.5}
            index = {"underlying_index": f"SYN.{asset}", "estimated_delivery_price": level}
            of_forward = {"underlying_price": forward, "interest_rate": 0.0} | index
            own = {"instrument_name": name, "creation_timestamp": when.value / 1e6, "mark_price": mark, "mark_iv": iv}
            rows.append(own | quotes | of_forward)
    return rows


def made_up_store(root: Path, assets=tuple(LEVELS), minutes: int = 10, strikes: int = 4) -> Store:
    """A harvest as volcal writes it, one snapshot a minute."""
    store, rng = Store(root), np.random.default_rng(42)
    for asset in assets:
        for i, move in enumerate(np.cumsum(rng.normal(0, 0.001, minutes))):
            when, level = START + i * MINUTE, round(LEVELS[asset] * float(np.exp(move)), 4)
            folder = Path(root) / asset / f"{when:%Y/%m/%d}"
            folder.mkdir(parents=True, exist_ok=True)
            table = harvest_table(snapshot_frame(book_rows(asset, when, level, strikes), asset, level))
            pq.write_table(table, folder / f"{asset}_{when:%Y-%m-%d_%H%M}.parquet")
    return store


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return made_up_store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def child_env(tmp_path_factory) -> dict[str, str]:
    """Environment of child processes: compiled Python is kept, as in any installation, also where this one forbids it."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"} | {"PYTHONPYCACHEPREFIX": str(tmp_path_factory.mktemp("pyc"))}
    subprocess.run([sys.executable, "-c", "import volcal.market.replay, httpx, numba.np.arraymath"], env=env, check=True, timeout=120)
    return env


def assert_same_harvest(original: Store, copy: Store, asset: str, skipped: int = 0) -> None:
    """Every snapshot of the copy is one of the original, column by column, each once; `skipped` are not there."""
    here = {ref.time: ref for ref in original.find(asset)}
    there = copy.find(asset)
    assert len({ref.time for ref in there}) == len(there)
    assert len(here) - len(there) == skipped
    for ref in there:
        before, after = original.read(here[ref.time]), copy.read(ref)
        pd.testing.assert_frame_equal(before, after, check_exact=True)


# --- the harvester under faults


def test_a_thousand_requests_at_one_fault_in_five(tmp_path):
    """Nothing that the exchange could have given is lost or doubled; what it could not give is labelled."""
    minutes = 116
    original = made_up_store(tmp_path / "store", minutes=minutes, strikes=1)
    copy = Store(tmp_path / "copy")

    class Outage:
        """The exchange's clock; books are in maintenance for four minutes."""

        def __init__(self, exchange):
            self.exchange = exchange

        def now(self):
            return self.exchange.clock.now()

        def wait_until(self, when, stop):
            if when == pd.Timestamp("2026-03-02T08:40Z"):
                self.exchange.faults.clear()
                self.exchange.inject(Fault("maintenance", method="get_book_summary_by_currency"))
            if when == pd.Timestamp("2026-03-02T08:44Z"):
                self.exchange.faults.clear()
                self.exchange.inject(Fault("all", 0.2, seconds=0.005))
            return self.exchange.clock.wait_until(when, stop)

    with ReplayExchange(original, at="2026-03-02T08:00Z", faults=[Fault("all", 0.2, seconds=0.005)], seed=11) as exchange:
        run = run_harvester(copy, list(LEVELS), "1m", stubborn(exchange.url), Outage(exchange), max_ticks=minutes)
        asked = [r for r in exchange.requests if r.method != "get_time"]
    struck = [r for r in asked if r.fault]
    assert len(asked) >= 1000 and {r.fault for r in struck} == set(FAULT_KINDS)
    assert run.ticks == minutes
    for asset in LEVELS:
        entries = Manifest(copy, asset).read()
        assert len(entries) == minutes, "one line a tick"
        missing = [e.tick[11:16] for e in entries if e.status != "present"]
        assert missing == ["08:40", "08:41", "08:42", "08:43"]
        assert {e.reason for e in entries if e.status != "present"} == {"maintenance"}, [e.detail for e in entries if e.reason]
        assert_same_harvest(original, copy, asset, skipped=4)


@pytest.mark.parametrize("kind", sorted(set(FAULT_KINDS) - {"empty"}))
def test_a_lasting_fault_is_a_clear_error_in_time(store, kind):
    with ReplayExchange(store, at="2026-03-02T08:05Z", faults=[Fault(kind, seconds=3.0)]) as exchange:
        policy = RetryPolicy(base_seconds=0.01, cap_seconds=0.05, timeout_seconds=0.3, deadline_seconds=0.8)
        client = Deribit(exchange.url, retry=policy, bucket=unlimited())
        started = time.monotonic()
        with pytest.raises(DeribitCallError) as caught:
            client.get_book_summary_by_currency("BTC")
    assert time.monotonic() - started < 1.6
    assert "public/get_book_summary_by_currency" in str(caught.value)
    assert caught.value.kind in {"shape", "timeout", "rate_limit", "maintenance", "busy", "server", "connection"}
    if kind in ("missing_field", "wrong_type"):
        assert caught.value.field.startswith("result[")


def test_an_empty_book_is_labelled_and_an_index_alone_is_no_loss(store, tmp_path):
    faults = [Fault("empty", method="get_book_summary_by_currency"), Fault("server_error", method="get_index_price")]
    with ReplayExchange(store, at="2026-03-02T08:05Z", faults=faults) as exchange:
        client = stubborn(exchange.url, max_attempts=3)
        empty = harvest_once(tmp_path, ["BTC", "SOL_USDC"], client)
        exchange.faults.clear()
        exchange.inject(Fault("server_error", method="get_index_price"))
        without = harvest_once(tmp_path, ["BTC", "SOL_USDC"], client)
    assert [(e.status, e.reason) for e in empty] == [("gap", "empty")] * 2
    assert [e.status for e in without] == ["present"] * 2 and all("no index price" in e.detail for e in without)


def test_backfill_under_faults_is_complete(store, tmp_path):
    hours = pd.date_range("2026-01-01", "2026-03-02T12:00", freq="1h", tz="UTC")
    price = 90_000 * np.exp(np.cumsum(np.random.default_rng(1).normal(0, 0.004, len(hours))))
    source = Store(tmp_path / "source")
    source.write_snapshot(store.read(store.find("BTC")[0]), "BTC", START)
    candles = pd.DataFrame({"timestamp": hours, "open": price, "high": price, "low": price, "close": price, "volume": 1.0})
    source.write_history("BTC", "ohlc", candles)
    source.write_history("BTC", "dvol", candles.drop(columns="volume"))
    with ReplayExchange(source, at="2026-03-02T10:30Z", faults=[Fault("all", 0.2, seconds=0.005)], seed=5) as exchange:
        client = stubborn(exchange.url)
        backfill(tmp_path / "copy", ["BTC"], "2026-01-01", "2026-02-01", client=client)
        reports = backfill(tmp_path / "copy", ["BTC"], client=client)
    assert [(r.kind, r.missing, r.error) for r in reports] == [("ohlc", 0, ""), ("dvol", 0, "")]
    for kind in ("ohlc", "dvol"):
        got, want = Store(tmp_path / "copy").read_history("BTC", kind), source.read_history("BTC", kind)
        want = want[want["timestamp"] <= pd.Timestamp("2026-03-02T09:00Z")]  # the candle of 10:00 was not finished
        np.testing.assert_array_equal(got[["open", "close"]], want[["open", "close"]])
        assert got["timestamp"].tolist() == want["timestamp"].tolist()


# --- kills and signals

KILLED_WRITE = textwrap.dedent("""
    import os, signal, sys
    import pandas as pd
    sys.path.insert(0, {tests!r})
    import test_live_io as t
    from volcal.market import harvester, store as room
    root = sys.argv[1]
    FILES = (harvester.__file__, room.__file__)
    rows = t.book_rows("BTC", t.START, 90_000.0)

    def write(folder):
        store = room.Store(folder)
        entry = harvester.keep_book(store, harvester.Book("BTC", rows, 90_000.0), t.START.floor("min"), 1)
        harvester.Manifest(store, "BTC").append(entry)

    def killed_at(step, folder):
        seen, writing = 0, False
        def trace(frame, event, arg):
            nonlocal seen
            nonlocal writing
            writing = writing or frame.f_code.co_name == "lock"
            if not writing or frame.f_code.co_filename not in FILES or frame.f_code.co_name.startswith("<"):
                return None
            if event in ("line", "return"):
                seen += 1
                if seen == step:
                    os.kill(os.getpid(), signal.SIGKILL)
            return trace
        sys.settrace(trace)
        write(folder)

    step, stride = 1, int(sys.argv[2])
    while True:
        folder = os.path.join(root, str(step))
        child = os.fork()
        if child == 0:
            killed_at(step, folder)
            os._exit(0)
        if os.waitpid(child, 0)[1] == 0:
            print(step)
            break
        step += stride
""")


def test_sigkill_at_every_step_of_a_write_leaves_whole_files_only(tmp_path):
    """A fork per step: killed at the n-th traced line of store and harvester, then judged, then resumed."""
    code = KILLED_WRITE.format(tests=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path), "1"], capture_output=True, text=True, check=True, timeout=120)
    steps = int(done.stdout)
    assert steps > 50, "too few steps were traced to mean anything"
    tick = START.floor("min")
    whole = snapshot_frame(book_rows("BTC", START, 90_000.0), "BTC", 90_000.0)
    states = {"nothing": 0, "written, not noted": 0, "noted": 0}
    for folder in (p for p in tmp_path.iterdir() if p.is_dir()):
        store = Store(folder)
        refs = store.find("BTC") if (folder / "BTC").is_dir() else []
        for ref in refs:
            assert len(store.read(ref)) == len(whole)
            assert differences(whole, store.read(ref)).sum() == 0
        noted = [e for e in Manifest(store, "BTC").read() if e.status == "present"]
        assert len(noted) <= len(refs) <= 1
        states["noted" if noted else "written, not noted" if refs else "nothing"] += 1
        manifest = Manifest(store, "BTC")
        if not noted:  # the restart: the line of the tick before is there, as in a run
            manifest.append(keep_book(store, Book("BTC", [], note="before"), tick - MINUTE, 1))
            recover(store, manifest, MINUTE, tick)
            if not any(e.due == tick and e.status == "present" for e in manifest.read()):
                manifest.append(keep_book(store, Book("BTC", book_rows("BTC", START, 90_000.0), 90_000.0), tick, 1))
        at_tick = [e for e in manifest.read() if e.due == tick]
        assert [e.status for e in at_tick] == ["present"] and len(store.find("BTC")) == 1
    assert all(states.values()), states


RUN = textwrap.dedent("""
    import sys
    sys.path.insert(0, {tests!r})
    import test_live_io as t
    from volcal.market.harvester import run_harvester
    run = run_harvester(sys.argv[1], ["BTC", "SOL_USDC"], "1m", t.stubborn({url!r}), speed={speed})
    print(run.ticks, run.stopped)
""")


def start_harvester(root: Path, url: str, speed: float, env: dict[str, str]) -> subprocess.Popen:
    code = RUN.format(tests=str(Path(__file__).parent), url=url, speed=speed)
    return subprocess.Popen([sys.executable, "-c", code, str(root)], stdout=subprocess.PIPE, text=True, env=env)


def wait_for(condition, seconds: float = 30.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)


def test_kills_and_a_sigterm_neither_lose_nor_double(tmp_path, child_env):
    """A harvest at speed is killed, comes back, and is asked to end: every tick has one fate, every file is the store's."""
    speed = 60.0
    original = made_up_store(tmp_path / "store", ("BTC", "SOL_USDC"), minutes=90)
    copy = Store(tmp_path / "copy")
    rng = random.Random(5)

    def harvested() -> int:
        try:
            return len(copy.find("SOL_USDC"))
        except StoreError:
            return 0

    with ReplayExchange(original, speed=speed, faults=[Fault("all", 0.1, seconds=0.01)], seed=5) as exchange:
        for _ in range(2):
            before, process = harvested(), start_harvester(tmp_path / "copy", exchange.url, speed, child_env)
            wait_for(lambda before=before: harvested() > before)
            time.sleep(rng.uniform(0, 1.0))
            process.kill()
            process.wait()
        before, process = harvested(), start_harvester(tmp_path / "copy", exchange.url, speed, child_env)
        wait_for(lambda: harvested() > before)
        process.send_signal(signal.SIGTERM)
        told, _ = process.communicate(timeout=10)
        assert process.returncode == 0 and told.split()[1] == "True"
        assert exchange.clock.now() < START + 90 * MINUTE, "the store ran out, so the test proves nothing"
    for asset in ("BTC", "SOL_USDC"):
        entries = Manifest(copy, asset).read()
        due = [e.due + i * MINUTE for e in entries for i in range(e.ticks)]
        assert due == list(pd.date_range(due[0], due[-1], freq="1min")), "each tick once, none left out"
        assert {e.reason for e in entries} <= {"", "not_running", "stale"}
        present = [e for e in entries if e.status == "present"]
        assert len(present) == len(copy.find(asset)) and len({e.path for e in present}) == len(present)
        original_refs = {ref.time: ref for ref in original.find(asset)}
        for ref in copy.find(asset):
            pd.testing.assert_frame_equal(original.read(original_refs[ref.time]), copy.read(ref), check_exact=True)
    assert [s.snapshots for s in harvest_status(copy)] == [len(copy.find(a)) for a in ("BTC", "SOL_USDC")]


# --- concurrency


def test_twenty_callers_never_exceed_the_rate(store):
    """Measured at the exchange's side, with the client's own process-wide credits."""
    with ReplayExchange(store) as exchange:
        clients = [Deribit(exchange.url) for _ in range(4)]
        assert all(c.aio.bucket is shared_bucket(exchange.url) for c in clients)
        with ThreadPoolExecutor(20) as pool:
            list(pool.map(lambda i: [clients[i % 4].get_time() for _ in range(8)], range(20)))
        arrivals = np.array([r.at for r in exchange.requests])
    assert len(arrivals) == 160
    assert lowest_credits(arrivals) >= 0
    assert arrivals.max() - arrivals.min() > 2.5, "a burst of 95, then 20 a second"


def test_the_synchronous_face_works_inside_a_running_loop_and_reuses_its_connection(store, monkeypatch):
    opened = []
    with ReplayExchange(store) as exchange:
        accept = exchange._server.process_request
        monkeypatch.setattr(exchange._server, "process_request", lambda *a: (opened.append(a[1]), accept(*a)))
        client = Deribit(exchange.url, bucket=unlimited())

        async def notebook():
            return [client.get_time() for _ in range(10)] + [await client.aio.get_time()]

        times = asyncio.run(notebook())
        both = asyncio.run(notebook())
    assert len(set(times)) == 1 and times == both
    assert len(opened) <= 3, "one connection for the background loop, one for each of the two others"


def test_threads_share_a_client(store):
    with ReplayExchange(store, at="2026-03-02T08:05Z") as exchange:
        client = Deribit(exchange.url, bucket=unlimited())
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda asset: client.get_index_price(index_of(asset)).index_price, list(LEVELS) * 10))
    assert found == found[:4] * 10 and client.health().calls == 40


def test_two_harvesters_do_not_share_a_root(store, tmp_path):
    with ReplayExchange(store, speed=60.0) as exchange:
        stop = threading.Event()
        arguments = (tmp_path, ["BTC"], "1m", stubborn(exchange.url))
        first = threading.Thread(target=run_harvester, args=arguments, kwargs={"stop": stop, "speed": 60.0})
        first.start()
        try:
            wait_for(lambda: (tmp_path / "BTC").is_dir())
            with pytest.raises(StoreError, match="another harvester"):
                run_harvester(tmp_path, ["BTC"], "1m", stubborn(exchange.url), max_ticks=1)
        finally:
            stop.set()
            first.join(10)
    assert not first.is_alive()


# --- cost


def test_a_tick_of_seven_hundred_options_is_cheap(tmp_path):
    """Book to snapshot on disk, network aside; the least of several, since the machine has other work."""
    rows = book_rows("BTC", START, 90_000.0, strikes=120)
    assert len(rows) >= 700
    store, manifest, costs = Store(tmp_path), Manifest(Store(tmp_path), "BTC"), []
    for i in range(6):
        later = [row | {"creation_timestamp": row["creation_timestamp"] + i * 60_000} for row in rows]
        started = time.perf_counter()
        entry = keep_book(store, Book("BTC", later, 90_000.0), START.floor("min") + i * MINUTE, 1)
        manifest.append(entry)
        costs.append(time.perf_counter() - started)
        assert entry.status == "present", entry
    print("a tick of", len(rows), "options costs", f"{min(costs) * 1e3:.1f} ms;", "all:", [f"{c * 1e3:.0f}" for c in costs])
    assert min(costs) < 0.150


def test_once_ends_soon(tmp_path, store, child_env):
    """`harvest --once` as a process of its own, start-up included; the least of three."""
    code = """if True:
        import sys
        from volcal.market.harvester import harvest_once
        print(*[e.status for e in harvest_once(sys.argv[1], ["BTC", "SOL_USDC"])])
    """
    with ReplayExchange(store) as exchange:
        costs = []
        for i in range(3):
            started = time.perf_counter()
            command, env = [sys.executable, "-c", code, str(tmp_path / str(i))], child_env | {"VOLCAL_DERIBIT_URL": exchange.url}
            done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=60)
            costs.append(time.perf_counter() - started)
            assert done.stdout.split() == ["present", "present"], done.stderr
    print("once:", [f"{c:.2f} s" for c in costs], f"load {os.getloadavg()[0]:.1f}")
    assert min(costs) < 2.0
