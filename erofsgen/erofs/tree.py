"""The file tree an index is written from: inodes, names, and where each file's chunks lie.

A tree is a root :class:`Inode` whose ``children`` map names to inodes. A hard link is the same ``Inode`` object
under several names. File bytes are not in the tree: a regular file names its chunks by *chunk number*, an index
into one :data:`CHUNK_DTYPE` table for the whole image, and the table says which device holds each chunk where.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator

import msgspec
import numpy as np

BLOCK = 4096
"""Bytes per EROFS block, the alignment of every chunk in a pack."""

HOLE = 0
"""The chunk number of a hole. Row 0 of every chunk table is reserved for it."""

CHUNK_DTYPE = np.dtype([("device", "<u2"), ("block", "<u4")])
"""Where a chunk lies: ``device`` 1..N is the device slot, ``block`` the 4 KiB block in that device's address space."""


class Inode(msgspec.Struct, array_like=True, gc=False):
    """One file of any type. Field order is the layer record's wire format.

    ``mode``     st_mode: file type and permission bits
    ``uid, gid`` owners, 32 bits
    ``mtime``    nanoseconds since 1970, may be negative
    ``size``     bytes; regular files only (a symlink's size is its target's length)
    ``rdev``     Linux ``dev_t`` as ``os.makedev`` gives it; character and block devices only
    ``data``     a symlink's target, or the whole content of a regular file small enough to be inlined
    ``xattrs``   (full name, value) pairs, sorted by name, e.g. ``(b"security.capability", b"...")``
    ``chunks``   regular file: one chunk number per chunk-size piece of the file, ``HOLE`` for an all-zero piece;
                 empty when ``data`` holds the content or ``size`` is 0
    ``children`` directory: name to inode, else None. Never stored in a layer record
    """

    mode: int
    uid: int = 0
    gid: int = 0
    mtime: int = 0
    size: int = 0
    rdev: int = 0
    data: bytes = b""
    xattrs: tuple[tuple[bytes, bytes], ...] = ()
    chunks: tuple[int, ...] = ()
    children: dict[bytes, Inode] | None = None

    @property
    def is_dir(self) -> bool:
        return stat.S_ISDIR(self.mode)


class Device(msgspec.Struct, frozen=True):
    """One device slot: ``tag`` is the pack's sha256 in hex (64 characters), ``blocks`` its size in 4 KiB blocks."""

    tag: str
    blocks: int


def walk(root: Inode) -> Iterator[tuple[bytes, Inode]]:
    """Every (path, inode) of a tree, parents first, names in byte order; the root's path is ``b""``.

    A hard-linked inode comes once for each of its names.
    """
    stack: list[tuple[bytes, Inode]] = [(b"", root)]
    while stack:
        path, inode = stack.pop()
        yield path, inode
        if inode.children:
            prefix = path + b"/" if path else b""
            stack.extend((prefix + name, inode.children[name]) for name in sorted(inode.children, reverse=True))
