"""How long reads of a source take, and from when on one of them is slow."""

from __future__ import annotations

from collections import deque
from typing import Final

from erofsgen.host.fill.histogram import Histogram
from erofsgen.store.base import Speed

_WINDOW: Final = 256
"""Reads that count."""
_ENOUGH: Final = 20
"""Reads without which nothing can be said."""
_OFTEN: Final = 16
"""Reads after which the limit is computed anew."""
_LEAST: Final = 0.005
"""Seconds within which no read is slow."""

_BURST: Final = 4.0
_SHARE: Final = 0.05

_PIECE: Final = 1 << 20
"""Bytes of a read in the background at least."""


class Latencies:
    """The seconds that the latest 256 demands took of one source; ``seconds`` has all, by how many there were."""

    def __init__(self) -> None:
        self._reads: deque[tuple[float, int]] = deque(maxlen=_WINDOW)
        self._since = 0  # reads since the limit was computed
        self._limit: tuple[bool, float] | None = None  # whether of a known speed; times what is expected
        self.seconds = Histogram()

    def add(self, seconds: float, length: int) -> None:
        """A read of ``length`` bytes took ``seconds``."""
        self._reads.append((seconds, length))
        self.seconds.add(seconds)
        self._since += 1

    def percentile(self, per_cent: int) -> float:
        """Seconds that so many of the reads took at most; 0 where there were none."""
        return _percentile([seconds for seconds, _ in self._reads], per_cent) if self._reads else 0.0

    def slow_after(self, length: int, speed: Speed | None) -> float | None:
        """Seconds that 95 of 100 reads of ``length`` bytes take at most, 5 ms at least; None: too few were seen.

        Reads differ in length: where the source's speed was measured, they are compared with what it lets expect.
        """
        if len(self._reads) < _ENOUGH:
            return None
        known = speed is not None
        if self._limit is None or self._limit[0] is not known or self._since >= _OFTEN:
            ratios = [seconds / _expected(length, speed) for seconds, length in self._reads]
            self._limit = known, _percentile(ratios, 95)
            self._since = 0
        return max(_LEAST, self._limit[1] * _expected(length, speed))


class Budget:
    """How many second requests may be made: 5 for 100 demands, and 4 at once after a quiet time."""

    def __init__(self) -> None:
        self._tokens = _BURST

    def __bool__(self) -> bool:
        return self._tokens >= 1

    def earn(self) -> None:
        """There was a demand."""
        self._tokens = min(_BURST, self._tokens + _SHARE)

    def spend(self) -> None:
        """A second request is made."""
        self._tokens -= 1


def read_size(speed: Speed | None, limit: int) -> int:
    """Bytes to read at a time when nobody waits: so many that they take half as long as the latency before them.

    Small reads on many connections bring as much as large ones on a few and hold less memory meanwhile, but each costs
    something. Between 1 MiB and ``limit``, and that where the speed is not known.
    """
    if speed is None:
        return limit
    return min(limit, max(_PIECE, int(speed.latency * speed.bandwidth / 2)))


def _expected(length: int, speed: Speed | None) -> float:
    return 1.0 if speed is None else max(1e-6, speed.latency + length / max(1.0, speed.bandwidth))


def _percentile(values: list[float], per_cent: int) -> float:
    values.sort()
    return values[len(values) * per_cent // 100]
