"""The fill engine asks a second time for what is slow, and the first that comes serves."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fillkit import BLOCK, WAIT, FileTarget, Gate, MemorySource, Pack, eventually, make_pack, no_thread_left

from erofsgen.errors import RemoteError
from erofsgen.host.fill.engine import Engine, Priority
from erofsgen.host.fill.sources import UrlSource
from erofsgen.store.directory import DirectoryStore

WARM = 24
"""Demands that make a source known."""
SLOW = 30
FRAMES = 200


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
    assert len(target.writes) == len(set(target.writes)), "written once"
    target.close()


def at_slow(gate: Callable[[range], object]) -> Callable[[range], object]:
    """A gate for the slow frame alone."""
    return lambda frames: gate(frames) if SLOW in frames else None


def fails(_frames: range) -> None:
    raise RemoteError("refused")


def source(pack: Pack, name: str, before: Callable[[range], object] | None = None) -> MemorySource:
    return MemorySource([pack], name, before=before, hedged=True)


def warm(engine: Engine, target: FileTarget, frames: range = range(WARM)) -> None:
    for frame in frames:
        engine.request(target, frame * BLOCK, 1).result(WAIT)


def frames_of(source: MemorySource) -> int:
    return source.fetched[SLOW]


def test_the_second_brings_it_and_that_is_no_failure_of_the_first(pack: Pack, target: FileTarget) -> None:
    gate = Gate()
    first, second = source(pack, "first", at_slow(gate)), source(pack, "second")
    with Engine([first, second], threads=3) as engine:
        warm(engine, target)
        engine.request(target, SLOW * BLOCK, 1).result(WAIT)
        stats = engine.stats()
        assert (stats["hedges"], stats["hedges_won"], stats["overtaken_reads"], stats["retries"]) == (1, 1, 0, 0)
        of_first = stats["sources"]["first"]
        assert (of_first["hedges"], of_first["hedges_won"], of_first["failed"], of_first["error"]) == (1, 1, 0, None)
        assert stats["in_flight"] > 0, "what the slow read will bring is accounted for"
        gate.open()
        eventually(lambda: engine.stats()["in_flight"] == 0)
        assert engine.stats()["sources"]["first"]["reads"] == WARM + 1
    assert (frames_of(first), frames_of(second)) == (1, 1)


def test_the_first_may_still_be_first(pack: Pack, target: FileTarget) -> None:
    slow, slower = Gate(), Gate()
    first, second = source(pack, "first", at_slow(slow)), source(pack, "second", at_slow(slower))
    with Engine([first, second], threads=3) as engine:
        warm(engine, target)
        future = engine.request(target, SLOW * BLOCK, 1)
        slower.wait_for()
        slow.open()
        future.result(WAIT)
        slower.open()
        eventually(lambda: engine.stats()["in_flight"] == 0)
        stats = engine.stats()
        assert (stats["hedges"], stats["hedges_won"]) == (1, 0)


def test_without_another_source_it_is_another_connection(pack: Pack, target: FileTarget) -> None:
    gate = Gate()
    turns = iter(range(99))
    only = source(pack, "only", at_slow(lambda frames: gate(frames) if next(turns) == 0 else None))
    with Engine([only], threads=3) as engine:
        warm(engine, target)
        engine.request(target, SLOW * BLOCK, 1).result(WAIT)
        assert engine.stats()["hedges_won"] == 1
        gate.open()
    assert frames_of(only) == 2


def test_when_the_second_fails_the_first_is_waited_for(pack: Pack, target: FileTarget) -> None:
    gate = Gate()
    first, second = source(pack, "first", at_slow(gate)), source(pack, "second", fails)
    with Engine([first, second], threads=3, retries=0) as engine:
        warm(engine, target)
        future = engine.request(target, SLOW * BLOCK, 1)
        eventually(lambda: engine.stats()["sources"]["second"]["failed"] == 1)
        assert not future.done()
        gate.open()
        future.result(WAIT)
    assert (frames_of(first), frames_of(second)) == (1, 1)


def test_when_the_first_fails_the_second_is_waited_for(pack: Pack, target: FileTarget) -> None:
    gate, other = Gate(), Gate()

    def slow_failure(frames: range) -> None:
        if SLOW in frames:
            gate(frames)
            fails(frames)

    first, second = source(pack, "first", slow_failure), source(pack, "second", at_slow(other))
    with Engine([first, second], threads=3, retries=0) as engine:
        warm(engine, target)
        future = engine.request(target, SLOW * BLOCK, 1)
        other.wait_for()
        gate.open()
        eventually(lambda: engine.stats()["sources"]["first"]["failed"] == 1)
        assert not future.done()
        other.open()
        future.result(WAIT)
        assert engine.stats()["hedges_won"] == 1
    assert (frames_of(first), frames_of(second)) == (1, 1), "nobody was asked again"


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_when_both_fail_the_error_names_both(pack: Pack, target: FileTarget, order: tuple[int, int]) -> None:
    gates = [Gate(), Gate()]

    def failing(number: int) -> Callable[[range], None]:
        def before(frames: range) -> None:
            if SLOW in frames:
                gates[number](frames)
                raise RemoteError(f"refused by {number}")

        return before

    sources = [source(pack, f"tier-{number}", failing(number)) for number in (0, 1)]
    with Engine(sources, threads=3, retries=0) as engine:
        warm(engine, target)
        future = engine.request(target, SLOW * BLOCK, 1)
        gates[1].wait_for()
        gates[order[0]].open()
        eventually(lambda: engine.stats()["sources"][f"tier-{order[0]}"]["failed"] == 1)
        assert not future.done()
        gates[order[1]].open()
        error = str(future.exception(WAIT))
        assert "tier-0: refused by 0" in error
        assert "tier-1: refused by 1" in error
        assert [frames_of(each) for each in sources] == [1, 1]
        eventually(lambda: not len(engine._schedule))


def test_wrong_bytes_of_one_do_not_spoil_those_of_the_other(pack: Pack, target: FileTarget) -> None:
    gate = Gate()
    first = source(pack, "first", at_slow(gate))
    second = MemorySource([pack], "second", change=lambda data, _: bytes(len(data)))
    with Engine([first, second], threads=3, retries=0) as engine:
        warm(engine, target)
        future = engine.request(target, SLOW * BLOCK, 1)
        eventually(lambda: engine.stats()["sources"]["second"]["bad_frames"] == 1)
        assert not future.done()
        gate.open()
        future.result(WAIT)


def test_hedges_have_a_budget(pack: Pack, target: FileTarget) -> None:
    slow = MemorySource(
        [pack], "slow", before=lambda frames: time.sleep(0.008) if frames[0] >= WARM else None, hedged=True
    )
    with Engine([slow, source(pack, "other")], threads=3) as engine:
        warm(engine, target, range(FRAMES))
        hedges = engine.stats()["hedges"]
    assert 4 <= hedges <= 4 + FRAMES / 20


def test_what_nobody_waits_for_is_not_hedged(pack: Pack, target: FileTarget) -> None:
    gate = Gate()
    with Engine([source(pack, "first", at_slow(gate)), source(pack, "second")], threads=8) as engine:
        warm(engine, target)
        future = engine.request(target, SLOW * BLOCK, 1, priority=Priority.PREFETCH)
        gate.wait_for()
        engine.request(target, (SLOW + 1) * BLOCK, 1).result(WAIT)
        time.sleep(0.05)
        assert engine.stats()["hedges"] == 0
        gate.open()
        future.result(WAIT)


def test_no_hedge_takes_a_thread_that_is_needed(pack: Pack, target: FileTarget) -> None:
    gate = Gate()
    with Engine([source(pack, "first", at_slow(gate)), source(pack, "second")], threads=1) as engine:
        warm(engine, target)
        future = engine.request(target, SLOW * BLOCK, 1)
        gate.wait_for()
        time.sleep(0.05)
        assert engine.stats()["hedges"] == 0
        gate.open()
        future.result(WAIT)


def test_a_read_may_be_hedged_and_overtaken(pack: Pack, target: FileTarget) -> None:
    """The second hangs too, a third is asked when the first has taken too long, and everything is given back."""
    gate = Gate()
    sources = [MemorySource([pack], name, before=at_slow(gate), hedged=True, timeout=0.1) for name in ("one", "two")]
    with Engine([*sources, source(pack, "three")], threads=3) as engine:
        warm(engine, target)
        engine.request(target, SLOW * BLOCK, 1).result(WAIT)
        stats = engine.stats()
        assert stats["hedges"] == 1
        assert stats["overtaken_reads"] == 2
        assert "no answer in 0.1 s" in str(stats["sources"]["one"]["error"])
        gate.open()
        eventually(lambda: engine.stats()["in_flight"] == 0)
        eventually(lambda: engine.stats()["threads"] == 3)


def test_directories_are_not_hedged(tmp_path: Path) -> None:
    assert not UrlSource(str(tmp_path)).hedged
    assert UrlSource("http://127.0.0.1:1").hedged
    assert not UrlSource("http://127.0.0.1:1", hedge=False).hedged
