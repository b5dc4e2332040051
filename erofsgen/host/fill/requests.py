"""Who waits for frames, and how they are told. Called under the engine's lock; futures are settled without it."""

from __future__ import annotations

import time
from concurrent.futures import Future

from erofsgen.errors import RemoteError
from erofsgen.host.fill.counters import Counters
from erofsgen.host.fill.work import Priority, Request

Settled = list[tuple[Future[None], BaseException | None]]
"""Futures to settle when the lock is free."""


class Requests:
    """The requests that have a deadline, and the end of all of them."""

    def __init__(self, counters: Counters) -> None:
        self._counters = counters
        self._timed: set[Request] = set()

    def begin(self, request: Request) -> None:
        """Watch a request's deadline."""
        if request.deadline < float("inf"):
            self._timed.add(request)

    def arrived(self, request: Request, settled: Settled) -> None:
        """One of its frames is there."""
        request.pending -= 1
        if not request.pending:
            self.finish(request, None, settled)

    def finish(self, request: Request, error: BaseException | None, settled: Settled) -> None:
        """It is served, or fails. What comes later changes nothing."""
        if request.done:
            return
        request.done = True
        self._timed.discard(request)
        settled.append((request.future, error))
        if error is not None:
            self._counters.failed_requests += 1
        elif request.priority is Priority.DEMAND:
            self._counters.demand_done(time.monotonic() - request.started)

    def expire(self, now: float, settled: Settled) -> float:
        """Fail those whose deadline has come. Returns the next deadline."""
        for request in [request for request in self._timed if request.deadline <= now]:
            self._counters.expired_requests += 1
            self.finish(request, RemoteError(f"{request.what} did not arrive in time"), settled)
        return min((request.deadline for request in self._timed), default=float("inf"))


def settle(settled: Settled) -> None:
    """Tell whoever waits. Not under the lock."""
    for future, error in settled:
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)
