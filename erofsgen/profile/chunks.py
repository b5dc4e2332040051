"""The chunks of an image as its index names them: whose they are, and which of them a range of a device touches.

The order is that of the devices, so that a range is found by bisection. A chunk that several files share is the first
file's that the index names. Directories are walked one entry at a time, inodes and chunk tables are read as arrays:
an index of 60,000 files takes a fraction of a second.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from erofsgen.erofs import format as fmt
from erofsgen.erofs.node import Node
from erofsgen.erofs.reader import Index
from erofsgen.erofs.xattr import ibody_size
from erofsgen.errors import FormatError

BLOCK: Final = 4096

CHUNK: Final = np.dtype([
    ("device", "<u2"), ("block", "<u4"), ("length", "<u4"), ("file", "<u4"), ("offset", "<u8"),
])  # fmt: skip
"""A chunk: device slot (1..N), 4 KiB block there, length in bytes, number of its file, its offset in the file."""

_PATHS: Final = 64
"""Bytes of paths that an index may name for each byte of its own."""
_LAST_BLOCK: Final = 0xFFFFFFFF

Integers = npt.NDArray[np.int64]


class Chunks:
    """All chunks of ``index``. ``table``: an array of :data:`CHUNK` in order of device and block, each place once.

    ``paths`` are the files', from the image's root without a leading slash; ``sizes`` are theirs in bytes. ``packs``
    are the devices', SHA-256 in hex, slot 1 first. Raises FormatError where the index is damaged.
    """

    def __init__(self, index: Index) -> None:
        self.index = index
        self.packs: list[str] = [device.tag for device in index.devices]
        paths, nids = _regular_files(index)
        files = _chunked(index, nids)
        table = _table(index, files)
        # only files that have a chunk on a device are numbered
        numbered = np.unique(table["file"])
        renumber = np.zeros(len(files.number), np.uint32)
        renumber[numbered] = np.arange(len(numbered))
        table["file"] = renumber[table["file"]]
        self.paths: list[bytes] = [paths[number] for number in files.number[numbered].tolist()]
        self.sizes: list[int] = files.size[numbered].tolist()
        table = table[np.lexsort((table["file"], table["block"], table["device"]))]
        keys = _keys(table["device"], table["block"])
        first = np.concatenate(([True], keys[1:] != keys[:-1])) if len(keys) else np.zeros(0, np.bool_)
        self.table: npt.NDArray[np.void] = table[first]
        self._keys = keys[first]
        self._ends = self.table["block"].astype(np.uint64) * BLOCK + self.table["length"]

    def touched(self, device: int, offset: int, length: int) -> range:
        """Numbers of the chunks that device bytes ``[offset, offset + length)`` touch."""
        first, stop = self.spans(np.array([device]), np.array([offset], np.uint64), np.array([length], np.uint64))
        return range(int(first[0]), int(stop[0]))

    def spans(
        self, devices: npt.ArrayLike, offsets: npt.ArrayLike, lengths: npt.ArrayLike
    ) -> tuple[Integers, Integers]:
        """For many ranges at once the first chunk that each touches, and the one behind the last: :meth:`touched`."""
        device, offset = np.asarray(devices, np.int64), np.asarray(offsets, np.uint64)
        length = np.asarray(lengths, np.uint64)
        begin = offset // BLOCK
        last = begin + (offset % BLOCK + np.maximum(length, 1) - 1) // BLOCK
        first = np.searchsorted(self._keys, _keys(device, np.minimum(begin, _LAST_BLOCK)), side="right") - 1
        stop = np.searchsorted(self._keys, _keys(device, np.minimum(last, _LAST_BLOCK)), side="right")
        if len(self.table):
            # the chunk that begins at or before the range is touched if it reaches into it
            before = np.maximum(first, 0)
            reached = (first >= 0) & (self.table["device"][before] == device) & (self._ends[before] > offset)
            first = first + ~reached
        else:
            first = first + 1
        return first, np.where(length > 0, np.maximum(stop, first), first)

    def touched_many(
        self, devices: npt.ArrayLike, offsets: npt.ArrayLike, lengths: npt.ArrayLike
    ) -> tuple[Integers, Integers]:
        """The chunks that many ranges touch: their numbers, range by range, and for each the number of its range."""
        first, stop = self.spans(devices, offsets, lengths)
        counts = stop - first
        ranges = np.repeat(np.arange(len(counts)), counts)
        return first[ranges] + _within(counts), ranges

    def slots(self, packs: list[str]) -> Integers:
        """The device slot of each of ``packs``, 0 for those that the image does not have."""
        known = {pack: slot for slot, pack in enumerate(self.packs, 1)}
        return np.array([known.get(pack, 0) for pack in packs], np.int64)


def walk(index: Index) -> Iterator[tuple[bytes, Node]]:
    """Every file of an index with its path, directories in the order of their names, depth first.

    A directory's own files come before those of the directories in it. Ends with FormatError where directories form
    no tree.
    """
    for path, nid, _ in _entries(index):
        yield path, index.node(nid)


def _entries(index: Index) -> Iterator[tuple[bytes, int, int]]:
    """(path, inode number, its type as the mode's top bits have it) of every entry, in the order of :func:`walk`."""
    buffer, start = index.buffer, index.meta_start
    left = len(buffer)
    seen: set[int] = set()
    stack: list[tuple[bytes, int]] = [(b"", index.root.nid)]
    while stack:
        directory, nid = stack.pop()
        node = index.node(nid)
        left -= node.extent_in_index()
        if nid in seen or left < 0:
            raise FormatError(f"inode {nid}: a directory in two places, or structures overlap")
        seen.add(nid)
        if len(directory) > fmt.PATH_LIMIT:
            raise FormatError(f"inode {nid}: its path has {len(directory)} bytes")
        prefix = directory + b"/" if directory else b""
        below: list[tuple[bytes, int]] = []
        for name, child, _ in node.listdir():
            at = start + child * fmt.ISLOT_SIZE + _TYPE_AT
            if at >= len(buffer):
                raise FormatError(f"inode {child} lies beyond the image")
            path, kind = prefix + name, buffer[at] >> 4
            yield path, child, kind
            if kind == _DIRECTORY:
                below.append((path, child))
        below.reverse()
        stack += below


class _Files(NamedTuple):
    """Regular files that have a chunk table, in order. ``number`` counts all regular files; tables begin at byte
    ``start`` and have ``entries`` of ``unit`` bytes, each for ``1 << bits`` bytes of the file."""

    number: Integers
    nid: Integers
    size: Integers
    start: Integers
    unit: Integers
    bits: Integers
    entries: Integers

    def chosen(self, which: npt.NDArray[np.bool_]) -> _Files:
        return _Files(*(column[which] for column in self))


def _regular_files(index: Index) -> tuple[list[bytes], Integers]:
    """Paths and inode numbers of all regular files, a file with several names under its first."""
    paths: list[bytes] = []
    nids: list[int] = []
    seen: set[int] = set()
    left = len(index.buffer) * _PATHS
    for path, nid, kind in _entries(index):
        if kind == _REGULAR and nid not in seen:
            seen.add(nid)
            left -= len(path)
            if left < 0:
                raise FormatError(f"inode {nid}: more bytes of paths than an index of this size can need")
            paths.append(path)
            nids.append(nid)
    return paths, np.array(nids, np.int64)


def _chunked(index: Index, nids: Integers) -> _Files:
    """The files among these inodes that have chunk tables, decoded and checked as :class:`Node` does it."""
    slots = (len(index.buffer) - index.meta_start) // fmt.ISLOT_SIZE
    raw = np.frombuffer(index.buffer, np.uint8, slots * fmt.ISLOT_SIZE, index.meta_start).reshape(-1, fmt.ISLOT_SIZE)
    compact = raw[nids].view(fmt.INODE_COMPACT_DTYPE)[:, 0]
    wide = compact["i_format"] & fmt.I_VERSION_MASK > 0
    _require(index, nids, nids + wide < slots)
    both = np.concatenate((raw[nids[wide]], raw[nids[wide] + 1]), axis=1).view(fmt.INODE_EXTENDED_DTYPE)[:, 0]
    size = compact["i_size"].astype(np.uint64)
    union = compact["i_u"].astype(np.int64)
    size[wide], union[wide] = both["i_size"], both["i_u"]
    _require(index, nids, (size >> np.uint64(63) == 0) & (compact["i_format"] & ~np.uint16(fmt.I_ALL) == 0))
    length = size.astype(np.int64)
    layout = compact["i_format"] >> fmt.I_DATALAYOUT_BIT & fmt.I_DATALAYOUT_MASK
    icount = compact["i_xattr_icount"].astype(np.int64)
    isize = np.where(wide, fmt.INODE_EXTENDED.size, fmt.INODE_COMPACT.size)
    head = index.meta_start + nids * fmt.ISLOT_SIZE + isize + np.where(icount, ibody_size(1) + (icount - 1) * 4, 0)
    _require(index, nids, (head <= len(index.buffer)) & np.isin(layout, _LAYOUTS))
    unit = np.where(union & fmt.CHUNK_FORMAT_INDEXES, fmt.CHUNK_INDEX.size, 4)
    bits = index.block_bits + (union & fmt.CHUNK_FORMAT_BLKBITS_MASK)
    count = (length >> bits) + (length & (1 << bits) - 1 > 0)
    files = _Files(np.arange(len(nids)), nids, length, (head + unit - 1) // unit * unit, unit, bits, count)
    chunked = layout == fmt.CHUNK_BASED
    _require(index, nids, ~chunked | (union & 0xFFFF & ~fmt.CHUNK_FORMAT_ALL == 0))
    files = files.chosen(chunked)
    _require(index, files.nid, files.entries <= (len(index.buffer) - files.start) // files.unit)
    if int((files.entries * files.unit + fmt.INODE_COMPACT.size).sum()) > len(index.buffer):
        raise FormatError("chunk tables overlap")
    return files


def _table(index: Index, files: _Files) -> npt.NDArray[np.void]:
    """The chunks of all files that lie on a device, in the order of the files; ``file`` is a row of ``files``."""
    rows = np.repeat(np.arange(len(files.number)), files.entries)
    piece = _within(files.entries)
    device, block = _addresses(index, files, rows, piece)
    bits, size = files.bits[rows], files.size[rows]
    offset = piece << bits
    length = np.minimum(size - offset, np.left_shift(1, bits))
    there = block != fmt.NULL_ADDR
    blocks = np.array([index.device_blocks(number) for number in range(1 << len(index.devices).bit_length())])
    left = blocks[device] - block
    # without a device id, a block is one of the unified address space: rare, erofsgen writes ids
    for number in np.flatnonzero(there & (device == 0)).tolist():
        device[number], block[number], left[number] = index.resolve(int(block[number]))
    _require(index, files.nid[rows], ~there | (left << index.block_bits >= length))
    there &= device > 0
    place = block[there] << index.block_bits >> fmt.BLOCK_BITS
    _require(index, files.nid[rows[there]], (length[there] <= _LAST_BLOCK) & (place <= _LAST_BLOCK))
    table = np.zeros(int(there.sum()), CHUNK)
    table["device"], table["block"], table["length"] = device[there], place, length[there]
    table["file"], table["offset"] = rows[there], offset[there]
    return table


def _addresses(index: Index, files: _Files, rows: Integers, piece: Integers) -> tuple[Integers, Integers]:
    """Device id and block of each entry of the files' chunk tables."""
    at = files.start[rows] + piece * files.unit[rows]
    full = files.unit[rows] == fmt.CHUNK_INDEX.size
    device, block = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64)
    eights = np.frombuffer(index.buffer, fmt.CHUNK_INDEX_DTYPE, len(index.buffer) // fmt.CHUNK_INDEX.size)
    entries = eights[at[full] // fmt.CHUNK_INDEX.size]
    device[full] = entries["device_id"] & (1 << len(index.devices).bit_length()) - 1
    block[full] = entries["startblk_lo"]
    block[~full] = np.frombuffer(index.buffer, "<u4", len(index.buffer) // 4)[at[~full] // 4]
    return device, block


def _require(index: Index, nids: Integers, good: npt.NDArray[np.bool_]) -> None:
    """Raise the reader's FormatError for the first inode that is not good."""
    if not good.all():
        nid = int(nids[np.argmin(good)])
        index.node(nid).extents()
        raise FormatError(f"inode {nid}: chunks that no image of erofsgen has")


def _keys(device: npt.NDArray[np.integer], block: npt.NDArray[np.integer]) -> Integers:
    return device.astype(np.int64) << 32 | block.astype(np.int64)


def _within(counts: Integers) -> Integers:
    """0, 1, … for each of ``counts``, one behind the other."""
    return np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)


_TYPE_AT: Final = 5
"""Where an inode of either size has the upper half of its mode."""
_REGULAR: Final = stat.S_IFREG >> 12
_DIRECTORY: Final = stat.S_IFDIR >> 12
_LAYOUTS: Final = (fmt.FLAT_PLAIN, fmt.FLAT_INLINE, fmt.CHUNK_BASED)
