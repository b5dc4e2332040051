"""mount.erofsgen, as mount(8) calls it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from erofsgen.cli.mounthelper import parse, run, split
from erofsgen.errors import UsageError
from erofsgen.host import linux

HELPER = Path(sys.executable).with_name("mount.erofsgen")
LINK = Path("/sbin/mount.erofsgen")


@pytest.fixture(scope="module")
def helper(require_root):
    """Where mount(8) looks for it. It is the administrator who makes the link, and who keeps theirs."""
    if LINK.is_symlink() and not LINK.exists():
        LINK.unlink()  # left by a test that was killed
    if os.path.lexists(LINK):
        pytest.skip(f"{LINK} is not ours")
    LINK.symlink_to(HELPER)
    yield
    LINK.unlink()


@pytest.fixture
def mount(helper, sample, mount_point):
    """mount(8) of ``sample:1`` on the mount point; its exit code is insisted on."""

    def call(*arguments: str, options: str = "", code: int = 0) -> str:
        options = ",".join(filter(None, [f"store={sample.store},root={sample.root}", options]))
        command = ["mount", "-t", "erofsgen", *arguments, "sample:1", str(mount_point), "-o", options]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == code, result
        assert "Traceback" not in result.stderr
        return result.stdout + result.stderr

    return call


@pytest.fixture
def fuse_options(own_sample, mount_point):
    """Options for the store and a host of the test's own, whose daemon is of the plane fuse."""
    yield f"store={own_sample.store},root={own_sample.root}"
    if os.path.ismount(mount_point):
        subprocess.run(["umount", "--lazy", mount_point], check=True)
    own_sample("daemon", "--stop", "--force")


def the_mount(target: Path) -> linux.MountPoint:
    (point,) = [point for point in linux.mount_points() if point.target == str(target)]
    return point


@pytest.mark.mount
class TestThroughMount:
    def test_read_only_and_umount(self, mount, mount_point, sample):
        assert mount(options="ro") == ""
        assert (mount_point / "data/small").read_text() == "a few bytes\n"
        assert the_mount(mount_point).fstype == "erofs"
        assert [info["target"] for info in sample("mounts", "--json").json] == [str(mount_point)]
        subprocess.run(["umount", mount_point], check=True)
        assert sample("mounts", "--json").json == []

    def test_writable(self, mount, mount_point, sample):
        mount(options="rw,eager,noauto,nofail,_netdev,x-systemd.automount,noatime,comment=x")
        (mount_point / "new").write_text("new\n")
        assert the_mount(mount_point).fstype == "overlay"
        sample("umount", mount_point)

    def test_changes_are_kept(self, mount, mount_point, sample, tmp_path):
        upper = tmp_path / "up,per"
        for quoted in (f'upper="{upper}"', f"upper={tmp_path}/up\\,per"):
            mount(options=quoted)
            (mount_point / "new").write_text("new\n")
            sample("umount", mount_point)
            assert (upper / "new").read_text() == "new\n"

    @pytest.mark.parametrize("access", ["ro", "rw"])
    def test_attributes(self, mount, mount_point, sample, access):
        mount(options=f"{access},nosuid,nodev,noexec,dev")
        flags = the_mount(mount_point).options.split(",")
        assert {"nosuid", "noexec"} <= set(flags)
        assert "nodev" not in flags
        sample("umount", mount_point)

    def test_fstab(self, mount, mount_point, sample, tmp_path, helper):
        table = tmp_path / "fstab"
        table.write_text(
            f"sample:1 {mount_point} erofsgen ro,noauto,nosuid,store={sample.store},root={sample.root} 0 0\n"
        )
        subprocess.run(["mount", "-T", table, mount_point], check=True)
        assert "nosuid" in the_mount(mount_point).options
        subprocess.run(["umount", mount_point], check=True)

    def test_fake_mounts_nothing(self, mount, mount_point):
        mount("-f", options="ro")
        assert not os.path.ismount(mount_point)

    @pytest.mark.parametrize(
        ("options", "code", "message"),
        [
            ("frobnicate", 1, "unknown mount option 'frobnicate'"),
            ("ro,upper=/x", 1, "ro and upper=DIR contradict each other"),
            ("plane=nbd", 32, "no plane nbd"),
            ("store=/nonexistent", 32, "no store at /nonexistent"),
        ],
    )
    def test_errors(self, mount, mount_point, options, code, message):
        said = mount(options=options, code=code)
        assert f"mount.erofsgen: {message}" in said
        assert not os.path.ismount(mount_point)

    def test_sloppy(self, mount, mount_point, sample):
        mount("-s", options="ro,frobnicate,data=ordered")
        sample("umount", mount_point)

    def test_mounted_already(self, mount, mount_point, sample):
        mount(options="ro")
        assert "sample:1 is mounted there" in mount(options="ro", code=32)
        sample("umount", mount_point)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("", []),
        ("ro", ["ro"]),
        ("ro,,rw,", ["ro", "rw"]),
        ('a="b,c",d', ["a=b,c", "d"]),
        ("a=b\\,c,d", ["a=b,c", "d"]),
        ("a=b\\c\\,,d", ["a=b\\c,", "d"]),
        ('a="b,c', ["a=b,c"]),
        ('"a,b"c,d', ["a,bc", "d"]),
    ],
)
def test_separating_options(options, expected):
    assert list(split(options)) == expected


