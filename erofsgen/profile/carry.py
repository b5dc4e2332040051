"""Profiles from one build of an image to another: chunks are found again by what they hold, wherever they lie now.

A profile names a chunk by its place and by the first 8 bytes of its BLAKE3. A build keeps most packs of the build
before it, and there the places hold. What was packed anew, since a layer was rebuilt or a pack gave the image too
little, is found by digest and length. The rest is gone from the image, and goes from the profile.

Eight bytes are enough: among a million chunks of the same length two agree with a probability of 3 in 10⁸, and then
a hint is wrong.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import numpy.typing as npt

from erofsgen.pack.toc import read_dictionary
from erofsgen.profile.chunks import Chunks
from erofsgen.profile.profile import Profile, ordered
from erofsgen.store.base import Store
from erofsgen.store.image import Image, open_pack
from erofsgen.store.manifest import Pack

PLACE: Final = np.dtype([("pack", "<u2"), ("block", "<u4"), ("length", "<u4"), ("digest", "V8")])
"""A chunk of an image: number of its pack in :attr:`Places.packs`, 4 KiB block there, length in bytes, the first 8
bytes of its BLAKE3."""

_THREADS: Final = 8
_GOLDEN: Final = np.uint64(0x9E3779B97F4A7C15)
"""2⁶⁴ divided by the golden ratio: multiples of it are spread evenly."""

Integers = npt.NDArray[np.int64]
Keys = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Places:
    """All chunks of an image. ``packs`` are SHA-256 in hex, ``chunks`` an array of :data:`PLACE` in any order."""

    packs: Sequence[str]
    chunks: npt.NDArray[np.void]


def carry(profile: Profile, chunks_of_new: Places) -> Profile:
    """``profile`` for the image whose chunks are ``chunks_of_new``. Runs, reasons, times and confidence stay.

    What is not in that image is left out. Chunks that were several and are one there become one row.
    """
    chunks = chunks_of_new.chunks[np.lexsort((chunks_of_new.chunks["block"], chunks_of_new.chunks["pack"]))]
    numbers = {pack: number for number, pack in enumerate(chunks_of_new.packs)}
    new_numbers = np.array([numbers.get(pack, -1) for pack in profile.packs], np.int64)
    rows = profile.rows
    if not len(rows) or not len(chunks):
        return replace(profile, packs=[], rows=rows[:0])
    packs = new_numbers[rows["pack"]]
    found = _find(_keys(chunks["pack"], chunks["block"]), _keys(np.maximum(packs, 0), rows["block"]))
    stays = (packs >= 0) & (found >= 0) & (chunks["length"][found] == rows["length"])
    by_content = _by_content(chunks, rows)
    place = np.where(stays, found, by_content)
    kept = rows[place >= 0].copy()
    chosen = chunks[place[place >= 0]]
    for name in ("pack", "block", "digest"):
        kept[name] = chosen[name]
    return _compact(profile, chunks_of_new.packs, _joined(kept))


def places(image: Image) -> Places:
    """The chunks of an image that is in a store, by its index and its packs' chunk dictionaries.

    Raises FormatError, IntegrityError, NotFoundError (the image is damaged), RemoteError, StorageError.
    """
    used = Chunks(image.index).table
    starts = np.searchsorted(used["device"], np.arange(1, len(image.packs) + 2))
    wanted = [pack for pack in image.packs if starts[pack.slot - 1] < starts[pack.slot]]
    found = [np.zeros(0, PLACE)]
    for pack, dictionary in zip(wanted, _dictionaries(image.store, wanted), strict=True):
        mine = used[starts[pack.slot - 1] : starts[pack.slot]]
        table = dictionary[np.isin(dictionary["block"], mine["block"])]
        rows = np.zeros(len(table), PLACE)
        rows["pack"] = pack.slot - 1
        rows["block"] = table["block"]
        rows["length"] = table["length"]
        rows["digest"] = prefixes(table["digest"])
        found.append(rows)
    return Places([pack.hex for pack in image.packs], np.concatenate(found))


def with_digests(store: Store, image: Image, profile: Profile) -> Profile:
    """``profile``, of ``image``, with the digests of rows that lack theirs, as the packs' dictionaries in ``store``
    have them: what hosts record has none. Raises as :func:`places`."""
    rows = profile.rows.copy()
    lacking = rows["digest"] == np.zeros(1, "V8")[0]
    known = {pack.hex: pack for pack in image.packs}
    numbers = [int(number) for number in np.unique(rows["pack"][lacking]) if profile.packs[number] in known]
    packs = [known[profile.packs[number]] for number in numbers]
    for number, dictionary in zip(numbers, _dictionaries(store, packs), strict=True):
        if not len(dictionary):
            continue
        mine = np.flatnonzero(lacking & (rows["pack"] == number))
        found = _find(dictionary["block"].astype(np.uint64), rows["block"][mine].astype(np.uint64))
        same = (found >= 0) & (dictionary["length"][found] == rows["length"][mine])
        rows["digest"][mine[same]] = prefixes(dictionary["digest"][found[same]])
    return replace(profile, rows=rows)


def prefixes(digests: npt.NDArray[np.void]) -> npt.NDArray[np.void]:
    """The first 8 bytes of each of an array of 32-byte digests."""
    parts = np.ascontiguousarray(digests).view(np.uint8).reshape(-1, 32)[:, :8]
    return np.ascontiguousarray(parts).view("V8").reshape(-1)


def _dictionaries(store: Store, packs: Iterable[Pack]) -> Iterable[npt.NDArray[np.void]]:
    """Chunk dictionaries of ``packs``, each in the order of its blocks; several are fetched at a time."""

    def read(pack: Pack) -> npt.NDArray[np.void]:
        toc = open_pack(store, pack).toc
        table = read_dictionary(
            lambda offset, length: store.read(pack.digest, offset, length), toc, what=f"pack {pack.digest}"
        )
        return table[np.argsort(table["block"], kind="stable")]

    with ThreadPoolExecutor(_THREADS, "dictionaries") as pool:
        yield from pool.map(read, packs)


def _keys(packs: npt.NDArray[np.integer], blocks: npt.NDArray[np.integer]) -> Keys:
    return packs.astype(np.uint64) << np.uint64(32) | blocks.astype(np.uint64)


def _content(rows: npt.NDArray[np.void]) -> Keys:
    """A number for each row's digest and length. Equal rows have equal ones; whether rows are is asked afterwards."""
    digests = np.ascontiguousarray(rows["digest"]).view("<u8")
    mixed: Keys = digests ^ rows["length"].astype(np.uint64) * _GOLDEN
    return mixed


