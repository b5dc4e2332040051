"""The chain of tiers: in which order sources are asked for a pack's frames, how often, and what came of it.

One *round* asks every source of a pack once, the nearest first, without a pause in between; before another round there
is one, random and growing. Sources of one level share the packs by weighted rendezvous hashing: each pack has an order
of its own, in which a source is first as often as its weight says; where one dies, its packs spread over the others,
and all else stays where it is. Whoever rests (:mod:`.health`) or was seen to lack a pack is asked for it after all
others.

Nothing here waits or locks; the engine calls it under its lock.
"""

from __future__ import annotations

import hashlib
import math
import random
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

from erofsgen.errors import ErofsgenError, FormatError, IntegrityError, NotFoundError, RemoteError, StorageError
from erofsgen.host.fill.health import Health, Sample
from erofsgen.host.fill.sources import Source, describe

_BACKOFF_LIMIT: Final = 5.0
"""Seconds between two rounds at most."""


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
    """How far frames of a pack have come along the chain. Frames that came along together share the object."""

    pack: str
    round: int
    order: tuple[int, ...]
    """Sources yet to be asked in this round; never empty."""

    failures: tuple[Failure, ...] = ()
    """In the order asked."""


class Gap(NamedTuple):
    """That ``source`` lacks a pack which another brought frames of."""

    source: int
    pack: str
    brought_by: int


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
        self.sources: list[Source] = []
        self.health: list[Health] = []
        self._packs: list[set[str] | None] = []  # of each source those it is asked for; None: all
        self._chains: dict[str, tuple[int, ...]] = {}
        self._absent: set[tuple[int, str]] = set()
        self._gaps: list[Gap] = []  # that nobody was told of yet
        self._seen: set[tuple[int, str]] = set()  # gaps that were found, ever
        self._retries = retries
        self._backoff = backoff
        self._clock = clock
        self._uniform = uniform
        for source in sources:
            self._append(source, None)

    def add(self, source: Source, packs: Collection[str] | None = None) -> None:
        """One more source, for these packs or for all. One whose name is known is asked for these packs as well."""
        names = [known.name for known in self.sources]
        if source.name not in names:
            self._append(source, packs)
            return
        known = self._packs[names.index(source.name)]
        if known is not None and not (packs is not None and known.issuperset(packs)):
            if packs is None:
                self._packs[names.index(source.name)] = None
            else:
                known.update(packs)
            self._chains.clear()

    def chain(self, pack: str) -> tuple[int, ...]:
        """All sources of a pack, nearest first. Empty: none is known."""
        found = self._chains.get(pack)
        if found is None:
            numbers = [number for number, packs in enumerate(self._packs) if packs is None or pack in packs]
            found = self._chains[pack] = tuple(sorted(numbers, key=lambda number: self._distance(number, pack)))
        return found

    def first(self, pack: str) -> Attempt:
        """Where frames of a pack begin that nobody was asked for."""
        return Attempt(pack, 0, self._order(self.chain(pack), pack))

    def after(self, attempt: Attempt, error: BaseException) -> tuple[Attempt, float] | None:
        """What follows when the first source of ``attempt`` failed: the next attempt, and seconds to wait before it.

        None: there is none.
        """
        failed, *rest = attempt.order
        failures = (*attempt.failures, Failure.of(failed, error))
        if rest:
            return replace(attempt, order=tuple(rest), failures=failures), 0.0
        absent = {failure.source for failure in failures if issubclass(failure.kind, NotFoundError)}
        again = [
            number
            for number in self.chain(attempt.pack)
            if number not in absent and attempt.round < self._rounds(number)
        ]
        if not again:
            return None
        pause = min(self._backoff * 2.0**attempt.round, _BACKOFF_LIMIT)
        order = self._order(again, attempt.pack)
        return Attempt(attempt.pack, attempt.round + 1, order, failures), self._uniform(pause / 2, pause)

    def beside(self, attempt: Attempt, source: int, error: BaseException) -> Attempt:
        """``attempt``, whose first source is still at work, when ``source``, asked for the same frames, failed."""
        first, *rest = attempt.order
        order = (first, *(number for number in rest if number != source))
        return replace(attempt, order=order, failures=(*attempt.failures, Failure.of(source, error)))

    def is_well(self, source: int, pack: str) -> bool:
        """Whether a source neither rests nor lacks a pack."""
        return not self.health[source].is_open and (source, pack) not in self._absent

    def may_ask(self, source: int) -> bool:
        """Whether a source that asked for a pause has had it."""
        not_before = self.health[source].not_before
        return not not_before or not_before <= self._clock()

    def next_change(self, now: float) -> float:
        """When the next such pause is over."""
        return min((health.not_before for health in self.health if health.not_before > now), default=math.inf)

    def probes(self, now: float) -> list[tuple[int, Sample]]:
        """The sources whose rest is over, and what to read of them."""
        return [
            (number, health.sample)
            for number, health in enumerate(self.health)
            if health.is_open and health.rests_until <= now and health.sample is not None
        ]

    def next_probe(self) -> float:
        """When the next rest is over."""
        return min((health.rests_until for health in self.health if health.is_open), default=math.inf)

    def rests(self, source: int) -> float:
        """Seconds that a source rests yet."""
        return max(0.0, self.health[source].rests_until - self._clock())

    def brought(self, source: int, length: int, pack: str) -> None:
        """A read of this source brought the ``length`` bytes asked for."""
        self.health[source].reads += 1
        self.health[source].bytes += length
        if self._absent:
            for number in self.chain(pack):
                if (number, pack) in self._absent and (number, pack) not in self._seen:
                    self._seen.add((number, pack))
                    self._gaps.append(Gap(number, pack, source))

    def succeeded(self, source: int, sample: Sample) -> None:
        """A frame from this source was right."""
        self.health[source].rose()
        self.health[source].keep(sample, brought=True)

    def failed(self, source: int, error: BaseException, sample: Sample) -> None:
        """A read of this source, which ``sample`` was part of, failed. Not to have a blob is no fault of a tier."""
        if isinstance(error, NotFoundError):
            self.health[source].absent += 1
            self._absent.add((source, sample.pack))
        else:
            self.health[source].failed += 1
            self._fell(source, error, sample)

    def bad(self, source: int, error: FormatError, sample: Sample) -> None:
        """A frame from this source was not what it should be."""
        self.health[source].bad += 1
        self.sources[source].doubt()
        self._fell(source, error, sample)

    def probed(self, source: int, error: BaseException | None) -> None:
        """A probe has come to an end. Whoever says that it has no such blob is at work."""
        if error is None or isinstance(error, NotFoundError):
            self.health[source].rose()
        else:
            self.health[source].fell(error, self._clock())

    def gaps(self) -> list[Gap]:
        """Packs that sources were found to lack and others to have since this was last asked; each once for ever."""
        found, self._gaps = self._gaps, []
        return found

    def closed_gap(self, source: int, pack: str) -> None:
        """A source has a pack now that it lacked."""
        self._absent.discard((source, pack))

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

    def _append(self, source: Source, packs: Collection[str] | None) -> None:
        self.sources.append(source)
        self.health.append(Health())
        self._packs.append(None if packs is None else set(packs))
        self._chains.clear()

    def _rounds(self, number: int) -> int:
        own = self.sources[number].retries
        return self._retries if own is None else min(own, self._retries)

    def _order(self, numbers: Iterable[int], pack: str) -> tuple[int, ...]:
        return tuple(sorted(numbers, key=lambda number: ((number, pack) in self._absent, self.health[number].is_open)))

    def _distance(self, number: int, pack: str) -> tuple[float, float]:
        """What sources are sorted by for a pack."""
        source = self.sources[number]
        if source.level is None:
            return math.inf, number
        digest = hashlib.blake2b(f"{source.name}\0{pack}".encode(), digest_size=8).digest()
        return source.level, -math.log((int.from_bytes(digest) + 0.5) / 2**64) / source.weight

    def _fell(self, source: int, error: BaseException, sample: Sample) -> None:
        self.health[source].fell(error, self._clock())
        self.health[source].keep(sample, brought=False)
