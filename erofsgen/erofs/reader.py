"""Reads EROFS images: erofsgen's indexes, and uncompressed images of mkfs.erofs.

The image is taken for hostile: whatever its bytes are, methods end in time and memory linear in its size and raise
nothing but FormatError. It is also left alone: nothing is copied but what a caller asks for.

What files look like is defined here and in :mod:`erofsgen.erofs.node`; whoever serves or unpacks an image translates.
"""

from __future__ import annotations

import stat
from bisect import bisect_right
from collections.abc import Iterator
from functools import cached_property
from itertools import pairwise
from mmap import mmap
from operator import itemgetter
from typing import NamedTuple

from erofsgen.erofs import format as fmt
from erofsgen.erofs.node import Node
from erofsgen.erofs.tree import Device
from erofsgen.erofs.xattr import LongPrefix, join_name
from erofsgen.errors import FormatError, NotFoundError

Buffer = bytes | bytearray | memoryview | mmap
"""An image, in memory or mapped."""


class Stats(NamedTuple):
    """What an image's bytes are spent on. Counts of inodes; sizes in bytes, without alignment."""

    size: int
    inodes: int
    compact: int
    extended: int
    inode_bytes: int
    xattr_bytes: int
    shared_xattr_bytes: int
    inline_bytes: int
    """Tails behind inodes: of directories, symlinks and small files."""
    chunk_table_bytes: int
    directory_bytes: int
    """Whole blocks of directories."""


class SharedXattr(NamedTuple):
    """An entry of the shared area: its bytes, and the attribute unless kernels hide it."""

    start: int
    end: int
    pair: tuple[bytes, bytes] | None


