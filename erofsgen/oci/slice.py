"""A range of an open file as a file of its own."""

from __future__ import annotations

import io
import os
from typing import Final

_BUFFER: Final = 1 << 20


class _Slice(io.RawIOBase):
    def __init__(self, fd: int, offset: int, size: int) -> None:
        self._fd = os.dup(fd)
        self._position = offset
        self._end = offset + size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        length = min(len(buffer), self._end - self._position)
        count = os.preadv(self._fd, [buffer[:length]], self._position) if length > 0 else 0
        self._position += count
        return count

    def close(self) -> None:
        if not self.closed:
            os.close(self._fd)
        super().close()


def open_slice(fd: int, offset: int, size: int) -> io.BufferedReader:
    """``size`` bytes from ``offset`` of ``fd``, readable in order. Independent of ``fd``'s position and its closing."""
    return io.BufferedReader(_Slice(fd, offset, size), _BUFFER)
