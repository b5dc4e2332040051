"""One boot of one kernel: virtme-ng and QEMU, the machine's own files as root, two scratch disks, a shared directory.

The root is read-only. ``/run/scratch/ext4`` and ``/run/scratch/xfs`` are disks that stay between boots; ``/run/share``
is a directory of the host. What a guest says goes into files there: without a terminal virtme's standard output is
not to be relied on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from erofsgen.errors import BusyError, UnsupportedError
from vmtests.kernels import Kernel
from vmtests.places import REPOSITORY, run

SHARE = "/run/share"
SCRATCH = "/run/scratch"
DISKS = ("ext4", "xfs")
MODULES = ("9p", "virtio_blk", "ext4", "xfs", "erofs", "overlay", "loop", "fuse", "cachefiles")
CPUS = 2
MEMORY = "2G"
DISK_SIZE = 4 << 30
"""Bytes of a scratch disk; its file is sparse."""

NOT_RUN = 125
"""The status of a guest that could not run its command: a scratch disk cannot be mounted."""

_POLL = 0.2

_running: set[Guest] = set()
_ending = threading.Event()


class End(enum.Enum):
    """How a boot ended."""

    DONE = "finished"
    CUT = "had its power cut"
    CRASHED = "crashed"
    DEADLINE = "did not finish in time"


@dataclass(frozen=True)
class Outcome:
    """``status`` is the command's exit code where the guest finished. Both files may be missing or empty."""

    end: End
    status: int | None
    seconds: float
    console: Path
    output: Path


def make_disks(directory: Path) -> dict[str, Path]:
    """Empty scratch disks below ``directory``, in place of what is there."""
    disks = {kind: directory / f"{kind}.img" for kind in DISKS}
    for kind, path in disks.items():
        path.unlink(missing_ok=True)
        with open(path, "wb") as file:
            file.truncate(DISK_SIZE)
        run(f"mkfs.{kind}", *(["-q", "-F"] if kind == "ext4" else ["-q"]), path)
    return disks


def end_left(directory: Path) -> None:
    """End guests of ``directory`` that outlived whoever booted them; other processes may have their numbers by now."""
    for pid_file in directory.glob("*.pid"):
        with contextlib.suppress(OSError, ValueError):
            pid = int(pid_file.read_text())
            if os.fsencode(pid_file) in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                os.kill(pid, signal.SIGKILL)


class Guest:
    """A guest that is running. ``share`` is the directory it has as :data:`SHARE`; ``console`` gets its console.

    Leaving the ``with`` block ends it, whatever state it is in.
    """

    def __init__(
        self,
        kernel: Kernel,
        share: Path,
        console: Path,
        disks: Mapping[str, Path],
        command: str,
        environment: Mapping[str, str],
        *,
        kvm: bool,
    ) -> None:
        if platform.machine() != "x86_64":
            raise UnsupportedError("guests are x86_64 machines with this machine's files")
        if _ending.is_set():
            raise BusyError("guests are being ended")
        share.mkdir(parents=True, exist_ok=True)
        for name in ("status", "output", "power-cut"):
            (share / name).unlink(missing_ok=True)
        (share / "command").write_text(command + "\n")
        (share / "environment").write_text(
            "".join(f"{name}={shlex.quote(text)}\n" for name, text in environment.items())
        )
        (share / "quick").write_text("".join(f"{path}\n" for path in _read_most()))
        (share / "modules").write_text("".join(f"{name}\n" for name in MODULES))
        shutil.copyfile(Path(__file__).with_name("start.sh"), share / "start.sh")
        self.share, self.console = share, console
        self._pid_file = console.with_suffix(".pid")
        self._pid_file.unlink(missing_ok=True)
        self._started = time.monotonic()
        with open(console, "wb") as log:
            self._process = subprocess.Popen(
                self._command(kernel, disks, kvm),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                start_new_session=True,  # a terminal's interrupt is for us, who end the guest properly
            )
        _running.add(self)

    def __enter__(self) -> Guest:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def wait(self, deadline: float) -> Outcome:
        """Wait for the end, at most ``deadline`` seconds. A file ``power-cut`` in the share kills the guest."""
        end = None
        while self._process.poll() is None:
            if (self.share / "power-cut").exists():
                end = End.CUT
                self.kill()
            elif time.monotonic() - self._started > deadline:
                end = End.DEADLINE
                self.kill()
            else:
                time.sleep(_POLL)
        status = None
        if end is None:
            with contextlib.suppress(FileNotFoundError):
                status = int((self.share / "status").read_text())
            end = End.CRASHED if status is None else End.DONE
        return Outcome(end, status, time.monotonic() - self._started, self.console, self.share / "output")

    def kill(self) -> None:
        """Cut the power: SIGKILL for QEMU. virtme-run, its parent, then ends by itself. No effect on one that ended."""
        if self._process.poll() is None:
            with contextlib.suppress(FileNotFoundError, ValueError, ProcessLookupError):
                os.kill(int(self._pid_file.read_text()), signal.SIGKILL)
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:  # before QEMU was started, or wrote its number
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
        self._pid_file.unlink(missing_ok=True)
        _running.discard(self)

    def _command(self, kernel: Kernel, disks: Mapping[str, Path], kvm: bool) -> list[str]:
        command = [
            str(Path(sys.executable).with_name("virtme-run")),
            f"--kimg={kernel.image}",
            f"--mods={'auto' if kernel.modules else 'none'}",
            "--force-9p",
            f"--cpus={CPUS}",
            f"--memory={MEMORY}",
            f"--rwdir={SHARE}={self.share}",
            "--show-boot-console",
            "--verbose",
            f"--script-sh=bash {SHARE}/start.sh",
        ]
        command += [] if kvm else ["--disable-kvm"]
        command += [f"--blk-disk={kind}={path}" for kind, path in disks.items()]
        qemu = ["-pidfile", str(self._pid_file)]
        qemu += ["-fsdev", "local,id=quick,path=/,security_model=none,readonly=on,multidevs=remap"]
        qemu += ["-device", "virtio-9p-pci,fsdev=quick,mount_tag=quick"]
        return command + [f"--qemu-opt={option}" for option in qemu]


def end_all() -> None:
    """End all guests that run, and let none begin any more."""
    _ending.set()
    for running in list(_running):
        running.kill()


def boot(
    kernel: Kernel,
    directory: Path,
    label: str,
    command: str,
    environment: Mapping[str, str],
    *,
    kvm: bool,
    deadline: float,
) -> Outcome:
    """Boot with the disks in ``directory``, run ``command``, and wait for its end, ``deadline`` seconds at most.

    Leaves ``<label>.console`` and ``<label>.output`` in ``directory``; its ``share`` is the guest's.
    """
    disks = {kind: directory / f"{kind}.img" for kind in DISKS}
    share = directory / "share"
    with Guest(kernel, share, directory / f"{label}.console", disks, command, environment, kvm=kvm) as guest:
        outcome = guest.wait(deadline)
    output = directory / f"{label}.output"
    with contextlib.suppress(FileNotFoundError):
        os.replace(outcome.output, output)
    return dataclasses.replace(outcome, output=output)


def _read_most() -> Iterator[Path]:
    """Directories Python reads from, below this tree and not."""
    yield REPOSITORY
    for name in ("stdlib", "purelib"):
        path = Path(sysconfig.get_path(name))
        if not path.is_relative_to(REPOSITORY):
            yield path
    libraries = Path("/usr/lib", sysconfig.get_config_var("MULTIARCH") or "x86_64-linux-gnu")
    if libraries.is_dir():
        yield libraries
