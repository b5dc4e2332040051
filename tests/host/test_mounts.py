from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from handmade import CHUNK, chunks_of, contents, erofs_mounts_below, loops_over, read_tree

from erofsgen.errors import (
    BusyError,
    FormatError,
    IntegrityError,
    NotFoundError,
    StorageError,
    UnsupportedError,
    UsageError,
)
from erofsgen.host import linux
from erofsgen.host.mount import superblock
from erofsgen.host.mount.mounts import mount, mounts, unmount

pytestmark = pytest.mark.mount

BOTH_WAYS = pytest.mark.parametrize("via", ["file-backed", "loop"])


def nothing_left(root):
    """Nothing mounted below the test's directory, no state, no directory of a mount that is gone."""
    assert erofs_mounts_below(root.parent) == []
    assert list((root / "mounts").iterdir()) == []
    assert list((root / "mnt").iterdir()) == []
    assert list((root / "upper").iterdir()) == []


@BOTH_WAYS
def test_a_mount_has_the_files(sample, root, mount_point, via):
    info = mount(sample.image, mount_point, root=root, via=via)
    assert read_tree(mount_point) == sample.files
    status = mount_point.stat()
    assert (status.st_mode & 0o7777, status.st_uid, status.st_gid) == (0o751, 7, 8)
    assert (info.how, info.plane, info.rw, info.upper) == (via, "eager", False, None)
    (point,) = erofs_mounts_below(root.parent)
    assert (point.fstype, point.id, point.device) == ("erofs", info.mount_id, info.device)
    with pytest.raises(OSError, match="Read-only file system"):
        (mount_point / "new").touch()
    assert mounts(root) == [info]
    assert unmount(mount_point, root=root) == info
    assert list(mount_point.iterdir()) == []
    assert mounts(root) == []
    nothing_left(root)


def test_both_ways_are_alike_to_the_inode(sample, root, tmp_path):
    """Loop reads a rewritten index: all that stat and xattrs tell must be the same."""
    seen = []
    for via in ("file-backed", "loop"):
        target = tmp_path / via
        target.mkdir()
        mount(sample.image, target, root=root, via=via)
        rows = {}
        for path in [target, *sorted(target.rglob("*"))]:
            status = path.lstat()
            rows[str(path.relative_to(target))] = (
                *(status.st_mode, status.st_ino, status.st_nlink, status.st_uid, status.st_gid, status.st_size),
                *(status.st_mtime_ns, status.st_rdev, status.st_blocks),
            )
        seen.append(rows)
        unmount(target, root=root)
    assert seen[0] == seen[1]
    assert len(seen[0]) > len(sample.files)


def test_the_kernel_is_asked_what_it_can(sample, root, mount_point):
    info = mount(sample.image, mount_point, root=root)
    assert info.how == ("file-backed" if linux.kernel_version() >= (6, 12) else "loop")


def test_a_stacked_file_system_gets_a_loop_device(sample, overlay, mount_point):
    """EROFS refuses files on overlayfs as its backing (ENOTBLK), so this is decided by the kernel, not by the test."""
    inner = overlay / "root"
    info = mount(sample.image, mount_point, root=inner)
    assert info.how == "loop"
    assert read_tree(mount_point) == sample.files
    unmount(mount_point, root=inner)
    assert loops_over(inner) == []


def test_a_loop_device_goes_with_its_mount(sample, root, mount_point):
    mount(sample.image, mount_point, root=root, via="loop")
    assert len(loops_over(root)) == 1
    (device,) = [p.source for p in linux.mount_points() if p.target == str(mount_point)]
    assert Path("/sys/block", Path(device).name, "ro").read_text() == "1\n"
    unmount(mount_point, root=root)
    assert loops_over(root) == []


def test_three_hundred_devices(maker, root, mount_point):
    content = contents(4, 300 * 4096)[0]
    blocks = [content[at : at + 4096] for at in range(0, len(content), 4096)]
    packs = [maker.pack([block]) for block in blocks]
    image = maker.image("wide", {f"{number:03}": block for number, block in enumerate(blocks)}, packs)
    for via in ("file-backed", "loop"):
        info = mount(image, mount_point, root=root, via=via)
        assert len(info.devices) == (300 if via == "file-backed" else 0)
        assert b"".join(path.read_bytes() for path in sorted(mount_point.iterdir())) == content
        unmount(mount_point, root=root)


