"""What the worker does when nobody waits: complete packs, make marks durable, scrub."""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, Final

from erofsgen.errors import ErofsgenError
from erofsgen.host.cache.objectfile import ObjectFile
from erofsgen.host.cache.packfile import PackFile
from erofsgen.host.fill.engine import Priority

if TYPE_CHECKING:
    from concurrent.futures import Future

    from erofsgen.host.daemon.worker import Worker

Filled = PackFile | ObjectFile

_logger: Final = logging.getLogger(__name__)

_INTERVAL: Final = 1.0
_SETTLE: Final = 60.0
"""Seconds between two times that marks are made durable: by then the kernel has written most by itself."""
_AGAIN: Final = 30.0
"""Seconds before a pack that could not be completed is tried again."""


class Housekeeping:
    """A thread that looks after the packs of ``worker``.

    A pack is completed in the background once ``complete_at`` of it (0 to 1; above 1: never) is there: a complete pack
    needs no mark, and its reads no answers.
    """

    def __init__(self, worker: Worker, *, complete_at: float) -> None:
        self._worker = worker
        self._complete_at = complete_at
        self._touched: set[Filled] = set()
        self._completing: set[Filled] = set()
        self._not_before: dict[Filled, float] = {}
        self._lock = threading.Lock()  # over the three above

    def start(self) -> None:
        """Begin; it ends with the process."""
        threading.Thread(target=self._run, name="housekeeping", daemon=True).start()

    def touched(self, pack: Filled) -> None:
        """Something of the pack was asked for."""
        with self._lock:
            self._touched.add(pack)

    def _run(self) -> None:
        settle = time.monotonic() + _SETTLE
        while True:
            time.sleep(_INTERVAL)
            try:
                self._look()
                for pack in self._worker.packs():
                    pack.uncache()
                if time.monotonic() >= settle:
                    for pack in self._worker.packs():
                        pack.settle()
                    settle = time.monotonic() + _SETTLE
            except ErofsgenError as error:
                _logger.error("%s", error)
            except (OSError, ValueError) as error:  # a pack was closed in the middle of it
                _logger.debug("%s", error)

    def _look(self) -> None:
        with self._lock:
            touched, self._touched = self._touched, set()
        now = time.monotonic()
        for pack in touched.intersection(self._worker.packs()):
            try:
                present = pack.presence.count()
            except ValueError:  # it was closed in this moment
                continue
            if present == len(pack.toc):
                self._worker.tell({"do": "complete", "pack": pack.name})
            elif pack in self._completing or self._not_before.get(pack, 0.0) > now or self._worker.prefetching.active:
                self.touched(pack)
            elif present >= self._complete_at * len(pack.toc):
                self._complete(pack)

    def _complete(self, pack: Filled) -> None:
        with self._lock:
            self._completing.add(pack)
        future = self._worker.engine.request(pack, 0, pack.toc.device_size, priority=Priority.PREFETCH)
        future.add_done_callback(lambda ended: self._completed(pack, ended))

    def _completed(self, pack: Filled, ended: Future[None]) -> None:
        with self._lock:
            self._completing.discard(pack)
            if ended.exception() is not None:
                self._not_before[pack] = time.monotonic() + _AGAIN
            else:
                self._not_before.pop(pack, None)
                self._touched.add(pack)
