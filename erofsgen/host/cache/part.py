"""Files of the cache that are written once, as a whole: indexes and flat images.

Nothing is written before its digest was checked, and a file gets its name when all of it is written, not when all of it
is on the disk: on a slow disk that would be most of a mount's time. Until it is, the file carries the id of the boot
that wrote it (``user.erofsgen.boot``), and counts in that boot only: the page cache has its bytes. In any later boot it
is a ``.part`` again, like those that a crash leaves. The mark goes once the file is synced, a minute later at the
earliest, when that costs nothing, by whoever mounts or unmounts then. A file system without extended attributes has
files synced before they get their names.

Locks: the ``.part`` file itself, exclusive, by whoever writes it; others wait, then find the work done. A process holds
one at a time.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final

from erofsgen.errors import StorageError
from erofsgen.host import linux

_BOOT: Final = "user.erofsgen.boot"
"""Extended attribute of a file that may not be on the disk yet: id of the boot that wrote it."""

_SETTLED: Final = 60
"""Seconds after which the kernel has written a file by itself: dirty_expire_centisecs, and then some."""


def settle(paths: Iterable[Path]) -> None:
    """Sync files that have been written long enough ago for that to cost nothing; they count in every boot then.

    A file that cannot be synced does not hold what it should: it is removed.
    """
    for path in paths:
        with storage(path), suppress(FileNotFoundError):  # another process found it bad
            if _boot_of(path) is None or time.time() - os.stat(path).st_mtime < _SETTLED:
                continue
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fdatasync(descriptor)
            except OSError:
                os.unlink(path)
                raise
            finally:
                os.close(descriptor)
            with suppress(OSError):  # another process was first
                os.removexattr(path, _BOOT)


def _counts(path: Path) -> bool:
    """Whether a file is there and its bytes are known to be right."""
    with storage(path):
        try:
            os.stat(path)
            return _boot_of(path) in (None, linux.boot_id())
        except FileNotFoundError:
            return False


def _boot_of(path: Path) -> str | None:
    try:
        return os.getxattr(path, _BOOT).decode()
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.EOPNOTSUPP):
            return None
        raise


class Part:
    """A file being made, locked. It is ``path`` after :meth:`commit`, and gone when left without.

    ``found``: a crash or another boot left it, and some of its frames may be right. Left without commit it stays.
    """

    def __init__(self, path: Path, part: Path, descriptor: int, *, suspect: bool) -> None:
        self.path = path
        self.descriptor = descriptor
        self.found = os.fstat(descriptor).st_size > 0
        self._part = part
        self._suspect = suspect

    @classmethod
    def open(cls, path: Path) -> Part | None:
        """Begin to make ``path``, after whoever else is at it. None: it is there."""
        part = path.with_name(path.name + ".part")
        while not _counts(path):
            with storage(part), ExitStack() as undo:
                descriptor = _open_locked(part)
                undo.callback(os.close, descriptor)
                # while this process waited, the file may have been committed or dropped
                if not _is(part, descriptor):
                    continue
                if _counts(path):
                    os.unlink(part)
                    continue
                if path.exists():
                    # another boot's: that becomes the file being made, locked before it is where others look for one
                    return cls(path, part, _take_over(path, part), suspect=True)
                undo.pop_all()
                return cls(path, part, descriptor, suspect=False)
        return None

    def resize(self, size: int) -> None:
        with storage(self._part):
            os.ftruncate(self.descriptor, size)

    def write(self, data: bytes | memoryview, offset: int) -> None:
        view = memoryview(data)
        with storage(self._part):
            while view:
                written = os.pwrite(self.descriptor, view, offset)
                offset += written
                view = view[written:]

    def read(self, offset: int, length: int) -> bytes:
        """What is there; less than ``length`` at the end."""
        with storage(self._part):
            return os.pread(self.descriptor, length, offset)

    def commit(self) -> None:
        """Give the file its name."""
        with storage(self._part):
            if self._suspect:
                os.fdatasync(self.descriptor)
                os.removexattr(self.descriptor, _BOOT)
            elif not _mark(self.descriptor):
                os.fdatasync(self.descriptor)
            os.rename(self._part, self.path)
        self._close()

    def drop(self) -> None:
        """Give up, unless the file was committed."""
        if self.descriptor >= 0:
            if not self.found:
                with suppress(OSError):
                    os.unlink(self._part)
            self._close()

    def _close(self) -> None:
        os.close(self.descriptor)
        self.descriptor = -1

    def __enter__(self) -> Part:
        return self

    def __exit__(self, *exc: object) -> None:
        self.drop()


def _mark(descriptor: int) -> bool:
    """Let a file count in this boot only. False where the file system cannot keep that."""
    try:
        os.setxattr(descriptor, _BOOT, linux.boot_id().encode())
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        return False
    return True


def _open_locked(path: Path) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _take_over(path: Path, part: Path) -> int:
    descriptor = _open_locked(path)
    try:
        os.rename(path, part)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _is(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


@contextmanager
def storage(path: Path) -> Iterator[None]:
    """Turns an OSError about ``path`` into the user's line."""
    try:
        yield
    except OSError as error:
        hint = None
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            hint = "free some space, or choose another directory with --root"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            hint = "run as root, or choose another directory with --root"
        raise StorageError(f"{path}: {error.strerror}", hint=hint) from error
