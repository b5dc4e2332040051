"""Are sources that rested well again? A thread reads a frame of each whose rest is over, so that no reader has to."""

from __future__ import annotations

import threading
from typing import Final

from erofsgen.host.fill.alarm import Alarm
from erofsgen.host.fill.health import Sample
from erofsgen.host.fill.sources import Source
from erofsgen.host.fill.tiers import Tiers
from erofsgen.pack.reader import open_frame

_STOP: Final = 1.0
"""Seconds to wait for a probe that is on its way; its thread ends with it."""


class Prober:
    """Probes the sources of ``tiers``, which ``lock`` is held over, one at a time."""

    def __init__(self, tiers: Tiers, lock: threading.Lock) -> None:
        self._tiers = tiers
        self._lock = lock
        self._alarm = Alarm(self._ring, "fill-probe")

    def look(self) -> None:
        """A source may have been given a rest. Called under the lock."""
        self._alarm.at(self._tiers.next_probe())

    def stop(self) -> None:
        """Probe no more."""
        self._alarm.stop(_STOP)

    def _ring(self, now: float) -> float:
        with self._lock:
            due = [(number, self._tiers.sources[number], sample) for number, sample in self._tiers.probes(now)]
        for number, source, sample in due:
            error = _probe(source, sample)
            with self._lock:
                self._tiers.probed(number, error)
        with self._lock:
            return self._tiers.next_probe()


def _probe(source: Source, sample: Sample) -> BaseException | None:
    """What is wrong with a source, None: nothing."""
    try:
        data = bytearray(sample.size)
        source.read_into(f"sha256:{sample.pack}", sample.offset, memoryview(data))
        open_frame(bytes(data), sample.toc, sample.index, what=f"pack {sample.pack}")
    except BaseException as error:  # noqa: BLE001 - a source may raise anything; the thread must live on
        return error
    return None
