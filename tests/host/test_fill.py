"""The fill engine: what it does when sources bring what they should."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import numpy.typing as npt
import pytest
from fillkit import BLOCK, WAIT, FileTarget, Gate, MemorySource, Pack, eventually, make_pack, no_thread_left

from erofsgen.errors import BusyError, ErofsgenError, RemoteError, StorageError, UsageError
from erofsgen.host.fill import engine as engine_module
from erofsgen.host.fill.engine import Engine, Priority, StoreSource
from erofsgen.store.directory import DirectoryStore


@pytest.fixture
def store(store_dir: Path) -> DirectoryStore:
    return DirectoryStore(store_dir)


@pytest.fixture
def target_of(tmp_path: Path) -> Iterator[Callable[[Pack], FileTarget]]:
    made: list[FileTarget] = []

    def make(pack: Pack) -> FileTarget:
        made.append(FileTarget(tmp_path, pack))
        return made[-1]

    yield make
    for target in made:
        target.check()
        target.close()


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    with no_thread_left():
        yield


@pytest.mark.parametrize("raw", [False, True])
def test_a_range_comes_from_a_store(store: DirectoryStore, target_of: Callable[[Pack], FileTarget], raw: bool) -> None:
    pack = make_pack(store, [16, 1, 40, 16, 7], raw=raw)
    target = target_of(pack)
    with Engine([StoreSource(store)]) as engine:
        engine.request(target, 17 * BLOCK + 5, 40 * BLOCK).result(WAIT)
        assert target.check() == [2, 3]
        engine.request(target, 0, pack.toc.device_size).result(WAIT)
        stats = engine.stats()
    assert target.check() == [0, 1, 2, 3, 4]
    assert sorted(target.writes) == [0, 1, 2, 3, 4]
    assert stats["frames"] == 5
    assert stats["bytes_written"] == pack.toc.device_size
    assert stats["bytes_fetched"] == stats["sources"][store.url]["bytes"] == int(pack.toc.sizes.sum())
    assert stats["in_flight"] == 0
    assert stats["demands"] == 2
    assert 0 < stats["demand_p50"] <= stats["demand_p95"] < WAIT


def test_every_offset_and_length_gets_its_frames_and_no_more(
    store: DirectoryStore, target_of: Callable[[Pack], FileTarget]
) -> None:
    pack = make_pack(store, [2, 1, 3])
    ends = [2, 3, 6]
    for first in range(6 * BLOCK, -1, -BLOCK // 2):
        for length in (0, 1, BLOCK, BLOCK + 1, 3 * BLOCK, 99 * BLOCK):
            target = target_of(pack)
            target.presence.clear()
            with Engine([MemorySource([pack])], threads=2) as engine:
                engine.request(target, first, length).result(WAIT)
            asked = range(first, min(first + length, 6 * BLOCK))
            expected = [
                frame
                for frame, (start, end) in enumerate(zip([0, *ends], ends, strict=False))
                if asked and asked.start < end * BLOCK and asked.stop > start * BLOCK
            ]
            assert target.check() == expected, (first, length)


def test_what_is_there_is_done_at_once_without_the_lock(
    store: DirectoryStore, target_of: Callable[[Pack], FileTarget]
) -> None:
    pack = make_pack(store, [1, 1])
    target = target_of(pack)
    source = MemorySource([pack])
    with Engine([source]) as engine:
        engine.request(target, 0, BLOCK).result(WAIT)
        with engine._lock:
            for offset, length in ((0, 1), (0, BLOCK), (5, 0), (2 * BLOCK, 1), (99 * BLOCK, BLOCK)):
                assert engine.request(target, offset, length).done()
        assert engine.request(target, 0, BLOCK).result() is None
    assert engine.request(target, 0, BLOCK).result() is None, "closed, but nothing is to be done"
    assert len(source.reads) == 1


def test_no_range_is_the_callers_fault(store: DirectoryStore, target_of: Callable[[Pack], FileTarget]) -> None:
    target = target_of(make_pack(store, [1]))
    with Engine([MemorySource([])]) as engine:
        for offset, length in ((-1, 5), (0, -1)):
            with pytest.raises(UsageError, match="no range"):
                engine.request(target, offset, length).result(WAIT)


def test_64_threads_get_every_frame_once(store: DirectoryStore, target_of: Callable[[Pack], FileTarget]) -> None:
    packs = [make_pack(store, [1, 2, 3, 4] * 25, seed=1), make_pack(store, [5] * 50, raw=True, seed=2)]
    targets = [target_of(pack) for pack in packs]
    source = MemorySource(packs, before=lambda _: time.sleep(0.0005))
    failures: list[BaseException] = []
    go = threading.Barrier(64)

    def hammer(seed: int) -> None:
        choice = random.Random(seed)
        go.wait()
        try:
            for _ in range(30):
                target = choice.choice(targets)
                offset = choice.randrange(target.toc.device_size)
                length = choice.choice((1, BLOCK, 20 * BLOCK, 60 * BLOCK))
                engine.request(target, offset, length, priority=choice.choice(list(Priority))).result(WAIT)
                frames = target.toc.frames(offset, min(length, target.toc.device_size - offset))
                assert target.ready(frames[0], frames[-1]), "a done future promises the bytes"
        except BaseException as error:
            failures.append(error)

    with Engine([source], threads=6) as engine:
        threads = [threading.Thread(target=hammer, args=(seed,)) for seed in range(64)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        for target in targets:
            engine.request(target, 0, target.toc.device_size).result(WAIT)
        stats = engine.stats()
    for target in targets:
        assert sorted(target.writes) == list(range(len(target.toc)))
        assert target.check() == list(range(len(target.toc)))
    assert sum(source.fetched.values()) == 150
    assert stats["frames"] == 150
    assert stats["single_flight_hits"] > 0
    assert stats["in_flight"] == 0
    assert set(stats["queued"].values()) == {0}


def test_neighbours_are_read_together(store: DirectoryStore, target_of: Callable[[Pack], FileTarget]) -> None:
    pack = make_pack(store, [4] * 64, raw=True)
    target = target_of(pack)
    gate = Gate()
    source = MemorySource([pack], before=gate)
    with Engine([source], threads=2, read_size=10 * 4 * BLOCK) as engine:
        blockers = [engine.request(target, frame * 4 * BLOCK, 1) for frame in (62, 0)]
        gate.wait_for(2)
        # in any order, and with a frame (20) that nobody asked for
        futures = [engine.request(target, frame * 4 * BLOCK, 1) for frame in [*range(39, 20, -1), *range(10, 20)]]
        gate.open()
        wait([*blockers, *futures], WAIT)
    ranges = [read.frames for read in source.reads[2:]]
    assert sorted(frame for frames in ranges for frame in frames) == [*range(10, 20), *range(21, 40)]
    assert len(ranges) == 3, "10 frames, 10, and 9"
    assert max(map(len, ranges)) == 10
    assert engine.stats()["coalesced_reads"] == 3


def test_a_frame_larger_than_a_read_or_all_memory_comes_alone(
    store: DirectoryStore, target_of: Callable[[Pack], FileTarget]
) -> None:
    pack = make_pack(store, [64, 1, 64, 1])
    target = target_of(pack)
    source = MemorySource([pack])
    with Engine([source], read_size=BLOCK, memory=16 * BLOCK) as engine:
        engine.request(target, 0, pack.toc.device_size).result(WAIT)
        engine.request(target_of(make_pack(store, [])), 0, 5).result(WAIT)
    assert target.check() == [0, 1, 2, 3]
    assert all(len(read.frames) == 1 for read in source.reads)


def test_demand_overtakes_a_thousand_prefetches(store: DirectoryStore, target_of: Callable[[Pack], FileTarget]) -> None:
    pack = make_pack(store, [1] * 1100)
    target = target_of(pack)
    gate = Gate()
    source = MemorySource([pack], before=gate)
    with Engine([source], threads=4, read_size=1) as engine:
        prefetch = engine.request(target, 0, 1000 * BLOCK, priority=Priority.PREFETCH)
        gate.wait_for(3)  # three threads of the four, and no more
        assert engine.stats()["queued"]["prefetch"] == 997
        around = engine.request(target, 1010 * BLOCK, BLOCK, priority=Priority.READ_AROUND)
        promoted = engine.request(target, 900 * BLOCK, BLOCK)
        demand = engine.request(target, 1050 * BLOCK, BLOCK)
        gate.wait_for(4)
        assert engine.stats()["queued"] == {"demand": 1, "read_around": 1, "prefetch": 996, "scrub": 0}
        gate.open()
        wait([demand, around, promoted, prefetch], WAIT)
    order = [read.frames[0] for read in source.reads]
    assert order[:3] == [0, 1, 2]
    assert order[3] == 900
    assert order.index(1050) < 10, "right behind what was under way"
    assert order.index(1010) < 10
    assert order.index(1050) < order.index(1010)
    assert len(order) == 1002


def test_background_leaves_a_thread_even_when_sources_hang(
    store: DirectoryStore, target_of: Callable[[Pack], FileTarget]
) -> None:
    pack = make_pack(store, [1] * 40)
    target = target_of(pack)
    gate = Gate()
    source = MemorySource([pack], before=lambda frames: gate(frames) if frames[0] < 30 else None)
    with Engine([source], threads=8, read_size=1) as engine:
        slow = engine.request(target, 0, 30 * BLOCK, priority=Priority.PREFETCH)
        gate.wait_for(6)
        engine.request(target, 35 * BLOCK, BLOCK).result(WAIT)
        assert not slow.done()
        assert len(source.reads) == 7
        gate.open()
        slow.result(WAIT)


class SlowTarget(FileTarget):
    """Lets a test hold up writes; ``before`` sees every frame."""

    before: Callable[[int], object] = staticmethod(lambda _: None)

    def write_frame(self, frame: int, data: bytes) -> None:
        self.before(frame)
        super().write_frame(frame, data)


def test_background_is_not_written_while_demand_is(store: DirectoryStore, tmp_path: Path) -> None:
    pack = make_pack(store, [1] * 12)
    target = SlowTarget(tmp_path, pack)
    entered, release, late = threading.Event(), threading.Event(), threading.Event()

    def before(frame: int) -> None:
        if frame == 11:
            entered.set()
            assert release.wait(WAIT)

    target.before = before
    hold = Gate()
    source = MemorySource([pack], before=lambda frames: hold(frames) if frames[0] == 0 else None)
    with Engine([source], threads=4, cores=4) as engine:
        prefetch = engine.request(target, 0, 10 * BLOCK, priority=Priority.PREFETCH)
        hold.wait_for()
        demand = engine.request(target, 11 * BLOCK, BLOCK)
        assert entered.wait(WAIT)
        hold.open()  # ten frames are there to be opened now
        eventually(lambda: engine.stats()["reads"] == 2)
        assert not late.wait(0.1)
        assert target.writes == []
        joined = engine.request(target, 5 * BLOCK, BLOCK)  # a demand for one of them takes it along
        joined.result(WAIT)
        assert target.writes == [5]
        release.set()
        wait([demand, prefetch], WAIT)
    assert target.check() == [*range(10), 11]
    target.close()


def test_no_more_background_is_opened_than_there_are_cores(store: DirectoryStore, tmp_path: Path) -> None:
    pack = make_pack(store, [1] * 60)
    target = SlowTarget(tmp_path, pack)
    lock, now, most = threading.Lock(), 0, 0

    def before(_: int) -> None:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.001)
        with lock:
            now -= 1

    target.before = before
    with Engine([MemorySource([pack])], threads=8, cores=2) as engine:
        engine.request(target, 0, 60 * BLOCK, priority=Priority.READ_AROUND).result(WAIT)
        assert most == 2
    target.close()


@pytest.mark.parametrize("raw", [False, True])
def test_memory_in_flight_is_bounded(
    store: DirectoryStore, tmp_path: Path, raw: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = make_pack(store, [16] * 400, raw=raw)
    target = SlowTarget(tmp_path, pack)
    lock, held, most, read = threading.RLock(), 0, 0, 0  # a finaliser may run anywhere

    def gone(length: int) -> None:
        nonlocal held
        with lock:
            held -= length

    def count(length: int, kind: type[np.uint8]) -> npt.NDArray[np.uint8]:
        nonlocal held, most, read
        counted = np.empty(length, kind)
        with lock:
            held += length
            read += length
            most = max(most, held)
        weakref.finalize(counted, gone, length).atexit = False
        return counted

    monkeypatch.setattr(engine_module, "np", SimpleNamespace(empty=count, uint8=np.uint8))
    memory = 4 << 20
    with Engine([MemorySource([pack])], threads=8, memory=memory) as engine:
        target.before = lambda _: time.sleep(0.0005)  # slower than the source
        futures = [engine.request(target, 0, pack.toc.device_size, priority=Priority.PREFETCH)]
        futures += [engine.request(target, frame * 16 * BLOCK, BLOCK) for frame in range(390, 400)]
        wait(futures, WAIT)
        stats = engine.stats()
        eventually(lambda: held == 0)
    assert read >= 2.5 * memory, "or the bound was never near"
    assert memory / 8 < most < memory
    assert most <= stats["in_flight_peak"] <= memory
    assert stats["in_flight"] == 0
    assert target.check() == list(range(400))
    target.close()


def test_large_demand_is_not_starved_of_memory_by_small_background(
    store: DirectoryStore, target_of: Callable[[Pack], FileTarget]
) -> None:
    pack = make_pack(store, [1] * 400 + [100])
    target = target_of(pack)
    source = MemorySource([pack], before=lambda _: time.sleep(0.002))
    with Engine([source], threads=8, memory=240 * BLOCK, read_size=24 * BLOCK) as engine:
        prefetch = engine.request(target, 0, 400 * BLOCK, priority=Priority.PREFETCH)
        eventually(lambda: engine.stats()["in_flight"] > 100 * BLOCK)
        engine.request(target, 400 * BLOCK, BLOCK).result(WAIT)
        assert not prefetch.done()
        prefetch.result(WAIT)


def test_deadline_fails_the_request_and_the_fetch_goes_on(
    store: DirectoryStore, target_of: Callable[[Pack], FileTarget]
) -> None:
    pack = make_pack(store, [1] * 4)
    target = target_of(pack)
    gate = Gate()
    with Engine([MemorySource([pack], before=gate)], threads=2, read_size=1) as engine:
        started = time.monotonic()
        patient = engine.request(target, 0, BLOCK)
        hasty = engine.request(target, 0, 4 * BLOCK, deadline=started + 0.1)
        past = engine.request(target, 0, BLOCK, deadline=started - 1)
        with pytest.raises(RemoteError, match=f"pack {pack.hex}: bytes 0\\+16384 did not arrive in time"):
            hasty.result(WAIT)
        assert 0.1 <= time.monotonic() - started < 1
        with pytest.raises(ErofsgenError, match="in time"):
            past.result(WAIT)
        assert not patient.done()
        gate.open()
        patient.result(WAIT)
        eventually(lambda: not len(engine._schedule))
        assert engine.request(target, 0, BLOCK, deadline=started - 1).done(), "there, so no deadline is missed"
        stats = engine.stats()
    assert target.check()[0] == 0
    assert len(target.writes) < 4, "what nobody waits for any more is not begun"
    assert stats["expired_requests"] == 2
    assert stats["queued"]["demand"] == 0


def test_deadlines_need_no_order(store: DirectoryStore, target_of: Callable[[Pack], FileTarget]) -> None:
    pack = make_pack(store, [1] * 30)
    target = target_of(pack)
    gate = Gate()
    with Engine([MemorySource([pack], before=gate)], threads=2) as engine:
        now = time.monotonic()
        delays = [0.3, 0.05, 0.2, 0.1, 30.0, 0.15, 0.25]
        ends: dict[float, float] = {}
        for number, delay in enumerate(delays):
            future = engine.request(target, number * BLOCK, 1, deadline=now + delay)
            future.add_done_callback(lambda _, delay=delay: ends.setdefault(delay, time.monotonic() - now))
        eventually(lambda: len(ends) == 6)
        gate.open()
        eventually(lambda: len(ends) == 7)
    assert ends.pop(30.0) < 30
    for delay, after in ends.items():
        assert delay <= after < delay + 0.1


class BadTarget(FileTarget):
    """Raises where it is told to."""

    fails: str = ""
    error: BaseException = RuntimeError("no such luck")

    def write_frame(self, frame: int, data: bytes) -> None:
        if self.fails == "write" and frame == 1:
            raise self.error
        super().write_frame(frame, data)


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (OSError(28, "No space left on device"), StorageError, "frame 1 was not written: .*No space left"),
        (RuntimeError("no such luck"), StorageError, "frame 1 was not written: RuntimeError: no such luck"),
        (SystemExit(3), StorageError, "frame 1 was not written: SystemExit: 3"),
        (StorageError("/cache: full"), StorageError, "^/cache: full$"),
    ],
)
def test_target_that_cannot_write_fails_whom_it_concerns(
    store: DirectoryStore, tmp_path: Path, error: BaseException, kind: type[ErofsgenError], text: str
) -> None:
    pack = make_pack(store, [1] * 3)
    target = BadTarget(tmp_path, pack)
    target.fails, target.error = "write", error
    source = MemorySource([pack])
    with Engine([source], threads=2) as engine:
        future = engine.request(target, 0, 3 * BLOCK)
        with pytest.raises(kind, match=text):
            future.result(WAIT)
        engine.request(target, 0, BLOCK).result(WAIT)
        engine.request(target, 2 * BLOCK, BLOCK).result(WAIT)
        assert target.check() == [0, 2]
        target.fails = ""
        engine.request(target, 0, 3 * BLOCK).result(WAIT)
        stats = engine.stats()
    assert target.check() == [0, 1, 2]
    assert source.fetched[1] == 2, "the source is not to blame for what the target does"
    assert stats["sources"]["memory"]["bad_frames"] == stats["sources"]["memory"]["failed"] == 0
    assert stats["in_flight"] == 0
    target.close()


@pytest.mark.parametrize("method", ["ready", "missing"])
def test_target_that_raises_fails_its_requests_alone(
    store: DirectoryStore, tmp_path: Path, target_of: Callable[[Pack], FileTarget], method: str
) -> None:
    pack = make_pack(store, [1] * 600)
    good = target_of(pack)
    bad = FileTarget(tmp_path, make_pack(store, [1] * 600, seed=2))
    calls = 0
    asked = bad.missing

    def fail(*arguments: object) -> list[int]:
        nonlocal calls
        calls += 1
        if method == "missing" and calls == 1:
            return asked(*arguments)  # type: ignore[arg-type]
        raise RuntimeError("torn")

    setattr(bad, method, fail)
    with Engine([MemorySource([pack, bad.pack])], threads=2) as engine:
        failed = engine.request(bad, 0, 600 * BLOCK, deadline=time.monotonic() + 60)
        engine.request(good, 0, 600 * BLOCK).result(WAIT)
        with pytest.raises(StorageError, match="the target failed: RuntimeError: torn"):
            failed.result(WAIT)
        eventually(lambda: not len(engine._schedule))
        assert engine.stats()["queued"]["demand"] == 0
    bad.close()


def test_closing_fails_what_waits_and_finishes_what_runs(
    store: DirectoryStore, target_of: Callable[[Pack], FileTarget]
) -> None:
    pack = make_pack(store, [1] * 20)
    target = target_of(pack)
    gate = Gate()
    engine = Engine([MemorySource([pack], before=gate)], threads=2, read_size=1)
    futures = [engine.request(target, frame * BLOCK, 1) for frame in range(20)]
    gate.wait_for(2)
    threading.Timer(0.05, gate.open).start()
    engine.close()
    assert all(future.done() for future in futures)
    done = [frame for frame, future in enumerate(futures) if future.exception() is None]
    assert done == target.check() == [0, 1]
    for future in futures[2:]:
        with pytest.raises(BusyError, match="closed"):
            future.result()
    with pytest.raises(BusyError, match="closed"):
        engine.request(target, 19 * BLOCK, 1).result(WAIT)
    engine.close()


def test_closing_does_not_wait_for_ever(store: DirectoryStore, target_of: Callable[[Pack], FileTarget]) -> None:
    pack = make_pack(store, [1] * 2)
    target = target_of(pack)
    gate = Gate()
    engine = Engine([MemorySource([pack], before=gate)], threads=2)
    future = engine.request(target, 0, BLOCK)
    gate.wait_for()
    engine.close(timeout=0.05)
    with pytest.raises(BusyError, match="closed"):
        future.result(0)
    gate.open()


def test_a_callback_may_ask_for_more_and_close(store: DirectoryStore, target_of: Callable[[Pack], FileTarget]) -> None:
    pack = make_pack(store, [1] * 3)
    target = target_of(pack)
    closed = threading.Event()
    engine = Engine([MemorySource([pack])], threads=2)

    def close(_: object) -> None:
        engine.close()
        closed.set()

    def more(_: object) -> None:
        engine.request(target, BLOCK, BLOCK).add_done_callback(close)

    engine.request(target, 0, BLOCK).add_done_callback(more)
    assert closed.wait(WAIT)
    assert target.check() == [0, 1]


def test_nothing_is_written_to_a_target_once_it_is_forgotten(store: DirectoryStore, tmp_path: Path) -> None:
    packs = [make_pack(store, [1] * 30, seed=seed) for seed in (1, 2)]
    target, other = SlowTarget(tmp_path, packs[0]), FileTarget(tmp_path, packs[1])
    entered, release = threading.Event(), threading.Event()

    def before(_: int) -> None:
        entered.set()
        assert release.wait(WAIT)

    target.before = before
    gate = Gate()
    source = MemorySource(packs, before=lambda frames: gate(frames) if frames[0] == 10 else None)
    with Engine([source], threads=4, read_size=2 * BLOCK, cores=1) as engine:
        waiting = engine.request(other, 10 * BLOCK, BLOCK)  # in the source
        futures = [engine.request(target, 10 * BLOCK, BLOCK)]  # in the source
        gate.wait_for(2)
        futures += [engine.request(target, 0, 10 * BLOCK, priority=Priority.PREFETCH)]
        assert entered.wait(WAIT)  # in the target, and others behind it
        threading.Timer(0.05, release.set).start()
        engine.forget(target)
        written = list(target.writes)
        assert len(written) == 1
        for future in futures:
            with pytest.raises(BusyError, match=f"pack {packs[0].hex}: no longer in use"):
                future.result(WAIT)
        gate.open()
        waiting.result(WAIT)
        engine.request(other, 0, 30 * BLOCK).result(WAIT)
        eventually(lambda: engine.stats()["in_flight"] == 0)
        assert target.writes == written
        assert len(engine._schedule) == 0
        engine.forget(target)
        engine.request(target, 0, 30 * BLOCK).result(WAIT)
    assert target.check() == list(range(30))
    target.close()
    other.close()


def test_killed_in_the_midst_of_filling_it_has_marked_no_wrong_frame(
    store: DirectoryStore, store_dir: Path, tmp_path: Path
) -> None:
    pack = make_pack(store, [32] * 150)
    code = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from fillkit import FileTarget, make_pack
from erofsgen.host.fill.engine import Engine, Priority, StoreSource
from erofsgen.store.directory import DirectoryStore
store = DirectoryStore(sys.argv[2])
target = FileTarget(Path(sys.argv[3]), make_pack(store, [32] * 150))
engine = Engine([StoreSource(store)])
print("go", flush=True)
engine.request(target, 0, 1 << 40, priority=Priority.PREFETCH).result()
print("done", flush=True)
sys.stdin.readline()
"""
    directory = tmp_path / "cache"
    directory.mkdir()
    counts = []
    for seed in range(40):
        arguments = [Path(__file__).parent, store_dir, directory]
        child = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        with child:
            assert child.stdout is not None
            assert child.stdout.readline() == b"go\n"
            time.sleep(random.Random(seed).uniform(0.01, 0.06))
            child.kill()
            child.wait()
        target = FileTarget(directory, pack)
        counts.append(len(target.check()))
        target.presence.clear()
        target.close()
        if len(counts) >= 5 and any(0 < count < 150 for count in counts):
            break
    assert any(0 < count < 150 for count in counts), f"{counts}: killed in the midst of it at least once"


def test_a_demand_for_one_local_frame_costs_little(
    store: DirectoryStore, target_of: Callable[[Pack], FileTarget]
) -> None:
    """What the engine adds, threads and all, to reading, checking and writing: 0.2 ms are the aim. The bound is for
    machines that others use as well, and against what is quadratic or sleeps."""
    pack = make_pack(store, [1] * 400)
    target = target_of(pack)
    with Engine([MemorySource([pack])]) as engine:
        times = []
        for frame in range(400):
            started = time.perf_counter()
            engine.request(target, frame * BLOCK, BLOCK, deadline=time.monotonic() + 30).result(WAIT)
            times.append(time.perf_counter() - started)
    assert sorted(times)[200] < 0.002
