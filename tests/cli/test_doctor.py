"""doctor: what it finds is what the kernel does, and it leaves nothing behind."""

from __future__ import annotations

import errno
import json
import os
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from erofsgen.host import linux, probes
from erofsgen.host.doctor import CHECKS, PLANES, plane_works

pytestmark = [pytest.mark.mount, pytest.mark.usefixtures("require_root")]

CAPABLE = ("ext4", "xfs", "btrfs")


def fstype(place: Path) -> str:
    result = subprocess.run(["stat", "-f", "-c", "%T", place], capture_output=True, text=True, check=True)
    return {"ext2/ext3": "ext4"}.get(result.stdout.strip(), result.stdout.strip())


def lazy_expected(place: Path) -> bool:
    return linux.kernel_version() >= (6, 14) and fstype(place) in CAPABLE


def examined(program, code=None):
    process = program.process("doctor", "--json")
    out, err = process.communicate(timeout=60)
    found = json.loads(out)
    assert err == b""
    assert code is None or process.returncode == code
    return process.returncode, found, {finding["check"]: finding for finding in found["checks"]}


def planes_of(found):
    return {plane["plane"]: plane for plane in found["planes"]}


def test_here(erofsgen, tmp_path):
    _, found, checks = examined(erofsgen, code=0)
    assert len(checks) == len(CHECKS)
    assert list(planes_of(found)) == list(PLANES)
    lazy = lazy_expected(tmp_path)
    assert found["auto"] == ("fanotify" if lazy else "blockfuse")
    assert planes_of(found)["fanotify"]["works"] == lazy
    assert planes_of(found)["eager"] == {"plane": "eager", "works": True, "because": None}
    assert planes_of(found)["fuse"] == {"plane": "fuse", "works": True, "because": None}
    assert (checks["fanotify pre-content"]["result"] == "ok") == lazy
    assert checks["privilege"]["result"] == "ok"
    for finding in found["checks"]:
        assert finding["result"] in ("ok", "missing", "unknown")
        assert finding["result"] == "ok" or finding["advice"], finding


def test_a_file_system_that_does_not_opt_in(erofsgen, mount_point):
    subprocess.run(["mount", "-t", "tmpfs", "none", mount_point], check=True)
    erofsgen.options[-1] = str(mount_point)
    _, found, checks = examined(erofsgen, code=0)
    assert found["auto"] == "blockfuse"
    assert checks["fanotify pre-content"]["result"] == "missing"
    if linux.kernel_version() >= (6, 14):
        assert "does not opt in" in checks["fanotify pre-content"]["detail"]
        assert "ext4, xfs or btrfs" in checks["fanotify pre-content"]["advice"]
    assert checks["overlayfs"]["result"] == "ok"
    assert os.listdir(mount_point) == []


def test_a_stacked_file_system(tmp_path, mount_point):
    for name in ("lower", "upper", "work"):
        (tmp_path / name).mkdir()
    options = f"lowerdir={tmp_path}/lower,upperdir={tmp_path}/upper,workdir={tmp_path}/work"
    subprocess.run(["mount", "-t", "overlay", "none", mount_point, "-o", options], check=True)
    assert probes.file_backed(mount_point).result == "missing"
    assert plane_works(mount_point).result == "missing"
    assert plane_works(mount_point, "eager").ok == probes.loop(mount_point).ok


def test_nothing_is_left(erofsgen, tmp_path):
    mounts = [(point.id, point.target) for point in linux.mount_points()]
    listing = sorted(os.listdir(tmp_path))
    examined(erofsgen)
    assert [(point.id, point.target) for point in linux.mount_points()] == mounts
    assert sorted(os.listdir(tmp_path)) == listing  # not even --root


def test_without_privilege(erofsgen):
    command = ["unshare", "--user", "--map-root-user", "true"]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no user namespaces")
    program = Path(sys.executable).with_name("erofsgen")
    result = subprocess.run([*command[:-1], program, *erofsgen.options, "doctor"], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert "in a user namespace" in result.stdout
    assert [line.split()[0] for line in result.stdout.splitlines() if " yes" in line] == ["fuse"]


def test_the_table(erofsgen):
    process = erofsgen.process("doctor")
    out, _ = process.communicate(timeout=60)
    lines = out.decode().splitlines()
    assert lines[0].split() == ["CHECK", "RESULT", "FOUND", "WHAT", "TO", "DO"]
    assert len([line for line in lines if " (auto)" in line]) == 1


def test_a_plane_is_asked_quickly(tmp_path):
    plane_works(tmp_path)
    threads = threading.active_count()
    taken = []
    for _ in range(5):
        started = time.monotonic()
        finding = plane_works(tmp_path)
        taken.append(time.monotonic() - started)
    assert finding.ok == lazy_expected(tmp_path)
    assert min(taken) < 0.05
    assert threading.active_count() == threads


class TestFanotify:
    """What other kernels would answer."""

    def test_a_kernel_without_it(self, tmp_path, monkeypatch):
        def refuse(*arguments):
            raise OSError(errno.EINVAL, "Invalid argument")

        monkeypatch.setattr(linux, "fanotify_mark", refuse)
        finding = plane_works(tmp_path)
        assert (finding.ok, finding.advice) == (False, "use Linux 6.14 or newer")

    def test_a_read_that_is_not_noticed(self, tmp_path, monkeypatch):
        monkeypatch.setattr(linux, "fanotify_mark", lambda *arguments: None)
        monkeypatch.setattr(probes, "_PATIENCE", 0.05)
        finding = probes.fanotify(tmp_path)
        if linux.kernel_version() >= (6, 14):
            assert finding.detail == "a read was not noticed"
        assert not finding.ok

    def test_an_answer_that_is_not_heeded(self, tmp_path, monkeypatch):
        if not lazy_expected(tmp_path):
            pytest.skip("needs FAN_PRE_ACCESS")
        monkeypatch.setattr(probes, "_RESPONSE", Allowing())
        assert probes.fanotify(tmp_path).detail == "a refused read was not EIO"


class Allowing:
    """Packs every answer as FAN_ALLOW."""

    def pack(self, descriptor: int, response: int) -> bytes:
        return struct.pack("=iI", descriptor, linux.FAN_ALLOW)
