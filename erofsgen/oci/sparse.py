"""Sparse files: the GNU maps of where a member's stored bytes lie (GNU tar manual, "Sparse Formats").

A map is a list of ``(offset, length)`` data segments in file order; what is between them is a hole.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import Final

from erofsgen.errors import FormatError, UnsupportedError

Segments = list[tuple[int, int]]

MAP_LIMIT: Final = 1 << 20
"""Most bytes a map may take in the archive."""

HOLE_LIMIT: Final = 1 << 42
"""Most bytes of holes in one layer. A few hundred bytes of tar can claim exbibytes, and each chunk of them costs."""

_HEADER_PAIRS = struct.Struct("24s24s24s24s")
_EXTENSION = struct.Struct("504sB7x")
_NUMBER = re.compile(rb"[0-9]{1,20}")


def from_gnu_header(
    header: memoryview, read_block: Callable[[], memoryview], number: Callable[[bytes], int]
) -> tuple[Segments, int]:
    """The map and the real size of an old GNU member (type ``S``): 4 pairs in the header, 21 in each further block."""
    pairs: list[bytes] = list(_HEADER_PAIRS.unpack_from(header, 386))
    extended = header[482]
    size = number(bytes(header[483:495]))
    taken = 0
    while extended:
        taken += 512
        if taken > MAP_LIMIT:
            raise FormatError("its sparse map is too long")
        block, extended = _EXTENSION.unpack(read_block())
        pairs += [block[at : at + 24] for at in range(0, 504, 24)]
    segments = []
    for pair in pairs:
        if pair[0] == 0 or pair[12] == 0:
            break
        segments.append((number(pair[:12]), number(pair[12:])))
    return segments, size


def from_text(text: bytes) -> Segments:
    """The map of the PAX formats 0.0 and 0.1: ``offset,length,offset,length…``."""
    return _pairs(text.split(b",")) if text else []


def from_data(read_block: Callable[[], memoryview]) -> Segments:
    """The map of the PAX format 1.0, ahead of the file's bytes: a count and its pairs, one decimal per line."""
    text = bytes(read_block())
    count, newline, _ = text.partition(b"\n")
    if not newline or not _NUMBER.fullmatch(count):
        raise FormatError("its sparse map has no length")
    lines = 1 + 2 * int(count)
    blocks = [text]
    seen = text.count(b"\n")
    while seen < lines:
        if len(blocks) * 512 >= MAP_LIMIT:
            raise FormatError("its sparse map is too long")
        block = bytes(read_block())
        blocks.append(block)
        seen += block.count(b"\n")
    return _pairs(b"".join(blocks).split(b"\n")[1:lines])


def check(segments: Segments, size: int, stored: int) -> Segments:
    """The segments that hold bytes.

    Raises FormatError unless they are in order, lie inside ``size`` and make up ``stored`` bytes.
    """
    position = total = 0
    if size < 0:
        raise FormatError("its size is negative")
    for offset, length in segments:
        if offset < position or length < 0 or offset + length > size:
            raise FormatError("its sparse map is out of order or beyond the file's end")
        position = offset + length
        total += length
    if total != stored:
        raise FormatError(f"its sparse map counts {total:,} bytes, the archive holds {stored:,}")
    return [segment for segment in segments if segment[1]]


def add_holes(holes: int, more: int) -> int:
    """Count a layer's holes. Raises UnsupportedError beyond :data:`HOLE_LIMIT`."""
    if holes + more > HOLE_LIMIT:
        raise UnsupportedError(f"more than {HOLE_LIMIT >> 40} TiB of holes in one layer")
    return holes + more


def _pairs(numbers: list[bytes]) -> Segments:
    if len(numbers) % 2 or not all(map(_NUMBER.fullmatch, numbers)):
        raise FormatError("its sparse map is not made of pairs of numbers")
    values = list(map(int, numbers))
    return list(zip(values[::2], values[1::2], strict=True))
