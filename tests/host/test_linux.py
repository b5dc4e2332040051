from __future__ import annotations

import errno
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from erofsgen.host import linux

LINE = (
    rb"36 35 98:0 /mnt1 /mnt\0402/a\134b\011c\012d rw,noatime shared:7 master:1 - ext3 /dev/ro\040ot rw,errors=continue"
)


def test_mountinfo_line():
    (point,) = linux.parse_mountinfo(LINE + b"\n")
    assert point == linux.MountPoint(
        id=36,
        parent=35,
        device="98:0",
        root="/mnt1",
        target="/mnt 2/a\\b\tc\nd",
        options="rw,noatime",
        fstype="ext3",
        source="/dev/ro ot",
        super_options="rw,errors=continue",
    )


@pytest.mark.parametrize("optional", [b"", b"shared:1 ", b"shared:1 master:2 propagate_from:3 unbindable "])
def test_mountinfo_optional_fields(optional):
    (point,) = linux.parse_mountinfo(b"1 2 0:3 / /t ro " + optional + b"- erofs none ro\n")
    assert (point.target, point.fstype, point.source) == ("/t", "erofs", "none")


def test_mountinfo_empty_source():
    (point,) = linux.parse_mountinfo(b"1 2 0:3 / /t ro - tmpfs  rw,size=4k\n")
    assert (point.source, point.super_options) == ("", "rw,size=4k")


def test_mountinfo_rejects_other_text():
    with pytest.raises(ValueError, match="not a mountinfo line"):
        list(linux.parse_mountinfo(b"/dev/vda / ext4 rw 0 0\n"))


def escaped(name: bytes) -> bytes:
    """As fs/proc_namespace.c writes a path."""
    return b"".join(b"\\%03o" % byte if byte in b" \t\n\\#" else bytes([byte]) for byte in name)


@given(st.lists(st.binary(min_size=1, max_size=40).filter(lambda name: b"\0" not in name), max_size=8))
def test_mountinfo_paths_survive(names):
    lines = [b"%d 1 0:1 / /%s rw - tmpfs %s rw" % (i, escaped(n), escaped(n)) for i, n in enumerate(names)]
    points = list(linux.parse_mountinfo(b"".join(line + b"\n" for line in lines)))
    assert [os.fsencode(point.target) for point in points] == [b"/" + name for name in names]
    assert [os.fsencode(point.source) for point in points] == names
    assert [point.id for point in points] == list(range(len(names)))


def test_mount_points_have_a_root():
    points = linux.mount_points()
    (slash,) = [point for point in points if point.target == "/"][-1:]
    descriptor = os.open("/", os.O_PATH)
    try:
        assert linux.mount_id(descriptor) == slash.id
    finally:
        os.close(descriptor)


def test_kernel_version_and_boot_id():
    major, minor = linux.kernel_version()
    assert os.uname().release.startswith(f"{major}.{minor}")
    assert len(linux.boot_id()) == 36


def test_errors_carry_errno_and_name(tmp_path):
    with pytest.raises(OSError, match="no-such-fs") as caught:
        linux.fsopen("no-such-fs")
    assert caught.value.errno in (errno.ENODEV, errno.EPERM)
    with pytest.raises(OSError, match="Invalid argument") as caught:
        linux.umount(tmp_path)
    assert caught.value.filename == str(tmp_path)


@pytest.mark.mount
def test_the_kernel_says_why(require_root):
    context = linux.fsopen("overlay")
    try:
        linux.fsconfig_string(context, "source", "x")
        with pytest.raises(OSError, match=r"Invalid argument: .no-such-option=x.") as caught:
            linux.fsconfig_string(context, "no-such-option", "x")
        assert caught.value.errno == errno.EINVAL
        assert any("no-such-option" in line for line in linux.fscontext_log(context))
        assert linux.fscontext_log(context) == []
    finally:
        os.close(context)


@pytest.mark.skipif(linux.kernel_version() < (6, 5), reason="cachestat(2) came with Linux 6.5")
def test_pages_of_a_file_that_are_cached(tmp_path):
    page = os.sysconf("SC_PAGE_SIZE")
    with open(tmp_path / "file", "wb+") as file:
        file.write(bytes(8 * page))
        file.flush()
        assert linux.pages_cached(file.fileno(), 0, 8 * page) == 8
        assert linux.pages_cached(file.fileno(), 6 * page, 8 * page) == 2
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert linux.pages_cached(file.fileno(), 0, 8 * page) == 0
    with pytest.raises(OSError, match="Bad file descriptor"):
        linux.pages_cached(-1, 0, page)
