"""The layer record: what converting a layer gave, kept so that no image with that layer has to read it again.

A record is a MessagePack array ``[version, packs, body]``; ``body`` is a zstd frame of the MessagePack array
``[entries, chunks]``.

``packs``    descriptors of the packs that hold the layer's chunks, new and old ones, as manifests write them
``entries``  the layer's entries in tar order (:class:`erofsgen.oci.layer.Entry`); their chunk numbers index ``chunks``
``chunks``   rows of :data:`CHUNK_ROW`; row 0 stands for a hole

It is kept under a key made of the layer's digest and every option its content depends on.
"""

from __future__ import annotations

from typing import Final

import msgspec
import numpy as np
import zstandard
from blake3 import blake3

from erofsgen.build.options import BuildOptions
from erofsgen.oci.layer import Entry
from erofsgen.store.base import Descriptor, Store

VERSION: Final = 2

CHUNK_ROW: Final = np.dtype([("digest", "V32"), ("block", "<u4"), ("length", "<u4"), ("pack", "<u2")])
"""A chunk of a layer: its BLAKE3, its place in pack number ``pack`` of the record, its length in bytes."""


class _Body(msgspec.Struct, array_like=True, gc=False):
    entries: list[Entry]
    chunks: bytes


class _Record(msgspec.Struct, array_like=True, gc=False):
    version: int
    packs: list[Descriptor]
    body: bytes


class LayerRecord(msgspec.Struct):
    """A layer, converted. ``chunks`` is an array of :data:`CHUNK_ROW`."""

    entries: list[Entry]
    packs: list[Descriptor]
    chunks: np.ndarray


def record_key(layer: str, options: BuildOptions) -> str:
    """The key of the record for the layer with digest ``layer``: 64 hex digits."""
    parameters = (VERSION, layer, *options.layer_parameters())
    return blake3(msgspec.msgpack.encode(parameters)).hexdigest()


def encode(record: LayerRecord) -> bytes:
    """The record's bytes."""
    body = msgspec.msgpack.encode(_Body(record.entries, record.chunks.tobytes()))
    packed = zstandard.ZstdCompressor(1, write_checksum=True).compress(body)
    return msgspec.msgpack.encode(_Record(VERSION, record.packs, packed))


def load(store: Store, key: str) -> LayerRecord | None:
    """The record under ``key``, None where there is none that can be used: it is missing, damaged or of another
    version, or a pack it needs is gone from the store."""
    outer = _outer(store.record(key))
    if outer is None or not _has_packs(store, outer):
        return None
    try:
        body = msgspec.msgpack.decode(zstandard.ZstdDecompressor().decompress(outer.body), type=_Body)
        chunks = np.frombuffer(body.chunks, CHUNK_ROW)
    except (msgspec.MsgspecError, zstandard.ZstdError, ValueError):
        return None
    if len(chunks) == 0 or (len(chunks) > 1 and chunks["pack"].max() >= len(outer.packs)):
        return None
    return LayerRecord(body.entries, outer.packs, chunks)


def usable(store: Store, key: str) -> bool:
    """Whether there is a record of this version whose packs the store has. :func:`load` looks further inside."""
    outer = _outer(store.record(key))
    return outer is not None and _has_packs(store, outer)


def record_packs(store: Store, key: str) -> list[Descriptor] | None:
    """Only the packs of a record, None where it cannot be used."""
    outer = _outer(store.record(key))
    return None if outer is None else outer.packs


def _has_packs(store: Store, outer: _Record) -> bool:
    return all(store.size(pack.digest) == pack.size for pack in outer.packs)


def _outer(data: bytes | None) -> _Record | None:
    if data is None:
        return None
    try:
        record = msgspec.msgpack.decode(data, type=_Record)
    except msgspec.MsgspecError:
        return None
    return record if record.version == VERSION else None
