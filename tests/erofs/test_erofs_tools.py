"""erofs-utils 1.5 as the judge of the format: its images against our structures, ours against its fsck and dump."""

from __future__ import annotations

import os
import re
import stat

import numpy as np
import pytest
import sampletree

from erofsgen.erofs import format as fmt
from erofsgen.erofs.check import check_index
from erofsgen.erofs.flatten import flatten
from erofsgen.erofs.reader import Index
from erofsgen.erofs.tree import walk
from erofsgen.erofs.xattr import POSIX_ACL_ACCESS, POSIX_ACL_DEFAULT, filter_bit

# --- structures


def test_filter_bits_of_acls():
    """The two that the kernel has as constants (erofs_inode_has_noacl, Linux 7.0)."""
    assert filter_bit(POSIX_ACL_DEFAULT, b"") == 1 << 21
    assert filter_bit(POSIX_ACL_ACCESS, b"") == 1 << 30


@pytest.mark.parametrize(("major", "minor"), [(0, 0), (1, 3), (259, 70_000), (4095, (1 << 20) - 1)])
def test_device_numbers(major, minor):
    encoded = fmt.encode_dev(major, minor)
    # new_encode_dev() is the low word of what stat(2) has
    assert encoded == os.makedev(major, minor) & 0xFFFFFFFF
    assert fmt.decode_dev(encoded) == (major, minor)


# --- images of mkfs.erofs


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A directory with files of many sizes and kinds."""
    top = tmp_path_factory.mktemp("mkfs") / "source"
    (top / "sub" / "deeper").mkdir(parents=True)
    rng = np.random.default_rng(5)
    for size in (0, 1, 100, 4000, 4096, 4097, 8192, 70_000, 200_001):
        (top / f"file{size}").write_bytes(rng.bytes(size))
    sparse = bytearray(rng.bytes(300_000))
    sparse[65536:196608] = bytes(131072)
    (top / "sparse").write_bytes(sparse)
    for number in range(400):
        (top / "sub" / f"entry-with-a-name-of-some-length-{number}").write_bytes(b"%d" % number)
    (top / "sub" / "deeper" / "link").symlink_to("../../file1")
    (top / "long-link").symlink_to("x" * 3000)
    (top / "sub" / "one").write_bytes(b"linked")
    os.link(top / "sub" / "one", top / "two")
    os.mkfifo(top / "fifo")
    (top / os.fsdecode(b"caf\xe9")).write_bytes(b"not UTF-8")
    os.setxattr(top / "file100", "user.comment", b"shared by several")
    os.setxattr(top / "file1", "user.comment", b"shared by several")
    os.setxattr(top / "file4000", "user.comment", b"shared by several")
    os.setxattr(top / "sub", "user.own", b"just here")
    os.utime(top / "file1", ns=(1, 1_234_567_890_123_456_789))
    os.chmod(top / "file1", 0o4711)
    if os.geteuid() == 0:
        os.chown(top / "file100", 70_000, 80_000)
        os.mknod(top / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    return top


def assert_like_source(index: Index, source, disks: list[bytes]):
    """That an image says of every file what the directory it was made from says."""
    seen = set()
    inos: dict[int, int] = {}
    for path, node in index.walk():
        seen.add(path)
        real = os.path.join(os.fsencode(source), path)
        info = os.lstat(real)
        got = (node.mode, node.uid, node.gid, node.mtime)
        assert got == (info.st_mode, info.st_uid, info.st_gid, info.st_mtime_ns), path
        names = os.listxattr(real, follow_symlinks=False)
        values = [(os.fsencode(name), os.getxattr(real, name, follow_symlinks=False)) for name in sorted(names)]
        assert node.xattrs() == [pair for pair in values if pair[0].startswith(b"user.")], path
        if stat.S_ISDIR(node.mode):
            assert sorted(name for name, _, _ in node.listdir()) == sorted(os.listdir(real))
            continue
        assert node.nlink == info.st_nlink, path
        assert inos.setdefault(info.st_ino, node.nid) == node.nid, path
        assert node.rdev == info.st_rdev, path
        assert node.size == info.st_size, path
        if stat.S_ISLNK(node.mode):
            assert node.readlink() == os.readlink(real)
        elif stat.S_ISREG(node.mode):
            with open(real, "rb") as file:
                assert content_of(node, disks) == file.read(), path
        assert index.lookup(path).nid == node.nid
    expected = {b""}
    for directory, subdirectories, files in os.walk(os.fsencode(source)):
        for name in subdirectories + files:
            expected.add(os.path.relpath(os.path.join(directory, name), os.fsencode(source)))
    assert seen == expected


def content_of(node, disks: list[bytes]) -> bytes:
    """A file's bytes; ``disks`` are the image and its devices."""
    inline = node.inline()
    if inline is not None:
        assert node.extents() == []
        return inline
    pieces = []
    position = 0
    for offset, length, device, start in node.extents():
        assert offset == position
        position += length
        pieces.append(bytes(length) if device is None else disks[device][start : start + length])
    assert position == node.size
    return b"".join(pieces)


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["-Eforce-inode-compact", "--ignore-mtime"],
        ["-Eforce-inode-extended"],
        ["-Enoinline_data"],
        ["--chunksize=4096"],
        ["--chunksize=65536"],
        ["--chunksize=65536", "-Eforce-chunk-indexes"],
        ["-x1"],
    ],
    ids=lambda options: " ".join(options) or "default",
)
def test_read_what_mkfs_writes(source, tmp_path, run_tool, options):
    image = tmp_path / "image"
    if "--ignore-mtime" in options:
        run_tool("mkfs.erofs", *options, "--all-root", image, source)
        index = Index(image.read_bytes())
        assert index.stats().compact == index.stats().inodes
        assert {node.uid for _, node in index.walk()} == {0}
    else:
        run_tool("mkfs.erofs", *options, image, source)
        assert_like_source(Index(image.read_bytes()), source, [image.read_bytes()])
    assert check_index(image.read_bytes()) == []


