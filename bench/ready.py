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
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from statistics import median

import clients
import hostkit
import numpy as np
import numpy.typing as npt
from containerd import PROGRAMS, Containerd
from containers import CONTAINERS, PORT, Container
from hostkit import EROFSGEN, MIB, EmptyHost, alternate, drop_caches, paired
from images import Image
from measure import read_through, run
from parts import Bench, arguments, measure, say
from rich.console import Console
from rich.table import Table

from erofsgen.host.cache.cache import HostCache
from erofsgen.host.profiles import HostProfiles
from erofsgen.host.pull import complete
from erofsgen.profile.chunks import Chunks
from erofsgen.profile.naming import command_name
from erofsgen.profile.png import draw_png
from erofsgen.profile.profile import Profile
from erofsgen.profile.trace import Trace
from erofsgen.store.image import Image as Built
from erofsgen.store.open import open_store

CONTAINERD, PACKS, NOTHING, HEURISTICS, PROFILE, OPTIMIZED, LOCAL = WAYS = (
    "containerd", "packs", "nothing ahead", "heuristics", "profile", "optimized", "everything local",
)  # fmt: skip
PREFETCH = {NOTHING: "none", HEURISTICS: "heuristics", PROFILE: "profile", OPTIMIZED: "profile"}
JUDGED = 20
"""Milliseconds of latency that the goals are about."""
_PATIENCE = 600.0
_NOTED = 30.0
"""Seconds within which the daemon writes down what it noted."""


@dataclass(frozen=True)
class Start:
    """A start: seconds to ready, bytes that came over the network meanwhile, reads that had to wait and the seconds
    of all of them together, bytes that were prefetched, of these the ones whose use could be seen (reads of a complete
    pack are the kernel's alone), and of these the ones that nobody used."""

    seconds: float
    fetched: int
    misses: int = 0
    waited: float = 0.0
    prefetched: int = 0
    judged: int = 0
    unused: int = 0
    trace: Trace | None = None


@dataclass(frozen=True)
class Prepared:
    """A container, its image, and where the host is that has all of it."""

    container: Container
    image: Image
    local: Path

    @property
    def name(self) -> str:
        return self.container.name

    @property
    def optimized(self) -> str:
        return f"{self.name}-optimized"


