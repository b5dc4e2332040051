"""Which frames came, and from where, for as long as a recording may ask."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Arrival:
    """A frame that came: when, of ``time.monotonic``, from where, and whether nobody waited for it."""

    at: float
    source: str
    prefetched: bool


Arrivals = Mapping[tuple[str, int], Arrival]
"""By the SHA-256 of the pack and the frame."""
