"""The guest is what its kernel's catalogue entry and the tests expect."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import pytest


def filesystem(path):
    return subprocess.run(
        ["stat", "--file-system", "--format=%T", path], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_the_kernel_is_the_one_of_the_catalogue():
    name = os.environ["EROFSGEN_VM_KERNEL"]
    assert platform.release() == os.environ["EROFSGEN_VM_RELEASE"]
    series = name.removesuffix("-ondemand").removesuffix("x")
    assert (platform.release() + ".").startswith(series)


@pytest.mark.parametrize(("variable", "kind"), [("EROFSGEN_VM_EXT4", "ext2/ext3"), ("EROFSGEN_VM_XFS", "xfs")])
def test_scratch_disks_can_be_written(variable, kind):
    scratch = os.environ[variable]
    assert filesystem(scratch) == kind
    probe = Path(scratch, "probe")
    probe.write_bytes(b"x" * 100_000)
    assert probe.read_bytes() == b"x" * 100_000
    probe.unlink()


def test_temporary_files_are_on_the_ext4_disk(tmp_path):
    assert tmp_path.is_relative_to(os.environ["EROFSGEN_VM_EXT4"])


def test_the_share_is_the_hosts():
    assert (Path(os.environ["EROFSGEN_VM_SHARE"]) / "command").exists()


def test_loopback_works(network):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
        pass
