"""Reads of all kinds, sizes and places, from a cold cache, against what the files must hold."""

from __future__ import annotations

import mmap
import os
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from fusekit import ONLY_FUSE, Site, Variant, outcome
from handmade import CHUNK, Sample, chunks_of, contents, make_wide
from lazykit import WAIT, Reader, eventually

pytestmark = [pytest.mark.mount, pytest.mark.usefixtures("require_root")]

SIZES = (0, 1, 2, 511, 512, 4095, 4096, 4097, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 17, 262_143, 262_145)
"""Of files: around blocks, chunks and frames."""
OPERATIONS = 3000


def make_odd(site: Site, name: str, seed: int) -> Sample:
    """Files of :data:`SIZES`, each at places of its own, one with a hole, and one across two packs."""
    parts = contents(seed, *SIZES, 40 * CHUNK + 1234, 25 * CHUNK)
    files: dict[str, bytes | str | None] = {f"{len(part)}": part for part in parts}
    chunks = [chunk for part in parts for chunk in chunks_of(part) if len(part) >= 512]
    long, other = parts[-2], parts[-1]
    files["hole"] = long[: 2 * CHUNK] + bytes(3 * CHUNK) + other[: 5 * CHUNK + 100]
    chunks.append(other[5 * CHUNK : 5 * CHUNK + 100])
    pairs = zip(chunks_of(long)[:20], chunks_of(other)[:20], strict=True)
    files["both"] = b"".join(first + second for first, second in pairs)
    files["zeros"] = bytes(2 * CHUNK + 5)
    half = len(chunks) // 2
    packs = [site.maker.pack(chunks[:half]), site.maker.pack(chunks[half:], raw=True)]
    return Sample(site.maker.image(name, files, packs), files, packs)


