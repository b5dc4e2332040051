"""The fuse plane: files straight from the index. What they look like is defined in :mod:`erofsgen.erofs.reader`.

Inodes have EROFS's numbers, so they are the same at every mount and hard links are one. FUSE wants 1 for the root and
has no 0: those are exchanged for numbers that are free. What the kernel has been told once it keeps: an image does not
change.
"""

from __future__ import annotations

import errno
import itertools
import stat
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Final, cast

import pyfuse3

from erofsgen.erofs.node import Entry, Extent, Node
from erofsgen.erofs.reader import Index
from erofsgen.errors import FormatError
from fusefallback.answers import FOREVER, answering
from fusefallback.content import Content, pieces_of

_ZERO: Final = 1 << 62
"""FUSE's number of EROFS's inode 0."""
_FILES: Final = 256
"""Files whose extents are kept."""
_BLOCK_POSITIONS: Final = 1 << 16
"""More than there are entries in any directory block."""
_TRUSTED: Final = b"trusted."
_NAME_MAX: Final = 255


class File:
    """A regular file's bytes: all of them in ``inline``, or at ``extents``."""

    def __init__(self, node: Node) -> None:
        self.size = node.size
        self.inline = node.inline()
        self.extents: Sequence[Extent] = node.extents()


class Directory:
    """An open directory, of which one block is decoded at a time: it may have a million entries."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._blocks = node.dir_blocks()
        self._decoded = -1
        self._entries: list[Entry] = []

    def entries(self, position: int) -> Iterator[tuple[Entry, int]]:
        """Entries from ``position`` on, each with the position behind it; 0 is the first's."""
        first, skipped = divmod(position, _BLOCK_POSITIONS)
        for block in range(first, len(self._blocks)):
            if block != self._decoded:
                self._entries = [entry for _, entry in self._node.block_entries(*self._blocks[block])]
                self._decoded = block
            for number in range(skipped, len(self._entries)):
                yield self._entries[number], block * _BLOCK_POSITIONS + number + 1
            skipped = 0


class Tree(pyfuse3.Operations):
    """All of ``index``, with file data from ``content``."""

    supports_dot_lookup = True
    enable_acl = True

    def __init__(self, index: Index, content: Content) -> None:
        super().__init__()
        self._index = index
        self._content = content
        self._root = index.root.nid
        self._directories: dict[int, Directory] = {}
        self._open: dict[int, File] = {}
        self._handles = itertools.count(1)
        self._file = lru_cache(_FILES)(lambda nid: File(index.node(nid)))

    # --- inodes ------------------------------------------------------------------------------------------------------

    @answering
    async def lookup(self, parent: int, name: bytes, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:  # noqa: ARG002
        try:
            directory = self._node(parent)
        except FormatError:  # a file handle of NFS or open_by_handle_at(2), made for another image
            raise pyfuse3.FUSEError(errno.ESTALE) from None
        if name == b".":
            return self._attributes(directory)
        if name == b"..":
            return self._attributes(self._index.node(next(nid for _, (n, nid, _) in directory.entries() if n == name)))
        found = directory.child(name)
        return _absent() if found is None else self._attributes(found)

    @answering
    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:  # noqa: ARG002
        return self._attributes(self._node(inode))

    @answering
    async def readlink(self, inode: int, ctx: pyfuse3.RequestContext) -> bytes:  # noqa: ARG002
        return self._node(inode).readlink()

    @answering
    async def getxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:  # noqa: ARG002
        for other, value in self._node(inode).xattrs():
            if other == name:
                return value
        raise pyfuse3.FUSEError(pyfuse3.ENOATTR)

    @answering
    async def listxattr(self, inode: int, ctx: pyfuse3.RequestContext) -> Sequence[bytes]:
        names = [name for name, _ in self._node(inode).xattrs()]
        # as the kernel's own file systems: only an administrator is shown these
        return names if ctx.uid == 0 else [name for name in names if not name.startswith(_TRUSTED)]

    @answering
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:  # noqa: ARG002
        index = self._index
        facts = pyfuse3.StatvfsData()
        facts.f_bsize = facts.f_frsize = index.block_size
        facts.f_blocks = index.superblock.blocks_lo + sum(device.blocks for device in index.devices)
        facts.f_files = index.superblock.inos
        facts.f_namemax = _NAME_MAX
        return facts

    # --- directories -------------------------------------------------------------------------------------------------

    @answering
    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:  # noqa: ARG002
        handle = next(self._handles)
        self._directories[handle] = Directory(self._node(inode))
        return handle

    @answering
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        for (name, nid, _), behind in self._directories[fh].entries(start_id):
            if not pyfuse3.readdir_reply(token, name, self._attributes(self._index.node(nid)), behind):
                break

    @answering
    async def releasedir(self, fh: int) -> None:
        del self._directories[fh]

    # --- files -------------------------------------------------------------------------------------------------------

    @answering
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:  # noqa: ARG002
        handle = next(self._handles)
        self._open[handle] = self._file(self._nid(inode))
        return pyfuse3.FileInfo(fh=handle, keep_cache=True)

    @answering
    async def read(self, fh: int, off: int, size: int) -> bytes:
        file = self._open[fh]
        if file.inline is not None:
            return file.inline[off : off + size]
        pieces = pieces_of(file.extents, off, min(size, file.size - off))
        return cast(bytes, await self._content.read(pieces)) if pieces else b""  # pyfuse3 takes any buffer

    @answering
    async def release(self, fh: int) -> None:
        del self._open[fh]

    # --- numbers -----------------------------------------------------------------------------------------------------

    def _nid(self, inode: int) -> int:
        if inode == pyfuse3.ROOT_INODE:
            return self._root
        if inode == self._root:
            return pyfuse3.ROOT_INODE
        return 0 if inode == _ZERO else inode

    def _inode(self, nid: int) -> int:
        if nid == self._root:
            return pyfuse3.ROOT_INODE
        if nid == pyfuse3.ROOT_INODE:
            return self._root or _ZERO
        return nid or _ZERO

    def _node(self, inode: int) -> Node:
        return self._index.node(self._nid(inode))

    def _attributes(self, node: Node) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = self._inode(node.nid)
        entry.generation = 0
        entry.entry_timeout = entry.attr_timeout = FOREVER
        entry.st_mode = node.mode
        entry.st_nlink = node.nlink
        entry.st_uid = node.uid
        entry.st_gid = node.gid
        entry.st_rdev = node.rdev
        entry.st_size = node.size
        entry.st_blksize = self._index.block_size
        entry.st_blocks = -(-node.size // self._index.block_size) * self._index.block_size // 512
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = node.mtime
        return entry


def _absent() -> pyfuse3.EntryAttributes:
    """That there is nothing, which the kernel may remember, too."""
    entry = pyfuse3.EntryAttributes()
    entry.st_ino = 0
    entry.entry_timeout = FOREVER
    entry.st_mode = stat.S_IFREG
    return entry
