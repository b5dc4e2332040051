"""Time to ready: from the command that starts a container, with nothing of its image on the host, to its first answer.

==  ====================================================================================================================
a   every container of bench/containers.py, every way of having its image come, every latency
b   what recordings differ in, where Python may write byte code and where it may not
==  ====================================================================================================================

The ways, side by side, in changing order:

===================  ===================================================================================================
containerd           pulled from a registry and unpacked, then started by runc: Debian's containerd and docker-registry
packs                all of the image's packs first: ``erofsgen run --eager``
nothing ahead        lazy, ``--prefetch none``
heuristics           lazy, for a container that was never seen: ``--prefetch heuristics``
profile              lazy, recorded once before: ``--prefetch profile``
optimized            the same from the image that ``erofsgen optimize`` made
everything local     all packs in the host cache, the page cache dropped: what no other can be faster than
===================  ===================================================================================================

A container is ready when its process has ended or, if it is a server, has answered once. The store is Ceph's S3 service
with its objects in memory; it and the registry, whose files are in the page cache, are on loopback behind a proxy that
adds latency to every request. Each start has a host of its own: an empty cache, a daemon that has just been started,
no page cache but of the programs that start containers. ``--quick`` is one round of a small container. Needs root,
Ceph's gateway, docker-registry, containerd, runc, curl and skopeo.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

from containers import CONTAINERS, Container
from hostkit import MIB, alternate, paired
from parts import arguments, measure
from rich.console import Console
from rich.table import Table
from startkit import CONTAINERD, HEURISTICS, LOCAL, NOTHING, OPTIMIZED, PROFILE, WAYS, Prepared, ReadyBench, Start

from erofsgen.profile.chunks import Chunks
from erofsgen.profile.png import draw_png
from erofsgen.profile.profile import Profile
from erofsgen.profile.trace import Trace
from erofsgen.store.image import Image as Built
from erofsgen.store.open import open_store

JUDGED = 20
"""Milliseconds of latency that the goals are about."""


# --- the parts -------------------------------------------------------------------------------------------------------


def starts(bench: ReadyBench) -> None:
    """Seconds to ready."""
    for container in bench.containers:
        prepared = bench.prepared(container)
        bench.prepare_ways(prepared)
        table = new_table(container)
        for latency in bench.latencies:
            found = side_by_side(bench, prepared, latency)
            for way in bench.ways:
                add_row(table, latency, way, found[way], last=way == bench.ways[-1])
            if latency == JUDGED:
                judge(bench, container.name, found)
                if bench.waterfalls:
                    draw(bench, prepared, found, bench.waterfalls)
        Console(stderr=bench.as_json, width=None if sys.stdout.isatty() else 140).print(table)


def side_by_side(bench: ReadyBench, prepared: Prepared, latency: int) -> dict[str, list[Start]]:
    """The starts of each way, in rounds."""
    found: dict[str, list[Start]] = {way: [] for way in bench.ways}

    def side(way: str) -> float:
        found[way].append(bench.measured(prepared, way, latency))
        return found[way][-1].seconds

    alternate(bench.rounds, {way: lambda way=way: side(way) for way in bench.ways})
    return found


def judge(bench: ReadyBench, name: str, found: dict[str, list[Start]]) -> None:
    """The goals of the ways that were measured, each by the median of the rounds' ratios."""
    what = f"{name}, {JUDGED} ms"
    seconds = {way: [start.seconds for start in some] for way, some in found.items()}
    for other, target in ((LOCAL, 1.25), (CONTAINERD, 0.15)):
        if {PROFILE, other} <= set(found):
            bench.goal(f"{what}: profile / {other}", paired(seconds[PROFILE], seconds[other]), target)
    if {NOTHING, HEURISTICS, PROFILE} <= set(found):
        rounds = zip(seconds[NOTHING], seconds[HEURISTICS], seconds[PROFILE], strict=True)
        closed = median((nothing - guessed) / (nothing - recorded) for nothing, guessed, recorded in rounds)
        bench.goal(f"{what}: what heuristics win / what a profile wins", closed, 0.5, at_least=True)
    if PROFILE in found:
        judged = sum(start.judged for start in found[PROFILE])
        unused = sum(start.unused for start in found[PROFILE]) / judged if judged else None
        bench.goal(f"{what}: prefetched with a profile and not used", unused, 0.1)


