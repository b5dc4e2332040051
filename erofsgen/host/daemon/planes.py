"""What a supervisor and the plane that it runs may ask of one another.

A plane is a class, made of what requests come through, a descriptor that :class:`.standby.Standby` can hold: None
begins anew.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol, cast

from erofsgen.errors import ErofsgenError
from erofsgen.host.daemon.journal import Entry

_CLASSES: Final = {
    "fanotify": "fanotify_daemon.plane.Plane",
    "fscache": "fscache_daemon.plane.Plane",
    "blockfuse": "fusefallback.plane.BlockPlane",
    "fuse": "fusefallback.plane.Plane",
}

LAZY: Final = tuple(_CLASSES)
"""The planes that bring data on demand, in the order ``auto`` prefers them."""


def load(name: str) -> Callable[..., Plane]:
    """The class of a plane of :data:`LAZY`."""
    module, _, attribute = _CLASSES[name].rpartition(".")
    return cast(Callable[..., Plane], getattr(importlib.import_module(module), attribute))


Done = Callable[[ErofsgenError | None], None]
"""Called once, with what went wrong or None."""


class Introduction(NamedTuple):
    """What the worker must know to write to a pack: a descriptor, and facts for it alone."""

    descriptor: int
    facts: dict[str, str]


class Supervisor(Protocol):
    """What a plane may ask of its supervisor. All in the supervisor's thread, but for :meth:`call`."""

    deadline: float
    """Seconds that a request may wait."""

    def saw(self, key: int, /) -> None:
        """A request was read from the kernel; only where the plane is journalled."""

    def missing(self, key: int, pack: str, offset: int, length: int, /) -> None:
        """A request that the worker has to see to; :meth:`Plane.answer` follows."""

    def touched(
        self, pack: str, offset: int, length: int, pid: int, key: int | None = None, mount: str | None = None, /
    ) -> None:
        """A range of the pack with this SHA-256 is read by the process ``pid``, 0 where that is not known.

        ``key``: of the request that it makes; :meth:`missing` follows. ``mount``: whose, where the plane knows.
        """

    def cannot_see(self, pack: str, /) -> bool:
        """The plane would let go of a complete pack and not hear of its reads any more. False: somebody wants it to."""

    def ahead(self, pack: str, offset: int, length: int, /) -> None:
        """A range that somebody will want soon."""

    def forget(self, pack: str, /) -> None:
        """The pack is no longer used: the worker lets go of it."""

    def gave_back(self, size: int, /) -> None:
        """Bytes of the cache are free that the worker does not know of."""

    def failed(self, error: str, pack: str | None = None, /) -> None:
        """A read failed, or an open, that the plane answered by itself; of ``pack``, where that is known."""

    def call(self, call: Callable[[], None], /) -> None:
        """Run ``call`` in the supervisor's thread, soon. From any thread."""

    def after(self, seconds: float, call: Callable[[], None], /) -> None:
        """Run ``call`` once, in so many seconds."""

    def watch(self, descriptor: int, ready: Callable[[], None], events: int, /) -> None:
        """Run ``ready`` whenever one of ``events`` (epoll(7)) is due for ``descriptor``."""

    def unwatch(self, descriptor: int, /) -> None:
        """Before a descriptor that is watched is closed."""


class Plane(Protocol):
    """What a supervisor asks of its plane, in its own thread."""

    name: str
    journalled: bool
    """Whether requests must be kept for the next supervisor, because the kernel tells of each once."""
    survives: bool
    """Whether another supervisor can go on with the descriptor."""

    serves: bool
    """Whether processes that read packs by themselves outlive it, and go on with the next supervisor."""

    def attach(self, supervisor: Supervisor) -> None:
        """Comes before anything else."""

    def moved(self) -> None:
        """This process was forked since the plane was made."""

    def fileno(self) -> int:
        """Readable when requests wait, and all there is to hand on."""

    def serve(self) -> None:
        """Read requests and answer those whose bytes are there."""

    def answer(self, key: int, *, failed: bool) -> None:
        """End a request that was handed on."""

    def through(self, packs: Sequence[str]) -> list[str | None] | None:
        """What :meth:`introduce` knows packs by that somebody has mounted, None for each that nobody has.

        None: by their SHA-256, once they are armed.
        """

    def introduce(self, pack: str) -> Introduction | None:
        """How the worker writes to a pack; None: not through the plane."""

    def arm(self, mount: str, paths: Iterable[Path], done: Done) -> None:
        """See to packs, given by their data files, for a mount about to be made. :meth:`made` must follow."""

    def made(self, mount: str) -> None:
        """The mount was made, or given up."""

    def completed(self, name: str) -> None:
        """All of a pack may be there."""

    def sweep(self) -> None:
        """Now and then: let go of what nothing uses any more."""

    def cull(self, wanted: int | None, keep: Collection[str] | None) -> int:
        """Free ``wanted`` bytes, None: all there are, of what the kernel keeps by itself; returns how many were.

        ``keep``: digests of packs and images to pass over; None: the pinned.
        """

    def prove(self, paths: Iterable[Path], done: Done) -> None:
        """Have a descriptor to write with for each pack that a dead supervisor's readers wait for."""

    def inherit(self, entries: Sequence[Entry], highest: int) -> list[Entry]:
        """Take over from a dead supervisor, whose journal has ``entries``. Returns those that wait under their key."""

    def close_for_good(self, paths: Iterable[Path], done: Callable[[list[Path]], None]) -> None:
        """Let no read of a hole succeed once the descriptor is gone, then call ``done`` with what was cut off."""

    def in_use(self) -> bool:
        """Whether the kernel uses it for mounts that nobody has told us of."""

    def facts(self) -> dict[str, Any]:
        """For ``status``."""