class ReadyBench(Bench):
    """A registry and an S3 service with images, and a proxy before each."""

    def __init__(self, work: Path, options: argparse.Namespace) -> None:
        super().__init__(work, options)
        self.containers = [CONTAINERS[name] for name in options.containers]
        self.ways: list[str] = options.ways
        self.latencies: list[int] = options.latency
        self.bandwidth: float | None = options.bandwidth and options.bandwidth * MIB
        self.waterfalls: Path | None = options.waterfalls
        self.as_json: bool = options.json
        self._environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        self._prepared: dict[str, Prepared] = {}
        self._servers = ExitStack()

    def __enter__(self) -> ReadyBench:
        from servers.faultproxy import FaultProxy
        from servers.registry import docker_registry

        enter = self._servers.enter_context
        try:
            server = enter(clients.s3_service(self.work / "ceph"))
            os.environ.update(server.environment())
            self._environment |= server.environment()
            self._endpoint = server.endpoint
            self._bucket = server.bucket()
            self._registry_files = self.work / "registry"
            self._registry = enter(docker_registry(self._registry_files))
            self._proxies = enter(FaultProxy(server.endpoint)), enter(FaultProxy(f"http://{self._registry}"))
        except BaseException:
            self._servers.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._servers.close()

    def distant(self, latency: int) -> tuple[str, str]:
        """The store's URL and the registry's HOST:PORT, ``latency`` milliseconds away."""
        if not latency and not self.bandwidth:
            return self.store_url(), self._registry
        for proxy in self._proxies:
            proxy.latency, proxy.total_rate = latency / 1000, self.bandwidth
        store, registry = self._proxies
        return self.store_url(store.url), registry.url.removeprefix("http://")

    def store_url(self, endpoint: str | None = None) -> str:
        return f"s3://{self._bucket}/images?endpoint={endpoint or self._endpoint}"

    # --- before anything is measured ---------------------------------------------------------------------------------

    def prepared(self, container: Container) -> Prepared:
        """The container, its image in the store; built on first use."""
        name = container.name
        if name not in self._prepared:
            image = container.image()
            say(f"{name}: {image.tar_size / MIB:.0f} MiB, {image.blob_size / MIB:.0f} compressed")
            self._prepared[name] = Prepared(container, image, self.place())
            hostkit.build(open_store(self.store_url(), create=True), f"oci:{image.reference}", name)
        return self._prepared[name]

    def prepare_ways(self, prepared: Prepared) -> None:
        """What the chosen ways need beyond the image in the store."""
        name, ways = prepared.name, set(self.ways)
        if CONTAINERD in ways:
            target = f"docker://{self._registry}/{name}:latest"
            run("skopeo", "copy", "--quiet", "--dest-tls-verify=false", f"oci:{prepared.image.reference}", target)
        if LOCAL in ways:
            built = Built.open(open_store(self.store_url()), name)
            cache = HostCache(prepared.local / "root")
            complete(cache, cache.add(built), built)
        if ways & {PROFILE, OPTIMIZED}:
            with EmptyHost(self.place()) as host:
                self.record(host, prepared)
        if OPTIMIZED in ways:
            run(EROFSGEN, "--store", self.store_url(), "optimize", "--quiet", name, "--as", prepared.optimized)

    def record(self, host: EmptyHost, prepared: Prepared, *options: str, environment: Sequence[str] = ()) -> None:
        """Record a start of the container on ``host``, with ``options`` of ``profile record``."""
        container = prepared.container
        settings = ["--store", self.store_url(), "--root", os.fspath(host.root)]
        recorded = [EROFSGEN, *settings, "profile", "record", *options, "--"]
        self.start(container, lambda port: [*recorded, *self.lazily(
            self.store_url(), host.root, prepared.name, container, [*environment, *port], "--prefetch", "none",
        )])  # fmt: skip

    def recorded_here(self, prepared: Prepared, *variables: str) -> Profile:
        """The profile of one start with these variables, on a host of its own that tells nobody."""
        with EmptyHost(self.place()) as host:
            self.record(host, prepared, "--no-push", environment=variables)
            recorded = HostProfiles(host.root).recorded(self.digest(prepared.name))
        for profile in recorded:
            if profile.command == command_name(prepared.container.command):
                return profile
        raise SystemExit(f"bench: nothing was recorded of {prepared.name}")

    def digest(self, name: str) -> str:
        """Of the manifest of an image in the store."""
        return Built.open(open_store(self.store_url()), name).digest

    # --- starts ------------------------------------------------------------------------------------------------------

    def lazily(
        self, store: str, root: Path, name: str, container: Container, environment: Sequence[str], *options: str
    ) -> list[str]:
        """The command that runs the container from the image ``name``."""
        given = [word for variable in environment for word in ("--env", variable)]
        settings = ["--store", store, "--root", os.fspath(root), "run", "--quiet"]
        return [os.fspath(EROFSGEN), *settings, *options, *given, name, *container.command]

    def start(
        self, container: Container, command: Callable[[list[str]], Sequence[str | Path]],
        first: Callable[[], None] = lambda: None,
    ) -> float:  # fmt: skip
        """Seconds until the container is ready that ``command`` starts, which is told the container's variables; what
        comes ``first`` counts. The container has ended afterwards. Raises SystemExit with what it said if it fails."""
        from servers.process import free_port

        port = free_port() if container.serves else None
        words = command([f"{PORT}={port}"] if port else [])
        with open(self.work / "output", "w+b") as output:
            begun = time.perf_counter()
            first()
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=self._environment,
                start_new_session=True,
            )
            try:
                if port:
                    wait_for_answer(process, port)
                else:
                    process.wait(_PATIENCE)
                seconds = time.perf_counter() - begun
                failed = process.poll() not in (None, 0)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does, so that `profile record` sees its end
                    process.wait(_PATIENCE)
            if failed:
                output.seek(0)
                said = output.read().decode(errors="replace")
                raise SystemExit(f"bench: {' '.join(map(str, words))}: exit code {process.returncode}\n{said[-4000:]}")
        return seconds

    def measured(self, prepared: Prepared, way: str, latency: int) -> Start:
        """One start, and a line about it."""
        store, registry = self.distant(latency)
        if way == CONTAINERD:
            start = self.from_registry(prepared, registry)
        elif way == LOCAL:
            start = self.from_store(prepared, way, self.store_url())
        else:
            start = self.from_store(prepared, way, store)
        say(
            f"{prepared.name}, {latency} ms, {way}: {start.seconds:.2f} s, {start.fetched / MIB:.1f} MiB fetched, "
            f"{start.misses} reads waited {start.waited:.2f} s, {start.prefetched / MIB:.1f} MiB prefetched, "
            f"{start.unused / MIB:.1f} of {start.judged / MIB:.1f} not used"
        )
        return start

    def from_registry(self, prepared: Prepared, registry: str) -> Start:
        reference = f"{registry}/{prepared.name}:latest"
        container = prepared.container
        with Containerd(self.place()) as containerd:
            self.settle()
            read_through(self._registry_files)
            seconds = self.start(
                container,
                lambda port: containerd.run(reference, container.command, port),
                lambda: containerd.pull(reference),
            )
        return Start(seconds, prepared.image.blob_size)

    def from_store(self, prepared: Prepared, way: str, store: str) -> Start:
        container = prepared.container
        name = prepared.optimized if way == OPTIMIZED else prepared.name
        options = ["--eager"] if way == PACKS else ["--prefetch", PREFETCH.get(way, "none")]
        host = EmptyHost(prepared.local if way == LOCAL else self.place(), keep=way == LOCAL)
        with host:
            self.settle()
            since = time.time()
            seconds = self.start(container, lambda port: self.lazily(store, host.root, name, container, port, *options))
            fetched = host.engine()["bytes_fetched"]
            if way in (PACKS, LOCAL):
                return Start(seconds, fetched)
            trace = self.trace(host, name, container, since)
        waited, brought = trace.touches["waited"], trace.brought
        return Start(
            seconds,
            fetched,
            misses=int((waited > 0).sum()),
            waited=int(waited.sum(dtype=np.int64)) / 1e6,
            prefetched=total(brought),
            judged=total(brought[brought["judged"]]),
            unused=total(brought[brought["judged"] & ~brought["used"]]),
            trace=trace,
        )

    def trace(self, host: EmptyHost, name: str, container: Container, since: float) -> Trace:
        """What the daemon noted of the container's start at ``since``, once it has written that down."""
        digest, command = self.digest(name), command_name(container.command)
        until = time.monotonic() + _NOTED
        while (trace := HostProfiles(host.root).trace(digest, command)) is None or trace.started < since:
            if time.monotonic() > until:
                raise SystemExit(f"bench: nothing was noted of a start of {container.name}")
            time.sleep(0.05)
        return trace

    def settle(self) -> None:
        """Drop the page cache, but for the programs that start containers: a host starts them all the time."""
        drop_caches()
        for program in (*PROGRAMS, "curl"):
            subprocess.run([program, "--version"], check=False, capture_output=True)
        # imports all that is needed to find an image, and finds none
        command = [EROFSGEN, "--store", self.store_url(), "--root", self.work / "none", "run", "none"]
        subprocess.run(command, check=False, capture_output=True, env=self._environment)


def total(rows: npt.NDArray[np.void]) -> int:
    """Bytes of a trace's rows."""
    return int(rows["length"].sum(dtype=np.int64))


def wait_for_answer(process: subprocess.Popen[bytes], port: int) -> None:
    """Until a GET is answered with 200, or the process has ended. Raises SystemExit if neither happens in time."""
    until = time.monotonic() + _PATIENCE
    while process.poll() is None:
        connection = HTTPConnection("127.0.0.1", port, timeout=_PATIENCE)
        try:
            with suppress(OSError, HTTPException):
                connection.request("GET", "/")
                if connection.getresponse().status == 200:
                    return
        finally:
            connection.close()
        if time.monotonic() > until:
            raise SystemExit(f"bench: nothing answers on port {port}")
        time.sleep(0.002)


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
