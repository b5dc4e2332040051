"""A pack of the host cache, opened: the fill engine's target.

Bytes are in the data file before their frame is marked, room is reserved before they are written. Frames of another
boot count again once their bytes were compared with their digests, which needs nothing from a store.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Iterable
from typing import Final

from blake3 import blake3

from erofsgen.errors import StorageError
from erofsgen.host import linux
from erofsgen.host.cache.files import PackFiles
from erofsgen.host.cache.presence import Presence
from erofsgen.host.cache.room import FRAME_COST, Room
from erofsgen.pack.toc import Toc

_SETTLED: Final = 60
"""Seconds after which the kernel has written most by itself: dirty_expire_centisecs, and then some."""


_READ: Final = 10.0
"""Seconds after which a frame that was wanted has been read from the data file."""
_FORGOTTEN: Final = 300.0
"""Seconds after which the page cache is left to decide."""


class PackFile:
    """The pack in ``files``. Safe for threads. Raises StorageError.

    ``descriptor``: writes go through it, and it is closed with the pack; None: the file is opened. A file under a
    fanotify mark must be written through a descriptor that raises no events.
    """

    def __init__(self, files: PackFiles, toc: Toc, room: Room, *, descriptor: int | None = None) -> None:
        self.files = files
        self.name = files.hex
        self.toc = toc
        self._room = room
        self._written_at = 0.0
        self._cached: dict[int, float] = {}  # frames in the page cache by our writing, and since when
        self._lock = threading.Lock()
        try:
            self.descriptor = os.open(files.data, os.O_RDWR | os.O_CLOEXEC) if descriptor is None else descriptor
        except OSError as error:
            raise StorageError(f"{files.data}: {error.strerror}") from error
        self.presence = Presence.open(files.map, len(toc))
        self.ready = self.presence.ready
        self.missing = self.presence.missing

    def frames(self, offset: int, length: int) -> range:
        """The frames that hold a range of the device; what lies outside of it is left out."""
        return self.toc.frames(offset, min(length, self.toc.device_size - offset))

    def suspects(self, offset: int, length: int) -> list[int]:
        """Frames of a range that :meth:`recover` may find."""
        suspects = self.presence.suspects()
        if not suspects:
            return []
        frames = self.frames(offset, length)
        return [frame for frame in suspects if frame in frames]

    def recover(self, frames: Iterable[int]) -> None:
        """Let frames of another boot count whose bytes are right, and the others no more."""
        wrong = []
        for frame in frames:
            if self.is_right(frame):
                self.presence.mark_written(frame)
            else:
                wrong.append(frame)
        if wrong:
            self.presence.mark_absent(wrong)

    def is_right(self, frame: int) -> bool:
        """Whether the file holds a frame's bytes."""
        try:
            data = os.pread(self.descriptor, int(self.toc.device_sizes[frame]), int(self.toc.device_offsets[frame]))
        except OSError:
            return False
        return blake3(data).digest() == self.toc.digest(frame)

    def write_frame(self, frame: int, data: bytes) -> None:
        """Take a frame's verified bytes. It is there when this returns."""
        fresh = not self.ready(frame, frame)  # power may have taken the room of one of another boot, too
        if fresh:
            self._room.reserve(len(data) + FRAME_COST)
        try:
            self._write(memoryview(data), int(self.toc.device_offsets[frame]))
            self.presence.mark_written(frame)
        except BaseException:
            if fresh:
                self._punch(frame)
            raise
        now = time.monotonic()
        with self._lock:
            self._written_at = now
            self._cached[frame] = now

    def overwrite(self, frame: int, data: bytes) -> None:
        """Repair a frame in place: readers see its old bytes or its new ones, never a hole."""
        self.presence.mark_written(frame)  # no longer durable: power may leave half of it
        self._write(memoryview(data), int(self.toc.device_offsets[frame]))
        self.presence.mark_written(frame)

    def evict(self, frames: Iterable[int]) -> int:
        """Give frames' room back, returns how much. Nobody may be reading the file, nor begin to."""
        taken = [frame for frame in frames if self.presence.occupied(frame)]
        self.presence.mark_absent(taken)
        return sum(self._punch(frame) for frame in taken)

    def settle(self) -> None:
        """Make frames durable that were written a while ago."""
        if self._written_at and time.monotonic() - self._written_at > _SETTLED:
            self._written_at = 0.0
            self.presence.make_durable(lambda: os.fdatasync(self.descriptor))

    def uncache(self) -> None:
        """Take frames out of the page cache that were read a while ago: EROFS keeps its own copy of what was read.

        What nobody has used yet stays for who it was brought for. The first call for a frame has the kernel write it,
        the next drops it (mm/fadvise.c, POSIX_FADV_DONTNEED).
        """
        now = time.monotonic()
        with self._lock:
            due = [frame for frame, since in self._cached.items() if now - since > _READ]
        uses = self.presence.last_uses() if due else []
        for frame in due:
            if uses[frame]:
                start, size = int(self.toc.device_offsets[frame]), int(self.toc.device_sizes[frame])
                os.posix_fadvise(self.descriptor, start, size, os.POSIX_FADV_DONTNEED)
            if now - self._cached[frame] > _FORGOTTEN or (uses[frame] and now - self._cached[frame] > 2 * _READ):
                with self._lock:
                    del self._cached[frame]

    def close(self) -> None:
        """Let go of the files."""
        self.presence.close()
        os.close(self.descriptor)

    def _write(self, view: memoryview, offset: int) -> None:
        try:
            while view:
                written = os.pwrite(self.descriptor, view, offset)
                offset += written
                view = view[written:]
        except OSError as error:
            hint = "free some space, or set --max-bytes" if error.errno in (errno.ENOSPC, errno.EDQUOT) else None
            raise StorageError(f"{self.files.data}: {error.strerror}", hint=hint) from error

    def _punch(self, frame: int) -> int:
        size = int(self.toc.device_sizes[frame])
        try:
            linux.punch_hole(self.descriptor, int(self.toc.device_offsets[frame]), size)
        except OSError:
            return 0  # the room stays taken; the next count sees
        self._room.give_back(size + FRAME_COST)
        return size