class Index:
    """An opened image.

    ``verify`` checks the superblock's checksum. Raises FormatError: no EROFS image, a damaged one, or one that needs
    features beyond :data:`~erofsgen.erofs.format.READABLE_INCOMPAT`.
    """

    def __init__(self, buffer: Buffer, *, verify: bool = True) -> None:
        self.buffer = memoryview(buffer).cast("B")
        self.superblock = _superblock(self.buffer, verify=verify)
        self.block_bits = self.superblock.blkszbits
        self.block_size = 1 << self.block_bits
        self.meta_start = self.superblock.meta_blkaddr << self.block_bits
        self.devices: list[Device] = []
        """Device slots in order; device ids count from 1."""
        self.device_starts: list[int] = []
        """Block at which each device begins in the unified address space, 0 where it has no place there."""
        self._read_devices()
        self.prefixes = self._read_prefixes()
        self.fingerprint_name: bytes | None = None
        """Name of the xattr that holds a file's content digest, where the image says it has such."""
        number = self.superblock.ishare_xattr_prefix_id
        if self.superblock.feature_compat & fmt.COMPAT_ISHARE_XATTRS and number < len(self.prefixes):
            self.fingerprint_name = join_name(fmt.XATTR_LONG_PREFIX | number, b"", self.prefixes)
        self._shared: dict[int, SharedXattr] = {}
        self._shared_bytes = 0

    @cached_property
    def root(self) -> Node:
        """The root directory."""
        node = self.node(self.superblock.rootnid_2b)
        if not stat.S_ISDIR(node.mode):
            raise FormatError(f"the root, inode {node.nid}, is not a directory")
        return node

    def node(self, nid: int) -> Node:
        """The inode of this number."""
        return Node(self, nid)

    def lookup(self, path: bytes) -> Node:
        """The file at ``path``, symbolic links not followed; empty components and "." are skipped.

        Raises NotFoundError.
        """
        node = self.root
        for name in path.split(b"/"):
            if name in (b"", b"."):
                continue
            child = node.child(name) if stat.S_ISDIR(node.mode) else None
            if child is None:
                raise NotFoundError(f"{path.decode('utf-8', 'surrogateescape')}: no such file or directory")
            node = child
        return node

    def walk(self) -> Iterator[tuple[bytes, Node]]:
        """Every (path, inode), parents first, names in the image's order; the root's path is ``b""``.

        A hard-linked inode comes once for each name. Ends with FormatError where directories form no tree, and where
        inodes with what belongs to them, or directories, overlap: no image can hold more than its size.
        """
        left = len(self.buffer)
        seen: set[int] = set()
        stack: list[tuple[bytes, Iterator[tuple[bytes, int, int]]]] = []
        path, node = b"", self.root
        while True:
            is_dir = stat.S_ISDIR(node.mode)
            if node.nid not in seen:
                seen.add(node.nid)
                left -= node.extent_in_index()
                if left < 0:
                    raise FormatError(f"inode {node.nid}: structures overlap")
            elif is_dir:
                raise FormatError(f"inode {node.nid}: a directory in two places")
            yield path, node
            if is_dir:
                if len(path) > fmt.PATH_LIMIT:
                    raise FormatError(f"inode {node.nid}: its path has {len(path)} bytes")
                stack.append((path + b"/" if path else b"", iter(node.listdir())))
            entry = None
            while stack and entry is None:
                prefix, entries = stack[-1]
                entry = next(entries, None)
                if entry is None:
                    stack.pop()
            if entry is None:
                return
            path, node = prefix + entry[0], self.node(entry[1])

    def stats(self) -> Stats:
        """Walk the image and add up."""
        total = dict.fromkeys(Stats._fields, 0)
        seen: set[int] = set()
        for _, node in self.walk():
            if node.nid in seen:
                continue
            seen.add(node.nid)
            total["inodes"] += 1
            total["compact"] += node.compact
            total["inode_bytes"] += node.isize
            total["xattr_bytes"] += node.xattr_size
            total["inline_bytes"] += node.tail_size
            total["chunk_table_bytes"] += node.table_size
            if stat.S_ISDIR(node.mode):
                total["directory_bytes"] += node.size - node.tail_size
            node.xattrs()
        total["extended"] = total["inodes"] - total["compact"]
        return Stats(**total | {"size": len(self.buffer), "shared_xattr_bytes": self._shared_bytes})

    def resolve(self, block: int) -> tuple[int, int, int]:
        """``(device id, block in the device, blocks from there to its end)`` for a block of the unified address space.

        Device 0 is the image itself, as it is mounted: its blocks need not all be in the buffer.
        """
        number = bisect_right(self._ranges, block, key=itemgetter(0)) - 1
        if number >= 0:
            start, end, device = self._ranges[number]
            if block < end:
                return device, block - start, end - block
        return 0, block, max(self.device_blocks(0) - block, 0)

    def device_blocks(self, device: int) -> int:
        """Blocks of a device by its id, 0 for the image itself. A device that does not exist has none.

        mkfs.erofs 1.5 leaves slots empty: a device that claims no blocks has as many as can be addressed.
        """
        if device == 0:
            return max(self.superblock.blocks_lo, len(self.buffer) >> self.block_bits)
        return self.devices[device - 1].blocks or fmt.NULL_ADDR if device <= len(self.devices) else 0

    def shared_xattr(self, number: int) -> tuple[bytes, bytes] | None:
        """The attribute of this id in the shared area, None if kernels hide it."""
        shared = self._shared.get(number)
        if shared is None:
            start = (self.superblock.xattr_blkaddr << self.block_bits) + 4 * number
            pair, end = self.xattr_entry(start, len(self.buffer))
            # every entry is kept, so that inodes cannot make it many: together they cannot exceed the image
            self._shared_bytes += end - start
            if self._shared_bytes > len(self.buffer):
                raise FormatError(f"shared xattr {number} at byte {start}: shared xattrs overlap")
            shared = self._shared[number] = SharedXattr(start, end, pair)
        return shared.pair

    def shared_xattr_spans(self) -> list[tuple[int, int]]:
        """From and to which byte the shared entries lie that were asked for so far."""
        return [(shared.start, shared.end) for shared in self._shared.values()]

    def xattr_entry(self, start: int, limit: int) -> tuple[tuple[bytes, bytes] | None, int]:
        """The attribute at byte ``start``, None if kernels hide it, and where the next entry begins."""
        if start + fmt.XATTR_ENTRY.size <= limit:
            name_len, index, value_size = fmt.XATTR_ENTRY.unpack_from(self.buffer, start)
            name_end = start + fmt.XATTR_ENTRY.size + name_len
            value_end = name_end + value_size
            if value_end <= limit:
                rest = bytes(self.buffer[start + fmt.XATTR_ENTRY.size : name_end])
                name = join_name(index, rest, self.prefixes)
                pair = None if name is None else (name, bytes(self.buffer[name_end:value_end]))
                return pair, fmt.align(value_end, 4)
        raise FormatError(f"xattr at byte {start} goes beyond byte {limit}")

    def _read_devices(self) -> None:
        superblock = self.superblock
        count = superblock.extra_devices if superblock.feature_incompat & fmt.INCOMPAT_DEVICE_TABLE else 0
        start = superblock.devt_slotoff * fmt.DEVICE_SLOT.size
        if count and start + count * fmt.DEVICE_SLOT.size > len(self.buffer):
            raise FormatError(f"the device table, {count} slots at byte {start}, goes beyond the image")
        for slot in range(count):
            tag, blocks, address, _ = fmt.DEVICE_SLOT.unpack_from(self.buffer, start + slot * fmt.DEVICE_SLOT.size)
            self.devices.append(Device(tag.rstrip(b"\0").decode("utf-8", "surrogateescape"), blocks))
            self.device_starts.append(address)
        self._ranges = sorted(
            (start, start + device.blocks, number)
            for number, (start, device) in enumerate(zip(self.device_starts, self.devices, strict=True), 1)
            if start and device.blocks
        )
        for (_, end, number), (other_start, _, other) in pairwise(self._ranges):
            if other_start < end:
                raise FormatError(f"devices {number} and {other} overlap in the unified address space")

    def _read_prefixes(self) -> list[LongPrefix]:
        if not self.superblock.feature_incompat & fmt.INCOMPAT_XATTR_PREFIXES:
            return []
        at = self.superblock.xattr_prefix_start * 4
        prefixes = []
        for number in range(self.superblock.xattr_prefix_count):
            if at + fmt.XATTR_LONG_PREFIX_HEAD.size > len(self.buffer):
                raise FormatError(f"xattr prefix {number} at byte {at} goes beyond the image")
            size, base_index = fmt.XATTR_LONG_PREFIX_HEAD.unpack_from(self.buffer, at)
            infix = bytes(self.buffer[at + fmt.XATTR_LONG_PREFIX_HEAD.size : at + 2 + size])
            if not 1 <= size <= 1 + fmt.XATTR_NAME_MAX or len(infix) != size - 1:
                raise FormatError(f"xattr prefix {number} at byte {at} cannot have {size} bytes")
            prefixes.append(LongPrefix(base_index, infix))
            at = fmt.align(at + 2 + size, 4)
        return prefixes


