"""Facts about the images of a store: what each takes, what it uses of each pack, and with whom it shares."""

from __future__ import annotations

import stat
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import msgspec
import numpy as np

from erofsgen.erofs.tree import BLOCK
from erofsgen.errors import ErofsgenError, NotFoundError
from erofsgen.store.base import Descriptor, Store
from erofsgen.store.image import Image
from erofsgen.store.manifest import CHUNK_SIZE, INDEX_SIZE, number

_PREFIX: Final = 8
"""Hex digits of a digest that are enough to name an image."""
_THREADS: Final = 8


class ImageFacts(msgspec.Struct, frozen=True):
    """One line of ``erofsgen images``. Sizes are stored bytes; ``own_bytes`` leaves out what other images use, too.

    ``problem`` says why the manifest cannot be read; the numbers are 0 then.
    """

    name: str
    digest: str
    packs: int = 0
    index_bytes: int = 0
    stored_bytes: int = 0
    own_bytes: int = 0
    problem: str | None = None


class PackFacts(msgspec.Struct, frozen=True):
    """What an image has of a pack. Sizes in bytes.

    ``stored`` is the blob's size, ``device_size`` that of its device address space, ``used`` the part of the latter
    that this image's files map, counted in whole blocks. ``shared_with`` names the other images that have the pack.
    ``missing`` says that the store has no such blob. ``hot``: of a hot pack the device bytes that every start touches,
    None of others.
    """

    slot: int
    digest: str
    kind: str
    stored: int
    device_size: int
    used: int
    shared_with: list[str]
    missing: bool
    hot: int | None = None


class IndexFacts(msgspec.Struct, frozen=True):
    """An index in numbers: bytes, inodes by type (hard links counted once), bytes of file data by where they lie.

    ``file_bytes`` are the files' sizes; of them ``mapped_bytes`` are in packs, ``inline_bytes`` in the index,
    ``hole_bytes`` nowhere. ``unique_bytes`` are the blocks in packs, each counted once.
    """

    digest: str
    stored: int
    size: int
    inodes: dict[str, int]
    file_bytes: int
    mapped_bytes: int
    inline_bytes: int
    hole_bytes: int
    unique_bytes: int


class Inspection(msgspec.Struct, frozen=True):
    """All of ``erofsgen inspect``. ``manifest`` and ``config`` are the documents as stored."""

    name: str
    names: list[str]
    digest: str
    chunk_size: int
    subject: str | None
    manifest: dict[str, Any]
    config: dict[str, Any]
    index: IndexFacts
    packs: list[PackFacts]


def tags(store: Store, name: str, references: dict[str, Descriptor] | None = None) -> list[str]:
    """The references that ``name`` means: itself, or all that name the manifest with this digest (or prefix of it).

    ``references``: the store's, where they are known. Needs no manifest to be readable. Raises NotFoundError (none, or
    a prefix of several digests).
    """
    references = store.references() if references is None else references
    if name in references:
        return [name]
    wanted = name.removeprefix("sha256:")
    if len(wanted) >= _PREFIX:
        found = [tag for tag, manifest in references.items() if manifest.digest[len("sha256:") :].startswith(wanted)]
        if len({references[tag].digest for tag in found}) == 1:
            return found
    raise NotFoundError(f"{store.url}: no image {name!r}", hint="see `erofsgen images`")


def list_images(store: Store) -> list[ImageFacts]:
    """Every named image, by name."""
    references = sorted(store.references().items())
    images = open_all(store, references)
    users: defaultdict[str, set[str]] = defaultdict(set)
    for digest, image in images.items():
        if isinstance(image, Image):
            for pack in image.packs:
                users[pack.digest].add(digest)
    return [_facts(name, descriptor, images[descriptor.digest], users) for name, descriptor in references]


def open_all(store: Store, references: Iterable[tuple[str, Descriptor]]) -> dict[str, Image | ErofsgenError]:
    """Those images by digest, or what is wrong with them."""

    def try_open(item: tuple[str, Descriptor]) -> Image | ErofsgenError:
        try:
            return Image(store, *item)
        except ErofsgenError as error:
            return error

    distinct: dict[str, tuple[str, Descriptor]] = {}
    for name, descriptor in references:
        distinct.setdefault(descriptor.digest, (name, descriptor))
    with ThreadPoolExecutor(_THREADS, "open") as pool:
        return dict(zip(distinct, pool.map(try_open, distinct.values()), strict=True))


