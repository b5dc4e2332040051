"""Nothing can be changed, rights are the kernel's matter, and programs run: in the manner of pjdfstest."""

from __future__ import annotations

import errno
import os
import pickle
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fusekit import Site, chunked, outcome
from sampletree import GROUP_OBJ, MASK, NOBODY, OTHER, USER, USER_OBJ, acl, directory, small, symlink

pytestmark = [pytest.mark.mount, pytest.mark.usefixtures("require_root")]

STRANGER = 65534
PROGRAM = Path("/usr/bin/id")

FOR_STRANGER = acl(
    (USER_OBJ, 6, NOBODY), (USER, 4, STRANGER), (GROUP_OBJ, 0, NOBODY), (MASK, 4, NOBODY), (OTHER, 0, NOBODY)
)
NOT_FOR_STRANGER = acl(
    (USER_OBJ, 6, NOBODY), (USER, 0, STRANGER), (GROUP_OBJ, 4, NOBODY), (MASK, 4, NOBODY), (OTHER, 4, NOBODY)
)


def acl_of(entries: bytes) -> tuple[tuple[bytes, bytes], ...]:
    return ((b"system.posix_acl_access", entries),)


@pytest.fixture(scope="module")
def mounted(shared: Site) -> Iterator[Path]:
    program, table, chunks = chunked(PROGRAM.read_bytes(), 0o755)
    root = directory(
        {
            b"program": program,
            b"script": small(b"#!/bin/sh\necho ran\n", 0o755),
            b"not-executable": small(b"#!/bin/sh\necho ran\n", 0o644),
            b"file": small(b"for all", xattrs=((b"user.note", b"x"),)),
            b"attributes": small(b"", xattrs=((b"trusted.note", b"1"), (b"user.note", b"2"))),
            b"secret": small(b"for root", 0o600),
            b"others": small(b"for others", 0o604),
            b"group": small(b"for the group", 0o640, gid=STRANGER),
            b"not-group": small(b"not for the group", 0o604, gid=STRANGER),
            b"own": small(b"for its owner", 0o400, uid=STRANGER),
            b"acl": small(b"for one more", 0o640, xattrs=acl_of(FOR_STRANGER)),
            b"acl-against": small(b"for all but one", 0o644, xattrs=acl_of(NOT_FOR_STRANGER)),
            b"closed": directory({b"inside": small(b"unreachable")}, 0o700),
            b"unlisted": directory({b"inside": small(b"reachable")}, 0o711),
            b"empty": directory(),
            b"full": directory({b"file": small(b"")}),
            b"link": symlink(b"file"),
        }
    )
    image = shared.maker.publish("rights", root, table, [shared.maker.pack(chunks)])
    target = shared.mount(image, "rights")
    yield target
    shared.unmount(target, force=True)


def open_for(flags: int, name: str = "file") -> Callable[[Path], None]:
    return lambda top: os.close(os.open(top / name, flags, 0o644))


