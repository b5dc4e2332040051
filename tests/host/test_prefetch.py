"""Plans and their replay through a real fill engine."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fillkit import FileTarget, Gate, MemorySource, Pack, make_pack
from hypothesis import given
from hypothesis import strategies as st

from erofsgen.host.fill.engine import Engine
from erofsgen.host.prefetch.plan import HOT_PACK, Step, plan, plan_hot, runs
from erofsgen.host.prefetch.replay import Budget, Replay
from erofsgen.profile.profile import RECORDED, ROW, Profile, ordered
from erofsgen.store.directory import DirectoryStore

FRAME_BLOCKS = 64
FRAME = FRAME_BLOCKS * 4096


@pytest.fixture
def packs(tmp_path: Path) -> list[Pack]:
    store = DirectoryStore(tmp_path / "store")
    return [make_pack(store, [FRAME_BLOCKS] * 40, seed=seed) for seed in (1, 2)]


@pytest.fixture
def targets(tmp_path: Path, packs: list[Pack]) -> Iterator[dict[str, FileTarget]]:
    made = {pack.hex: FileTarget(tmp_path, pack) for pack in packs}
    yield made
    for target in made.values():
        target.check()
        target.close()


def profile_of(packs: list[Pack], rows: list[tuple[int, int, int, float]], runs_: int = 1) -> Profile:
    """Rows are pack, block, first, seen."""
    table = np.zeros(len(rows), ROW)
    for number, (pack, block, first, seen) in enumerate(rows):
        table[number] = (pack, block, 4096, bytes(8), first, seen, 0)
    return Profile("x", runs_, [pack.hex for pack in packs], [RECORDED], ordered(table))


def steps_of(pack: Pack, *frames: int) -> list[Step]:
    return [Step(pack.hex, frame, FRAME, RECORDED) for frame in frames]


def test_a_plan_has_each_frame_once_in_the_order_of_first_touch(packs: list[Pack]) -> None:
    tocs = {pack.hex: pack.toc for pack in packs}
    rows: list[tuple[int, int, int, float]] = [
        (0, 5 * FRAME_BLOCKS, 30, 2),
        (0, 5 * FRAME_BLOCKS + 3, 10, 2),
        (1, 0, 20, 2),
        (1, 7 * FRAME_BLOCKS, 5, 0.5),  # a quarter of the runs
        (0, 10_000_000, 1, 2),  # beyond the device
        (1, 63, 40, 2),
    ]
    found = plan(profile_of(packs, rows, 2), tocs, confidence=0.5)
    assert found == [Step(packs[0].hex, 5, FRAME, RECORDED), Step(packs[1].hex, 0, FRAME, RECORDED)]
    assert [step.frame for step in plan(profile_of(packs, rows, 2), tocs, confidence=0)] == [7, 5, 0]
    assert plan(profile_of(packs, rows, 2), {packs[1].hex: packs[1].toc}, confidence=0.5) == found[1:]


def test_a_hot_pack_is_planned_from_its_start(packs: list[Pack]) -> None:
    pack = packs[0]
    assert plan_hot(pack.hex, pack.toc, 2 * FRAME + 1) == [Step(pack.hex, frame, FRAME, HOT_PACK) for frame in range(3)]


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 20)), unique=True))
def test_runs_hold_all_steps_once_neighbours_together_the_earliest_first(places: list[tuple[str, int]]) -> None:
    steps = [Step(pack, frame, 1, "") for pack, frame in places]
    found = list(runs(steps))
    covered = [(run.pack, frame) for run in found for frame in range(run.first, run.last + 1)]
    assert sorted(covered) == sorted(places)
    assert len({*covered}) == len(covered)
    ends = {(run.pack, run.last + 1) for run in found}
    assert not ends & {(run.pack, run.first) for run in found}
    first = [min(places.index((run.pack, frame)) for frame in range(run.first, run.last + 1)) for run in found]
    assert first == sorted(first)


@pytest.fixture
def replay(targets: dict[str, FileTarget]) -> Callable[..., Replay]:
    def make(engine: Engine, steps: list[Step], **budget: Any) -> Replay:
        return Replay(engine, "m", steps, targets.__getitem__, Budget(**budget))

    return make


def test_a_replay_brings_its_frames_and_no_others(
    packs: list[Pack], targets: dict[str, FileTarget], replay: Callable[..., Replay]
) -> None:
    source = MemorySource(packs)
    steps = steps_of(packs[0], 3, 4, 5, 20) + steps_of(packs[1], 39, 0)
    targets[packs[0].hex].write_frame(4, packs[0].frame(4))
    with Engine([source], threads=4) as engine:
        made = replay(engine, steps)
        made.run()
    assert made.state == "done"
    assert targets[packs[0].hex].check() == [3, 4, 5, 20]
    assert targets[packs[1].hex].check() == [0, 39]
    assert made.asked == [step for step in steps if step[:2] != (packs[0].hex, 4)]
    assert made.bytes == 5 * FRAME


def test_a_replay_ends_when_its_bytes_are_spent(
    packs: list[Pack], targets: dict[str, FileTarget], replay: Callable[..., Replay]
) -> None:
    with Engine([MemorySource(packs)], threads=4) as engine:
        made = replay(engine, steps_of(packs[0], *range(40)), size=10 * FRAME + 1)
        made.run()
    assert made.state == "spent"
    assert targets[packs[0].hex].check() == list(range(10))


def test_a_replay_ends_when_its_time_is_over(packs: list[Pack], replay: Callable[..., Replay]) -> None:
    gate = Gate()
    with Engine([MemorySource(packs, before=gate)], threads=4) as engine:
        made = replay(engine, steps_of(packs[0], *range(40)) + steps_of(packs[1], *range(40)), seconds=0.2)
        running = threading.Thread(target=made.run)
        running.start()
        gate.wait_for()
        time.sleep(0.3)
        gate.open()
        running.join(20)
    assert made.state == "spent"
    assert len(made.asked) < 80


def test_a_replay_keeps_to_its_bandwidth(packs: list[Pack], replay: Callable[..., Replay]) -> None:
    with Engine([MemorySource(packs)], threads=4) as engine:
        made = replay(engine, steps_of(packs[0], *range(12)), bandwidth=10 * FRAME)
        began = time.monotonic()
        made.run()
        took = time.monotonic() - began
    assert made.state == "done"
    assert took > 0.9 - 0.25  # the first quarter of a second's bytes may go at once


def test_a_replay_can_be_stopped(packs: list[Pack], replay: Callable[..., Replay]) -> None:
    gate = Gate()
    with Engine([MemorySource(packs, before=gate)], threads=4) as engine:
        made = replay(engine, steps_of(packs[0], *range(40)) + steps_of(packs[1], *range(40)))
        running = threading.Thread(target=made.run)
        running.start()
        gate.wait_for()
        made.stop()
        running.join(20)  # although nothing has come
        assert not running.is_alive()
        gate.open()
    assert made.state == "stopped"


def test_what_fails_does_not_end_a_replay(
    packs: list[Pack], targets: dict[str, FileTarget], replay: Callable[..., Replay]
) -> None:
    def fail(frames: range) -> None:
        if 2 in frames:
            raise OSError("gone")

    with Engine([MemorySource(packs, before=fail)], threads=4, retries=0) as engine:
        made = replay(engine, steps_of(packs[0], 2, 8, 9))
        made.run()
    assert made.state == "done"
    assert targets[packs[0].hex].check() == [8, 9]


def test_a_demand_does_not_wait_for_a_replay(
    packs: list[Pack], targets: dict[str, FileTarget], replay: Callable[..., Replay]
) -> None:
    """All that a replay may have on its way hangs; a demand is served all the same."""
    gate = Gate()

    def before(frames: range) -> None:
        if frames != range(39, 40):
            gate(frames)

    target = targets[packs[0].hex]
    with Engine([MemorySource(packs, before=before)], threads=4, memory=16 << 20) as engine:
        made = replay(engine, steps_of(packs[0], *range(30)) + steps_of(packs[1], *range(40)))
        running = threading.Thread(target=made.run)
        running.start()
        gate.wait_for()
        time.sleep(0.05)
        engine.request(target, 39 * FRAME, 1).result(10)
        assert target.ready(39, 39)
        gate.open()
        running.join(20)


def test_the_engine_tells_of_each_frame_from_where_it_came(packs: list[Pack], targets: dict[str, FileTarget]) -> None:
    told = []
    with Engine([MemorySource(packs, "here")], threads=2, brought=lambda *each: told.append(each)) as engine:
        engine.request(targets[packs[0].hex], 0, 3 * FRAME).result(10)
    assert sorted((target.name, frame, source) for target, frame, source, _ in told) == [
        (packs[0].hex, frame, "here") for frame in range(3)
    ]