def within(seconds: float, call) -> None:
    """Run a test's reads in a thread: none that hangs may hang the tests."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), f"still reading after {seconds} s"
    if failures:
        raise failures[0]


@pytest.fixture(scope="module")
def odd(shared: Site) -> Iterator[tuple[Path, Sample]]:
    sample = make_odd(shared, "odd", 11)
    target = shared.mount(sample.image, "odd")
    yield target, sample
    shared.unmount(target, force=True)


class Exerciser:
    """Reads a file in a way chosen at random, and compares."""

    def __init__(self, top: Path, sample: Sample, seed: int) -> None:
        self.chance = random.Random(seed)
        self.files = {name: content for name, content in sample.files.items() if isinstance(content, bytes)}
        self.open = {name: os.open(top / name, os.O_RDONLY) for name in self.files}
        self.ways = [self.pread, self.preadv, self.sendfile, self.seek, self.mapped]

    def close(self) -> None:
        for descriptor in self.open.values():
            os.close(descriptor)

    def __call__(self, count: int) -> None:
        for number in range(count):
            name = self.chance.choice(list(self.files))
            content = self.files[name]
            edge = self.chance.choice([0, 4096, CHUNK, 4 * CHUNK, len(content)])
            offset = self.chance.choice(
                [self.chance.randrange(len(content) + 100), max(0, edge + self.chance.randrange(-3, 4)), len(content)]
            )
            length = self.chance.choice([1, 2, 511, 4096, 4097, 70_000, 300_000, 1 << 20, 3 << 20])
            way = self.chance.choice(self.ways)
            got = way(self.open[name], offset, length, len(content))
            right = content[offset : offset + length]
            assert got == right, f"read {number}, {way.__name__}: {name}, {offset}+{length}: {len(got)} bytes"
            if not number % 50:
                os.posix_fadvise(self.open[name], 0, 0, os.POSIX_FADV_DONTNEED)

    @staticmethod
    def pread(descriptor: int, offset: int, length: int, size: int) -> bytes:
        return os.pread(descriptor, length, offset)

    def preadv(self, descriptor: int, offset: int, length: int, size: int) -> bytes:
        cuts = sorted(self.chance.randrange(length + 1) for _ in range(3))
        buffers = [bytearray(end - start) for start, end in zip([0, *cuts], [*cuts, length], strict=True)]
        count = os.preadv(descriptor, buffers, offset)
        return b"".join(buffers)[:count]

    @staticmethod
    def sendfile(descriptor: int, offset: int, length: int, size: int) -> bytes:
        memory = os.memfd_create("copy")
        try:
            done = 0
            while done < length and (count := os.sendfile(memory, descriptor, offset + done, length - done)):
                done += count
            return os.pread(memory, done, 0)
        finally:
            os.close(memory)

    @staticmethod
    def seek(descriptor: int, offset: int, length: int, size: int) -> bytes:
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.read(descriptor, length)

    def mapped(self, descriptor: int, offset: int, length: int, size: int) -> bytes:
        if offset >= size:
            return b""
        start = offset & -mmap.PAGESIZE
        end = min(size, offset + length)
        with mmap.mmap(descriptor, end - start, mmap.MAP_SHARED, mmap.PROT_READ, offset=start) as mapping:
            if self.chance.random() < 0.5:
                mapping.madvise(mmap.MADV_RANDOM)
            return mapping[offset - start :]


def test_thousands_of_reads_of_all_kinds(odd: tuple[Path, Sample]) -> None:
    top, sample = odd
    exerciser = Exerciser(top, sample, 1)
    try:
        within(4 * WAIT, lambda: exerciser(OPERATIONS))
    finally:
        exerciser.close()


def test_64_readers_at_a_time(shared: Site) -> None:
    sample = make_odd(shared, "crowd", 12)
    target = shared.mount(sample.image, "crowd")

    def read(seed: int) -> None:
        exerciser = Exerciser(target, sample, seed)
        try:
            exerciser(12)
        finally:
            exerciser.close()

    try:
        with ThreadPoolExecutor(64) as pool:
            list(pool.map(read, range(64), timeout=4 * WAIT))
        assert shared.host.status()["denied"] == 0
    finally:
        shared.unmount(target, force=True)


def test_what_lies_behind_the_end(odd: tuple[Path, Sample]) -> None:
    top, sample = odd
    for name, content in sample.files.items():
        assert isinstance(content, bytes)
        with (top / name).open("rb", buffering=0) as file:
            for beyond in (0, 1, 4095, 1 << 20, 1 << 40):
                assert os.pread(file.fileno(), 100, len(content) + beyond) == b"", name
            assert os.pread(file.fileno(), 100, max(0, len(content) - 1)) == content[-1:]
            assert file.seek(0, os.SEEK_END) == len(content)


def test_32_mib_at_a_time(shared: Site) -> None:
    wide = make_wide(shared.maker, "large", seed=13)
    content = wide.files["all"]
    assert isinstance(content, bytes)
    large = content * 2 + content[: 60 * CHUNK]
    image = shared.maker.image("large", {"large": large}, wide.packs)
    target = shared.mount(image, "large")
    try:

        def read() -> None:
            with (target / "large").open("rb", buffering=0) as file:
                assert os.pread(file.fileno(), 32 << 20, 12_345) == large[12_345 : 12_345 + (32 << 20)]
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                assert file.read(64 << 20) == large

        within(4 * WAIT, read)
    finally:
        shared.unmount(target, force=True)


def test_direct_reads(odd: tuple[Path, Sample]) -> None:
    """EROFS may refuse them; over FUSE they come as they were asked for, however large."""
    top, sample = odd

    def read(name: str, offset: int, length: int) -> bytes:
        descriptor = os.open(top / name, os.O_RDONLY | os.O_DIRECT)
        try:
            with mmap.mmap(-1, length) as buffer:
                return buffer[: os.preadv(descriptor, [buffer], offset)]
        finally:
            os.close(descriptor)

    for name in ("hole", "both", f"{40 * CHUNK + 1234}", "4097"):
        content = sample.files[name]
        assert isinstance(content, bytes)
        for offset, length in ((0, 4096), (4096, 8 << 20), (0, 64 << 20), (CHUNK, 2 * CHUNK)):
            got = outcome(partial(read, name, offset, length))
            if got != "error 22 EINVAL":
                assert got == content[offset : offset + length], (name, offset, length)


@ONLY_FUSE
def test_sequential_readers_find_what_they_want_there(make_site: Callable[..., Site], variant: Variant) -> None:
    """With read-ahead, and files that go on in the next pack."""
    site = make_site(variant, read_ahead=32 << 20)
    wide = make_wide(site.maker)
    target = site.mount(wide.image, read_ahead=128)
    content = wide.files["all"]
    assert isinstance(content, bytes)
    assert Reader(target / "all", 0, 20 * CHUNK).get() == content[: 20 * CHUNK]
    eventually(lambda: site.host.engine()["frames"] > 8)
    assert Reader(target / "all", 0, len(content)).get() == content
    assert site.host.status()["denied"] == 0
