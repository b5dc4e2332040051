"""Device bytes out of a pack, every frame checked before a byte of it is handed on."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

import zstandard
from blake3 import blake3

from erofsgen.errors import FormatError, IntegrityError
from erofsgen.pack.toc import ReadRange, Toc

_KEPT_FRAMES: Final = 8

FrameCache = OrderedDict[tuple[str, int], bytes]
"""Frames used last, by pack and number. Readers may share one: neighbouring small files lie in one frame."""


def open_frame(stored: bytes, toc: Toc, frame: int, *, what: str) -> bytes:
    """The device bytes of ``frame`` from its ``stored`` bytes.

    Raises IntegrityError (length or digest differ), FormatError (not a zstd frame).
    """
    size = int(toc.device_sizes[frame])
    if len(stored) != int(toc.sizes[frame]):
        raise IntegrityError(f"{what}: frame {frame} is {len(stored)} bytes, {int(toc.sizes[frame])} expected")
    if toc.raw:
        data = stored
    else:
        try:
            parameters = zstandard.get_frame_parameters(stored)
            if parameters.content_size != size:
                raise FormatError(f"{what}: frame {frame} holds {parameters.content_size} bytes, {size} expected")
            data = zstandard.ZstdDecompressor().decompress(stored, max_output_size=size)
        except zstandard.ZstdError as error:
            raise IntegrityError(f"{what}: frame {frame} does not decompress: {error}") from error
    if blake3(data).digest() != toc.digest(frame):
        raise IntegrityError(f"{what}: frame {frame} differs from its digest")
    return data


class PackReader:
    """Random access to a pack's device bytes through ``read``, a ranged read of the pack. Not thread-safe.

    ``what`` names the pack in errors, and its frames in ``kept``.
    """

    def __init__(self, read: ReadRange, toc: Toc, *, what: str, kept: FrameCache | None = None) -> None:
        self._read = read
        self.toc = toc
        self.what = what
        self._kept = FrameCache() if kept is None else kept

    def frame(self, number: int) -> bytes:
        """The verified device bytes of one frame."""
        key = (self.what, number)
        data = self._kept.get(key)
        if data is None:
            toc = self.toc
            stored = self._read(int(toc.offsets[number]), int(toc.sizes[number]))
            data = open_frame(stored, toc, number, what=self.what)
            self._kept[key] = data
            if len(self._kept) > _KEPT_FRAMES:
                self._kept.popitem(last=False)
        else:
            self._kept.move_to_end(key)
        return data

    def read(self, offset: int, length: int) -> bytes:
        """Exactly the device bytes ``[offset, offset + length)``.

        Raises FormatError (outside the device), IntegrityError (a frame is damaged), and what ``read`` raises.
        """
        if offset < 0 or length < 0 or offset + length > self.toc.device_size:
            raise FormatError(f"{self.what}: bytes {offset}+{length} are outside the device")
        pieces = []
        for number in self.toc.frames(offset, length):
            start = int(self.toc.device_offsets[number])
            data = self.frame(number)
            pieces.append(data[max(0, offset - start) : offset + length - start])
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)
