"""Packs into tiers that lacked them: whole, one at a time, and only while no reader waits for anything."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Final

from erofsgen.host.fill.engine import Engine, Gap
from erofsgen.host.fill.sources import Source, UrlSource, describe
from erofsgen.host.fill.work import Priority
from erofsgen.store.copy import copy_blob

_logger: Final = logging.getLogger(__name__)

_INTERVAL: Final = 1.0
_YIELD: Final = 0.05
"""Seconds between two looks whether readers still wait."""


class Feeder:
    """Copies what ``engine`` had to get from elsewhere into the tiers that are to be fed.

    ``size`` knows the bytes of a pack. What fails is logged and not tried again.
    """

    def __init__(self, engine: Engine, size: Callable[[str], int]) -> None:
        self._engine = engine
        self._size = size

    def start(self) -> None:
        """Begin; it ends with the process."""
        threading.Thread(target=self._run, name="feeder", daemon=True).start()

    def feed(self) -> None:
        """Copy what was found lacking since this was called last."""
        for gap in self._engine.gaps():
            if isinstance(gap.lacking, UrlSource) and gap.lacking.feed:
                try:
                    self._copy(gap, gap.lacking)
                except Exception as error:  # noqa: BLE001 - the thread must live on
                    _logger.warning(
                        "%s: not fed with pack %s: %s", gap.lacking.name, gap.pack, describe(error),
                        extra={"source": gap.lacking.name, "pack": gap.pack},
                    )  # fmt: skip

    def _run(self) -> None:
        while True:
            time.sleep(_INTERVAL)
            self.feed()

    def _copy(self, gap: Gap, tier: UrlSource) -> None:
        store = tier.store()
        with store.building():
            copy_blob(_Unhurried(gap.brought_by, self._engine), store, f"sha256:{gap.pack}", self._size(gap.pack))
        self._engine.fed(tier, gap.pack)


class _Unhurried:
    """A source that is not read while readers wait for something."""

    def __init__(self, source: Source, engine: Engine) -> None:
        self._source = source
        self._engine = engine

    def read_into(self, digest: str, offset: int, buffer: memoryview, /) -> None:
        while self._engine.waiting(Priority.DEMAND):
            time.sleep(_YIELD)
        self._source.read_into(digest, offset, buffer)

    def doubt(self) -> None:
        self._source.doubt()
