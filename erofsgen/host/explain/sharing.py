"""Who else uses chunks: other images whose indexes name the same blocks of the same packs."""

from __future__ import annotations

import mmap
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from erofsgen.erofs.format import CHUNK_INDEX_DTYPE
from erofsgen.erofs.reader import Index
from erofsgen.errors import ErofsgenError, StorageError
from erofsgen.host.cache.cache import CachedImage, HostCache
from erofsgen.host.explain.facts import Sharer
from erofsgen.host.mount.state import MountInfo
from erofsgen.store.base import Store
from erofsgen.store.image import Image
from erofsgen.store.inspect import open_all
from erofsgen.store.manifest import Pack

_SCAN: Final = 16 << 20
"""Bytes of an index that are looked at at a time."""

_BLOCK: Final = (1 << 32) - 1

Known = Literal["host cache", "store"]
Chunks = Mapping[str, npt.NDArray[np.int64]]
"""Blocks at which chunks begin, each once, by the SHA-256 of their packs."""
Used = dict[str, npt.NDArray[np.int64]]
"""The same, of what an image uses."""


def open_index(image: CachedImage) -> Index:
    """The index of an image of the cache. Raises StorageError, FormatError."""
    try:
        with image.index.open("rb") as file:
            return Index(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError) as error:  # ValueError: it is empty
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise StorageError(f"{image.index}: {reason}", hint="run `erofsgen pull` again") from error


def users(index: Index, chunks: Chunks, *, but: Collection[int] = ()) -> list[bytes]:
    """The files of an image that use any of ``chunks``. Inodes ``but`` are passed over."""
    wanted = _keys(index, chunks)
    found = list(_tables(index, wanted, but))
    if not found:
        return []
    owners = np.repeat(np.arange(len(found)), [len(keys) for _, keys in found])
    hits = np.isin(np.concatenate([keys for _, keys in found]), wanted)
    return [found[number][0] for number in np.unique(owners[hits]).tolist()]


def _tables(
    index: Index, wanted: npt.NDArray[np.int64], but: Collection[int] = ()
) -> Iterator[tuple[bytes, npt.NDArray[np.int64]]]:
    """The chunk tables of all files, as keys; none where none of ``wanted`` can be in them."""
    if not len(wanted) or not _may_have(index, wanted):
        return
    seen = set(but)
    for path, node in index.walk():
        if node.nid not in seen and node.table_size:
            seen.add(node.nid)
            _, end = node.span
            yield path, _as_keys(np.frombuffer(index.buffer[end - node.table_size : end], CHUNK_INDEX_DTYPE))


def _keys(index: Index, chunks: Chunks) -> npt.NDArray[np.int64]:
    """The chunks as this index's chunk tables name them, as numbers: slot and block."""
    keys = [
        np.int64(slot) << 32 | chunks[device.tag]
        for slot, device in enumerate(index.devices, 1)
        if device.tag in chunks
    ]
    return np.concatenate(keys) if keys else np.zeros(0, np.int64)


def _as_keys(table: npt.NDArray[np.void]) -> npt.NDArray[np.int64]:
    keys: npt.NDArray[np.int64] = table["device_id"].astype(np.int64) << 32 | table["startblk_lo"]
    return keys


def _may_have(index: Index, wanted: npt.NDArray[np.int64]) -> bool:
    """Whether any eight bytes of an index are as an entry for one of ``wanted`` would be: tables are aligned to that.

    That takes milliseconds, and walking all files of an image may take seconds.
    """
    size = len(index.buffer) // CHUNK_INDEX_DTYPE.itemsize * CHUNK_INDEX_DTYPE.itemsize
    pieces = (index.buffer[at : min(size, at + _SCAN)] for at in range(0, size, _SCAN))
    return any(bool(np.isin(_as_keys(np.frombuffer(piece, CHUNK_INDEX_DTYPE)), wanted).any()) for piece in pieces)


class Sharing:
    """Looks for images that use ``chunks``, other than the one with the manifest's digest ``own``."""

    def __init__(self, own: str, chunks: Chunks, problems: list[str]) -> None:
        self._own = own
        self._chunks = chunks
        self._problems = problems
        self._used: dict[str, Used] = {}  # by the images' digests; those that were looked at
        self._names: defaultdict[str, set[str]] = defaultdict(set)
        self._known: defaultdict[str, list[Known]] = defaultdict(list)

    def look_in_cache(self, cache: HostCache) -> None:
        """Images of the host cache."""
        for image in cache.images():
            self._names[image.digest].update(image.names)
            self._look(image.digest, "host cache", image.packs, partial(open_index, image))

    def look_in(self, store: Store) -> None:
        """Images of a store: their manifests, and the indexes of those that have any of the packs."""
        try:
            references = store.references()
        except ErofsgenError as error:
            self._problems.append(f"other images: {error}")
            return
        for name, descriptor in references.items():
            self._names[descriptor.digest].add(name)
        unread = 0
        others = [item for item in references.items() if item[1].digest != self._own]
        for digest, image in open_all(store, others).items():
            if isinstance(image, Image):
                self._look(digest, "store", image.packs, partial(getattr, image, "index"))
            else:
                unread += 1
        if unread:
            self._problems.append(f"other images: {store.url}: {unread} manifests cannot be read")

    def found(self, mounts: Sequence[MountInfo]) -> list[Sharer]:
        """Those that use any of the chunks, most of them first."""
        sharers = [
            Sharer(
                digest=digest,
                names=sorted(self._names[digest]),
                known=self._known[digest],
                chunks=sum(map(len, used.values())),
                mounts=[mount.target for mount in mounts if mount.digest == digest],
            )
            for digest, used in self._used.items()
            if used
        ]
        return sorted(sharers, key=lambda sharer: (-sharer.chunks, sharer.names))

    def users_of(self, pack: str, blocks: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """How many images use the chunks at ``blocks`` of a pack, each."""
        count = np.zeros(len(blocks), np.int64)
        for used in self._used.values():
            if pack in used:
                count += np.isin(blocks, used[pack])
        return count

    def _look(self, digest: str, known: Known, packs: Iterable[Pack], index: Callable[[], Index]) -> None:
        if digest == self._own or not any(pack.hex in self._chunks for pack in packs):
            return
        self._known[digest].append(known)
        if digest in self._used:
            return
        try:
            self._used[digest] = _used(index(), self._chunks)
        except ErofsgenError as error:
            self._problems.append(f"image {digest}: {error}")


def _used(index: Index, chunks: Chunks) -> Used:
    """Those of ``chunks`` that an image uses."""
    wanted = _keys(index, chunks)
    tables = [keys for _, keys in _tables(index, wanted)]
    used = np.intersect1d(np.concatenate(tables), wanted) if tables else np.zeros(0, np.int64)
    slots = used >> 32
    return {index.devices[slot - 1].tag: used[slots == slot] & _BLOCK for slot in np.unique(slots).tolist()}
