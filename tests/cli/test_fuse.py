"""``erofsgen fuse``, and what ``mounts`` says and does when a FUSE server has died."""

from __future__ import annotations

import errno
import os
import signal
import subprocess

import pytest
from lazykit import eventually

from erofsgen.host import linux

pytestmark = [pytest.mark.mount, pytest.mark.usefixtures("require_root")]


@pytest.fixture
def program(own_sample, mount_point):
    """The program with a host of the test's own, whose mounts and daemon are gone afterwards."""
    yield own_sample
    while os.path.ismount(mount_point) or is_dead(mount_point):
        subprocess.run(["umount", "--lazy", mount_point], check=True)
    own_sample("daemon", "--stop", "--force")


def is_dead(place):
    try:
        os.stat(place)
    except OSError as error:
        return error.errno == errno.ENOTCONN
    return False


def kill_server(program):
    (info,) = program("mounts", "--json").json
    os.kill(info["server"][0], signal.SIGKILL)
    eventually(lambda: program("mounts").lines[1].endswith("dead"))
    return info


def the_mount(target):
    (point,) = [point for point in linux.mount_points() if point.target == str(target)]
    return point


class TestForeground:
    @pytest.fixture
    def process(self, program, mount_point):
        process = program.process("fuse", "sample:1", str(mount_point))
        eventually(lambda: process.poll() is not None or os.path.ismount(mount_point))
        yield process
        process.kill()
        process.communicate()

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["INT", "TERM"])
    def test_a_signal_unmounts(self, process, mount_point, number):
        assert (mount_point / "data/small").read_text() == "a few bytes\n"
        assert the_mount(mount_point).fstype == "fuse.erofsgen"
        process.send_signal(number)
        assert process.wait(20) == 0
        assert not os.path.ismount(mount_point)

    def test_it_ends_with_the_mount(self, program, process, mount_point):
        program("umount", str(mount_point))
        assert process.wait(20) == 0

    def test_a_dead_server_is_an_error(self, program, process, mount_point):
        (info,) = program("mounts", "--json").json
        os.kill(info["server"][0], signal.SIGKILL)
        _, said = process.communicate(timeout=20)
        assert process.returncode == 7
        assert b"the FUSE server has died" in said
        assert not os.path.ismount(mount_point)
        assert program("mounts", "--json").json == []


class TestRepair:
    @pytest.mark.parametrize("plane", ["fuse", "blockfuse"])
    def test_a_dead_mount_is_made_anew(self, program, mount_point, plane):
        program("mount", "sample:1", str(mount_point), "--plane", plane)
        dead = kill_server(program)
        with pytest.raises(OSError, match=r"Transport endpoint|Input/output"):
            (mount_point / "data/big").read_bytes()
        assert f"repaired {mount_point}" in program("mounts", "--repair").err
        assert (mount_point / "data/small").read_text() == "a few bytes\n"
        (info,) = program("mounts", "--json").json
        assert (info["plane"], info["image"], info["digest"]) == (plane, "sample:1", dead["digest"])
        assert info["id"] != dead["id"]

    def test_what_is_alive_is_left_alone(self, program, mount_point):
        program("mount", "sample:1", str(mount_point), "--plane", "fuse")
        before = program("mounts", "--json").json
        assert program("mounts", "--repair").err == ""
        assert program("mounts", "--json").json == before

    def test_changes_that_are_kept(self, program, mount_point, tmp_path):
        program("mount", "sample:1", str(mount_point), "--plane", "fuse", "--upper", str(tmp_path / "changes"))
        (mount_point / "new").write_text("kept\n")
        kill_server(program)
        program("mounts", "--repair")
        assert (mount_point / "new").read_text() == "kept\n"
        assert (mount_point / "data/small").read_text() == "a few bytes\n"

    def test_what_cannot_be_repaired(self, program, mount_point):
        program("mount", "sample:1", str(mount_point), "--plane", "fuse")
        info = kill_server(program)
        index = program.root / "images" / f"{info['digest'].removeprefix('sha256:')}.json"
        index.rename(index.with_suffix(".away"))
        said = program("mounts", "--repair", code=3).err
        assert f"{mount_point}: not repaired" in said
        index.with_suffix(".away").rename(index)
