"""Layer compressions: which one a blob uses, and a reader of its plain bytes.

The first bytes decide, not the media type: that is what containerd does, and archives in the wild are mislabelled. All
readers are streaming, hold one window of history, and tell a truncated or damaged blob from one that ends properly.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable
from typing import Any, Final, Protocol

import zstandard

from erofsgen.errors import FormatError

GzipFile: Any = gzip.GzipFile
DeflateError: Any = zlib.error
try:
    from isal import igzip, isal_zlib
except ImportError:  # a platform without ISA-L: same bytes, a third of the speed
    pass
else:
    GzipFile, DeflateError = igzip.IGzipFile, isal_zlib.error

READ_SIZE: Final = 512 << 10
"""Compressed bytes asked for at a time."""

XZ_MEMORY: Final = 256 << 20
"""Most memory an xz dictionary may take; ``xz -9`` needs 65 MiB."""


class Source(Protocol):
    """What a decompressor reads from."""

    def read(self, size: int = -1, /) -> bytes: ...

    def readinto(self, buffer: memoryview, /) -> int: ...


class Reader(Protocol):
    """Fills a buffer with plain bytes; 0 is the end."""

    def readinto(self, buffer: memoryview, /) -> int: ...


class _Gzip:
    """gzip of any number of members, as eStargz and parallel compressors write them; zero padding may follow."""

    def __init__(self, source: Source) -> None:
        self._file = GzipFile(fileobj=source, mode="rb")

    def readinto(self, buffer: memoryview) -> int:
        try:
            return int(self._file.readinto(buffer))
        except EOFError:
            raise FormatError("gzip data ends before its end marker") from None
        except (gzip.BadGzipFile, DeflateError, OverflowError) as error:
            raise FormatError(f"bad gzip data: {error}") from None


class _Zstd:
    """zstd of any number of frames; skippable frames (seek tables, zstd:chunked) hold no plain bytes.

    libzstd's streaming call cannot tell a truncated frame from a finished stream, so the frames are walked alongside.
    """

    def __init__(self, source: Source) -> None:
        self._frames = FrameWalker()
        self._source = source
        self._reader = zstandard.ZstdDecompressor().stream_reader(
            self,  # type: ignore[arg-type]  # only read() is called
            read_size=READ_SIZE,
            read_across_frames=True,
        )

    def read(self, size: int) -> bytes:
        data = self._source.read(size)
        self._frames.feed(data)
        return data

    def readinto(self, buffer: memoryview) -> int:
        try:
            size = self._reader.readinto(buffer)
        except zstandard.ZstdError as error:
            raise FormatError(f"bad zstd data: {error}") from None
        if not size and not self._frames.complete:
            raise FormatError("zstd data ends inside a frame")
        return size


class FrameWalker:
    """Follows zstd frame boundaries (RFC 8878, section 3) without decompressing.

    ``complete`` is true between frames. Bytes that are no frame are left for the decompressor to refuse.
    """

    def __init__(self) -> None:
        self._skip = 0
        self._header = bytearray()
        self._need = 4
        self._parse: Callable[[int], None] = self._magic
        self._checksum = 0

    @property
    def complete(self) -> bool:
        return self._parse == self._magic and not self._skip and not self._header

    def feed(self, data: bytes) -> None:
        """Advance over the next bytes of the stream."""
        position, end = 0, len(data)
        while position < end:
            if self._skip:
                step = min(self._skip, end - position)
                self._skip -= step
            else:
                step = min(self._need - len(self._header), end - position)
                self._header += data[position : position + step]
                if len(self._header) == self._need:
                    value = int.from_bytes(self._header, "little")
                    self._header.clear()
                    self._parse(value)
            position += step

    def _next(self, parse: Callable[[int], None], need: int) -> None:
        self._parse, self._need = parse, need

    def _magic(self, value: int) -> None:
        if value & 0xFFFFFFF0 == 0x184D2A50:
            self._next(self._skippable, 4)
        else:
            self._next(self._descriptor, 1)

    def _skippable(self, size: int) -> None:
        self._skip = size
        self._next(self._magic, 4)

    def _descriptor(self, value: int) -> None:
        single_segment = value >> 5 & 1
        content_size = (single_segment, 2, 4, 8)[value >> 6]
        self._skip = 1 - single_segment + (0, 1, 2, 4)[value & 3] + content_size
        self._checksum = 4 * (value >> 2 & 1)
        self._next(self._block, 3)

    def _block(self, value: int) -> None:
        self._skip = 1 if value >> 1 & 3 == 1 else value >> 3
        if value & 1:
            self._skip += self._checksum
            self._next(self._magic, 4)


class _Stock:
    """xz and bzip2: no layer media type has them, root file system archives do."""

    def __init__(
        self, source: Source, name: str, start: Callable[[], lzma.LZMADecompressor | bz2.BZ2Decompressor]
    ) -> None:
        self._source = source
        self._name = name
        self._start = start
        self._decoder = start()

    def readinto(self, buffer: memoryview) -> int:
        while True:
            data = b""
            if self._decoder.eof:
                data = self._next_member()
                if not data:
                    return 0
                self._decoder = self._start()
            elif self._decoder.needs_input:
                data = self._source.read(READ_SIZE)
                if not data:
                    raise FormatError(f"{self._name} data ends before its end marker")
            try:
                plain = self._decoder.decompress(data, len(buffer))
            except (lzma.LZMAError, OSError) as error:
                raise FormatError(f"bad {self._name} data: {error}") from None
            if plain:
                buffer[: len(plain)] = plain
                return len(plain)

    def _next_member(self) -> bytes:
        """What follows a finished member and its zero padding; empty at the end of the blob."""
        data = self._decoder.unused_data
        while not (rest := data.lstrip(b"\0")):
            data = self._source.read(READ_SIZE)
            if not data:
                break
        return rest


def _xz(source: Source) -> Reader:
    return _Stock(source, "xz", lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=XZ_MEMORY))


def _bzip2(source: Source) -> Reader:
    return _Stock(source, "bzip2", bz2.BZ2Decompressor)


MAGIC_SIZE: Final = 6
"""First bytes of a blob that :func:`decompressor` looks at."""


def decompressor(magic: bytes) -> Callable[[Source], Reader] | None:
    """The reader for a blob that starts with ``magic``; None where it is not compressed."""
    if magic.startswith(b"\x1f\x8b"):
        return _Gzip
    if magic.startswith(b"\x28\xb5\x2f\xfd") or (magic[1:4] == b"\x2a\x4d\x18" and 0x50 <= magic[0] <= 0x5F):
        return _Zstd
    if magic.startswith(b"\xfd7zXZ\0"):
        return _xz
    if magic.startswith(b"BZh"):
        return _bzip2
    return None