def test_one_image_on_several_targets(sample, root, tmp_path):
    targets = [tmp_path / name for name in ("one", "two", "three")]
    for target in targets:
        target.mkdir()
        mount(sample.image, target, root=root, rw=target.name == "three")
    assert [read_tree(target) for target in targets] == [sample.files] * 3
    assert [info.target for info in mounts(root)] == sorted(map(str, targets))
    unmount(targets[1], root=root)
    assert read_tree(targets[0]) == read_tree(targets[2]) == sample.files
    unmount(targets[0], root=root)
    unmount(targets[2], root=root)
    nothing_left(root)


def test_mount_again(sample, root, mount_point):
    for _ in range(3):
        mount(sample.image, mount_point, root=root)
        unmount(mount_point, root=root)
    nothing_left(root)


@pytest.mark.parametrize(
    "name",
    ["a,b", "a:b", "a b", "a\\b", 'a"b', "a\nb", "ä☃", "-o", "x" * 255, os.fsdecode(b"\xff\xfe"), "\\040", "%s"],
)
@pytest.mark.parametrize("rw", [False, True])
def test_odd_names(sample, tmp_path, root, name, rw):
    """Of the target, the root and the upper directory alike."""
    odd = root / name
    target = tmp_path / name
    target.mkdir()
    upper = tmp_path / f"upper{name[:100]}" if rw else None
    info = mount(sample.image, target, root=odd, rw=rw, upper=upper)
    assert info.target == str(target)
    assert json.loads(info.to_json())["target"] == str(target)
    assert read_tree(target) == sample.files
    assert mounts(odd) == [info]
    if upper is not None:
        (target / "new").write_bytes(b"new")
        assert (upper / "new").read_bytes() == b"new"
    unmount(target, root=odd)
    nothing_left(odd)


def test_long_paths(sample, root, mount_point):
    """Longer than the 255 bytes that fsconfig(2) takes."""
    deep = root.joinpath(*["d" * 100] * 5)
    info = mount(sample.image, mount_point, root=deep, rw=True)
    assert len(info.index) > 500
    assert read_tree(mount_point) == sample.files
    unmount(mount_point, root=deep)
    mount(sample.image, mount_point, root=deep, via="loop")
    assert read_tree(mount_point) == sample.files
    unmount(mount_point, root=deep)
    nothing_left(deep)


