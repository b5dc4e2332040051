"""The chunk dictionary of a store: which pack holds a chunk, by the chunk's digest.

::

    dictionary/data.mdb   LMDB environment with three databases
        chunks     BLAKE3 (32 bytes)      -> pack number, block, length in bytes (3 x u32)
        packs      pack number (u32, BE)  -> the pack's descriptor, JSON
        manifests  manifest digest        -> empty: its packs are all in here
    dictionary/lock.mdb

It is a cache of the packs' own chunk dictionaries: deleting it costs one rebuild from the packs' tails and never data.
Entries may outlive their pack; a lookup only answers for packs the store had when the dictionary was opened, and
builders hold the store's build lock from before that until their image is named, so such a pack stays.
LMDB serialises writers of all processes; a transaction covers one layer.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Set
from contextlib import suppress
from pathlib import Path
from struct import Struct
from typing import Final, NamedTuple

import lmdb
import msgspec
import numpy as np

from erofsgen.errors import ErofsgenError, FormatError, StorageError, UnsupportedError
from erofsgen.pack.toc import read_dictionary
from erofsgen.store.base import Descriptor, Store
from erofsgen.store.image import Image, open_pack
from erofsgen.store.manifest import Pack, pack_descriptor

_MAP_SIZE: Final = 1 << 38
"""Address space reserved for the database; disk is used as it grows."""

_VALUE: Final = Struct("<III")
_NUMBER: Final = Struct(">I")
_ROW: Final = np.dtype([("pack", "<u4"), ("block", "<u4"), ("length", "<u4")])


class Place(NamedTuple):
    """Where a chunk lies: pack number in this dictionary, 4 KiB block in that pack's device, length in bytes."""

    pack: int
    block: int
    length: int


