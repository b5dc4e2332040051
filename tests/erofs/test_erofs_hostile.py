"""Images that lie. The reader and the checker end soon, in little memory, and with FormatError or an answer."""

from __future__ import annotations

import mmap
import random
import stat
import struct
import time
import tracemalloc

import numpy as np
import pytest
import sampletree
from sampletree import directory, small, symlink

from erofsgen.erofs import format as fmt
from erofsgen.erofs import treetable
from erofsgen.erofs.check import check_index
from erofsgen.erofs.reader import Index
from erofsgen.erofs.tree import CHUNK_DTYPE
from erofsgen.erofs.writer import write_index
from erofsgen.errors import FormatError, NotFoundError

MUTATIONS = 2000


@pytest.fixture(scope="module")
def victim() -> bytes:
    """A small index with every kind of structure in it."""
    disks = sampletree.Disks(40, 40)
    label = (b"security.selinux", b"a label that many files share")
    root = directory(
        {
            b"run": disks.file(sampletree.CHUNK, (1, 0)),
            b"scattered": disks.file(3 * sampletree.CHUNK, (2, 16), None, (1, 16)),
            b"hole": disks.file(100, None),
            b"xattrs": small(b"x", xattrs=(label, (b"user.one", b"1"))),
            b"more": directory({}, xattrs=(label, (b"system.posix_acl_default", sampletree.DEFAULT_ACL))),
            b"link": symlink(b"more", xattrs=(label,)),
            b"long": symlink(b"l" * 4090),
            b"sub": directory({b"%02d" % n + b"-" * 150: small(b"%d" % n, xattrs=(label,)) for n in range(26)}),
            b"null": sampletree.special(stat.S_IFCHR, 1, 3, mtime=5),
            b"deep": directory({b"er": directory({b"still": small(b"", mtime=7)})}),
        }
    )
    image = disks.write(root, fingerprints=lambda inode: bytes(32))
    assert check_index(image) == []
    return image


def exercise(image: bytes) -> int:
    """Everything a reader can be asked for; returns the number of inodes that could be read."""
    read = 0
    try:
        index = Index(image, verify=False)
        index.stats()
    except FormatError:
        pass
    try:
        index = Index(image, verify=False)
        for path, node in index.walk():
            read += 1
            assert len(path) <= fmt.PATH_LIMIT + 256
            try:
                use(node)
            except FormatError:
                continue
    except FormatError:
        pass
    try:
        index = Index(image, verify=False)
        index.lookup(b"sub/07" + b"-" * 150).inline()
    except (FormatError, NotFoundError):
        pass
    return read


def use(node) -> None:
    node.xattrs()
    node.fingerprint()
    assert node.span[0] < node.span[1] <= len(node._index.buffer)
    if stat.S_ISREG(node.mode):
        node.inline()
        assert sum(extent.length for extent in node.extents()) in (0, node.size)
    elif stat.S_ISLNK(node.mode):
        assert len(node.readlink()) <= fmt.SYMLINK_MAX
    elif stat.S_ISDIR(node.mode):
        for name, _, _ in node.listdir():
            assert 0 < len(name) <= fmt.NAME_MAX
            assert b"/" not in name


def mutate(image: bytes, generator: random.Random, interesting: list[int]) -> bytes:
    """Flip bits, put extreme numbers into fields, exchange pieces."""
    mutated = bytearray(image)
    for _ in range(generator.choice((1, 1, 2, 8))):
        at = generator.choice(interesting) if generator.random() < 0.9 else generator.randrange(len(image))
        match generator.randrange(4):
            case 0:
                mutated[at] ^= 1 << generator.randrange(8)
            case 1:
                mutated[at] = generator.randrange(256)
            case 2:
                width = generator.choice((2, 4, 8))
                at &= -width
                value = generator.choice(
                    (0, 1, (1 << 8 * width) - 1, 1 << 8 * width - 1, (1 << 8 * width - 1) - 1, len(image))
                )
                mutated[at : at + width] = (value & (1 << 8 * width) - 1).to_bytes(width, "little")
            case 3:
                other = generator.choice(interesting) & ~7
                at &= ~7
                mutated[at : at + 8] = image[other : other + 8]
    return bytes(mutated)


