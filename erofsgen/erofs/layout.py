"""The plan of an image: where every structure lies, before a byte is written.

::

    0      1024        1152                                    meta_block (the block in which inodes begin)
    ┌──────┬───────────┬──────────────┬───────────────┬────────┬────────────────────────────────────────────┐
    │ zero │ superblock│ device slots │ long prefixes │ shared │ inodes, each with its xattrs and its inline │
    │      │           │   128 B each │               │ xattrs │ data or chunk indexes; blocks of directories│
    └──────┴───────────┴──────────────┴───────────────┴────────┴────────────────────────────────────────────┘

The root comes first, so its nid has 16 bits however many devices there are. An inode's data is inlined where inode,
attributes and tail fit one block. The devices follow in the unified address space, in slot order.
"""

from __future__ import annotations

import stat
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from erofsgen.erofs.chunks import FileMap
from erofsgen.erofs.columns import Columns, Integers
from erofsgen.erofs.format import (
    BLOCK_SIZE,
    CHUNK_BASED,
    CHUNK_INDEX,
    DEVICE_SLOT,
    FLAT_INLINE,
    FLAT_PLAIN,
    INODE_COMPACT,
    INODE_EXTENDED,
    ISLOT_SIZE,
    NULL_ADDR,
    SUPER,
    SUPER_OFFSET,
    align,
)
from erofsgen.erofs.space import Space
from erofsgen.erofs.tree import Device, Inode
from erofsgen.erofs.treetable import TreeTable
from erofsgen.erofs.xattr import FINGERPRINT, FINGERPRINT_PREFIX, LongPrefix, XattrPlan, Xattrs, long_prefix_table
from erofsgen.errors import ErofsgenError, UnsupportedError

Fingerprint = Callable[[Inode], bytes]
"""A digest of a regular file's content: equal for equal content, in every image."""

DEVICE_TABLE: Final = align(SUPER_OFFSET + SUPER.size, DEVICE_SLOT.size)
"""Offset of the device slots."""


@dataclass
class Layout:
    """Everything the writer needs. Offsets in bytes; arrays and dictionaries are by inode number."""

    tree: TreeTable
    columns: Columns
    files: FileMap
    devices: Sequence[Device]
    prefixes: Sequence[LongPrefix]
    prefix_start: int
    xattrs: XattrPlan
    shared_start: int
    meta_block: int
    blocks: int
    """Blocks of the image, devices not counted; the first device's first block in the unified address space."""
    ibodies: dict[int, bytes]
    """Encoded attributes of the inodes that have any."""
    place: Integers
    """Where the inode begins."""
    head: Integers
    """Bytes of inode and attributes together."""
    format: Integers
    """The data layout."""
    union: Integers
    """i_u."""

    @property
    def nid(self) -> Integers:
        return (self.place - self.meta_block * BLOCK_SIZE) // ISLOT_SIZE

    def table_start(self, number: int) -> int:
        """Where an inode's chunk indexes begin."""
        return align(int(self.place[number] + self.head[number]), CHUNK_INDEX.size)


