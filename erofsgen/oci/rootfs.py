"""A directory as a layer (``dir:``): the entries a tar archive of it would have, in byte order of names.

Nothing is interpreted: ``.wh.`` files and 0:0 devices are files like others. Other file systems mounted below the
directory are left out, as ``tar --one-file-system`` does; their mount points become empty directories.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np

from erofsgen.erofs.tree import Inode
from erofsgen.errors import NotFoundError, StorageError
from erofsgen.oci.layer import LINK, PUT, Entry, FileData
from erofsgen.oci.names import show
from erofsgen.oci.sparse import add_holes
from erofsgen.oci.xattrs import Xattrs, collect, suited

_NO_XATTRS: Final = frozenset((errno.ENOTSUP, errno.EOPNOTSUPP))
_DENIED: Final = frozenset((errno.EACCES, errno.EPERM))


class RootfsReader:
    """The entries of a directory tree, the directory itself first; see :class:`erofsgen.oci.layer.LayerReader`.

    Of the security attributes only ``security.capability`` is kept: labels and signatures are this machine's. Raises
    NotFoundError (no such directory), StorageError (unreadable, or changed while it was read; names the path).
    """

    def __init__(self, path: Path) -> None:
        self._root = os.fsencode(path)
        self._links: dict[tuple[int, int], bytes] = {}
        self._holes = 0
        self._device = 0

    def __iter__(self) -> Iterator[tuple[Entry, FileData | None]]:
        try:
            status = os.stat(self._root)
        except FileNotFoundError:
            raise NotFoundError(f"{show(self._root)}: no such directory") from None
        except OSError as error:
            raise _refused(self._root, error) from None
        if not stat.S_ISDIR(status.st_mode):
            raise NotFoundError(f"{show(self._root)}: not a directory")
        self._device = status.st_dev
        # a trailing slash, so that a root given as a symlink is read as the directory it is to
        yield Entry(b"", PUT, self._inode(self._root + b"/", status)), None
        listings = [self._list(self._root, b"")]
        while listings:
            for path, full, status in listings[-1]:
                yield self._entry(path, full, status)
                if stat.S_ISDIR(status.st_mode):
                    listings.append(self._list(full, path + b"/"))
                    break
            else:
                listings.pop()

    def _list(self, directory: bytes, prefix: bytes) -> Iterator[tuple[bytes, bytes, os.stat_result]]:
        """(path in the image, path on disk, status) of what is in ``directory``; nothing if it is a mount point."""
        try:
            if prefix and os.lstat(directory).st_dev != self._device:
                return
            with os.scandir(directory) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError as error:
            raise _refused(directory, error) from None
        for entry in entries:
            try:
                status = entry.stat(follow_symlinks=False)
            except OSError as error:
                raise _refused(entry.path, error) from None
            yield prefix + entry.name, entry.path, status

    def _entry(self, path: bytes, full: bytes, status: os.stat_result) -> tuple[Entry, FileData | None]:
        inode = self._inode(full, status)
        if status.st_nlink > 1 and not stat.S_ISDIR(status.st_mode):
            first = self._links.setdefault((status.st_dev, status.st_ino), path)
            if first != path:
                return Entry(path, LINK, inode, first), None
        if not stat.S_ISREG(status.st_mode):
            return Entry(path, PUT, inode), None
        inode.size = status.st_size
        allocated = status.st_blocks * 512
        if allocated < status.st_size:
            self._holes = add_holes(self._holes, status.st_size - allocated)
        return Entry(path, PUT, inode), _File(full, status)

    def _inode(self, full: bytes, status: os.stat_result) -> Inode:
        mode = status.st_mode
        inode = Inode(mode, status.st_uid, status.st_gid, status.st_mtime_ns)
        try:
            if stat.S_ISLNK(mode):
                inode.data = os.readlink(full)
            elif stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
                inode.rdev = status.st_rdev
            inode.xattrs = suited(_xattrs(full), mode)
        except OSError as error:
            raise _refused(full, error) from None
        return inode


class _File:
    """The bytes of one regular file; see :class:`erofsgen.oci.layer.FileData`."""

    __slots__ = ("_path", "_status", "size")

    def __init__(self, path: bytes, status: os.stat_result) -> None:
        self._path = path
        self._status = status
        self.size = status.st_size

    def chunks(self, chunk_size: int) -> Iterator[memoryview | None]:
        try:
            yield from self._read(chunk_size)
        except OSError as error:
            raise _refused(self._path, error) from None

    def _read(self, chunk_size: int) -> Iterator[memoryview | None]:
        size = self.size
        sparse = self._status.st_blocks * 512 < size
        data = 0
        file = _open(self._path)
        try:
            self._check(file)
            for start in range(0, size, chunk_size):
                end = min(start + chunk_size, size)
                if sparse and data <= start:
                    data = _next_data(file, start, size)
                if data >= end:
                    yield None
                    continue
                buffer = np.empty(end - start, np.uint8).data
                if not _fill(file, buffer, start):
                    raise self._changed()
                yield buffer.toreadonly()
            self._check(file)
        finally:
            os.close(file)

    def _check(self, file: int) -> None:
        """Raises StorageError unless the open file is the one that was listed, as it was listed."""
        now, then = os.fstat(file), self._status
        if (now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns) != (
            then.st_dev,
            then.st_ino,
            then.st_size,
            then.st_mtime_ns,
        ):
            raise self._changed()

    def _changed(self) -> StorageError:
        return StorageError(f"{show(self._path)} changed while it was read", hint="build from a directory at rest")


def _open(path: bytes) -> int:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        return os.open(path, flags | os.O_NOATIME)
    except PermissionError:  # only a file's owner may leave its access time alone
        return os.open(path, flags)


def _next_data(file: int, start: int, size: int) -> int:
    """Offset of the first byte at or after ``start`` that is not in a hole; ``size`` if there is none."""
    try:
        return os.lseek(file, start, os.SEEK_DATA)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return size


def _fill(file: int, buffer: memoryview, offset: int) -> bool:
    """Fill ``buffer`` from ``offset`` on. False if the file ends before."""
    filled = 0
    while filled < len(buffer):
        count = os.preadv(file, [buffer[filled:]], offset + filled)
        if not count:
            return False
        filled += count
    return True


def _xattrs(path: bytes) -> Xattrs:
    try:
        names = os.listxattr(path, follow_symlinks=False)
    except OSError as error:
        if error.errno in _NO_XATTRS:
            return ()
        raise
    kept = [name for name in names if not name.startswith("security.") or name == "security.capability"]
    if not kept:
        return ()
    return collect([(os.fsencode(name), os.getxattr(path, name, follow_symlinks=False)) for name in kept])


def _refused(path: bytes, error: OSError) -> StorageError:
    return StorageError(
        f"{show(path)}: {error.strerror}", hint="read the directory as root" if error.errno in _DENIED else None
    )
