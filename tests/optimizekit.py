"""Profiles of images made by hand, and what is in a hot pack."""

from __future__ import annotations

import numpy as np
from blake3 import blake3

from erofsgen.erofs.tree import BLOCK
from erofsgen.pack.toc import read_dictionary
from erofsgen.profile.profile import RECORDED, ROW, Profile, ordered
from erofsgen.store.check import check
from erofsgen.store.directory import DirectoryStore
from erofsgen.store.image import Image


def places_of(image: Image, path: str) -> list[tuple[int, int, int]]:
    """(slot, block, length) of a file's chunks; holes have none."""
    node = image.index.lookup(path.encode())
    size = node.chunk_size
    return [
        (device, (start + done) // BLOCK, min(size, length - done))
        for _, length, device, start in node.extents()
        if device
        for done in range(0, length, size)
    ]


def profile_of(
    image: Image, *touches: tuple[str, int], command: str = "", runs: int = 1, carry: bool = False, **more
) -> Profile:
    """A profile of touches, (path, number of its chunk), 10 ms one after the other. ``more``: columns of the rows;
    with ``carry`` they have digests, so that chunks are known in images without their packs, too."""
    packs = [pack.hex for pack in image.packs]
    rows = np.zeros(len(touches), ROW)
    places: dict[str, list[tuple[int, int, int]]] = {}
    for number, (path, chunk) in enumerate(touches):
        slot, block, length = (places.get(path) or places.setdefault(path, places_of(image, path)))[chunk]
        digest = blake3(image.pack_reader(slot).read(block * BLOCK, length)).digest(8) if carry else bytes(8)
        rows[number] = (slot - 1, block, length, np.void(digest), 10 * number, runs, 0)
    for column, values in more.items():
        rows[column] = values
    return Profile(command, runs, packs, [RECORDED], ordered(rows))


def assert_reads(image: Image, files: dict[str, bytes | str | None]) -> None:
    for path, content in files.items():
        node = image.index.lookup(path.encode())
        if isinstance(content, bytes):
            assert b"".join(image.read(node)) == content, path
        elif content is not None:
            assert node.readlink() == content.encode()


def assert_sound(store: DirectoryStore) -> None:
    report = check(store)
    assert report.problems == []


def same_image(one: Image, other: Image) -> bool:
    """Whether they have the same index and packs. Images made by hand compress their indexes in another way."""
    return one.index_bytes() == other.index_bytes() and one.packs == other.packs


def hot_pack(image: Image):
    (pack,) = [pack for pack in image.packs if pack.hot is not None]
    return pack


def hot_digests(image: Image) -> list[bytes]:
    """BLAKE3 of the chunks in the hot pack, in order."""
    pack = hot_pack(image)
    toc = image.pack_reader(pack.slot).toc
    rows = read_dictionary(lambda at, size: image.store.read(pack.digest, at, size), toc, what="hot pack")
    return [row["digest"].tobytes() for row in rows]


def digests(*chunks: bytes) -> list[bytes]:
    return [blake3(chunk).digest() for chunk in chunks]
