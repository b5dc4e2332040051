"""Reads a pack's tables. Everything in them is hostile until it has been checked."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from erofsgen.errors import FormatError, IntegrityError
from erofsgen.pack import format as fmt
from erofsgen.pack.location import TocLocation

ReadRange = Callable[[int, int], bytes]
"""(offset, length) to exactly that many bytes of the pack."""


class Toc:
    """A pack's table of contents.

    Per frame *i*: stored bytes at ``offsets[i]``, ``sizes[i]`` long; device bytes at ``device_offsets[i]``,
    ``device_sizes[i]`` long, whose BLAKE3 is ``digest(i)``. ``dictionary`` is the byte range of the chunk dictionary.
    """

    def __init__(self, data: bytes, location: TocLocation, *, what: str) -> None:
        """Parse ``data``, the bytes at ``location``. ``what`` names the pack in errors.

        Raises IntegrityError (the digest differs), FormatError (the tables contradict each other).
        """
        if len(data) != location.size or blake3(data).hexdigest() != location.digest:
            raise IntegrityError(f"{what}: the table of contents differs from its digest")
        digests, rest = _payload(data, 0, fmt.FRAME_DIGESTS_MAGIC, what)
        seek, end = _payload(data, rest, fmt.SEEK_TABLE_MAGIC, what)
        if end != len(data):
            raise FormatError(f"{what}: {len(data) - end} bytes after the seek table")
        if len(digests) < fmt.DIGESTS_HEADER.size:
            raise FormatError(f"{what}: frame digests too short")
        tag, version, flags, count, _, device_size = fmt.DIGESTS_HEADER.unpack_from(digests)
        if tag != fmt.DIGESTS_TAG or version != fmt.VERSION:
            raise FormatError(f"{what}: not frame digests of version {fmt.VERSION}")
        if len(digests) != fmt.DIGESTS_HEADER.size + count * fmt.DIGEST_SIZE:
            raise FormatError(f"{what}: {count} frames do not fit the frame digests")
        entries = _seek_entries(seek, what)
        if len(entries) != count + 2:
            raise FormatError(f"{what}: seek table lists {len(entries)} frames, {count + 2} expected")
        self.raw = bool(flags & fmt.FLAG_RAW)
        self.device_size: int = device_size
        self._digests = digests[fmt.DIGESTS_HEADER.size :]
        sizes = entries["compressed"].astype(np.int64)
        device_sizes = entries["decompressed"].astype(np.int64)
        starts = np.zeros(len(entries) + 1, np.int64)
        np.cumsum(sizes, out=starts[1:])
        device_starts = np.zeros(len(entries) + 1, np.int64)
        np.cumsum(device_sizes, out=device_starts[1:])
        self.offsets = starts[:count]
        self.sizes = sizes[:count]
        self.device_offsets = device_starts[:count]
        self.device_sizes = device_sizes[:count]
        self.dictionary = (int(starts[count]), int(sizes[count]))
        self._check(what, int(device_starts[-1]), int(starts[count + 1]), location, device_sizes)

    def _check(
        self, what: str, total: int, toc_offset: int, location: TocLocation, device_sizes: npt.NDArray[np.int64]
    ) -> None:
        if device_sizes[len(self) :].any():
            raise FormatError(f"{what}: a skippable frame claims device bytes")
        if total != self.device_size or total > fmt.MAX_DEVICE_SIZE:
            raise FormatError(f"{what}: frames hold {total} device bytes, {self.device_size} claimed")
        if toc_offset != location.offset:
            raise FormatError(f"{what}: frames end at byte {toc_offset}, the table of contents is at {location.offset}")
        if len(self) and (self.device_sizes.min() <= 0 or self.device_sizes.max() > fmt.MAX_FRAME_SIZE):
            raise FormatError(f"{what}: a frame is empty or larger than {fmt.MAX_FRAME_SIZE} bytes")
        if (self.device_sizes % fmt.BLOCK).any():
            raise FormatError(f"{what}: a frame is not a multiple of {fmt.BLOCK} bytes")
        if self.raw and not np.array_equal(self.sizes, self.device_sizes):
            raise FormatError(f"{what}: stored and device sizes of a raw pack differ")

    def __len__(self) -> int:
        return len(self.sizes)

    def digest(self, frame: int) -> bytes:
        """BLAKE3 of the frame's device bytes."""
        start = frame * fmt.DIGEST_SIZE
        return self._digests[start : start + fmt.DIGEST_SIZE]

    def frames(self, offset: int, length: int) -> range:
        """The frames that hold device bytes ``[offset, offset + length)``, which must be inside the device."""
        if length <= 0:
            return range(0)
        first = int(np.searchsorted(self.device_offsets, offset, side="right")) - 1
        last = int(np.searchsorted(self.device_offsets, offset + length - 1, side="right")) - 1
        return range(first, last + 1)


