"""The supervisor's event loop: descriptors, timers, and calls from other threads.

asyncio would cost more than it gives: 10 MiB of resident memory, and a task per event on the path of every read.
"""

from __future__ import annotations

import heapq
import itertools
import os
import select
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Final

_DRAIN: Final = 4096


class Loop:
    """Runs handlers in one thread until :meth:`stop`. Only :meth:`call` may be used by other threads and by signals."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[], None]] = {}
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._calls: deque[Callable[[], None]] = deque()
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._stopped = False
        self.watch(self._wake_read, self._woken)

    @property
    def wakeup(self) -> int:
        """The descriptor for ``signal.set_wakeup_fd``."""
        return self._wake_write

    def watch(self, descriptor: int, ready: Callable[[], None], events: int = select.EPOLLIN) -> None:
        """Call ``ready`` whenever one of ``events`` is due: something to read, by default; an end of file or an error,
        in any case."""
        self._epoll.register(descriptor, events)
        self._handlers[descriptor] = ready

    def unwatch(self, descriptor: int) -> None:
        """Before the descriptor is closed."""
        if self._handlers.pop(descriptor, None) is not None:
            self._epoll.unregister(descriptor)

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        """Call once, ``seconds`` from now."""
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._order), call))

    def every(self, seconds: float, call: Callable[[], None]) -> None:
        """Call again and again, ``seconds`` apart."""

        def again() -> None:
            call()
            self.after(seconds, again)

        self.after(seconds, again)

    def call(self, call: Callable[[], None]) -> None:
        """Call soon."""
        self._calls.append(call)
        with suppress(BlockingIOError):  # it is awake
            os.write(self._wake_write, b"\0")

    def stop(self) -> None:
        """Let :meth:`run` return."""
        self._stopped = True

    def run(self) -> None:
        """Until :meth:`stop`. What a handler raises comes out of here."""
        while not self._stopped:
            timeout = max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else -1
            for descriptor, _ in self._epoll.poll(timeout):
                handler = self._handlers.get(descriptor)  # an earlier handler may have taken it away
                if handler is not None:
                    handler()
            while self._calls:
                self._calls.popleft()()
            while self._timers and self._timers[0][0] <= time.monotonic():
                heapq.heappop(self._timers)[2]()

    def _woken(self) -> None:
        os.read(self._wake_read, _DRAIN)
