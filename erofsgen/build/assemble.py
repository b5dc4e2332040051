"""Layer records into an image: one tree, one set of packs, the index and the manifest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain, groupby
from operator import itemgetter
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt
import zstandard
from blake3 import blake3

from erofsgen.build.options import BuildOptions
from erofsgen.build.packer import Packer
from erofsgen.build.record import CHUNK_ROW, LayerRecord
from erofsgen.erofs.format import SUPER, SUPER_OFFSET, Superblock
from erofsgen.erofs.tree import BLOCK, CHUNK_DTYPE, HOLE, Device, Inode
from erofsgen.erofs.writer import write_index
from erofsgen.errors import IntegrityError, UnsupportedError
from erofsgen.oci.layer import Entry
from erofsgen.oci.merge import Merger
from erofsgen.pack.reader import PackReader
from erofsgen.profile.carry import PLACE, Places, prefixes
from erofsgen.store.base import Descriptor, Store
from erofsgen.store.image import open_pack
from erofsgen.store.manifest import (
    ARTIFACT_TYPE,
    CHUNK_SIZE,
    DEVICE_SIZE,
    HOLES_AT_END,
    INDEX_HOLES,
    INDEX_SIZE,
    INDEX_TYPE,
    MANIFEST_TYPE,
    OPTIONS,
    Manifest,
    pack_from_descriptor,
)

KEEP_SHARE: Final = 1 / 8
KEEP_BYTES: Final = 4 << 20
"""A pack stays a device of the image if the image uses this share or this many bytes of it; what it uses of other
packs is written again. Fetching a frame for a few of its bytes, or opening a device for a few of its frames, costs
more than the space."""

_INDEX_LEVEL: Final = 3


class Assembler:
    """Collects layer records, bottom layer first, and turns them into an image."""

    def __init__(self, store: Store, options: BuildOptions) -> None:
        self._store = store
        self._options = options
        self._merger = Merger()
        self._tables: list[np.ndarray] = [np.zeros(1, CHUNK_ROW)]
        self._rows = 1
        self.packs: list[Descriptor] = []
        self._pack_numbers: dict[str, int] = {}

    def add(self, record: LayerRecord) -> None:
        """Put one more layer on top. The record's entries become part of the tree: it cannot be used again."""
        base = self._rows - 1
        numbers = [self._number(pack) for pack in record.packs]
        table = record.chunks[1:].copy()
        if len(table):
            if max(numbers) >= 1 << 16:
                raise UnsupportedError("the image refers to more than 65536 packs", hint="build with --no-dedup")
            table["pack"] = np.array(numbers, np.uint16)[table["pack"]]
        if base:
            _renumber(record.entries, base)
        self._tables.append(table)
        self._rows += len(table)
        self._merger.apply(record.entries)

    def _number(self, pack: Descriptor) -> int:
        number = self._pack_numbers.get(pack.digest)
        if number is None:
            number = self._pack_numbers[pack.digest] = len(self.packs)
            self.packs.append(pack)
        return number

    @property
    def root(self) -> Inode:
        """The merged tree so far."""
        return self._merger.root

    def finish(self, packer: Packer) -> Assembled:
        """Choose the devices, write again what packs that are not worth a device hold, write the index.

        Raises UnsupportedError where the image cannot be expressed, and what reading and writing the store raise.
        """
        table = np.concatenate(self._tables)
        used = _used(self.root)
        table = self._gather(table, used, packer)
        order, slots = self._slots(table, used)
        chunks = np.zeros(len(table), CHUNK_DTYPE)
        chunks["device"] = slots[table["pack"]]
        chunks["block"] = table["block"]
        chunks[HOLE] = 0
        packs = [self.packs[number] for number in order]
        devices = [
            Device(pack.digest.removeprefix("sha256:"), int(pack.annotations[DEVICE_SIZE]) // BLOCK) for pack in packs
        ]
        fingerprints = _Fingerprints(table["digest"].tobytes()) if self._options.share_pages else None
        index = bytes(
            write_index(self.root, chunks, devices, chunk_size=self._options.chunk_size, fingerprints=fingerprints)
        )
        descriptor = put_index(self._store, index, self._options, {INDEX_HOLES: HOLES_AT_END})
        inodes = Superblock(*SUPER.unpack_from(index, SUPER_OFFSET)).inos
        places = Places([device.tag for device in devices], _places(table[used], slots))
        return Assembled(descriptor, packs, inodes, len(index), int(table["length"][used].sum()), places)

    def _gather(self, table: np.ndarray, used: npt.NDArray[np.int64], packer: Packer) -> np.ndarray:
        """Write again the used chunks of packs that give the image too little; returns the table with new places."""
        packs = table["pack"][used]
        padded = (table["length"][used].astype(np.int64) + BLOCK - 1) & -BLOCK
        contributed = np.bincount(packs, padded, minlength=len(self.packs)).astype(np.int64)
        sizes = np.array([int(pack.annotations[DEVICE_SIZE]) for pack in self.packs], np.int64)
        poor = (contributed > 0) & (contributed < KEEP_BYTES) & (contributed < sizes * KEEP_SHARE)
        self._limit_devices(contributed, poor)
        if not poor.any():
            return table
        moved = used[poor[packs]]
        moved = moved[np.lexsort((table["block"][moved], table["pack"][moved]))]  # neighbours stay neighbours
        places = []
        for pack, rows in groupby(table[moved], itemgetter("pack")):
            reader = open_pack(self._store, pack_from_descriptor(self.packs[int(pack)]))
            places += [packer.add(_chunk(reader, row), row["digest"].tobytes(), raw=reader.toc.raw) for row in rows]
        numbers = np.array([self._number(pack.descriptor) for pack in packer.flush()], np.uint16)
        new = np.array(places, np.int64)
        table["pack"][moved] = numbers[new[:, 0]]
        table["block"][moved] = new[:, 1]
        return table

    def _limit_devices(self, contributed: npt.NDArray[np.int64], poor: npt.NDArray[np.bool_]) -> None:
        """Mark the smallest contributors poor, too, until the image has few enough devices."""
        limit = self._options.max_devices
        rich = np.flatnonzero((contributed > 0) & ~poor)
        rich = rich[np.argsort(contributed[rich], kind="stable")]
        moved = int(contributed[poor].sum())
        while len(rich) + -(-2 * moved // self._options.pack_size) > limit:
            if not len(rich):
                raise UnsupportedError(
                    f"the image does not fit {limit} devices of {self._options.pack_size} bytes",
                    hint="raise --max-devices",
                )
            poor[rich[0]] = True
            moved += int(contributed[rich[0]])
            rich = rich[1:]

    def _slots(self, table: np.ndarray, used: npt.NDArray[np.int64]) -> tuple[list[int], npt.NDArray[np.uint16]]:
        """The packs in use, in order of first mention, and pack number to device slot (1..N)."""
        order = [int(number) for number in np.unique(table["pack"][used])]
        if len(order) > self._options.max_devices:
            raise UnsupportedError(
                f"the image needs {len(order)} devices, {self._options.max_devices} are allowed",
                hint="raise --max-devices",
            )
        slots = np.zeros(max(len(self.packs), 1), np.uint16)
        slots[order] = np.arange(1, len(order) + 1)
        return order, slots


class Assembled(msgspec.Struct, frozen=True):
    """The index and packs of an image, all in the store. Sizes in bytes; ``unique_bytes`` counts each chunk once;
    ``places`` is where its chunks lie."""

    index: Descriptor
    packs: list[Descriptor]
    inodes: int
    index_size: int
    unique_bytes: int
    places: Places


def put_index(store: Store, index: bytes, options: BuildOptions, annotations: dict[str, str]) -> Descriptor:
    """Store an index; returns its descriptor, with its size and ``annotations``."""
    packed = zstandard.ZstdCompressor(_INDEX_LEVEL, threads=options.worker_threads).compress(index)
    digest, size = store.put(packed)
    return Descriptor(INDEX_TYPE, digest, size, {INDEX_SIZE: str(len(index)), **annotations})


def write_manifest(
    store: Store, assembled: Assembled, config: bytes, subject: Descriptor | None, options: BuildOptions
) -> Descriptor:
    """Store the config and the manifest; returns the manifest's descriptor, not yet named."""
    digest, size = store.put(config)
    manifest = Manifest(
        schema_version=2,
        media_type=MANIFEST_TYPE,
        artifact_type=ARTIFACT_TYPE,
        config=Descriptor("application/vnd.oci.image.config.v1+json", digest, size),
        layers=[assembled.index, *assembled.packs],
        subject=subject,
        annotations={CHUNK_SIZE: str(options.chunk_size), OPTIONS: options.fingerprint},
    )
    data = msgspec.json.encode(manifest)
    return Descriptor(MANIFEST_TYPE, *store.put(data), artifact_type=ARTIFACT_TYPE, data=data)


class _Fingerprints:
    """A file's content digest: BLAKE3 over its chunks' digests and its size, or of inlined bytes."""

    def __init__(self, digests: bytes) -> None:
        self._digests = digests

    def __call__(self, inode: Inode) -> bytes:
        if not inode.chunks:
            return blake3(inode.data, derive_key_context="erofsgen fingerprint of inlined bytes").digest()
        digests = self._digests
        hasher = blake3(derive_key_context="erofsgen fingerprint of chunk digests")
        hasher.update(b"".join(digests[32 * number : 32 * number + 32] for number in inode.chunks))
        hasher.update(inode.size.to_bytes(8, "little"))
        return hasher.digest()


def _chunk(reader: PackReader, row: np.void) -> bytes:
    """The bytes of a chunk by its row of :data:`CHUNK_ROW`. The dictionary it may come from is only a hint."""
    chunk = reader.read(int(row["block"]) * BLOCK, int(row["length"]))
    if blake3(chunk).digest() != row["digest"].tobytes():
        raise IntegrityError(
            f"{reader.what}: the chunk at block {int(row['block'])} differs from its digest",
            hint="run `erofsgen check`",
        )
    return chunk


def _renumber(entries: Iterable[Entry], base: int) -> None:
    """Add ``base`` to every chunk number that is no hole: numbers of one layer become numbers of the image."""
    for entry in entries:
        inode = entry.inode
        if inode is not None and inode.chunks:
            inode.chunks = tuple([number + base if number else HOLE for number in inode.chunks])


def _places(rows: np.ndarray, slots: npt.NDArray[np.uint16]) -> npt.NDArray[np.void]:
    """Rows of :data:`CHUNK_ROW` as rows of :data:`PLACE`; ``slots`` maps their packs to device slots."""
    chunks = np.zeros(len(rows), PLACE)
    chunks["pack"] = slots[rows["pack"]] - 1
    for name in ("block", "length"):
        chunks[name] = rows[name]
    chunks["digest"] = prefixes(rows["digest"])
    return chunks


def _used(root: Inode) -> npt.NDArray[np.int64]:
    """The numbers of all chunks that files of the tree refer to, each once, in ascending order."""
    lists: list[Sequence[int]] = []
    directories = [root]
    while directories:
        for inode in (directories.pop().children or {}).values():
            if inode.children is not None:
                directories.append(inode)
            elif inode.chunks:
                lists.append(inode.chunks)
    numbers = np.unique(np.fromiter(chain.from_iterable(lists), np.int64))
    used: npt.NDArray[np.int64] = numbers[numbers != HOLE]
    return used
