"""Every kind of finding, from an image that has nothing else wrong with it."""

from __future__ import annotations

import re
import stat
import struct

import numpy as np
import pytest
import sampletree
from sampletree import directory, small, symlink

from erofsgen.erofs import check
from erofsgen.erofs import format as fmt
from erofsgen.erofs.check import check_index
from erofsgen.erofs.reader import Index
from erofsgen.erofs.tree import CHUNK_DTYPE
from erofsgen.erofs.writer import write_index

SHARED = (b"security.selinux", b"a label that is long enough to be shared")


@pytest.fixture(scope="module")
def image() -> bytes:
    disks = sampletree.Disks(40, 40)
    linked = small(b"linked")
    root = directory(
        {
            b"a-file": disks.file(5000, (1, 8)),
            b"b-chunks": disks.file(2 * sampletree.CHUNK, (2, 16), (1, 16)),
            b"c-dir": directory({b"x": small(b"1"), b"y": small(b"2"), b"z": symlink(b"x")}),
            b"d-xattr": small(b"", mtime=9, xattrs=(SHARED, (b"user.own", b"1"))),
            b"e-shared": small(b"", xattrs=(SHARED,)),
            b"f-linked": linked,
            b"g-linked": linked,
            b"h-fifo": sampletree.special(stat.S_IFIFO),
            b"i-many": directory({b"%03d" % n + b"-" * 60: small(b"") for n in range(100)}),
        }
    )
    image = disks.write(root)
    assert check_index(image) == []
    return image


def summed(image: bytearray) -> bytes:
    """With the superblock's checksum put right."""
    image[1028:1032] = bytes(4)
    image[1028:1032] = fmt.checksum(image[1024:4096]).to_bytes(4, "little")
    return bytes(image)


def put(image: bytes, at: int, value: int, width: int) -> bytes:
    changed = bytearray(image)
    changed[at : at + width] = value.to_bytes(width, "little")
    return summed(changed)


def put_super(image: bytes, **fields: int) -> bytes:
    for name, value in fields.items():
        dtype, at = fmt.SUPER_DTYPE.fields[name][:2]
        image = put(image, fmt.SUPER_OFFSET + at, value, dtype.itemsize)
    return image


def put_inode(image: bytes, path: bytes, field: str, value: int) -> bytes:
    node = Index(image).lookup(path)
    dtype, at = (fmt.INODE_COMPACT_DTYPE if node.compact else fmt.INODE_EXTENDED_DTYPE).fields[field][:2]
    return put(image, node.span[0] + at, value, dtype.itemsize)


def entry_of(image: bytes, path: bytes) -> int:
    """Byte offset of a directory entry."""
    parent, _, name = path.rpartition(b"/")
    return next(at for at, entry in Index(image).lookup(parent).entries() if entry[0] == name)


def only(image: bytes, pattern: str) -> None:
    """One finding, and it is this."""
    findings = check_index(image)
    assert len(findings) == 1, findings
    assert re.search(pattern, findings[0]), findings


def test_checksum(image):
    changed = bytearray(image)
    changed[1100] ^= 1
    only(bytes(changed), "superblock at byte 1024: checksum 0x")


def test_number_of_inodes(image):
    only(put_super(image, inos=7), "superblock: 7 inodes, 112 can be reached")


