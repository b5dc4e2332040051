"""One inode of an image, decoded."""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from erofsgen.erofs import format as fmt
from erofsgen.erofs.xattr import ibody_size
from erofsgen.errors import FormatError

if TYPE_CHECKING:
    from erofsgen.erofs.reader import Index

Entry = tuple[bytes, int, int]
"""A directory entry: name, nid, file type (as in :data:`~erofsgen.erofs.format.FILE_TYPES`)."""


class Extent(NamedTuple):
    """A piece of a file, in bytes: at ``offset`` of the file, ``length`` long, at ``start`` of ``device``.

    ``device`` is a device id, 0 for the image itself, None for a hole, whose ``start`` is 0.
    """

    offset: int
    length: int
    device: int | None
    start: int


class Node:
    """An inode. Attributes are those of stat(2): ``mtime`` in nanoseconds, ``rdev`` as ``os.makedev`` gives it.

    ``nid`` is its number, unique in the image; hard links share it. Methods raise FormatError.
    """

    _index: Index
    _start: int
    """Byte offset."""
    _union: int
    """i_u."""
    nid: int
    ino: int
    compact: bool
    isize: int
    """Bytes of the inode alone."""
    xattr_size: int
    """Bytes of its attributes behind it."""
    layout: int
    mode: int
    nlink: int
    uid: int
    gid: int
    size: int
    mtime: int
    rdev: int
    tail_size: int
    """Bytes of inline data behind inode and attributes."""
    table_size: int
    """Bytes of the chunk table there."""

    __slots__ = (
        "_index",
        "_start",
        "_union",
        "compact",
        "gid",
        "ino",
        "isize",
        "layout",
        "mode",
        "mtime",
        "nid",
        "nlink",
        "rdev",
        "size",
        "table_size",
        "tail_size",
        "uid",
        "xattr_size",
    )

    def __init__(self, index: Index, nid: int) -> None:
        start = index.meta_start + nid * fmt.ISLOT_SIZE
        buffer = index.buffer
        self._index = index
        self._start = start
        self.nid = nid
        if start + fmt.INODE_COMPACT.size > len(buffer):
            raise FormatError(f"inode {nid} at byte {start} lies beyond the image")
        format_ = buffer[start] | buffer[start + 1] << 8
        self.compact = not format_ & fmt.I_VERSION_MASK
        self.layout = format_ >> fmt.I_DATALAYOUT_BIT & fmt.I_DATALAYOUT_MASK
        if self.compact:
            self.isize = fmt.INODE_COMPACT.size
            _, icount, mode, self.nlink, self.size, mtime, self._union, self.ino, self.uid, self.gid, _ = (
                fmt.INODE_COMPACT.unpack_from(buffer, start)
            )
            superblock = index.superblock
            self.mtime = (superblock.epoch + mtime) * 1_000_000_000 + superblock.fixed_nsec
        else:
            self.isize = fmt.INODE_EXTENDED.size
            if start + self.isize > len(buffer):
                raise FormatError(f"inode {nid} at byte {start} goes beyond the image")
            _, icount, mode, _, self.size, self._union, self.ino, self.uid, self.gid, mtime, nsec, self.nlink, _ = (
                fmt.INODE_EXTENDED.unpack_from(buffer, start)
            )
            self.mtime = mtime * 1_000_000_000 + nsec
        self.mode = mode
        self.rdev = self.tail_size = self.table_size = 0
        self.xattr_size = ibody_size(icount)
        if format_ & ~fmt.I_ALL or self.layout not in _LAYOUTS:
            raise self._error(f"format {format_:#x} is not known")
        kind = stat.S_IFMT(mode)
        if kind not in fmt.FILE_TYPES:
            raise self._error(f"mode {mode:o} is no file type")
        if self.size >> 63:
            raise self._error(f"a size of {self.size} bytes")
        if start + self.isize + self.xattr_size > len(buffer):
            raise self._error("its xattrs go beyond the image")
        if kind not in _WITH_DATA:
            if kind in (stat.S_IFCHR, stat.S_IFBLK):
                self.rdev = os.makedev(*fmt.decode_dev(self._union))
        elif self.layout == fmt.FLAT_INLINE and self.size:
            # a last block that is full is inlined in whole, as the kernel has it
            self.tail_size = ((self.size - 1) & (index.block_size - 1)) + 1
            at = self._head_end
            if (at & (index.block_size - 1)) + self.tail_size > index.block_size or at + self.tail_size > len(buffer):
                raise self._error("its inline data crosses a block or the end of the image")
        elif self.layout == fmt.CHUNK_BASED:
            if kind != stat.S_IFREG or self._union & 0xFFFF & ~fmt.CHUNK_FORMAT_ALL:
                raise self._error(f"chunk format {self._union:#x} is not known")
            self.table_size = ((self.size + (1 << self._chunk_bits) - 1) >> self._chunk_bits) * self._table_unit
            if self._table_start + self.table_size > len(buffer):
                raise self._error("its chunk table goes beyond the image")

    def _error(self, what: str) -> FormatError:
        return FormatError(f"inode {self.nid} at byte {self._start}: {what}")

    @property
    def _head_end(self) -> int:
        """Where the inode and its attributes end."""
        return self._start + self.isize + self.xattr_size

    @property
    def _table_start(self) -> int:
        return fmt.align(self._head_end, self._table_unit)

    @property
    def _table_unit(self) -> int:
        return fmt.CHUNK_INDEX.size if self._union & fmt.CHUNK_FORMAT_INDEXES else 4

    @property
    def _chunk_bits(self) -> int:
        return self._index.block_bits + (self._union & fmt.CHUNK_FORMAT_BLKBITS_MASK)

    def extent_in_index(self) -> int:
        """Bytes of the image that are this inode's alone: itself, attributes, tail or table, a directory's blocks."""
        size = self.isize + self.xattr_size + self.tail_size + self.table_size
        return size + self.size - self.tail_size if stat.S_ISDIR(self.mode) else size

    @property
    def span(self) -> tuple[int, int]:
        """From and to which byte the inode lies in the image, with its attributes and its tail or table."""
        if self.table_size:
            return self._start, self._table_start + self.table_size
        return self._start, self._head_end + self.tail_size

    # --- content

    def extents(self) -> list[Extent]:
        """Where a regular file's bytes are, in order and without gaps; neighbours are merged.

        Empty for empty files and for those whose whole content :meth:`inline` returns.
        """
        extents = self._extents() if stat.S_ISREG(self.mode) else []
        return [] if self.layout != fmt.CHUNK_BASED and self._all_here(extents) else extents

    @property
    def chunk_size(self) -> int | None:
        """Bytes of one chunk of a regular file; None where it has no chunks."""
        return 1 << self._chunk_bits if self.layout == fmt.CHUNK_BASED else None

    def inline(self) -> bytes | None:
        """The whole content of a regular file, where the image itself holds it, else None; None for empty files."""
        if not stat.S_ISREG(self.mode) or not self.size or self.layout == fmt.CHUNK_BASED:
            return None
        return self._content()

    def readlink(self) -> bytes:
        """A symbolic link's target."""
        if not stat.S_ISLNK(self.mode):
            raise self._error("not a symbolic link")
        if not self.size <= fmt.SYMLINK_MAX:
            raise self._error(f"a symbolic link to {self.size} bytes")
        target = self._content()
        if target is None or b"\0" in target:
            raise self._error("its target is not in the image, or has a NUL")
        return target

    def _content(self) -> bytes | None:
        """All bytes of a flat inode, if they are all in the buffer. There may be none."""
        extents = self._extents()
        if not self._all_here(extents):
            return None
        buffer = self._index.buffer
        return b"".join([buffer[start : start + length] for _, length, _, start in extents])

    def _all_here(self, extents: list[Extent]) -> bool:
        end = len(self._index.buffer)
        return all(device == 0 and start + length <= end for _, length, device, start in extents)

    def _extents(self) -> list[Extent]:
        if self.layout == fmt.CHUNK_BASED:
            return self._chunk_extents()
        stored = self.size - self.tail_size
        extents = []
        if stored:
            if self._union == fmt.NULL_ADDR:
                extents.append(Extent(0, stored, None, 0))
            else:
                device, block, left = self._index.resolve(self._union)
                self._require_blocks(stored, device, left)
                extents.append(Extent(0, stored, device, block << self._index.block_bits))
        if self.tail_size:
            extents.append(Extent(stored, self.tail_size, 0, self._head_end))
        return extents

    def _chunk_extents(self) -> list[Extent]:
        index, bits = self._index, self._chunk_bits
        table = index.buffer[self._table_start : self._table_start + self.table_size]
        chunk = 1 << bits
        mask = (1 << len(index.devices).bit_length()) - 1
        extents: list[Extent] = []
        offset = 0
        if self._table_unit == fmt.CHUNK_INDEX.size:
            entries = ((number & mask, block) for _, number, block in fmt.CHUNK_INDEX.iter_unpack(table))
        else:
            entries = ((0, block) for (block,) in struct.iter_unpack("<I", table))
        for number, block in entries:
            length = min(chunk, self.size - offset)
            device: int | None = None
            start = 0
            if block != fmt.NULL_ADDR:
                device, left = number, index.device_blocks(number) - block
                if not number:
                    device, block, left = index.resolve(block)
                self._require_blocks(length, device, left)
                start = block << index.block_bits
            last = extents[-1] if extents else None
            if last is not None and last.device == device and (device is None or last.start + last.length == start):
                extents[-1] = Extent(last.offset, last.length + length, device, last.start)
            else:
                extents.append(Extent(offset, length, device, start))
            offset += length
        return extents

    def _require_blocks(self, length: int, device: int, left: int) -> None:
        if left << self._index.block_bits < length:
            raise self._error(f"{length} bytes go beyond device {device}")

    # --- directories

    def listdir(self) -> list[Entry]:
        """A directory's entries in order, without "." and ".."."""
        return [entry for _, entry in self.entries() if entry[0] not in (b".", b"..")]

    def children(self) -> Iterator[tuple[bytes, Node]]:
        """(name, inode) of a directory's entries in order, without "." and ".."."""
        for name, nid, _ in self.listdir():
            yield name, Node(self._index, nid)

    def child(self, name: bytes) -> Node | None:
        """What a directory has under ``name``, found as the kernel does: by bisection. None if nothing."""
        if name in (b"", b".", b".."):
            return None
        blocks = self.dir_blocks()
        low, high = 0, len(blocks)
        while high - low > 1:
            middle = (low + high) // 2
            if self.block_entries(*blocks[middle])[0][1][0] <= name:
                low = middle
            else:
                high = middle
        if blocks:
            for _, (other, nid, _) in self.block_entries(*blocks[low]):
                if other == name:
                    return Node(self._index, nid)
        return None

    def entries(self) -> Iterator[tuple[int, Entry]]:
        """A directory's entries as they are, "." and ".." included, each with its byte offset in the image."""
        for start, used in self.dir_blocks():
            yield from self.block_entries(start, used)

    def dir_blocks(self) -> list[tuple[int, int]]:
        """(byte offset in the image, bytes in use) of each block of a directory."""
        if not stat.S_ISDIR(self.mode):
            raise self._error("not a directory")
        size, blocks = self._index.block_size, []
        extents = self._extents()
        if not self._all_here(extents):
            raise self._error("its entries are not in the image")
        for _, length, _, start in extents:
            blocks += [(start + done, min(size, length - done)) for done in range(0, length, size)]
        return blocks

    def block_entries(self, start: int, used: int) -> list[tuple[int, Entry]]:
        """The entries of one of :meth:`dir_blocks`, as :meth:`entries` gives them."""
        block = self._index.buffer[start : start + used]
        names_start = block[8] | block[9] << 8 if used > fmt.DIRENT.size else 0
        if not 0 < names_start < used or names_start % fmt.DIRENT.size:
            raise self._error(f"directory block at byte {start}: names begin at {names_start}")
        raw = list(fmt.DIRENT.iter_unpack(block[:names_start]))
        text = bytes(block)
        last = text.find(b"\0", raw[-1][1])
        ends = [entry[1] for entry in raw[1:]]
        ends.append(used if last < 0 else last)
        entries = []
        at, begin = start, names_start
        for (nid, offset, kind, _), end in zip(raw, ends, strict=True):
            name = text[begin:end]
            if offset != begin or not 0 < len(name) <= fmt.NAME_MAX or b"/" in name or b"\0" in name:
                raise self._error(f"directory entry at byte {at}: no name at {offset} to {end}")
            entries.append((at, (name, nid, kind)))
            at += fmt.DIRENT.size
            begin = end
        return entries

    # --- extended attributes

    def xattrs(self) -> list[tuple[bytes, bytes]]:
        """(full name, value) of the attributes a mount shows, sorted. The fingerprint is none of them."""
        return sorted(pair for pair in self.all_xattrs() if pair[0] != self._index.fingerprint_name)

    def fingerprint(self) -> bytes | None:
        """The file's content digest for sharing the page cache, where the image has one."""
        return next((value for name, value in self.all_xattrs() if name == self._index.fingerprint_name), None)

    def xattr_ids(self) -> tuple[int, list[int]]:
        """(name filter, shared ids)."""
        at = self._start + self.isize
        buffer = self._index.buffer
        name_filter, count, _ = fmt.XATTR_IBODY_HEADER.unpack_from(buffer, at)
        at += fmt.XATTR_IBODY_HEADER.size
        if at + 4 * count > self._head_end:
            raise self._error(f"{count} shared xattrs do not fit")
        return name_filter, [int.from_bytes(buffer[at + 4 * n : at + 4 * n + 4], "little") for n in range(count)]

    def all_xattrs(self) -> list[tuple[bytes, bytes]]:
        """(full name, value) of all attributes that kernels know, the fingerprint included, as they are stored."""
        return [pair for pair in self.stored_xattrs() if pair is not None]

    def stored_xattrs(self) -> list[tuple[bytes, bytes] | None]:
        """All attributes, None for those that kernels hide: the inode's own first, then shared ones."""
        if not self.xattr_size:
            return []
        _, shared = self.xattr_ids()
        at = self._start + self.isize + fmt.XATTR_IBODY_HEADER.size + 4 * len(shared)
        pairs = []
        while at < self._head_end:
            pair, at = self._index.xattr_entry(at, self._head_end)
            pairs.append(pair)
        return pairs + [self._index.shared_xattr(number) for number in shared]


_WITH_DATA = frozenset({stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK})
_LAYOUTS = frozenset({fmt.FLAT_PLAIN, fmt.FLAT_INLINE, fmt.CHUNK_BASED})
