"""Any tree, written and read, is the same tree; any sequence of records finds room."""

from __future__ import annotations

import itertools
import stat

import numpy as np
import sampletree
from anytree import CHUNK, DEVICES, trees, with_table
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from erofsgen.erofs.check import check_index
from erofsgen.erofs.format import BLOCK_SIZE, ISLOT_SIZE
from erofsgen.erofs.reader import Index
from erofsgen.erofs.space import Space
from erofsgen.erofs.tree import Inode, walk
from erofsgen.erofs.writer import write_index


def mapping(inode: Inode, table: np.ndarray) -> list[tuple[int, int, int] | None]:
    """Where each block of a file lies, from the table: (block of the file, device, block of the device)."""
    blocks = []
    for number, chunk in enumerate(inode.chunks):
        length = min(CHUNK, inode.size - number * CHUNK)
        for block in range(-(-length // BLOCK_SIZE)):
            place = None if chunk == 0 else (int(table[chunk]["device"]), int(table[chunk]["block"]) + block)
            blocks.append(place)
    return blocks


def read_mapping(node) -> list[tuple[int, int] | None]:
    blocks = []
    position = 0
    for offset, length, device, start in node.extents():
        assert offset == position
        position += length
        assert start % BLOCK_SIZE == 0
        first = start // BLOCK_SIZE
        blocks += [None if device is None else (device, first + n) for n in range(-(-length // BLOCK_SIZE))]
    return blocks


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(trees(), st.booleans())
def test_what_is_written_is_read(root, share):
    table = with_table(root)
    fingerprints = (lambda inode: inode.data[:30] + b"%d" % len(inode.chunks)) if share else None
    image = bytes(write_index(root, table, DEVICES, chunk_size=CHUNK, fingerprints=fingerprints))
    assert check_index(image) == []
    index = Index(image)
    nodes, expected = list(index.walk()), list(walk(root))
    assert [path for path, _ in nodes] == [path for path, _ in expected]
    links = sampletree.nlinks(root)
    numbers = {}
    for (path, node), (_, inode) in zip(nodes, expected, strict=True):
        assert (node.mode, node.uid, node.gid, node.mtime) == (inode.mode, inode.uid, inode.gid, inode.mtime)
        assert node.nlink == links[id(inode)]
        assert node.rdev == inode.rdev
        assert node.xattrs() == list(inode.xattrs)
        assert numbers.setdefault(id(inode), node.nid) == node.nid
        assert index.lookup(path).nid == node.nid
        if stat.S_ISREG(inode.mode):
            assert node.size == inode.size
            assert (node.inline() or b"") == inode.data
            assert read_mapping(node) == mapping(inode, table)
        elif stat.S_ISLNK(inode.mode):
            assert node.readlink() == inode.data
        elif inode.is_dir:
            assert [name for name, _, _ in node.listdir()] == sorted(inode.children)
            assert node.child(b"\xff" * 100) is None
            assert node.child(b"\1") is None or b"\1" in inode.children


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 20_000).map(lambda slots: slots * ISLOT_SIZE),
    st.lists(st.one_of(st.integers(32, 200), st.integers(32, 20_000), st.integers(-5, -1)), max_size=300),
)
def test_records_never_overlap(start, sizes):
    space = Space(start)
    taken = []
    for size in sizes:
        if size < 0:
            first = space.take_blocks(-size) * BLOCK_SIZE
            taken.append((first, first - size * BLOCK_SIZE))
            continue
        at = space.take(size)
        assert at % ISLOT_SIZE == 0
        if size <= BLOCK_SIZE:
            assert at // BLOCK_SIZE == (at + size - 1) // BLOCK_SIZE
        taken.append((at, at + size))
    taken.sort()
    for (_, end), (begin, _) in itertools.pairwise(taken):
        assert end <= begin
    if taken:
        assert taken[0][0] >= start
        assert taken[-1][1] <= space.blocks * BLOCK_SIZE
