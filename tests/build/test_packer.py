"""The packer: places, frames, determinism, and what happens when the store fails."""

from __future__ import annotations

import random
import threading

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from erofsgen.build.packer import Packer, compressible
from erofsgen.errors import StorageError
from erofsgen.pack import format as fmt
from erofsgen.store.directory import DirectoryStore
from erofsgen.store.image import open_pack
from erofsgen.store.manifest import pack_from_descriptor


def make_chunks(seed: int, count: int, largest: int) -> list[bytes]:
    rng = random.Random(seed)
    words = [rng.randbytes(rng.randrange(1, 40)) for _ in range(50)]
    chunks = []
    for _ in range(count):
        size = rng.choice([rng.randrange(1, 200), rng.randrange(1, largest + 1), largest])
        text = b"".join(rng.choices(words, k=size // 10 + 1))
        chunks.append((text * (size // len(text) + 1))[:size])
    return chunks


def pack_all(store, chunks, *, threads=2, pack_size=1 << 20, frame_size=64 << 10, level=3):
    """[(chunk, pack, block)], packs"""
    with Packer(store, level=level, threads=threads, pack_size=pack_size, frame_size=frame_size) as packer:
        places = []
        for number, chunk in enumerate(chunks):
            packer.begin_file(b"dir%d" % (number // 7))
            places.append(packer.add(memoryview(chunk), blake3(chunk).digest(), raw=number % 5 == 0))
        return places, packer.flush()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1 << 30), count=st.integers(0, 60))
def test_every_chunk_reads_back_from_its_place(tmp_path_factory, seed, count):
    store = DirectoryStore(tmp_path_factory.mktemp("store"))
    chunks = make_chunks(seed, count, 64 << 10)
    places, packs = pack_all(store, chunks)
    readers = [open_pack(store, pack_from_descriptor(pack.descriptor)) for pack in packs]
    for chunk, (pack, block) in zip(chunks, places, strict=True):
        assert readers[pack].read(block * fmt.BLOCK, len(chunk)) == chunk
    for pack, reader in zip(packs, readers, strict=True):
        assert reader.toc.device_size <= 1 << 20
        assert (reader.toc.device_sizes <= 64 << 10).all()
        starts = set(reader.toc.device_offsets.tolist())
        for row in pack.chunks:  # whole chunks only: none crosses a frame's edge
            first = int(row["block"]) * fmt.BLOCK
            assert len(reader.toc.frames(first, int(row["length"]))) == 1
        assert 0 in starts


@pytest.mark.parametrize("threads", [1, 3, 8])
def test_output_does_not_depend_on_threads(tmp_path, threads):
    chunks = make_chunks(7, 300, 64 << 10)
    one = pack_all(DirectoryStore(tmp_path / "a"), chunks, threads=2)
    other = pack_all(DirectoryStore(tmp_path / "b"), chunks, threads=threads)
    assert one[0] == other[0]
    assert [pack.descriptor for pack in one[1]] == [pack.descriptor for pack in other[1]]


def test_frames_are_cut_between_directories(tmp_path):
    """Two directories of 60 KiB in frames of 64 KiB do not share the first frame."""
    store = DirectoryStore(tmp_path)
    with Packer(store, level=1, threads=1, pack_size=1 << 20, frame_size=64 << 10) as packer:
        for directory in (b"a", b"b"):
            for number in range(15):
                packer.begin_file(directory)
                chunk = b"%s %d" % (directory, number)
                packer.add(chunk, blake3(chunk).digest(), raw=False)
        (pack,) = packer.flush()
    toc = open_pack(store, pack_from_descriptor(pack.descriptor)).toc
    assert list(toc.device_sizes) == [15 * 4096, 15 * 4096]


class FailingStore(DirectoryStore):
    """Refuses to write more than ``limit`` bytes, as a full disk does."""

    limit = 100_000

    def create(self):
        blob = super().create()
        write, left = blob.write, [self.limit]

        def limited(data):
            left[0] -= len(data)
            if left[0] < 0:
                raise StorageError(f"{self.path}: No space left on device")
            write(data)

        blob.write = limited
        return blob


def test_a_full_disk_is_reported_and_leaves_nothing(tmp_path):
    store = FailingStore(tmp_path)
    chunks = [random.Random(number).randbytes(60_000) for number in range(200)]
    before = threading.active_count()
    with pytest.raises(StorageError, match="No space left"):
        pack_all(store, chunks)
    assert threading.active_count() == before
    assert list((tmp_path / "erofsgen" / "tmp").iterdir()) == []
    assert list(store.blobs()) == []


def _fail_in_mid_pack(store):
    with Packer(store, level=3, threads=2, pack_size=1 << 20) as packer:
        packer.add(b"chunk", blake3(b"chunk").digest(), raw=False)
        raise KeyError


def test_an_error_of_the_caller_drops_unfinished_packs(tmp_path):
    store = DirectoryStore(tmp_path)
    with pytest.raises(KeyError):
        _fail_in_mid_pack(store)
    assert list((tmp_path / "erofsgen" / "tmp").iterdir()) == []
    assert list(store.blobs()) == []


def test_compressibility():
    rng = np.random.default_rng(1)
    assert compressible(b"the quick brown fox " * 10_000)
    assert not compressible(rng.bytes(1 << 20))
    assert not compressible(rng.bytes(1 << 16))
    text = b"".join(b"line %d of a file\n" % number for number in range(1 << 14))
    assert compressible(memoryview(text))
