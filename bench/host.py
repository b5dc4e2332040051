"""What lazy mounts cost, on the fanotify plane with its daemon, against plain file-backed EROFS of the same bytes.

==  ====================================================================================================================
a   from a mount request, with the index local, to the first stat(2) inside; the whole command
b   reads from the page cache
c   reads of local data with the page cache dropped, with the packs under a mark and without
d   walking an image and lstat(2) of all that is in it
e   filling from a local store as fast as a reader goes, against the parts of that work measured alone
f   memory of the daemon while data streams through it
g   many mounts of one image: time and memory of each
h   what read-ahead is worth in a lazy mount
==  ====================================================================================================================

Both sides of a comparison take turns, in changing order; a ratio is the median of the rounds' ratios. The plain side is
mounted with the same read-ahead. ``--only a,c`` chooses parts; ``--quick`` checks on small data that everything works:
its figures say nothing. Needs root, and a kernel with FAN_PRE_ACCESS. Leaves nothing behind, whatever happens.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from statistics import median

import hostkit
from hostkit import EROFSGEN, FIRST, LARGE, MIB, NEVER_COMPLETE, Host, alternate, paired, timed
from measure import run
from memory import MemorySampler, kernel_memory, proportional
from parts import Bench, arguments, measure

from erofsgen.host.mount.mounts import READ_AHEAD
from erofsgen.store.image import Image

READ_AHEADS = (128, 512, 1024, 4096, 32768)


class HostBench(Bench):
    """Compares a lazy mount with the same bytes mounted by others."""

    @contextmanager
    def beside(self, name: str, options: Sequence[str] = ()) -> Iterator[tuple[Host, Path, dict[str, Path]]]:
        """A host with a lazy mount of ``name``, its target, and the same bytes mounted by others, by name."""
        with ExitStack() as stack:
            host = stack.enter_context(self.host(name, options))
            plain = stack.enter_context(self.plain(name))
            others = {
                "plain EROFS": plain.mount("plain", read_ahead=READ_AHEAD),
                "plain EROFS, the kernel's read-ahead": plain.mount("default"),
            }
            fuse = plain.erofsfuse()
            if fuse is not None:
                others["erofsfuse"] = fuse
            yield host, stack.enter_context(host.mounted()), others

    def compare(
        self, what: str, unit: str, lazy: Path, others: dict[str, Path], measure: Callable[[Path], float]
    ) -> float:
        """Throughput of the lazy mount in parts of plain EROFS's."""
        sides = {name: lambda top=top: measure(top) for name, top in {"lazy mount": lazy, **others}.items()}
        values = alternate(self.rounds, sides)
        for name, series in values.items():
            self.note(f"{what}: {name}", series, unit)
        return paired(values["lazy mount"], values["plain EROFS"])


# --- the parts -------------------------------------------------------------------------------------------------------


def mount_time(bench: HostBench) -> None:
    """From the request to the first stat."""
    rounds = bench.rounds if bench.quick else max(bench.rounds, 15)
    with bench.host(bench.image) as host, bench.plain(bench.image) as plain:
        numbers = count()

        def request(*, busy: bool = False) -> float:
            host.wait_unmarked()  # or the packs need no new marks, and no proof of them
            os.sync()
            if busy:
                (bench.work / "busy").write_bytes(bytes(256 * MIB))
            seconds = timed(lambda: os.stat(host.mount() / "bin"))
            host.unmount()
            return seconds * 1000

        def again() -> float:
            host.mount()
            os.sync()
            seconds = timed(lambda: os.stat(host.mount(other) / "bin"))
            host.unmount(other)
            host.unmount()
            return seconds * 1000

        def command() -> float:
            os.sync()
            settings = ("--store", bench.store.url, "--root", host.root)
            command = ["env", "-u", "PYTHONDONTWRITEBYTECODE", EROFSGEN]  # installed programs have their bytecode
            seconds = run(*command, *settings, "mount", "--quiet", bench.image, host.target).seconds
            host.unmount()
            return seconds * 1000

        def by_kernel() -> float:
            return timed(lambda: os.stat(plain.mount(f"plain-{next(numbers)}") / "bin")) * 1000

        other = host.target.with_name("other")
        other.mkdir()
        values = alternate(
            rounds,
            {
                "request": request,
                "again": again,
                "busy": lambda: request(busy=True),
                "kernel": by_kernel,
                "command": command,
            },
        )
    python = [run(sys.executable, "-c", "pass").seconds * 1000 for _ in range(bench.rounds)]
    first = bench.note("lazy mount to first stat", values["request"], "ms")
    bench.note("lazy mount, packs marked already, to first stat", values["again"], "ms")
    bench.note("lazy mount, 256 MiB just written elsewhere, to first stat", values["busy"], "ms")
    bench.note("plain EROFS to first stat", values["kernel"], "ms")
    whole = bench.note("erofsgen mount", values["command"], "ms")
    bench.note("python -c pass", python, "ms")
    bench.goal("mount request to first stat, ms", first, 10)
    bench.goal("erofsgen mount, ms", whole, 250)


