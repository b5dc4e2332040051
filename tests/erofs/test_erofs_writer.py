"""What the writer makes of trees: layout, sizes, limits, equal bytes for equal input."""

from __future__ import annotations

import random
import stat
import time

import numpy as np
import pytest
import sampletree
from sampletree import CHUNK, directory, small, special, symlink

from erofsgen.erofs import format as fmt
from erofsgen.erofs.check import check_index
from erofsgen.erofs.reader import Index
from erofsgen.erofs.tree import CHUNK_DTYPE, Device, Inode, walk
from erofsgen.erofs.writer import write_index
from erofsgen.erofs.xattr import FINGERPRINT
from erofsgen.errors import FormatError, UnsupportedError

EMPTY = np.zeros(1, CHUNK_DTYPE)


def written(root: Inode, **options) -> Index:
    return Index(bytes(write_index(root, EMPTY, [], **options)))


def test_the_sample_is_sound(sample):
    assert check_index(sample.index) == []


def test_reader_finds_every_attribute(sample):
    index = Index(sample.index)
    links = sampletree.nlinks(sample.root)
    nodes = list(index.walk())
    expected = list(walk(sample.root))
    assert [path for path, _ in nodes] == [path for path, _ in expected]
    for (path, node), (_, inode) in zip(nodes, expected, strict=True):
        assert (node.mode, node.uid, node.gid, node.mtime) == (inode.mode, inode.uid, inode.gid, inode.mtime), path
        assert node.nlink == links[id(inode)], path
        assert node.rdev == inode.rdev, path
        assert node.xattrs() == sorted(inode.xattrs), path
        if not inode.is_dir:
            assert node.size == sampletree.size_of(inode), path
        if stat.S_ISLNK(node.mode):
            assert node.readlink() == inode.data


def test_inode_numbers_are_unique(sample):
    nodes = {node.nid: node.ino for _, node in Index(sample.index).walk()}
    assert sorted(nodes.values()) == list(range(1, len(nodes) + 1))


# --- files on devices


def extents(index: Index, name: bytes) -> list[tuple[int, int, int | None, int]]:
    return [tuple(extent) for extent in index.lookup(name).extents()]


def test_every_file_on_devices_has_chunk_indexes(sample):
    """No flat inode points into a device: erofs-utils would read such a file from the wrong place."""
    for path, node in Index(sample.index).walk():
        on_device = any(extent.device is not None for extent in node.extents()) if stat.S_ISREG(node.mode) else False
        assert node.layout == fmt.CHUNK_BASED or not on_device, path
        if stat.S_ISREG(node.mode) and node.size and not node.inline():
            assert node.layout == fmt.CHUNK_BASED, path


def test_extents(sample):
    index = Index(sample.index)
    assert extents(index, b"one-chunk") == [(0, 5000, 1, 3 * 4096)]
    assert extents(index, b"run") == [(0, 70_000, 2, 16 * 4096)]
    assert extents(index, b"run-to-end-of-device") == [(0, CHUNK + 1, 3, 47 * 4096)]
    assert extents(index, b"adjacent-devices") == [(0, CHUNK, 1, 284 * 4096), (CHUNK, CHUNK, 2, 0)]
    assert extents(index, b"scattered") == [
        (0, CHUNK, 2, 300 * 4096),
        (CHUNK, CHUNK, None, 0),
        (2 * CHUNK, CHUNK, 1, 64 * 4096),
        (3 * CHUNK, 100, 3, 0),
    ]
    assert extents(index, b"hole-last") == [(0, CHUNK, 1, 100 * 4096), (CHUNK, 10, None, 0)]
    assert extents(index, b"all-hole") == [(0, 10 << 30, None, 0)]
    assert extents(index, b"empty") == extents(index, b"inlined") == extents(index, b"inlined-more") == []
    assert index.lookup(b"inlined").inline() == b"a few bytes\n"
    assert index.lookup(b"inlined-more").inline() == sample.root.children[b"inlined-more"].data
    assert index.lookup(b"empty").inline() is None


