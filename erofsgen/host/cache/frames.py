"""Where a pack's frames begin, from its TOC, without numpy: for processes that must stay small.

The TOC was verified when it was put into the cache (:class:`erofsgen.pack.toc.Toc` does that); here it is only read.
"""

from __future__ import annotations

import sys
from array import array
from itertools import accumulate
from struct import Struct, error
from typing import Final

from erofsgen.errors import FormatError

_FOOTER: Final = Struct("<IBI")  # zstd_seekable_compression_format.md: frames, descriptor, magic
_MAGIC: Final = 0x8F92EAB1
_ENTRY_SIZE: Final = 8  # u32 stored size, u32 device size
_TABLES: Final = 2  # skippable frames behind the data: chunk dictionary, frame digests


def frame_starts(toc: bytes, *, what: str) -> list[int]:
    """Device offset of every frame, and the device's size as the last element. Raises FormatError naming ``what``."""
    try:
        count, _, magic = _FOOTER.unpack_from(toc, len(toc) - _FOOTER.size)
    except error:
        raise FormatError(f"{what}: too short for a table of contents") from None
    size = count * _ENTRY_SIZE
    if magic != _MAGIC or count < _TABLES or size > len(toc) - _FOOTER.size:
        raise FormatError(f"{what}: not a table of contents")
    entries = array("I", toc[-_FOOTER.size - size : -_FOOTER.size])
    if sys.byteorder == "big":
        entries.byteswap()
    return list(accumulate(entries[1 : 2 * (count - _TABLES) : 2], initial=0))
