"""What the FUSE planes are worth, against other FUSE servers, ones that do nothing, and plain EROFS of the same bytes.

==  ====================================================================================================================
a   sequential reads, everything in the host cache and in memory, nothing in the mount's page cache
b   random reads of 4 KiB, likewise
c   walking an image and lstat(2) of all that is in it
d   Python importing large packages from an image
e   memory of a server while data streams through it
f   sequential reads with nothing in the host cache, from a store in the page cache
==  ====================================================================================================================

All sides of a comparison take turns, in changing order; a ratio is the median of the rounds' ratios. Before a side is
measured all page caches are dropped and the files that its server reads are read again. Servers that ours are compared
with are measured with the kernel's read-ahead and with ours. The faster one counts; only erofsfuse, of which a user has
nothing but the program, is also compared as it is, and that is the goal.

``--planes`` chooses planes, ``--only a,c`` parts; ``--ablate`` measures what each of :data:`SETTINGS` costs instead.
``--quick`` checks on small data that everything works: its figures say nothing. Needs root. Leaves nothing behind,
whatever happens.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import hostkit
import peers
from hostkit import FIRST, LARGE, MIB, Host, alternate, timed
from measure import read_through
from memory import MemorySampler, forget_peak, resident
from parts import DATA, Bench, arguments, measure, say

from erofsgen.host.doctor import plane_works
from erofsgen.host.mount.fuse import VARIABLE
from erofsgen.host.mount.mounts import FUSE_READ_AHEAD


@dataclass(frozen=True)
class Setting:
    """Something to be had in another way than by default: knobs of :class:`fusefallback.tuning.Tuning`, read-ahead.

    ``cold``: it matters to cold reads, too.
    """

    label: str
    knobs: str = ""
    read_ahead: int | None = None
    cold: bool = False


DEFAULT = Setting("default")
SETTINGS = (
    Setting("replies copied", "reply=copied", cold=True),
    Setting("16 MiB mapped", "mapped=16M"),
    Setting("1 GiB mapped", "mapped=1G"),
    Setting("reads of 128 KiB", "max_read=128K", cold=True),
    Setting("reads of 1 MiB", "max_read=1M", cold=True),
    Setting("12 reads in the background", "background=12", cold=True),
    Setting("packs cached by FUSE as well", "direct=off", cold=True),
    Setting("read-ahead 128 KiB", read_ahead=128, cold=True),
    Setting("read-ahead 512 KiB", read_ahead=512, cold=True),
    Setting("read-ahead 1 MiB", read_ahead=1024, cold=True),
    Setting("read-ahead 4 MiB", read_ahead=4096, cold=True),
    Setting("read-ahead 16 MiB", read_ahead=16384, cold=True),
)


@dataclass(frozen=True)
class Side:
    """A mount at ``top`` whose server reads the files ``data``. ``read_ahead``: KiB to set before it is measured."""

    top: Path
    data: Sequence[Path]
    read_ahead: int | None = None

    def prepare(self, drop: int = 1) -> Path:
        """Nothing in the mount's caches, all that its server reads in memory; returns ``top``."""
        if self.read_ahead is not None:
            _read_ahead_file(self.top).write_text(str(self.read_ahead))
        hostkit.drop_caches(drop)
        read_through(*self.data)
        return self.top


def _read_ahead_file(top: Path) -> Path:
    """Of a FUSE mount: KiB that the kernel reads ahead."""
    device = os.stat(top).st_dev
    return Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")


Sides = dict[str, Side]
Values = dict[str, list[float]]

EROFSFUSE: dict[str, Sequence[str]] = {"erofsfuse": (), "erofsfuse -s": ("-s",)}
PASSTHROUGH: dict[str, Sequence[str]] = {
    "passthrough_ll": (),
    "passthrough_ll -o cache=always": ("-o", "cache=always"),
    "passthrough_ll -s": ("-s",),
}


