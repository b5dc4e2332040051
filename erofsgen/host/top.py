"""What the daemon does just now: two samples of its counters, and what happened in between.

A counter that went back belongs to a process that was started anew, and counts from there.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from erofsgen.errors import ErofsgenError
from erofsgen.host.cache.cache import HostCache
from erofsgen.host.daemon.client import Client
from erofsgen.host.daemon.mounted import lazy_mounts

Counts = Mapping[str, Any]


class MountView(msgspec.Struct, frozen=True, kw_only=True):
    """A lazy mount. Rates are of the interval, a second; ``touches``, ``misses`` and ``missed`` count since the mount.

    ``miss_rate``: share of the interval's touches that had to wait, None where there were none. ``waiting``: seconds
    that its readers waited, all together, a second. ``prefetched`` of ``to_prefetch`` bytes are here; None: nothing is
    prefetched for it. ``command`` is empty for a plain mount.
    """

    id: str
    target: str
    image: str
    command: str
    plane: str
    touches: int
    touches_per_second: float
    misses: int
    miss_rate: float | None
    missed: int
    missed_per_second: float
    waited: float
    waiting: float
    prefetched: int | None
    to_prefetch: int | None
    prefetch_state: str | None


class SourceView(msgspec.Struct, frozen=True, kw_only=True):
    """A tier, or a store of an image, whose ``level`` is None. ``failures``: in the interval; ``failed`` since the
    worker's start, bad frames included. ``p50`` and ``p95`` are seconds of the latest 256 demands."""

    name: str
    level: int | None
    state: str
    rests: float
    reads_per_second: float
    bytes_per_second: float
    p50: float
    p95: float
    failures: int
    failed: int
    absent: int


class EngineView(msgspec.Struct, frozen=True, kw_only=True):
    """The fill engine. ``demand_p50`` and ``demand_p95``: seconds of the latest 1024 demands that had to wait."""

    in_flight: int
    queued: dict[str, int]
    threads: int
    frames_per_second: float
    fetched_per_second: float
    written_per_second: float
    demands_per_second: float
    demand_p50: float
    demand_p95: float
    retries: int
    hedges: int


class PrefetchView(msgspec.Struct, frozen=True, kw_only=True):
    """What one reason had prefetched, in bytes. ``hit_rate``: share of what was judged that was read."""

    reason: str
    bytes: int
    bytes_per_second: float
    hit_rate: float | None


class View(msgspec.Struct, frozen=True, kw_only=True):
    """All of it, over ``interval`` seconds that ended at ``at`` (since 1970). ``engine`` is None where the worker does
    not answer. ``denied``: reads that failed in the interval; ``cache_limit``: None without one."""

    at: float
    interval: float
    root: str
    version: str
    plane: str
    started: float
    worker_restarts: int
    waiting: int
    denied: int
    recordings: int
    cache_used: int
    cache_limit: int | None
    engine: EngineView | None
    mounts: list[MountView]
    sources: list[SourceView]
    prefetch: list[PrefetchView]


@dataclass(frozen=True)
class Sample:
    """The counters at one moment, a time of ``time.monotonic``."""

    at: float
    supervisor: Counts
    worker: Counts
    mounts: list[dict[str, Any]]
    cache_used: int
    cache_limit: int | None
    root: Path = field(default=Path())