def test_mutations(victim):
    """Thousands of damaged images; where structures are, not in padding."""
    interesting = [at for at, byte in enumerate(victim) if byte]
    generator = random.Random(20261123)
    damaged = noticed = 0
    for _ in range(MUTATIONS):
        image = mutate(victim, generator, interesting)
        start = time.process_time()
        findings = check_index(image)
        exercise(image)
        assert time.process_time() - start < 5
        assert all(isinstance(what, str) for what in findings)
        if image != victim:
            damaged += 1
            noticed += bool(findings)
    assert damaged > MUTATIONS * 0.9
    # what goes unnoticed is what may be any value: names, contents, owners, modes, times, addresses on devices
    assert noticed > damaged * 0.5


def test_memory_stays_small(victim):
    interesting = [at for at, byte in enumerate(victim) if byte]
    generator = random.Random(7)
    tracemalloc.start()
    try:
        for _ in range(50):
            image = mutate(victim, generator, interesting)
            tracemalloc.reset_peak()
            base = tracemalloc.get_traced_memory()[0]
            check_index(image)
            exercise(image)
            assert tracemalloc.get_traced_memory()[1] - base < 64 * len(victim) + (4 << 20)
    finally:
        tracemalloc.stop()


def test_truncations(victim):
    for size in [*range(0, 2048, 37), *range(2048, len(victim), 997), len(victim) - 1]:
        exercise(victim[:size])
        assert check_index(victim[:size]) != []


def test_garbage():
    generator = random.Random(1)
    for size in (0, 1, 1023, 1024, 1151, 1152, 4096, 100_000):
        for garbage in (bytes(size), generator.randbytes(size), b"\xff" * size):
            with pytest.raises(FormatError):
                Index(garbage)
            assert len(check_index(garbage)) == 1