def warm_reads(bench: HostBench) -> None:
    """Reads from the page cache."""
    blocks = bench.size * MIB // 4096
    offsets = [random.Random(1).randrange(blocks) * 4096 for _ in range(20_000 if bench.quick else 200_000)]
    with bench.beside("raw") as (_, lazy, others):
        for top in (lazy, *others.values()):
            hostkit.sequential(top / LARGE)
        ratio = bench.compare("sequential", "MiB/s", lazy, others, lambda top: hostkit.sequential(top / LARGE))
        bench.goal("warm sequential reads / plain EROFS", ratio, 0.95, at_least=True)
        ratio = bench.compare(
            "random 4 KiB", "MiB/s", lazy, others, lambda top: hostkit.random_blocks(top / LARGE, offsets)
        )
        bench.goal("warm random reads of 4 KiB / plain EROFS", ratio, 0.95, at_least=True)


def local_reads(bench: HostBench) -> None:
    """Reads of local data, the page cache dropped."""

    def cold(top: Path) -> float:
        hostkit.drop_caches()
        return hostkit.sequential(top / LARGE)

    with bench.beside("raw", NEVER_COMPLETE) as (host, lazy, others):
        hostkit.sequential(lazy / LARGE)
        marked = bench.compare("marked", "MiB/s", lazy, others, cold)
        if not host.call("status")["marked_packs"]:
            raise SystemExit("bench: the pack lost its mark although a frame is missing")
        hostkit.sequential(lazy / FIRST)
        host.wait_unmarked()
        unmarked = bench.compare("unmarked", "MiB/s", lazy, others, cold)
    bench.goal("local sequential reads, marked / plain EROFS", marked, 0.8, at_least=True)
    bench.goal("local sequential reads, mark removed / plain EROFS", unmarked, 0.98, at_least=True)


def metadata(bench: HostBench) -> None:
    """A walk with lstat of everything."""

    def cold(top: Path) -> float:
        hostkit.drop_caches()
        return warm(top)

    def warm(top: Path) -> float:
        begun = time.perf_counter()
        return hostkit.walk(top) / (time.perf_counter() - begun)

    with bench.beside(bench.image) as (_, lazy, others):
        ratio = bench.compare("caches dropped", "entries/s", lazy, others, cold)
        bench.goal("walk and lstat, caches dropped / plain EROFS", ratio, 0.98, at_least=True)
        for top in (lazy, *others.values()):
            hostkit.walk(top)
        ratio = bench.compare("warm", "entries/s", lazy, others, warm)
        bench.goal("walk and lstat, warm / plain EROFS", ratio, 0.98, at_least=True)


def cold_fill(bench: HostBench) -> None:
    """A whole image read through a lazy mount, from a store in the page cache."""
    for name in ("raw", "compressible"):
        cold_fill_of(bench, bench.built(name))


def cold_fill_of(bench: HostBench, name: str) -> None:
    cores = len(os.sched_getaffinity(0))
    alone: list[dict[str, float]] = []

    def parts() -> float:
        os.sync()
        alone.append(hostkit.parts_alone(bench.store, name, bench.work))
        return sum(alone[-1].values())

    def lazy() -> float:
        with bench.host(name) as host, host.mounted() as top:
            os.sync()
            return timed(lambda: [hostkit.sequential(top / file) for file in (FIRST, LARGE)])

    values = alternate(bench.rounds, {"parts": parts, "lazy": lazy})
    for part in alone[0]:
        bench.note(f"{name}: {part}, alone in one thread", [seconds[part] for seconds in alone], "s")
    bench.note(f"{name}: the parts together", values["parts"], "s")
    bench.note(f"{name}: read through the lazy mount", values["lazy"], "s")
    ratio = paired(values["lazy"], values["parts"]) * cores
    bench.goal(f"cold fill of {name} data / its parts over {cores} cores", ratio, 1.3)


