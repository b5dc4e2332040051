"""An erofsgen image in a store: its manifest, index and packs, opened for reading.

The chain of trust runs from the manifest's digest: it names the index by digest and every pack by digest and by the
digest of its TOC; the TOC names every frame. Nothing is handed out that has not been checked along that chain.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import msgspec
import zstandard

from erofsgen.erofs.reader import Index, Node
from erofsgen.errors import FormatError, IntegrityError, NotFoundError
from erofsgen.pack.reader import PackReader
from erofsgen.pack.toc import Toc
from erofsgen.pack.writer import TocLocation
from erofsgen.store.base import Descriptor, Store

MANIFEST_TYPE: Final = "application/vnd.oci.image.manifest.v1+json"
ARTIFACT_TYPE: Final = "application/vnd.erofsgen.image.v1"
INDEX_TYPE: Final = "application/vnd.erofsgen.index.v1.erofs+zstd"
ZSTD_PACK_TYPE: Final = "application/vnd.erofsgen.pack.v1+zstd"
RAW_PACK_TYPE: Final = "application/vnd.erofsgen.pack.v1"

TOC_DIGEST: Final = "org.erofsgen.toc.digest"
"""On a pack's descriptor: BLAKE3 of the TOC's bytes, ``blake3:…``."""
TOC_OFFSET: Final = "org.erofsgen.toc.offset"
TOC_SIZE: Final = "org.erofsgen.toc.size"
DEVICE_SIZE: Final = "org.erofsgen.device.size"
"""On a pack's descriptor: bytes of its device address space."""
INDEX_SIZE: Final = "org.erofsgen.index.size"
"""On the index's descriptor: bytes of the EROFS image, uncompressed."""
CHUNK_SIZE: Final = "org.erofsgen.chunk.size"
"""On the manifest: the chunk size it was built with."""

_MANIFEST_LIMIT: Final = 64 << 20
_INDEX_LIMIT: Final = 16 << 30


class Manifest(msgspec.Struct, rename="camel", omit_defaults=True):
    """The OCI image manifest of an erofsgen image. ``layers[0]`` is the index, the rest packs in device-slot order."""

    schema_version: int
    media_type: str
    config: Descriptor
    layers: list[Descriptor]
    artifact_type: str | None = None
    subject: Descriptor | None = None
    annotations: dict[str, str] = {}


@dataclass(frozen=True)
class Pack:
    """A pack as a manifest names it. ``slot`` counts from 1, as EROFS device ids do; ``device_size`` is in bytes."""

    slot: int
    digest: str
    size: int
    raw: bool
    device_size: int
    toc: TocLocation

    @property
    def hex(self) -> str:
        """The digest without its algorithm: the device's tag and the name of its data file."""
        return self.digest.removeprefix("sha256:")