def _superblock(buffer: memoryview, *, verify: bool) -> fmt.Superblock:
    if len(buffer) < fmt.SUPER_OFFSET + fmt.SUPER.size:
        raise FormatError(f"an image of {len(buffer)} bytes has no superblock")
    superblock = fmt.Superblock(*fmt.SUPER.unpack_from(buffer, fmt.SUPER_OFFSET))
    if superblock.magic != fmt.SUPER_MAGIC:
        raise FormatError(f"no EROFS superblock at byte {fmt.SUPER_OFFSET}")
    if not fmt.MIN_BLOCK_BITS <= superblock.blkszbits <= fmt.MAX_BLOCK_BITS:
        raise FormatError(f"a block size of 2^{superblock.blkszbits} bytes")
    if verify and superblock.feature_compat & fmt.COMPAT_SB_CHKSUM and not checksum_matches(buffer, superblock):
        raise FormatError("the superblock's checksum is wrong")
    unknown = superblock.feature_incompat & ~fmt.READABLE_INCOMPAT
    if unknown:
        raise FormatError(f"the image has features that this reader does not know: {unknown:#x}")
    if superblock.dirblkbits:
        raise FormatError(f"directory blocks of 2^{superblock.dirblkbits} blocks")
    return superblock


def checksum_matches(buffer: memoryview, superblock: fmt.Superblock) -> bool:
    """Whether the superblock's checksum is that of its block."""
    size = 1 << superblock.blkszbits
    # blocks as small as to end before the superblock are summed up to a whole number of them behind it
    end = size if size > fmt.SUPER_OFFSET else fmt.SUPER_OFFSET + size
    block = bytearray(buffer[fmt.SUPER_OFFSET : end])
    block[4:8] = bytes(4)
    return fmt.checksum(block) == superblock.checksum