def test_a_target_behind_a_symlink(sample, root, mount_point, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(mount_point)
    info = mount(sample.image, link, root=root)
    assert info.target == str(mount_point)
    with pytest.raises(BusyError):
        mount(sample.image, mount_point, root=root)
    unmount(link, root=root)
    nothing_left(root)


class TestReadWrite:
    def test_changes_are_thrown_away(self, sample, root, mount_point):
        info = mount(sample.image, mount_point, root=root, rw=True)
        assert info.rw
        assert not info.keep
        assert read_tree(mount_point) == sample.files
        (mount_point / "etc/small").write_bytes(b"changed")
        (mount_point / "big").unlink()
        (mount_point / "usr/lib").rename(mount_point / "lib")
        (mount_point / "new").write_bytes(b"new")
        changed = read_tree(mount_point)
        assert changed["etc/small"] == b"changed"
        assert changed["new"] == b"new"
        assert "big" not in changed
        assert changed["lib/two"] == sample.files["usr/lib/two"]
        assert Path(info.upper).is_relative_to(root)
        whiteout = Path(info.upper, "big").lstat()
        assert (whiteout.st_mode & 0o170000, whiteout.st_rdev) == (0o020000, 0)
        unmount(mount_point, root=root)
        nothing_left(root)
        mount(sample.image, mount_point, root=root, rw=True)
        assert read_tree(mount_point) == sample.files
        unmount(mount_point, root=root)

    def test_an_upper_directory_is_kept(self, sample, root, mount_point, tmp_path):
        upper = tmp_path / "changes"
        mount(sample.image, mount_point, root=root, rw=True, upper=upper)
        (mount_point / "new").write_bytes(b"new")
        (mount_point / "big").unlink()
        unmount(mount_point, root=root)
        nothing_left(root)
        assert sorted(os.listdir(tmp_path)) == ["changes", "mnt", "root", "store"], "no work directory stays"
        assert (upper / "new").read_bytes() == b"new"
        info = mount(sample.image, mount_point, root=root, upper=upper)
        assert info.rw
        assert info.keep
        expected = dict(sample.files) | {"new": b"new"}
        del expected["big"]
        assert read_tree(mount_point) == expected
        unmount(mount_point, root=root)
        assert (upper / "new").exists()

    @pytest.mark.parametrize("given", [False, True])
    def test_the_top_directory_is_the_images(self, sample, root, mount_point, tmp_path, given):
        mount(sample.image, mount_point, root=root, rw=True, upper=tmp_path / "changes" if given else None)
        status = mount_point.stat()
        assert (status.st_mode & 0o7777, status.st_uid, status.st_gid) == (0o751, 7, 8)
        assert status.st_mtime_ns == 10**18

    def test_one_umount_ends_it(self, sample, root, mount_point):
        """Nothing but the overlay is mounted, so umount(8) is enough; the rest goes when somebody looks."""
        mount(sample.image, mount_point, root=root, rw=True)
        assert [point.fstype for point in erofs_mounts_below(root.parent)] == ["overlay"]
        (mount_point / "new").touch()
        subprocess.run(["umount", str(mount_point)], check=True)
        assert len(list((root / "upper").iterdir())) == 1
        assert mounts(root) == []
        nothing_left(root)

    def test_an_upper_directory_is_for_one_mount(self, sample, root, tmp_path):
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
        mount(sample.image, tmp_path / "one", root=root, upper=tmp_path / "changes")
        with pytest.raises(BusyError, match=r"upper directory of .*/one"):
            mount(sample.image, tmp_path / "two", root=root, upper=tmp_path / "changes")
        assert [info.target for info in mounts(root)] == [str(tmp_path / "one")]
        unmount(tmp_path / "one", root=root)

    def test_an_upper_directory_that_cannot_be_one(self, sample, root, mount_point, make_file_system, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(UsageError, match="not a directory"):
            mount(sample.image, mount_point, root=root, upper=tmp_path / "file")
        place = make_file_system("ext4", 4)
        with pytest.raises(UsageError, match="a mount point"):
            mount(sample.image, mount_point, root=root, upper=place)
        subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
        with pytest.raises(StorageError, match="Read-only"):
            mount(sample.image, mount_point, root=root, upper=place / "changes")
        nothing_left(root)

    def test_an_upper_directory_that_overlayfs_refuses(self, sample, root, mount_point, overlay):
        before = sorted(overlay.iterdir())
        with pytest.raises(UnsupportedError, match=f"{overlay}/changes: overlay: .*upper"):
            mount(sample.image, mount_point, root=root, upper=overlay / "changes")
        assert sorted(overlay.iterdir()) == before
        nothing_left(root)


class TestRefusals:
    def test_target(self, sample, root, tmp_path):
        with pytest.raises(NotFoundError, match="no such directory"):
            mount(sample.image, tmp_path / "missing", root=root)
        (tmp_path / "file").touch()
        with pytest.raises(UsageError, match="not a directory"):
            mount(sample.image, tmp_path / "file", root=root)
        assert not root.exists(), "nothing was fetched"

    def test_a_target_that_is_taken(self, sample, root, mount_point):
        mount(sample.image, mount_point, root=root)
        with pytest.raises(BusyError, match="sample is mounted there") as caught:
            mount(sample.image, mount_point, root=root)
        assert caught.value.hint == f"`erofsgen umount {mount_point}` first"
        assert len(erofs_mounts_below(mount_point)) == 1

    @BOTH_WAYS
    def test_a_damaged_pack(self, sample, root, mount_point, via):
        pack = sample.image.packs[1]
        with sample.image.store.blob_path(pack.digest).open("r+b") as blob:
            blob.seek(1000)
            blob.write(b"damage!")
        with pytest.raises(IntegrityError):
            mount(sample.image, mount_point, root=root, via=via)
        nothing_left(root)
        assert mounts(root) == []

    def test_not_a_mount(self, sample, root, mount_point, tmp_path):
        with pytest.raises(NotFoundError, match=r"nothing of .* is mounted there"):
            unmount(mount_point, root=root)
        assert not root.exists()
        mount(sample.image, mount_point, root=root)
        with pytest.raises(NotFoundError):
            unmount(tmp_path, root=root)
        with pytest.raises(NotFoundError):
            unmount(mount_point / "etc", root=root)
        foreign = tmp_path / "foreign"
        foreign.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(foreign)], check=True)
        with pytest.raises(NotFoundError):
            unmount(foreign, root=root)
        unmount(mount_point, root=root)

    def test_without_root(self, sample, root, mount_point, tmp_path):
        program = """
import os, sys
from pathlib import Path
from erofsgen.errors import ErofsgenError
from erofsgen.host.mount.mounts import mount
from erofsgen.store.directory import DirectoryStore
from erofsgen.store.image import Image
image = Image.open(DirectoryStore(sys.argv[1], create=False), "sample")
os.setgid(65534); os.setuid(65534)
try:
    mount(image, Path("/tmp"), root=Path(sys.argv[2]))
except ErofsgenError as error:
    print(type(error).__name__, error, error.hint)
"""
        result = subprocess.run(
            [sys.executable, "-c", program, sample.image.store.path, root], capture_output=True, text=True, check=True
        )
        assert result.stdout == "UnsupportedError mounting erofs is not permitted run as root (CAP_SYS_ADMIN)\n"

    def test_others_may_not_look(self, sample, root, mount_point):
        mount(sample.image, mount_point, root=root)
        program = """
import os, sys
from pathlib import Path
from erofsgen.errors import ErofsgenError
from erofsgen.host.mount.mounts import mounts, unmount
os.setgid(65534); os.setuid(65534)
for call in (lambda root: mounts(root), lambda root: unmount(Path(sys.argv[1]), root=root)):
    try:
        print(call(Path(sys.argv[2])))
    except ErofsgenError as error:
        print(error.exit_code, error.hint)
"""
        command = [sys.executable, "-c", program, mount_point, root]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        assert [line[:14] for line in result.stdout.splitlines()] == ["7 run as root,"] * 2
        assert read_tree(mount_point) == sample.files

    @pytest.mark.parametrize("place", ["", "..", "mnt", "packs/x"])
    def test_a_target_in_the_way_of_the_cache(self, sample, root, place):
        target = root / place
        target.mkdir(parents=True, exist_ok=True)
        with pytest.raises(UsageError, match="in the way of the host cache"):
            mount(sample.image, target, root=root)

    def test_a_damaged_state(self, sample, root, mount_point):
        mount(sample.image, mount_point, root=root)
        (state,) = (root / "mounts").iterdir()
        saved = state.read_bytes()
        state.write_bytes(saved[:50])
        with pytest.raises(FormatError, match=state.name):
            mounts(root)
        state.write_bytes(saved)
        unmount(mount_point, root=root)