class Sampler:
    """Takes samples of the daemon of ``root``, where nothing is made."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._cache: HostCache | None = None

    def sample(self) -> Sample | None:
        """The counters now; None where no daemon runs. Raises StorageError (it is another user's)."""
        client = Client.connect(self._root) if self._root.is_dir() else None
        if client is None:
            return None
        with client:
            try:
                supervisor = client.call("status")
            except ErofsgenError:  # it is ending
                return None
            worker: Counts = {}
            with suppress(ErofsgenError):  # it dies; another is there soon
                worker = client.worker("status")
        if self._cache is None:
            self._cache = HostCache(self._root)
        self._cache.layout.reload()
        return Sample(
            time.monotonic(), supervisor, worker, lazy_mounts(self._root), self._cache.room.used(),
            self._cache.layout.config.max_bytes, self._root,
        )  # fmt: skip


def view(before: Sample, after: Sample) -> View:
    """What happened between two samples of one root."""
    seconds = max(1e-6, after.at - before.at)
    now = after.supervisor
    prefetch: Counts = after.worker.get("prefetch") or {}
    engine: Counts | None = after.worker.get("engine")
    engine_before: Counts = before.worker.get("engine") or {}
    return View(
        at=time.time(),
        interval=round(seconds, 3),
        root=str(after.root),
        version=now["version"],
        plane=now["plane"],
        started=now["started"],
        worker_restarts=now["worker_restarts"],
        waiting=now["waiting"],
        denied=int(_increase(before.supervisor, now, "denied")),
        recordings=now.get("recordings", 0),
        cache_used=after.cache_used,
        cache_limit=after.cache_limit,
        engine=None if engine is None else _engine(engine_before, engine, seconds),
        mounts=_mounts(before, after, seconds, prefetch.get("mounts") or {}),
        sources=[] if engine is None else _sources(engine_before, engine, seconds),
        prefetch=_prefetch(before, after, seconds),
    )


def _increase(before: Counts, after: Counts, key: str) -> float:
    new, old = float(after.get(key, 0)), float(before.get(key, 0))
    return new - old if new >= old else new


def _mounts(before: Sample, after: Sample, seconds: float, prefetch: Counts) -> list[MountView]:
    """Those that are mounted and those that the supervisor counts, the busiest first."""
    counted: Counts = after.supervisor.get("mounts") or {}
    counted_before: Counts = before.supervisor.get("mounts") or {}
    known = {state["id"]: state for state in after.mounts}
    found = []
    for identity in dict.fromkeys([*known, *counted]):
        state, counts = known.get(identity, {}), counted.get(identity, {})
        old: Counts = counted_before.get(identity, {})
        ahead = prefetch.get(identity)
        touches, misses = _increase(old, counts, "touches"), _increase(old, counts, "misses")
        found.append(
            MountView(
                id=identity,
                target=state.get("target") or counts.get("target", ""),
                image=counts.get("image") or state.get("image", ""),
                command=counts.get("command", ""),
                plane=state.get("plane") or after.supervisor["plane"],
                touches=counts.get("touches", 0),
                touches_per_second=touches / seconds,
                misses=counts.get("misses", 0),
                miss_rate=misses / touches if touches else None,
                missed=counts.get("missed_bytes", 0),
                missed_per_second=_increase(old, counts, "missed_bytes") / seconds,
                waited=counts.get("waited", 0.0),
                waiting=_increase(old, counts, "waited") / seconds,
                prefetched=None if ahead is None else ahead.get("bytes", 0),
                to_prefetch=None if ahead is None else ahead.get("of", 0),
                prefetch_state=None if ahead is None else ahead.get("state"),
            )
        )
    return sorted(found, key=lambda mount: (-mount.missed_per_second, -mount.touches_per_second, mount.target))


def _sources(before: Counts, after: Counts, seconds: float) -> list[SourceView]:
    """Nearest first; stores of images come last."""
    found = []
    for name, source in after["sources"].items():
        old = (before.get("sources") or {}).get(name, {})
        found.append(
            SourceView(
                name=name,
                level=source["level"],
                state=source["state"],
                rests=source["rests"],
                reads_per_second=_increase(old, source, "reads") / seconds,
                bytes_per_second=_increase(old, source, "bytes") / seconds,
                p50=source["p50"],
                p95=source["p95"],
                failures=int(_increase(old, source, "failed") + _increase(old, source, "bad_frames")),
                failed=source["failed"] + source["bad_frames"],
                absent=source["absent"],
            )
        )
    return sorted(found, key=lambda source: (source.level is None, source.level or 0))


def _engine(before: Counts, after: Counts, seconds: float) -> EngineView:
    return EngineView(
        in_flight=after["in_flight"],
        queued=dict(after["queued"]),
        threads=after["threads"],
        frames_per_second=_increase(before, after, "frames") / seconds,
        fetched_per_second=_increase(before, after, "bytes_fetched") / seconds,
        written_per_second=_increase(before, after, "bytes_written") / seconds,
        demands_per_second=_increase(before, after, "demands") / seconds,
        demand_p50=after["demand_p50"],
        demand_p95=after["demand_p95"],
        retries=int(_increase(before, after, "retries")),
        hedges=int(_increase(before, after, "hedges")),
    )


def _prefetch(before: Sample, after: Sample, seconds: float) -> list[PrefetchView]:
    reasons: Counts = (after.worker.get("prefetch") or {}).get("reasons") or {}
    old: Counts = (before.worker.get("prefetch") or {}).get("reasons") or {}
    return [
        PrefetchView(
            reason=reason,
            bytes=counts.get("bytes", 0),
            bytes_per_second=_increase(old.get(reason, {}), counts, "bytes") / seconds,
            hit_rate=counts.get("used_bytes", 0) / counts["judged_bytes"] if counts.get("judged_bytes") else None,
        )
        for reason, counts in sorted(reasons.items(), key=lambda item: -item[1].get("bytes", 0))
    ]
