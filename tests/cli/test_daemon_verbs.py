"""Lazy mounts as a user has them: pull, mount, status, umount, daemon."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest
from lazykit import Host, eventually, processes

pytestmark = [pytest.mark.mount, pytest.mark.usefixtures("require_root")]


def test_mount_status_umount(sample, mount_point: Path):
    assert sample("status").lines == [f"no daemon runs for {sample.root}"]
    sample("mount", "sample:1", mount_point)
    assert (mount_point / "data/edited").read_bytes()
    facts = json.loads(sample("status", "--json").out)
    assert (facts["running"], facts["plane"], facts["lazy_mounts"], facts["denied"]) == (True, "fanotify", 1, 0)
    assert facts["engine"]["frames"] > 0
    assert list(facts["engine"]["sources"]) == [str(sample.store)]
    lines = sample("status").lines
    assert [line.split()[0] for line in lines] == [
        "daemon", "worker", "standby", "mounts", "reads", "filled", "store",
    ]  # fmt: skip
    (mounted,) = json.loads(sample("mounts", "--json").out)
    assert (mounted["plane"], mounted["image"]) == ("fanotify", "sample:1")
    assert "mounted lazily" in sample("daemon", "--stop", code=9).err
    sample("umount", mount_point)
    sample("daemon", "--stop")
    assert processes(sample.root) == []
    assert "no daemon is running" in sample("daemon", "--stop", code=3).err


def test_stopping_by_force_detaches(sample, mount_point: Path):
    sample("mount", "sample:1", mount_point, "--plane", "fanotify")
    sample("daemon", "--stop", "--force")
    assert list(mount_point.iterdir()) == []
    assert sample("mounts", "--json").out.strip() == b"[]"


def test_pulled_images_need_no_store(own_sample, mount_point: Path, tmp_path: Path):
    own_sample("pull", "sample:1")
    assert json.loads(own_sample("pull", "sample:1", "--all", "--json").out)["complete"] is True
    own_sample.store.rename(tmp_path / "away")
    own_sample("mount", "sample:1", mount_point)
    assert (mount_point / "data/small").read_bytes()
    own_sample("umount", mount_point)
    own_sample("mount", "sample:1", mount_point, "--eager")
    own_sample("umount", mount_point)
    assert "no store" in own_sample("mount", "sample:2", mount_point, code=3).err
    assert "no store" in own_sample("pull", "sample:1", code=3).err


def test_a_read_that_fails_says_why(own_sample, mount_point: Path, tmp_path: Path):
    own_sample("pull", "sample:1")
    own_sample.store.rename(tmp_path / "away")
    own_sample("mount", "sample:1", mount_point)
    with pytest.raises(OSError, match="Input/output error"):
        (mount_point / "data/edited").read_bytes()
    assert f"no store at {own_sample.store}" in own_sample("status").lines[-1]


def test_cache_directories_and_limit_are_remembered(sample, mount_point: Path, tmp_path: Path):
    sample("pull", "sample:1", "--cache-dir", tmp_path / "one", "--cache-dir", tmp_path / "two", "--max-bytes", "1G")
    packs = {path.parent.parent.name for path in tmp_path.glob("*/packs/*.data")}
    assert packs <= {"one", "two"}
    assert packs
    sample("mount", "sample:1", mount_point)
    assert (mount_point / "data/edited").read_bytes()
    assert json.loads((sample.root / "cache.json").read_text())["max_bytes"] == 1 << 30
    sample("umount", mount_point)


def test_the_foreground_daemon(sample, mount_point: Path):
    process = sample.process("daemon", "--deadline", "5")
    try:
        eventually(
            lambda: (
                stat.S_ISSOCK(os.stat(sample.root / "control.sock").st_mode)
                if (sample.root / "control.sock").exists()
                else False
            )
        )
        eventually(lambda: Host(sample.root).status()["worker"])
        sample("mount", "sample:1", mount_point)
        assert Host(sample.root).status()["pid"] == process.pid
        sample("umount", mount_point)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.communicate()


def test_programs_see_no_daemon_where_they_may_not_look(sample, mount_point: Path):
    """The control socket is root's: another user gets one line."""
    sample("mount", "sample:1", mount_point)
    os.chmod(sample.root.parent, 0o755)
    time.sleep(0.1)
    result = subprocess.run(
        ["setpriv", "--reuid=65534", "--clear-groups", "test", "-e", str(sample.root / "control.sock")], check=False
    )
    assert result.returncode == 1
    sample("umount", mount_point)


@pytest.mark.skipif(os.path.exists("/dev/cachefiles"), reason="this kernel has cachefiles: see vmtests/")
@pytest.mark.parametrize("command", [["fscached"], ["daemon", "--plane", "fscache"]], ids="-".join)
def test_a_kernel_without_cachefiles(own_sample, command: list[str]):
    process = own_sample.process(*command)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 8
    assert b"no /dev/cachefiles" in said
    assert b"CONFIG_CACHEFILES_ONDEMAND" in said
    assert processes(own_sample.root) == []


@pytest.mark.skipif(os.path.exists("/dev/cachefiles"), reason="this kernel has cachefiles: see vmtests/")
def test_a_mount_over_fscache_that_cannot_be(own_sample, mount_point: Path):
    assert "no /dev/cachefiles" in own_sample("mount", "sample:1", mount_point, "--plane", "fscache", code=8).err
    assert list(mount_point.iterdir()) == []
    assert own_sample("mounts", "--json").out.strip() == b"[]"


def test_limits_that_contradict_one_another(own_sample):
    process = own_sample.process("fscached", "--brun", "5", "--bcull", "7")
    _, said = process.communicate(timeout=30)
    assert process.returncode == 2
    assert b"to cull at 7%, to run at 5%" in said


def test_a_daemon_of_another_plane(own_sample, mount_point: Path):
    own_sample("mount", "sample:1", mount_point)
    other = mount_point.parent / "other"
    other.mkdir()
    said = own_sample("mount", "sample:1", other, "--plane", "fscache", code=9)
    assert "the daemon is of plane fanotify" in said.err
    own_sample("umount", mount_point)
