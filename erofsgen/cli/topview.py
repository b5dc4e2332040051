"""A view of the daemon as sections of a screen: a heading, and a table or lines."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

from erofsgen.cli import output
from erofsgen.host.top import MountView, SourceView, View


class Section(NamedTuple):
    """A table. ``right``: numbers of the columns that are aligned to the right."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    right: Sequence[int]


def summary(view: View) -> list[tuple[str, str]]:
    """What is said of the whole, as names and values."""
    up = time.strftime("%H:%M:%S", time.gmtime(max(0, view.at - view.started)))
    days = int(view.at - view.started) // 86400
    daemon = [
        f"plane {view.plane}",
        f"up {f'{days} d ' if days > 0 else ''}{up}",
        f"{output.counted(view.worker_restarts, 'restart')} of the worker",
        output.counted(len(view.mounts), "lazy mount"),
        output.counted(view.recordings, "recording"),
    ]
    rows = [("daemon", ", ".join(daemon)), ("reads", f"{view.waiting} waiting, {view.denied} failed just now")]
    engine = view.engine
    if engine is None:
        rows.append(("engine", "the worker does not answer"))
    else:
        queued = ", ".join(f"{number} {name.replace('_', ' ')}" for name, number in engine.queued.items() if number)
        work = [
            f"{output.size(engine.in_flight)} in flight",
            f"queue: {queued or 'empty'}",
            f"{_rate(engine.fetched_per_second)} fetched",
            f"{_rate(engine.written_per_second)} written",
        ]
        demand = [
            f"{engine.demands_per_second:.1f}/s",
            f"p50 {_time(engine.demand_p50)}",
            f"p95 {_time(engine.demand_p95)}",
            f"{engine.retries} retried",
            f"{engine.hedges} hedged",
        ]
        rows += [("engine", ", ".join(work)), ("demand", ", ".join(demand))]
    limit = "" if view.cache_limit is None else f" of {output.size(view.cache_limit)}"
    share = f", {output.share(view.cache_used, view.cache_limit)}" if view.cache_limit else ""
    rows.append(("cache", f"{output.size(view.cache_used)}{limit}{share}"))
    return rows


def sections(view: View) -> list[Section]:
    """The tables that have anything to say."""
    mounts = Section(
        ["TARGET", "IMAGE", "COMMAND", "TOUCHES/S", "MISSES", "MISSED/S", "WAITING", "WAITED", "PREFETCHED"],
        [_mount(mount) for mount in view.mounts],
        (3, 4, 5, 6, 7, 8),
    )
    sources = Section(
        ["SOURCE", "LEVEL", "STATE", "READS/S", "BYTES/S", "P50", "P95", "FAILED", "ABSENT"],
        [_source(source) for source in view.sources],
        (3, 4, 5, 6, 7, 8),
    )
    prefetch = Section(
        ["PREFETCHED FOR", "BYTES", "BYTES/S", "READ"],
        [
            (
                output.printable(reason.reason),
                output.size(reason.bytes),
                _rate(reason.bytes_per_second),
                _share(reason.hit_rate),
            )
            for reason in view.prefetch
        ],
        (1, 2, 3),
    )
    return [section for section in (mounts, sources, prefetch) if section.rows]


def _mount(mount: MountView) -> tuple[str, ...]:
    prefetched = "-"
    if mount.to_prefetch:
        prefetched = f"{output.share(mount.prefetched or 0, mount.to_prefetch)} of {output.size(mount.to_prefetch)}"
    return (
        output.printable(mount.target),
        output.printable(mount.image),
        output.printable(mount.command) or "-",
        f"{mount.touches_per_second:.1f}",
        _share(mount.miss_rate),
        _rate(mount.missed_per_second),
        f"{mount.waiting:.2f}",
        _time(mount.waited),
        prefetched,
    )


def _source(source: SourceView) -> tuple[str, ...]:
    rest = f" {source.rests:.0f} s" if source.state == "resting" else ""
    return (
        output.printable(source.name),
        "-" if source.level is None else str(source.level),
        f"{source.state}{rest}",
        f"{source.reads_per_second:.1f}",
        _rate(source.bytes_per_second),
        _time(source.p50),
        _time(source.p95),
        str(source.failed),
        str(source.absent),
    )


def _rate(count: float) -> str:
    return f"{output.size(round(count))}/s"


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 10 else f"{1000 * seconds:.1f} ms"


def _share(part: float | None) -> str:
    return "-" if part is None else f"{100 * part:.1f} %"
