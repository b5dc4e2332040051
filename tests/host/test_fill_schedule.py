"""The fill engine's schedule by itself: no threads, so every order of events can be had."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from erofsgen.errors import RemoteError
from erofsgen.host.fill.schedule import Schedule
from erofsgen.host.fill.sources import Source
from erofsgen.host.fill.tiers import Tiers
from erofsgen.host.fill.work import Frame, Priority, Read, Request, State

DEMAND, AROUND, PREFETCH, SCRUB = Priority


class Sizes:
    """Of a table of contents, what the schedule looks at. Frame n stores ``sizes[n]`` bytes and holds twice as many."""

    def __init__(self, sizes: list[int]) -> None:
        self.sizes = np.array(sizes)
        self.offsets = np.cumsum([0, *sizes])[:-1]
        self.device_sizes = self.sizes * 2
        self.raw = False


class Target:
    """Never asked for anything but its sizes here."""

    def __init__(self, *sizes: int) -> None:
        self.toc: Any = Sizes(list(sizes))
        self.name = "pack"

    ready = missing = write_frame = None  # type: ignore[assignment]


class Nothing(Source):
    name = "nothing"

    def read_into(self, digest: str, offset: int, buffer: memoryview) -> None:
        raise AssertionError


def schedule(**more: int) -> Schedule:
    limits = {"threads": 4, "memory": 1200, "read_size": 100, "cores": 2} | more
    return Schedule(Tiers([Nothing(), Nothing()], retries=1, backoff=0.1), **limits)


def want(schedule: Schedule, target: Any, *indices: int, priority: Priority = DEMAND) -> Request:
    request = Request("test", priority, 0.0, float("inf"))
    for index in indices:
        frame = schedule.find(target, index)
        if frame is None:
            frame = schedule.add(target, index, priority)
        else:
            schedule.promote(frame, priority)
        frame.waiters.append(request)
    return request


def take_read(schedule: Schedule) -> Read:
    work = schedule.take()
    assert isinstance(work, Read)
    return work


def indices(read: Read) -> list[int]:
    return [frame.index for frame in read.frames]


def bytes_of(read: Read) -> memoryview:
    return memoryview(bytes(read.length))


def finish(schedule: Schedule, read: Read) -> None:
    """The read's bytes come, and its frames are opened, with whatever else comes before them."""
    schedule.deliver(read, bytes_of(read))
    while any(frame.state is State.FETCHED for frame in read.frames):
        frame = schedule.take()
        assert isinstance(frame, Frame)
        schedule.opened(frame)
        schedule.remove(frame)


def test_what_comes_free_is_for_the_large_demand() -> None:
    plan, small, large = schedule(), Target(*[10] * 200), Target(300)
    want(plan, small, *range(200), priority=PREFETCH)
    reads = [take_read(plan) for _ in range(3)]
    assert plan.held == 900
    assert plan.take() is None
    want(plan, large, 0)
    finish(plan, reads[0])
    assert plan.held == 600
    assert plan.take() is None, "not another small one, though it would fit and the large one does not"
    finish(plan, reads[1])
    assert take_read(plan).target is large
    assert plan.held == 1200
    assert plan.peak == 1200


def test_background_waits_for_room_for_a_large_read() -> None:
    plan, target = schedule(), Target(*[10] * 200)
    want(plan, target, *range(200), priority=PREFETCH)
    reads = [take_read(plan) for _ in range(3)]
    plan.deliver(reads[0], bytes_of(reads[0]))
    for _ in range(9):
        frame = plan.take()
        assert isinstance(frame, Frame)
        plan.opened(frame)
        plan.remove(frame)
    assert plan.held == 900 - 9 * 20, "device bytes go one by one, stored bytes all together"
    last = plan.take()
    assert isinstance(last, Frame)
    plan.opened(last)
    assert plan.held == 600
    assert len(take_read(plan).frames) == 10


def test_neighbours_that_are_not_alike_are_left_out() -> None:
    plan, target = schedule(read_size=1000), Target(*[10] * 12)
    requests = [want(plan, target, 2)]
    want(plan, target, 3, 4, 5, 7)  # nobody asked for 6
    want(plan, target, 8, priority=AROUND)
    requests.append(want(plan, target, 1, 10, 6))
    for request in requests:
        request.done = True  # nobody wants 1, 2, 6 and 10 any more
    assert indices(take_read(plan)) == [3, 4, 5]
    assert indices(take_read(plan)) == [7]
    assert indices(take_read(plan)) == [8]
    assert plan.take() is None
    assert len(plan) == 5, "the others are forgotten"
    assert plan.lengths == [0, 0, 0, 0]


def test_frames_at_different_tiers_are_read_apart() -> None:
    plan, target = schedule(read_size=30), Target(*[10] * 6)
    want(plan, target, *range(6))
    first, second = take_read(plan), take_read(plan)
    assert (indices(first), first.source) == ([0, 1, 2], 0)
    failed = plan.failed(first)
    following = Tiers([Nothing(), Nothing()], retries=1, backoff=0.1).after(first.attempt, RemoteError("no"))
    assert following is not None
    for frame in failed:
        plan.wait(frame, following[0])
    plan.requeue(failed)
    for frame in plan.failed(second):
        plan.wait(frame, second.attempt)
        plan.requeue([frame])
    reads = [take_read(plan), take_read(plan)]
    assert sorted((indices(read), read.source) for read in reads) == [([0, 1, 2], 1), ([3, 4, 5], 0)]


