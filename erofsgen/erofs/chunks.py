"""Where regular files lie: the chunk indexes of every file that is not inlined.

A file in one run of blocks would need no chunk index: kernels since 5.16 find the device of a flat inode from its
address in the unified address space. But erofs-utils' tools, up to 1.9.4, take the offset in the device and forget the
device, and read other bytes without a word. An index is stored compressed, where chunk indexes hardly show.
"""

from __future__ import annotations

from itertools import chain
from typing import Final

import numpy as np
import numpy.typing as npt

from erofsgen.erofs.format import (
    BLOCK_BITS,
    BLOCK_SIZE,
    CHUNK_FORMAT_BLKBITS_MASK,
    CHUNK_FORMAT_INDEXES,
    CHUNK_INDEX_DTYPE,
    MAX_DEVICES,
    NULL_ADDR,
)
from erofsgen.erofs.tree import HOLE
from erofsgen.erofs.treetable import TreeTable
from erofsgen.errors import FormatError, UnsupportedError

_HOLE_BITS: Final = CHUNK_FORMAT_BLKBITS_MASK
"""log2 of the blocks in the largest chunk there can be, 8 TiB."""


class FileMap:
    """The mapping of every regular file that has chunks. ``numbers`` are their inode numbers, in order; the arrays of
    the same length are about the same files: ``format`` is the chunk format, ``entries`` the number of chunk indexes.

    ``table`` is all chunk indexes, in file order.

    Raises FormatError (chunks that do not exist, or do not fit file or device), UnsupportedError (too many devices,
    too many blocks).
    """

    def __init__(
        self, tree: TreeTable, numbers: list[int], chunk_table: npt.NDArray[np.void], blocks: list[int], chunk_size: int
    ) -> None:
        if chunk_size < BLOCK_SIZE or chunk_size & (chunk_size - 1) or chunk_size >> BLOCK_BITS > 1 << _HOLE_BITS:
            raise FormatError(f"a chunk size of {chunk_size} is no power of two from {BLOCK_SIZE} to 8 TiB")
        if len(blocks) > MAX_DEVICES:
            raise UnsupportedError(f"{len(blocks)} devices, EROFS has slots for {MAX_DEVICES}")
        for slot, size in enumerate(blocks, 1):
            if not 0 < size < NULL_ADDR:
                raise FormatError(f"device {slot}: {size} blocks")
        self._tree = tree
        self.numbers = np.array(numbers, np.int64)
        self.device_start = np.concatenate(([0], np.cumsum(np.array(blocks, np.int64))))
        """First block of each device by slot - 1, and the end, from the first device's first block on."""
        lists = [tree.inodes[number].chunks for number in numbers]
        counts = np.fromiter(map(len, lists), np.int64, len(lists))
        refs = np.fromiter(chain.from_iterable(lists), np.int64, int(counts.sum()))
        sizes = np.fromiter((tree.inodes[number].size for number in numbers), np.int64, len(numbers))
        self._require(counts == -(-sizes // chunk_size), "the number of its chunks does not fit its size")
        ends = np.cumsum(counts)
        starts = ends - counts
        files = np.repeat(np.arange(len(numbers)), counts)

        holes = refs == HOLE
        known = (refs >= 0) & (refs < len(chunk_table))
        device = chunk_table["device"][np.where(known, refs, 0)].astype(np.int64)
        block = chunk_table["block"][np.where(known, refs, 0)].astype(np.int64)
        lengths = np.full(len(refs), chunk_size >> BLOCK_BITS)
        if len(refs):
            lengths[ends - 1] = (sizes - (counts - 1) * chunk_size + BLOCK_SIZE - 1) >> BLOCK_BITS
        known &= (device > 0) & (device <= len(blocks))
        limit = np.diff(self.device_start, append=0)[np.where(known, device - 1, 0)]
        known &= block + lengths <= limit
        self._require_refs(known | holes, files, "a chunk that lies on no device")

        hollow = ~_any(~holes, starts)
        bits = np.full(len(numbers), (chunk_size >> BLOCK_BITS).bit_length() - 1)
        if hollow.any():
            # a file that is one hole: the fewest chunks, they need not be those of other files
            bits[hollow] = [min(_HOLE_BITS, ((size - 1) >> BLOCK_BITS).bit_length()) for size in sizes[hollow].tolist()]
        self.format = CHUNK_FORMAT_INDEXES | bits
        chunk_bytes = np.left_shift(np.int64(BLOCK_SIZE), bits)
        self.entries = -(-sizes // chunk_bytes)

        self.table = np.zeros(int(self.entries.sum()), CHUNK_INDEX_DTYPE)
        self.table["startblk_lo"] = NULL_ADDR
        into = np.repeat(~hollow, self.entries)
        take = np.repeat(~hollow, counts)
        self.table["device_id"][into] = np.where(holes, 0, device)[take]
        self.table["startblk_lo"][into] = np.where(holes, NULL_ADDR, block)[take]

    def _require(self, good: npt.NDArray[np.bool_], what: str) -> None:
        if not good.all():
            inode = self._tree.inodes[int(self.numbers[np.argmin(good)])]
            raise FormatError(f"{self._tree.path(inode)}: {what}")

    def _require_refs(self, good: npt.NDArray[np.bool_], files: npt.NDArray[np.int64], what: str) -> None:
        if not good.all():
            inode = self._tree.inodes[int(self.numbers[files[np.argmin(good)]])]
            raise FormatError(f"{self._tree.path(inode)}: {what}")


def _any(flags: npt.NDArray[np.bool_], starts: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """For each file, whether any of its chunks has its flag set. Every file has at least one chunk."""
    return np.logical_or.reduceat(flags, starts) if len(starts) else np.zeros(0, np.bool_)
