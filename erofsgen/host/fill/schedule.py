"""What the fill engine does next: frames wanted, their priorities, and the memory and threads they may use.

::

              request                 read done               right, written
    (none) ───────────► QUEUED ─ READING ─────► FETCHED ─ OPENING ───────────► (none)
                          ▲         │                        │
                          │      failed                     bad
                          └─ WAITING ◄───────────────────────┘   for the next round; not between tiers

Two kinds of work come out of :meth:`Schedule.take`: a :class:`Read` of neighbouring frames, and the opening
(decompress, verify, write) of one :class:`Frame`. Work of a higher priority comes first; of equal priority opening
does, because it frees memory. What is not DEMAND is *background*, and holds back for demand in four ways:

- it occupies at most three quarters of the threads, so a thread is always left to read for demand;
- it occupies at most three quarters of the memory;
- no more of it is opened at a time than there are cores;
- none of it is opened, so none is written either, while bytes for demand are being opened or wait for that; but for
  READ_AROUND, which the same reader waits for next, on cores that demand leaves.

A source takes as many reads at a time as its ``concurrency`` says, and none while it asked for a pause. A demand whose
first source takes none goes to the next of its order that is well and takes one, if there is such a source, and else
waits in its queue; the background waits. Frames that wait for other sources overtake it.

A read may be *hedged*: a second one for the same frames, from another source or over another connection, runs beside
it, and the first that comes brings them. Frames of a failed read wait for what is still on its way for them.

A frame has one place here whoever asks for it (single-flight); a demand for one in the background takes it along, in
whatever state it is. Queues are not searched for that: the frame is also put into the better queue, and its stale
place in the other is passed over.

No threads, no locks: the engine calls everything under its lock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import replace
from typing import Final

from erofsgen.host.fill.latency import read_size
from erofsgen.host.fill.tiers import Attempt, Tiers
from erofsgen.host.fill.work import Frame, Priority, Read, State, Target

Work = Read | Frame

_PRIORITIES: Final = tuple(Priority)


class Schedule:
    """The frames wanted, and the order of work on them.

    ``threads`` carry out the work; ``memory``: bytes in flight, stored and device bytes together, which only a single
    frame larger than that may exceed, alone; ``read_size``: stored bytes of one read of several frames; ``cores``.
    """

    def __init__(self, tiers: Tiers, *, threads: int, memory: int, read_size: int, cores: int) -> None:
        self._tiers = tiers
        self._memory = memory
        self._background_memory = memory - memory // 4
        self._read_size = read_size
        self._batch = memory // 4  # of memory, for one read of several frames
        self._background_threads = max(1, threads - max(1, threads // 4))
        self._cores = cores
        self._frames: dict[Target, dict[int, Frame]] = {}
        # By the order of sources: who waits for a busy one is not in the way of the others
        self._queued: Final = tuple(dict[tuple[int, ...], deque[Frame]]() for _ in Priority)
        self._serial = 0
        self._fetched: Final = tuple(deque[Frame]() for _ in Priority)
        self._again = deque[Read]()  # hedges that nobody carries out yet
        self._reads: set[Read] = set()  # on their way
        self._urgent = 0  # frames of DEMAND that are FETCHED or OPENING
        self._background_opening = 0
        self._background_busy = 0  # threads
        self.lengths = [0 for _ in Priority]
        """Frames QUEUED or WAITING, by priority."""

        self.held = 0
        """Bytes of memory in flight."""

        self.peak = 0
        """The most that :attr:`held` ever was."""

    def __len__(self) -> int:
        return sum(map(len, self._frames.values()))

    def find(self, target: Target, index: int) -> Frame | None:
        """The frame, if it is on its way."""
        frames = self._frames.get(target)
        return None if frames is None else frames.get(index)

    def add(self, target: Target, index: int, priority: Priority) -> Frame:
        """Queue a frame that is not on its way."""
        frame = Frame(target, index, priority)
        self._frames.setdefault(target, {})[index] = frame
        self._queue(frame)
        self.lengths[priority] += 1
        return frame

    def promote(self, frame: Frame, priority: Priority) -> None:
        """Let a frame be as urgent as ``priority`` at least."""
        if priority >= frame.priority:
            return
        if frame.state in (State.QUEUED, State.WAITING):
            self.lengths[frame.priority] -= 1
            self.lengths[priority] += 1
        frame.priority = priority
        if frame.state is State.QUEUED:
            self._queue(frame)
        elif frame.state in (State.FETCHED, State.OPENING):
            self._urgent += priority is Priority.DEMAND
            if frame.state is State.FETCHED:
                self._fetched[priority].append(frame)

    def runnable(self) -> bool:
        """Whether :meth:`take` would return work."""
        return self._next_hedge() is not None or self._next() is not None

    def take(self) -> Work | None:
        """The next work, which is the caller's to do. None: none, or none that memory and threads allow."""
        if self._next_hedge() is not None:
            return self._again.popleft()
        queue = self._next()
        if queue is None:
            return None
        frame = queue.popleft()
        background = frame.priority is not Priority.DEMAND
        self._background_busy += background
        if frame.state is State.QUEUED:
            return self._read(frame)
        frame.state = State.OPENING
        frame.background = background
        self._background_opening += background
        return frame

    def deliver(self, read: Read, data: memoryview) -> int:
        """The bytes of a read are here: its frames can be opened. Returns how many there are to open."""
        self._background_busy -= read.background
        self._reads.discard(read)
        sizes = read.target.toc.sizes
        start = opened = 0
        for frame in read.frames:
            end = start + int(sizes[frame.index])
            if frame.state in (State.FETCHED, State.OPENING, State.DONE):
                self._release(read, frame)  # the read was late; the frame has them from elsewhere
            else:
                if frame.state is not State.READING:
                    self.lengths[frame.priority] -= 1
                frame.state = State.FETCHED
                frame.read = read
                frame.stored = data[start:end]
                self._urgent += frame.priority is Priority.DEMAND
                self._fetched[frame.priority].append(frame)
                opened += 1
            start = end
        return opened

    def failed(self, read: Read) -> list[Frame]:
        """A read has come back without its bytes. Returns the frames that have to go on without them."""
        self._background_busy -= read.background
        self._reads.discard(read)
        self.held -= read.held
        read.held = 0
        return self._expecting(read)

    def overtake(self, read: Read) -> list[Frame]:
        """A read takes too long. Returns the frames that have to go on without it; its memory stays accounted."""
        self._background_busy -= read.background
        read.background = False
        read.late = True
        return self._expecting(read)

    def hedge(self, read: Read) -> bool:
        """Ask for what a read is to bring a second time: of the next source that is well, or else of the same one.

        False: nobody waits for it, or sources or memory do not allow that.
        """
        held = read.length + sum(_sizes(frame)[1] for frame in read.frames)
        if self.held + held > self._memory or not any(frame.wanted for frame in self._expecting(read)):
            return False
        first, *rest = read.attempt.order
        others = [number for number in rest if self._tiers.is_well(number, read.target.name)]
        chosen = next((number for number in [*others, first] if self._is_free(number)), None)
        if chosen is None:
            return False
        order = (chosen, *(number for number in rest if number != chosen))
        second = Read(read.frames, replace(read.attempt, order=order), read.length, held, first=read)
        self._hold(second)
        self._again.append(second)
        return True

    def elsewhere(self, frame: Frame) -> Read | None:
        """A read on its way that may bring a frame; one that is not late, if there is such a read."""
        return min((read for read in self._reads if frame in read.frames), key=lambda read: read.late, default=None)

    def expect(self, frame: Frame, read: Read) -> None:
        """A frame that was READING or OPENING waits for what another read brings."""
        frame.read = read
        frame.state = State.READING

    def reading(self, source: int) -> int:
        """Reads of a source that are on their way."""
        return sum(read.source == source for read in self._reads)

    def is_full(self, source: int) -> bool:
        """Whether a source has as many reads to do as it may."""
        limit = self._tiers.sources[source].concurrency
        return limit is not None and self.reading(source) >= limit

    def opened(self, frame: Frame) -> None:
        """A frame was opened, to whatever end: its slot, memory and bytes are free."""
        read = frame.read
        assert read is not None
        self._urgent -= frame.priority is Priority.DEMAND
        self._background_opening -= frame.background
        self._background_busy -= frame.background
        frame.background = False
        frame.stored = None
        frame.read = None
        self._release(read, frame)

    def wait(self, frame: Frame, attempt: Attempt) -> None:
        """A frame goes on with ``attempt``, but not before :meth:`requeue`."""
        frame.attempt = attempt
        frame.read = None
        frame.state = State.WAITING
        self.lengths[frame.priority] += 1

    def requeue(self, frames: Iterable[Frame]) -> None:
        """Queue frames that were WAITING; others have found their bytes meanwhile."""
        for frame in frames:
            if frame.state is State.WAITING:
                frame.state = State.QUEUED
                self._queue(frame)

    def remove(self, frame: Frame) -> None:
        """A frame is done with: there, given up, or wanted by nobody. Not for one being opened."""
        if frame.state in (State.QUEUED, State.WAITING):
            self.lengths[frame.priority] -= 1
        elif frame.state is State.FETCHED:
            assert frame.read is not None
            self._urgent -= frame.priority is Priority.DEMAND
            frame.stored = None
            self._release(frame.read, frame)
        frame.state = State.DONE
        frames = self._frames[frame.target]
        del frames[frame.index]
        if not frames:
            del self._frames[frame.target]

    def frames(self, *states: State, target: Target | None = None) -> list[Frame]:
        """The frames in one of ``states``, of one target or of all."""
        tables = self._frames.values() if target is None else [self._frames.get(target, {})]
        return [frame for frames in tables for frame in frames.values() if frame.state in states]

    def _next(self) -> deque[Frame] | None:
        """The queue whose first frame is to be worked on."""
        memory_left = True
        for priority in _PRIORITIES:
            background = priority is not Priority.DEMAND
            if background and self._background_busy >= self._background_threads:
                return None
            fetched = self._fetched[priority]
            while fetched and not (fetched[0].state is State.FETCHED and fetched[0].priority is priority):
                fetched.popleft()
            if fetched and not (background and self._holds_back(priority)):
                return fetched
            queued = self._first_queue(priority)
            if queued and memory_left:
                if self._fits(queued[0]):
                    return queued
                memory_left = False  # what comes free is for this frame, not for smaller ones behind it
        return None

    def _queue(self, frame: Frame) -> None:
        order = self._tiers.chain(frame.target.name) if frame.attempt is None else frame.attempt.order
        self._serial += 1
        frame.serial = self._serial
        self._queued[frame.priority].setdefault(order, deque()).append(frame)

    def _first_queue(self, priority: Priority) -> deque[Frame] | None:
        """Of the queues whose first frame may be read now the one whose frame has waited longest."""
        found: deque[Frame] | None = None
        queues = self._queued[priority]
        for order, queue in list(queues.items()):
            while queue and not self._is_current(queue[0], priority):
                queue.popleft()
            if not queue:
                del queues[order]
            elif (found is None or queue[0].serial < found[0].serial) and self._attempt(queue[0]) is not None:
                found = queue
        return found

    def _attempt(self, frame: Frame) -> Attempt | None:
        """Whom to ask for a queued frame now. None: nobody."""
        attempt = frame.attempt or self._tiers.first(frame.target.name)
        first, *rest = attempt.order
        if self._is_free(first):
            return attempt
        if frame.priority is Priority.DEMAND:
            for number in rest:
                if self._tiers.is_well(number, attempt.pack) and self._is_free(number):
                    return replace(attempt, order=(number, *(other for other in attempt.order if other != number)))
        return None

    def _is_free(self, source: int) -> bool:
        return self._tiers.may_ask(source) and not self.is_full(source)

    def _next_hedge(self) -> Read | None:
        """The next hedge that is still of use."""
        while self._again:
            if any(frame.state is State.READING for frame in self._again[0].frames):
                return self._again[0]
            self.failed(self._again.popleft())
        return None

    def _holds_back(self, priority: Priority) -> bool:
        """Whether the cores are for what is more urgent. What a reader wants next may use those that demand leaves."""
        if priority is Priority.READ_AROUND:
            return self._urgent + self._background_opening >= self._cores
        return self._urgent > 0 or self._background_opening >= self._cores

    def _is_current(self, frame: Frame, priority: Priority) -> bool:
        if frame.state is not State.QUEUED or frame.priority is not priority:
            return False
        if frame.wanted:
            return True
        self.remove(frame)
        return False

    def _fits(self, frame: Frame) -> bool:
        if not self.held:
            return True
        if frame.priority is Priority.DEMAND:
            return self.held + sum(_sizes(frame)) <= self._memory
        # Room for a whole read, or reads would become as small as what comes free
        return self.held + max(min(self._batch, self._most(frame)), sum(_sizes(frame))) <= self._background_memory

    def _most(self, frame: Frame) -> int:
        """Stored bytes to read at a time with a frame."""
        attempt = self._attempt(frame)
        if attempt is None or frame.priority is Priority.DEMAND:
            return self._read_size
        return read_size(self._tiers.sources[attempt.order[0]].speed, self._read_size)

    def _read(self, frame: Frame) -> Read:
        """A read of a queued frame and of its neighbours like it."""
        attempt = self._attempt(frame)
        assert attempt is not None
        limit = self._memory if frame.priority is Priority.DEMAND else self._background_memory
        batch = min(self._batch, limit - self.held)
        most = self._most(frame)
        length, device = _sizes(frame)
        held = length + device
        taken = deque([frame])
        for step in (1, -1):
            while (neighbour := self._like(frame, taken[-1 if step > 0 else 0].index + step)) is not None:
                stored, device = _sizes(neighbour)
                if length + stored > most or held + stored + device > batch:
                    break
                length += stored
                held += stored + device
                (taken.append if step > 0 else taken.appendleft)(neighbour)
        read = Read(list(taken), attempt, length, held)
        for each in taken:
            each.state = State.READING
            each.read = read
        self.lengths[frame.priority] -= len(taken)
        self._hold(read)
        return read

    def _hold(self, read: Read) -> None:
        self._reads.add(read)
        self.held += read.held
        self.peak = max(self.peak, self.held)

    def _like(self, frame: Frame, index: int) -> Frame | None:
        """The frame at ``index``, if it can be read together with ``frame``."""
        other = self._frames[frame.target].get(index)
        if other is None or other.state is not State.QUEUED or other.priority is not frame.priority:
            return None
        return other if other.attempt is frame.attempt and other.wanted else None

    def _expecting(self, read: Read) -> list[Frame]:
        return [frame for frame in read.frames if frame.read is read and frame.state is State.READING]

    def _release(self, read: Read, frame: Frame) -> None:
        """A frame of a read needs its memory no more; the stored bytes go when all its frames are through."""
        read.left -= 1
        freed = read.held if not read.left else _sizes(frame)[1]
        read.held -= freed
        self.held -= freed


def _sizes(frame: Frame) -> tuple[int, int]:
    """Stored bytes, and device bytes where those are others."""
    toc = frame.target.toc
    return int(toc.sizes[frame.index]), 0 if toc.raw else int(toc.device_sizes[frame.index])