def test_read_what_mkfs_writes_to_a_device(source, tmp_path, run_tool):
    image, blob = tmp_path / "image", tmp_path / "blob"
    run_tool("mkfs.erofs", "--chunksize=65536", f"--blobdev={blob}", image, source)
    index = Index(image.read_bytes())
    assert len(index.devices) == 1
    assert_like_source(index, source, [image.read_bytes(), blob.read_bytes()])
    # version 1.5 leaves the slot empty
    assert check_index(image.read_bytes()) == ["device 1: its slot has no blocks or no tag"]
    devices = {extent.device for _, node in index.walk() for extent in node.extents()}
    assert devices >= {1}


def test_superblock_of_mkfs(source, tmp_path, run_tool):
    image = tmp_path / "image"
    uuid = "01234567-89ab-cdef-0123-456789abcdef"
    run_tool("mkfs.erofs", "-U", uuid, image, source)
    superblock = fmt.Superblock(*fmt.SUPER.unpack_from(image.read_bytes(), fmt.SUPER_OFFSET))
    assert superblock.magic == fmt.SUPER_MAGIC
    assert superblock.uuid.hex() == uuid.replace("-", "")
    assert superblock.blkszbits == fmt.BLOCK_BITS
    assert superblock.blocks_lo * fmt.BLOCK_SIZE == image.stat().st_size
    assert superblock.feature_compat & fmt.COMPAT_SB_CHKSUM
    shown = run_tool("dump.erofs", "-s", image)
    assert f"root nid:                          {superblock.rootnid_2b}\n" in shown
    assert f"inode count:                       {superblock.inos}\n" in shown


# --- our images


@pytest.fixture(scope="module")
def flat(sample, tmp_path_factory):
    """The sample in one piece: erofs-utils does not find the device of a unified address."""
    path = tmp_path_factory.mktemp("flat") / "image"
    path.write_bytes(flatten(sample.index).index + b"".join(sample.disks.bytes))
    return path


