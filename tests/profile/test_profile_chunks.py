"""The chunks of an index, read as arrays, are those that its nodes name one by one."""

from __future__ import annotations

import random
import shutil
import stat
import subprocess
from pathlib import Path

import numpy as np
import pytest
import sampletree
from anytree import CHUNK, DEVICES, trees, with_table
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from erofsgen.erofs.reader import Index
from erofsgen.erofs.writer import write_index
from erofsgen.errors import FormatError
from erofsgen.profile.chunks import BLOCK, Chunks, walk

Row = tuple[int, int, int, bytes, int, int]
"""Device, block, length, path, size of the file, offset in it."""


def expected(index: Index) -> list[Row]:
    """From extents, as the reader gives them; the first file that names a place has it."""
    rows: dict[tuple[int, int], Row] = {}
    seen = set()
    for path, node in walk(index):
        if node.nid in seen or not stat.S_ISREG(node.mode) or node.chunk_size is None:
            continue
        seen.add(node.nid)
        for offset, length, device, start in node.extents():
            for done in range(0, length if device else 0, node.chunk_size):
                place = (device, (start + done) // BLOCK)
                row = (*place, min(node.chunk_size, length - done), path, node.size, offset + done)
                rows.setdefault(place, row)
    return sorted(rows.values())


def found(chunks: Chunks) -> list[Row]:
    return [
        (device, block, length, chunks.paths[file], chunks.sizes[file], offset)
        for device, block, length, file, offset in chunks.table.tolist()
    ]


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(trees(), st.booleans())
def test_any_tree(root, share):
    table = with_table(root)
    fingerprints = (lambda inode: b"%d" % len(inode.chunks)) if share else None
    index = Index(bytes(write_index(root, table, DEVICES, chunk_size=CHUNK, fingerprints=fingerprints)))
    assert {path for path, _ in walk(index)} == {path for path, _ in index.walk()} - {b""}
    chunks = Chunks(index)
    assert found(chunks) == expected(index)
    assert chunks.packs == [device.tag for device in DEVICES]
    assert chunks.slots(["c" * 64, "?", "a" * 64]).tolist() == [3, 0, 1]


ranges = st.tuples(st.integers(0, 4), st.integers(0, 70 * BLOCK), st.integers(0, 20 * BLOCK))


@pytest.fixture(scope="module")
def scattered() -> Chunks:
    disks = sampletree.Disks(60, 60, 4, chunk_size=2 * BLOCK)
    generator = random.Random(5)
    blocks = generator.sample(range(0, 58, 2), 20)
    pieces = {
        b"file-%d" % number: disks.file(generator.randrange(1, 2 * BLOCK), (1 + number % 2, block))
        for number, block in enumerate(blocks)
    }
    root = sampletree.directory({**pieces, b"hole": disks.file(9 * BLOCK, None, (3, 0), None, None, (3, 2))})
    return Chunks(Index(disks.write(root)))


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(ranges, max_size=20))
def test_ranges(scattered, asked):
    numbers, of = scattered.touched_many(*np.array(asked, np.int64).reshape(-1, 3).T)
    for number, (device, offset, length) in enumerate(asked):
        overlapping = [
            row
            for row, chunk in enumerate(scattered.table)
            if chunk["device"] == device
            and int(chunk["block"]) * BLOCK < offset + length
            and int(chunk["block"]) * BLOCK + int(chunk["length"]) > offset
            and length
        ]
        touched = numbers[of == number].tolist()
        # the bytes between a chunk's end and its block's are nobody's
        assert set(overlapping) <= set(touched)
        assert touched == list(scattered.touched(device, offset, length))
        assert all(int(scattered.table[row]["device"]) == device for row in touched)
        assert len(touched) - len(overlapping) <= 1


