"""Checks images: what the reader forgives because it can go on, and what kernels rely on without looking.

The checker reads everything there is, and goes on behind what is wrong where it can.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, NamedTuple

from erofsgen.erofs import format as fmt
from erofsgen.erofs.node import Node
from erofsgen.erofs.reader import Buffer, Index, checksum_matches
from erofsgen.erofs.treetable import shown
from erofsgen.erofs.xattr import filter_bit, split_name
from erofsgen.errors import FormatError

_MTIME_NSEC: Final = (fmt.INODE_EXTENDED_DTYPE.names or ()).index("i_mtime_nsec")

FINDINGS_MAX: Final = 1000
"""More than these are not listed: an image may be wrong everywhere."""


def check_index(buffer: Buffer) -> list[str]:
    """What is wrong with an image: one line each, with path, inode and byte offset where there are such. Empty if
    nothing is. Never raises for what the bytes are."""
    checker = _Checker()
    try:
        checker.check(buffer)
    except FormatError as error:
        checker.findings.append(str(error))
    except _EnoughError:
        checker.findings.append(f"more than {FINDINGS_MAX} findings, the rest is not listed")
    return checker.findings


class _EnoughError(Exception):
    """The list of findings is full."""


class _Span(NamedTuple):
    """Bytes that belong to one structure."""

    start: int
    end: int
    what: str


class _Pending(NamedTuple):
    path: bytes
    nid: int
    parent: int
    entry: int
    """Byte offset of the directory entry, 0 for the root."""
    kind: int
    """The entry's file type."""