def plan(
    root: Inode,
    chunk_table: npt.NDArray[np.void],
    devices: Sequence[Device],
    *,
    chunk_size: int,
    fingerprints: Fingerprint | None,
) -> Layout:
    """Lay an image out. Parameters and errors are those of :func:`erofsgen.erofs.writer.write_index`."""
    tree = TreeTable(root)
    columns = Columns(tree)
    files = FileMap(tree, columns.mapped, chunk_table, [device.blocks for device in devices], chunk_size)

    prefixes = [] if fingerprints is None else [FINGERPRINT_PREFIX]
    prefix_start = DEVICE_TABLE + len(devices) * DEVICE_SLOT.size
    shared_start = prefix_start + len(long_prefix_table(prefixes))
    sets = _xattr_sets(tree, columns, fingerprints)
    try:
        xattrs = XattrPlan(Counter(sets.values()), area_start=shared_start % BLOCK_SIZE, prefixes=prefixes)
    except ErofsgenError as error:
        raise _blame(tree, sets, prefixes) from error
    ibodies = {number: xattrs.ibody(pairs) for number, pairs in sets.items()}

    space = Space(align(shared_start + len(xattrs.area), ISLOT_SIZE))
    layout = Layout(
        tree=tree,
        columns=columns,
        files=files,
        devices=devices,
        prefixes=prefixes,
        prefix_start=prefix_start,
        xattrs=xattrs,
        shared_start=shared_start,
        meta_block=align(shared_start + len(xattrs.area), ISLOT_SIZE) // BLOCK_SIZE,
        blocks=0,
        ibodies=ibodies,
        place=np.zeros(0, np.int64),
        head=np.where(columns.compact, INODE_COMPACT.size, INODE_EXTENDED.size),
        format=np.full(len(tree.inodes), FLAT_PLAIN),
        union=np.full(len(tree.inodes), NULL_ADDR),
    )
    for number, ibody in ibodies.items():
        layout.head[number] += len(ibody)
    _place(layout, space)
    layout.blocks = space.blocks
    if space.blocks + int(files.device_start[-1]) > NULL_ADDR:
        raise UnsupportedError(
            f"an index of {space.blocks} blocks with {int(files.device_start[-1])} blocks of devices",
            hint="EROFS addresses 2^32 blocks, 16 TiB; split the image",
        )
    layout.union[files.numbers] = files.format
    assert int(layout.nid[0]) <= 0xFFFF
    return layout


def _xattr_sets(tree: TreeTable, columns: Columns, fingerprints: Fingerprint | None) -> dict[int, Xattrs]:
    if fingerprints is None:
        return {number: inode.xattrs for number, inode in enumerate(tree.inodes) if inode.xattrs}
    regular = (columns.mode & ~0o7777) == stat.S_IFREG
    content = (regular & (columns.size > 0)).tolist()
    sets: dict[int, Xattrs] = {}
    for number, inode in enumerate(tree.inodes):
        # an image must not choose its own: the page cache is shared with other images'
        xattrs = tuple(pair for pair in inode.xattrs if pair[0] != FINGERPRINT)
        if content[number]:
            xattrs += ((FINGERPRINT, fingerprints(inode)),)
        if xattrs:
            sets[number] = xattrs
    return sets


def _blame(tree: TreeTable, sets: dict[int, Xattrs], prefixes: Sequence[LongPrefix]) -> ErofsgenError:
    """The error again, with the path of an inode that causes it."""
    for number, xattrs in sets.items():
        try:
            XattrPlan(Counter([xattrs]), area_start=0, prefixes=prefixes)
        except ErofsgenError as error:
            return type(error)(f"{tree.path(tree.inodes[number])}: {error}", hint=error.hint)
    raise AssertionError("no inode is to blame")


def _place(layout: Layout, space: Space) -> None:
    """Find a place for every inode with what belongs to it, and for blocks of directories and content."""
    take = space.take
    contents = layout.columns.contents
    sizes = {number: len(content) for number, content in contents.items()}
    sizes |= zip(layout.tree.directories, layout.tree.directory_sizes(), strict=True)
    tables = dict(zip(layout.files.numbers.tolist(), layout.files.entries.tolist(), strict=True))
    place = []
    for number, head in enumerate(layout.head.tolist()):
        size = sizes.get(number)
        if size is not None:
            blocks, tail = divmod(size, BLOCK_SIZE)
            if tail and head + tail <= BLOCK_SIZE:
                layout.format[number] = FLAT_INLINE
                place.append(take(head + tail))
            else:
                blocks += tail > 0
                place.append(take(head))
            if blocks:
                layout.union[number] = space.take_blocks(blocks)
        elif entries := tables.get(number):
            layout.format[number] = CHUNK_BASED
            place.append(take(align(head, CHUNK_INDEX.size) + entries * CHUNK_INDEX.size))
        else:
            place.append(take(head))
    layout.place = np.array(place, np.int64)
    for number, rdev in layout.columns.rdev.items():
        layout.union[number] = rdev
    special = np.isin(layout.columns.mode & ~0o7777, (stat.S_IFIFO, stat.S_IFSOCK))
    layout.union[special] = 0
