"""The course that reads and their frames take: what follows when one is slow, fails, or brings wrong bytes.

No threads and no locks: the engine calls everything under its lock.
"""

from __future__ import annotations

import heapq
import time
from typing import Final

from erofsgen.errors import ErofsgenError
from erofsgen.host.fill.counters import Counters
from erofsgen.host.fill.health import Sample
from erofsgen.host.fill.latency import Budget
from erofsgen.host.fill.opening import Bad
from erofsgen.host.fill.requests import Requests, Settled
from erofsgen.host.fill.schedule import Schedule
from erofsgen.host.fill.tiers import Attempt, Tiers
from erofsgen.host.fill.work import Frame, Read

_NEVER: Final = float("inf")


class Course:
    """Leads frames from source to source. A read is late after ``patience`` seconds, unless its source says when."""

    def __init__(
        self, tiers: Tiers, schedule: Schedule, requests: Requests, counters: Counters, patience: float
    ) -> None:
        self._tiers = tiers
        self._schedule = schedule
        self._requests = requests
        self._counters = counters
        self._patience = patience
        self._budget = Budget()
        self._watched: set[Read] = set()  # reads that may be overtaken or hedged
        self._delayed: list[tuple[float, int, list[Frame]]] = []  # a heap: when, tie-breaker, what
        self._closed = False

    def close(self) -> None:
        """Nothing goes on any more; what is on its way may still bring its frames."""
        self._closed = True
        self._delayed.clear()

    def begin(self, read: Read) -> float:
        """A read begins. Returns when :meth:`look` has something to do with it."""
        source = self._tiers.sources[read.source]
        read.began = time.monotonic()
        if len(read.attempt.order) > 1:
            read.expires = read.began + (source.timeout or self._patience)
        if read.demand and read.first is None:
            self._budget.earn()
            if source.hedged:
                slow = self._tiers.health[read.source].latencies.slow_after(read.length, source.speed)
                read.hedge_at = _NEVER if slow is None else read.began + slow
        if read.due < _NEVER:
            self._watched.add(read)
        return read.due

    def brought(self, read: Read, data: memoryview) -> None:
        """A read has come back with its bytes."""
        self._watched.discard(read)
        self._tiers.brought(read.source, read.length, read.target.name)
        self._counters.read_done(read.length, len(read.frames))
        health = self._tiers.health
        if read.demand:
            health[read.source].latencies.add(time.monotonic() - read.began, read.length)
        if self._schedule.deliver(read, data) and read.first is not None:
            health[read.first.source].hedges_won += 1

    def failed(self, read: Read, error: BaseException, settled: Settled) -> None:
        """A read has come back without them."""
        self._watched.discard(read)
        if not read.late:  # or that was said before
            self._blame(read, error)
        if read.first is not None:  # which is what its frames wait for, and does not have to go on to the same source
            read.first.attempt = self._tiers.beside(read.first.attempt, read.source, error)
        self._go_on(self._schedule.failed(read), read.attempt, error, settled)

    def opened(self, frame: Frame, read: Read, result: int | Bad | ErofsgenError, settled: Settled) -> None:
        """A frame that ``read`` brought was opened: written, bad, or not taken by its target."""
        sample = Sample(frame.target.name, frame.target.toc, frame.index)
        self._schedule.opened(frame)
        if isinstance(result, Bad):
            self._tiers.bad(read.source, result.error, sample)
            self._go_on([frame], read.attempt, result.error, settled)
            return
        self._tiers.succeeded(read.source, sample)
        if isinstance(result, int):
            self._counters.frame_done(result)
        self.conclude(frame, None if isinstance(result, int) else result, settled)

    def look(self, now: float, settled: Settled, *, idle: bool) -> tuple[list[tuple[Read, TimeoutError]], float]:
        """See to all that is due; ``idle``: a thread has nothing to do. Returns the reads overtaken, and what is next.

        An overtaken read has a thread that may not come back for long.
        """
        while self._delayed and self._delayed[0][0] <= now:
            self._schedule.requeue(heapq.heappop(self._delayed)[2])
        overtaken = []
        for read in [read for read in self._watched if read.due <= now]:
            if read.expires <= now:
                slow = TimeoutError(f"no answer in {read.expires - read.began:.3g} s")
                self._overtake(read, slow, settled)
                overtaken.append((read, slow))
            else:
                self._hedge(read, idle=idle)
        return overtaken, self.due()

    def due(self) -> float:
        """When :meth:`look` has to be called next."""
        delayed = self._delayed[0][0] if self._delayed else _NEVER
        watched = min((read.due for read in self._watched), default=_NEVER)
        return min(delayed, watched, self._tiers.next_change(time.monotonic()))

    def conclude(self, frame: Frame, error: BaseException | None, settled: Settled) -> None:
        """A frame is there, or given up."""
        self._schedule.remove(frame)
        for request in frame.waiters:
            if error is None:
                self._requests.arrived(request, settled)
            else:
                self._requests.finish(request, error, settled)

    def _hedge(self, read: Read, *, idle: bool) -> None:
        read.hedge_at = _NEVER
        if idle and not self._closed and self._budget and self._schedule.hedge(read):
            self._budget.spend()
            self._tiers.health[read.source].hedges += 1

    def _overtake(self, read: Read, error: TimeoutError, settled: Settled) -> None:
        self._watched.discard(read)
        self._blame(read, error)
        self._counters.overtaken_reads += 1
        self._go_on(self._schedule.overtake(read), read.attempt, error, settled)

    def _blame(self, read: Read, error: BaseException) -> None:
        sample = Sample(read.target.name, read.target.toc, read.frames[0].index)
        self._tiers.failed(read.source, error, sample)

    def _go_on(self, frames: list[Frame], attempt: Attempt, error: BaseException, settled: Settled) -> None:
        """Frames whose read or bytes failed wait for another read of them, go on to the next attempt, or are lost."""
        following = None if self._closed else self._tiers.after(attempt, error)
        wanted = []
        handed: set[Read] = set()
        for frame in frames:
            if following is None and frame.lost is None:
                what = f"pack {frame.target.name}: frame {frame.index}"
                frame.lost = self._tiers.error(attempt, error, what=what)
            other = self._schedule.elsewhere(frame)
            if other is not None and not (other.late and frame.lost is None):
                self._schedule.expect(frame, other)
                handed.add(other)
            elif frame.lost is not None:
                self.conclude(frame, frame.lost, settled)
            elif following is not None and frame.wanted:
                wanted.append(frame)
                self._schedule.wait(frame, following[0])
            else:
                self._schedule.remove(frame)
        for other in handed:
            other.attempt = self._tiers.beside(other.attempt, attempt.order[0], error)
        if following is None or not wanted:
            return
        self._counters.retries += 1
        if following[1]:
            heapq.heappush(self._delayed, (time.monotonic() + following[1], self._counters.retries, wanted))
        else:
            self._schedule.requeue(wanted)
