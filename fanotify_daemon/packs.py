"""A pack under a mark, as the plane sees it: which inode it is, and whether a range of it is there."""

from __future__ import annotations

import fcntl
import os
from bisect import bisect_right
from pathlib import Path

from erofsgen.errors import StorageError
from erofsgen.host.cache.frames import frame_starts
from erofsgen.host.cache.presence import Presence
from erofsgen.host.daemon.streams import Streams


class MarkedPack:
    """The pack whose data file is ``data``; its map and TOC lie beside it. Raises StorageError, FormatError.

    ``descriptor`` writes to the data file without raising events, -1 until an event has brought one. ``making``:
    mounts being made that will use it. ``following``: the pack in the next device slot of the image mounted last, where
    large files go on. ``read_ahead``: bytes to bring ahead of a sequential reader at most.
    """

    def __init__(self, data: Path, read_ahead: int) -> None:
        self.data = data
        self.hex = data.stem
        self.making: set[str] = set()
        self.descriptor = -1
        self.following: str | None = None
        self.streams = Streams(read_ahead)
        try:
            status = os.stat(data)
            toc = data.with_suffix(".toc").read_bytes()
        except OSError as error:
            raise StorageError(f"{error.filename}: {error.strerror}", hint="run `erofsgen pull` again") from error
        self.inode = (status.st_dev, status.st_ino)
        self._starts = frame_starts(toc, what=f"pack {self.hex}")
        if status.st_size != self._starts[-1]:
            raise StorageError(f"{data}: {status.st_size} bytes, {self._starts[-1]} expected")
        self._presence = Presence.open(data.with_suffix(".map"), len(self._starts) - 1)
        fcntl.flock(self._presence.fileno(), fcntl.LOCK_SH)  # so that nothing of it is evicted

    @property
    def device_size(self) -> int:
        """Bytes of the device."""
        return self._starts[-1]

    @property
    def complete(self) -> bool:
        """Whether all of it is there."""
        return self._presence.complete

    def ready(self, offset: int, count: int) -> bool:
        """Whether device bytes ``[offset, offset + count)`` are there, which are being used. What lies outside is."""
        starts = self._starts
        end = min(offset + count, starts[-1])
        if offset >= end:
            return True
        first = bisect_right(starts, offset) - 1
        # Most reads lie in one frame, or reach into the next
        last = first if end <= starts[first + 1] else bisect_right(starts, end - 1) - 1
        self._presence.touch(first, last)
        return self._presence.ready(first, last)

    def close(self) -> None:
        """Let go of its files."""
        self._presence.close()
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
