"""Images in a store: opening them by name and digest, reading files, and indexes that contradict their manifest."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import samples
import zstandard

from erofsgen.erofs import format as fmt
from erofsgen.erofs.reader import Index
from erofsgen.errors import FormatError, IntegrityError, NotFoundError, StorageError, UsageError
from erofsgen.store.base import Descriptor
from erofsgen.store.directory import DirectoryStore
from erofsgen.store.extract import extract
from erofsgen.store.image import Image
from erofsgen.store.inspect import _union, tags
from erofsgen.store.manifest import DEVICE_SIZE, INDEX_SIZE, RAW_PACK_TYPE, pack_from_descriptor
from erofsgen.store.paths import resolve
from erofsgen.store.tar import write_archive

PROGRAM = Path(sys.executable).with_name("erofsgen")


@pytest.fixture(scope="module")
def sample_store(tmp_path_factory: pytest.TempPathFactory) -> DirectoryStore:
    """A store with ``sample``. Tests add to it and never take away."""
    place = tmp_path_factory.mktemp("image")
    tar = samples.write_sample(place / "sample.tar")
    command = [PROGRAM, "--store", place / "store", "--quiet", "build", f"tar:{tar}", "--tag", "sample"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return DirectoryStore(place / "store")


@pytest.fixture
def image(sample_store: DirectoryStore) -> Image:
    return Image.open(sample_store, "sample")


def test_opening(sample_store: DirectoryStore, image: Image):
    for name in ("sample", image.digest, image.digest[7:], image.digest[7:15]):
        assert Image.open(sample_store, name).digest == image.digest
        assert tags(sample_store, name) == ["sample"]
    for name in ("", "sampl", image.digest[7:14], "sha256:", "0" * 64):
        with pytest.raises(NotFoundError, match="no image"):
            Image.open(sample_store, name)
        with pytest.raises(NotFoundError, match="no image"):
            tags(sample_store, name)


def test_reading_in_pieces(image: Image):
    _, node = resolve(image.index, b"data/big")
    for piece in (1 << 12, 100_000, 1 << 20, 10 << 20):
        pieces = list(image.read(node, piece=piece))
        assert b"".join(pieces) == samples.big()
        assert max(map(len, pieces)) <= piece


def test_devices_have_numbers_from_one(image: Image):
    for slot in (0, -1, len(image.packs) + 1, 1 << 16):
        with pytest.raises(FormatError, match=f"no device {slot}"):
            image.pack_reader(slot)


def test_bytes_outside_a_device(image: Image):
    reader = image.pack_reader(1)
    size = image.packs[0].device_size
    assert len(reader.read(size - 1, 1)) == 1
    assert reader.read(size, 0) == b""
    for offset, length in ((size, 1), (-1, 1), (0, size + 1), (0, -1)):
        with pytest.raises(FormatError, match="outside the device"):
            reader.read(offset, length)


def test_a_foreign_image_is_none_of_ours(sample_store: DirectoryStore):
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": "sha256:" + "0" * 64, "size": 2},
        "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": "sha256:" + "0" * 64, "size": 2}],
    }
    digest, size = sample_store.put(json.dumps(manifest).encode())
    with pytest.raises(FormatError, match="not an erofsgen image") as caught:
        Image(sample_store, "foreign", Descriptor("application/vnd.oci.image.manifest.v1+json", digest, size))
    assert caught.value.hint == "convert it with `erofsgen build`"


def test_a_digest_that_is_not_the_manifests(sample_store: DirectoryStore, image: Image):
    with pytest.raises(IntegrityError, match="differs from its digest or length"):
        Image(sample_store, "x", Descriptor("", image.digest, image.manifest_size - 1))


# --- indexes made for the purpose ------------------------------------------------------------------------------------


def with_index(image: Image, change: Callable[[bytearray, Index], None]) -> Image:
    """The image with an index that ``change`` has been at, digests and checksum set right."""
    data = bytearray(image.index_bytes())
    change(data, Index(bytes(data)))
    block = bytes(data[fmt.SUPER_OFFSET : fmt.SUPER_OFFSET + 4]) + bytes(4)
    block += bytes(data[fmt.SUPER_OFFSET + 8 : fmt.BLOCK_SIZE])
    struct.pack_into("<I", data, fmt.SUPER_OFFSET + 4, fmt.checksum(bytearray(block)))
    digest, size = image.store.put(zstandard.compress(bytes(data)))
    document = json.loads(image.store.read(image.digest, 0, image.manifest_size))
    document["layers"][0].update(digest=digest, size=size, annotations={INDEX_SIZE: str(len(data))})
    digest, size = image.store.put(json.dumps(document).encode())
    return Image(image.store, "changed", Descriptor("", digest, size))


def point(path: bytes, target: bytes) -> Callable[[bytearray, Index], None]:
    """Let the directory entry ``path`` refer to the inode of ``target``."""

    def change(data: bytearray, index: Index) -> None:
        parent, _, name = path.rpartition(b"/")
        for offset, (other, _, _) in index.lookup(parent).entries():
            if other == name:
                struct.pack_into("<Q", data, offset, index.lookup(target).nid)

    return change


def test_the_helper_changes_nothing_else(image: Image):
    assert with_index(image, lambda data, index: None).index_bytes() == image.index_bytes()
    changed = with_index(image, point(b"data/small", b"data/block"))
    assert b"".join(changed.read(changed.index.lookup(b"data/small"))) == bytes(range(256)) * 16


@pytest.mark.parametrize(("path", "target"), [(b"data", b""), (b"deep", b"data"), (b"xattrs/dir", b"xattrs")])
def test_directories_that_form_no_tree(image: Image, tmp_path: Path, path: bytes, target: bytes):
    """An unpacker that walked them would not come to an end."""
    changed = with_index(image, point(path, target))
    with pytest.raises(FormatError):
        extract(changed, tmp_path / "out")
    with open(os.devnull, "wb") as out, pytest.raises(FormatError):
        write_archive(changed, out)


def rename(path: bytes, name: bytes) -> Callable[[bytearray, Index], None]:
    """Give a directory entry another name of the same length."""

    def change(data: bytearray, index: Index) -> None:
        parent, _, old = path.rpartition(b"/")
        assert len(old) == len(name)
        start, used = next(
            block for block in index.lookup(parent).dir_blocks() if old in bytes(data[block[0] : block[0] + block[1]])
        )
        at = bytes(data[start : start + used]).index(old) + start
        data[at : at + len(name)] = name

    return change


@pytest.mark.parametrize("name", [b"../up", b"/abso", b"a/../", b"nul\0x"])
def test_names_that_lead_elsewhere(image: Image, tmp_path: Path, name: bytes):
    changed = with_index(image, rename(b"data/small", name))
    with pytest.raises(FormatError):
        extract(changed, tmp_path / "out" / "below")
    assert os.listdir(tmp_path / "out") == ["below"]
    assert os.listdir(tmp_path / "out" / "below") == []


def test_a_name_twice(image: Image, tmp_path: Path):
    """A link to another file, then a file of the same name: nothing is written through the link."""
    changed = image
    for change in (
        point(b"links/second", b"links/relative"),
        point(b"links/turned", b"data/block"),
        rename(b"links/turned", b"second"),
    ):
        changed = with_index(changed, change)
    assert [name for name, _, _ in changed.index.lookup(b"links").listdir()].count(b"second") == 2
    with pytest.raises(StorageError, match=r"links/second: File exists"):
        extract(changed, tmp_path)
    assert (tmp_path / "links/second").read_text() == "a few bytes\n"
    assert (tmp_path / "data/small").read_text() == "a few bytes\n"


def test_extracting_over_something(image: Image, tmp_path: Path):
    (tmp_path / "here").touch()
    with pytest.raises(UsageError, match="not empty"):
        extract(image, tmp_path)
    assert os.listdir(tmp_path) == ["here"]


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_ranges_are_counted_once():
    for ranges in ([], [(0, 5)], [(0, 5), (5, 7)], [(3, 9), (0, 5)], [(0, 10), (2, 4), (3, 12), (20, 21)], [(1, 1)]):
        assert _union(ranges) == len({number for start, end in ranges for number in range(start, end)})


@pytest.mark.parametrize("digest", ["sha256:../../x", "sha256:" + "A" * 64, "sha512:" + "a" * 64, "sha256:" + "a" * 65])
def test_a_pack_has_a_digest_that_can_name_a_file(digest):
    layer = Descriptor(RAW_PACK_TYPE, digest, 100, {DEVICE_SIZE: "4096"})
    with pytest.raises(FormatError, match="not a sha256 digest"):
        pack_from_descriptor(layer, of="image")