def test_a_late_read_that_fails_takes_no_frame_from_the_read_that_overtook_it() -> None:
    plan, target = schedule(), Target(*[10] * 3)
    want(plan, target, *range(3))
    late = take_read(plan)
    for frame in plan.overtake(late):
        plan.wait(frame, late.attempt)
        plan.requeue([frame])
    read = take_read(plan)
    assert indices(read) == indices(late) == [0, 1, 2]
    assert plan.held == 180, "of both"
    assert plan.failed(late) == []
    assert plan.held == 90
    finish(plan, read)
    assert (len(plan), plan.held) == (0, 0)


def test_of_a_late_read_and_the_one_that_overtook_it_the_first_brings_the_frames() -> None:
    for order in (0, 1):
        plan, target = schedule(), Target(*[10] * 3)
        want(plan, target, *range(3))
        reads = [take_read(plan)]
        for frame in plan.overtake(reads[0]):
            plan.wait(frame, reads[0].attempt)
            plan.requeue([frame])
        reads.append(take_read(plan))
        first, second = reads[order], reads[1 - order]
        assert plan.deliver(first, bytes_of(first)) == 3
        assert plan.deliver(second, bytes_of(second)) == 0
        assert plan.held == 90
        finish_opening = [plan.take() for _ in range(3)]
        for frame in finish_opening:
            assert isinstance(frame, Frame)
            assert frame.read is first
            plan.opened(frame)
            plan.remove(frame)
        assert (len(plan), plan.held) == (0, 0)


@pytest.mark.parametrize("state", ["queued", "reading", "waiting", "fetched", "opening"])
def test_a_demand_takes_a_frame_along_in_whatever_state_it_is(state: str) -> None:
    plan, target = schedule(threads=8, read_size=10, cores=1), Target(*[10] * 4)
    want(plan, target, 0, 1, 2, priority=PREFETCH)
    frame = plan.find(target, 2)
    assert frame is not None
    if state != "queued":
        reads = [take_read(plan) for _ in range(3)]
        if state == "waiting":
            plan.wait(plan.failed(reads[2])[0], reads[2].attempt)
        elif state != "reading":
            plan.deliver(reads[2], bytes_of(reads[2]))
        if state == "opening":
            assert plan.take() is frame
    want(plan, target, 2)
    assert frame.priority is DEMAND
    assert sum(plan.lengths) == (3 if state == "queued" else state == "waiting")
    if state == "queued":
        assert indices(take_read(plan)) == [2]
        return
    if state == "waiting":
        plan.requeue([frame])
        reads[2] = take_read(plan)
        assert indices(reads[2]) == [2]
    for read in reads if state in ("reading", "waiting") else reads[:2]:
        plan.deliver(read, bytes_of(read))
    if state != "opening":
        assert plan.take() is frame, "before those fetched earlier"
    assert plan.take() is None, "no background is opened meanwhile"
    plan.opened(frame)
    plan.remove(frame)
    other = plan.take()
    assert isinstance(other, Frame)
    assert other.index == 0


def test_promotion_never_demotes() -> None:
    plan, target = schedule(), Target(10)
    want(plan, target, 0)
    want(plan, target, 0, priority=SCRUB)
    frame = plan.find(target, 0)
    assert frame is not None
    assert frame.priority is DEMAND
    assert plan.lengths == [1, 0, 0, 0]