def test_blocks(image):
    findings = check_index(put_super(image, blocks_lo=len(image) // 4096 + 1))
    assert f"superblock: {len(image) // 4096 + 1} blocks, the image has {len(image)} bytes" in findings


def test_nanoseconds(image):
    only(put_super(image, fixed_nsec=10**9), "superblock: 1000000000 nanoseconds")
    only(put_inode(image, b"d-xattr", "i_mtime_nsec", 10**9), r"/d-xattr: inode \d+ at byte \d+: 1000000000 nanosec")


def test_devices_overlap(image):
    second = Index(image).superblock.devt_slotoff * 128 + 128
    at = second + fmt.DEVICE_SLOT_DTYPE.fields["uniaddr_lo"][1]
    start = int.from_bytes(image[at : at + 4], "little")
    only(put(image, at, start - 1, 4), "devices 1 and 2 overlap in the unified address space")


def test_device_inside_the_image(image):
    at = Index(image).superblock.devt_slotoff * 128 + fmt.DEVICE_SLOT_DTYPE.fields["uniaddr_lo"][1]
    findings = check_index(put(image, at, 1, 4))
    assert "device 1: unified address 1 lies in the image itself" in findings


def test_device_without_tag(image):
    at = Index(image).superblock.devt_slotoff * 128
    changed = bytearray(image)
    changed[at : at + 64] = bytes(64)
    only(summed(changed), "device 1: its slot has no blocks or no tag")


def test_number_of_links(image):
    only(put_inode(image, b"f-linked", "i_nlink", 3), r"/f-linked: inode \d+ at byte \d+: 3 links, 2 names")
    only(put_inode(image, b"c-dir", "i_nlink", 3), r"/c-dir: inode \d+ at byte \d+: 3 links, 2 names")
    only(put_inode(image, b"", "i_nlink", 2), r"/: inode \d+ at byte \d+: 2 links, 4 names")


def test_order_of_entries(image):
    """Names exchanged within a block, and across blocks."""
    at = Index(image).lookup(b"c-dir").span[0] + 32 + 5 * 12 + 3
    assert image[at : at + 3] == b"xyz"
    changed = bytearray(image)
    changed[at : at + 3] = b"xzy"
    changed = summed(changed)
    findings = check_index(changed)
    assert any(re.search(r"/c-dir/y: entry at byte \d+: not in order, behind b'z'", what) for what in findings)
    many = Index(image).lookup(b"i-many")
    second = many.dir_blocks()[1][0]
    names = struct.unpack_from("<H", image, second + 8)[0]
    changed = bytearray(image)
    changed[second + names] = ord(".")  # sorts before every digit
    only(summed(changed), r"/i-many/\.\d\d-+: entry at byte \d+: not in order")


def test_dots(image):
    root = Index(image).root.nid
    own = entry_of(image, b"c-dir/x") - 24
    only(put(image, own, root, 8), r"/c-dir/\.: entry at byte \d+: it is inode \d+")
    only(put(image, own + 12, root + 1, 8), r"/c-dir/\.\.: entry at byte \d+: it is inode \d+")
    changed = bytearray(image)
    name = Index(image).lookup(b"c-dir").span[0] + 32 + 5 * 12
    assert image[name : name + 3] == b"..."
    changed[name] = ord("-")
    findings = check_index(summed(changed))
    assert any("it has no entry b'.'" in what for what in findings)


def test_type_of_entry(image):
    at = entry_of(image, b"a-file") + 10
    only(put(image, at, 7, 1), r"/a-file: entry at byte \d+: file type 7, its mode is 100644")
    at = entry_of(image, b"g-linked") + 10
    only(put(image, at, 7, 1), r"/g-linked: entry at byte \d+: file type 7")


def test_directory_in_two_places(image):
    directory_nid = Index(image).lookup(b"c-dir").nid
    findings = check_index(put(image, entry_of(image, b"i-many"), directory_nid, 8))
    assert any("a directory in two places, also /" in what for what in findings)


def test_inode_beyond_the_image(image):
    findings = check_index(put(image, entry_of(image, b"a-file"), 1 << 40, 8))
    assert any(what.startswith(f"/a-file: inode {1 << 40} at byte") for what in findings)


def test_extent_beyond_its_device(image):
    table = image.find(struct.pack("<HHI", 0, 2, 16))
    only(put(image, table + 4, 39, 4), r"/b-chunks: inode \d+ at byte \d+: 65536 bytes go beyond device 2")
    only(put(image, table + 2, 3, 2), r"/b-chunks: inode \d+ at byte \d+: 65536 bytes go beyond device 3")


def test_special_file_with_a_size(image):
    only(put_inode(image, b"h-fifo", "i_size", 1), r"/h-fifo: inode \d+ at byte \d+: a special file of 1 bytes")


def test_unknown_format(image):
    findings = check_index(put_inode(image, b"a-file", "i_format", 0x100))
    assert any(re.search(r"/a-file: inode \d+ at byte \d+: format 0x100 is not known", what) for what in findings)


def test_xattr_filter(image):
    node = Index(image).lookup(b"d-xattr")
    at = node.span[0] + node.isize
    only(put(image, at, 0xFFFFFFFF, 4), r"/d-xattr: inode \d+ at byte \d+: xattr filter 0xffffffff, the names make 0x")


def test_xattr_names(image):
    at = image.find(b"own1")
    findings = check_index(put(image, at - 3, 9, 1))  # name index
    assert any("an xattr of an unknown kind or without a name" in what for what in findings)


def test_xattr_twice(image):
    node = Index(image).lookup(b"d-xattr")
    shared = node.span[0] + node.isize + 12
    own = Index(image).superblock.xattr_blkaddr * 4096 // 4
    entry = image.find(b"own1") - 4
    findings = check_index(put(image, shared, entry // 4 - own, 4))
    assert any("xattr b'user.own' is there twice" in what for what in findings)


def test_xattr_beyond_its_inode(image):
    at = image.find(b"own1")
    only(put(image, at - 2, 500, 2), r"/d-xattr: xattr at byte \d+ goes beyond byte \d+")


def test_overlap(image):
    """An inode in the middle of another, and a directory whose blocks are an inode's."""
    index = Index(image)
    inside = index.lookup(b"i-many").nid + 1
    findings = check_index(put(image, entry_of(image, b"a-file"), inside, 8))
    assert findings
    first = index.lookup(b"i-many").dir_blocks()[0][0] // 4096
    findings = check_index(put_inode(image, b"i-many", "i_u", first - 1))
    assert any(re.search(r"(inode|directory) \d+ at byte \d+ overlaps", what) for what in findings)


def test_shared_xattrs_overlap(image):
    node = Index(image).lookup(b"e-shared")
    at = node.span[0] + node.isize + 12
    shared = int.from_bytes(image[at : at + 4], "little")
    findings = check_index(put(image, at, shared + 1, 4))
    assert any("shared xattr at byte" in what or "/e-shared: " in what for what in findings)


def test_findings_are_limited(image, monkeypatch):
    monkeypatch.setattr(check, "FINDINGS_MAX", 5)
    root = directory({b"%d" % number: small(b"") for number in range(50)})
    changed = bytearray(write_index(root, np.zeros(1, CHUNK_DTYPE), []))
    for _, node in Index(bytes(changed)).root.children():
        changed[node.span[0] + 6] = 9  # nlink
    findings = check_index(summed(changed))
    assert len(findings) == 6
    assert findings[-1] == "more than 5 findings, the rest is not listed"