def locate(read: ReadRange, size: int, *, what: str) -> TocLocation:
    """Find the TOC of a pack of ``size`` bytes from its end, without a manifest. The digest is of what was found."""
    footer = read(max(0, size - fmt.SEEK_FOOTER.size), min(size, fmt.SEEK_FOOTER.size))
    if len(footer) != fmt.SEEK_FOOTER.size:
        raise FormatError(f"{what}: too short for a pack")
    count, descriptor, magic = fmt.SEEK_FOOTER.unpack(footer)
    if magic != fmt.SEEKABLE_MAGIC or descriptor:
        raise FormatError(f"{what}: no seek table at its end")
    seek_size = fmt.SKIPPABLE_HEADER.size + count * fmt.SEEK_ENTRY.itemsize + fmt.SEEK_FOOTER.size
    if count < 2 or seek_size > size:
        raise FormatError(f"{what}: the seek table claims {count} frames")
    seek = read(size - seek_size, seek_size)
    entries = _seek_entries(_payload(seek, 0, fmt.SEEK_TABLE_MAGIC, what)[0], what)
    digests_size = int(entries["compressed"][-1])
    offset = size - seek_size - digests_size
    if offset < 0:
        raise FormatError(f"{what}: the seek table is larger than the pack")
    toc = read(offset, digests_size) + seek
    return TocLocation(offset, len(toc), blake3(toc).hexdigest())


def read_dictionary(read: ReadRange, toc: Toc, *, what: str) -> npt.NDArray[np.void]:
    """The pack's chunk dictionary, an array of :data:`erofsgen.pack.format.CHUNK` in device order.

    Unlike the TOC it has no digest in the manifest: only builders read it, from a store they trust, and a chunk
    taken by it is checked against its digest when its bytes are read.
    """
    offset, size = toc.dictionary
    payload, end = _payload(read(offset, size), 0, fmt.CHUNK_DICTIONARY_MAGIC, what)
    if end != size or len(payload) < fmt.DICTIONARY_HEADER.size:
        raise FormatError(f"{what}: damaged chunk dictionary")
    tag, version, _, count, _ = fmt.DICTIONARY_HEADER.unpack_from(payload)
    if tag != fmt.DICTIONARY_TAG or version != fmt.VERSION:
        raise FormatError(f"{what}: not a chunk dictionary of version {fmt.VERSION}")
    if len(payload) != fmt.DICTIONARY_HEADER.size + count * fmt.CHUNK.itemsize:
        raise FormatError(f"{what}: {count} chunks do not fit the chunk dictionary")
    chunks = np.frombuffer(payload, fmt.CHUNK, count, fmt.DICTIONARY_HEADER.size)
    ends = chunks["block"].astype(np.int64) * fmt.BLOCK + chunks["length"]
    if count and (ends.max() > toc.device_size or not chunks["length"].all()):
        raise FormatError(f"{what}: a chunk lies outside the device")
    return chunks


def _payload(data: bytes, offset: int, magic: int, what: str) -> tuple[bytes, int]:
    """The payload of the skippable frame at ``offset`` and where it ends."""
    start = offset + fmt.SKIPPABLE_HEADER.size
    if start > len(data):
        raise FormatError(f"{what}: truncated tables")
    found, size = fmt.SKIPPABLE_HEADER.unpack_from(data, offset)
    if found != magic:
        raise FormatError(f"{what}: frame magic {found:#x} where {magic:#x} belongs")
    if start + size > len(data):
        raise FormatError(f"{what}: truncated tables")
    return data[start : start + size], start + size


def _seek_entries(payload: bytes, what: str) -> npt.NDArray[np.void]:
    if len(payload) < fmt.SEEK_FOOTER.size:
        raise FormatError(f"{what}: seek table too short")
    table, footer = payload[: -fmt.SEEK_FOOTER.size], payload[-fmt.SEEK_FOOTER.size :]
    count, descriptor, magic = fmt.SEEK_FOOTER.unpack(footer)
    if magic != fmt.SEEKABLE_MAGIC or descriptor or len(table) != count * fmt.SEEK_ENTRY.itemsize:
        raise FormatError(f"{what}: damaged seek table")
    return np.frombuffer(table, fmt.SEEK_ENTRY)