def _find(table: Keys, wanted: Keys) -> Integers:
    """Where each of ``wanted`` first is in ``table``, which is in order; -1 where it is not."""
    if not len(table):
        return np.full(len(wanted), -1, np.int64)
    at = np.minimum(np.searchsorted(table, wanted), len(table) - 1)
    return np.where(table[at] == wanted, at, -1).astype(np.int64)


def _by_content(chunks: npt.NDArray[np.void], rows: npt.NDArray[np.void]) -> Integers:
    """The first chunk with each row's content, -1 where there is none or the row's is not known."""
    numbers = _content(chunks)
    order = np.argsort(numbers, kind="stable")
    at = _find(numbers[order], _content(rows))
    found = np.where(at >= 0, order[at], -1)
    same = (chunks["digest"][found] == rows["digest"]) & (chunks["length"][found] == rows["length"])
    known = rows["digest"] != np.zeros(1, "V8")[0]
    return np.where((found >= 0) & same & known, found, -1)


def _joined(rows: npt.NDArray[np.void]) -> npt.NDArray[np.void]:
    """Each place once: from the first touch of any of its rows, seen as often as the one that was seen most."""
    if not len(rows):
        return rows
    rows = rows[np.lexsort((rows["first"], rows["block"], rows["pack"]))]
    keys = _keys(rows["pack"], rows["block"])
    starts = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1])))
    joined = rows[starts].copy()
    joined["seen"] = np.maximum.reduceat(rows["seen"], starts)
    return joined


def _compact(profile: Profile, packs: Sequence[str], rows: npt.NDArray[np.void]) -> Profile:
    """Rows whose packs are numbers in ``packs``, as a profile that names only packs it needs."""
    used, numbers = np.unique(rows["pack"], return_inverse=True)
    rows["pack"] = numbers
    return replace(profile, packs=[packs[int(number)] for number in used], rows=ordered(rows))