class Machine(RuleBasedStateMachine):
    """Events in any order. The documented bounds hold at all times, and in the end everything has come."""

    MEMORY, THREADS, CORES = 400, 4, 2

    def __init__(self) -> None:
        super().__init__()
        self.tiers = Tiers([Nothing(), Nothing()], retries=9, backoff=0.1)
        self.plan = Schedule(self.tiers, threads=self.THREADS, memory=self.MEMORY, read_size=60, cores=self.CORES)
        self.targets = [Target(*[5, 10, 20, 40, 7] * 3), Target(1, 190, 250)]
        self.reads: list[Read] = []  # on their way
        self.late: list[Read] = []
        self.opening: list[tuple[Frame, bool]] = []
        self.waiting: list[Frame] = []
        self.requests: list[Request] = []

    @rule(
        which=st.integers(0, 1), first=st.integers(0, 14), count=st.integers(1, 6), priority=st.sampled_from(Priority)
    )
    def ask(self, which: int, first: int, count: int, priority: Priority) -> None:
        target = self.targets[which]
        size = len(target.toc.sizes)
        self.requests.append(
            want(self.plan, target, *range(first % size, min(first % size + count, size)), priority=priority)
        )

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.requests)).done = True

    @precondition(lambda self: len(self.reads) + len(self.opening) < self.THREADS)
    @rule()
    def take(self) -> None:
        runnable = self.plan.runnable()
        work = self.plan.take()
        assert runnable == (work is not None)
        if isinstance(work, Read):
            frames = work.frames
            assert indices(work) == list(range(frames[0].index, frames[0].index + len(frames)))
            assert work.length == sum(int(work.target.toc.sizes[frame.index]) for frame in frames)
            assert work.length <= 60 or len(frames) == 1
            if work.first is None:
                assert all(frame.wanted for frame in frames)
                assert all(frame.priority is frames[0].priority for frame in frames)
            self.reads.append(work)
        elif work is not None:
            urgent = [f for f in self.plan.frames(State.FETCHED, State.OPENING) if f.priority is DEMAND]
            if work.priority is Priority.READ_AROUND:
                assert len(urgent) + sum(back for _, back in self.opening) < self.CORES, "it takes what demand leaves"
            elif work.priority is not DEMAND:
                assert not urgent
            self.opening.append((work, work.priority is not DEMAND))

    @precondition(lambda self: self.reads or self.late)
    @rule(data=st.data())
    def bring(self, data: st.DataObject) -> None:
        read = data.draw(st.sampled_from(self.reads + self.late))
        self.plan.deliver(read, bytes_of(read))
        (self.late if read.late else self.reads).remove(read)

    def go_on(self, frames: list[Frame], read: Read) -> None:
        for frame in frames:
            other = self.plan.elsewhere(frame)
            if other is not None and not other.late:
                self.plan.expect(frame, other)
                continue
            self.plan.wait(frame, read.attempt)
            self.waiting.append(frame)

    @precondition(lambda self: self.reads or self.late)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        read = data.draw(st.sampled_from(self.reads + self.late))
        self.go_on(self.plan.failed(read), read)
        (self.late if read.late else self.reads).remove(read)

    @precondition(lambda self: self.reads)
    @rule(data=st.data())
    def overtake(self, data: st.DataObject) -> None:
        read = data.draw(st.sampled_from(self.reads))
        self.reads.remove(read)
        self.late.append(read)
        self.go_on(self.plan.overtake(read), read)

    @precondition(lambda self: any(read.demand and read.first is None for read in self.reads))
    @rule(data=st.data())
    def hedge(self, data: st.DataObject) -> None:
        read = data.draw(st.sampled_from([read for read in self.reads if read.demand and read.first is None]))
        held = self.plan.held
        if self.plan.hedge(read):
            assert self.plan.runnable()
            assert self.plan.held - held == read.length * 3

    @precondition(lambda self: self.waiting)
    @rule()
    def retry(self) -> None:
        self.plan.requeue(self.waiting)
        self.waiting = []

    @precondition(lambda self: self.opening)
    @rule(data=st.data(), good=st.booleans())
    def open(self, data: st.DataObject, good: bool) -> None:
        frame, background = data.draw(st.sampled_from(self.opening))
        self.opening.remove((frame, background))
        read = frame.read
        assert read is not None
        assert frame.stored is not None
        assert len(frame.stored) == int(frame.target.toc.sizes[frame.index])
        self.plan.opened(frame)
        if good:
            self.plan.remove(frame)
        else:
            self.go_on([frame], read)

    @precondition(lambda self: len(self.plan))
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        frames = self.plan.frames(*set(State) - {State.OPENING})
        if frames:
            frame = data.draw(
                st.sampled_from(sorted(frames, key=lambda frame: (len(frame.target.toc.sizes), frame.index)))
            )
            self.plan.remove(frame)

    @invariant()
    def memory_is_bounded(self) -> None:
        alone = len({id(frame.read) for frame, _ in self.opening} | set(map(id, self.reads + self.late))) <= 1
        assert 0 <= self.plan.held <= self.MEMORY or alone
        assert self.plan.held <= self.plan.peak

    @invariant()
    def background_holds_back(self) -> None:
        background = sum(read.background for read in self.reads) + sum(back for _, back in self.opening)
        assert background <= self.THREADS - 1
        assert sum(back for _, back in self.opening) <= self.CORES

    @invariant()
    def counts_agree(self) -> None:
        queued = self.plan.frames(State.QUEUED, State.WAITING)
        assert self.plan.lengths == [sum(frame.priority is priority for frame in queued) for priority in Priority]

    def teardown(self) -> None:
        """Whatever happened before, what is wanted comes now, and all that was taken is given back."""
        while True:
            for read in self.reads + self.late:
                self.plan.deliver(read, bytes_of(read))
            self.plan.requeue(self.waiting)
            for frame, _ in self.opening:
                self.plan.opened(frame)
                self.plan.remove(frame)
            self.reads, self.late, self.waiting, self.opening = [], [], [], []
            work = self.plan.take()
            if work is None:
                break
            if isinstance(work, Read):
                self.reads.append(work)
            else:
                self.opening.append((work, False))
        assert len(self.plan) == 0
        assert self.plan.held == 0
        assert self.plan.lengths == [0, 0, 0, 0]
        assert (self.plan._urgent, self.plan._background_opening, self.plan._background_busy) == (0, 0, 0)


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
