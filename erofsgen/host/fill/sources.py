"""Where frames come from: the chain of tiers, in which order they are asked, how often, and which of them failed how.

One *round* asks every source once, the nearest first, without a pause in between; before another round there is one,
random and growing. A source that failed several times in a row rests: it is asked after the others for a while, so
that a dead tier does not cost every read its time-out.

Nothing here waits or locks; the engine calls it under its lock.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from erofsgen.errors import ErofsgenError, FormatError, IntegrityError, NotFoundError, RemoteError, StorageError
from erofsgen.store.base import Store
from erofsgen.store.open import open_store

_FAILURES_BEFORE_REST: Final = 3
_REST: Final = 5.0
"""Seconds that a source rests. It is still asked when all others have failed."""

_BACKOFF_LIMIT: Final = 5.0
"""Seconds between two rounds at most."""


class Source(Protocol):
    """One tier. ``name`` tells the user which."""

    @property
    def name(self) -> str: ...

    def read_into(self, digest: str, offset: int, buffer: memoryview, /) -> None:
        """Fill ``buffer`` with the bytes at ``offset`` of the blob ``digest``; whatever it raises, it failed.

        Called by several threads at once. It must come back some day: threads cannot be interrupted.
        """


class StoreSource:
    """A store as a tier."""

    def __init__(self, store: Store) -> None:
        self.name = store.url
        self.read_into = store.read_into


class UrlSource:
    """A store as a source, opened when it is read first, again and again until that succeeds."""

    def __init__(self, url: str) -> None:
        self.name = url
        self._store: Store | None = None

    def read_into(self, digest: str, offset: int, buffer: memoryview) -> None:
        if self._store is None:
            try:
                self._store = open_store(self.name)
            except NotFoundError as error:  # a store that is not there does not lack this blob alone
                raise RemoteError(str(error), hint=error.hint) from error
        self._store.read_into(digest, offset, buffer)


@dataclass(frozen=True, slots=True)
class Failure:
    """That a source did not bring frames. Not the exception itself, whose traceback holds on to their bytes."""

    source: int
    kind: type[BaseException]
    reason: str
    hint: str | None

    @classmethod
    def of(cls, source: int, error: BaseException) -> Failure:
        """What ``error``, raised by or for ``source``, says."""
        return cls(source, type(error), describe(error), error.hint if isinstance(error, ErofsgenError) else None)


@dataclass(frozen=True, slots=True, eq=False)
class Attempt:
    """How far frames have come along the chain. Frames that came along together share the object."""

    round: int
    order: tuple[int, ...]
    """Sources yet to be asked in this round; never empty."""

    failures: tuple[Failure, ...] = ()
    """In the order asked."""


@dataclass(slots=True)
class Health:
    """What one source has done: counters since the start, and whether it rests."""

    reads: int = 0
    """Reads that brought the number of bytes asked for; in all :attr:`bytes`."""

    bytes: int = 0
    failed: int = 0
    """Reads that raised, had the wrong length or took too long."""

    absent: int = 0
    """Reads of blobs it does not have."""

    bad: int = 0
    """Frames whose bytes were not those of their digest."""

    in_row: int = field(default=0, repr=False)
    rests_until: float = field(default=0.0, repr=False)


class Tiers:
    """The chain of ``sources``, nearest first; ``retries`` rounds after the first.

    The pause before the n-th of them is between half and all of ``backoff * 2 ** (n - 1)`` seconds, 5 at most.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        retries: int,
        backoff: float,
        clock: Callable[[], float] = time.monotonic,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self.sources = list(sources)
        self.health = [Health() for _ in sources]
        self._absent: set[tuple[int, str]] = set()
        self._retries = retries
        self._backoff = backoff
        self._clock = clock
        self._uniform = uniform

    def add(self, source: Source) -> None:
        """One more, the farthest."""
        self.sources.append(source)
        self.health.append(Health())

    def first(self, pack: str) -> Attempt:
        """Where frames of a pack begin that nobody was asked for: sources that lacked it come last."""
        order = self._order(range(len(self.sources)))
        if self._absent:
            order = tuple(sorted(order, key=lambda number: (number, pack) in self._absent))
        return Attempt(0, order)

    def after(self, attempt: Attempt, error: BaseException) -> tuple[Attempt, float] | None:
        """What follows when the first source of ``attempt`` failed: the next attempt, and seconds to wait before it.

        None: there is none.
        """
        failed, *rest = attempt.order
        failures = (*attempt.failures, Failure.of(failed, error))
        if rest:
            return Attempt(attempt.round, tuple(rest), failures), 0.0
        absent = {failure.source for failure in failures if issubclass(failure.kind, NotFoundError)}
        order = self._order(number for number in range(len(self.sources)) if number not in absent)
        if attempt.round == self._retries or not order:
            return None
        pause = min(self._backoff * 2.0**attempt.round, _BACKOFF_LIMIT)
        return Attempt(attempt.round + 1, order, failures), self._uniform(pause / 2, pause)

    def brought(self, source: int, length: int) -> None:
        """A read of this source brought the ``length`` bytes asked for."""
        self.health[source].reads += 1
        self.health[source].bytes += length

    def succeeded(self, source: int) -> None:
        """A frame from this source was right."""
        self.health[source].in_row = 0

    def failed(self, source: int, error: BaseException, pack: str) -> None:
        """A read of this source failed. Not to have a blob is no fault of a tier."""
        if isinstance(error, NotFoundError):
            self.health[source].absent += 1
            self._absent.add((source, pack))
        else:
            self.health[source].failed += 1
            self._fell(source)

    def bad(self, source: int) -> None:
        """A frame from this source was not what it should be."""
        self.health[source].bad += 1
        self._fell(source)

    def error(self, attempt: Attempt, error: BaseException, *, what: str) -> ErofsgenError:
        """The user's error for frames given up when the first source of ``attempt`` failed: names each source once."""
        failures = (*attempt.failures, Failure.of(attempt.order[0], error))
        last = {failure.source: failure for failure in failures}
        reasons = "; ".join(f"{self.sources[source].name}: {failure.reason}" for source, failure in last.items())
        hints = [failure.hint for failure in last.values() if failure.hint]
        kind: type[ErofsgenError] = RemoteError
        for common in (StorageError, FormatError, IntegrityError, NotFoundError):
            if all(issubclass(failure.kind, common) for failure in last.values()):
                kind = common
        return kind(f"{what}: no source has it: {reasons}", hint=hints[-1] if hints else None)

    def _order(self, numbers: Iterable[int]) -> tuple[int, ...]:
        now = self._clock()
        return tuple(sorted(numbers, key=lambda number: self.health[number].rests_until > now))

    def _fell(self, source: int) -> None:
        health = self.health[source]
        health.in_row += 1
        if health.in_row >= _FAILURES_BEFORE_REST:
            health.rests_until = self._clock() + _REST


def describe(error: BaseException) -> str:
    """An error as part of one line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, ErofsgenError) and text else f"{type(error).__name__}: {text}".removesuffix(": ")