class TestUnmount:
    def test_in_use(self, sample, root, mount_point):
        mount(sample.image, mount_point, root=root)
        with subprocess.Popen(["sleep", "60"], cwd=mount_point / "etc") as user:
            with pytest.raises(BusyError, match=rf"in use by sleep \(pid {user.pid}\)") as caught:
                unmount(mount_point, root=root)
            assert "--force" in caught.value.hint
            assert len(mounts(root)) == 1
            user.kill()
        unmount(mount_point, root=root)
        nothing_left(root)

    def test_force(self, sample, root, mount_point):
        mount(sample.image, mount_point, root=root)
        with (mount_point / "big").open("rb") as file:
            with pytest.raises(BusyError, match=rf"\(pid {os.getpid()}\)"):
                unmount(mount_point, root=root)
            unmount(mount_point, root=root, force=True)
            nothing_left(root)
            assert file.read() == sample.files["big"]

    def test_something_mounted_inside(self, sample, root, mount_point):
        mount(sample.image, mount_point, root=root)
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(mount_point / "tmp")], check=True)
        with pytest.raises(BusyError, match=re.escape(f"in use by {mount_point}/tmp")):
            unmount(mount_point, root=root)
        unmount(mount_point, root=root, force=True)
        nothing_left(root)

    def test_something_mounted_over_it(self, sample, root, mount_point):
        mount(sample.image, mount_point, root=root)
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(mount_point)], check=True)
        for force in (False, True):
            with pytest.raises(BusyError, match="covered by another mount"):
                unmount(mount_point, root=root, force=force)
        subprocess.run(["umount", str(mount_point)], check=True)
        unmount(mount_point, root=root)

    def test_moved(self, sample, root, mount_point, tmp_path):
        outer = tmp_path / "outer"
        outer.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(outer)], check=True)
        subprocess.run(["mount", "--make-private", str(outer)], check=True)
        (outer / "a").mkdir()
        (outer / "b").mkdir()
        mount(sample.image, outer / "a", root=root)
        subprocess.run(["mount", "--move", str(outer / "a"), str(outer / "b")], check=True)
        assert [info.target for info in mounts(root)] == [str(outer / "b")]
        with pytest.raises(NotFoundError):
            unmount(outer / "a", root=root)
        unmount(outer / "b", root=root)
        assert mounts(root) == []


