"""Indexes read back: written again they are the same, and with chunks elsewhere what a writer would have made."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import sampletree
from anytree import CHUNK, DEVICES, trees, with_table
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from erofsgen.erofs import format as fmt
from erofsgen.erofs.check import check_index
from erofsgen.erofs.flatten import flatten
from erofsgen.erofs.readback import read_back
from erofsgen.erofs.reader import Index
from erofsgen.erofs.tree import BLOCK, CHUNK_DTYPE, Device
from erofsgen.erofs.writer import write_index
from erofsgen.errors import FormatError, UnsupportedError


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(trees(), st.booleans(), st.randoms(use_true_random=False))
def test_written_again_it_is_the_same(root, share, random):
    table = with_table(root)
    fingerprints = (lambda inode: inode.data[:30] + b"%d" % len(inode.chunks)) if share else None
    image = bytes(write_index(root, table, DEVICES, chunk_size=CHUNK, fingerprints=fingerprints))
    tree = read_back(Index(image))
    assert tree.write(tree.places, DEVICES) == image

    # and with its chunks on other devices it is what the writer makes of the same tree and the other table
    devices = [Device("d" * 64, 2 * len(tree.places) + 2), Device("e" * 64, 1000), *DEVICES]
    moved = tree.places.copy()
    where: dict[tuple[int, int], tuple[int, int]] = {}
    for number in range(1, len(moved)):
        place = (int(moved["device"][number]), int(moved["block"][number]))
        new = random.choice([(1, 2 * number), (2, random.randrange(998)), (place[0] + 2, place[1])])
        where[place] = moved["device"][number], moved["block"][number] = new
    other = table.copy()
    for number in range(1, len(other)):
        other[number] = where[int(other["device"][number]), int(other["block"][number])]
    again = tree.write(moved, devices)
    assert again == bytes(write_index(root, other, devices, chunk_size=CHUNK, fingerprints=fingerprints))
    assert check_index(again) == []
    if len(table) > 1:
        assert Index(again).superblock.uuid != Index(image).superblock.uuid


def test_one_of_everything(sample):
    tree = read_back(Index(sample.index))
    assert tree.write(tree.places, sample.disks.devices) == sample.index
    assert tree.chunk_size == sampletree.CHUNK
    assert tree.places[0] == np.zeros(1, CHUNK_DTYPE)[0]
    assert (tree.lengths[1:] > 0).all()


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 8, 255, 256, 300])
@pytest.mark.mount
def test_one_more_device(count, mount_erofs, mount_point, tmp_path):
    """One more device may take one more bit of a chunk index's device id. The kernel reads the index in one piece with
    its devices, which goes by device ids, too, and flattened, where there are none."""
    disks = sampletree.Disks(*([17] * count), chunk_size=BLOCK)
    files = {b"f%d" % slot: disks.file(100 + slot, (slot, slot % 16)) for slot in range(1, count + 1)}
    files[b"all"] = disks.file(count * BLOCK, *[(slot, 1) for slot in range(count, 0, -1)])
    root = sampletree.directory(files)
    tree = read_back(Index(disks.write(root)))
    # every third chunk goes to the new device
    moved, hot = tree.places.copy(), b""
    for number in range(1, len(moved), 3):
        device, block = int(moved["device"][number]), int(moved["block"][number])
        moved[number] = count + 1, len(hot) // BLOCK
        hot += disks.bytes[device - 1][block * BLOCK : (block + 1) * BLOCK]
    devices = [*disks.devices, Device(f"{count + 1:064x}", len(hot) // BLOCK)]
    index = tree.write(moved, devices)
    assert check_index(index) == []
    superblock = Index(index).superblock
    assert superblock.extra_devices == count + 1
    assert Index(index).device_starts[0] == superblock.blocks_lo == len(index) // BLOCK
    contents = [*disks.bytes, hot]
    flat = tmp_path / "flat"
    for head in (index, flatten(index).index):
        flat.write_bytes(head + b"".join(contents))
        with mount_erofs(flat, [], mount_point):
            for name, inode in files.items():
                assert (mount_point / os.fsdecode(name)).read_bytes() == disks.content(inode), name
    if count <= 100:  # as many as mount(2) has room for in its options
        paths = [tmp_path / f"{number}" for number in range(count + 1)]
        for path, content in zip(paths, contents, strict=True):
            path.write_bytes(content)
        (tmp_path / "index").write_bytes(index)
        with mount_erofs(tmp_path / "index", paths, mount_point):
            for name, inode in files.items():
                assert (mount_point / os.fsdecode(name)).read_bytes() == disks.content(inode), name


def test_images_of_mkfs(tmp_path, run_tool):
    (tmp_path / "top").mkdir()
    (tmp_path / "top" / "file").write_bytes(bytes(range(256)) * 1000)
    run_tool("mkfs.erofs", "-Enoinline_data", tmp_path / "image", tmp_path / "top")
    tree = read_back(Index(Path(tmp_path / "image").read_bytes()))
    assert tree.root.children[b"file"].data == bytes(range(256)) * 1000
    run_tool("mkfs.erofs", "--chunksize=65536", tmp_path / "image", tmp_path / "top")
    with pytest.raises(UnsupportedError, match="in the index itself"):
        read_back(Index(Path(tmp_path / "image").read_bytes()))


@pytest.fixture(scope="module")
def small_index():
    disks = sampletree.Disks(40, 40)
    files = {b"f%d" % n: disks.file(5000 + n, (1 + n % 2, n)) for n in range(16)}
    files[b"hollow"] = disks.file(3 * sampletree.CHUNK, None, None, None, mtime=1)
    files[b"sub"] = sampletree.directory({b"link": sampletree.symlink(b"../f1"), b"small": sampletree.small(b"s")})
    return disks.write(sampletree.directory(files), fingerprints=lambda inode: b"%d" % inode.size)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damage_is_refused_or_harmless(small_index, data):
    index = bytearray(small_index)
    for _ in range(data.draw(st.integers(1, 8))):
        index[data.draw(st.integers(fmt.SUPER_OFFSET, len(index) - 1))] = data.draw(st.integers(0, 255))
    try:
        opened = Index(bytes(index), verify=False)
        tree = read_back(opened)
        tree.write(tree.places, opened.devices)
    except (FormatError, UnsupportedError):
        pass


def test_a_huge_hole_is_refused(small_index):
    """One chunk index stands for 8 TiB; a tree would spell out every chunk."""
    node = Index(small_index).lookup(b"hollow")
    assert not node.compact
    size = node.span[0] + 8  # of i_size
    image = bytearray(small_index)
    image[size : size + 12] = (8 << 40).to_bytes(8, "little") + (fmt.CHUNK_FORMAT_ALL).to_bytes(4, "little")
    with pytest.raises(UnsupportedError, match="holes"):
        read_back(Index(bytes(image), verify=False))
    image[size : size + 8] = (1 << 40).to_bytes(8, "little")
    assert (
        len(read_back(Index(bytes(image), verify=False)).root.children[b"hollow"].chunks)
        == (1 << 40) // sampletree.CHUNK
    )
