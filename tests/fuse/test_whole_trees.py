"""Trees with everything in them: FUSE, the kernel's EROFS and the index reader must show the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import sampletree
from fusekit import Seen, Site, same_links, told_by_index, tree_of
from handmade import ImageMaker, chunks_of

from erofsgen.host.mount.mounts import mount, unmount
from erofsgen.store.directory import DirectoryStore
from erofsgen.store.image import Image

pytestmark = [pytest.mark.mount, pytest.mark.usefixtures("require_root")]


class Everything(NamedTuple):
    image: Image
    told: dict[bytes, Seen]
    nids: dict[bytes, int]
    mounted: tuple[dict[bytes, Seen], dict[bytes, int]]
    """What an eager mount shows."""


def add_everything(maker: ImageMaker) -> tuple[Image, sampletree.Disks]:
    """The sample of all kinds of files, and its devices as packs."""
    root, disks = sampletree.sample()
    packs = [maker.pack(chunks_of(device), raw=number == 1) for number, device in enumerate(disks.bytes)]
    return maker.publish("everything", root, disks.table, packs, chunk_size=disks.chunk_size), disks


@pytest.fixture(scope="module")
def everything(require_root: None, tmp_path_factory: pytest.TempPathFactory) -> Everything:
    place = tmp_path_factory.mktemp("everything")
    image, disks = add_everything(ImageMaker(DirectoryStore(place / "store")))
    target = place / "mnt"
    target.mkdir()
    index = image.index

    def read(device: int, start: int, length: int) -> bytes:
        return disks.bytes[device - 1][start : start + length]

    mount(image, target, root=place / "root")
    try:
        seen = tree_of(target)
    finally:
        unmount(target, root=place / "root", force=True)
    return Everything(image, told_by_index(index, read), {path: node.nid for path, node in index.walk()}, seen)


def differences(ours: dict[bytes, Seen], theirs: dict[bytes, Seen]) -> list[str]:
    assert sorted(ours) == sorted(theirs)
    return [
        f"{path!r}: {field} {a!r:.300} != {b!r:.300}"
        for path in ours
        for field, a, b in zip(Seen._fields, ours[path], theirs[path], strict=True)
        if a != b
    ][:20]


@pytest.fixture(scope="module")
def mounted(shared: Site, everything: Everything) -> Iterator[Path]:
    target = shared.mount(everything.image, "everything")
    yield target
    shared.unmount(target, force=True)


def test_everything_looks_as_the_kernel_and_the_reader_have_it(mounted: Path, everything: Everything) -> None:
    seen, numbers = tree_of(mounted)
    assert len(seen) > 5000
    assert differences(seen, everything.told) == []
    assert differences(seen, everything.mounted[0]) == []
    assert same_links(numbers) == same_links(everything.mounted[1])
    assert same_links(numbers) == same_links(everything.nids)