class TestStaleStates:
    def test_unmounted_by_hand(self, sample, root, mount_point):
        mount(sample.image, mount_point, root=root)
        subprocess.run(["umount", str(mount_point)], check=True)
        with pytest.raises(NotFoundError):
            unmount(mount_point, root=root)
        assert mounts(root) == []
        info = mount(sample.image, mount_point, root=root)
        assert mounts(root) == [info]

    def test_after_a_reboot(self, sample, root, mount_point, tmp_path, monkeypatch):
        upper = tmp_path / "changes"
        mount(sample.image, mount_point, root=root, upper=upper)
        (mount_point / "new").touch()
        subprocess.run(["umount", str(mount_point)], check=True)
        other = tmp_path / "other"
        other.mkdir()
        mount(sample.image, other, root=root, rw=True)
        monkeypatch.setattr(linux, "boot_id", lambda: "another boot")
        assert mounts(root) == []
        subprocess.run(["umount", str(other)], check=True)
        nothing_left(root)
        assert (upper / "new").exists()

    def test_another_mount_namespace_is_left_alone(self, sample, root, mount_point, store_dir):
        """A mount that cannot be seen from here is no stale one: its changes may be in use."""
        program = """
import sys
from pathlib import Path
from erofsgen.host.mount.mounts import mount, unmount
from erofsgen.store.directory import DirectoryStore
from erofsgen.store.image import Image
image = Image.open(DirectoryStore(sys.argv[1], create=False), "sample")
target, root = map(Path, sys.argv[2:])
mount(image, target, root=root, rw=True)
(target / "new").write_bytes(b"inside")
print("mounted", flush=True)
sys.stdin.readline()
print((target / "new").read_bytes().decode(), flush=True)
unmount(target, root=root)
"""
        command = ["unshare", "--mount", sys.executable, "-c", program, store_dir, mount_point, root]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout.readline() == "mounted\n"
            (info,) = mounts(root)
            assert not os.path.ismount(mount_point)
            with pytest.raises(UnsupportedError, match="another mount namespace"):
                unmount(mount_point, root=root)
            assert Path(info.upper, "new").exists()
            output, _ = child.communicate("go on\n", timeout=30)
        assert (output, child.returncode) == ("inside\n", 0)
        assert mounts(root) == []


MOUNT = """
import os, signal, sys
from pathlib import Path
from erofsgen.errors import ErofsgenError
from erofsgen.host import linux
from erofsgen.host.mount import mounts, superblock
from erofsgen.store.directory import DirectoryStore
from erofsgen.store.image import Image

def die(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)

store, target, root, how, dies_in = sys.argv[1:]
image = Image.open(DirectoryStore(store, create=False), "sample")
if dies_in:
    module, _, name = dies_in.rpartition(".")
    setattr(sys.modules[module], name, die)
try:
    mounts.mount(image, Path(target), root=Path(root), rw=how == "rw", via="loop" if how == "loop" else None)
except ErofsgenError as error:
    sys.exit(error.exit_code)
"""


def mounting(sample, target, root, how="ro", dies_in=""):
    arguments = [sample.image.store.path, target, root, how, dies_in]
    return subprocess.Popen([sys.executable, "-c", MOUNT, *map(str, arguments)])


@pytest.mark.parametrize("same_target", [False, True])
def test_two_processes_mount_one_image(sample, root, tmp_path, same_target):
    targets = [tmp_path / "one", tmp_path / ("one" if same_target else "two")]
    for target in targets:
        target.mkdir(exist_ok=True)
    children = [mounting(sample, target, root) for target in targets]
    codes = sorted(child.wait(60) for child in children)
    assert codes == ([0, BusyError.exit_code] if same_target else [0, 0])
    assert {info.target for info in mounts(root)} == set(map(str, targets))
    assert len(erofs_mounts_below(tmp_path)) == len(set(targets))
    assert [read_tree(target) for target in targets] == [sample.files] * 2
    for target in set(targets):
        unmount(target, root=root)
    nothing_left(root)