class _Checker:
    def __init__(self) -> None:
        self.findings: list[str] = []
        self._spans: list[_Span] = []
        self._names: dict[int, int] = {}
        """Names that refer to an inode, by nid; for a directory 2 and its subdirectories."""
        self._nodes: dict[int, tuple[bytes, Node] | None] = {}
        """Every inode that was reached, with its first path; None if it cannot be read."""
        self._left = 0

    def check(self, buffer: Buffer) -> None:
        self._index = Index(buffer, verify=False)
        self._left = len(self._index.buffer)
        self._check_superblock()
        self._check_devices()
        self._walk()
        for node in self._nodes.values():
            if node is not None:
                self._check_nlink(*node)
        if self._index.superblock.inos != len(self._nodes):
            self._find(f"superblock: {self._index.superblock.inos} inodes, {len(self._nodes)} can be reached")
        self._check_overlaps()

    def _find(self, what: str) -> None:
        if len(self.findings) >= FINDINGS_MAX:
            raise _EnoughError
        self.findings.append(what)

    def _at(self, path: bytes, node: Node) -> str:
        return f"{shown(path)}: inode {node.nid} at byte {node.span[0]}"

    @contextmanager
    def _finding(self, path: bytes) -> Iterator[None]:
        try:
            yield
        except FormatError as error:
            self._find(f"{shown(path)}: {error}")

    def _check_superblock(self) -> None:
        index, superblock = self._index, self._index.superblock
        if superblock.feature_compat & fmt.COMPAT_SB_CHKSUM and not checksum_matches(index.buffer, superblock):
            self._find(f"superblock at byte {fmt.SUPER_OFFSET}: checksum {superblock.checksum:#010x} is wrong")
        if superblock.blocks_lo << index.block_bits > len(index.buffer):
            self._find(f"superblock: {superblock.blocks_lo} blocks, the image has {len(index.buffer)} bytes")
        if superblock.fixed_nsec >= 1_000_000_000:
            self._find(f"superblock: {superblock.fixed_nsec} nanoseconds")
        self._spans.append(_Span(0, fmt.SUPER_OFFSET + fmt.SUPER.size + 16 * superblock.sb_extslots, "superblock"))
        ishare = superblock.feature_compat & fmt.COMPAT_ISHARE_XATTRS
        if ishare and superblock.ishare_xattr_prefix_id >= len(index.prefixes):
            self._find(f"superblock: no xattr prefix {superblock.ishare_xattr_prefix_id} for fingerprints")
        if index.prefixes:
            start = superblock.xattr_prefix_start * 4
            size = sum(fmt.align(3 + len(prefix.infix), 4) for prefix in index.prefixes)
            self._spans.append(_Span(start, start + size, "xattr prefixes"))

    def _check_devices(self) -> None:
        index = self._index
        if not index.devices:
            return
        start = index.superblock.devt_slotoff * fmt.DEVICE_SLOT.size
        self._spans.append(_Span(start, start + len(index.devices) * fmt.DEVICE_SLOT.size, "device table"))
        for number, (device, address) in enumerate(zip(index.devices, index.device_starts, strict=True), 1):
            if not device.blocks or not device.tag:
                self._find(f"device {number}: its slot has no blocks or no tag")
            if address and address < index.superblock.blocks_lo:
                self._find(f"device {number}: unified address {address} lies in the image itself")
            if address + device.blocks > fmt.NULL_ADDR:
                self._find(f"device {number}: its unified addresses do not fit 32 bits")

    def _walk(self) -> None:
        root = self._index.superblock.rootnid_2b
        stack = [_Pending(b"", root, root, 0, 0)]
        while stack:
            pending = stack.pop()
            if pending.nid in self._nodes:
                known = self._nodes[pending.nid]
                if known is not None:
                    self._check_type(pending, known[1])
                if known is not None and stat.S_ISDIR(known[1].mode):
                    self._find(f"{self._at(pending.path, known[1])}: a directory in two places, also {shown(known[0])}")
                continue
            self._nodes[pending.nid] = None
            with self._finding(pending.path):
                node = self._index.node(pending.nid)
                self._nodes[pending.nid] = pending.path, node
                self._left -= node.extent_in_index()
                if self._left < 0:
                    raise FormatError(f"inode {node.nid}: structures overlap")
                self._spans.append(_Span(*node.span, f"inode {node.nid}"))
                self._check_type(pending, node)
                self._check_xattrs(pending.path, node)
                self._check_data(pending.path, node)
                if stat.S_ISDIR(node.mode):
                    stack += reversed(self._check_directory(pending.path, node, pending.parent))
                elif pending.nid == root:
                    self._find(f"{self._at(b'', node)}: the root is not a directory")
            if self._left < 0:
                return

    def _check_data(self, path: bytes, node: Node) -> None:
        if not node.compact:
            nanoseconds = fmt.INODE_EXTENDED.unpack_from(self._index.buffer, node.span[0])[_MTIME_NSEC]
            if nanoseconds >= 1_000_000_000:
                self._find(f"{self._at(path, node)}: {nanoseconds} nanoseconds")
        if stat.S_ISREG(node.mode):
            node.extents()
        elif stat.S_ISLNK(node.mode):
            if not node.readlink():
                self._find(f"{self._at(path, node)}: a symbolic link to nothing")
        elif not stat.S_ISDIR(node.mode) and node.size:
            self._find(f"{self._at(path, node)}: a special file of {node.size} bytes")

    def _check_directory(self, path: bytes, node: Node, parent: int) -> list[_Pending]:
        tail = node.span[1] - node.tail_size if node.tail_size else None
        for start, used in node.dir_blocks():
            if start != tail:
                self._spans.append(_Span(start, start + used, f"directory {node.nid}"))
        if len(path) > fmt.PATH_LIMIT:
            raise FormatError(f"inode {node.nid}: its path has {len(path)} bytes")
        prefix = path + b"/" if path else b""
        self._names[node.nid] = self._names.get(node.nid, 0) + 1
        previous = b""
        dots = {b".": node.nid, b"..": parent}
        children = []
        for offset, (name, nid, kind) in node.entries():
            here = prefix + name
            if name <= previous:
                self._find(f"{shown(here)}: entry at byte {offset}: not in order, behind {previous!r}")
            previous = name
            if name in dots:
                if dots.pop(name, nid) != nid:
                    self._find(f"{shown(here)}: entry at byte {offset}: it is inode {nid}")
                if kind != fmt.FILE_TYPES[stat.S_IFDIR]:
                    self._find(f"{shown(here)}: entry at byte {offset}: file type {kind}")
                continue
            children.append(_Pending(here, nid, node.nid, offset, kind))
            self._names[nid] = self._names.get(nid, 0) + 1
            if kind == fmt.FILE_TYPES[stat.S_IFDIR]:
                self._names[node.nid] += 1
        for name in dots:
            self._find(f"{self._at(path, node)}: it has no entry {name!r}")
        return children

    def _check_type(self, pending: _Pending, node: Node) -> None:
        if pending.entry and fmt.FILE_TYPES[stat.S_IFMT(node.mode)] != pending.kind:
            where = f"{shown(pending.path)}: entry at byte {pending.entry}"
            self._find(f"{where}: file type {pending.kind}, its mode is {node.mode:o}")

    def _check_nlink(self, path: bytes, node: Node) -> None:
        names = self._names.get(node.nid, 0) + (node.nid == self._index.superblock.rootnid_2b)
        if node.nlink != names:
            self._find(f"{self._at(path, node)}: {node.nlink} links, {names} names")

    def _check_xattrs(self, path: bytes, node: Node) -> None:
        if not node.xattr_size:
            return
        name_filter, _ = node.xattr_ids()
        pairs = node.stored_xattrs()
        if not pairs:
            self._find(f"{self._at(path, node)}: {node.xattr_size} bytes for no xattr")
        absent = fmt.XATTR_FILTER_DEFAULT
        names = set()
        for pair in pairs:
            split = None if pair is None else split_name(pair[0])
            if pair is None or split is None:
                self._find(f"{self._at(path, node)}: an xattr of an unknown kind or without a name")
                continue
            absent &= ~filter_bit(*split)
            if pair[0] in names:
                self._find(f"{self._at(path, node)}: xattr {pair[0]!r} is there twice")
            names.add(pair[0])
        superblock = self._index.superblock
        if (
            superblock.feature_compat & fmt.COMPAT_XATTR_FILTER
            and not superblock.xattr_filter_reserved
            and name_filter != absent
        ):
            self._find(f"{self._at(path, node)}: xattr filter {name_filter:#010x}, the names make {absent:#010x}")

    def _check_overlaps(self) -> None:
        self._spans += [_Span(start, end, "shared xattr") for start, end in self._index.shared_xattr_spans()]
        self._spans.sort()
        reached = self._spans[0]
        for span in self._spans[1:]:
            if span.start < reached.end:
                self._find(f"{span.what} at byte {span.start} overlaps {reached.what} at byte {reached.start}")
            if span.end > reached.end:
                reached = span
