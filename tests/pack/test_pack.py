"""Packs: what is written is what is read, stock zstd agrees, and damage is noticed and named."""

from __future__ import annotations

import io
import subprocess

import numpy as np
import pytest
import zstandard
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from erofsgen.errors import FormatError, IntegrityError
from erofsgen.pack import format as fmt
from erofsgen.pack.location import TocLocation
from erofsgen.pack.reader import PackReader
from erofsgen.pack.toc import Toc, locate, read_dictionary
from erofsgen.pack.writer import PackWriter

FRAMES = st.lists(st.tuples(st.integers(1, 5), st.binary(min_size=1, max_size=64)), max_size=8)


def write_pack(frames: list[bytes], *, raw: bool) -> tuple[bytes, TocLocation]:
    """A pack of these frames, each one chunk."""
    out = io.BytesIO()
    writer = PackWriter(out, raw=raw)
    chunks = []
    for frame in frames:
        digest = blake3(frame).digest()
        chunks.append((digest, writer.device_size // fmt.BLOCK, len(frame)))
        writer.add_frame(frame if raw else zstandard.compress(frame, 3), len(frame), digest)
    location = writer.finish(chunks)
    return out.getvalue(), location


def reader_of(pack: bytes, location: TocLocation) -> PackReader:
    toc = Toc(pack[location.offset :][: location.size], location, what="p")
    return PackReader(lambda offset, length: pack[offset : offset + length], toc, what="p")


def frames_of(recipe: list[tuple[int, bytes]]) -> list[bytes]:
    return [(pattern * (blocks * fmt.BLOCK))[: blocks * fmt.BLOCK] for blocks, pattern in recipe]


@settings(max_examples=60, deadline=None)
@given(FRAMES, st.booleans(), st.data())
def test_any_range_reads_back(recipe, raw, data):
    frames = frames_of(recipe)
    device = b"".join(frames)
    pack, location = write_pack(frames, raw=raw)
    reader = reader_of(pack, location)
    assert reader.toc.device_size == len(device)
    start = data.draw(st.integers(0, len(device)))
    end = data.draw(st.integers(start, len(device)))
    assert reader.read(start, end - start) == device[start:end]


@settings(max_examples=30, deadline=None)
@given(FRAMES, st.booleans())
def test_tables_are_found_without_a_manifest(recipe, raw):
    frames = frames_of(recipe)
    pack, location = write_pack(frames, raw=raw)

    def read(offset, length):
        return pack[offset : offset + length]

    assert locate(read, len(pack), what="p") == location
    toc = reader_of(pack, location).toc
    chunks = read_dictionary(read, toc, what="p")
    assert [row["digest"].tobytes() for row in chunks] == [blake3(frame).digest() for frame in frames]
    assert list(chunks["length"]) == [len(frame) for frame in frames]


def test_stock_zstd_gives_the_device(tmp_path):
    frames = frames_of([(1, b"a"), (256, b"bc"), (3, b"xyz")])
    pack, _ = write_pack(frames, raw=False)
    (tmp_path / "pack.zst").write_bytes(pack)
    unpacked = subprocess.run(["zstd", "-dc", tmp_path / "pack.zst"], capture_output=True, check=True).stdout
    assert unpacked == b"".join(frames)


def test_seek_table_follows_the_public_format():
    """Field by field, from the specification and not from our reader."""
    frames = frames_of([(2, b"a"), (1, b"b")])
    pack, _ = write_pack(frames, raw=False)
    assert pack[-4:] == bytes.fromhex("b1ea928f")
    count, descriptor = int.from_bytes(pack[-9:-5], "little"), pack[-5]
    assert (count, descriptor) == (4, 0)
    start = len(pack) - 9 - 8 * count
    assert pack[start - 8 : start] == bytes.fromhex("5e2a4d18") + (8 * count + 9).to_bytes(4, "little")
    entries = np.frombuffer(pack[start:-9], "<u4").reshape(-1, 2)
    assert list(entries[:, 1]) == [8192, 4096, 0, 0]
    assert entries[:, 0].sum() == start - 8
    position = 0
    for size, device_size in entries[:2]:
        assert len(zstandard.decompress(pack[position : position + size])) == device_size
        position += int(size)


@pytest.mark.parametrize("raw", [False, True])
def test_every_flipped_byte_is_noticed(raw):
    frames = frames_of([(1, b"some text, "), (2, b"more of it, "), (1, b"z")])
    pack, location = write_pack(frames, raw=raw)
    device = b"".join(frames)
    dictionary = reader_of(pack, location).toc.dictionary
    step = 7 if raw else 1
    for position in range(0, len(pack), step):
        damaged = bytearray(pack)
        damaged[position] ^= 0x55
        if dictionary[0] <= position < sum(dictionary):
            continue  # the chunk dictionary is a builder's hint; readers never look at it
        with pytest.raises((FormatError, IntegrityError)):
            reader_of(bytes(damaged), location).read(0, len(device))


@pytest.mark.parametrize("cut", [0, 1, 8, 9, 100, 4096])
def test_a_truncated_pack_is_refused(cut):
    pack, _ = write_pack(frames_of([(1, b"a"), (1, b"b")]), raw=True)
    short = pack[:cut]
    with pytest.raises(FormatError):
        locate(lambda offset, length: short[offset : offset + length], len(short), what="p")


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_hostile_tables_raise_only_format_errors(data):
    """Tables whose digest is right but whose content is not: what a manifest by an attacker could name."""
    pack, location = write_pack(frames_of([(1, b"a"), (2, b"b")]), raw=data.draw(st.booleans()))
    tail = bytearray(pack[location.offset :])
    for _ in range(data.draw(st.integers(1, 4))):
        tail[data.draw(st.integers(0, len(tail) - 1))] = data.draw(st.integers(0, 255))
    hostile = bytes(tail)
    named = TocLocation(location.offset, len(hostile), blake3(hostile).hexdigest())
    try:
        toc = Toc(hostile, named, what="p")
        PackReader(lambda offset, length: pack[offset : offset + length], toc, what="p").read(0, toc.device_size)
    except FormatError:
        pass


def test_reads_outside_the_device_are_refused():
    pack, location = write_pack(frames_of([(1, b"a")]), raw=True)
    reader = reader_of(pack, location)
    for offset, length in [(-1, 1), (0, 4097), (4096, 1), (1 << 62, 1)]:
        with pytest.raises(FormatError):
            reader.read(offset, length)


def test_a_decompression_bomb_is_refused_before_it_expands():
    bomb = zstandard.compress(bytes(1 << 27), 1)
    out = io.BytesIO()
    writer = PackWriter(out, raw=False)
    writer.add_frame(bomb, fmt.BLOCK, blake3(bytes(fmt.BLOCK)).digest())
    location = writer.finish([])
    with pytest.raises(FormatError, match="holds 134217728 bytes, 4096 expected"):
        reader_of(out.getvalue(), location).read(0, 4096)
