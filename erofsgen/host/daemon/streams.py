"""Read-ahead across a pack: who reads in order, and what to bring before it is asked for.

The kernel's own read-ahead ends with the window it asks for; behind it a sequential reader waits for every fetch. A
*stream* is a place where somebody reads in order. What is to be ahead of it doubles with every step, as in the kernel
(mm/readahead.c), up to a limit, and is asked for again when half of it is used up.
"""

from __future__ import annotations

from typing import Final, NamedTuple

_FIRST_WINDOW: Final = 2 << 20
_STREAMS: Final = 4
"""Places in one pack that are followed at a time; the one idle for longest makes room."""
_BEFORE: Final = 4 << 20
"""Bytes that a read may lie behind the last one and still be of the stream: read-ahead comes out of order."""
_BEHIND: Final = 256 << 10
"""Bytes that a read may skip."""
_LARGE: Final = 1 << 20
"""Bytes to be read in order before anything is brought ahead: small files read one by one are not a stream."""


class Ahead(NamedTuple):
    """Bytes ``[offset, offset + length)`` to bring; they may reach beyond the device."""

    offset: int
    length: int


class _Stream:
    __slots__ = ("ahead", "end", "start", "window")

    def __init__(self, start: int, end: int) -> None:
        self.start = start
        self.end = end  # where the reader is
        self.ahead = end  # up to where bytes were asked for
        self.window = 0


class Streams:
    """The streams of one pack; ``limit``: bytes ahead at most."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._streams: list[_Stream] = []

    def continued(self, ahead: int) -> None:
        """A stream of the pack before goes on here; ``ahead`` bytes from the start are asked for already."""
        stream = _Stream(-_LARGE, 0)
        stream.ahead, stream.window = ahead, self._limit
        self._streams.insert(0, stream)
        del self._streams[_STREAMS:]

    def read(self, offset: int, length: int) -> Ahead | None:
        """Somebody reads ``[offset, offset + length)``; what to bring now, if anything."""
        end = offset + length
        for stream in self._streams:
            if stream.end - _BEFORE <= offset <= stream.end + _BEHIND:
                break
        else:
            self._streams.insert(0, _Stream(offset, end))
            del self._streams[_STREAMS:]
            return None
        if stream is not self._streams[0]:
            self._streams.remove(stream)
            self._streams.insert(0, stream)
        if end <= stream.end:
            return None
        stream.end = end
        if end - stream.start < _LARGE or stream.ahead - end > stream.window // 2:
            return None
        stream.window = min(2 * stream.window or _FIRST_WINDOW, self._limit)
        start = max(stream.ahead, end)
        stream.ahead = end + stream.window
        return Ahead(start, stream.ahead - start) if stream.ahead > start else None
