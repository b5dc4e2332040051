"""A range of an open file as a file of its own."""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_BUFFER: Final = 1 << 20


class _Slice(io.RawIOBase):
    def __init__(self, fd: int, offset: int, size: int) -> None:
        self._fd = os.dup(fd)
        self._position = offset
        self._end = offset + size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")  # a slice of a bytearray would be a copy
        length = min(len(view), self._end - self._position)
        count = os.preadv(self._fd, [view[:length]], self._position) if length > 0 else 0
        self._position += count
        return count

    def close(self) -> None:
        if not self.closed:
            os.close(self._fd)
        super().close()


def open_slice(fd: int, offset: int, size: int) -> io.BufferedReader:
    """``size`` bytes from ``offset`` of ``fd``, readable in order. Independent of ``fd``'s position and its closing."""
    return io.BufferedReader(_Slice(fd, offset, size), _BUFFER)