def _facts(name: str, descriptor: Descriptor, image: Image | ErofsgenError, users: dict[str, set[str]]) -> ImageFacts:
    if not isinstance(image, Image):
        return ImageFacts(name, descriptor.digest, problem=str(image))
    packs = {pack.digest: pack.size for pack in image.packs}
    fixed = image.manifest_size + image.manifest.config.size + image.index_descriptor.size
    return ImageFacts(
        name,
        descriptor.digest,
        packs=len(packs),
        index_bytes=image.index_descriptor.size,
        stored_bytes=fixed + sum(packs.values()),
        own_bytes=fixed + sum(size for digest, size in packs.items() if len(users[digest]) == 1),
    )


def inspect(image: Image) -> Inspection:
    """Everything about one image. Reads its index, and the manifests of all others."""
    store = image.store
    index, used = _index_facts(image)
    manifest = msgspec.json.decode(store.read(image.digest, 0, image.manifest_size), type=dict[str, Any])
    sharing = _sharing(image)
    packs = [
        PackFacts(
            slot=pack.slot,
            digest=pack.digest,
            kind="raw" if pack.raw else "zstd",
            stored=pack.size,
            device_size=pack.device_size,
            used=used[pack.slot],
            shared_with=sorted(sharing[pack.digest]),
            missing=store.size(pack.digest) is None,
            hot=pack.hot,
        )
        for pack in image.packs
    ]
    subject = image.manifest.subject
    return Inspection(
        name=image.name,
        names=sorted(name for name, other in store.references().items() if other.digest == image.digest),
        digest=image.digest,
        chunk_size=_chunk_size(image),
        subject=None if subject is None else subject.digest,
        manifest=manifest,
        config=image.config,
        index=index,
        packs=packs,
    )


def _chunk_size(image: Image) -> int:
    """As annotated; 0 where it is not: only builders care."""
    text = image.manifest.annotations.get(CHUNK_SIZE, "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else 0


def _sharing(image: Image) -> dict[str, set[str]]:
    """Per pack digest the names of other images that have it. Images whose manifest is damaged do not count."""
    mine = {pack.digest for pack in image.packs}
    sharing: dict[str, set[str]] = {digest: set() for digest in mine}
    others = [item for item in image.store.references().items() if item[1].digest != image.digest]
    opened = open_all(image.store, others)
    for name, descriptor in others:
        other = opened[descriptor.digest]
        if isinstance(other, Image):
            for pack in other.packs:
                if pack.digest in mine:
                    sharing[pack.digest].add(name)
    return sharing


_TYPES: Final = {
    stat.S_IFREG: "regular files",
    stat.S_IFDIR: "directories",
    stat.S_IFLNK: "symbolic links",
    stat.S_IFCHR: "character devices",
    stat.S_IFBLK: "block devices",
    stat.S_IFIFO: "fifos",
    stat.S_IFSOCK: "sockets",
}


def _index_facts(image: Image) -> tuple[IndexFacts, dict[int, int]]:
    """The index in numbers, and per device slot the bytes of blocks that files map."""
    counts: defaultdict[str, int] = defaultdict(int)
    extents: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
    file_bytes = mapped = inline = hole = 0
    seen: set[int] = set()
    for _, node in image.index.walk():
        if node.nid in seen:
            continue
        seen.add(node.nid)
        counts[_TYPES.get(stat.S_IFMT(node.mode), "others")] += 1
        if not stat.S_ISREG(node.mode):
            continue
        file_bytes += node.size
        inline += len(node.inline() or b"")
        for _, length, device, start in node.extents():
            if device is None:
                hole += length
            else:
                mapped += length
                extents[device].append((start // BLOCK, -(-(start + length) // BLOCK)))
    used = {pack.slot: _union(extents[pack.slot]) * BLOCK for pack in image.packs}
    descriptor = image.index_descriptor
    facts = IndexFacts(
        digest=descriptor.digest,
        stored=descriptor.size,
        size=number(image.name, descriptor, INDEX_SIZE, 1 << 63),
        inodes={name: counts[name] for name in [*_TYPES.values(), "others"] if counts[name]},
        file_bytes=file_bytes,
        mapped_bytes=mapped,
        inline_bytes=inline,
        hole_bytes=hole,
        unique_bytes=sum(used.values()),
    )
    return facts, used


def _union(ranges: list[tuple[int, int]]) -> int:
    """How many numbers are in any of the half-open ranges."""
    if not ranges:
        return 0
    table = np.array(sorted(ranges), np.int64)
    reached = np.maximum.accumulate(table[:, 1])
    starts = table[:, 0].copy()
    starts[1:] = np.maximum(starts[1:], reached[:-1])
    return int(np.maximum(table[:, 1] - starts, 0).sum())