def test_ranges_beyond_everything(scattered):
    huge = np.array([2**64 - 1, 2**63, 2**44 - 1], np.uint64)
    numbers, of = scattered.touched_many([1, 2, 3], huge, [2**32 - 1] * 3)
    assert len(numbers) == len(of) == 0
    everything, _ = scattered.touched_many([1, 2, 3], [0, 0, 0], [2**32 - 1] * 3)
    assert everything.tolist() == list(range(len(scattered.table)))


def test_no_chunks_at_all():
    index = Index(sampletree.Disks().write(sampletree.directory({b"inlined": sampletree.small(b"bytes")})))
    chunks = Chunks(index)
    assert (len(chunks.table), chunks.paths, chunks.sizes) == (0, [], [])
    assert chunks.touched(1, 0, 5) == range(0)


@pytest.mark.parametrize("device", [False, True])
def test_an_image_of_another_tool(tmp_path: Path, device: bool):
    """mkfs.erofs writes block maps without devices, and chunk indexes with them."""
    if not shutil.which("mkfs.erofs"):
        pytest.skip("no mkfs.erofs")
    source = tmp_path / "tree"
    (source / "sub").mkdir(parents=True)
    for number, data in enumerate(random.Random(2).randbytes(size) for size in (5000, 100_000, 8192, 3)):
        (source / "sub" / f"{number}").write_bytes(data)
    options = ["--chunksize=8192", *([f"--blobdev={tmp_path / 'blob'}"] if device else [])]
    command = ["mkfs.erofs", "--quiet", *options, str(tmp_path / "image"), str(source)]
    made = subprocess.run(command, capture_output=True, check=False)
    assert made.returncode == 0, made.stderr
    index = Index((tmp_path / "image").read_bytes())
    chunks = Chunks(index)
    assert found(chunks) == expected(index)
    assert bool(chunks.paths) == device


@pytest.fixture(scope="module")
def victim() -> bytes:
    disks = sampletree.Disks(40, 40)
    root = sampletree.directory(
        {
            b"run": disks.file(2 * sampletree.CHUNK, (1, 0), (1, 16)),
            b"attributes": disks.file(9, (2, 5), xattrs=((b"user.one", b"1"),), mtime=7),
            b"hole": disks.file(3 * sampletree.CHUNK, None, (2, 16), None),
            b"sub": sampletree.directory({b"%02d" % n + b"-" * 150: disks.file(70, (1, n)) for n in range(26)}),
            b"deep": sampletree.directory({b"er": sampletree.directory({b"still": disks.file(5, (1, 3))})}),
        }
    )
    return disks.write(root)


def test_damaged_indexes(victim):
    """Whatever the bytes are, there is an answer or a FormatError; where the reader has an answer, it is the same."""
    generator = random.Random(11)
    places = [at for at, byte in enumerate(victim) if byte]
    answers = 0
    for _ in range(500):
        image = bytearray(victim)
        for _ in range(generator.choice((1, 1, 2, 6))):
            at = generator.choice(places)
            width = generator.choice((1, 1, 2, 4, 8))
            value = generator.choice(
                (0, 1, (1 << 8 * width) - 1, 1 << 8 * width - 1, generator.randrange(1 << 8 * width))
            )
            image[at : at + width] = value.to_bytes(width, "little")
        try:
            index = Index(bytes(image), verify=False)
            chunks = Chunks(index)
            rows = expected(index)  # which looks at inodes of other types, too
        except FormatError:
            continue
        answers += 1
        assert found(chunks) == rows
    assert 50 < answers < 500


def test_a_directory_in_itself(victim):
    """A loop of directories ends."""
    index = Index(victim)
    deep, inner = index.lookup(b"deep"), index.lookup(b"deep/er")
    ((at, _),) = [entry for entry in deep.entries() if entry[1][0] == b"er"]
    assert inner.nid != deep.nid
    image = bytearray(victim)
    image[at : at + 8] = deep.nid.to_bytes(8, "little")
    with pytest.raises(FormatError, match="two places"):
        Chunks(Index(bytes(image), verify=False))
