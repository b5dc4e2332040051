"""A thread that looks at the clock for others."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Alarm:
    """Calls ``ring(now)`` from a thread of its own when something is due; ``ring`` returns when the next thing is.

    Times are those of ``time.monotonic``. ``ring`` may be called early, and for nothing: a time once set is not taken
    back, so one that is always the same way ahead wakes the thread once per that way, not every time it is set.
    """

    def __init__(self, ring: Callable[[float], float], name: str) -> None:
        self._ring = ring
        self._condition = threading.Condition()
        self._due = float("inf")
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def at(self, when: float) -> None:
        """Ring at ``when`` at the latest."""
        # Read without the lock, which is right as long as what is due then is already there for ring() to find
        if when < self._due:
            with self._condition:
                if when < self._due:
                    self._due = when
                    self._condition.notify()

    def stop(self, timeout: float | None = None) -> None:
        """End the thread, and wait for that, ``timeout`` seconds at most, unless this is it."""
        with self._condition:
            self._stopped = True
            self._condition.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout)

    def _run(self) -> None:
        while True:
            with self._condition:
                while not self._stopped and (left := self._due - time.monotonic()) > 0:
                    self._condition.wait(None if left == float("inf") else min(left, threading.TIMEOUT_MAX))
                if self._stopped:
                    return
                self._due = float("inf")  # before ring() looks: what it may miss sets it again
            due = self._ring(time.monotonic())
            with self._condition:
                self._due = min(self._due, due)
