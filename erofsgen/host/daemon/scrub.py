"""Verification in the background: the whole cache, again and again, slowly."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from erofsgen.errors import ErofsgenError
from erofsgen.host.cache.manage import packs_of
from erofsgen.host.cache.verify import verify
from erofsgen.progress import Task

if TYPE_CHECKING:
    from erofsgen.host.daemon.worker import Worker

_logger: Final = logging.getLogger(__name__)

_PAUSE: Final = 60.0
"""Seconds between two passes at least."""


class Scrubber(threading.Thread):
    """Compares the packs of ``worker``'s cache with their digests, ``rate`` bytes a second, and repairs them.

    In an order of its own each time, so that a worker that is often started anew comes to all of them.
    """

    def __init__(self, worker: Worker, rate: int) -> None:
        super().__init__(name="scrub", daemon=True)
        self._worker = worker
        self._rate = rate

    def run(self) -> None:
        """Until the process ends."""
        while True:
            try:
                self._scrub()
            except ErofsgenError as error:
                _logger.error("scrub: %s", error)
            time.sleep(_PAUSE)

    def _scrub(self) -> None:
        packs = packs_of(self._worker.images())
        random.shuffle(packs)
        report = verify(packs, self._worker.opened, self._worker.engine, _Paced(self._rate))
        for bad in report.bad:
            _logger.warning(
                "scrub: pack %s: frame %s: %s", bad.pack, bad.frame, bad.outcome,
                extra={"pack": bad.pack, "frame": bad.frame},
            )  # fmt: skip


class _Paced:
    """Progress that holds its work back to ``rate`` bytes a second."""

    def __init__(self, rate: int) -> None:
        self._rate = rate
        self._next = time.monotonic()
        self._lock = threading.Lock()

    @contextmanager
    def task(self, label: str, total: int | None = None) -> Iterator[Task]:  # noqa: ARG002  (the protocol's names)
        yield self

    def advance(self, amount: int) -> None:
        with self._lock:
            self._next = max(self._next, time.monotonic()) + amount / self._rate
            pause = self._next - time.monotonic()
        time.sleep(max(0.0, pause))
