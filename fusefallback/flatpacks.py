"""The blockfuse plane: an image's packs as flat files, below the kernel's EROFS, which sees to everything else.

::

    /<sha256>   a pack's device bytes, one file for each device slot, by the pack's SHA-256
    /flat       index and device bytes one behind the other, for a loop device where the kernel cannot mount files
"""

from __future__ import annotations

import errno
import stat
from collections.abc import Sequence
from typing import Final, NamedTuple, cast

import pyfuse3

from erofsgen.erofs.flatten import Flat
from erofsgen.erofs.node import Extent
from erofsgen.erofs.tree import BLOCK
from erofsgen.host.mount.fuse import FLAT
from fusefallback.answers import FOREVER, answering
from fusefallback.content import Content, ServedPack, pieces_of

_FIRST: Final = pyfuse3.ROOT_INODE + 1


class FlatFile(NamedTuple):
    """A file of the device bytes that ``extents`` name, in order and without gaps."""

    name: bytes
    extents: Sequence[Extent]

    @property
    def size(self) -> int:
        """Bytes."""
        last = self.extents[-1]
        return last.offset + last.length


def pack_files(packs: Sequence[ServedPack]) -> list[FlatFile]:
    """One file for each pack, in the order of device slots."""
    return [FlatFile(pack.hex.encode(), [Extent(0, pack.device_size, slot, 0)]) for slot, pack in enumerate(packs, 1)]


def flat_file(flat: Flat, packs: Sequence[ServedPack]) -> FlatFile:
    """The image in one piece; ``flat.index`` is device 0."""
    extents = [Extent(0, len(flat.index), 0, 0)]
    places = sorted((start * BLOCK, slot) for slot, start in enumerate(flat.starts, 1))
    for start, slot in places:
        end = extents[-1].offset + extents[-1].length
        if start > end:
            extents.append(Extent(end, start - end, None, 0))
        extents.append(Extent(start, packs[slot - 1].device_size, slot, 0))
    return FlatFile(FLAT.encode(), extents)


class FlatPacks(pyfuse3.Operations):
    """``files``, of bytes from ``content``, in one directory. Only their owner and root see them.

    ``direct``: the page cache is left to whoever reads them.
    """

    def __init__(self, content: Content, files: Sequence[FlatFile], *, direct: bool) -> None:
        super().__init__()
        self._direct = direct
        self._content = content
        self._files = files
        self._inodes = {file.name: number for number, file in enumerate(files, _FIRST)}

    @answering
    async def lookup(self, parent: int, name: bytes, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:  # noqa: ARG002
        inode = self._inodes.get(name) if parent == pyfuse3.ROOT_INODE else None
        if inode is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return self._attributes(inode)

    @answering
    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:  # noqa: ARG002
        return self._attributes(inode)

    @answering
    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:  # noqa: ARG002
        return inode

    @answering
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:  # noqa: ARG002
        for number in range(start_id, len(self._files)):
            attributes = self._attributes(_FIRST + number)
            if not pyfuse3.readdir_reply(token, self._files[number].name, attributes, number + 1):
                break

    @answering
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:  # noqa: ARG002
        return pyfuse3.FileInfo(fh=inode, keep_cache=True, direct_io=self._direct)

    @answering
    async def read(self, fh: int, off: int, size: int) -> bytes:
        file = self._files[fh - _FIRST]
        pieces = pieces_of(file.extents, off, min(size, file.size - off))
        return cast(bytes, await self._content.read(pieces)) if pieces else b""  # pyfuse3 takes any buffer

    def _attributes(self, inode: int) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.entry_timeout = entry.attr_timeout = FOREVER
        if inode == pyfuse3.ROOT_INODE:
            entry.st_mode = stat.S_IFDIR | 0o500
            entry.st_nlink = 2
        else:
            entry.st_mode = stat.S_IFREG | 0o400
            entry.st_nlink = 1
            entry.st_size = self._files[inode - _FIRST].size
            entry.st_blocks = entry.st_size // 512
        return entry
