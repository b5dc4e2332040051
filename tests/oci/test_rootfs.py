"""A directory as a layer: what is read is what is there, and nothing that is not."""

from __future__ import annotations

import os
import random
import runpy
import socket
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from erofsgen.errors import NotFoundError, StorageError, UnsupportedError
from erofsgen.oci import sparse
from erofsgen.oci.layer import LINK, PUT
from erofsgen.oci.merge import Merger
from erofsgen.oci.rootfs import RootfsReader

kit = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("tarkit.py"))))
ROOT = os.geteuid() == 0
needs_root = pytest.mark.skipif(not ROOT, reason="needs root")


def entries(top):
    found = []
    for entry, data in RootfsReader(top):
        if data is not None:
            entry.inode.data = kit.content_of(data)
        found.append(entry)
    return found


def tree(found):
    merger = Merger()
    merger.apply(found)
    return kit.describe_tree(merger.root)


@pytest.fixture
def place(tmp_path):
    """An empty directory."""
    place = tmp_path / "place"
    place.mkdir()
    return place


@pytest.fixture
def top(tmp_path):
    """A directory with a file of every type and attribute."""
    top = tmp_path / "top"
    (top / "usr" / "lib").mkdir(parents=True)
    (top / "b").write_bytes(b"b" * 5000)
    (top / "empty").touch()
    (top / ".wh.a").write_bytes(b"a file like others")
    (top / "usr" / "lib" / "link").symlink_to("../../b")
    (top / "usr" / "dangling").symlink_to("nowhere")
    os.link(top / "b", top / "usr" / "lib" / "hard")
    os.link(top / "b", top / "a-hard")
    os.mkfifo(top / "usr" / "fifo", 0o640)
    (top.joinpath(os.fsdecode(b"\xff\xfe\n"))).write_bytes(b"no UTF-8")
    os.setxattr(top / "b", "user.name", b"\0\xff")
    os.setxattr(top / "usr", "user.dir", b"")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(top / "usr" / "sock"))
    if ROOT:
        os.mknod(top / "usr" / "null", 0o020666, os.makedev(1, 3))
        os.mknod(top / "usr" / "disk", 0o060600, os.makedev(259, 70_000))
        os.lchown(top / "usr" / "dangling", 1000, 2_000_000)
        os.setxattr(top / "empty", "security.capability", b"\1\0\0\2" + bytes(16))
        os.setxattr(top / "usr" / "dangling", "trusted.x", b"1", follow_symlinks=False)
        os.setxattr(top / "usr", "trusted.overlay.opaque", b"y")
        os.setxattr(top / "usr", "security.label-of-this-machine", b"y")
    (top / "usr" / "lib").chmod(0o1777)
    (top / "empty").chmod(0o4755)
    os.utime(top / "b", ns=(1, 1_600_000_000_123_456_789))
    os.utime(top, ns=(1, -1_500_000_000))
    return top


def test_everything_is_read_as_it_is(top):
    want = kit.describe_directory(top)
    for row in want.values():
        machine = (b"trusted.overlay.opaque", b"security.label-of-this-machine", b"security.selinux")
        row["xattrs"] = tuple(pair for pair in row["xattrs"] if pair[0] not in machine)
    assert tree(entries(top)) == want


@needs_root
def test_the_same_as_a_tar_of_it(top):
    (top / "usr" / "sock").unlink()  # tar leaves sockets out
    (top / ".wh.a").unlink()  # in a tar, that is a whiteout
    tar = subprocess.run(
        ["tar", "-c", "--format=posix", "--xattrs", "--xattrs-include=*", "--xattrs-exclude=security.l*", "--sort=name",
         "--numeric-owner", "-C", top, "."],
        capture_output=True,
        check=True,
    ).stdout  # fmt: skip
    assert tree(entries(top)) == tree(kit.entries(tar))


def test_order_is_that_of_bytes_parents_first(top):
    found = entries(top)
    paths = [entry.path for entry in found]
    assert paths[0] == b""
    assert paths == sorted(paths, key=lambda path: path.split(b"/"))
    assert [(e.path, e.target) for e in found if e.op == LINK] == [(b"b", b"a-hard"), (b"usr/lib/hard", b"a-hard")]
    assert {e.op for e in found} == {PUT, LINK}


def test_reading_leaves_access_times_alone(top):
    entries(top)
    assert os.stat(top / "b").st_atime_ns == 1


def test_the_root_may_be_a_symlink(top, tmp_path):
    (tmp_path / "alias").symlink_to("top")
    assert tree(entries(tmp_path / "alias")) == tree(entries(top))