@pytest.mark.parametrize(
    ("how", "dies_in"),
    [
        ("ro", "erofsgen.host.mount.mounts.MountInfo"),  # an EROFS superblock exists, nothing is attached
        ("loop", "erofsgen.host.mount.mounts.MountInfo"),
        ("rw", "erofsgen.host.mount.superblock.mount_overlay"),  # the EROFS is attached to its private directory
        ("rw", "erofsgen.host.linux.mount_id"),  # the overlay exists
        ("ro", "erofsgen.host.mount.mounts.storage"),  # the state is written, the mount not attached
        ("rw", "erofsgen.host.mount.mounts.storage"),
    ],
)
def test_kill_in_the_middle(sample, root, mount_point, how, dies_in):
    child = mounting(sample, mount_point, root, how, dies_in)
    assert child.wait(60) == -signal.SIGKILL
    assert mounts(root) == []
    nothing_left(root)
    deadline = time.monotonic() + 10
    while loops_over(root) and time.monotonic() < deadline:  # a loop device is freed a moment after its last user
        time.sleep(0.05)
    assert loops_over(root) == []
    mount(sample.image, mount_point, root=root, rw=how == "rw")
    assert read_tree(mount_point) == sample.files
    unmount(mount_point, root=root)


@pytest.mark.parametrize("rw", [False, True])
@pytest.mark.parametrize(
    "failing",
    ["erofsgen.host.linux.move_mount", "erofsgen.host.mount.state.MountStates.write", "pathlib.Path.write_text"],
)
def test_failure_in_the_middle(sample, root, mount_point, tmp_path, monkeypatch, rw, failing):
    mount(sample.image, mount_point, root=root)  # so that the cache is complete
    unmount(mount_point, root=root)

    def fail(*arguments):
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(failing, fail)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(Exception, match="Cannot allocate memory"):
        mount(sample.image, mount_point, root=root, rw=rw, upper=tmp_path / "changes" if rw else None)
    assert sorted(os.listdir(tmp_path)) == before
    nothing_left(root)


def test_interrupted_right_after_attaching(sample, root, mount_point, monkeypatch):
    attach = linux.move_mount

    def interrupted(*arguments):
        attach(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(linux, "move_mount", interrupted)
    with pytest.raises(KeyboardInterrupt):
        mount(sample.image, mount_point, root=root)
    nothing_left(root)


def test_an_index_the_kernel_refuses(tmp_path, require_root):
    index = tmp_path / "index"
    index.write_bytes(bytes(8192))
    with pytest.raises(UnsupportedError, match="erofs: Invalid argument") as caught:
        superblock.mount_files(index, [])
    assert "dmesg" in caught.value.hint


def test_a_kernel_without_erofs(monkeypatch, require_root):
    monkeypatch.setattr(superblock.linux, "fsopen", lambda fstype: raise_enodev())
    with pytest.raises(UnsupportedError, match="no erofs file system") as caught:
        superblock.require()
    assert "modprobe erofs" in caught.value.hint


def raise_enodev():
    raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))


def test_an_image_without_packs(maker, root, mount_point):
    image = maker.image("small", {"a": b"x", "b/c": "target"}, [])
    for via in ("file-backed", "loop"):
        mount(image, mount_point, root=root, via=via)
        assert read_tree(mount_point) == {"a": b"x", "b/c": "target"}
        unmount(mount_point, root=root)


def test_neighbouring_blocks_of_two_packs(maker, root, mount_point):
    """Chunks that follow each other in a file *and* by block number, in different packs: over two block devices iomap
    would read the second from the first one's."""
    one, two = contents(5, 4 * CHUNK, 4 * CHUNK)
    a, b = chunks_of(one), chunks_of(two)
    packs = [maker.pack(a), maker.pack(b)]
    file = a[0] + b[1] + a[2] + b[3]
    image = maker.image("interleaved", {"file": file}, packs)
    for via in ("file-backed", "loop"):
        mount(image, mount_point, root=root, via=via)
        assert (mount_point / "file").read_bytes() == file
        unmount(mount_point, root=root)


def test_the_cache_survives_the_store(sample, root, mount_point, store_dir):
    """What is local needs nothing from the store but the manifest."""
    mount(sample.image, mount_point, root=root)
    unmount(mount_point, root=root)
    shutil.rmtree(store_dir / "blobs")
    mount(sample.image, mount_point, root=root)
    assert read_tree(mount_point) == sample.files
