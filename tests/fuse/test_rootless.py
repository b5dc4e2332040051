"""Images for a plain user: no root, no EROFS, fusermount3.

The user must be able to read this repository and its interpreter, which may lie where only root can go. So everything
happens in a mount namespace of its own, in which such directories are replaced by passable ones with the same content.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fusekit import chunked, servers
from handmade import CHUNK, ImageMaker, contents
from lazykit import WAIT, Host, eventually, processes
from sampletree import directory, small, symlink

from erofsgen.errors import BusyError, StorageError, UnsupportedError
from erofsgen.store.directory import DirectoryStore

pytestmark = [pytest.mark.mount, pytest.mark.usefixtures("require_root")]

USER = 65534
REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAM = Path(sys.executable).with_name("erofsgen")

# What a shell of root's does in the namespace. $1: a directory for it; $2: directories to replace; then what to keep
PREPARE = """
set -e
own=$1 tops=$2
shift 2
mount --make-rprivate /
mount -t tmpfs -o mode=755 none "$own"
mkdir "$own/kept"
number=0
for path in "$@"; do
    number=$((number + 1))
    mkdir "$own/kept/$number"
    mount --rbind "$path" "$own/kept/$number"
done
for top in $tops; do
    mount -t tmpfs -o mode=755 none "$top"
done
number=0
for path in "$@"; do
    number=$((number + 1))
    mkdir -p "$path"
    mount --rbind "$own/kept/$number" "$path"
