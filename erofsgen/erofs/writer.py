"""Writes indexes: EROFS images that hold metadata and leave file data on devices.

:mod:`erofsgen.erofs.layout` plans every offset; the writer only puts bytes there. The same tree, table and devices
give the same bytes, in whatever order dictionaries hold them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from erofsgen.erofs.columns import SECOND
from erofsgen.erofs.format import (
    BLOCK_SIZE,
    CHUNK_BASED,
    CHUNK_INDEX,
    COMPAT_ISHARE_XATTRS,
    COMPAT_MTIME,
    COMPAT_PLAIN_XATTR_PFX,
    COMPAT_SB_CHKSUM,
    COMPAT_XATTR_FILTER,
    DEVICE_SLOT,
    DIRENT,
    DIRENT_DTYPE,
    FLAT_INLINE,
    I_DATALAYOUT_BIT,
    INCOMPAT_CHUNKED_FILE,
    INCOMPAT_DEVICE_TABLE,
    INCOMPAT_XATTR_PREFIXES,
    INODE_COMPACT_DTYPE,
    INODE_EXTENDED_DTYPE,
    ISLOT_SIZE,
    SUPER,
    SUPER_OFFSET,
    Superblock,
    checksum,
)
from erofsgen.erofs.layout import DEVICE_TABLE, Fingerprint, Layout, plan
from erofsgen.erofs.tree import Device, Inode
from erofsgen.erofs.xattr import ibody_icount, long_prefix_table
from erofsgen.errors import FormatError

_VERSION_EXTENDED: Final = 1
_TAG_MAX: Final = 64
_UUID_CONTEXT: Final = "erofsgen 2026-11 index uuid"


def write_index(
    root: Inode,
    chunk_table: npt.NDArray[np.void],
    devices: Sequence[Device],
    *,
    chunk_size: int = 1 << 20,
    fingerprints: Fingerprint | None = None,
) -> bytearray:
    """The index of a tree.

    ``chunk_table`` has the dtype :data:`~erofsgen.erofs.tree.CHUNK_DTYPE`: where each chunk lies. ``devices`` are in
    slot order; ``chunk_size`` in bytes, a power of two. ``fingerprints`` gives regular files' content digests and
    makes Linux 7.0 and later, mounting with ``inode_share``, keep equal files of all images in memory once; it takes
    the incompatible feature XATTR_PREFIXES (Linux 6.4).

    Raises FormatError (a tree that contradicts itself, the table or the devices), UnsupportedError (what EROFS has no
    room for). Messages name the path.
    """
    layout = plan(root, chunk_table, devices, chunk_size=chunk_size, fingerprints=fingerprints)
    image = bytearray(layout.blocks * BLOCK_SIZE)
    _write_devices(image, layout)
    table = long_prefix_table(layout.prefixes)
    image[layout.prefix_start : layout.prefix_start + len(table)] = table
    image[layout.shared_start : layout.shared_start + len(layout.xattrs.area)] = layout.xattrs.area
    _write_inodes(image, layout)
    for number, ibody in layout.ibodies.items():
        end = int(layout.place[number] + layout.head[number])
        image[end - len(ibody) : end] = ibody
    _write_chunk_indexes(image, layout)
    _write_contents(image, layout)
    _write_directories(image, layout)
    _write_superblock(image, layout)
    return image


def _write_superblock(image: bytearray, layout: Layout) -> None:
    epoch, fixed_nsec = divmod(layout.columns.epoch, SECOND)
    compat = COMPAT_SB_CHKSUM | COMPAT_MTIME | COMPAT_XATTR_FILTER
    incompat = 0
    if (layout.format == CHUNK_BASED).any():
        incompat |= INCOMPAT_CHUNKED_FILE
    if layout.devices:
        incompat |= INCOMPAT_DEVICE_TABLE
    if layout.prefixes:
        compat |= COMPAT_PLAIN_XATTR_PFX | COMPAT_ISHARE_XATTRS
        incompat |= INCOMPAT_XATTR_PREFIXES
    superblock = Superblock(
        feature_compat=compat,
        rootnid_2b=int(layout.nid[0]),
        inos=len(layout.tree.inodes),
        epoch=epoch,
        fixed_nsec=fixed_nsec,
        blocks_lo=layout.blocks,
        meta_blkaddr=layout.meta_block,
        xattr_blkaddr=layout.shared_start // BLOCK_SIZE,
        feature_incompat=incompat,
        extra_devices=len(layout.devices),
        devt_slotoff=DEVICE_TABLE // DEVICE_SLOT.size if layout.devices else 0,
        xattr_prefix_count=len(layout.prefixes),
        xattr_prefix_start=layout.prefix_start // 4 if layout.prefixes else 0,
    )
    SUPER.pack_into(image, SUPER_OFFSET, *superblock)
    uuid = bytearray(blake3(image, derive_key_context=_UUID_CONTEXT).digest(length=16))
    uuid[6] = uuid[6] & 0x0F | 0x80  # RFC 9562: version 8, made from the content in a way of our own
    uuid[8] = uuid[8] & 0x3F | 0x80
    superblock = superblock._replace(uuid=bytes(uuid))
    SUPER.pack_into(image, SUPER_OFFSET, *superblock)
    superblock = superblock._replace(checksum=checksum(image[SUPER_OFFSET:BLOCK_SIZE]))
    SUPER.pack_into(image, SUPER_OFFSET, *superblock)


def _write_devices(image: bytearray, layout: Layout) -> None:
    at, address = DEVICE_TABLE, layout.blocks
    for slot, device in enumerate(layout.devices, 1):
        tag = device.tag.encode("utf-8", "surrogateescape")
        if not 0 < len(tag) <= _TAG_MAX or b"\0" in tag:
            raise FormatError(f"device {slot}: its tag {device.tag!r} has not 1 to {_TAG_MAX} bytes")
        DEVICE_SLOT.pack_into(image, at, tag, device.blocks, address, b"")
        at += DEVICE_SLOT.size
        address += device.blocks


def _write_inodes(image: bytearray, layout: Layout) -> None:
    columns = layout.columns
    icount = np.zeros(len(layout.place), np.int64)
    for number, ibody in layout.ibodies.items():
        icount[number] = ibody_icount(len(ibody))
    slots = np.frombuffer(image, np.uint8).reshape(-1, ISLOT_SIZE)
    at = layout.place // ISLOT_SIZE
    for compact, dtype in ((True, INODE_COMPACT_DTYPE), (False, INODE_EXTENDED_DTYPE)):
        numbers = np.flatnonzero(columns.compact == compact)
        records = np.zeros(len(numbers), dtype)
        version = 0 if compact else _VERSION_EXTENDED
        records["i_format"] = version | layout.format[numbers] << I_DATALAYOUT_BIT
        records["i_xattr_icount"] = icount[numbers]
        records["i_mode"] = columns.mode[numbers]
        records["i_size"] = columns.size[numbers]
        records["i_u"] = layout.union[numbers]
        records["i_ino"] = numbers + 1
        records["i_uid"] = columns.uid[numbers]
        records["i_gid"] = columns.gid[numbers]
        records["i_nlink"] = columns.nlink[numbers]
        if not compact:
            records["i_mtime"] = columns.mtime[numbers]
            records["i_mtime_nsec"] = columns.mtime_nsec[numbers]
        parts = dtype.itemsize // ISLOT_SIZE
        halves = records.view(np.uint8).reshape(len(numbers), parts, ISLOT_SIZE)
        for half in range(parts):
            slots[at[numbers] + half] = halves[:, half]


def _write_chunk_indexes(image: bytearray, layout: Layout) -> None:
    files = layout.files
    ends = layout.place[files.numbers] + layout.head[files.numbers]
    starts = (ends + CHUNK_INDEX.size - 1) // CHUNK_INDEX.size
    before = np.cumsum(files.entries) - files.entries
    at = np.arange(len(files.table)) + np.repeat(starts - before, files.entries)
    np.frombuffer(image, np.uint64)[at] = files.table.view(np.uint64)


def _write_contents(image: bytearray, layout: Layout) -> None:
    for number, content in layout.columns.contents.items():
        inlined = len(content) % BLOCK_SIZE if layout.format[number] == FLAT_INLINE else 0
        stored = len(content) - inlined
        if stored:
            at = int(layout.union[number]) * BLOCK_SIZE
            image[at : at + stored] = content[:stored]
        if inlined:
            at = int(layout.place[number] + layout.head[number])
            image[at : at + inlined] = content[stored:]


def _write_directories(image: bytearray, layout: Layout) -> None:
    tree = layout.tree
    names = tree.names
    targets = np.array(tree.targets, np.int64)
    lengths = np.fromiter(map(len, names), np.int64, len(names))
    ends = np.array(tree.ends, np.int64)
    counts = ends[1:] - ends[:-1]
    # where each name begins: all names before it, less those before its block, behind the block's entries
    before = np.cumsum(lengths) - lengths
    entries = np.zeros(len(names), DIRENT_DTYPE)
    entries["nid"] = layout.nid[targets]
    entries["nameoff"] = before + np.repeat(counts * DIRENT.size - before[ends[:-1]], counts)
    entries["file_type"] = layout.columns.file_type[targets]
    encoded = entries.tobytes()
    inlined = (layout.format == FLAT_INLINE).tolist()
    stored = (layout.union * BLOCK_SIZE).tolist()
    tails = (layout.place + layout.head).tolist()
    for number, start, stop in zip(tree.directories, tree.blocks, tree.blocks[1:], strict=False):
        at = stored[number]
        for block in range(start, stop):
            if block == stop - 1 and inlined[number]:
                at = tails[number]
            first, last = tree.ends[block], tree.ends[block + 1]
            middle = at + (last - first) * DIRENT.size
            image[at:middle] = encoded[first * DIRENT.size : last * DIRENT.size]
            image[middle : at + tree.used[block]] = b"".join(names[first:last])
            at += BLOCK_SIZE
