"""Packs, sources and targets for the tests of the fill engine. Nothing in here trusts the engine."""

from __future__ import annotations

import bisect
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import zstandard
from blake3 import blake3

from erofsgen.errors import IntegrityError
from erofsgen.host.cache.presence import Presence
from erofsgen.host.fill.sources import Source
from erofsgen.pack.toc import Toc
from erofsgen.pack.writer import PackWriter
from erofsgen.store.directory import DirectoryStore

BLOCK = 4096
WAIT = 20.0
"""Seconds that no test waits for anything that works."""


class Pack(NamedTuple):
    digest: str
    toc: Toc
    blob: bytes
    device: bytes
    offsets: list[int]
    """Where frames begin in the blob, and where the last one ends."""

    @property
    def hex(self) -> str:
        return self.digest.removeprefix("sha256:")

    def frame(self, index: int) -> bytes:
        start = int(self.toc.device_offsets[index])
        return self.device[start : start + int(self.toc.device_sizes[index])]

    def frames_of(self, offset: int, length: int) -> range:
        """Which frames a read of the blob covers exactly."""
        first, end = bisect.bisect_left(self.offsets, offset), bisect.bisect_left(self.offsets, offset + length)
        assert (self.offsets[first], self.offsets[end]) == (offset, offset + length)
        return range(first, end)


def make_pack(store: DirectoryStore, sizes: Sequence[int], *, raw: bool = False, seed: int = 0) -> Pack:
    """A real pack in ``store`` whose frames hold ``sizes`` blocks each: random bytes, but half of each is text."""
    random_ = random.Random(f"{seed} {len(sizes)}")
    frames = []
    with store.create() as blob:
        writer = PackWriter(blob, raw=raw)
        table = []
        for size in sizes:
            half = size * BLOCK // 2
            data = random_.randbytes(half) + (b"%d words " % len(table) * half)[: size * BLOCK - half]
            digest = blake3(data).digest()
            table.append((digest, writer.device_size // BLOCK, len(data)))
            writer.add_frame(data if raw else zstandard.ZstdCompressor(1).compress(data), len(data), digest)
            frames.append(data)
        location = writer.finish(table)
        digest_, size_ = blob.commit()
    toc = Toc(store.read(digest_, location.offset, location.size), location, what="pack")
    return Pack(
        digest_, toc, store.read(digest_, 0, size_), b"".join(frames), [*toc.offsets.tolist(), toc.dictionary[0]]
    )


class FileTarget:
    """A sparse data file with its presence map, as the cache has them. ``writes``: which frame, in which order."""

    def __init__(self, directory: Path, pack: Pack) -> None:
        self.pack = pack
        self.name = pack.hex
        self.toc = pack.toc
        self.writes: list[int] = []
        self.written = threading.Condition()
        self.descriptor = os.open(directory / f"{pack.hex}.data", os.O_RDWR | os.O_CREAT, 0o600)
        os.ftruncate(self.descriptor, pack.toc.device_size)
        self.presence = Presence.open(directory / f"{pack.hex}.map", len(pack.toc))
        self.ready = self.presence.ready
        self.missing = self.presence.missing

    def write_frame(self, frame: int, data: bytes) -> None:
        view = memoryview(data)
        assert os.pwrite(self.descriptor, view, int(self.toc.device_offsets[frame])) == len(view)
        self.presence.mark_written(frame)
        with self.written:
            self.writes.append(frame)
            self.written.notify_all()

    def check(self) -> list[int]:
        """Compares every marked frame's bytes with the pack's. Returns the marked."""
        marked = [frame for frame in range(len(self.toc)) if self.presence.ready(frame, frame)]
        for frame in marked:
            right = self.pack.frame(frame)
            assert os.pread(self.descriptor, len(right), int(self.toc.device_offsets[frame])) == right, frame
        return marked

    def close(self) -> None:
        self.presence.close()
        os.close(self.descriptor)


class Range(NamedTuple):
    frames: range
    thread: str
    at: float


class MemorySource(Source):
    """Packs in memory. ``reads`` has every read; ``before`` may block or raise, ``change`` has the bytes pass it.

    ``terms``: attributes of :class:`Source`.
    """

    def __init__(
        self,
        packs: Iterable[Pack],
        name: str = "memory",
        *,
        before: Callable[[range], object] | None = None,
        change: Callable[[bytes, range], object] | None = None,
        **terms: Any,
    ) -> None:
        self.name = name
        for term, value in terms.items():
            assert hasattr(Source, term)
            setattr(self, term, value)
        self.packs = {pack.digest: pack for pack in packs}
        self.reads: list[Range] = []
        self.before = before
        self.change = change

    def read_into(self, digest: str, offset: int, buffer: memoryview) -> None:
        pack = self.packs[digest]
        length = len(buffer)
        frames = pack.frames_of(offset, length)
        self.reads.append(Range(frames, threading.current_thread().name, time.monotonic()))
        if self.before is not None:
            self.before(frames)
        data = pack.blob[offset : offset + length]
        given: bytes = data if self.change is None else self.change(data, frames)  # type: ignore[assignment]
        if len(given) != length:
            raise IntegrityError(f"{len(given)} bytes at byte {offset}, {length} expected")
        buffer[:] = given

    @property
    def fetched(self) -> Counter[int]:
        """How often each frame was read."""
        return Counter(frame for read in self.reads for frame in read.frames)


class Gate:
    """Blocks a source until it is opened; tells when somebody came to it."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self._count = 0
        self._changed = threading.Condition()

    def __call__(self, _frames: range) -> None:
        with self._changed:
            self._count += 1
            self._changed.notify_all()
        assert self._open.wait(WAIT)

    def open(self) -> None:
        self._open.set()

    def wait_for(self, count: int = 1) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self._count >= count, WAIT)


@contextmanager
def no_thread_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    left = [thread for thread in threading.enumerate() if thread not in before]
    for thread in left:
        thread.join(WAIT)
    assert not [thread for thread in left if thread.is_alive()]


def eventually(condition: Callable[[], object]) -> None:
    until = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.002)
