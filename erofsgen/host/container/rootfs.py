"""Looking into the root file system of a container from outside, which nobody has vetted.

Every path is resolved with the root file system as ``/`` (openat2(2), ``RESOLVE_IN_ROOT``), and only regular files are
opened for reading: a link to the host's ``/etc/shadow`` finds the image's, and no device or FIFO is touched.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from erofsgen.errors import FormatError, StorageError
from erofsgen.host import linux

_READ_LIMIT: Final = 16 << 20
_ABSENT: Final = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)


class Rootfs:
    """The root file system at ``path``. Paths inside are absolute, or count from its root."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, path: str) -> bytes | None:
        """A regular file's bytes; None where there is no such file. Raises FormatError for one that is absurdly large,
        StorageError."""
        with self._open(path) as found:
            if found is None or not stat.S_ISREG(os.fstat(found).st_mode):
                return None
            with open(f"/proc/self/fd/{found}", "rb") as file:
                data = file.read(_READ_LIMIT + 1)
        if len(data) > _READ_LIMIT:
            raise FormatError(f"{path} of the image is larger than {_READ_LIMIT} bytes")
        return data

    def has_program(self, path: str) -> bool:
        """Whether ``path`` is a regular file that somebody may execute."""
        with self._open(path) as found:
            mode = 0 if found is None else os.fstat(found).st_mode
        return stat.S_ISREG(mode) and bool(mode & 0o111)

    def make_directory(self, path: str) -> None:
        """Make a directory and its parents where they are missing, for everybody to enter.

        Raises StorageError where something else is in the way.
        """
        done = ""
        for name in filter(None, path.split("/")):
            with self._open(done or "/") as parent, self._open(f"{done}/{name}") as found:
                if found is None and parent is not None:
                    try:
                        os.mkdir(name, 0o755, dir_fd=parent)
                    except OSError as error:  # EEXIST: a link that leads nowhere
                        raise StorageError(f"{done}/{name} in the image: {error.strerror}") from error
            done = f"{done}/{name}"
        with self._open(done or "/") as found:
            if found is None or not stat.S_ISDIR(os.fstat(found).st_mode):
                raise StorageError(f"{path} in the image: not a directory")

    @contextmanager
    def _open(self, path: str) -> Iterator[int | None]:
        """An ``O_PATH`` descriptor of what ``path`` leads to, None where it leads nowhere."""
        root = os.open(self.path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        found = None
        try:
            try:
                found = linux.open_in_root(root, path, os.O_PATH)
            except OSError as error:
                if error.errno not in _ABSENT:
                    raise StorageError(f"{path} in the image: {error.strerror}") from error
            yield found
        finally:
            os.close(root)
            if found is not None:
                os.close(found)