def test_fsck_finds_nothing(flat, run_tool):
    run_tool("fsck.erofs", flat)


def test_fsck_extracts_every_file(tmp_path, run_tool, require_root):
    root, disks = sampletree.sample()
    # what version 1.5 cannot extract: holes, deep paths, sockets
    holes = [name for name, inode in root.children.items() if 0 in inode.chunks]
    assert len(holes) == 6
    for name in (b"deep", b"many", *holes):
        del root.children[name]
    del root.children[b"devices"].children[b"socket"]
    image, out = tmp_path / "image", tmp_path / "out"
    image.write_bytes(flatten(disks.write(root)).index + b"".join(disks.bytes))
    run_tool("fsck.erofs", f"--extract={out}", "--preserve", image)
    for path, inode in walk(root):
        real = os.path.join(os.fsencode(out), path)
        info = os.lstat(real)
        assert stat.S_IFMT(info.st_mode) == stat.S_IFMT(inode.mode), path
        if stat.S_ISLNK(inode.mode):
            assert os.readlink(real) == inode.data
        elif stat.S_ISREG(inode.mode):
            with open(real, "rb") as file:
                assert file.read() == disks.content(inode), path
        if not stat.S_ISLNK(inode.mode):
            assert (info.st_uid, info.st_gid) == (inode.uid, inode.gid), path
            assert stat.S_IMODE(info.st_mode) & 0o777 == stat.S_IMODE(inode.mode) & 0o777, path
        if not inode.is_dir and not stat.S_ISLNK(inode.mode) and inode.mtime >= 0:
            assert info.st_mtime_ns == inode.mtime or inode.mtime > 1 << 63, path


def test_fsck_extracts_chunks_from_devices(tmp_path, run_tool):
    disks = sampletree.Disks(100, 100, 100)
    files = {
        b"scattered": disks.file(3 * sampletree.CHUNK + 5, (3, 0), (1, 16), (2, 32), (1, 0)),
        b"backwards": disks.file(2 * sampletree.CHUNK, (2, 64), (2, 48)),
    }
    root = sampletree.directory(files)
    (tmp_path / "index").write_bytes(disks.write(root))
    devices = []
    for number, content in enumerate(disks.bytes):
        (tmp_path / f"device{number}").write_bytes(content)
        devices.append(f"--device={tmp_path}/device{number}")
    run_tool("fsck.erofs", *devices, f"--extract={tmp_path}/out", tmp_path / "index")
    for name, inode in files.items():
        assert (tmp_path / "out" / os.fsdecode(name)).read_bytes() == disks.content(inode), name


def test_dump_sees_the_same(sample, flat, run_tool):
    index = Index(sample.index)
    paths = [
        "one-chunk",
        "run",
        "scattered",
        "inlined",
        "sub",
        "xattrs/capability",
        "xattrs/labelled7",
        "empty",
        "many",
    ]
    for path in paths:
        node = index.lookup(path.encode())
        shown = run_tool("dump.erofs", f"--path=/{path}", flat)
        numbers = {
            key: int(value)
            for key, value in re.findall(r"(Size|NID|Links|Layout|Inode size|Xattr size|Uid|Gid): *(\d+)", shown)
        }
        assert numbers == {
            "Size": node.size,
            "NID": node.nid,
            "Links": node.nlink,
            "Layout": node.layout,
            "Inode size": node.isize,
            "Xattr size": node.xattr_size,
            "Uid": node.uid,
            "Gid": node.gid,
        }, path
        assert f"Access: {stat.S_IMODE(node.mode):04o}" in shown
        assert f".{node.mtime % 10**9:09d}" in shown
    superblock = run_tool("dump.erofs", "-s", flat)
    assert re.search(r"inode count: +(\d+)", superblock)[1] == str(index.superblock.inos)
