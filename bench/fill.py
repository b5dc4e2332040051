"""What the fill engine costs beside its parts: reading, decompressing, hashing and writing a pack measured alone.

``python bench/fill.py [MEBIBYTES] [DIRECTORY]``: a pack of compressible frames of 1 MiB in a directory store,
prefetched as a whole; then frames of 4 KiB, demanded one after the other.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import zstandard
from blake3 import blake3

from erofsgen.host.cache.presence import Presence
from erofsgen.host.fill.engine import Engine, Priority, StoreSource
from erofsgen.pack.reader import open_frame
from erofsgen.pack.toc import Toc
from erofsgen.pack.writer import PackWriter
from erofsgen.store.directory import DirectoryStore

MIB = 1 << 20
DEMANDS = 4000
SKEWED = bytes((number & 15) * (number >> 4) for number in range(256))
"""Makes of random bytes some that entropy coding halves nearly, and string matching does not: zstd has work to do."""


class Target:
    """A data file and its presence map."""

    def __init__(self, directory: Path, name: str, toc: Toc) -> None:
        self.name = name
        self.toc = toc
        self.descriptor = os.open(directory / f"{name}.data", os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        os.ftruncate(self.descriptor, toc.device_size)
        self.presence = Presence.open(directory / f"{name}.map", len(toc))
        self.presence.clear()
        self.ready = self.presence.ready
        self.missing = self.presence.missing

    def write_frame(self, frame: int, data: bytes) -> None:
        os.pwrite(self.descriptor, data, int(self.toc.device_offsets[frame]))
        self.presence.mark_written(frame)

    def close(self) -> None:
        self.presence.close()
        os.close(self.descriptor)


def make_pack(store: DirectoryStore, frames: int, size: int) -> tuple[str, Toc]:
    choice = random.Random(1)
    with store.create() as blob:
        writer = PackWriter(blob, raw=False)
        for _ in range(frames):
            data = choice.randbytes(size).translate(SKEWED)
            writer.add_frame(zstandard.ZstdCompressor(3).compress(data), size, blake3(data).digest())
        location = writer.finish([])
        digest, _ = blob.commit()
    return digest, Toc(store.read(digest, location.offset, location.size), location, what="pack")


def timed(what: str, size: int, count: int, work: Callable[[int], object]) -> float:
    wall, cpu = time.perf_counter(), time.process_time()
    for number in range(count):
        work(number)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(f"{what:28}{wall:8.2f} s wall{cpu:8.2f} s CPU{size / wall / MIB:8.0f} MiB/s")
    return cpu


def main() -> None:
    mebibytes = int(sys.argv[1]) if len(sys.argv) > 1 else 1024
    with tempfile.TemporaryDirectory(dir=sys.argv[2] if len(sys.argv) > 2 else None) as name:
        directory = Path(name)
        store = DirectoryStore(directory / "store")
        digest, toc = make_pack(store, mebibytes, MIB)
        device, stored = toc.device_size, int(toc.sizes.sum())
        pieces = list(zip(toc.offsets.tolist(), toc.sizes.tolist(), strict=True))
        print(f"{len(toc)} frames, {device / MIB:.0f} MiB in {stored / MIB:.0f} MiB; one thread each:")

        offset, size = pieces[0]
        piece = store.read(digest, offset, size)
        frame = zstandard.ZstdDecompressor().decompress(piece)
        target = Target(directory, digest.removeprefix("sha256:"), toc)
        read = 8 * MIB
        alone: list[tuple[str, int, int, Callable[[int], object]]] = [
            ("read", stored, stored // read, lambda number: store.read(digest, number * read, read)),
            ("unzstd", device, len(toc), lambda _: zstandard.ZstdDecompressor().decompress(piece)),
            ("BLAKE3", device, len(toc), lambda _: blake3(frame).digest()),
            ("write", device, len(toc), lambda number: target.write_frame(number, frame)),
        ]
        parts = sum(timed(what, size, count, work) for what, size, count, work in alone)
        target.close()

        target = Target(directory, digest.removeprefix("sha256:"), toc)
        with Engine([StoreSource(store)]) as engine:
            print(f"\nengine, {len(os.sched_getaffinity(0))} cores:")
            whole = timed(
                "prefetch",
                device,
                1,
                lambda _: engine.request(target, 0, device, priority=Priority.PREFETCH).result(),
            )
            stats = engine.stats()
        target.close()
        print(
            f"CPU of the parts {parts:.2f} s, of the engine {whole:.2f} s; {stats['reads']} reads, "
            f"at most {stats['in_flight_peak'] / MIB:.0f} MiB in flight"
        )
        demand(store, directory)


def demand(store: DirectoryStore, directory: Path) -> None:
    digest, toc = make_pack(store, DEMANDS, 4096)
    target = Target(directory, digest.removeprefix("sha256:"), toc)
    with Engine([StoreSource(store)]) as engine:
        waits = []
        cpu = time.process_time()
        for number in range(DEMANDS):
            begun = time.perf_counter()
            engine.request(target, number * 4096, 4096, deadline=time.monotonic() + 30).result()
            waits.append(time.perf_counter() - begun)
        cpu = (time.process_time() - cpu) / DEMANDS
        begun = time.perf_counter()
        for number in range(DEMANDS):
            engine.request(target, number * 4096, 4096).result()
        there = (time.perf_counter() - begun) / DEMANDS
    sizes = list(zip(toc.offsets.tolist(), toc.sizes.tolist(), strict=True))
    alone = time.process_time()
    for number, (offset, size) in enumerate(sizes):
        target.write_frame(number, open_frame(store.read(digest, offset, size), toc, number, what="pack"))
    alone = (time.process_time() - alone) / DEMANDS
    target.close()
    waits.sort()
    print(
        f"\ndemand of one 4 KiB frame: {waits[DEMANDS // 2] * 1e6:.0f} µs (half of them), "
        f"{waits[DEMANDS * 95 // 100] * 1e6:.0f} µs (95 %), {cpu * 1e6:.0f} µs of CPU where the parts need "
        f"{alone * 1e6:.0f}; of one that is there: {there * 1e6:.1f} µs"
    )


if __name__ == "__main__":
    main()
