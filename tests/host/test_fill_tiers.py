"""The fill engine and tiers that are full, that ask for a pause, or that rest; and what feeds those that lack packs."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fillkit import BLOCK, WAIT, FileTarget, Gate, MemorySource, Pack, eventually, make_pack, no_thread_left

from erofsgen.errors import NotFoundError, RemoteError
from erofsgen.host.daemon.feeder import Feeder
from erofsgen.host.fill import health
from erofsgen.host.fill.engine import Engine, Priority, StoreSource
from erofsgen.host.fill.sources import UrlSource
from erofsgen.store.base import Speed
from erofsgen.store.directory import DirectoryStore

FRAMES = 40


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    with no_thread_left():
        yield


@pytest.fixture
def pack(store_dir: Path) -> Pack:
    return make_pack(DirectoryStore(store_dir), [1] * FRAMES, raw=True)


@pytest.fixture
def target(pack: Pack, tmp_path: Path) -> Iterator[FileTarget]:
    target = FileTarget(tmp_path, pack)
    yield target
    target.check()
    target.close()


class Crowd:
    """Counts how many reads are in a source at a time, and holds them until it is opened."""

    def __init__(self) -> None:
        self.most = self.now = 0
        self._lock = threading.Lock()
        self.gate = Gate()

    def __call__(self, frames: range) -> None:
        with self._lock:
            self.now += 1
            self.most = max(self.most, self.now)
        self.gate(frames)
        with self._lock:
            self.now -= 1


# --- full ------------------------------------------------------------------------------------------------------------


def test_the_background_waits_for_a_full_tier_and_demand_goes_on(pack: Pack, target: FileTarget) -> None:
    crowd = Crowd()
    near = MemorySource([pack], "near", before=crowd, concurrency=2)
    far = MemorySource([pack], "far")
    with Engine([near, far], threads=8, read_size=1) as engine:
        background = engine.request(target, 0, 10 * BLOCK, priority=Priority.PREFETCH)
        crowd.gate.wait_for(2)
        assert engine.stats()["sources"]["near"]["state"] == "full"
        engine.request(target, 20 * BLOCK, 1).result(WAIT)
        assert far.fetched == {20: 1}
        assert engine.stats()["queued"]["prefetch"] == 8
        crowd.gate.open()
        background.result(WAIT)
        assert engine.stats()["sources"]["near"]["state"] == "ok"
    assert crowd.most == 2
    assert far.fetched == {20: 1}


def test_demand_waits_when_all_are_full(pack: Pack, target: FileTarget) -> None:
    crowds = [Crowd(), Crowd()]
    sources = [MemorySource([pack], f"{n}", before=crowd, concurrency=1) for n, crowd in enumerate(crowds)]
    with Engine(sources, threads=8, read_size=1) as engine:
        futures = [engine.request(target, frame * BLOCK, 1) for frame in range(10)]
        for crowd in crowds:
            crowd.gate.wait_for()
        assert engine.stats()["queued"]["demand"] == 8
        for crowd in crowds:
            crowd.gate.open()
        for future in futures:
            future.result(WAIT)
    assert [crowd.most for crowd in crowds] == [1, 1]


def test_who_waits_for_a_full_tier_is_in_nobody_elses_way(store_dir: Path, tmp_path: Path) -> None:
    packs = [make_pack(DirectoryStore(store_dir), [1] * FRAMES, raw=True, seed=seed) for seed in (1, 2)]
    targets = [FileTarget(tmp_path, pack) for pack in packs]
    crowd = Crowd()
    with Engine([], threads=8, read_size=1) as engine:
        engine.add_source(MemorySource(packs, "hangs", before=crowd, concurrency=1), [packs[0].hex])
        engine.add_source(MemorySource(packs, "works"), [packs[1].hex])
        stuck = [engine.request(targets[0], frame * BLOCK, 1) for frame in range(10)]
        crowd.gate.wait_for()
        for priority in (Priority.DEMAND, Priority.PREFETCH):
            engine.request(targets[1], priority * 10 * BLOCK, 10 * BLOCK, priority=priority).result(WAIT)
        assert not any(future.done() for future in stuck)
        crowd.gate.open()
        for future in stuck:
            future.result(WAIT)
    for target in targets:
        target.check()
        target.close()


def test_a_pack_is_asked_for_at_its_own_sources_only(pack: Pack, target: FileTarget) -> None:
    other = MemorySource([pack], "other")
    with Engine([]) as engine:
        engine.add_source(other, ["ab" * 32])
        with pytest.raises(NotFoundError, match="no store is known that has it"):
            engine.request(target, 0, 1).result(WAIT)
        engine.add_source(MemorySource([pack], "own"), [pack.hex])
        engine.request(target, 0, 1).result(WAIT)
    assert not other.reads


# --- pauses and rests ------------------------------------------------------------------------------------------------


class Unwell:
    """Fails while it is ``ill``."""

    def __init__(self, error: RemoteError) -> None:
        self.error = error
        self.ill = True

    def __call__(self, _frames: range) -> None:
        if self.ill:
            raise self.error


def busy(seconds: float) -> RemoteError:
    error = RemoteError("503 slow down")
    error.retry_after = seconds
    return error


def test_a_server_is_not_asked_before_it_wants_to_be(pack: Pack, target: FileTarget) -> None:
    unwell = Unwell(busy(0.3))
    source = MemorySource([pack], before=unwell)
    with Engine([source], threads=2, backoff=0.001, read_size=1) as engine:
        first = engine.request(target, 0, 1)
        eventually(lambda: engine.stats()["sources"]["memory"]["failed"])
        unwell.ill = False
        second = engine.request(target, 5 * BLOCK, 1)
        background = engine.request(target, 9 * BLOCK, 1, priority=Priority.PREFETCH)
        for future in (first, second, background):
            future.result(WAIT)
    failed, *later = source.reads
    assert failed.frames == range(1)
    assert min(read.at for read in later) - failed.at >= 0.3


def test_meanwhile_another_is_asked(pack: Pack, target: FileTarget) -> None:
    limited, free = MemorySource([pack], "limited", before=Unwell(busy(50))), MemorySource([pack], "free")
    with Engine([limited, free], threads=2) as engine:
        for frame in range(5):
            engine.request(target, frame * BLOCK, 1).result(WAIT)
        of_limited = engine.stats()["sources"]["limited"]
    assert len(limited.reads) == 1
    assert of_limited["state"] == "resting"
    assert 40 < of_limited["rests"] <= 50


def test_the_probe_finds_out_and_no_reader(pack: Pack, target: FileTarget, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "_REST", 0.05)
    unwell = Unwell(RemoteError("down"))
    near, far = MemorySource([pack], "near", before=unwell), MemorySource([pack], "far")
    with Engine([near, far], threads=2) as engine:
        for frame in range(20):
            engine.request(target, frame * BLOCK, 1).result(WAIT)
        eventually(lambda: len(near.reads) >= 5)
        assert {read.thread for read in near.reads[3:]} == {"fill-probe"}
        assert engine.stats()["sources"]["near"]["state"] == "resting"
        unwell.ill = False
        eventually(lambda: engine.stats()["sources"]["near"]["state"] == "ok")
        for frame in range(20, 30):
            engine.request(target, frame * BLOCK, 1).result(WAIT)
    assert sorted(frame for frame in far.fetched) == list(range(20))
    assert set(range(20, 30)) <= set(near.fetched)


def test_a_probe_that_brings_wrong_bytes_is_no_success(
    pack: Pack, target: FileTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "_REST", 0.02)
    lies = MemorySource([pack], "lies", change=lambda data, _: bytes(len(data)))
    with Engine([lies, MemorySource([pack])], threads=2) as engine:
        for frame in range(3):
            engine.request(target, frame * BLOCK, 1).result(WAIT)
        eventually(lambda: len(lies.reads) >= 5)
        of_lies = engine.stats()["sources"]["lies"]
        assert of_lies["state"] == "resting"
        assert "frame" in str(of_lies["error"])


def test_status_says_what_went_wrong_and_how_long_reads_take(pack: Pack, target: FileTarget) -> None:
    slow = MemorySource([pack], "slow", before=lambda frames: time.sleep(0.01) if frames[0] else fail(), level=4)

    def fail() -> None:
        raise RemoteError("503 from there")

    with Engine([slow, MemorySource([pack], "other")], threads=2) as engine:
        for frame in range(5):
            engine.request(target, frame * BLOCK, 1).result(WAIT)
        stats = engine.stats()["sources"]["slow"]
    error = stats["error"]
    assert error is not None
    assert error["error"] == "503 from there"
    assert abs(error["at"] - time.time()) < 5
    assert 0.01 <= stats["p50"] <= stats["p95"] < 1
    assert (stats["level"], stats["reads"], stats["failed"], stats["bytes"]) == (4, 4, 1, 4 * BLOCK)


def test_reads_of_the_background_are_sized_by_speed(store_dir: Path, tmp_path: Path) -> None:
    class Measured(MemorySource):
        speed = Speed(0.06, 50 << 20)  # type: ignore[assignment]  # 1.5 MiB come in half of the latency

    pack = make_pack(DirectoryStore(store_dir), [64] * 32, raw=True)
    target = FileTarget(tmp_path, pack)
    source = Measured([pack])
    with Engine([source], threads=2) as engine:
        engine.request(target, 0, 32 * 64 * BLOCK, priority=Priority.PREFETCH).result(WAIT)
    assert max(len(read.frames) for read in source.reads) == 6
    target.check()
    target.close()


# --- feeding ---------------------------------------------------------------------------------------------------------


def test_a_tier_gets_the_packs_that_it_lacked(pack: Pack, target: FileTarget, store_dir: Path, tmp_path: Path) -> None:
    tier = UrlSource(str(tmp_path / "tier"), name="tier", level=1, create=True)
    with Engine([tier, StoreSource(DirectoryStore(store_dir))], threads=2) as engine:
        feeder = Feeder(engine, lambda _name: len(pack.blob))
        engine.request(target, 0, 1).result(WAIT)
        feeder.feed()
        assert DirectoryStore(tmp_path / "tier").read(pack.digest, 0, len(pack.blob)) == pack.blob
        before = engine.stats()["sources"]["tier"]["reads"]
        engine.request(target, 5 * BLOCK, 1).result(WAIT)
        assert engine.stats()["sources"]["tier"]["reads"] == before + 1
        DirectoryStore(tmp_path / "tier").delete(pack.digest)
        engine.request(target, 9 * BLOCK, 1).result(WAIT)
        feeder.feed()
        assert DirectoryStore(tmp_path / "tier").size(pack.digest) is None, "once"


def test_only_tiers_that_say_so_are_fed(pack: Pack, target: FileTarget, store_dir: Path, tmp_path: Path) -> None:
    DirectoryStore(tmp_path / "tier", create=True)
    tier = UrlSource(str(tmp_path / "tier"), name="tier", level=1)
    with Engine([tier, StoreSource(DirectoryStore(store_dir))], threads=2) as engine:
        engine.request(target, 0, 1).result(WAIT)
        Feeder(engine, lambda _name: len(pack.blob)).feed()
        assert engine.stats()["sources"]["tier"]["absent"] == 1
    assert DirectoryStore(tmp_path / "tier").size(pack.digest) is None


def test_wrong_bytes_are_not_fed(
    pack: Pack, target: FileTarget, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Frames are verified one by one; a whole pack is by its own digest."""

    class Lies(MemorySource):
        def read_into(self, digest: str, offset: int, buffer: memoryview) -> None:
            buffer[:] = bytes(len(buffer)) if len(buffer) > BLOCK else pack.blob[offset : offset + len(buffer)]

    tier = UrlSource(str(tmp_path / "tier"), name="tier", level=1, create=True)
    with Engine([tier, Lies([pack], "lies")], threads=2) as engine:
        engine.request(target, 0, 1).result(WAIT)
        with caplog.at_level(logging.WARNING):
            Feeder(engine, lambda _name: len(pack.blob)).feed()
    assert DirectoryStore(tmp_path / "tier").size(pack.digest) is None
    assert f"tier: not fed with pack {pack.hex}: " in caplog.text


def test_feeding_waits_while_readers_do(pack: Pack, target: FileTarget, store_dir: Path, tmp_path: Path) -> None:
    gate = Gate()
    tier = UrlSource(str(tmp_path / "tier"), name="tier", level=1, create=True)
    far = MemorySource([pack], "far", before=lambda frames: gate(frames) if frames[0] == 7 else None, concurrency=1)
    with Engine([tier, far], threads=4, read_size=1) as engine:
        engine.request(target, 0, 1).result(WAIT)
        stuck = [engine.request(target, frame * BLOCK, 1) for frame in (7, 8)]
        gate.wait_for()
        eventually(lambda: engine.waiting(Priority.DEMAND) == 1)
        feeder = threading.Thread(target=Feeder(engine, lambda _name: len(pack.blob)).feed)
        far.packs[pack.digest] = pack
        feeder.start()
        time.sleep(0.1)
        assert DirectoryStore(tmp_path / "tier").size(pack.digest) is None
        assert {read.thread for read in far.reads} <= {f"fill-{number}" for number in range(8)}
        gate.open()
        for future in stuck:
            future.result(WAIT)
        feeder.join(WAIT)
