"""The chunks of an image that has been built: where each lies, where else it does, what it is, and reading it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Final

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from erofsgen.erofs.readback import read_back
from erofsgen.erofs.tree import BLOCK
from erofsgen.errors import FormatError, IntegrityError
from erofsgen.pack.format import CHUNK
from erofsgen.pack.reader import open_frame
from erofsgen.pack.toc import Toc, read_dictionary
from erofsgen.profile.profile import Profile
from erofsgen.progress import Task
from erofsgen.store.image import Image, open_pack
from erofsgen.store.manifest import Pack

Integers = npt.NDArray[np.int64]

THREADS: Final = 8
"""Requests at a time: stores are far away."""

UNKNOWN: Final = -1
"""No chunk of the image."""

_NO_DIGEST: Final = bytes(32)

Use = Callable[[int, bytes], None]
"""What becomes of a chunk, by its number and its bytes; called by several threads."""


class ImageChunks:
    """The chunks of ``image``, numbered from 1 as ``tree`` has them, each place once.

    ``lengths`` in bytes; ``device`` and ``block`` where they lie. ``home_device`` and ``home_block`` where they lay
    before the image had a hot pack: the places in it are exchanged for those in the image's other packs that hold the
    same chunks, where one does. ``digests`` are BLAKE3, zeros where the packs' chunk dictionaries do not know. ``same``
    is for each chunk the number that stands for all of its digest.

    Digests and homes come from the dictionaries, which only hints: :meth:`read` checks them. Raises FormatError,
    IntegrityError (the image is damaged), UnsupportedError, and what reading the store raises.
    """

    def __init__(self, image: Image) -> None:
        self._image = image
        self.tree = read_back(image.index)
        self.lengths = self.tree.lengths
        self.device: Integers = self.tree.places["device"].astype(np.int64)
        self.block: Integers = self.tree.places["block"].astype(np.int64)
        with ThreadPoolExecutor(THREADS, "tables") as pool:
            tables = list(pool.map(self._tables, image.packs))
        self._tocs = [toc for toc, _ in tables]
        dictionaries = [dictionary for _, dictionary in tables]
        self.digests = self._known_digests(dictionaries)
        self.home_device, self.home_block = self.device.copy(), self.block.copy()
        self._find_homes(dictionaries)
        self.same = self._representatives()

    def __len__(self) -> int:
        """Chunks, and the hole."""
        return len(self.lengths)

    def _tables(self, pack: Pack) -> tuple[Toc, npt.NDArray[np.void]]:
        store = self._image.store
        toc = open_pack(store, pack).toc
        what = f"pack {pack.digest}"
        return toc, read_dictionary(lambda offset, length: store.read(pack.digest, offset, length), toc, what=what)

    def _known_digests(self, dictionaries: list[npt.NDArray[np.void]]) -> npt.NDArray[np.void]:
        digests = np.zeros(len(self), CHUNK["digest"])
        for slot, dictionary in enumerate(dictionaries, 1):
            mine = np.flatnonzero(self.device == slot)
            if not len(mine) or not len(dictionary):
                continue
            order = np.argsort(dictionary["block"], kind="stable")
            at = np.searchsorted(dictionary["block"], self.block[mine], sorter=order)
            rows = dictionary[order[np.minimum(at, len(order) - 1)]]
            known = (rows["block"] == self.block[mine]) & (rows["length"] == self.lengths[mine])
            digests[mine[known]] = rows["digest"][known]
        return digests

    def _find_homes(self, dictionaries: list[npt.NDArray[np.void]]) -> None:
        hot = [pack.slot for pack in self._image.packs if pack.hot is not None]
        away = np.flatnonzero(np.isin(self.device, hot) & (self.digests != np.zeros(1, self.digests.dtype)))
        if not len(away):
            return
        wanted: dict[tuple[bytes, int], list[int]] = {}
        for number in away.tolist():
            wanted.setdefault((self.digests[number].tobytes(), int(self.lengths[number])), []).append(number)
        digests = self.digests[away].view("S32")
        for pack, dictionary in zip(self._image.packs, dictionaries, strict=True):
            if pack.hot is not None:
                continue
            for row in dictionary[np.isin(np.ascontiguousarray(dictionary["digest"]).view("S32"), digests)]:
                for number in wanted.pop((row["digest"].tobytes(), int(row["length"])), ()):
                    self.home_device[number], self.home_block[number] = pack.slot, row["block"]

    def _representatives(self) -> Integers:
        same = np.arange(len(self))
        known = np.flatnonzero(self.digests != np.zeros(1, self.digests.dtype))
        _, first, inverse = np.unique(self.digests[known].view("S32"), return_index=True, return_inverse=True)
        same[known] = known[first[inverse]]
        return same

    # --- whose they are ----------------------------------------------------------------------------------------------

    def numbers(self, profile: Profile) -> Integers:
        """For each row of a profile its chunk's number, :data:`UNKNOWN` where the image has none such: by its place,
        today's or its home, else by its digest."""
        rows = profile.rows
        slots = {pack.hex: pack.slot for pack in self._image.packs}
        slot = np.array([slots.get(pack, 0) for pack in profile.packs] or [0], np.int64)[rows["pack"]]
        found = _lookup(self._places, slot << 32 | rows["block"])
        digests = np.ascontiguousarray(rows["digest"]).view("<u8")
        lost = (found == UNKNOWN) & (digests != 0)
        found[lost] = _lookup(self._prefixes, digests[lost])
        return found

    @cached_property
    def _places(self) -> tuple[npt.NDArray[np.int64], Integers]:
        """Sorted places, as device << 32 | block, and their chunks' numbers. Device 0 has none."""
        keys = np.concatenate((self.device << 32 | self.block, self.home_device << 32 | self.home_block))
        order = np.argsort(keys, kind="stable")
        order = order[keys[order] >= 1 << 32]
        return keys[order], order % len(self)

    @cached_property
    def _prefixes(self) -> tuple[npt.NDArray[np.uint64], Integers]:
        """Sorted beginnings of digests, and their chunks' numbers."""
        keys = np.frombuffer(self.digests.tobytes(), "<u8")[:: CHUNK["digest"].itemsize // 8]
        order = np.argsort(keys, kind="stable")
        order = order[keys[order] != 0]
        return keys[order], order

    # --- their bytes -------------------------------------------------------------------------------------------------

    def read(self, numbers: Integers, use: Use, task: Task, *, home: bool = False) -> None:
        """Read chunks, each frame once, check them and hand them to ``use``, in the order that suits the packs.

        ``home``: from their homes. ``task`` advances by bytes of chunks. Raises IntegrityError (a chunk is not what its
        pack's dictionary says), FormatError (a chunk lies across frames), and what reading the store raises.
        """
        device, block = (self.home_device, self.home_block) if home else (self.device, self.block)
        numbers = numbers[np.lexsort((block[numbers], device[numbers]))]
        slots = device[numbers]
        frames = np.zeros(len(numbers), np.int64)
        for slot in np.unique(slots).tolist():
            mine = slots == slot
            starts = self._tocs[slot - 1].device_offsets
            frames[mine] = np.searchsorted(starts, block[numbers[mine]] * BLOCK, side="right") - 1
        ends = np.flatnonzero((np.diff(slots, append=0) != 0) | (np.diff(frames, append=-1) != 0)) + 1

        def one(first: int, end: int) -> None:
            slot, frame = int(slots[first]), int(frames[first])
            toc, pack = self._tocs[slot - 1], self._image.packs[slot - 1]
            what = f"pack {pack.digest}"
            stored = self._image.store.read(pack.digest, int(toc.offsets[frame]), int(toc.sizes[frame]))
            data = open_frame(stored, toc, frame, what=what)
            for number in numbers[first:end].tolist():
                start = int(block[number]) * BLOCK - int(toc.device_offsets[frame])
                chunk = data[start : start + int(self.lengths[number])]
                self._check(number, chunk, f"{what}: the chunk at block {int(block[number])}")
                use(number, chunk)
                task.advance(len(chunk))

        with ThreadPoolExecutor(THREADS, "chunks") as pool:
            try:
                deque(pool.map(one, [0, *ends[:-1].tolist()], ends.tolist()), 0)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _check(self, number: int, chunk: bytes, what: str) -> None:
        if len(chunk) != self.lengths[number]:
            raise FormatError(f"{what} goes beyond its frame")
        digest = self.digests[number].tobytes()
        if digest not in (_NO_DIGEST, blake3(chunk).digest()):
            raise IntegrityError(f"{what} differs from its digest", hint="run `erofsgen check`")


def _lookup(table: tuple[npt.NDArray[np.generic], Integers], keys: npt.NDArray[np.generic]) -> Integers:
    known, values = table
    found = np.full(len(keys), UNKNOWN)
    if len(known):
        at = np.minimum(np.searchsorted(known, keys), len(known) - 1)
        hit = known[at] == keys
        found[hit] = values[at[hit]]
    return found