def draw(bench: ReadyBench, prepared: Prepared, found: dict[str, list[Start]], place: Path) -> None:
    """A picture of the first start of every lazy way, and the traces that it shows."""
    place.mkdir(parents=True, exist_ok=True)
    store = open_store(bench.store_url())
    known: dict[str, Chunks] = {}
    drawn: list[tuple[str, Trace, Chunks | None]] = []
    for way, some in found.items():
        trace = some[0].trace
        if trace is not None:
            (place / f"{prepared.name}-{way.replace(' ', '-')}.trace").write_bytes(trace.encode())
            image = prepared.optimized if way == OPTIMIZED else prepared.name
            if image not in known:
                known[image] = Chunks(Built.open(store, image).index)
            drawn.append((f"{prepared.name}, {JUDGED} ms: {way}", trace, known[image]))
    draw_png(drawn, place / f"waterfall-{prepared.name}.png")


def new_table(container: Container) -> Table:
    """A table of the container's starts, medians of the rounds."""
    columns = (
        "latency", "way", "rounds", "median s", "min - max", "MiB fetched", "waits", "waited s",
        "MiB ahead", "judged", "unused",
    )  # fmt: skip
    table = Table(*columns, title=f"{container.name}: seconds to ready")
    for column in (table.columns[0], *table.columns[2:]):
        column.justify = "right"
    return table


def add_row(table: Table, latency: int, way: str, found: Sequence[Start], *, last: bool) -> None:
    seconds = [start.seconds for start in found]
    judged = sum(start.judged for start in found)
    table.add_row(
        f"{latency} ms",
        way,
        str(len(found)),
        f"{median(seconds):.2f}",
        f"{min(seconds):.2f} - {max(seconds):.2f}",
        f"{median(start.fetched for start in found) / MIB:.1f}",
        f"{median(start.misses for start in found):.0f}",
        f"{median(start.waited for start in found):.2f}",
        f"{median(start.prefetched for start in found) / MIB:.1f}",
        f"{median(start.judged for start in found) / MIB:.1f}",
        f"{sum(start.unused for start in found) / judged:.1%}" if judged else "-",
        end_section=last,
    )


def bytecode(bench: ReadyBench) -> None:
    """What recordings differ in, with PYTHONDONTWRITEBYTECODE unset, unset again, and set."""
    for container in bench.containers:
        if container.name == "torch":
            continue  # all of its packages have byte code
        prepared = bench.prepared(container)
        profiles = [bench.recorded_here(prepared, *some) for some in ((), (), ("PYTHONDONTWRITEBYTECODE=1",))]
        unset, again, with_it = map(chunks, profiles)
        for what, some in (
            ("unset", unset),
            ("set", with_it),
            ("unset, not when that was repeated", less(unset, again)),
            ("unset only", less(less(unset, with_it), less(unset, again))),
            ("set only", less(with_it, {**unset, **again})),
        ):
            bench.note(f"{container.name}: {what}", [len(some)], "chunks")
            bench.note(f"{container.name}: {what}", [sum(some.values()) / MIB], "MiB")


Place = tuple[str, int]
"""Of a chunk: its pack and its block there."""


def chunks(profile: Profile) -> dict[Place, int]:
    """The bytes of each chunk of a profile."""
    rows = profile.rows
    packs = [profile.packs[number] for number in rows["pack"].tolist()]
    return dict(zip(zip(packs, rows["block"].tolist(), strict=True), rows["length"].tolist(), strict=True))


def less(some: dict[Place, int], others: dict[Place, int]) -> dict[Place, int]:
    return {place: length for place, length in some.items() if place not in others}


MEASUREMENTS: dict[str, Callable[[ReadyBench], None]] = {"a": starts, "b": bytecode}


def main() -> None:
    parser = arguments(__doc__, image_for="no part")
    parser.add_argument("--containers", type=_names, help=f"of {', '.join(CONTAINERS)} (default: the first three)")
    parser.add_argument("--ways", type=_ways, default=list(WAYS), help="separated by commas (default: all)")
    parser.add_argument("--latency", type=_numbers, help="milliseconds, separated by commas (default 0,20,100)")
    parser.add_argument("--bandwidth", type=float, help="MiB a second that the proxies let through (default: no limit)")
    parser.add_argument("--waterfalls", type=Path, help="where pictures of the starts are put")
    options = parser.parse_args()
    options.containers = options.containers or (["quick"] if options.quick else list(CONTAINERS)[:3])
    options.latency = options.latency or ([0, JUDGED] if options.quick else [0, JUDGED, 100])
    measure(ReadyBench, options, MEASUREMENTS)


def _ways(text: str) -> list[str]:
    ways = text.split(",")
    if unknown := set(ways) - set(WAYS):
        raise argparse.ArgumentTypeError(f"no such way: {', '.join(sorted(unknown))}; there are {', '.join(WAYS)}")
    return ways


def _names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := set(names) - set(CONTAINERS):
        raise argparse.ArgumentTypeError(f"no such container: {', '.join(sorted(unknown))}")
    return names


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


if __name__ == "__main__":
    main()
