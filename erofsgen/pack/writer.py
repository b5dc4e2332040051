"""Writes one pack: frames in device order, then the chunk dictionary and the TOC."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from blake3 import blake3

from erofsgen.pack import format as fmt
from erofsgen.pack.location import TocLocation


class Output(Protocol):
    """Where the pack's bytes go, in order."""

    def write(self, data: bytes | bytearray | memoryview, /) -> object:
        """Append all of ``data``."""


class PackWriter:
    """Appends frames to ``output`` and closes the pack with its tables. Knows nothing of compression or threads."""

    def __init__(self, output: Output, *, raw: bool) -> None:
        self._output = output
        self._raw = raw
        self._seek: list[tuple[int, int]] = []
        self._digests: list[bytes] = []
        self.device_size = 0
        self.stored_size = 0

    def add_frame(self, stored: bytes | bytearray | memoryview, device_size: int, digest: bytes) -> None:
        """Append one frame: its stored bytes, its size in the device, BLAKE3 of its device bytes."""
        self._output.write(stored)
        self._seek.append((len(stored), device_size))
        self._digests.append(digest)
        self.device_size += device_size
        self.stored_size += len(stored)

    def finish(self, chunks: Sequence[tuple[bytes, int, int]]) -> TocLocation:
        """Write the tables. ``chunks`` are (BLAKE3, block, length in bytes) in device order."""
        table = np.array(chunks, dtype=fmt.CHUNK)
        dictionary = fmt.DICTIONARY_HEADER.pack(fmt.DICTIONARY_TAG, fmt.VERSION, 0, len(table), 0) + table.tobytes()
        flags = fmt.FLAG_RAW if self._raw else 0
        header = fmt.DIGESTS_HEADER.pack(fmt.DIGESTS_TAG, fmt.VERSION, flags, len(self._digests), 0, self.device_size)
        digests = header + b"".join(self._digests)
        dictionary_frame = _skippable(fmt.CHUNK_DICTIONARY_MAGIC, dictionary)
        digests_frame = _skippable(fmt.FRAME_DIGESTS_MAGIC, digests)
        entries = [*self._seek, (len(dictionary_frame), 0), (len(digests_frame), 0)]
        seek = np.array(entries, dtype=fmt.SEEK_ENTRY).tobytes()
        seek += fmt.SEEK_FOOTER.pack(len(entries), 0, fmt.SEEKABLE_MAGIC)
        toc = digests_frame + _skippable(fmt.SEEK_TABLE_MAGIC, seek)
        self._output.write(dictionary_frame)
        self._output.write(toc)
        offset = self.stored_size + len(dictionary_frame)
        return TocLocation(offset, len(toc), blake3(toc).hexdigest())


def _skippable(magic: int, payload: bytes) -> bytes:
    return fmt.SKIPPABLE_HEADER.pack(magic, len(payload)) + payload
