"""An index without devices: the same files, for an image that lies in one piece.

A flat image is the rewritten index and behind it every device's bytes, each where the *unified address space* of the
index has it. So a block address without a device is right as it is; chunk indexes, which name a device and a block in
it, are changed to name the unified address; and there is no device table. Every kernel that reads chunk-based files
does (5.15). In one piece, but with its device table, an index takes Linux 6.4.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from erofsgen.erofs import format as fmt
from erofsgen.errors import FormatError, UnsupportedError

_SUPPORTED: Final = fmt.INCOMPAT_CHUNKED_FILE | fmt.INCOMPAT_DEVICE_TABLE | fmt.INCOMPAT_XATTR_PREFIXES


@dataclass(frozen=True)
class Flat:
    """``index``: the rewritten index, in whole blocks. ``starts``: the block at which each device begins, in slot
    order. ``blocks``: size of the flat image."""

    index: bytes
    starts: tuple[int, ...]
    blocks: int


def flatten(index: bytes) -> Flat:
    """Rewrite an index for a flat image.

    Raises FormatError (not an index), UnsupportedError (an EROFS image that erofsgen does not write, or more than 2^32
    blocks in one piece).
    """
    try:
        return _flatten(index)
    except (struct.error, IndexError, OverflowError, ValueError) as error:
        raise FormatError(f"index: damaged: {error}") from None


def _flatten(index: bytes) -> Flat:
    data = bytearray(index) + bytes(-len(index) % fmt.BLOCK_SIZE)
    superblock = fmt.Superblock(*fmt.SUPER.unpack_from(data, fmt.SUPER_OFFSET))
    if superblock.magic != fmt.SUPER_MAGIC:
        raise FormatError("index: no EROFS superblock")
    if superblock.blkszbits != fmt.BLOCK_BITS or superblock.feature_incompat & ~_SUPPORTED:
        raise UnsupportedError(f"index: features {superblock.feature_incompat:#x} cannot be laid flat")
    starts, blocks = _devices(data, superblock)
    table = np.frombuffer(data, fmt.CHUNK_INDEX_DTYPE)
    places = _chunk_indexes(data, superblock)
    places = places[table["startblk_lo"][places] != fmt.NULL_ADDR]
    devices = table["device_id"][places]
    if devices.size and devices.max() > len(starts):
        raise FormatError(f"index: a chunk is on device {devices.max()} of {len(starts)}")
    # device 0 is the index, whose blocks stay where they are
    table["startblk_lo"][places] += np.array([0, *starts], np.uint32)[devices]
    table["device_id"][places] = 0
    _write_superblock(
        data,
        superblock._replace(
            feature_incompat=superblock.feature_incompat & ~fmt.INCOMPAT_DEVICE_TABLE,
            extra_devices=0,
            devt_slotoff=0,
            blocks_lo=blocks,
        ),
    )
    return Flat(bytes(data), starts, blocks)


def _devices(data: bytearray, superblock: fmt.Superblock) -> tuple[tuple[int, ...], int]:
    """Where each device begins in the unified address space, and where that ends, in blocks."""
    end = len(data) // fmt.BLOCK_SIZE
    starts: list[int] = []
    if superblock.feature_incompat & fmt.INCOMPAT_DEVICE_TABLE:
        offset = superblock.devt_slotoff * fmt.DEVICE_SLOT.size
        for slot in np.frombuffer(data, fmt.DEVICE_SLOT_DTYPE, superblock.extra_devices, offset):
            start = int(slot["uniaddr_lo"])
            if start < end:
                raise FormatError(f"index: device {len(starts) + 1} overlaps what is before it in unified addresses")
            starts.append(start)
            end = start + int(slot["blocks_lo"])
    if end >= fmt.NULL_ADDR:
        raise UnsupportedError(f"index: {end} blocks do not fit one piece")
    return tuple(starts), end


def _write_superblock(data: bytearray, superblock: fmt.Superblock) -> None:
    fmt.SUPER.pack_into(data, fmt.SUPER_OFFSET, *superblock._replace(checksum=0))
    if superblock.feature_compat & fmt.COMPAT_SB_CHKSUM:
        checksum = fmt.checksum(data[fmt.SUPER_OFFSET : fmt.BLOCK_SIZE])
        fmt.SUPER.pack_into(data, fmt.SUPER_OFFSET, *superblock._replace(checksum=checksum))


def _chunk_indexes(data: bytearray, superblock: fmt.Superblock) -> npt.NDArray[np.int64]:
    """Where all chunk indexes of all files are, counted in chunk indexes from the start."""
    base = superblock.meta_blkaddr * (fmt.BLOCK_SIZE // fmt.ISLOT_SIZE)
    slots = _regular_files(data, superblock) + base
    if slots.size and slots.min() < 0:
        raise FormatError("index: an inode far outside it")
    inodes = np.frombuffer(data, fmt.INODE_COMPACT_DTYPE)[slots]
    chunked = inodes["i_format"] >> fmt.I_DATALAYOUT_BIT & fmt.I_DATALAYOUT_MASK == fmt.CHUNK_BASED
    slots, inodes = slots[chunked], inodes[chunked]
    chunk_format = inodes["i_u"].astype(np.int64) & 0xFFFF
    if (chunk_format & ~fmt.CHUNK_FORMAT_BLKBITS_MASK != fmt.CHUNK_FORMAT_INDEXES).any():
        raise UnsupportedError("index: a file has no chunk indexes of 8 bytes")
    extended = inodes["i_format"] & fmt.I_VERSION_MASK != 0
    # the high half of an extended inode's size is where a compact one has its mtime
    sizes = inodes["i_size"] | np.where(extended, inodes["i_mtime"].astype(np.int64) << 32, 0)
    bits = fmt.BLOCK_BITS + (chunk_format & fmt.CHUNK_FORMAT_BLKBITS_MASK)
    counts = (sizes + (np.int64(1) << bits) - 1) >> bits
    ends = np.cumsum(counts)
    if not len(ends):
        return np.zeros(0, np.int64)
    unit = fmt.CHUNK_INDEX.size
    if counts.min() < 0 or counts.max() > len(data) // unit or ends[-1] > len(data) // unit:
        raise FormatError("index: more chunk indexes than it has room for")
    head = np.where(extended, fmt.INODE_EXTENDED.size, fmt.INODE_COMPACT.size)
    starts = slots * fmt.ISLOT_SIZE + head + _xattr_size(inodes["i_xattr_icount"].astype(np.int64))
    return np.repeat((starts + unit - 1) // unit - (ends - counts), counts) + np.arange(ends[-1])


def _regular_files(data: bytearray, superblock: fmt.Superblock) -> npt.NDArray[np.int64]:
    """The nids of all regular files."""
    files: list[npt.NDArray[np.uint64]] = []
    root = superblock.rootnid_2b
    seen, pending = {root}, [root]
    while pending:
        content = _directory(data, superblock.meta_blkaddr * fmt.BLOCK_SIZE + pending.pop() * fmt.ISLOT_SIZE)
        for start in range(0, len(content), fmt.BLOCK_SIZE):
            block = content[start : start + fmt.BLOCK_SIZE]
            (names,) = struct.unpack_from("<H", block, 8)  # where names begin, entries end
            entries = np.frombuffer(block, fmt.DIRENT_DTYPE, names // fmt.DIRENT.size)
            files.append(entries["nid"][entries["file_type"] == _REGULAR])
            new = set(entries["nid"][entries["file_type"] == _DIRECTORY].tolist()) - seen
            seen |= new
            pending.extend(new)
    return np.unique(np.concatenate(files)).astype(np.int64) if files else np.zeros(0, np.int64)


_REGULAR, _DIRECTORY = 1, 2  # of fmt.FILE_TYPES


def _directory(data: bytearray, at: int) -> bytes:
    """The content of the directory whose inode is at byte ``at``."""
    inode = np.frombuffer(data, fmt.INODE_COMPACT_DTYPE, 1, at)[0]
    layout = int(inode["i_format"]) >> fmt.I_DATALAYOUT_BIT & fmt.I_DATALAYOUT_MASK
    size, start = int(inode["i_size"]), int(inode["i_u"]) * fmt.BLOCK_SIZE
    if layout not in (fmt.FLAT_PLAIN, fmt.FLAT_INLINE):
        raise FormatError(f"index: a directory of data layout {layout}")
    tail_size = size % fmt.BLOCK_SIZE if layout == fmt.FLAT_INLINE else 0
    content = bytes(data[start : start + size - tail_size]) if size > tail_size else b""
    extended = int(inode["i_format"]) & fmt.I_VERSION_MASK
    tail = at + (fmt.INODE_EXTENDED if extended else fmt.INODE_COMPACT).size
    tail += int(_xattr_size(np.array(inode["i_xattr_icount"], np.int64)))
    content += bytes(data[tail : tail + tail_size])
    if len(content) != size:
        raise FormatError("index: a directory ends outside it")
    return content


def _xattr_size(icount: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Bytes of extended attributes behind an inode, by its i_xattr_icount."""
    return np.where(icount > 0, fmt.XATTR_IBODY_HEADER.size + 4 * (icount - 1), 0)
