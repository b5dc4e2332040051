"""Mounts that a FUSE server of ours answers for: ``/dev/fuse``, the server's start, and mounting as a plain user."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

from erofsgen.errors import StorageError, UnsupportedError
from erofsgen.host import linux
from erofsgen.host.daemon.background import in_background
from erofsgen.host.daemon.mounted import take_away
from erofsgen.host.mount import superblock

_DEVICE: Final = "/dev/fuse"
FLAT: Final = "flat"
"""The file of an image in one piece, see :mod:`fusefallback.flatpacks`."""
_HELPER: Final = "fusermount3"
INSTALL: Final = "apt-get install fuse3 libfuse3-dev pkg-config gcc python3-dev; pip install 'erofsgen[fuse]'"


class Server(NamedTuple):
    """A server process: its number, and when it started, in clock ticks since the boot."""

    pid: int
    started: int

    @property
    def lives(self) -> bool:
        """Whether it is there, and not another process of the same number."""
        return linux.process_start(self.pid) == self.started


class Served:
    """A FUSE mount of the image ``name``, answered by the server that ``serve`` starts for a descriptor.

    ``options``: further flags of the mount.
    ``top`` is the mount: detached, or, for a plain user, on ``at``. It is closed at the end of the with block; a mount
    that is attached nowhere then goes, and the server with it. Raises what :func:`start_server` does.
    """

    def __init__(self, name: str, serve: Callable[[int], Server], options: Sequence[str], *, at: Path | None) -> None:
        require()
        device = open_device() if at is None else attach_as_user(at, name, options)
        try:
            if at is None:
                self.top = superblock.mount_fuse(device, name, options)
            try:
                self.server = serve(device)
                if at is not None:
                    self.top = os.open(at, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            except BaseException:
                if at is None:
                    os.close(self.top)
                else:
                    with suppress(OSError):
                        take_away(os.fspath(at), lazy=True)
                raise
        finally:
            os.close(device)

    def path(self, name: str) -> Path:
        """A file in the top directory, wherever that is."""
        return Path(f"/proc/self/fd/{self.top}/{name}")

    def read_ahead(self, kib: int) -> None:
        """What the kernel is to read ahead in it; only root can say so."""
        superblock.read_ahead_of(os.fstat(self.top).st_dev, kib)

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self.top)


def require() -> None:
    """Raises UnsupportedError where pyfuse3 is not installed."""
    if importlib.util.find_spec("pyfuse3") is None:
        raise UnsupportedError("pyfuse3 is not installed", hint=INSTALL)


def open_device() -> int:
    """``/dev/fuse``, for one mount. Raises UnsupportedError."""
    try:
        return os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise UnsupportedError(f"{_DEVICE}: {error.strerror}", hint="modprobe fuse") from error


def start_server(root: Path, plane: str, mount: str, digest: str, device: int, *, flat: bool = False) -> Server:
    """A server for the mount that uses ``device``, whose id is ``mount``; it answers when this returns.

    Raises what kept it from starting.
    """
    arguments = [f"--root={root}", f"--plane={plane}", f"--mount={mount}", f"--image={digest}"]
    arguments += [*(["--flat"] if flat else []), str(device)]
    pid = int(in_background(root, "fusefallback.server", *arguments, pass_fds=[device]))
    return Server(pid, linux.process_start(pid) or 0)


def attach_as_user(target: Path, name: str, more: Sequence[str]) -> int:
    """Mount on ``target`` with fusermount3, which is set-user-ID root. Returns the ``/dev/fuse`` that the mount uses.

    ``name``: of the image, for mount tables. ``more``: options. Raises UnsupportedError (no fusermount3), StorageError
    (it refuses).
    """
    options = ["ro", "nosuid", "nodev", "default_permissions", "subtype=erofsgen", f"fsname={_plain(name)}", *more]
    ours, theirs = socket.socketpair()
    with ours, theirs:
        _helper(["-o", ",".join(options), "--", os.fspath(target)], theirs.fileno())
        theirs.close()
        _, descriptors, _, _ = socket.recv_fds(ours, 1, 1)
    if not descriptors:
        raise StorageError(f"{target}: {_HELPER} gave no descriptor")
    return descriptors[0]


def _helper(arguments: Sequence[str], channel: int) -> None:
    environment = {**os.environ, "LC_ALL": "C", "_FUSE_COMMFD": str(channel)}
    try:
        ended = subprocess.run(
            [_HELPER, *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            pass_fds=[channel],
            check=False,
        )
    except FileNotFoundError:
        raise UnsupportedError(f"no {_HELPER}", hint="apt-get install fuse3, or run as root") from None
    if ended.returncode:
        said = ended.stderr.strip().removeprefix(f"{_HELPER}: ").splitlines()
        what = said[0] if said else f"{_HELPER} ended with {ended.returncode}"
        hint = "see user_allow_other in /etc/fuse.conf" if "allow_other" in what else None
        raise StorageError(what, hint=hint)


def _plain(name: str) -> str:
    """A name that can stand among mount options."""
    return name.replace("\\", "\\\\").replace(",", "\\,")
