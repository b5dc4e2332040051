"""Mounts that a FUSE server of ours answers for: ``/dev/fuse``, the server's start, and mounting as a plain user."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

from erofsgen import __version__
from erofsgen.errors import BusyError, StorageError, UnsupportedError
from erofsgen.host import linux
from erofsgen.host.daemon.background import LOG, in_background
from erofsgen.host.daemon.control import address_of, error_of
from erofsgen.host.daemon.mounted import take_away
from erofsgen.host.mount import superblock

_DEVICE: Final = "/dev/fuse"
FLAT: Final = "flat"
"""The file of an image in one piece, see :mod:`fusefallback.flatpacks`."""
SERVERS: Final = "servers.sock"
"""Where :mod:`fusefallback.server` takes orders, below the root."""
VARIABLE: Final = "EROFSGEN_FUSE"
"""Settings of servers, see :mod:`fusefallback.tuning`."""
_ATTEMPTS: Final = 3
_START: Final = 60.0
"""Seconds that a server has to start in."""
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
    tuning = os.environ.get(VARIABLE, "")
    order = {"root": str(root), "plane": plane, "mount": mount, "image": digest, "flat": flat, "tuning": tuning}
    data = json.dumps({"version": __version__, "order": order}).encode()
    for _ in range(_ATTEMPTS):
        with _connect(root) as connection:
            reply = b""
            try:
                socket.send_fds(connection, [data], [device])
                reply = connection.recv(1 << 16)
            except ConnectionError:
                pass
            except TimeoutError:
                break
        if reply:
            answer = json.loads(reply)
            if "pid" not in answer:
                raise error_of(answer)
            return Server(answer["pid"], linux.process_start(answer["pid"]) or 0)
        # it was about to end, is of another version, or its server died: another one
    raise StorageError("the FUSE server does not start", hint=f"see {root / LOG}")


def _connect(root: Path) -> socket.socket:
    """A connection to what starts servers, which is started itself where it is not there."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    connection.settimeout(_START)
    for _ in range(_ATTEMPTS):
        with suppress(FileNotFoundError, ConnectionRefusedError), address_of(root, SERVERS) as address:
            connection.connect(address)
            return connection
        with suppress(BusyError):  # another command has started it in the same moment
            in_background(root, "fusefallback.server", f"--root={root}")
    connection.close()
    raise StorageError("the FUSE server does not start", hint=f"see {root / LOG}")


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