done
mount -t tmpfs -o mode=755 none "$own"
mknod -m 666 "$own/fuse" c 10 229
mount --bind "$own/fuse" /dev/fuse
touch "$own/fuse.conf"
mount --bind "$own/fuse.conf" /etc/fuse.conf
echo ready
exec cat
"""


def closed(path: Path) -> Path | None:
    """The topmost directory on the way to ``path`` that others cannot pass."""
    for above in reversed([path, *path.parents]):
        if not above.stat().st_mode & 0o001:
            return above
    return None


class Plain:
    """A plain user with a home of their own. ``namespace``: a process in the mount namespace that suits them."""

    def __init__(self, place: Path, namespace: int) -> None:
        self.home = place / "home"
        self.home.mkdir()
        os.chown(self.home, USER, USER)
        self.root = self.home / "root"
        self.target = self.home / "mnt"
        self.store = place / "store"
        self.as_root = ["nsenter", f"--mount=/proc/{namespace}/ns/mnt", "--"]
        self.as_user = [*self.as_root, "setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups", "--"]
        self.environment = {
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": str(self.home), "LC_ALL": "C.UTF-8",
            "EROFSGEN_ROOT": str(self.root), "EROFSGEN_STORE": str(self.store),
        }  # fmt: skip

    def run(self, *command: str | Path, code: int | None = 0, root: bool = False) -> subprocess.CompletedProcess[str]:
        """Run a command, as the user or as root, and insist on its exit code."""
        ended = subprocess.run(
            [*(self.as_root if root else self.as_user), *command],
            env=self.environment,
            cwd="/",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert code in (None, ended.returncode), (command, ended.returncode, ended.stdout, ended.stderr)
        return ended

    def erofsgen(self, *arguments: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
        return self.run(PROGRAM, *arguments, code=code)

    def mounts(self) -> list[dict[str, Any]]:
        return json.loads(self.erofsgen("mounts", "--json").stdout)

    def hash(self, name: str) -> str:
        return self.run("sha256sum", self.target / name).stdout.split()[0]


@pytest.fixture(scope="module")
def namespace(tmp_path_factory: pytest.TempPathFactory, require_root: None) -> Iterator[Plain]:
    for tool in ("fusermount3", "setpriv", "unshare", "nsenter"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool}")
    place = tmp_path_factory.mktemp("rootless")
    place.chmod(0o755)
    needed = [REPOSITORY, Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve(), place]
    tops = {top for path in needed if (top := closed(path)) is not None}
    kept = {path for path in needed if any(path.is_relative_to(top) for top in tops)}
    kept = {path for path in kept if not any(path != other and path.is_relative_to(other) for other in kept)}
    own = Path(tempfile.mkdtemp(prefix="erofsgen-", dir="/run"))
    own.chmod(0o755)
    words = [own, " ".join(map(str, sorted(tops))), *sorted(kept)]
    holder = subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", PREPARE, "sh", *words],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdin is not None
    assert holder.stdout is not None
    assert holder.stderr is not None
    try:
        if holder.stdout.readline() != "ready\n":
            pytest.skip(f"no such mount namespace here: {holder.stderr.read()}")
        user = Plain(place, holder.pid)
        if user.run(PROGRAM, "--version", code=None).returncode:
            pytest.skip("others may not read this repository, or its interpreter")
        yield user
    finally:
        for stream in (holder.stdin, holder.stdout, holder.stderr):
            stream.close()
        holder.wait(WAIT)
        own.rmdir()


LARGE, SMALL = contents(21, 40 * CHUNK + 5, 300)
HASH = hashlib.sha256(LARGE).hexdigest()


@pytest.fixture(scope="module")
def stored(namespace: Plain) -> None:
    """Images in a store which the user may only read; of ``closed`` the user may not read the top directory."""
    maker = ImageMaker(DirectoryStore(namespace.store))
    large, table, chunks = chunked(LARGE)
    files = {b"large": large, b"dir": directory({b"file": small(SMALL)}), b"link": symlink(b"dir/file")}
    packs = [maker.pack(chunks)]
    maker.publish("small", directory(files | {b"secret": small(b"x", 0o600)}), table, packs)
    maker.publish("closed", directory(files, 0o751), table, packs)
    subprocess.run(["chmod", "-R", "a+rX", namespace.store], check=True)


@pytest.fixture
def plain(namespace: Plain, stored: None) -> Iterator[Plain]:
    """The user. Nothing of theirs is left afterwards."""
    namespace.run("mkdir", "-p", namespace.target)
    try:
        yield namespace
    finally:
        Host(namespace.root, "fuse").end()
        namespace.run("umount", "-l", namespace.target, root=True, code=None)
        eventually(lambda: processes(namespace.root) == [])
        shutil.rmtree(namespace.root, ignore_errors=True)


def test_a_mount_of_a_plain_users(plain: Plain) -> None:
    plain.erofsgen("mount", "small", plain.target, "--plane", "fuse")
    assert plain.run("ls", plain.target).stdout.split() == ["dir", "large", "link", "secret"]
    for name, content in (("large", LARGE), ("dir/file", SMALL), ("link", SMALL)):
        assert plain.hash(name) == hashlib.sha256(content).hexdigest()
    assert "Permission denied" in plain.run("cat", plain.target / "secret", code=1).stderr
    (mounted,) = plain.mounts()
    assert (mounted["plane"], mounted["how"], mounted["rw"]) == ("fuse", "fuse", False)
    (line,) = [line for line in plain.run("cat", "/proc/mounts").stdout.splitlines() if "fuse.erofsgen" in line]
    assert line.startswith(f"small {plain.target} fuse.erofsgen ro,nosuid,nodev")
    for pid in processes(plain.root):
        assert os.stat(f"/proc/{pid}").st_uid == USER
    facts = json.loads(plain.erofsgen("status", "--json").stdout)
    assert (facts["plane"], facts["servers"], facts["denied"]) == ("fuse", 1, 0)
    plain.erofsgen("umount", plain.target)
    assert plain.mounts() == []
    eventually(lambda: servers(plain.root) == [])
    assert plain.run("ls", plain.target).stdout == ""
    plain.erofsgen("daemon", "--stop")


def test_auto_is_fuse(plain: Plain) -> None:
    said = plain.erofsgen("mount", "small", plain.target).stderr
    assert len([line for line in said.splitlines() if "plane fuse" in line and "blockfuse: " in line]) == 1
    assert plain.hash("large") == HASH
    plain.erofsgen("umount", plain.target)


def test_a_top_that_the_user_may_not_read(plain: Plain) -> None:
    plain.erofsgen("mount", "closed", plain.target, "--plane", "fuse")
    assert "Permission denied" in plain.run("ls", plain.target, code=2).stderr
    assert plain.hash("large") == HASH
    plain.erofsgen("umount", plain.target)
    assert plain.mounts() == []


def test_nobody_else_looks_into_it(plain: Plain) -> None:
    plain.erofsgen("mount", "small", plain.target, "--plane", "fuse")
    assert "Permission denied" in plain.run("ls", plain.target, root=True, code=2).stderr
    plain.erofsgen("umount", plain.target)


def test_what_only_root_can_do_is_refused(plain: Plain) -> None:
    said = plain.erofsgen("mount", "small", plain.target, "--plane", "fuse", "--rw", code=UnsupportedError.exit_code)
    assert "only root can mount read-write" in said.stderr
    said = plain.erofsgen("mount", "small", plain.target, "--plane", "blockfuse", code=UnsupportedError.exit_code)
    assert "root" in said.stderr
    assert plain.mounts() == []


def test_everybody_only_where_the_administrator_allows_it(plain: Plain) -> None:
    command = ["fuse", "small", plain.target, "--allow-other"]
    said = plain.erofsgen(*command, code=StorageError.exit_code)
    assert "allow_other" in said.stderr
    assert "user_allow_other in /etc/fuse.conf" in said.stderr
    assert plain.mounts() == []
    plain.run("sh", "-c", "echo user_allow_other > /etc/fuse.conf", root=True)
    process = subprocess.Popen(
        [*plain.as_user, PROGRAM, *command], env=plain.environment, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        assert process.stderr is not None
        eventually(lambda: "large" in plain.run("ls", plain.target, root=True, code=None).stdout)
        assert len(plain.mounts()) == 1
        process.terminate()
        assert process.wait(WAIT) == 0, process.stderr.read()
        assert plain.mounts() == []
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
        plain.run("sh", "-c", ": > /etc/fuse.conf", root=True)


def test_a_busy_mount(plain: Plain) -> None:
    plain.erofsgen("mount", "small", plain.target, "--plane", "fuse")
    script = f"exec 3<{plain.target}/large; echo open; read line; sha256sum <&3"
    holder = subprocess.Popen([*plain.as_user, "sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"open\n"
        said = plain.erofsgen("umount", plain.target, code=BusyError.exit_code).stderr
        assert f"in use by sh (pid {holder.pid})" in said
        plain.erofsgen("umount", plain.target, "--force")
        assert plain.mounts() == []
        out, _ = holder.communicate(b"go\n", timeout=WAIT)
        assert out.split()[0] == HASH.encode()
    finally:
        holder.kill()
        holder.communicate()
    eventually(lambda: servers(plain.root) == [])


def test_a_dead_server_and_its_repair(plain: Plain) -> None:
    plain.erofsgen("mount", "small", plain.target, "--plane", "fuse")
    (server,) = servers(plain.root)
    os.kill(server, signal.SIGKILL)
    eventually(lambda: servers(plain.root) == [])
    assert "not connected" in plain.run("cat", plain.target / "large", code=1).stderr
    assert "fuse, dead" in plain.erofsgen("mounts").stdout
    plain.erofsgen("mounts", "--repair")
    assert plain.hash("large") == HASH
    (server,) = servers(plain.root)
    os.kill(server, signal.SIGKILL)
    eventually(lambda: servers(plain.root) == [])
    plain.erofsgen("umount", plain.target)
    assert plain.mounts() == []


def test_without_fusermount3(plain: Plain) -> None:
    command = ["env", "PATH=/nowhere", PROGRAM, "mount", "small", plain.target, "--plane", "fuse"]
    said = plain.run(*command, code=UnsupportedError.exit_code).stderr
    assert "no fusermount3" in said
    assert "apt-get install fuse3" in said
    assert plain.mounts() == []
