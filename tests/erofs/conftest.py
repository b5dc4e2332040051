"""Fixtures of the EROFS tests: the sample tree, the tools of erofs-utils, mounts."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import sampletree

from erofsgen.erofs.tree import Inode

MS_RDONLY = 1
MNT_DETACH = 2

Mount = Callable[[Path, Sequence[Path], Path], AbstractContextManager[Path]]


class Sample(NamedTuple):
    root: Inode
    disks: sampletree.Disks
    index: bytes


@pytest.fixture(scope="session")
def sample() -> Sample:
    """A tree with one of everything, written."""
    root, disks = sampletree.sample()
    return Sample(root, disks, disks.write(root))


@pytest.fixture
def mount_erofs(require_root: None) -> Mount:
    """``with mount_erofs(index, devices, target)``: the kernel's EROFS over files, by mount(2).

    mount(8) will not do: it puts a loop device under the index, and then refuses devices that are files.
    """
    libc = ctypes.CDLL(None, use_errno=True)

    @contextmanager
    def mount(index: Path, devices: Sequence[Path], target: Path) -> Iterator[Path]:
        options = ",".join(f"device={device}" for device in devices)
        arguments = os.fsencode(index), os.fsencode(target), b"erofs", MS_RDONLY, os.fsencode(options)
        if libc.mount(*arguments):
            number = ctypes.get_errno()
            raise OSError(number, f"mount {index} with {len(devices)} devices: {os.strerror(number)}")
        try:
            yield target
        finally:
            if libc.umount2(os.fsencode(target), MNT_DETACH):
                number = ctypes.get_errno()
                raise OSError(number, f"umount2 {target}: {os.strerror(number)}")

    return mount


@pytest.fixture(scope="session")
def run_tool() -> Callable[..., str]:
    """Runs one of erofs-utils' tools; returns what it printed. It must succeed and have nothing to complain about."""

    def run(*command: str | Path) -> str:
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
        output = result.stdout.decode(errors="replace")
        assert result.returncode == 0, f"{' '.join(map(str, command))}: {output}"
        assert "<E>" not in output, output
        return output

    return run
