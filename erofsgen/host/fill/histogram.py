"""How long something takes, counted by how long: a histogram that costs one bisection."""

from __future__ import annotations

from bisect import bisect_left
from typing import Final, TypedDict

BOUNDS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Seconds: the upper ends of all buckets but the last, which has none. The default deadline is the last of them."""


class Counts(TypedDict):
    """``counts[i]``: how many took at most ``le[i]`` seconds and more than the one before; one more than there are
    bounds. ``sum``: seconds of all together."""

    le: list[float]
    counts: list[int]
    sum: float


class Histogram:
    """Counts durations by :data:`BOUNDS`. No lock: the owner has one."""

    __slots__ = ("_counts", "_sum")

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS) + 1)
        self._sum = 0.0

    def add(self, seconds: float) -> None:
        """One more took ``seconds``."""
        self._counts[bisect_left(BOUNDS, seconds)] += 1
        self._sum += seconds

    def counts(self) -> Counts:
        """All of it, for the user."""
        return Counts(le=list(BOUNDS), counts=list(self._counts), sum=self._sum)