class Dictionary:
    """Opened for one build. ``packs`` maps the numbers :meth:`find` answers with to pack descriptors."""

    def __init__(self, path: Path, store: Store, alive: Set[str]) -> None:
        """Open or create it at ``path`` and take in what ``store`` has gained since; ``alive`` are its blobs' digests.

        Raises StorageError.
        """
        self.packs: dict[int, Descriptor] = {}
        self._numbers: dict[str, int] = {}
        try:
            self._open(path)
        except lmdb.DiskError as error:
            raise StorageError(f"{path}: {error}", hint="free some space or choose another --store") from None
        except lmdb.Error:
            shutil.rmtree(path, ignore_errors=True)  # damaged: it is only a cache
            self._open(path)
        self._sync(store, alive)
        self._read = self._env.begin(buffers=True)
        self._get = self._read.get

    def _open(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self._env = lmdb.open(str(path), map_size=_MAP_SIZE, max_dbs=3, max_readers=1024)
        self._chunks = self._env.open_db(b"chunks")
        self._packs = self._env.open_db(b"packs")
        self._manifests = self._env.open_db(b"manifests")

    def close(self) -> None:
        """Close the database. The dictionary cannot be used afterwards."""
        self._read.abort()
        self._env.close()

    def find(self, digest: bytes) -> Place | None:
        """Where the chunk with this BLAKE3 lies in a pack of the store, None if in none."""
        value = self._get(digest, db=self._chunks)
        if value is None:
            return None
        place = Place._make(_VALUE.unpack(value))
        return place if place.pack in self.packs else None

    def add(self, packs: Iterable[tuple[Descriptor, np.ndarray]]) -> None:
        """Remember new packs with their chunks (arrays of :data:`erofsgen.pack.format.CHUNK`), durably.

        Found by later :meth:`find` calls of this object too.
        """
        with self._env.begin(write=True) as transaction:
            for descriptor, chunks in packs:
                self._insert(transaction, descriptor, chunks)
        self._read.abort()
        self._read = self._env.begin(buffers=True)
        self._get = self._read.get

    def prune(self) -> int:
        """Forget every chunk of a pack the store no longer has; returns how many. For ``gc``."""
        with self._env.begin(write=True) as transaction:
            gone = 0
            with transaction.cursor(self._chunks) as cursor:
                cursor.first()
                while value := cursor.value():
                    if _VALUE.unpack(value)[0] in self.packs:
                        cursor.next()
                    else:
                        gone += 1
                        cursor.delete()  # and stand on the next
            with transaction.cursor(self._packs) as cursor:
                for key in [bytes(key) for key in cursor.iternext(values=False)]:
                    if _NUMBER.unpack(key)[0] not in self.packs:
                        transaction.delete(key, db=self._packs)
        return gone

    def _sync(self, store: Store, alive: Set[str]) -> None:
        with self._env.begin() as transaction:
            for key, value in transaction.cursor(self._packs):
                descriptor = msgspec.json.decode(value, type=Descriptor)
                if descriptor.digest in alive:
                    self._take(_NUMBER.unpack(key)[0], descriptor)
            references = store.references()
            new = [
                (name, manifest)
                for name, manifest in references.items()
                if transaction.get(manifest.digest.encode(), db=self._manifests) is None
            ]
        for name, manifest in new:
            try:
                packs = Image(store, name, manifest).packs
                found = [
                    (_descriptor(pack), _chunks(store, pack), pack.hot is not None)
                    for pack in sorted(packs, key=lambda pack: pack.hot is not None)
                    if pack.digest not in self._numbers
                ]
            except ErofsgenError:
                continue  # a damaged or foreign image: nothing to share with; `check` tells
            with self._env.begin(write=True) as transaction:
                for descriptor, chunks, hot in found:
                    self._insert(transaction, descriptor, chunks, hot=hot)
                transaction.put(manifest.digest.encode(), b"", db=self._manifests)

    def _insert(
        self, transaction: lmdb.Transaction, descriptor: Descriptor, chunks: np.ndarray, *, hot: bool = False
    ) -> None:
        """``hot``: it has copies of what other packs hold, in an order that suits one image; they are found in it only
        where no other pack has them."""
        if descriptor.digest in self._numbers:
            return
        with transaction.cursor(self._packs) as cursor:
            number = _NUMBER.unpack(cursor.key())[0] + 1 if cursor.last() else 0
        transaction.put(_NUMBER.pack(number), msgspec.json.encode(descriptor), db=self._packs)
        rows = np.empty(len(chunks), _ROW)
        rows["pack"] = number
        rows["block"] = chunks["block"]
        rows["length"] = chunks["length"]
        keys, values = chunks["digest"].tobytes(), rows.tobytes()
        items = [
            (keys[32 * i : 32 * i + 32], values[12 * i : 12 * i + 12]) for i in np.argsort(chunks["digest"].view("S32"))
        ]
        with transaction.cursor(self._chunks) as cursor:
            cursor.putmulti(items, overwrite=not hot)
        self._take(number, descriptor)

    def _take(self, number: int, descriptor: Descriptor) -> None:
        self.packs[number] = descriptor
        self._numbers[descriptor.digest] = number


def stored(store: Store) -> set[str]:
    """The digests of all blobs; of a store that does not list them, those of the packs that its images name."""
    try:
        return {digest for digest, _ in store.blobs()}
    except UnsupportedError:
        found: set[str] = set()
        for name, manifest in store.references().items():
            with suppress(FormatError):  # a damaged image; `check` tells
                found.update(pack.digest for pack in Image(store, name, manifest).packs)
        return found


def _descriptor(pack: Pack) -> Descriptor:
    return pack_descriptor(pack.digest, pack.size, raw=pack.raw, device_size=pack.device_size, toc=pack.toc)


def _chunks(store: Store, pack: Pack) -> np.ndarray:
    reader = open_pack(store, pack)
    return read_dictionary(
        lambda offset, length: store.read(pack.digest, offset, length), reader.toc, what=f"pack {pack.digest}"
    )