def test_the_access():
    assert not parse(["i", "/d"]).rw
    assert not parse(["i", "/d", "-o", "ro"]).rw
    assert not parse(["i", "/d", "-o", "rw,ro"]).rw
    assert parse(["i", "/d", "-o", "rw"]).rw
    assert parse(["i", "/d", "-o", "upper=/u"]).rw


@pytest.mark.parametrize(
    "arguments", [[], ["i"], ["i", "d", "e"], ["i", "d", "-z"], ["i", "d", "-N", "1"], ["i", "d", "-o", "store="]]
)
def test_usage(arguments):
    with pytest.raises(UsageError):
        parse(arguments)
    assert run(arguments) == 1


def test_every_generic_option_is_understood():
    generic = (
        "defaults,auto,noauto,nofail,_netdev,user,nouser,users,user=joe,owner,group,x-a.b=c,X-mount.mkdir,comment=z,"
        "async,sync,dirsync,relatime,norelatime,noatime,nodiratime,strictatime,lazytime,suid,dev,exec,silent,loud"
    )
    assert parse(["i", "/d", "-o", generic]).attributes == set()


@pytest.mark.mount
class TestFuse:
    """``mount.fuse.erofsgen``: by the type ``fuse.erofsgen``, or through libfuse's mount.fuse3."""

    @pytest.fixture
    def link(self, require_root):
        link = LINK.with_name("mount.fuse.erofsgen")
        if os.path.lexists(link):
            pytest.skip(f"{link} is not ours")
        link.symlink_to(HELPER.with_name(link.name))
        yield
        link.unlink()

    def test_by_type(self, link, fuse_options, mount_point):
        options = f"ro,noexec,{fuse_options}"
        subprocess.run(["mount", "-t", "fuse.erofsgen", "sample:1", mount_point, "-o", options], check=True)
        assert (mount_point / "data/small").read_text() == "a few bytes\n"
        assert the_mount(mount_point).fstype == "fuse.erofsgen"
        assert {"ro", "noexec"} <= set(the_mount(mount_point).options.split(","))
        subprocess.run(["umount", mount_point], check=True)

    def test_by_mount_fuse3(self, fuse_options, mount_point):
        path = f"{HELPER.parent}:{os.environ['PATH']}"
        command = ["mount.fuse3", "mount.fuse.erofsgen#sample:1", mount_point, "-o", f"ro,{fuse_options}"]
        subprocess.run(command, check=True, env={**os.environ, "PATH": path})
        assert (mount_point / "data/small").read_text() == "a few bytes\n"
        assert the_mount(mount_point).fstype == "fuse.erofsgen"
        subprocess.run(["umount", mount_point], check=True)

    def test_another_plane_may_be_named(self):
        assert parse(["image", "dir", "-o", "ro"], "fuse").plane == "fuse"
        assert parse(["image", "dir", "-o", "plane=blockfuse"], "fuse").plane == "blockfuse"
