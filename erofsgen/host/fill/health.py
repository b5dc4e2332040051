"""What a source has done, and whether it is asked: the circuit breaker.

::

            3 failures in a row, or it asks for a pause
    closed ────────────────────────────────────────────► open: asked after all others
      ▲                                                    │ ▲
      │                                  its rest is over  │ │ the probe fails: a longer rest
      └──────────────────────── the probe succeeds ────────┘─┘

The probe is made in the background (:mod:`.prober`), so no reader pays for it. A read that succeeds, because all others
failed and this source was asked after all, closes the breaker too.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Final

from erofsgen.errors import RemoteError
from erofsgen.host.fill.latency import Latencies
from erofsgen.host.fill.sources import describe
from erofsgen.pack.toc import Toc

_FAILURES: Final = 3
"""Failures in a row that open the breaker."""
_REST: Final = 5.0
"""Seconds of the first rest; the next is twice as long."""
_LONGEST: Final = 60.0
"""Seconds of a rest at most, whatever a server asks for."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A frame that can be read to see whether a source is well."""

    pack: str
    toc: Toc
    index: int

    @property
    def offset(self) -> int:
        """Where its bytes are in the pack."""
        return int(self.toc.offsets[self.index])

    @property
    def size(self) -> int:
        """How many there are."""
        return int(self.toc.sizes[self.index])


@dataclass(slots=True)
class Health:
    """One source's counters since the start, its latest error, and its breaker. Times are of ``time.monotonic``."""

    reads: int = 0
    """Reads that brought the number of bytes asked for; in all :attr:`bytes`."""

    bytes: int = 0
    failed: int = 0
    """Reads that raised, had the wrong length or took too long."""

    absent: int = 0
    """Reads of blobs it does not have."""

    bad: int = 0
    """Frames whose bytes were not those of their digest."""

    hedges: int = 0
    """Its reads that were slow, so that their frames were asked for a second time; :attr:`hedges_won`: in vain."""

    hedges_won: int = 0
    latencies: Latencies = field(default_factory=Latencies)
    error: str | None = None
    """What its latest failure was, at :attr:`error_at`, which is of ``time.time``."""

    error_at: float = 0.0
    sample: Sample | None = None
    """The smallest frame that it brought; while it brought none, the last it was asked for."""

    rests_until: float = 0.0
    """When the rest of an open breaker is over, and a probe due."""

    not_before: float = 0.0
    """It asked not to be asked before."""

    rest: float = 0.0
    """Seconds of the present rest; 0: the breaker is closed."""

    in_row: int = 0

    @property
    def is_open(self) -> bool:
        """Whether it is asked after all others."""
        return self.rest > 0

    def fell(self, error: BaseException, now: float) -> None:
        """It failed, or brought wrong bytes."""
        self.error, self.error_at = describe(error), time.time()
        self.in_row += 1
        if (self.is_open or self.in_row >= _FAILURES) and self.rests_until <= now:
            self.rest = min(_LONGEST, max(_REST, 2 * self.rest))
            self.rests_until = now + self.rest
        pause = error.retry_after if isinstance(error, RemoteError) else None
        if pause:
            pause = min(_LONGEST, pause)
            self.rest = max(self.rest, pause)
            self.not_before = now + pause
            self.rests_until = max(self.rests_until, self.not_before)

    def rose(self) -> None:
        """It brought right bytes."""
        self.in_row = 0
        self.rest = self.rests_until = 0.0

    def keep(self, sample: Sample, *, brought: bool) -> None:
        """Remember a frame for a probe."""
        if self.sample is None or (brought and sample.size < self.sample.size):
            self.sample = sample