CHANGES: dict[str, Callable[[Path], Any]] = {
    "open for writing": open_for(os.O_WRONLY),
    "open for both": open_for(os.O_RDWR),
    "open to append": open_for(os.O_WRONLY | os.O_APPEND),
    "open to truncate": open_for(os.O_WRONLY | os.O_TRUNC),
    "open by link": open_for(os.O_RDWR, "link"),
    "create": open_for(os.O_WRONLY | os.O_CREAT, "new"),
    "create below": open_for(os.O_RDWR | os.O_CREAT | os.O_EXCL, "empty/new"),
    "nameless": open_for(os.O_WRONLY | os.O_TMPFILE, "empty"),
    "truncate": lambda top: os.truncate(top / "program", 100),
    "grow": lambda top: os.truncate(top / "file", 100),
    "unlink": lambda top: os.unlink(top / "file"),
    "unlink a link": lambda top: os.unlink(top / "link"),
    "rename": lambda top: os.rename(top / "file", top / "new"),
    "rename over another": lambda top: os.rename(top / "file", top / "script"),
    "rename a directory": lambda top: os.rename(top / "empty", top / "full/empty"),
    "mkdir": lambda top: os.mkdir(top / "new"),
    "rmdir": lambda top: os.rmdir(top / "empty"),
    "link": lambda top: os.link(top / "file", top / "new"),
    "symlink": lambda top: os.symlink("file", top / "new"),
    "mkfifo": lambda top: os.mkfifo(top / "new"),
    "mknod": lambda top: os.mknod(top / "new", stat.S_IFCHR | 0o600, os.makedev(1, 3)),
    "mknod of a socket": lambda top: os.mknod(top / "new", stat.S_IFSOCK | 0o600),
    "chmod": lambda top: os.chmod(top / "file", 0o600),
    "chmod of the top": lambda top: os.chmod(top, 0o700),
    "chown": lambda top: os.chown(top / "file", 1, 1),
    "lchown": lambda top: os.lchown(top / "link", 1, 1),
    "utime": lambda top: os.utime(top / "file", (1, 1)),
    "utime to now": lambda top: os.utime(top / "program"),
    "setxattr": lambda top: os.setxattr(top / "file", "user.new", b"x"),
    "setxattr anew": lambda top: os.setxattr(top / "file", "user.note", b"y"),
    "setxattr trusted": lambda top: os.setxattr(top / "file", "trusted.new", b"x"),
    "set an ACL": lambda top: os.setxattr(top / "file", "system.posix_acl_access", FOR_STRANGER),
    "removexattr": lambda top: os.removexattr(top / "file", "user.note"),
    "remove an ACL": lambda top: os.removexattr(top / "acl", "system.posix_acl_access"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_nothing_can_be_changed(mounted: Path, change: str) -> None:
    with pytest.raises(OSError) as caught:
        CHANGES[change](mounted)
    assert caught.value.errno == errno.EROFS, caught.value
    assert not (mounted / "new").exists()
    assert sorted(os.listxattr(mounted / "file")) == ["user.note"]
    assert (mounted / "file").read_bytes() == b"for all"


def test_a_descriptor_to_read_changes_nothing_either(mounted: Path) -> None:
    with (mounted / "program").open("rb") as file:
        for call in (
            lambda: os.ftruncate(file.fileno(), 0),
            lambda: os.posix_fallocate(file.fileno(), 0, 1 << 20),
            lambda: os.pwrite(file.fileno(), b"x", 0),
        ):
            assert outcome(call) in ("error 9 EBADF", "error 22 EINVAL")
        for call in (lambda: os.fchmod(file.fileno(), 0o777), lambda: os.fchown(file.fileno(), 1, 1)):
            assert outcome(call) == "error 30 EROFS"
    assert (mounted / "program").read_bytes() == PROGRAM.read_bytes()


# --- rights ----------------------------------------------------------------------------------------------------------


def as_stranger(top: Path, call: Callable[[], Any]) -> Any:
    """What a call in ``top`` comes to for another user, who may not even reach it by its path."""
    here = os.open(top, os.O_PATH | os.O_DIRECTORY)
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.fchdir(here)
            os.setgroups([])
            os.setgid(STRANGER)
            os.setuid(STRANGER)
            os.write(write, pickle.dumps(outcome(call)))
        finally:
            os._exit(0)
    os.close(write)
    with open(read, "rb") as result:
        said = result.read()
    os.waitpid(pid, 0)
    os.close(here)
    return pickle.loads(said)


@pytest.mark.parametrize(
    ("name", "content"),
    {
        "file": b"for all",
        "link": b"for all",
        "secret": None,
        "others": b"for others",
        "group": b"for the group",
        "not-group": None,
        "own": b"for its owner",
        "acl": b"for one more",
        "acl-against": None,
        "closed/inside": None,
        "unlisted/inside": b"reachable",
    }.items(),
)
def test_another_user_has_the_rights_that_the_image_gives(mounted: Path, name: str, content: bytes | None) -> None:
    expected = "error 13 EACCES" if content is None else content
    assert as_stranger(mounted, lambda: Path(name).read_bytes()) == expected
    assert as_stranger(mounted, lambda: os.access(name, os.R_OK)) == (content is not None)
    assert (mounted / name).read_bytes()


def test_another_user_and_directories(mounted: Path) -> None:
    assert "program" in as_stranger(mounted, lambda: os.listdir("."))
    assert as_stranger(mounted, lambda: os.listdir("unlisted")) == "error 13 EACCES"
    assert as_stranger(mounted, lambda: os.stat("closed/inside")) == "error 13 EACCES"
    assert as_stranger(mounted, lambda: os.mkdir("new")) in ("error 13 EACCES", "error 30 EROFS")


def test_trusted_attributes_are_for_root(mounted: Path) -> None:
    assert sorted(os.listxattr(mounted / "attributes")) == ["trusted.note", "user.note"]
    assert as_stranger(mounted, lambda: os.listxattr("attributes")) == ["user.note"]
    assert as_stranger(mounted, lambda: os.getxattr("attributes", "user.note")) == b"2"
    assert as_stranger(mounted, lambda: os.getxattr("attributes", "trusted.note")) == "error 61 ENODATA"


def test_programs_run(mounted: Path) -> None:
    ran = subprocess.run([mounted / "program", "-u"], capture_output=True, text=True, timeout=30)
    assert (ran.returncode, ran.stdout) == (0, "0\n")
    assert subprocess.run([mounted / "script"], capture_output=True, timeout=30).stdout == b"ran\n"
    with pytest.raises(PermissionError):
        subprocess.run([mounted / "not-executable"], timeout=30)

    def run() -> int:
        return os.spawnv(os.P_WAIT, "program", ["program", "-u"])

    assert as_stranger(mounted, run) == 0


def test_reading_leaves_no_trace(mounted: Path) -> None:
    before = (mounted / "file").stat()
    time.sleep(0.01)
    (mounted / "file").read_bytes()
    assert (mounted / "file").stat() == before
