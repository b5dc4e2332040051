"""A FUSE server that does nothing but reply: what pyfuse3 and the kernel cost before anything is looked up or read.

``resident.py DIR NAME MIB`` mounts one file, ``NAME`` of ``MIB`` MiB, on ``DIR``. All it holds is one MiB of memory,
which every read is answered from; so not even the memory's bandwidth is in the way.
"""

from __future__ import annotations

import errno
import gc
import mmap
import os
import stat
import sys

import pyfuse3
import trio

MIB = 1 << 20
FILE = pyfuse3.ROOT_INODE + 1
FOREVER = 1 << 30


class Resident(pyfuse3.Operations):
    """A directory with one file."""

    def __init__(self, name: bytes, size: int) -> None:
        super().__init__()
        self._name = name
        self._size = size
        memory = mmap.mmap(-1, MIB)
        memory.write(os.urandom(MIB))
        self._memory = memoryview(memory)

    async def lookup(self, parent: int, name: bytes, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:  # noqa: ARG002
        if parent != pyfuse3.ROOT_INODE or name != self._name:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return self._attributes(FILE)

    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:  # noqa: ARG002
        return self._attributes(inode)

    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:  # noqa: ARG002
        return pyfuse3.FileInfo(fh=inode, keep_cache=True)

    async def read(self, fh: int, off: int, size: int) -> memoryview:  # noqa: ARG002
        return self._memory[: max(0, min(size, self._size - off))]

    def _attributes(self, inode: int) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.entry_timeout = entry.attr_timeout = FOREVER
        if inode == FILE:
            entry.st_mode, entry.st_nlink, entry.st_size = stat.S_IFREG | 0o400, 1, self._size
        else:
            entry.st_mode, entry.st_nlink = stat.S_IFDIR | 0o500, 2
        return entry


def main() -> None:
    target, name, mebibytes = sys.argv[1:]
    pyfuse3.init(Resident(name.encode(), int(mebibytes) * MIB), target, {"fsname=resident", "default_permissions"})
    gc.disable()  # nothing here is in cycles
    try:
        trio.run(pyfuse3.main)
    finally:
        pyfuse3.close(unmount=False)


if __name__ == "__main__":
    main()