def test_a_hole_of_any_size_takes_few_chunks():
    tebibyte = 1 << 40
    file = Inode(stat.S_IFREG | 0o644, size=100 * tebibyte, chunks=(0,) * 1600)
    node = written(directory({b"f": file}), chunk_size=tebibyte // 16).lookup(b"f")
    assert node.table_size == 13 * 8  # of 8 TiB each
    assert node.extents() == [(0, 100 * tebibyte, None, 0)]


def test_devices_follow_the_index_in_the_unified_address_space(sample):
    index = Index(sample.index)
    assert index.devices == sample.disks.devices
    starts = [len(sample.index) // 4096]
    for device in index.devices:
        starts.append(starts[-1] + device.blocks)
    assert index.device_starts == starts[:-1]


def test_most_devices():
    devices = [Device(f"{slot:064x}", slot % 3 + 1) for slot in range(1, 65_536)]
    table = np.array([(0, 0), (1, 0), (65_535, 0), (40_000, 1)], CHUNK_DTYPE)
    root = directory(
        {b"f": Inode(stat.S_IFREG, size=3 * 4096, chunks=(1, 2, 3)), b"g": Inode(stat.S_IFREG, size=9, chunks=(2,))}
    )
    image = bytes(write_index(root, table, devices, chunk_size=4096))
    index = Index(image)
    assert index.devices == devices
    assert index.root.nid <= 0xFFFF
    assert extents(index, b"f") == [(0, 4096, 1, 0), (4096, 4096, 65_535, 0), (8192, 4096, 40_000, 4096)]
    assert extents(index, b"g") == [(0, 9, 65_535, 0)]
    assert check_index(image) == []


# --- compactness


def test_inodes_are_compact_where_they_fit():
    common = 1_700_000_000_123_456_789
    fitting = {b"f%d" % number: small(b"", mtime=common, uid=65_535, gid=65_535) for number in range(5)}
    others = {
        b"uid": small(b"", mtime=common, uid=65_536),
        b"gid": small(b"", mtime=common, gid=65_536),
        b"mtime": small(b"", mtime=common + 1),
        b"second": small(b"", mtime=common + 10**9),
        b"size": Inode(stat.S_IFREG, size=1 << 32, chunks=(0,) * (1 << 12), mtime=common),
    }
    index = written(directory(fitting | others, mtime=common))
    assert {path for path, node in index.walk() if node.compact} == {b"", *fitting}
    assert all(
        node.mtime == inode.mtime
        for (_, node), (_, inode) in zip(index.walk(), walk(directory(fitting | others, mtime=common)), strict=True)
    )


def test_many_links_take_an_extended_inode():
    file = small(b"x")
    index = written(directory({b"%d" % number: file for number in range(65_536)}))
    assert index.lookup(b"7").nlink == 65_536
    assert not index.lookup(b"7").compact
    assert index.root.compact


def test_compact_inodes_do_not_use_i_mtime(sample):
    """Kernels before 6.15 ignore it, later ones add it."""
    for _, node in Index(sample.index).walk():
        if node.compact:
            assert fmt.INODE_COMPACT.unpack_from(sample.index, node.span[0])[5] == 0


def python_like(inodes: int) -> tuple[Inode, np.ndarray, list[Device]]:
    """A tree shaped like an installed Python: packages of modules, an mtime for each, names of 20 bytes."""
    generator = random.Random(inodes)
    root = directory()
    packages = [root]
    depths = {id(root): 0}
    table = [(0, 0)]
    made = 1
    while made < inodes:
        parent = generator.choice(packages[-40:])
        package = directory(mtime=generator.randrange(1 << 60))
        parent.children[b"package_%06d_name" % made] = package
        depths[id(package)] = depths[id(parent)] + 1
        if depths[id(package)] < 10:
            packages.append(package)
        made += 1
        for _ in range(generator.randrange(4, 22)):
            table.append((1, generator.randrange(1000)))
            package.children[b"module_%06d_name.py" % made] = Inode(
                stat.S_IFREG | 0o644,
                size=generator.randrange(1, 4096),
                mtime=generator.randrange(1 << 60),
                chunks=(len(table) - 1,),
            )
            made += 1
    return root, np.array(table, CHUNK_DTYPE), [Device("d" * 64, 1001)]


def test_bytes_per_inode():
    """The worst case, no two times alike: 64 of an extended inode, 8 of a chunk index and its padding to 32, 12 of an
    entry, 20 of a name: little else."""
    index = Index(bytes(write_index(*python_like(20_000))))
    stats = index.stats()
    assert stats.extended > stats.inodes - 10
    assert stats.size / stats.inodes < 96 + 12 + 20 + 5
    padding = stats.chunk_table_bytes * (32 - 8) // 8
    used = stats.inode_bytes + stats.inline_bytes + stats.directory_bytes + stats.chunk_table_bytes + padding
    assert used / stats.size > 0.97


def test_bytes_per_inode_of_equal_times():
    """As builders leave them that set every time to the same: a compact inode and its chunk index fit 64 bytes."""
    root, table, devices = python_like(20_000)
    for _, inode in walk(root):
        inode.mtime = 1_700_000_000_000_000_000
    stats = Index(bytes(write_index(root, table, devices))).stats()
    assert stats.extended == 0
    assert stats.size / stats.inodes < 64 + 12 + 20 + 5


def test_what_large_tails_leave_is_used():
    """Directories that fill most of a block, and files in between: no block is wasted."""
    root = directory()
    for number in range(300):
        names = {b"%03d" % entry + b"n" * 40: small(b"") for entry in range(number % 71)}
        root.children[b"%03d" % number] = directory(names)
    stats = written(root).stats()
    used = stats.inode_bytes + stats.inline_bytes + stats.directory_bytes
    assert used / stats.size > 0.97


def test_children_follow_their_directory():
    index = Index(bytes(write_index(*python_like(5000))))
    for _, node in index.walk():
        if stat.S_ISDIR(node.mode) and node.nid != index.root.nid:
            places = sorted(child.span[0] for _, child in node.children())
            if places:
                assert places[-1] - places[0] < 8 * 4096


def test_time_is_linear():
    def seconds(inodes: int) -> float:
        arguments = python_like(inodes)
        best = 1e9
        for _ in range(3):
            start = time.process_time()
            write_index(*arguments)
            best = min(best, time.process_time() - start)
        return best

    few, many = seconds(3000), seconds(30_000)
    assert many < 30 * few
    assert many / 30_000 < 100e-6  # 7 us on an idle machine


def test_deep_tree_needs_no_recursion():
    root = bottom = directory()
    for _ in range(5000):
        bottom.children[b"d"] = bottom = directory()
    index = written(root)
    assert sum(1 for _ in index.walk()) == 5001
    assert check_index(bytes(index.buffer)) == []


# --- extended attributes


def test_attributes_of_many_inodes_are_shared():
    value = b"system_u:object_r:usr_t:s0"
    label = ((b"security.selinux", value),)
    index = written(directory({b"%d" % number: small(b"", xattrs=label) for number in range(100)}))
    stats = index.stats()
    assert stats.xattr_bytes == 100 * (12 + 4)
    assert stats.shared_xattr_bytes == 4 + len(b"selinux") + len(value) + 3
    assert bytes(index.buffer).count(value) == 1


def test_attributes_are_shared_only_where_that_is_smaller():
    index = written(directory({b"%d" % number: small(b"", xattrs=((b"user.a", b""),)) for number in range(2)}))
    assert index.stats().shared_xattr_bytes == 0


def test_more_than_255_shared_attributes():
    xattrs = tuple((b"user.%04d" % number, b"value of some length") for number in range(300))
    index = written(directory({name: small(b"", xattrs=xattrs) for name in (b"a", b"b", b"c")}))
    assert index.lookup(b"b").xattrs() == list(xattrs)
    assert check_index(bytes(index.buffer)) == []


def test_no_feature_beyond_chunks_and_devices(sample):
    superblock = Index(sample.index).superblock
    assert superblock.feature_incompat == fmt.INCOMPAT_CHUNKED_FILE | fmt.INCOMPAT_DEVICE_TABLE
    assert superblock.feature_compat == fmt.COMPAT_SB_CHKSUM | fmt.COMPAT_MTIME | fmt.COMPAT_XATTR_FILTER
    assert written(directory({b"f": small(b"x")})).superblock.feature_incompat == 0


class TestFingerprints:
    @staticmethod
    def digest(inode: Inode) -> bytes:
        return repr((inode.data, inode.chunks)).encode()[:32].ljust(32, b".")

    def test_every_file_with_content_has_its_own(self, sample):
        image = sample.disks.write(sample.root, fingerprints=self.digest)
        index = Index(image)
        assert check_index(image) == []
        for (path, node), (_, inode) in zip(index.walk(), walk(sample.root), strict=True):
            expected = self.digest(inode) if stat.S_ISREG(inode.mode) and inode.size else None
            assert node.fingerprint() == expected, path
            assert node.xattrs() == sorted(inode.xattrs), path

    def test_prefix_table_and_features(self, sample):
        superblock = Index(sample.disks.write(sample.root, fingerprints=self.digest)).superblock
        assert superblock.feature_incompat & fmt.INCOMPAT_XATTR_PREFIXES
        assert superblock.feature_compat & fmt.COMPAT_PLAIN_XATTR_PFX
        assert superblock.feature_compat & fmt.COMPAT_ISHARE_XATTRS
        assert (superblock.ishare_xattr_prefix_id, superblock.xattr_prefix_count) == (0, 1)

    def test_the_name_is_in_the_image_once(self):
        files = {b"%d" % number: small(b"%d" % number) for number in range(50)}
        image = bytes(write_index(directory(files), EMPTY, [], fingerprints=self.digest))
        assert image.count(b"fingerprint") == 1
        assert Index(image).stats().xattr_bytes == 50 * (12 + 4 + 32)

    def test_an_image_cannot_bring_its_own(self):
        forged = ((FINGERPRINT, b"of another file"),)
        root = directory({b"f": small(b"content", xattrs=forged), b"d": directory({}, xattrs=forged)}, xattrs=forged)
        index = written(root, fingerprints=self.digest)
        assert index.lookup(b"f").fingerprint() == self.digest(root.children[b"f"])
        assert index.lookup(b"d").fingerprint() is None
        assert b"of another file" not in bytes(index.buffer)
        # without the feature it is an attribute like others, which kernels do not use
        assert written(root).lookup(b"f").xattrs() == list(forged)


# --- the same bytes


def test_the_same_tree_gives_the_same_bytes():
    first, second = sampletree.sample(), sampletree.sample()
    stack = [second[0]]
    while stack:
        inode = stack.pop()
        if inode.children:
            inode.children = dict(reversed(inode.children.items()))
            stack += inode.children.values()
    assert first[1].write(first[0]) == second[1].write(second[0])


def test_uuid_depends_on_the_content():
    one, other = (written(directory({name: small(b"")})).superblock.uuid for name in (b"a", b"b"))
    assert one != other
    assert one[6] >> 4 == 8
    assert one[8] >> 6 == 2


# --- limits

MIB = 1 << 20


@pytest.mark.parametrize(
    ("children", "error", "message"),
    [
        ({b"n" * 256: small(b"")}, UnsupportedError, r"/n+: a name of 256 bytes, 255 is the limit"),
        ({b"": small(b"")}, FormatError, r"b'' cannot be a file name"),
        ({b"..": directory()}, FormatError, r"b'\.\.' cannot be"),
        ({b"a/b": small(b"")}, FormatError, r"b'a/b' cannot be"),
        ({b"a\0b": small(b"")}, FormatError, r"cannot be a file name"),
        ({b"f": Inode(0o644)}, FormatError, "/f: EROFS has no mode 420"),
        ({b"f": Inode(stat.S_IFREG, uid=1 << 32)}, UnsupportedError, "/f: EROFS has no uid 4294967296"),
        ({b"f": Inode(stat.S_IFREG, gid=-1)}, UnsupportedError, "/f: EROFS has no gid -1"),
        ({b"f": Inode(stat.S_IFREG, mtime=10**9 << 63)}, UnsupportedError, "/f: EROFS has no mtime"),
        ({b"f": Inode(stat.S_IFREG, uid=1 << 64)}, UnsupportedError, "/f: EROFS has no uid"),
        ({b"f": Inode(stat.S_IFREG, size=-5, chunks=(0,))}, FormatError, "/f: EROFS has no size -5"),
        ({b"f": Inode(stat.S_IFREG, size=5)}, FormatError, "/f: 0 of 5 bytes are there"),
        ({b"f": Inode(stat.S_IFREG, size=5, data=b"abc")}, FormatError, "/f: 3 of 5 bytes are there"),
        ({b"f": Inode(stat.S_IFREG, size=3, data=b"abc", chunks=(0,))}, FormatError, "/f: both chunks and"),
        ({b"f": Inode(stat.S_IFREG, size=MIB + 1, chunks=(0,))}, FormatError, "/f: the number of its chunks"),
        ({b"f": Inode(stat.S_IFREG, size=0, chunks=(0,))}, FormatError, "/f: the number of its chunks"),
        ({b"f": Inode(stat.S_IFREG, size=1, chunks=(7,))}, FormatError, "/f: a chunk that lies on no device"),
        ({b"f": Inode(stat.S_IFREG, size=1, chunks=(-1,))}, FormatError, "/f: a chunk that lies on no device"),
        ({b"f": Inode(stat.S_IFREG, size=1, chunks=(2,))}, FormatError, "/f: a chunk that lies on no device"),
        ({b"f": Inode(stat.S_IFREG, size=4097, chunks=(1,))}, FormatError, "/f: a chunk that lies on no device"),
        ({b"l": symlink(b"")}, FormatError, "/l: a symbolic link to 0 bytes"),
        ({b"l": symlink(b"x" * 4096)}, FormatError, "/l: a symbolic link to 4096 bytes"),
        ({b"l": symlink(b"a\0b")}, FormatError, "/l: a symbolic link"),
        ({b"c": special(stat.S_IFCHR, 4096, 0)}, UnsupportedError, "/c: EROFS has no device 4096:0"),
        ({b"c": special(stat.S_IFBLK, 0, 1 << 20)}, UnsupportedError, "/c: EROFS has no device 0:1048576"),
        (
            {b"f": small(b"", xattrs=((b"lustre.x", b""),))},
            UnsupportedError,
            "/f: EROFS cannot store an xattr named b'lu",
        ),
        ({b"f": small(b"", xattrs=((b"user.", b""),))}, UnsupportedError, "/f: EROFS cannot store an xattr named b'us"),
        (
            {b"f": small(b"", xattrs=((b"user.x", b"1"), (b"user.x", b"2")))},
            FormatError,
            "/f: xattr b'user.x' is there",
        ),
        (
            {b"f": small(b"", xattrs=((b"user.x", bytes(65536)),))},
            UnsupportedError,
            "/f: xattr b'user.x' has 65536 bytes",
        ),
        (
            {b"f": small(b"", xattrs=tuple((b"user.%d" % n, bytes(60_000)) for n in range(5)))},
            UnsupportedError,
            "/f: xattrs of one file take",
        ),
    ],
)
def test_what_cannot_be_written(children, error, message):
    table = np.array([(0, 0), (1, 9), (2, 0)], CHUNK_DTYPE)
    with pytest.raises(error, match=message):
        write_index(directory(children), table, [Device("d" * 64, 10)])


def test_a_directory_in_two_places():
    shared = directory({b"f": small(b"")})
    with pytest.raises(FormatError, match="/a: a directory in two places"):
        write_index(directory({b"a": shared, b"b": shared}), EMPTY, [])


def test_a_directory_inside_itself():
    loop = directory()
    loop.children[b"loop"] = loop
    with pytest.raises(FormatError, match="a directory in two places"):
        write_index(loop, EMPTY, [])


def test_paths_that_no_reader_follows():
    root = bottom = directory()
    for _ in range(300):
        bottom.children[b"d" * 255] = bottom = directory()
    with pytest.raises(UnsupportedError, match=r"^/d+\.\.\.d+: a path of 65791 bytes, 65536 is the limit") as caught:
        write_index(root, EMPTY, [])
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("devices", "error", "message"),
    [
        ([Device("d", 1)] * 65_536, UnsupportedError, "65536 devices, EROFS has slots for 65535"),
        ([Device("d", 1 << 31)] * 2, UnsupportedError, "an index of 1 blocks with 4294967296 blocks of devices"),
        ([Device("", 1)], FormatError, "device 1: its tag"),
        ([Device("d" * 65, 1)], FormatError, "device 1: its tag"),
        ([Device("d", 0)], FormatError, "device 1: 0 blocks"),
    ],
)
def test_devices_that_cannot_be_written(devices, error, message):
    with pytest.raises(error, match=message):
        write_index(directory(), EMPTY, devices)


@pytest.mark.parametrize("chunk_size", [0, 2048, 4097, 3 << 12, 1 << 44])
def test_chunk_sizes_that_cannot_be_written(chunk_size):
    with pytest.raises(FormatError, match="a chunk size of"):
        write_index(directory(), EMPTY, [], chunk_size=chunk_size)


def test_the_root_is_a_directory():
    with pytest.raises(FormatError, match="the root is not a directory"):
        write_index(small(b""), EMPTY, [])


def test_largest_unified_address():
    """16 TiB less one block, and a file at its end."""
    blocks = fmt.NULL_ADDR - 1
    table = np.array([(0, 0), (1, blocks - 1)], CHUNK_DTYPE)
    root = directory({b"f": Inode(stat.S_IFREG, size=10, chunks=(1,))})
    image = bytes(write_index(root, table, [Device("d" * 64, blocks)]))
    assert extents(Index(image), b"f") == [(0, 10, 1, (blocks - 1) * 4096)]
    assert check_index(image) == []
