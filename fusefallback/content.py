"""A pack's device bytes for the kernel: from the host cache, brought first where they are missing.

What is there is replied as memory of the mapped data file, so that Python copies nothing. What is not in the page cache
is read by a thread: a page fault would stop the whole process until the disk has answered.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import mmap
import os
import time
from bisect import bisect_right
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import pyfuse3
import trio

from erofsgen.erofs.node import Extent
from erofsgen.errors import ErofsgenError, StorageError
from erofsgen.host import linux
from erofsgen.host.daemon import recorder
from erofsgen.host.daemon.lazypack import LazyPack
from fusefallback.link import Asked, Link
from fusefallback.tuning import Tuning

_logger: Final = logging.getLogger(__name__)

Bytes = bytes | bytearray | memoryview

_PAGE: Final = mmap.PAGESIZE
_libc: Final = ctypes.CDLL(None)
_HAS_CACHESTAT: Final = linux.kernel_version() >= (6, 5)
"""mincore takes three times as long."""


class Piece(NamedTuple):
    """Bytes ``[start, start + length)`` of a device: 0 is the index, slots count from 1; None: zeros."""

    device: int | None
    start: int
    length: int


def pieces_of(extents: Sequence[Extent], offset: int, length: int) -> list[Piece]:
    """Where bytes ``[offset, offset + length)`` of a file are whose ``extents`` are in order and without gaps."""
    end = offset + length
    pieces = []
    at = bisect_right(extents, offset, key=_offset) - 1
    while offset < end:
        extent = extents[at]
        skipped = offset - extent.offset
        size = min(extent.length - skipped, end - offset)
        start = extent.start + skipped if extent.device is not None else 0
        pieces.append(Piece(extent.device, start, size))
        offset += size
        at += 1
    return pieces


_offset: Final = attrgetter("offset")


class ServedPack(LazyPack):
    """The pack whose data file is ``data``, kept in the host cache for as long as this is open.

    Raises StorageError, FormatError.
    """

    def __init__(self, data: Path, read_ahead: int) -> None:
        super().__init__(data.stem, data.with_suffix(".toc"), data.with_suffix(".map"), read_ahead)
        try:
            fcntl.flock(self.presence.fileno(), fcntl.LOCK_SH)  # so that nothing of it is evicted
            self.presence.obey()  # so that it is not cut off
            self.descriptor = os.open(data, os.O_RDONLY | os.O_CLOEXEC)
            self._map = mmap.mmap(self.descriptor, self.device_size, mmap.MAP_SHARED, mmap.PROT_READ)
        except (OSError, ValueError) as error:  # ValueError: the file is too short
            what = error.strerror if isinstance(error, OSError) else f"{self.device_size} bytes expected"
            raise StorageError(f"{data}: {what}", hint="run `erofsgen pull` again") from error
        self.memory = memoryview(self._map)
        self._address = np.frombuffer(self._map, np.uint8).ctypes.data
        self.whole = self.complete
        self.touched: set[int] = set()
        """Pages at which reads of what was there began that the supervisor knows of."""

    def is_in_memory(self, offset: int, length: int) -> bool:
        """Whether a range can be read without the disk, as far as the kernel tells: cachestat(2), mincore(2)."""
        start = offset & -_PAGE
        pages = -(-(offset + length - start) // _PAGE)
        if _HAS_CACHESTAT:
            try:
                return linux.pages_cached(self.descriptor, start, pages * _PAGE) == pages
            except OSError as error:
                if error.errno != errno.ENOSYS:  # a kernel built without CONFIG_CACHESTAT_SYSCALL
                    raise
        found = ctypes.create_string_buffer(pages)
        size = ctypes.c_size_t(pages * _PAGE)
        return not _libc.mincore(ctypes.c_void_p(self._address + start), size, found) and b"\0" not in found.raw

    def unmap(self) -> None:
        """Let pages that were read no longer count as this process's."""
        self._map.madvise(mmap.MADV_DONTNEED)


class Content:
    """What ``index`` and ``packs`` hold, these in the order of device slots; ``link`` has brought what is missing."""

    def __init__(self, link: Link, index: memoryview, packs: Sequence[ServedPack], tuning: Tuning) -> None:
        self._link = link
        self._tuning = tuning
        self._index = index
        self._packs = packs
        self._mapped: set[ServedPack] = set()
        self._mapped_bytes = 0
        self._told_until = time.monotonic() + recorder.SECONDS

    async def read(self, pieces: Sequence[Piece]) -> Bytes:
        """Pieces one behind the other. Raises FUSEError, with EIO."""
        try:
            await self._have(pieces)
            if len(pieces) == 1:
                return await self._read(pieces[0])
            joined = bytearray(sum(piece.length for piece in pieces))
            at = 0
            for piece in pieces:
                if piece.device is not None:
                    joined[at : at + piece.length] = await self._read(piece)
                at += piece.length
        except (ErofsgenError, OSError) as error:
            packs = [self._packs[piece.device - 1].hex for piece in pieces if piece.device]
            _logger.error("read failed: %s", error, extra={"mount": self._link.mount, "packs": packs})
            raise pyfuse3.FUSEError(errno.EIO) from error
        return joined

    async def _have(self, pieces: Sequence[Piece]) -> None:
        """Return when all of it is in the host cache."""
        missing: list[tuple[Piece, Asked]] = []
        for piece in pieces:
            device, start, length = piece
            if not device:
                continue
            pack = self._packs[device - 1]
            if pack.whole:
                self._touched(pack, start, length)
            else:
                if not pack.ready(start, length):
                    missing.append((piece, self._link.ask(pack.hex, start, length)))
                else:
                    self._touched(pack, start, length)
                following = self._packs[device] if device < len(self._packs) else None
                for other, offset, size in pack.read(start, length, following):
                    self._link.ahead(other.hex, offset, size)
                    pack.whole = pack.complete
        for (device, start, length), asked in missing:
            assert device
            pack = self._packs[device - 1]
            await self._link.answer(asked)
            if not pack.ready(start, length):
                raise StorageError(f"pack {pack.hex}: bytes {start}+{length} were brought, but are not there")
            pack.whole = pack.complete

    def _touched(self, pack: ServedPack, start: int, length: int) -> None:
        """Tell of the first read of what is there: that is what its image's profile is made of."""
        place = start // _PAGE
        if place not in pack.touched and time.monotonic() < self._told_until:
            pack.touched.add(place)
            self._link.touched(pack.hex, start, length)

    async def _read(self, piece: Piece) -> Bytes:
        device, start, length = piece
        if device is None:
            return bytes(length)
        if device == 0:
            return self._index[start : start + length]
        pack = self._packs[device - 1]
        if not pack.is_in_memory(start, length):
            return await trio.to_thread.run_sync(_pread, pack.descriptor, length, start)
        if self._tuning.reply == "copied":
            return _pread(pack.descriptor, length, start)
        self._mapped.add(pack)
        self._mapped_bytes += length
        if self._mapped_bytes > self._tuning.mapped:
            for mapped in self._mapped:
                mapped.unmap()
            self._mapped.clear()
            self._mapped_bytes = length
        return pack.memory[start : start + length]


def _pread(descriptor: int, length: int, offset: int) -> bytes:
    data = os.pread(descriptor, length, offset)
    if len(data) != length:
        raise OSError(errno.EIO, f"{len(data)} bytes at byte {offset}, {length} expected")
    return data