class Image:
    """One image of a store. Opening reads the manifest only; the index and packs are read when asked for."""

    def __init__(self, store: Store, name: str, descriptor: Descriptor) -> None:
        self.store = store
        self.name = name
        self.digest = descriptor.digest
        self.manifest_size = descriptor.size
        data = read_blob(store, descriptor.digest, descriptor.size, limit=_MANIFEST_LIMIT)
        try:
            self.manifest = msgspec.json.decode(data, type=Manifest)
        except msgspec.MsgspecError as error:
            raise FormatError(f"{name}: manifest {descriptor.digest}: {error}") from None
        layers = self.manifest.layers
        if not layers or layers[0].media_type != INDEX_TYPE:
            raise FormatError(f"{name}: not an erofsgen image", hint="convert it with `erofsgen build`")
        self.index_descriptor = layers[0]
        self.packs = tuple(pack_from_descriptor(layer, slot, of=name) for slot, layer in enumerate(layers[1:], 1))
        self._readers: dict[int, PackReader] = {}

    @classmethod
    def open(cls, store: Store, name: str) -> Image:
        """The image tagged ``name``, or whose manifest digest is ``name`` (``sha256:…``, or a unique prefix of it of
        at least 8 hex digits). Raises NotFoundError."""
        references = store.references()
        if name in references:
            return cls(store, name, references[name])
        wanted = name.removeprefix("sha256:")
        found = {
            descriptor.digest: (tag, descriptor)
            for tag, descriptor in references.items()
            if len(wanted) >= 8 and descriptor.digest.removeprefix("sha256:").startswith(wanted)
        }
        if len(found) != 1:
            raise NotFoundError(f"{store.url}: no image {name!r}", hint="see `erofsgen images`")
        tag, descriptor = next(iter(found.values()))
        return cls(store, tag, descriptor)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The source image's config, decoded."""
        descriptor = self.manifest.config
        data = read_blob(self.store, descriptor.digest, descriptor.size, limit=_MANIFEST_LIMIT)
        try:
            return msgspec.json.decode(data, type=dict[str, Any])
        except msgspec.MsgspecError as error:
            raise FormatError(f"{self.name}: config {descriptor.digest}: {error}") from None

    def index_bytes(self) -> bytes:
        """The EROFS image, decompressed and checked."""
        descriptor = self.index_descriptor
        size = _number(self.name, descriptor, INDEX_SIZE, _INDEX_LIMIT)
        data = read_blob(self.store, descriptor.digest, descriptor.size, limit=_INDEX_LIMIT)
        try:
            claimed = zstandard.get_frame_parameters(data).content_size
            if claimed != size:
                raise FormatError(f"{self.name}: index {descriptor.digest} is {claimed} bytes, {size} expected")
            return zstandard.ZstdDecompressor().decompress(data, max_output_size=size)
        except zstandard.ZstdError as error:
            raise FormatError(f"{self.name}: index {descriptor.digest}: {error}") from None

    @cached_property
    def index(self) -> Index:
        """The index, opened. Its device slots are checked against the manifest's packs."""
        index = Index(self.index_bytes())
        named = [(pack.hex, pack.device_size // 4096) for pack in self.packs]
        if [(device.tag, device.blocks) for device in index.devices] != named:
            raise FormatError(f"{self.name}: the index's devices are not the manifest's packs")
        return index

    def pack_reader(self, slot: int) -> PackReader:
        """Random access to the device in ``slot`` (1..N). Raises FormatError for other numbers."""
        reader = self._readers.get(slot)
        if reader is None:
            if not 1 <= slot <= len(self.packs):
                raise FormatError(f"{self.name}: no device {slot}")
            reader = self._readers[slot] = open_pack(self.store, self.packs[slot - 1])
        return reader

    def read(self, node: Node, *, piece: int = 1 << 20) -> Iterator[bytes]:
        """A regular file's bytes in order, in pieces of at most ``piece`` bytes; holes come as zeros."""
        inline = node.inline()
        if inline:
            yield inline
            return
        for _, length, device, start in node.extents():
            done = 0
            while done < length:
                step = min(piece, length - done)
                yield bytes(step) if device is None else self.pack_reader(device).read(start + done, step)
                done += step


def open_pack(store: Store, pack: Pack) -> PackReader:
    """Read and check a pack's TOC, then give access to its device bytes."""
    what = f"pack {pack.digest}"
    toc = Toc(store.read(pack.digest, pack.toc.offset, pack.toc.size), pack.toc, what=what)
    if toc.raw != pack.raw or toc.device_size != pack.device_size:
        raise FormatError(f"{what}: its table of contents contradicts the manifest")
    return PackReader(lambda offset, length: store.read(pack.digest, offset, length), toc, what=what)


def read_blob(store: Store, digest: str, size: int, *, limit: int) -> bytes:
    """A whole blob, checked against its digest and length. Raises IntegrityError, NotFoundError, FormatError."""
    if not 0 <= size <= limit:
        raise FormatError(f"{store.url}: blob {digest} claims {size} bytes, at most {limit} are sensible")
    data = store.read(digest, 0, size)
    if store.size(digest) != size or f"sha256:{hashlib.sha256(data).hexdigest()}" != digest:
        raise IntegrityError(
            f"{store.url}: blob {digest} differs from its digest or length", hint="delete it and build the image again"
        )
    return data


def pack_descriptor(digest: str, size: int, *, raw: bool, device_size: int, toc: TocLocation) -> Descriptor:
    """How a manifest names a pack."""
    annotations = {
        DEVICE_SIZE: str(device_size),
        TOC_DIGEST: f"blake3:{toc.digest}",
        TOC_OFFSET: str(toc.offset),
        TOC_SIZE: str(toc.size),
    }
    return Descriptor(RAW_PACK_TYPE if raw else ZSTD_PACK_TYPE, digest, size, annotations)


def pack_from_descriptor(layer: Descriptor, slot: int = 0, *, of: str = "pack") -> Pack:
    """The pack that a descriptor names, in device ``slot`` where it has one. Raises FormatError naming ``of``."""
    if layer.media_type not in (ZSTD_PACK_TYPE, RAW_PACK_TYPE):
        raise FormatError(f"{of}: blob {layer.digest} has the unknown media type {layer.media_type!r}")
    digest = layer.annotations.get(TOC_DIGEST, "")
    if not digest.startswith("blake3:"):
        raise FormatError(f"{of}: pack {layer.digest}: no usable {TOC_DIGEST} annotation")
    toc = TocLocation(
        _number(of, layer, TOC_OFFSET, layer.size),
        _number(of, layer, TOC_SIZE, layer.size),
        digest.removeprefix("blake3:"),
    )
    if toc.offset + toc.size != layer.size:
        raise FormatError(f"{of}: pack {layer.digest}: the table of contents does not end with the pack")
    device_size = _number(of, layer, DEVICE_SIZE, 1 << 32)
    return Pack(slot, layer.digest, layer.size, layer.media_type == RAW_PACK_TYPE, device_size, toc)


def _number(name: str, layer: Descriptor, key: str, limit: int) -> int:
    text = layer.annotations.get(key, "")
    if not (text.isascii() and text.isdigit() and len(text) < 20) or int(text) > limit:
        raise FormatError(f"{name}: blob {layer.digest}: no usable {key} annotation")
    return int(text)
