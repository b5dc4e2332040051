"""Strategies for trees of all kinds, whose files lie on :data:`DEVICES`."""

from __future__ import annotations

import os
import stat

import numpy as np
import sampletree
from hypothesis import strategies as st

from erofsgen.erofs.tree import CHUNK_DTYPE, Device, Inode, walk

CHUNK = 8192
DEVICES = [Device("a" * 64, 40), Device("b" * 64, 7), Device("c" * 64, 100)]

names = st.binary(min_size=1, max_size=255).filter(
    lambda name: name not in (b".", b"..") and b"/" not in name and b"\0" not in name
)
ids = st.one_of(st.integers(0, 70_000), st.integers(0, 0xFFFFFFFF))
mtimes = st.one_of(st.sampled_from([0, 10**18, 10**18 + 1]), st.integers(-(10**9 << 63), (10**9 << 63) - 1))
xattr_names = st.one_of(
    st.sampled_from([b"security.capability", b"system.posix_acl_access", b"system.posix_acl_default", b"user.shared"]),
    st.builds(
        bytes.__add__,
        st.sampled_from([b"user.", b"trusted.", b"security."]),
        st.binary(min_size=1, max_size=200).filter(lambda name: b"\0" not in name),
    ),
)
values = st.one_of(st.sampled_from([b"", b"the same value for many"]), st.binary(max_size=100), st.just(b"v" * 2500))
xattrs = st.dictionaries(xattr_names, values, max_size=4).map(lambda pairs: tuple(sorted(pairs.items())))
common = {"uid": ids, "gid": ids, "mtime": mtimes, "xattrs": xattrs}
permissions = st.integers(0, 0o7777)


def with_kind(kind: int) -> st.SearchStrategy[int]:
    return permissions.map(lambda mode: kind | mode)


@st.composite
def mapped_files(draw):
    """A file on devices: a run, or anything else. Chunk numbers are places until the table is made."""
    pieces = draw(st.integers(1, 6))
    last = draw(st.integers(1, CHUNK))
    if draw(st.booleans()):
        start = draw(st.integers(0, DEVICES[2].blocks - 2 * pieces))
        places = [(3, start + 2 * number) for number in range(pieces)]
    else:
        place = st.one_of(
            st.none(),
            st.integers(1, 3).flatmap(
                lambda device: st.integers(0, DEVICES[device - 1].blocks - 2).map(lambda block: (device, block))
            ),
        )
        places = draw(st.lists(place, min_size=pieces, max_size=pieces))
    fields = {name: draw(strategy) for name, strategy in common.items()}
    return Inode(draw(with_kind(stat.S_IFREG)), size=(pieces - 1) * CHUNK + last, chunks=tuple(places), **fields)


files = st.one_of(
    mapped_files(),
    st.binary(max_size=300).flatmap(
        lambda data: st.builds(Inode, with_kind(stat.S_IFREG), size=st.just(len(data)), data=st.just(data), **common)
    ),
    st.sampled_from([4095, 4096, 4097, 4000, 9000]).flatmap(
        lambda size: st.builds(Inode, with_kind(stat.S_IFREG), size=st.just(size), data=st.just(b"z" * size), **common)
    ),
    st.builds(
        Inode,
        with_kind(stat.S_IFLNK),
        data=st.one_of(st.binary(min_size=1, max_size=60), st.just(b"x" * 4095)).filter(lambda data: b"\0" not in data),
        **common,
    ),
    st.builds(
        Inode,
        st.sampled_from([stat.S_IFCHR, stat.S_IFBLK]),
        rdev=st.builds(os.makedev, st.integers(0, 4095), st.integers(0, (1 << 20) - 1)),
        **common,
    ),
    st.builds(Inode, st.sampled_from([stat.S_IFIFO | 0o644, stat.S_IFSOCK]), **common),
)


def directories(children):
    return st.builds(
        Inode,
        with_kind(stat.S_IFDIR),
        children=st.one_of(
            st.dictionaries(names, children, max_size=8),
            # many blocks of entries
            st.integers(40, 120).map(
                lambda count: {b"%03d" % n + b"w" * 200: sampletree.small(b"") for n in range(count)}
            ),
        ),
        **common,
    )


@st.composite
def trees(draw):
    root = draw(directories(st.recursive(files, directories, max_leaves=12)))
    # hard links: some files get one more name
    pairs = [(path, inode) for path, inode in walk(root)]
    holders = [inode for _, inode in pairs if inode.is_dir]
    targets = [inode for _, inode in pairs if not inode.is_dir]
    for number in range(draw(st.integers(0, 3)) if targets else 0):
        draw(st.sampled_from(holders)).children.setdefault(b"link%d" % number, draw(st.sampled_from(targets)))
    return root


def with_table(root: Inode) -> np.ndarray:
    """Number the chunks of all files and return the table."""
    table = [(0, 0)]
    done = set()
    for _, inode in walk(root):
        if inode.chunks and id(inode) not in done:
            done.add(id(inode))
            numbers = []
            for place in inode.chunks:
                if place is not None:
                    table.append(place)
                numbers.append(0 if place is None else len(table) - 1)
            inode.chunks = tuple(numbers)
    return np.array(table, CHUNK_DTYPE)
