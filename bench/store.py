"""What it takes to read from a remote store: cold reads through a lazy mount, from a real S3 service on loopback.

==  ====================================================================================================================
a   a large file, nothing of it local: against C clients and boto3 that read the same bytes and keep none
b   the same with latency and a limit on every connection: against one round trip and the bytes over the bandwidth
c   the same file from the local cache, the page cache dropped: against dd of a plain file
d   memory of the daemon throughout a, b and c
e   what one request costs, client by client
==  ====================================================================================================================

The file is incompressible, as model weights are. Sides take turns, in changing order; a ratio is the median of the
rounds' ratios. Latency and limits are those of a proxy on loopback, on the same cores. ``--quick`` checks on little
data that everything works: its figures say nothing. Needs root, Ceph's gateway, nginx and curl.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import clients
import hostkit
from clients import MIB, Place
from hostkit import LARGE, Host, alternate, drop_caches, paired, sequential, timed
from memory import MemorySampler
from parts import Bench, arguments, measure

from erofsgen.store.base import Store
from erofsgen.store.open import open_store

PER_CONNECTION = 20 * MIB
TOTAL = 160 * MIB
"""Bytes a second that the proxy lets through."""


class StoreBench(Bench):
    """An S3 service with one image and the same file as an object, and lazy mounts from it."""

    def __init__(self, work: Path, options: argparse.Namespace) -> None:
        super().__init__(work, options)
        self.size = 64 if self.quick else 512
        self.memory: list[int] = []
        self._servers = ExitStack()

    def __enter__(self) -> StoreBench:
        server = self._servers.enter_context(clients.s3_service(self.work / "ceph"))
        os.environ.update(server.environment())
        bucket = server.bucket()
        self.url = f"s3://{bucket}/images"
        tree = self.tree("raw")
        hostkit.build(open_store(self.url), f"dir:{tree}", "raw")
        server.client().upload_file(tree / LARGE, bucket, "plain")
        self.place_of = Place(server, bucket, "plain", self.size * MIB)
        self.plain_file = tree / LARGE
        return self

    def __exit__(self, *exc: object) -> None:
        self._servers.close()

    @property
    def server(self) -> Any:
        return self.place_of.server

    @contextmanager
    def mounted(self, endpoint: str | None = None) -> Iterator[tuple[Host, Path]]:
        """A host with nothing local but what mounting needs."""
        url = self.url if endpoint is None else f"{self.url}?endpoint={endpoint}"
        with Host(self.place(), open_store(url), "raw") as host, host.mounted() as top:
            sequential(top / hostkit.FIRST)  # connections are open, the store is known
            yield host, top / LARGE

    def read(self, host: Host, path: Path) -> float:
        """Seconds of one reader from the first byte to the last."""
        with MemorySampler(host.call("status")) as memory:
            seconds = timed(lambda: sequential(path))
        self.memory += memory.totals
        return seconds

    def cold(self, endpoint: str | None = None) -> float:
        with self.mounted(endpoint) as (host, path):
            drop_caches()
            return self.read(host, path)


def cold(bench: StoreBench) -> None:
    """A file of which nothing is local, MiB a second."""
    place = bench.place_of
    in_c: dict[str, Callable[[], None]] = {
        "curl, 8 ranges of 8 MiB at a time": lambda: clients.curl(place, 8),
        "curl, 16 ranges of 16 MiB at a time": lambda: clients.curl(place, 16, 16 * MIB),
    }
    by_crt = clients.crt(place)
    if by_crt is not None:
        in_c["awscrt, parts of 8 MiB"] = by_crt
    others = {
        "boto3, one connection, one request": lambda: clients.boto3_stream(place),
        "boto3, one connection, a request per MiB": lambda: clients.boto3_ranges(place),
    }
    sides: dict[str, Callable[[], float]] = {"lazy mount": bench.cold}
    sides |= {name: lambda run=run: timed(run) for name, run in {**in_c, **others}.items()}
    seconds = alternate(bench.rounds, sides)
    for name, series in seconds.items():
        bench.note(name, [bench.size / value for value in series], "MiB/s")
    fastest = min(in_c, key=lambda name: median(seconds[name]))
    bench.goal(f"cold read / {fastest}", paired(seconds[fastest], seconds["lazy mount"]), 0.7, at_least=True)
    for name in others:
        bench.goal(f"cold read / {name}", paired(seconds[name], seconds["lazy mount"]), 2, at_least=True)


def distant(bench: StoreBench) -> None:
    """With latency and 20 MiB/s a connection, 160 in all, seconds."""
    from servers.faultproxy import FaultProxy

    with FaultProxy(bench.server.endpoint) as proxy:
        proxy.rate, proxy.total_rate = PER_CONNECTION, TOTAL
        place = bench.place_of._replace(server=dataclasses.replace(bench.server, endpoint=proxy.url))
        for latency in (0.02, 0.1):
            proxy.latency = latency
            ideal = latency + bench.size * MIB / TOTAL
            sides = {
                "lazy mount": lambda: bench.cold(proxy.url),
                "curl, 16 ranges of 4 MiB at a time": lambda: timed(lambda: clients.curl(place, 16, 4 * MIB)),
                "boto3, one connection, one request": lambda: timed(lambda: clients.boto3_stream(place)),
            }
            seconds = alternate(min(bench.rounds, 3), sides)
            for name, series in seconds.items():
                bench.note(f"{latency * 1000:.0f} ms: {name} (ideal {ideal:.2f})", series, "s")
            bench.goal(f"{latency * 1000:.0f} ms: time / ideal", median(seconds["lazy mount"]) / ideal, 1.3)


def local(bench: StoreBench) -> None:
    """From the local cache, the page cache dropped, MiB a second."""
    with bench.mounted() as (host, path):
        host.complete()
        host.wait_unmarked()

        def lazy() -> float:
            drop_caches()
            return bench.size / bench.read(host, path)

        def dd() -> float:
            drop_caches()
            command = ["dd", f"if={bench.plain_file}", "of=/dev/null", "bs=1M", "status=none"]
            return bench.size / timed(lambda: subprocess.run(command, check=True))

        values = alternate(bench.rounds, {"lazy mount": lazy, "dd of a plain file": dd})
    for name, series in values.items():
        bench.note(name, series, "MiB/s")
    bench.goal("local read / dd", paired(*values.values()), 0.9, at_least=True)


def memory(bench: StoreBench) -> None:
    """Of all processes of the daemon, shared pages counted once."""
    if not bench.memory:
        bench.cold()
    bench.goal("MiB at most", bench.note("peak", [max(bench.memory) / MIB], "MiB"), 150)


def requests(bench: StoreBench) -> None:
    """One request, microseconds: wall time with 8 at a time, CPU of the client."""
    place = bench.place_of
    stores: dict[str, tuple[Store, str]] = {}
    for name in ("http", "boto3"):
        store = open_store(f"{bench.url}?client={name}")
        digest, _ = max(store.blobs(), key=lambda blob: blob[1])
        stores[f"our store, client={name}"] = store, digest
    size = min(place.size, 200 * MIB if not bench.quick else 32 * MIB)
    for length, count in ((4096, 400), (MIB, 200), (8 * MIB, 48)):
        sides = {
            name: partial(clients.cost, get, size, length, 16 if bench.quick else count, 8)
            for name, get in clients.getters(place, stores).items()
        }
        for name, costs in alternate(min(bench.rounds, 3), sides).items():
            what = f"{length >> 10} KiB, {name}"
            bench.note(f"{what}: wall", [one.seconds * 1e6 for one in costs], "us")
            bench.note(f"{what}: CPU", [one.cpu * 1e6 for one in costs], "us")


MEASUREMENTS = {"a": cold, "b": distant, "c": local, "d": memory, "e": requests}


def main() -> None:
    measure(StoreBench, arguments(__doc__, image_for="no part").parse_args(), MEASUREMENTS)


if __name__ == "__main__":
    main()
