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

A frame has one place here whoever asks for it (single-flight); a demand for one in the background takes it along, in
whatever state it is. Queues are not searched for that: the frame is also put into the better queue, and its stale
place in the other is passed over.

No threads, no clocks, no locks: the engine calls everything under its lock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future
from enum import Enum, IntEnum, auto
from typing import Final, Protocol

from erofsgen.host.fill.sources import Attempt, Tiers
from erofsgen.pack.toc import Toc


class Priority(IntEnum):
    """How urgent a range is; less is more urgent."""

    DEMAND = 0
    """Somebody waits for it."""

    READ_AROUND = 1
    """Beside what somebody waits for."""

    PREFETCH = 2
    """Likely to be wanted."""

    SCRUB = 3
    """Repair of what nobody asked for."""


_PRIORITIES: Final = tuple(Priority)


class Target(Protocol):
    """The sink: one pack's bytes on this host. Hashable; methods are called by several threads at once."""

    @property
    def name(self) -> str:
        """SHA-256 of the pack in hex."""

    @property
    def toc(self) -> Toc:
        """The pack's table of contents."""

    def ready(self, first: int, last: int, /) -> bool:
        """Whether all frames from ``first`` to ``last``, both included, are there. Asked on the hot path."""

    def missing(self, frames: range, /) -> list[int]:
        """Those of ``frames`` that are not there, in order. Asked under the engine's lock: must not wait."""

    def write_frame(self, frame: int, data: bytes, /) -> None:
        """Take a frame's verified device bytes. It is there when this returns. ``data`` may be a memoryview."""


class Request:
    """Somebody who waits for frames, until ``pending`` of them have come or it is ``done`` for another reason."""

    __slots__ = ("deadline", "done", "future", "pending", "priority", "started", "what")

    def __init__(self, what: str, priority: Priority, started: float, deadline: float) -> None:
        self.future: Future[None] = Future()
        self.future.set_running_or_notify_cancel()  # not to be cancelled from outside
        self.what = what
        self.priority = priority
        self.started = started
        self.deadline = deadline  # infinite where there is none
        self.pending = 1  # whoever makes it counts as one until all its frames are known
        self.done = False


class State(Enum):
    """Where a frame is, see above."""

    QUEUED = auto()
    READING = auto()
    WAITING = auto()
    FETCHED = auto()
    OPENING = auto()
    DONE = auto()


class Frame:
    """A frame that is not there yet."""

    __slots__ = ("attempt", "background", "index", "priority", "read", "state", "stored", "target", "waiters")

    def __init__(self, target: Target, index: int, priority: Priority) -> None:
        self.target = target
        self.index = index
        self.priority = priority
        self.state = State.QUEUED
        self.waiters: list[Request] = []
        self.attempt: Attempt | None = None  # how far along the chain of tiers; None: nobody was asked
        self.read: Read | None = None  # the read its bytes are expected from, or came with
        self.stored: memoryview | None = None  # its bytes in the pack, within the read's
        self.background = False  # holds a slot for background opening

    @property
    def wanted(self) -> bool:
        """Whether anybody still waits for it."""
        return any(not waiter.done for waiter in self.waiters)


class Read:
    """One ranged read: frames ``[first, first + len(frames))`` of a pack from the first source of ``attempt``."""

    __slots__ = ("attempt", "background", "expires", "frames", "held", "late", "left", "length", "offset", "target")

    def __init__(self, frames: list[Frame], attempt: Attempt, length: int, held: int) -> None:
        first = frames[0]
        self.target = first.target
        self.frames = frames
        self.attempt = attempt
        self.offset = int(first.target.toc.offsets[first.index])
        self.length = length
        self.held = held  # bytes of memory accounted to it
        self.left = len(frames)  # frames that still use its memory
        self.background = first.priority is not Priority.DEMAND
        self.expires = float("inf")
        self.late = False  # took too long; its frames went on without it

    @property
    def source(self) -> int:
        """Number of the source it asks."""
        return self.attempt.order[0]


Work = Read | Frame


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
        self._queued: Final = tuple(deque[Frame]() for _ in Priority)
        self._fetched: Final = tuple(deque[Frame]() for _ in Priority)
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
        self._queued[priority].append(frame)
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
            self._queued[priority].append(frame)
        elif frame.state in (State.FETCHED, State.OPENING):
            self._urgent += priority is Priority.DEMAND
            if frame.state is State.FETCHED:
                self._fetched[priority].append(frame)

    def runnable(self) -> bool:
        """Whether :meth:`take` would return work."""
        return self._next() is not None

    def take(self) -> Work | None:
        """The next work, which is the caller's to do. None: none, or none that memory and threads allow."""
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
        self.held -= read.held
        read.held = 0
        return self._expecting(read)

    def overtake(self, read: Read) -> list[Frame]:
        """A read takes too long. Returns the frames that have to go on without it; its memory stays accounted."""
        self._background_busy -= read.background
        read.background = False
        read.late = True
        return self._expecting(read)

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
                self._queued[frame.priority].append(frame)

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
            queued = self._queued[priority]
            while queued and not self._is_current(queued[0], priority):
                queued.popleft()
            if queued and memory_left:
                if self._fits(queued[0]):
                    return queued
                memory_left = False  # what comes free is for this frame, not for smaller ones behind it
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
        # Room for a large read, or reads would become as small as what comes free
        return self.held + max(self._batch, sum(_sizes(frame))) <= self._background_memory

    def _read(self, frame: Frame) -> Read:
        """A read of a queued frame and of its neighbours like it."""
        limit = self._memory if frame.priority is Priority.DEMAND else self._background_memory
        batch = min(self._batch, limit - self.held)
        length, device = _sizes(frame)
        held = length + device
        taken = deque([frame])
        for step in (1, -1):
            while (neighbour := self._like(frame, taken[-1 if step > 0 else 0].index + step)) is not None:
                stored, device = _sizes(neighbour)
                if length + stored > self._read_size or held + stored + device > batch:
                    break
                length += stored
                held += stored + device
                (taken.append if step > 0 else taken.appendleft)(neighbour)
        read = Read(list(taken), frame.attempt or self._tiers.first(frame.target.name), length, held)
        for each in taken:
            each.state = State.READING
            each.read = read
        self.lengths[frame.priority] -= len(taken)
        self.held += held
        self.peak = max(self.peak, self.held)
        return read

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
        freed = read.held if not read.left else int(frame.target.toc.device_sizes[frame.index])
        read.held -= freed
        self.held -= freed


def _sizes(frame: Frame) -> tuple[int, int]:
    """Stored and device bytes."""
    toc = frame.target.toc
    return int(toc.sizes[frame.index]), int(toc.device_sizes[frame.index])
