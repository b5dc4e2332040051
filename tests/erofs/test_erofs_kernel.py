"""The kernel's own opinion of written indexes: mounted with devices, in one piece, and flattened."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import pytest
import sampletree

from erofsgen.erofs.flatten import flatten
from erofsgen.erofs.tree import walk

pytestmark = pytest.mark.mount


@pytest.fixture(params=["devices", "one piece", "flattened"])
def mounted(request, sample, mount_erofs, mount_point, tmp_path):
    """The sample, mounted."""
    index = tmp_path / "index"
    devices = []
    if request.param == "devices":
        index.write_bytes(sample.index)
        for number, content in enumerate(sample.disks.bytes):
            devices.append(tmp_path / f"device{number}")
            devices[-1].write_bytes(content)
    else:
        head = sample.index if request.param == "one piece" else flatten(sample.index).index
        index.write_bytes(head + b"".join(sample.disks.bytes))
    with mount_erofs(index, devices, mount_point):
        yield mount_point


def full(top: Path, path: bytes) -> bytes:
    return os.path.join(os.fsencode(top), path) if path else os.fsencode(top)


def test_every_attribute(sample, mounted):
    links = sampletree.nlinks(sample.root)
    seen: dict[int, int] = {}
    for path, inode in walk(sample.root):
        got = os.lstat(full(mounted, path))
        assert got.st_mode == inode.mode, path
        assert (got.st_uid, got.st_gid) == (inode.uid, inode.gid), path
        assert got.st_mtime_ns == inode.mtime, path
        assert got.st_nlink == links[id(inode)], path
        assert got.st_rdev == inode.rdev, path
        if not inode.is_dir:
            assert got.st_size == sampletree.size_of(inode), path
            assert seen.setdefault(id(inode), got.st_ino) == got.st_ino, path
    assert len(set(seen.values())) == len(seen)


def test_every_name(sample, mounted):
    found = []
    for directory, subdirectories, files in os.walk(os.fsencode(mounted)):
        found += [os.path.relpath(os.path.join(directory, name), os.fsencode(mounted)) for name in files]
        found += [os.path.relpath(os.path.join(directory, name), os.fsencode(mounted)) for name in subdirectories]
    assert sorted(found) == sorted(path for path, _ in walk(sample.root) if path)


def test_every_content(sample, mounted):
    read = 0
    for path, inode in walk(sample.root):
        if stat.S_ISLNK(inode.mode):
            assert os.readlink(full(mounted, path)) == inode.data
        elif stat.S_ISREG(inode.mode) and inode.size < 1 << 20:
            with open(full(mounted, path), "rb") as file:
                assert file.read() == sample.disks.content(inode), path
            read += 1
    assert read > 5000


def test_file_beyond_four_gigabytes(sample, mounted):
    inode = sample.root.children[b"huge"]
    with open(mounted / "huge", "rb") as file:
        data = file.seek(0, os.SEEK_DATA)
        assert data == sampletree.HUGE_SIZE // sampletree.CHUNK * sampletree.CHUNK
        assert file.read() == sample.disks.bytes[1][400 * 4096 :][: sampletree.HUGE_SIZE - data]
        file.seek(data - 100_000)
        assert file.read(100_000) == bytes(100_000)
    assert os.stat(mounted / "huge").st_size == inode.size > 1 << 32


def test_file_that_is_one_hole(mounted):
    with open(mounted / "all-hole", "rb") as file:
        with pytest.raises(OSError, match="No such device or address"):
            file.seek(0, os.SEEK_DATA)
        for offset in (0, (4 << 30) - 5, (10 << 30) - 4096):
            file.seek(offset)
            assert file.read(4096) == bytes(4096)


def test_every_xattr(sample, mounted):
    for path, inode in walk(sample.root):
        # names: listxattr returns at most 64 KiB of them; the sample has fewer
        names = os.listxattr(full(mounted, path), follow_symlinks=False)
        values = {os.fsencode(name): os.getxattr(full(mounted, path), name, follow_symlinks=False) for name in names}
        assert values == dict(inode.xattrs), path


def test_absent_xattrs_are_absent(mounted):
    for name in ("user.none", "security.selinux", "trusted.x", "system.posix_acl_default"):
        with pytest.raises(OSError, match="No data available"):
            os.getxattr(mounted / "xattrs" / "capability", name)


def test_acls_as_getfacl_shows_them(mounted):
    command = ["getfacl", "--omit-header", "--numeric", "--absolute-names"]
    shown = subprocess.run([*command, mounted / "xattrs" / "both"], capture_output=True, text=True, check=True).stdout
    assert shown.split() == [
        "user::rw-",
        "user:1234:r--",
        "group::r--",
        "group:99:rw-",
        "mask::rw-",
        "other::---",
        "default:user::rwx",
        "default:group::r-x",
        "default:other::---",
    ]


def test_lookup_of_every_entry_and_of_none(mounted):
    """The kernel bisects directories; a wrong order shows only there."""
    many = mounted / "many"
    assert len(os.listdir(many)) == 5000
    assert all((many / f"entry-{number:06d}").exists() for number in range(5000))
    assert not any((many / f"entry-{number:06d}x").exists() for number in range(0, 5000, 97))
    assert not (many / "a").exists()
    assert not (many / "z").exists()


def test_statfs(sample, mounted):
    result = os.statvfs(mounted)
    assert result.f_bsize == 4096
    assert result.f_blocks == (len(sample.index) + sum(map(len, sample.disks.bytes))) // 4096
    assert result.f_namemax == 255


def test_shared_pages_index_mounts(sample, mount_erofs, mount_point, tmp_path):
    """With fingerprints the long prefix table comes in, which kernels read at mount from Linux 6.4 on."""
    index = tmp_path / "index"
    index.write_bytes(
        sample.disks.write(sample.root, fingerprints=lambda inode: bytes(31) + bytes([len(inode.chunks) % 256]))
        + b"".join(sample.disks.bytes)
    )
    with mount_erofs(index, [], mount_point):
        value = os.getxattr(mount_point / "one-chunk", "trusted.erofs.fingerprint.v1")
        assert value == bytes(31) + b"\1"
        with pytest.raises(OSError, match="No data available"):
            os.getxattr(mount_point / "empty", "trusted.erofs.fingerprint.v1")
        assert os.getxattr(mount_point / "xattrs" / "labelled3", "user.own") == b"3"
        assert (mount_point / "scattered").read_bytes() == sample.disks.content(sample.root.children[b"scattered"])


def test_many_devices(mount_erofs, mount_point, tmp_path, monkeypatch):
    """As many devices as mount(2) has room for in its options."""
    count = 100
    disks = sampletree.Disks(*([17] * count))
    files = {b"f%d" % slot: disks.file(100 + slot, (slot, slot % 16)) for slot in range(1, count + 1)}
    places = [(slot, 1) for slot in range(count, 0, -1)]
    files[b"all"] = disks.file(count * sampletree.CHUNK, *places)
    root = sampletree.directory(files)
    monkeypatch.chdir(tmp_path)  # short names
    Path("i").write_bytes(disks.write(root))
    paths = []
    for number, content in enumerate(disks.bytes):
        paths.append(Path(f"d{number}"))
        paths[-1].write_bytes(content)
    with mount_erofs(Path("i"), paths, mount_point):
        for name, inode in files.items():
            with open(mount_point / os.fsdecode(name), "rb") as file:
                assert file.read() == disks.content(inode), name
