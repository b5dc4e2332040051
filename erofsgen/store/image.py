"""An erofsgen image in a store: its manifest, index and packs, opened for reading.

The chain of trust runs from the manifest's digest: it names the index by digest and every pack by digest and by the
digest of its TOC; the TOC names every frame. Nothing is handed out that has not been checked along that chain.

What reads indexes and packs is imported where it is used: opening an image is a matter of milliseconds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, Final

import msgspec

from erofsgen.errors import FormatError, IntegrityError, NotFoundError
from erofsgen.oci.reference import spellings
from erofsgen.store.base import Descriptor, Store
from erofsgen.store.documents import EMBEDDED
from erofsgen.store.manifest import (
    INDEX_SIZE,
    INDEX_TYPE,
    MANIFEST_LIMIT,
    MANIFEST_TYPE,
    Manifest,
    Pack,
    number,
    pack_from_descriptor,
)

if TYPE_CHECKING:
    from erofsgen.erofs.node import Extent, Node
    from erofsgen.erofs.reader import Index
    from erofsgen.pack.reader import FrameCache, PackReader

_INDEX_LIMIT: Final = 16 << 30


class Image:
    """One image of a store. Opening reads the manifest only; the index and packs are read when asked for."""

    def __init__(self, store: Store, name: str, descriptor: Descriptor) -> None:
        self.store = store
        self.name = name
        self.digest = descriptor.digest
        self.manifest_size = descriptor.size
        data = read_blob(store, descriptor.digest, descriptor.size, limit=MANIFEST_LIMIT)
        try:
            self.manifest = msgspec.json.decode(data, type=Manifest)
        except msgspec.MsgspecError as error:
            raise FormatError(f"{name}: manifest {descriptor.digest}: {error}") from None
        layers = self.manifest.layers
        if not layers or layers[0].media_type != INDEX_TYPE:
            raise FormatError(f"{name}: not an erofsgen image", hint="convert it with `erofsgen build`")
        self.index_descriptor = layers[0]
        self.packs = tuple(pack_from_descriptor(layer, slot, of=name) for slot, layer in enumerate(layers[1:], 1))
        self._document = data if len(data) <= EMBEDDED else None
        self._readers: dict[int, PackReader] = {}
        self._kept: FrameCache | None = None

    @classmethod
    def open(cls, store: Store, name: str) -> Image:
        """The image tagged ``name`` or its canonical form, or whose manifest digest is ``name`` (``sha256:…``, or a
        unique prefix of it of at least 8 hex digits). Raises NotFoundError."""
        for spelling in spellings(name):
            meant = store.reference(spelling)
            if meant is not None:
                return cls(store, spelling, meant)
        wanted = name.removeprefix("sha256:")
        found = {
            descriptor.digest: (tag, descriptor)
            for tag, descriptor in store.references().items()
            if len(wanted) >= 8 and descriptor.digest.removeprefix("sha256:").startswith(wanted)
        }
        if len(found) != 1:
            raise NotFoundError(f"{store.url}: no image {name!r}", hint="see `erofsgen images`")
        tag, descriptor = next(iter(found.values()))
        return cls(store, tag, descriptor)

    @property
    def descriptor(self) -> Descriptor:
        """What names its manifest, and has it along if it is small."""
        artifact_type = self.manifest.artifact_type
        return Descriptor(
            MANIFEST_TYPE, self.digest, self.manifest_size, artifact_type=artifact_type, data=self._document
        )

    @cached_property
    def config(self) -> dict[str, Any]:
        """The source image's config, decoded."""
        descriptor = self.manifest.config
        data = read_blob(self.store, descriptor.digest, descriptor.size, limit=MANIFEST_LIMIT)
        try:
            return msgspec.json.decode(data, type=dict[str, Any])
        except msgspec.MsgspecError as error:
            raise FormatError(f"{self.name}: config {descriptor.digest}: {error}") from None

    def index_bytes(self) -> bytes:
        """The EROFS image, decompressed and checked."""
        import zstandard

        descriptor = self.index_descriptor
        size = number(self.name, descriptor, INDEX_SIZE, _INDEX_LIMIT)
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
        from erofsgen.erofs.reader import Index

        index = Index(self.index_bytes())
        named = [(pack.hex, pack.device_size // 4096) for pack in self.packs]
        if [(device.tag, device.blocks) for device in index.devices] != named:
            raise FormatError(f"{self.name}: the index's devices are not the manifest's packs")
        return index

    def pack_reader(self, slot: int) -> PackReader:
        """Random access to the device in ``slot`` (1..N). Raises FormatError for other numbers."""
        from erofsgen.pack.reader import FrameCache

        reader = self._readers.get(slot)
        if reader is None:
            self._kept = FrameCache() if self._kept is None else self._kept
            if not 1 <= slot <= len(self.packs):
                raise FormatError(f"{self.name}: no device {slot}")
            reader = self._readers[slot] = open_pack(self.store, self.packs[slot - 1], kept=self._kept)
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

    def sparse_extents(self, node: Node) -> Iterator[Extent]:
        """A regular file's extents, with holes where zeros are stored: zeros before data are, see docs/format.md."""
        for extent in node.extents():
            offset, length, device, start = extent
            if not device:
                yield extent
                continue
            toc = self.pack_reader(device).toc
            done = 0  # bytes of the extent that were yielded
            for frame in toc.frames(start, length):
                at, size = int(toc.device_offsets[frame]) - start, int(toc.device_sizes[frame])
                if at >= 0 and at + size <= length and toc.digest(frame) == _digest_of_zeros(size):
                    if at > done:
                        yield extent._replace(offset=offset + done, length=at - done, start=start + done)
                    yield extent._replace(offset=offset + at, length=size, device=None, start=0)
                    done = at + size
            if done < length:
                yield extent._replace(offset=offset + done, length=length - done, start=start + done)


@cache
def _digest_of_zeros(size: int) -> bytes:
    from blake3 import blake3

    return blake3(bytes(size)).digest()


def open_pack(store: Store, pack: Pack, *, kept: FrameCache | None = None) -> PackReader:
    """Read and check a pack's TOC, then give access to its device bytes. ``kept`` is a cache to share, if any."""
    from erofsgen.pack.reader import PackReader
    from erofsgen.pack.toc import Toc

    what = f"pack {pack.digest}"
    toc = Toc(store.read(pack.digest, pack.toc.offset, pack.toc.size), pack.toc, what=what)
    if toc.raw != pack.raw or toc.device_size != pack.device_size:
        raise FormatError(f"{what}: its table of contents contradicts the manifest")
    return PackReader(lambda offset, length: store.read(pack.digest, offset, length), toc, what=what, kept=kept)


def read_blob(store: Store, digest: str, size: int, *, limit: int) -> bytes:
    """A whole blob, checked against its digest and length. Raises IntegrityError, NotFoundError, FormatError."""
    if not 0 <= size <= limit:
        raise FormatError(f"{store.url}: blob {digest} claims {size} bytes, at most {limit} are sensible")
    data = store.read(digest, 0, size)
    # No other content has this digest, so its length is right, too: asking for that would be one more round trip
    if f"sha256:{hashlib.sha256(data).hexdigest()}" != digest:
        raise IntegrityError(
            f"{store.url}: blob {digest} differs from its digest or length", hint="delete it and build the image again"
        )
    return data