def test_buffers_of_any_kind(victim, tmp_path):
    (tmp_path / "index").write_bytes(victim)
    with open(tmp_path / "index", "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    for buffer in (victim, bytearray(victim), memoryview(victim), mapped):
        assert sum(1 for _ in Index(buffer).walk()) == 39


# --- attacks


def patched(image: bytes, at: int, data: bytes) -> bytes:
    return image[:at] + data + image[at + len(data) :]


def find(image: bytes, path: bytes):
    return Index(image).lookup(path)


def set_field(image: bytes, path: bytes, field: str, value: int) -> bytes:
    """Change a field of an inode."""
    node = find(image, path)
    dtype = fmt.INODE_COMPACT_DTYPE if node.compact else fmt.INODE_EXTENDED_DTYPE
    return patched(image, node.span[0] + dtype.fields[field][1], int(value).to_bytes(dtype[field].itemsize, "little"))


def set_nid(image: bytes, path: bytes, nid: int) -> bytes:
    """Let a directory entry name another inode."""
    parent, _, name = path.rpartition(b"/")
    offset = next(at for at, entry in find(image, parent).entries() if entry[0] == name)
    return patched(image, offset, struct.pack("<Q", nid))


def test_directory_cycle(victim):
    image = set_nid(victim, b"deep/er", find(victim, b"deep").nid)
    with pytest.raises(FormatError, match="a directory in two places"):
        list(Index(image, verify=False).walk())
    assert any("a directory in two places" in what for what in check_index(image))


def test_root_as_its_own_child(victim):
    image = set_nid(victim, b"deep", Index(victim).root.nid)
    with pytest.raises(FormatError, match="a directory in two places"):
        list(Index(image, verify=False).walk())


def test_huge_sizes(victim):
    for path in (b"run", b"scattered", b"link", b"sub", b"xattrs"):
        for value in (0xFFFFFFFF, 1 << 31):
            image = set_field(victim, path, "i_size", value)
            exercise(image)
            assert check_index(image) != []


def test_directories_that_share_their_entries():
    """A small image whose directories all show the same thousands of entries would list for hours."""
    victims = directory({b"%05d" % number: directory({}) for number in range(2000)})
    many = directory({b"%05d" % number: small(b"") for number in range(5000)})
    image = bytearray(write_index(directory({b"victims": victims, b"many": many}), np.zeros(1, CHUNK_DTYPE), []))
    index = Index(bytes(image))
    blocks = index.lookup(b"many").dir_blocks()[:-1]
    for _, node in index.lookup(b"victims").children():
        at = node.span[0]
        image[at : at + 2] = struct.pack("<H", fmt.FLAT_PLAIN << 1)
        image[at + 8 : at + 12] = struct.pack("<I", len(blocks) * 4096)
        image[at + 16 : at + 20] = struct.pack("<I", blocks[0][0] // 4096)
    start = time.process_time()
    with pytest.raises(FormatError, match="overlap"):
        for _ in Index(bytes(image), verify=False).walk():
            pass
    assert any("overlap" in what for what in check_index(bytes(image)))
    assert time.process_time() - start < 5


def test_shared_xattrs_cannot_be_multiplied():
    """255 ids per inode, and entries of 64 KiB at every fourth byte: gigabytes out of nothing."""
    value = bytes(30_000)
    files = {
        b"%03d" % number: small(b"", xattrs=tuple((b"user.%d" % n, b"v" * 40) for n in range(250)))
        for number in range(60)
    }
    files[b"big"] = small(b"", xattrs=((b"user.big", value),))
    image = bytearray(write_index(directory(files), np.zeros(1, CHUNK_DTYPE), []))
    base = Index(bytes(image)).superblock.xattr_blkaddr * 4096
    generator = random.Random(3)
    for _, node in list(Index(bytes(image)).root.children()):
        _, ids = node.xattr_ids()
        at = node.span[0] + node.isize + fmt.XATTR_IBODY_HEADER.size
        for number in range(len(ids)):
            struct.pack_into(
                "<I", image, at + 4 * number, (len(image) - base - 31_000 + generator.randrange(0, 900, 4)) // 4
            )
    image[-31_000:] = b"\x01\x01\xf0\x70" * 7750
    start = time.process_time()
    tracemalloc.start()
    exercise(bytes(image))
    check_index(bytes(image))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40 * len(image)
    assert time.process_time() - start < 10


def test_paths_cannot_grow_without_limit(monkeypatch):
    """A chain of directories with long names would make paths of megabytes."""
    monkeypatch.setattr(treetable, "PATH_LIMIT", 1 << 30)
    root = bottom = directory()
    for _ in range(2000):
        bottom.children[b"d" * 255] = bottom = directory()
    image = bytes(write_index(root, np.zeros(1, CHUNK_DTYPE), []))
    paths: list[bytes] = []
    with pytest.raises(FormatError, match="its path has"):
        paths.extend(path for path, _ in Index(image).walk())
    longest = len(paths[-1])
    assert fmt.PATH_LIMIT < longest <= fmt.PATH_LIMIT + 256
    assert any("its path has" in what for what in check_index(image))


def test_names_that_would_leave_the_directory(victim):
    for bad in (b"../../etc", b"/absolut", b"a\0bcdefg", b"........"[:2] + b"/" + b"x" * 5):
        offset = victim.find(b"scattered")
        image = patched(victim, offset, bad[:9])
        exercise(image)
        assert check_index(image) != []
        with pytest.raises(FormatError):
            Index(image, verify=False).root.listdir()


def test_device_number_beyond_the_table(victim):
    at = victim.find(struct.pack("<HHI", 0, 2, 16))
    image = patched(victim, at, struct.pack("<HHI", 0, 3, 16))
    with pytest.raises(FormatError, match="go beyond device 3"):
        Index(image, verify=False).lookup(b"scattered").extents()
    assert any("go beyond device 3" in what for what in check_index(image))


def test_unknown_features(victim):
    for bit in (fmt.INCOMPAT_COMPR_CFGS, fmt.INCOMPAT_48BIT, fmt.INCOMPAT_METABOX, 1 << 31):
        superblock = fmt.Superblock(*fmt.SUPER.unpack_from(victim, fmt.SUPER_OFFSET))
        changed = superblock._replace(feature_incompat=superblock.feature_incompat | bit)
        image = patched(victim, fmt.SUPER_OFFSET, fmt.SUPER.pack(*changed))
        with pytest.raises(FormatError, match="does not know"):
            Index(image, verify=False)


def test_mtime_before_the_epoch():
    root = directory({b"f": small(b"", mtime=-(1 << 63) * 10**9)}, mtime=-5)
    index = Index(bytes(write_index(root, np.zeros(1, CHUNK_DTYPE), [])))
    assert index.lookup(b"f").mtime == -(1 << 63) * 10**9
    assert index.root.mtime == -5


def test_lookup_of_what_is_not_there(victim):
    index = Index(victim)
    for path in (b"nothing", b"run/x", b"sub/", b"sub/zz", b"deep/er/..", b"link/x"):
        if path == b"sub/":
            assert index.lookup(path).nid == index.lookup(b"sub").nid
            continue
        with pytest.raises(NotFoundError):
            index.lookup(path)


def test_methods_of_the_wrong_kind_of_file(victim):
    with pytest.raises(FormatError, match="not a directory"):
        find(victim, b"run").listdir()
    with pytest.raises(FormatError, match="not a symbolic link"):
        find(victim, b"run").readlink()
    assert find(victim, b"sub").inline() is None
    assert find(victim, b"sub").extents() == []
