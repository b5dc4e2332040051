"""What passes through the fill engine: requests, the frames they wait for, and the reads that bring those."""

from __future__ import annotations

from concurrent.futures import Future
from enum import Enum, IntEnum, auto
from typing import Protocol

from erofsgen.errors import ErofsgenError
from erofsgen.host.fill.tiers import Attempt
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
    """Where a frame is, see :mod:`erofsgen.host.fill.schedule`."""

    QUEUED = auto()
    READING = auto()
    WAITING = auto()
    FETCHED = auto()
    OPENING = auto()
    DONE = auto()


class Frame:
    """A frame that is not there yet."""

    __slots__ = (
        "attempt", "background", "index", "lost", "priority", "read", "serial", "state", "stored", "target", "waiters",
    )  # fmt: skip

    def __init__(self, target: Target, index: int, priority: Priority) -> None:
        self.target = target
        self.index = index
        self.priority = priority
        self.state = State.QUEUED
        self.serial = 0  # when it was queued, to compare with others
        self.waiters: list[Request] = []
        self.attempt: Attempt | None = None  # how far along the chain of tiers; None: nobody was asked
        self.read: Read | None = None  # the read its bytes are expected from, or came with
        self.stored: memoryview | None = None  # its bytes in the pack, within the read's
        self.background = False  # holds a slot for background opening
        self.lost: ErofsgenError | None = None  # the chain is at its end: what it fails with if no late read brings it

    @property
    def wanted(self) -> bool:
        """Whether anybody still waits for it."""
        return any(not waiter.done for waiter in self.waiters)


class Read:
    """One ranged read: neighbouring ``frames`` of a pack from the first source of ``attempt``.

    ``first``: the read that this one asks a second time for, because it is slow.
    """

    __slots__ = (
        "attempt", "background", "began", "demand", "expires", "first", "frames", "hedge_at", "held", "late", "left",
        "length", "offset", "target",
    )  # fmt: skip

    def __init__(
        self, frames: list[Frame], attempt: Attempt, length: int, held: int, *, first: Read | None = None
    ) -> None:
        start = frames[0]
        self.target = start.target
        self.frames = frames
        self.attempt = attempt  # what follows if it fails; its source stays the same
        self.offset = int(start.target.toc.offsets[start.index])
        self.length = length
        self.held = held  # bytes of memory accounted to it
        self.left = len(frames)  # frames that still use its memory
        self.demand = start.priority is Priority.DEMAND
        self.background = not self.demand
        self.first = first
        self.began = 0.0
        self.hedge_at = float("inf")  # when its frames are asked for a second time
        self.expires = float("inf")
        self.late = False  # took too long; its frames went on without it

    @property
    def source(self) -> int:
        """Number of the source it asks."""
        return self.attempt.order[0]

    @property
    def due(self) -> float:
        """When the clock has something to do with it."""
        return min(self.expires, self.hedge_at)
