"""What the kernel waits for and the worker is to bring: requests, their deadlines, their journal."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from typing import Final, NamedTuple

from erofsgen.host.daemon.journal import Journal

_STALE: Final = 2.0
"""Seconds for which a range that nobody brought in time is not waited for again. The kernel asks several times for what
one read(2) wants, ever smaller; the reader would wait for each."""


class Request(NamedTuple):
    """``[offset, offset + length)`` of a pack, to be there by ``deadline``, a time of ``time.monotonic``."""

    key: int
    pack: str
    offset: int
    length: int
    deadline: float
    serial: int
    """Keys are used again, this is not: an answer that comes late must not be taken for a later request's."""


class Requests:
    """Requests that wait, by key. All have the same ``seconds`` to live, so the oldest expires first.

    ``journal``: None where the kernel tells the next supervisor what is not answered yet.
    """

    def __init__(self, journal: Journal | None, seconds: float) -> None:
        self._journal = journal
        self._seconds = seconds
        self._waiting: dict[int, Request] = {}
        self._serials = itertools.count()
        self._stale: dict[str, tuple[int, int, float]] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Request]:
        return iter(tuple(self._waiting.values()))

    def add(self, key: int, pack: str, offset: int, length: int) -> Request:
        """Somebody waits from now on. Raises IndexError where the journal has no slot for the key."""
        if self._journal is not None:
            self._journal.add(key, pack, offset, length)
        request = Request(key, pack, offset, length, time.monotonic() + self._seconds, next(self._serials))
        self._waiting[key] = request
        return request

    def get(self, key: int) -> Request | None:
        """The request, if it still waits."""
        return self._waiting.get(key)

    def answered(self, key: int) -> None:
        """The kernel has its answer."""
        if self._waiting.pop(key, None) is not None and self._journal is not None:
            self._journal.remove(key)

    def expired(self) -> Iterator[Request]:
        """Those whose time is up."""
        now = time.monotonic()
        for request in self:
            if request.deadline > now:
                break
            start, end = request.offset, request.offset + request.length
            older = self._stale.get(request.pack)
            if older is not None and older[2] > now:
                start, end = min(start, older[0]), max(end, older[1])
            self._stale[request.pack] = (start, end, now + _STALE)
            yield request

    def is_stale(self, pack: str, offset: int, length: int) -> bool:
        """Whether a range was not brought in time a moment ago."""
        stale = self._stale.get(pack)
        if stale is None:
            return False
        if stale[2] < time.monotonic():
            del self._stale[pack]
            return False
        return offset < stale[1] and offset + length > stale[0]
