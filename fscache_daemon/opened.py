"""Objects in use, as the plane sees them: an index, which is here already, and a pack, which is read lazily."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from erofsgen.errors import StorageError
from erofsgen.host.cache.files import PackFiles
from erofsgen.host.cache.objects import Key, Objects
from erofsgen.host.daemon.lazypack import LazyPack

PAGE: Final = mmap.PAGESIZE
_PIECE: Final = 1 << 20
"""Bytes of an index that are written at once: metadata is read page by page, and each page would be asked for."""


class OpenIndex:
    """The index ``path`` as the object ``key``, filled through ``descriptor``. Raises StorageError."""

    def __init__(self, key: Key, path: Path, descriptor: int) -> None:
        self.key = key
        self.descriptor = descriptor
        try:
            self._source = os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # and so it is in use
        except OSError as error:
            raise StorageError(f"{path}: {error.strerror}", hint="run `erofsgen pull` again") from error
        self.size = os.fstat(self._source).st_size

    def supply(self, offset: int, length: int) -> None:
        """Write a range, and what is around it. Raises OSError."""
        start = offset // _PIECE * _PIECE
        end = min(-(-(offset + length) // _PIECE) * _PIECE, self.size)
        with mmap.mmap(-1, -(-(end - start) // PAGE) * PAGE) as buffer:  # aligned, for direct I/O, and zeros behind
            if os.preadv(self._source, [memoryview(buffer)[: end - start]], start) != end - start:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            os.pwrite(self.descriptor, buffer, start)

    def close(self) -> None:
        """Let go of everything."""
        os.close(self._source)
        os.close(self.descriptor)


class OpenPack(LazyPack):
    """The pack in ``files`` as the object ``key``. Raises StorageError, FormatError.

    Whether the object that the kernel took is the one its map tells of is known only when the kernel has it, at the
    first read: it makes a new one where it does not like the old (fs/cachefiles/xattr.c).
    """

    def __init__(self, key: Key, files: PackFiles, objects: Objects, descriptor: int, read_ahead: int) -> None:
        self.key = key
        self.map = objects.map(key)
        self.closed_at = 0.0
        self._seen = False
        try:
            self.map.parent.mkdir(mode=0o700, exist_ok=True)
            self._in_use = os.open(files.map, os.O_RDONLY | os.O_CLOEXEC)
            fcntl.flock(self._in_use, fcntl.LOCK_SH)  # nobody removes the pack
        except OSError as error:
            raise StorageError(f"{error.filename}: {error.strerror}", hint="run `erofsgen pull` again") from error
        try:
            super().__init__(files.hex, files.toc, self.map, read_ahead)
        except BaseException:
            os.close(self._in_use)
            raise
        self.descriptor = descriptor
        self.size = self.device_size

    def look(self) -> bool:
        """Compare the map with the object, once: frames of which the object lacks anything are missing.

        False: the kernel has no object yet.
        """
        if not self._seen:
            try:
                os.lseek(self.descriptor, 0, os.SEEK_HOLE)
            except OSError as error:
                if error.errno == errno.ENOBUFS:
                    return False
            frames = [frame for frame in range(len(self.starts) - 1) if self.presence.ready(frame, frame)]
            self._lacks(frames)
            self._seen = True
        return True

    def truly_ready(self, offset: int, length: int) -> bool:
        """Whether a range is there that the kernel asks for: it does so because it saw a hole a moment ago."""
        if not self.ready(offset, length):
            return False
        self._lacks(self.frames(offset, length))
        return self.ready(offset, length)

    def frames(self, offset: int, length: int) -> range:
        """The frames that hold a range."""
        first = self.frame_at(offset)
        return range(first, self.frame_at(min(offset + length, self.device_size) - 1) + 1)

    def close(self) -> None:
        """Let go of everything."""
        super().close()
        os.close(self._in_use)
        os.close(self.descriptor)
        self.descriptor = -1
        self.closed_at = time.monotonic()

    def _lacks(self, frames: range | list[int]) -> None:
        """Take the marks of those of ``frames`` back of which the object lacks anything."""
        absent = [frame for frame in frames if self._hole(self.starts[frame]) < self.starts[frame + 1]]
        if absent:
            self.presence.mark_absent(absent)

    def _hole(self, start: int) -> int:
        """Where the first hole at or behind ``start`` begins."""
        with suppress(OSError):
            return os.lseek(self.descriptor, start, os.SEEK_HOLE)
        return start