def test_no_such_directory(tmp_path):
    with pytest.raises(NotFoundError, match="no such directory"):
        entries(tmp_path / "missing")
    (tmp_path / "file").touch()
    with pytest.raises(NotFoundError, match="not a directory"):
        entries(tmp_path / "file")


@pytest.mark.parametrize("chunk_size", [4096, 65536, 1 << 20, 1 << 22])
def test_holes(place, chunk_size):
    noise = random.Random(chunk_size).randbytes(10_000)
    content = bytearray(3_000_001)
    for at in (0, 300_000, 1_048_576 - 5000, 2_500_000):
        content[at : at + len(noise)] = noise
    with (place / "sparse").open("wb") as file:
        for at in (0, 300_000, 1_048_576 - 5000, 2_500_000):
            file.seek(at)
            file.write(noise)
        file.truncate(len(content))
    with (place / "zz-hole").open("wb") as file:
        file.truncate(1 << 20)
    reader = iter(RootfsReader(place))
    next(reader)
    _, data = next(reader)
    pieces = list(data.chunks(chunk_size))
    assert len(pieces) == -(-len(content) // chunk_size)
    for number, piece in enumerate(pieces):
        want = bytes(content[number * chunk_size : (number + 1) * chunk_size])
        assert piece == want if piece is not None else not any(want)
    if chunk_size <= 65536:
        assert pieces.count(None) > len(pieces) // 2
    _, data = next(reader)
    assert set(data.chunks(chunk_size)) == {None}


def test_absurd_holes_are_refused(place):
    with (place / "lastlog").open("wb") as file:
        try:
            file.truncate(sparse.HOLE_LIMIT + 4096)
        except OSError:
            pytest.skip("this file system has no such files")
    with pytest.raises(UnsupportedError, match="TiB of holes"):
        entries(place)


def grow(path):
    with path.open("ab") as file:
        file.write(b"more")


def shrink(path):
    os.truncate(path, 10)


def rewrite(path):
    path.write_bytes(bytes(50_000))
    os.utime(path, ns=(5, 5))


def replace(path):
    path.unlink()
    path.write_bytes(bytes(50_000))


def disappear(path):
    path.unlink()


def become_a_symlink(path):
    path.unlink()
    path.symlink_to("/etc/hostname")


@pytest.mark.parametrize("change", [grow, shrink, rewrite, replace, disappear, become_a_symlink])
@pytest.mark.parametrize("begun", [False, True])
def test_a_file_that_changes_is_an_error(place, change, begun):
    path = place / "file"
    path.write_bytes(bytes(50_000))
    if begun and change in (replace, disappear, become_a_symlink):
        return  # the open file is still the one that was listed
    reader = iter(RootfsReader(place))
    next(reader)
    _, data = next(reader)
    pieces = data.chunks(4096)
    if begun:
        next(pieces)
    change(path)
    with pytest.raises(StorageError, match=str(path)):
        list(pieces)


def test_files_are_closed(top):
    before = len(os.listdir("/proc/self/fd"))
    for _, data in RootfsReader(top):
        if data is not None and data.size:
            next(data.chunks(10))
    assert len(os.listdir("/proc/self/fd")) == before


@needs_root
def test_what_cannot_be_read_is_named(place):
    (place / "secret").write_bytes(b"x")
    (place / "secret").chmod(0o600)
    (place / "dir").mkdir(mode=0o700)
    for path in (place, *place.parents[:-2]):
        path.chmod(path.stat().st_mode | 0o055)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.setgid(65534)
        os.setuid(65534)
        try:
            for path in (place, place):
                try:
                    entries(path)
                except StorageError as error:
                    os.write(write, f"{error}; {error.hint}\n".encode())
                os.close(os.open("/dev/null", os.O_RDONLY))
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with os.fdopen(read) as pipe:
        assert pipe.read() == f"{place}/dir: Permission denied; read the directory as root\n" * 2


@needs_root
@pytest.mark.mount
def test_other_file_systems_are_left_out(place, request):
    (place / "mnt").mkdir()
    (place / "zz").touch()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=0751", "tmpfs", place / "mnt"], check=True)
    request.addfinalizer(lambda: subprocess.run(["umount", "-l", place / "mnt"], check=True))
    (place / "mnt" / "inside").touch()
    found = entries(place)
    assert [entry.path for entry in found] == [b"", b"mnt", b"zz"]
    assert found[1].inode.mode == 0o040751


def test_deep_trees_need_no_recursion(place, request):
    request.addfinalizer(lambda: subprocess.run(["rm", "-r", place], check=True))  # Python's own way is recursive
    deep = place
    for _ in range(1100):
        deep = deep / "d"
        deep.mkdir()
    assert len(entries(place)) == 1101
