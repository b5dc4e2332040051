"""What the benchmark of starts stands on: an S3 service and a registry with images, and one start in a given way."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path

import clients
import hostkit
import numpy as np
import numpy.typing as npt
from containerd import PROGRAMS, Containerd
from containers import CONTAINERS, PORT, Container
from hostkit import EROFSGEN, MIB, EmptyHost, drop_caches
from images import Image
from measure import read_through, run
from parts import Bench, say

from erofsgen.host.cache.cache import HostCache
from erofsgen.host.profiles import HostProfiles
from erofsgen.host.pull import complete
from erofsgen.profile.naming import command_name
from erofsgen.profile.profile import Profile
from erofsgen.profile.trace import Trace
from erofsgen.store.image import Image as Built
from erofsgen.store.open import open_store

CONTAINERD, PACKS, NOTHING, HEURISTICS, PROFILE, OPTIMIZED, LOCAL = WAYS = (
    "containerd", "packs", "nothing ahead", "heuristics", "profile", "optimized", "everything local",
)  # fmt: skip
RECORDED = "recorded"
"""What profiles are called: the container's own command is that which heuristics have guessed for."""
PREFETCH = {NOTHING: "none", HEURISTICS: "heuristics", PROFILE: "profile", OPTIMIZED: "profile"}
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
        recorded = [EROFSGEN, *settings, "profile", "record", "--name", RECORDED, *options, "--"]
        self.start(container, lambda port: [*recorded, *self.lazily(
            self.store_url(), host.root, prepared.name, container, [*environment, *port], "--prefetch", "none",
        )])  # fmt: skip

    def recorded_here(self, prepared: Prepared, *variables: str) -> Profile:
        """The profile of one start with these variables, on a host of its own that tells nobody."""
        with EmptyHost(self.place()) as host:
            self.record(host, prepared, "--no-push", environment=variables)
            recorded = HostProfiles(host.root).recorded(self.digest(prepared.name))
        for profile in recorded:
            if profile.command == RECORDED:
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
        if PREFETCH.get(way) == "profile":
            options += ["--profile", RECORDED]
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
        digest = self.digest(name)
        commands = (RECORDED, command_name(container.command))
        until = time.monotonic() + _NOTED
        profiles = HostProfiles(host.root)
        while True:
            for command in commands:
                trace = profiles.trace(digest, command)
                if trace is not None and trace.started >= since:
                    return trace
            if time.monotonic() > until:
                raise SystemExit(f"bench: nothing was noted of a start of {container.name}")
            time.sleep(0.05)

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