class FuseBench(Bench):
    """Compares mounts of ``planes`` with one another and with what else serves the same bytes."""

    def __init__(self, work: Path, options: argparse.Namespace) -> None:
        super().__init__(work, options)
        self.planes: list[str] = options.planes.split(",")
        self._read_ahead: int = options.read_ahead

    @contextmanager
    def sides(self, name: str, *, idle: bool = False) -> Iterator[Sides]:
        """The image ``name``, complete, by every plane, plain EROFS and erofsfuse; and ``idle`` servers."""
        with ExitStack() as stack:
            sides: Sides = {}
            for plane in self.planes:
                host = stack.enter_context(self.host(name, plane=plane))
                host.complete()
                sides[plane] = Side(stack.enter_context(host.mounted()), host.files())
            ours = self._ours(sides)
            plain = stack.enter_context(self.plain(name))
            sides["plain EROFS"] = Side(plain.mount("default"), plain.files())
            sides[f"plain EROFS, {ours} KiB"] = Side(plain.mount("tuned", read_ahead=ours), plain.files())
            for number, (server, arguments) in enumerate(EROFSFUSE.items()):
                top = plain.erofsfuse(f"fuse-{number}", *arguments)
                if top is not None:
                    sides |= both(server, top, plain.files(), ours)
            if idle:
                top = self.place()
                stack.enter_context(peers.served([*peers.RESIDENT, top, LARGE, str(self.size)], top))
                sides |= both("resident", top, [], ours)
                tree, program = self.tree(name), peers.passthrough()
                for server, arguments in PASSTHROUGH.items() if program else ():
                    top = self.place()
                    stack.enter_context(peers.served([program, "-f", "-o", f"source={tree}", *arguments, top], top))
                    sides |= both(server, top, [tree / LARGE], ours)
            yield sides

    def _ours(self, sides: Sides) -> int:
        """KiB of read-ahead that servers which ours are compared with get, too: the most that a plane has."""
        files = [_read_ahead_file(sides[plane].top) for plane in self.planes]
        ours = self._read_ahead or max(
            (int(file.read_text()) for file in files if file.exists()), default=FUSE_READ_AHEAD
        )
        say(f"{self._part}: read-ahead of our servers, and of others besides the kernel's: {ours} KiB")
        return ours

    def compare(self, what: str, unit: str, sides: Mapping[str, Callable[[], float]], rounds: int = 0) -> Values:
        values = alternate(rounds or self.rounds, dict(sides))
        for name, series in values.items():
            self.note(f"{what}: {name}", series, unit)
        return values

    def relate(self, what: str, series: Sequence[float], target: float | None = None) -> None:
        """Put the rounds' ratios into the table, and, with a ``target`` to reach, their median among the goals."""
        if series:
            self.note(what, series, "")
        if target is not None:
            self.goal(what, median(series) if series else None, target, at_least=True)


