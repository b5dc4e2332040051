"""A pack that somebody reads lazily, as a plane sees it: whether a range is there, and who reads it in order."""

from __future__ import annotations

from bisect import bisect_right
from pathlib import Path

from erofsgen.errors import StorageError
from erofsgen.host.cache.frames import frame_starts
from erofsgen.host.cache.presence import Presence
from erofsgen.host.daemon.streams import Streams


class LazyPack:
    """The pack with the table of contents ``toc`` and the presence map ``map``. Raises StorageError, FormatError.

    ``descriptor`` writes to its bytes, -1 until there is one, and is closed with it. ``following``: the pack in the
    next device slot of the image mounted last, where large files go on. ``read_ahead``: bytes to bring ahead of a
    sequential reader at most.
    """

    def __init__(self, name: str, toc: Path, map: Path, read_ahead: int) -> None:  # noqa: A002  (its word)
        self.hex = name
        self.descriptor = -1
        self.following: str | None = None
        self.streams = Streams(read_ahead)
        try:
            data = toc.read_bytes()
        except OSError as error:
            raise StorageError(f"{toc}: {error.strerror}", hint="run `erofsgen pull` again") from error
        self.starts = frame_starts(data, what=f"pack {self.hex}")
        self.presence = Presence.open(map, len(self.starts) - 1)

    @property
    def device_size(self) -> int:
        """Bytes of the device."""
        return self.starts[-1]

    @property
    def complete(self) -> bool:
        """Whether all of it is there."""
        return self.presence.complete

    def ready(self, offset: int, count: int) -> bool:
        """Whether device bytes ``[offset, offset + count)`` are there, which are being used. What lies outside is."""
        starts = self.starts
        end = min(offset + count, starts[-1])
        if offset >= end:
            return True
        first = self.frame_at(offset)
        # Most reads lie in one frame, or reach into the next
        last = first if end <= starts[first + 1] else self.frame_at(end - 1)
        self.presence.touch(first, last)
        return self.presence.ready(first, last)

    def read(self, offset: int, length: int, following: LazyPack | None = None) -> list[tuple[LazyPack, int, int]]:
        """Somebody reads device bytes ``[offset, offset + length)``; what to bring ahead of that, if anything.

        That is ranges of this pack, and of ``following``, the one where large files go on.
        """
        ahead = self.streams.read(offset, length)
        if ahead is None:
            return []
        wanted: list[tuple[LazyPack, int, int]] = []
        start, size = ahead
        if not self.ready(start, size):
            wanted.append((self, start, min(size, self.device_size - start)))
        beyond = start + size - self.device_size
        if beyond > 0 and following is not None:
            following.streams.continued(beyond)
            if not following.ready(0, beyond):
                wanted.append((following, 0, beyond))
        return wanted

    def frame_at(self, offset: int) -> int:
        """The frame that holds the device's byte ``offset``."""
        return bisect_right(self.starts, offset) - 1

    def close(self) -> None:
        """Let go of its files."""
        self.presence.close()
