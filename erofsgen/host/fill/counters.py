"""What the fill engine counts."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Final, Literal, TypedDict

from erofsgen.host.fill.histogram import Counts, Histogram
from erofsgen.host.fill.schedule import Schedule
from erofsgen.host.fill.tiers import Tiers
from erofsgen.host.fill.work import Priority

_RECENT: Final = 1024
"""Demands whose latencies are kept."""


class SourceStats(TypedDict):
    """One source: counters are :class:`erofsgen.host.fill.health.Health`'s.

    ``level`` is None for the stores of images. ``state``: ``ok``, ``resting`` (``rests`` seconds more, 0 while it is
    being probed), or ``full`` (as many reads are on their way as may be). ``p50`` and ``p95`` are seconds of the latest
    256 demands, ``seconds`` has all. ``error``: the latest, ``at`` seconds since 1970.
    """

    level: int | None
    state: Literal["ok", "resting", "full"]
    rests: float
    reads: int
    bytes: int
    p50: float
    p95: float
    seconds: Counts
    failed: int
    absent: int
    bad_frames: int
    hedges: int
    hedges_won: int
    error: SourceError | None


class SourceError(TypedDict):
    """What went wrong, and when."""

    at: float
    error: str


class Stats(TypedDict):
    """Counters since the start; ``queued``, ``in_flight`` and ``threads`` are of now.

    ``frames`` and ``bytes_written`` are device frames and bytes that targets took; ``bytes_fetched`` are a pack's.
    ``hedges``: slow demands asked for a second time; ``hedges_won``: those where the second came first.
    ``demands`` had to wait and were served; ``demand_p50`` and ``demand_p95`` are seconds from request to done of the
    latest 1024 of them, ``demand_seconds`` has all.
    """

    frames: int
    bytes_fetched: int
    bytes_written: int
    reads: int
    coalesced_reads: int
    single_flight_hits: int
    retries: int
    overtaken_reads: int
    hedges: int
    hedges_won: int
    failed_requests: int
    expired_requests: int
    queued: dict[str, int]
    in_flight: int
    in_flight_peak: int
    threads: int
    demands: int
    demand_p50: float
    demand_p95: float
    demand_seconds: Counts
    sources: dict[str, SourceStats]


@dataclass(slots=True)
class Counters:
    """The counters that belong to no source, written under the engine's lock."""

    frames: int = 0
    bytes_fetched: int = 0
    bytes_written: int = 0
    reads: int = 0
    coalesced_reads: int = 0
    single_flight_hits: int = 0
    retries: int = 0
    overtaken_reads: int = 0
    failed_requests: int = 0
    expired_requests: int = 0
    demands: int = 0
    latencies: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT))
    seconds: Histogram = field(default_factory=Histogram)

    def read_done(self, length: int, frames: int) -> None:
        """A read brought ``length`` bytes that hold ``frames`` frames."""
        self.reads += 1
        self.coalesced_reads += frames > 1
        self.bytes_fetched += length

    def frame_done(self, size: int) -> None:
        """A target took a frame of ``size`` device bytes."""
        self.frames += 1
        self.bytes_written += size

    def demand_done(self, seconds: float) -> None:
        """A demand was served."""
        self.demands += 1
        self.latencies.append(seconds)
        self.seconds.add(seconds)

    def stats(self, schedule: Schedule, tiers: Tiers, *, threads: int) -> Stats:
        """All of it, for the user."""
        latencies = sorted(self.latencies) or [0.0]
        return Stats(
            frames=self.frames,
            bytes_fetched=self.bytes_fetched,
            bytes_written=self.bytes_written,
            reads=self.reads,
            coalesced_reads=self.coalesced_reads,
            single_flight_hits=self.single_flight_hits,
            retries=self.retries,
            overtaken_reads=self.overtaken_reads,
            hedges=sum(health.hedges for health in tiers.health),
            hedges_won=sum(health.hedges_won for health in tiers.health),
            failed_requests=self.failed_requests,
            expired_requests=self.expired_requests,
            queued={priority.name.lower(): schedule.lengths[priority] for priority in Priority},
            in_flight=schedule.held,
            in_flight_peak=schedule.peak,
            threads=threads,
            demands=self.demands,
            demand_p50=latencies[len(latencies) // 2],
            demand_p95=latencies[len(latencies) * 95 // 100],
            demand_seconds=self.seconds.counts(),
            sources={source.name: _of_source(schedule, tiers, number) for number, source in enumerate(tiers.sources)},
        )


def _of_source(schedule: Schedule, tiers: Tiers, number: int) -> SourceStats:
    health = tiers.health[number]
    state: Literal["ok", "resting", "full"] = "full" if schedule.is_full(number) else "ok"
    return SourceStats(
        level=tiers.sources[number].level,
        state="resting" if health.is_open else state,
        rests=tiers.rests(number),
        reads=health.reads,
        bytes=health.bytes,
        p50=health.latencies.percentile(50),
        p95=health.latencies.percentile(95),
        seconds=health.latencies.seconds.counts(),
        failed=health.failed,
        absent=health.absent,
        bad_frames=health.bad,
        hedges=health.hedges,
        hedges_won=health.hedges_won,
        error=None if health.error is None else SourceError(at=health.error_at, error=health.error),
    )