def both(server: str, top: Path, data: Sequence[Path], read_ahead: int) -> Sides:
    """``server`` with the kernel's read-ahead and with ``read_ahead`` KiB."""
    kernel = int(_read_ahead_file(top).read_text())
    return {server: Side(top, data, kernel), f"{server}, {read_ahead} KiB": Side(top, data, read_ahead)}


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Round by round; their median is :func:`hostkit.paired`."""
    return [one / other for one, other in zip(above, below, strict=True)]


def over_fastest(values: Values, plane: str, servers: Sequence[str]) -> list[float]:
    """Throughput of ``plane`` in parts of the fastest of ``servers``; nothing if one of them could not be had."""
    if not set(servers) <= set(values):
        return []
    candidates = [name for name in values if name.split(", ")[0] in servers]
    return ratios(values[plane], values[max(candidates, key=lambda name: median(values[name]))])


# --- the parts -------------------------------------------------------------------------------------------------------


def sequential(bench: FuseBench) -> None:
    """Sequential reads, the host cache in memory."""
    with bench.sides("raw", idle=True) as sides:
        values = bench.compare(
            "sequential",
            "MiB/s",
            {name: lambda side=side: hostkit.sequential(side.prepare() / LARGE) for name, side in sides.items()},
        )
    idle = ["resident", *PASSTHROUGH]
    for plane in bench.planes:
        erofsfuse = {name: series for name, series in values.items() if name in (plane, "erofsfuse")}
        bench.relate(f"warm sequential reads, {plane} / erofsfuse", over_fastest(erofsfuse, plane, ["erofsfuse"]), 2)
        bench.relate(f"{plane} / erofsfuse with our read-ahead", over_fastest(values, plane, ["erofsfuse"]))
        bench.relate(f"{plane} / erofsfuse -s, which has one thread", over_fastest(values, plane, ["erofsfuse -s"]))
        bench.relate(f"warm sequential reads, {plane} / fastest idle server", over_fastest(values, plane, idle), 0.5)


def random_reads(bench: FuseBench) -> None:
    """Random reads of 4 KiB, the host cache in memory."""
    blocks = random.Random(1).sample(range(bench.size * MIB // 4096), 2_000 if bench.quick else 20_000)
    offsets = [block * 4096 for block in blocks]
    with bench.sides("raw") as sides:
        bench.compare(
            "random 4 KiB",
            "MiB/s",
            {
                name: lambda side=side: hostkit.random_blocks(side.prepare() / LARGE, offsets)
                for name, side in sides.items()
            },
        )


def metadata(bench: FuseBench) -> None:
    """A walk with lstat of everything."""

    def walk(top: Path) -> float:
        begun = time.perf_counter()
        return hostkit.walk(top) / (time.perf_counter() - begun)

    rounds = 1 if bench.quick else 3 * bench.rounds  # they are short
    with bench.sides(bench.image) as sides:
        cold = {name: lambda side=side: walk(side.prepare(2)) for name, side in sides.items()}
        values = bench.compare("dentries and inodes dropped", "entries/s", cold, rounds)
        for side in sides.values():
            hostkit.walk(side.top)
        warm = {name: lambda side=side: walk(side.top) for name, side in sides.items()}
        bench.compare("warm", "entries/s", warm, rounds)
    for plane in bench.planes:
        target = None if plane == "fuse" else 0.98  # the kernel's EROFS has the index
        series = ratios(values[plane], values["plain EROFS"])
        bench.relate(f"walk and lstat, caches dropped, {plane} / plain EROFS", series, target)


def imports(bench: FuseBench) -> None:
    """Python imports numpy and scipy, the host cache in memory."""

    def start(top: Path) -> float:
        command = ["chroot", top, "python3", "-c", "import numpy, scipy.optimize"]
        return timed(lambda: subprocess.run(command, check=True))

    with bench.sides(bench.image) as sides:
        bench.compare("import", "s", {name: lambda side=side: start(side.prepare(3)) for name, side in sides.items()})


def memory(bench: FuseBench) -> None:
    """A file read whole through one server."""
    for plane in bench.planes:
        with bench.host("raw", plane=plane) as host:
            peaks = []
            for what in ("cold", "warm"):
                samples = [stream(host, warm=what == "warm") for _ in range(bench.rounds)]
                for title, sizes in zip(MEMORY, zip(*samples, strict=True), strict=True):
                    if any(sizes):
                        bench.note(f"{plane}, {what}: {title}, at most", [size / MIB for size in sizes], "MiB")
                peaks += [peak for peak, *_ in samples]
        bench.goal(f"memory of {plane}'s server at most, MiB", max(peaks) / MIB or None, 150)


MEMORY = (
    "the server, resident",
    "the server, anonymous",
    "the server and what starts it, proportional",
    "the daemon, proportional",
)


def stream(host: Host, *, warm: bool) -> tuple[int, ...]:
    """Read everything once; bytes of :data:`MEMORY`, at most."""
    if warm:
        host.complete()
    else:
        host.clear()
    with host.mounted() as top:
        Side(top, host.files()).prepare()
        pids = hostkit.servers(host.root)
        for pid in pids:
            forget_peak(pid)
        with MemorySampler(host.call("status"), pids, interval=0.02) as sampler:
            for file in (FIRST, LARGE):
                hostkit.sequential(top / file)
        peak = max((resident(pid).peak for pid in pids), default=0)
        return peak, *(max(series) for series in (sampler.anonymous, sampler.servers, sampler.totals))


def cold_reads(bench: FuseBench) -> None:
    """Sequential reads, nothing in the host cache."""
    planes = list(bench.planes)
    if "fanotify" not in planes and plane_works(bench.work, "fanotify").ok:
        planes.append("fanotify")
    for name in DATA:
        with ExitStack() as stack:
            hosts = {plane: stack.enter_context(bench.host(name, plane=plane)) for plane in planes}
            bench.compare(name, "MiB/s", {plane: lambda host=host: cold(bench, host) for plane, host in hosts.items()})


def cold(bench: FuseBench, host: Host, read_ahead: int | None = None) -> float:
    host.clear()
    with host.mounted(read_ahead=read_ahead) as top:
        Side(top, [bench.work / "store"]).prepare()
        return hostkit.sequential(top / LARGE)


MEASUREMENTS: dict[str, Callable[[FuseBench], None]] = {
    "a": sequential,
    "b": random_reads,
    "c": metadata,
    "d": imports,
    "e": memory,
    "f": cold_reads,
}


# --- settings --------------------------------------------------------------------------------------------------------


def ablate(bench: FuseBench) -> None:
    """What other settings are worth: throughput in parts of the default's."""

    def warm(setting: Setting) -> float:
        host.complete()
        with host.mounted(read_ahead=setting.read_ahead) as top:
            return hostkit.sequential(Side(top, host.files()).prepare() / LARGE)

    def empty(setting: Setting) -> float:
        return cold(bench, host, setting.read_ahead)

    for plane in bench.planes:
        with bench.host("raw", plane=plane) as host:
            for what, read in {"cold": empty, "warm": warm}.items():  # a cache that was completed may be in use
                defaults: list[float] = []
                for setting in (setting for setting in SETTINGS if setting.cold or what == "warm"):
                    sides = {
                        each.label: lambda each=each, read=read: with_knobs(each, read) for each in (DEFAULT, setting)
                    }
                    values = alternate(bench.rounds, sides)
                    series = ratios(values[setting.label], values[DEFAULT.label])
                    bench.note(f"{plane}, {what}: {setting.label}", values[setting.label], "MiB/s")
                    bench.note(f"{plane}, {what}: {setting.label} / default", series, "")
                    defaults += values[DEFAULT.label]
                bench.note(f"{plane}, {what}: default, beside all of these", defaults, "MiB/s")


def with_knobs(setting: Setting, read: Callable[[Setting], float]) -> float:
    """``read`` where servers that are started have that ``setting``."""
    os.environ[VARIABLE] = setting.knobs
    try:
        return read(setting)
    finally:
        del os.environ[VARIABLE]


def main() -> None:
    parser = arguments(__doc__, image_for="c and d")
    parser.add_argument("--planes", default="fuse,blockfuse", help="separated by commas (default: fuse,blockfuse)")
    parser.add_argument(
        "--read-ahead", type=int, default=0, help="KiB for the servers we compare with (default: what ours have)"
    )
    parser.add_argument("--ablate", action="store_true", help="measure what our server's settings are worth instead")
    options = parser.parse_args()
    measure(FuseBench, options, {"ablate": ablate} if options.ablate else MEASUREMENTS)


if __name__ == "__main__":
    main()
