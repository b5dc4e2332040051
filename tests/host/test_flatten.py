from __future__ import annotations

import subprocess

import crc32c
import pytest
from handmade import CHUNK, ImageMaker, chunks_of, contents, read_tree
from hypothesis import given, settings
from hypothesis import strategies as st

from erofsgen.erofs import format as fmt
from erofsgen.erofs.flatten import flatten
from erofsgen.erofs.reader import Index
from erofsgen.errors import FormatError, UnsupportedError
from erofsgen.host.cache.cache import HostCache
from erofsgen.store.directory import DirectoryStore


def superblock(index):
    return fmt.Superblock(*fmt.SUPER.unpack_from(index, fmt.SUPER_OFFSET))


def test_stock_tools_read_a_flat_image(maker, tmp_path):
    """fsck.erofs knows nothing of devices here, and is not ours. (It drops holes: erofs-utils 1.5.)"""
    one, two = contents(7, 3 * CHUNK + 1, 4 * CHUNK)
    a, b = chunks_of(one), chunks_of(two)
    files = {"one": one, "two": two, "mixed": a[2] + b[0] + a[1] + b[2] + a[3], "d/small": b"small"}
    image = maker.image("image", files, [maker.pack(a), maker.pack(b)])
    flat = HostCache(tmp_path / "root").materialise_flat(image)
    command = ["fsck.erofs", f"--extract={tmp_path}/out", "--no-preserve", str(flat)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert read_tree(tmp_path / "out") == files


def test_superblock(sample):
    index = sample.image.index_bytes()
    flat = flatten(index)
    before, after = superblock(index), superblock(flat.index)
    assert len(flat.starts) == before.extra_devices == 3
    assert flat.blocks == after.blocks_lo == flat.starts[-1] + sample.image.packs[-1].device_size // fmt.BLOCK_SIZE
    assert (after.extra_devices, after.feature_incompat & fmt.INCOMPAT_DEVICE_TABLE) == (0, 0)
    assert after.feature_incompat | fmt.INCOMPAT_DEVICE_TABLE == before.feature_incompat
    assert (after.uuid, after.inos, after.rootnid_2b) == (before.uuid, before.inos, before.rootnid_2b)
    block = bytearray(flat.index[fmt.SUPER_OFFSET : fmt.BLOCK_SIZE])
    block[4:8] = bytes(4)
    assert after.checksum == crc32c.crc32c(bytes(block)) ^ 0xFFFF_FFFF


def test_only_chunk_indexes_and_the_superblock_change(sample):
    index = sample.image.index_bytes()
    flat = flatten(index).index
    assert len(flat) == len(index)
    superblock = range(fmt.SUPER_OFFSET, fmt.SUPER_OFFSET + fmt.SUPER.size)
    changed = {place // 8 for place in range(len(index)) if index[place] != flat[place] and place not in superblock}
    assert 0 < len(changed) <= Index(index).stats().chunk_table_bytes // fmt.CHUNK_INDEX.size


def test_flat_twice_is_flat(sample):
    once = flatten(sample.image.index_bytes())
    again = flatten(once.index)
    assert again.starts == ()
    after = fmt.SUPER_OFFSET + fmt.SUPER.size
    assert again.index[after:] == once.index[after:]


def test_not_an_index():
    for data in (b"", b"short", bytes(8192)):
        with pytest.raises(FormatError):
            flatten(data)


@pytest.mark.parametrize("feature", [fmt.INCOMPAT_ZTAILPACKING, fmt.INCOMPAT_48BIT, 1 << 30])
def test_features_of_others(sample, feature):
    index = bytearray(sample.image.index_bytes())
    changed = superblock(index)._replace(feature_incompat=superblock(index).feature_incompat | feature)
    fmt.SUPER.pack_into(index, fmt.SUPER_OFFSET, *changed)
    with pytest.raises(UnsupportedError):
        flatten(bytes(index))


def test_overlapping_devices(sample):
    index = bytearray(sample.image.index_bytes())
    slot = (superblock(index).devt_slotoff + 2) * fmt.DEVICE_SLOT.size
    fields = list(fmt.DEVICE_SLOT.unpack_from(index, slot))
    fields[2] -= 1
    fmt.DEVICE_SLOT.pack_into(index, slot, *fields)
    with pytest.raises(FormatError, match="device 3 overlaps"):
        flatten(bytes(index))


@pytest.fixture(scope="session")
def small_index(tmp_path_factory):
    maker = ImageMaker(DirectoryStore(tmp_path_factory.mktemp("flatten") / "store"))
    one, two = contents(6, 3 * CHUNK, 3 * CHUNK)
    a, b = chunks_of(one), chunks_of(two)
    packs = [maker.pack(a), maker.pack(b)]
    files = {f"d{n}/{'f' * n}": b"x" * n for n in range(1, 40)} | {"one": one, "mixed": a[2] + b[0] + a[1]}
    return maker.image("small", files, packs).index_bytes()


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damage_is_refused_or_harmless(small_index, data):
    """An index that its digest vouches for may still be anybody's: no damage may do more than raise."""
    index = bytearray(small_index)
    for _ in range(data.draw(st.integers(1, 8))):
        place = data.draw(st.integers(fmt.SUPER_OFFSET, len(index) - 1))
        index[place] = data.draw(st.integers(0, 255))
    try:
        flat = flatten(bytes(index))
    except (FormatError, UnsupportedError):
        return
    assert len(flat.index) == len(small_index)
    assert flat.blocks < 1 << 32