def daemon_memory(bench: HostBench) -> None:
    """Images read one after the other, ten times their size through one daemon."""
    passes = 4 if bench.quick else 10
    with bench.host("compressible") as host:
        raw = host.cache.add(Image.open(bench.store, bench.built("raw")))
        kinds = (host.image, raw)
        with MemorySampler(host.call("status")) as sampler:
            for number in range(passes):
                host.image = kinds[number % 2]
                with host.mounted() as top:
                    for file in (FIRST, LARGE):
                        hostkit.sequential(top / file)
                host.clear()
        quarter = len(sampler.totals) // 4
    for title, sizes in (("all its processes, proportional", sampler.totals), ("the worker, resident", sampler.worker)):
        bench.note(title, [size / MIB for size in sizes], "MiB")
    totals = sampler.totals
    bench.goal("memory of the daemon at most, MiB", max(totals) / MIB, 150)
    ratio = median(totals[-quarter:]) / median(totals[quarter : 2 * quarter])
    bench.goal("memory of the daemon, last quarter / second quarter", ratio, 1.1)


def many_mounts(bench: HostBench) -> None:
    """Many mounts of one image."""
    number = 20 if bench.quick else 500
    with bench.host(bench.image) as host:
        targets = [host.target.with_name(f"mnt-{each}") for each in range(number)]
        for target in targets:
            target.mkdir()
        with host.mounted():  # what the first costs is not what one more costs
            supervisor = host.call("status")["pid"]
            kernel, own = kernel_memory(), proportional(supervisor)[0]
            seconds = [timed(lambda target=target: os.stat(host.mount(target) / "bin")) for target in targets]
            own = proportional(supervisor)[0] - own
            after = kernel_memory()
            ending = [timed(lambda target=target: host.unmount(target)) for target in targets]
    tenth = number // 10
    for what, series in (("mount", seconds), ("unmount", ending)):
        bench.note(f"{what}, the first {tenth} of {number}", [each * 1000 for each in series[:tenth]], "ms")
        bench.note(f"{what}, the last {tenth}", [each * 1000 for each in series[-tenth:]], "ms")
    bench.note("supervisor, each mount", [own / number / 1024], "KiB")
    bench.note("MemAvailable, each mount", [(kernel["MemAvailable"] - after["MemAvailable"]) / number / 1024], "KiB")
    bench.note("of that slab", [(after["Slab"] - kernel["Slab"]) / number / 1024], "KiB")


def read_ahead(bench: HostBench) -> None:
    """What read-ahead is worth."""
    with bench.host("raw", NEVER_COMPLETE) as host:
        with host.mounted() as top:
            hostkit.sequential(top / LARGE)

        def local(size: int) -> float:
            with host.mounted(read_ahead=size) as top:
                hostkit.drop_caches()
                return hostkit.sequential(top / LARGE)

        values = alternate(bench.rounds, {str(size): lambda size=size: local(size) for size in READ_AHEADS})
        for size in READ_AHEADS:
            bench.note(f"{size} KiB: local sequential, marked", values[str(size)], "MiB/s")

    with bench.host(bench.image, NEVER_COMPLETE) as host:
        fetched: dict[int, list[float]] = {size: [] for size in READ_AHEADS}

        def start(size: int) -> float:
            host.clear()
            before = host.engine()["bytes_fetched"]
            with host.mounted(read_ahead=size) as top:
                hostkit.drop_caches()
                command = ["chroot", top, "python3", "-c", "import numpy"]
                seconds = timed(lambda: subprocess.run(command, check=True))
                time.sleep(0.3)  # what was asked for ahead comes yet
                fetched[size].append((host.engine()["bytes_fetched"] - before) / MIB)
            return seconds

        values = alternate(bench.rounds, {str(size): lambda size=size: start(size) for size in READ_AHEADS})
        for size in READ_AHEADS:
            bench.note(f"{size} KiB: import numpy, cold", values[str(size)], "s")
            bench.note(f"{size} KiB: fetched for that", fetched[size], "MiB")


MEASUREMENTS: dict[str, Callable[[HostBench], None]] = {
    "a": mount_time,
    "b": warm_reads,
    "c": local_reads,
    "d": metadata,
    "e": cold_fill,
    "f": daemon_memory,
    "g": many_mounts,
    "h": read_ahead,
}


def main() -> None:
    measure(HostBench, arguments(__doc__, image_for="a, d, g and h").parse_args(), MEASUREMENTS)


if __name__ == "__main__":
    main()
