"""The manifest of an erofsgen image: media types, annotations, and what a host needs to trust a pack lazily."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

import msgspec

from erofsgen.errors import FormatError
from erofsgen.pack.location import TocLocation
from erofsgen.store.base import Descriptor

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
HOT: Final = "org.erofsgen.hot"
"""On a pack's descriptor: it is a hot pack, which holds again what starts of the image touch, in the order of first
touch, and is written by ``erofsgen optimize``. The value counts its device bytes, from its start on, that a start of
every command touches: a host streams these without knowing more, and the rest of the pack by its profile."""
INDEX_SIZE: Final = "org.erofsgen.index.size"
"""On the index's descriptor: bytes of the EROFS image, uncompressed."""
INDEX_HOLES: Final = "org.erofsgen.index.holes"
"""On the index's descriptor: where files can have holes. Without it: anywhere, which fscache cannot serve."""
HOLES_AT_END: Final = "end"
"""Behind all of a file's data only."""
CHUNK_SIZE: Final = "org.erofsgen.chunk.size"
"""On the manifest: the chunk size it was built with."""
OPTIONS: Final = "org.erofsgen.options"
"""On the manifest: the fingerprint of the options it was built with, so that the same need not be built again."""

_SHA256: Final = re.compile("sha256:[0-9a-f]{64}")

MANIFEST_LIMIT: Final = 64 << 20
"""Bytes of a manifest or config at most: 65,535 packs fit."""


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
    """A pack as a manifest names it. ``slot`` counts from 1, as EROFS device ids do; ``device_size`` is in bytes.
    ``hot``: of a hot pack the device bytes that every start touches, see :data:`HOT`; None of others."""

    slot: int
    digest: str
    size: int
    raw: bool
    device_size: int
    toc: TocLocation
    hot: int | None = None

    @property
    def hex(self) -> str:
        """The digest without its algorithm: the device's tag and the name of its data file."""
        return self.digest.removeprefix("sha256:")


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
    if not _SHA256.fullmatch(layer.digest):  # it becomes the name of a file
        raise FormatError(f"{of}: not a sha256 digest: {layer.digest!r}")
    digest = layer.annotations.get(TOC_DIGEST, "")
    if not digest.startswith("blake3:"):
        raise FormatError(f"{of}: pack {layer.digest}: no usable {TOC_DIGEST} annotation")
    toc = TocLocation(
        number(of, layer, TOC_OFFSET, layer.size),
        number(of, layer, TOC_SIZE, layer.size),
        digest.removeprefix("blake3:"),
    )
    if toc.offset + toc.size != layer.size:
        raise FormatError(f"{of}: pack {layer.digest}: the table of contents does not end with the pack")
    device_size = number(of, layer, DEVICE_SIZE, 1 << 32)
    hot = number(of, layer, HOT, device_size) if HOT in layer.annotations else None
    return Pack(slot, layer.digest, layer.size, layer.media_type == RAW_PACK_TYPE, device_size, toc, hot)


def number(name: str, layer: Descriptor, key: str, limit: int) -> int:
    """The annotation ``key``, a decimal number of at most ``limit``. Raises FormatError naming ``name``."""
    text = layer.annotations.get(key, "")
    if not (text.isascii() and text.isdigit() and len(text) < 20) or int(text) > limit:
        raise FormatError(f"{name}: blob {layer.digest}: no usable {key} annotation")
    return int(text)
