"""One layer's entries and bytes into packs and a layer record."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import numpy as np
from blake3 import blake3

from erofsgen.build.dictionary import Dictionary
from erofsgen.build.options import INLINE_MAX, BuildOptions
from erofsgen.build.packer import Packer, compressible
from erofsgen.build.record import CHUNK_ROW, LayerRecord
from erofsgen.erofs.tree import HOLE
from erofsgen.oci.layer import Entry, FileData
from erofsgen.progress import Task
from erofsgen.store.base import Descriptor

_PROBE_MIN: Final = 64 << 10
"""Smaller first pieces always go to a zstd pack: a raw one would store their padding, too."""


class Counts:
    """What a build has read and saved so far, in bytes of file data."""

    def __init__(self) -> None:
        self.file_bytes = 0
        self.new_bytes = 0
        self.deduplicated_bytes = 0


class Converter:
    """Turns layers into records. New packs go into the store and its dictionary."""

    def __init__(self, packer: Packer, dictionary: Dictionary | None, options: BuildOptions, counts: Counts) -> None:
        self._packer = packer
        self._dictionary = dictionary
        self._chunk_size = options.chunk_size
        self._counts = counts
        self._raw: bool | None = None  # of the file at hand: whether its new chunks go to a raw pack

    def convert(self, layer: Iterable[tuple[Entry, FileData | None]], task: Task) -> LayerRecord:
        """Read a whole layer. ``task`` advances by bytes of file data.

        Raises what reading the layer and writing to the store raise; then nothing of the layer is visible.
        """
        rows = _Rows()
        entries = []
        for entry, data in layer:
            if data is not None and data.size:
                self._file(entry, data, rows)
                task.advance(data.size)
            entries.append(entry)
        new = self._packer.flush()
        old, numbers = self._old_packs(rows)
        # a new pack may have been there already, byte for byte: the same layer content, built without this dictionary
        packs = [pack.descriptor for pack in new] + old
        if self._dictionary is not None and new:
            self._dictionary.add(new)
        return LayerRecord(entries, packs, rows.table(len(new), numbers))

    def _file(self, entry: Entry, data: FileData, rows: _Rows) -> None:
        inode = entry.inode
        assert inode is not None
        counts = self._counts
        counts.file_bytes += data.size
        if data.size <= INLINE_MAX:
            inode.data = b"".join(bytes(data.size) if view is None else view for view in data.chunks(self._chunk_size))
            return
        self._packer.begin_file(entry.path.rpartition(b"/")[0])
        self._raw = None
        numbers: list[int] = []
        for view in data.chunks(self._chunk_size):
            if view is None or (not view[0] and not view[-1] and bytes(view).count(0) == len(view)):
                numbers.append(HOLE)
                continue
            if numbers and numbers[-1] == HOLE:
                self._fill_holes(numbers, rows)
            numbers.append(self._chunk(view, rows))
        inode.chunks = tuple(numbers)

    def _fill_holes(self, numbers: list[int], rows: _Rows) -> None:
        """Make the holes at the end of ``numbers`` zeros: data follows.

        Over fscache the kernel takes all of a read that begins in a hole for zeros, whatever comes behind it
        (fs/erofs/fscache.c, erofs_fscache_data_read_slice()). One chunk of zeros serves all; it has a frame of its own,
        so that who extracts knows it by the frame's digest.
        """
        zeros = self._chunk(memoryview(bytes(self._chunk_size)), rows, zeros=True)
        at = len(numbers)
        while at and numbers[at - 1] == HOLE:
            at -= 1
            numbers[at] = zeros

    def _chunk(self, view: memoryview, rows: _Rows, *, zeros: bool = False) -> int:
        """The number of a chunk, which is new or was seen before, in this layer or in the dictionary's packs."""
        counts = self._counts
        digest = blake3(view).digest()
        number = rows.numbers.get(digest)
        length = len(view)
        if number is not None:
            counts.deduplicated_bytes += length
        elif (
            self._dictionary is not None
            and (place := self._dictionary.find(digest)) is not None
            and place.length == length
        ):
            number = rows.add_old(digest, place.pack, place.block, length)
            counts.deduplicated_bytes += length
        else:
            if self._raw is None and not zeros:
                self._raw = length >= _PROBE_MIN and not compressible(view)
            pack, block = self._packer.add(view, digest, raw=bool(self._raw) and not zeros, alone=zeros)
            number = rows.add_new(digest, pack, block, length)
            counts.new_bytes += length
        return number

    def _old_packs(self, rows: _Rows) -> tuple[list[Descriptor], dict[int, int]]:
        """Descriptors of the dictionary's packs that ``rows`` refer to, and dictionary number to position."""
        if self._dictionary is None:
            return [], {}
        used = sorted({-pack - 1 for pack in rows.packs if pack < 0})
        return [self._dictionary.packs[number] for number in used], {number: at for at, number in enumerate(used)}


class _Rows:
    """The chunk table of one layer while it grows. Old packs are kept as ``-1 - number`` until all are known."""

    def __init__(self) -> None:
        self.numbers: dict[bytes, int] = {}
        self.digests: list[bytes] = [bytes(32)]
        self.packs: list[int] = [0]
        self.blocks: list[int] = [0]
        self.lengths: list[int] = [0]

    def add_new(self, digest: bytes, pack: int, block: int, length: int) -> int:
        number = len(self.digests)
        self.numbers[digest] = number
        self.digests.append(digest)
        self.packs.append(pack)
        self.blocks.append(block)
        self.lengths.append(length)
        return number

    def add_old(self, digest: bytes, pack: int, block: int, length: int) -> int:
        return self.add_new(digest, -1 - pack, block, length)

    def table(self, new_packs: int, old: dict[int, int]) -> np.ndarray:
        """The rows as :data:`CHUNK_ROW`: new packs are numbered first, then the old ones of ``old``."""
        table = np.zeros(len(self.digests), CHUNK_ROW)
        table["digest"] = np.frombuffer(b"".join(self.digests), "V32")
        table["block"] = self.blocks
        table["length"] = self.lengths
        table["pack"] = [pack if pack >= 0 else new_packs + old[-1 - pack] for pack in self.packs]
        return table
