"""A pack in the kernel's own cache, opened: the fill engine's target for the fscache plane.

Its descriptor only writes, by direct I/O: whole pages, from memory that is aligned. What is written is there for the
kernel; the map says the same to us, so that nobody has to look for holes.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final

from blake3 import blake3

from erofsgen.errors import StorageError
from erofsgen.host.cache.files import PackFiles
from erofsgen.host.cache.presence import Presence
from erofsgen.host.cache.room import FRAME_COST, Room
from erofsgen.pack.toc import Toc

_PAGE: Final = mmap.PAGESIZE
_BUFFER: Final = 1 << 20
_FULL: Final = (errno.ENOSPC, errno.ENOBUFS, errno.EDQUOT)
"""ENOBUFS: less free space than the kernel leaves to others (``bstop``), or the object is gone."""


class ObjectFile:
    """The object of the pack in ``files``, which has the presence map ``map`` and is written through ``descriptor``.

    The descriptor is closed with it. Frames that the host cache has already are taken from there. Safe for threads.
    Raises StorageError.
    """

    def __init__(self, files: PackFiles, toc: Toc, room: Room, *, map: Path, descriptor: int) -> None:  # noqa: A002
        self.files = files
        self.name = files.hex
        self.toc = toc
        self.descriptor = descriptor
        self._room = room
        self.presence = Presence.open(map, len(toc))
        try:
            self._local = Presence.open(files.map, len(toc))
        except BaseException:
            self.presence.close()
            raise
        self.ready = self.presence.ready
        self.missing = self.presence.missing

    def suspects(self, offset: int, length: int) -> list[int]:
        """Frames of a range that :meth:`recover` may find in the host cache."""
        frames = self.toc.frames(offset, min(length, self.toc.device_size - offset))
        return [frame for frame in self.missing(frames) if self._local.occupied(frame)]

    def recover(self, frames: Iterable[int]) -> None:
        """Take frames from the host cache, where they are right."""
        with suppress(OSError), self.files.data.open("rb") as data:
            for frame in frames:
                size, start = int(self.toc.device_sizes[frame]), int(self.toc.device_offsets[frame])
                found = os.pread(data.fileno(), size, start)
                if blake3(found).digest() == self.toc.digest(frame):
                    self.write_frame(frame, found)

    def write_frame(self, frame: int, data: bytes) -> None:
        """Take a frame's verified bytes. It is there when this returns."""
        fresh = not self.ready(frame, frame)
        if fresh:
            self._room.reserve(len(data) + FRAME_COST)
        try:
            self._write(data, int(self.toc.device_offsets[frame]))
            self.presence.mark_written(frame)
        except BaseException:
            if fresh:
                self._room.give_back(len(data) + FRAME_COST)
            raise

    def settle(self) -> None:
        """Nothing: the kernel keeps nothing of it before it is closed."""

    def uncache(self) -> None:
        """Nothing: direct I/O leaves no copy in the page cache."""

    def close(self) -> None:
        """Let go of the files."""
        self.presence.close()
        self._local.close()
        os.close(self.descriptor)

    def _write(self, data: bytes, offset: int) -> None:
        try:
            self._write_pages(data, offset)
        except OSError as error:
            hint = "free some space on the cache's disk" if error.errno in _FULL else None
            raise StorageError(f"pack {self.name}: fscache: {error.strerror}", hint=hint) from error

    def _write_pages(self, data: bytes, offset: int) -> None:
        size = -(-len(data) // _PAGE) * _PAGE
        with _aligned(size) as view:
            view[: len(data)] = data
            view[len(data) :] = bytes(size - len(data))
            try:
                self._write_once(view, offset)
            except OSError as error:
                if error.errno not in _FULL or not self._room.make(size):
                    raise
                self._write_once(view, offset)

    def _write_once(self, view: memoryview, offset: int) -> None:
        if os.pwrite(self.descriptor, view, offset) < len(view):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


_buffers: Final = threading.local()


def _aligned(size: int) -> memoryview:
    """``size`` bytes of this thread's memory, on a page's boundary; whatever was in them."""
    buffer = getattr(_buffers, "buffer", None)
    if buffer is None or len(buffer) < size:
        buffer = _buffers.buffer = mmap.mmap(-1, max(size, _BUFFER))
    return memoryview(buffer)[:size]
