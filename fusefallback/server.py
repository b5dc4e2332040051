"""The process that servers are forked from: ``python -m fusefallback.server --root=ROOT``.

::

    mount ── version, order, /dev/fuse ──► ROOT/servers.sock ── fork ──► server of the mount
          ◄── {"pid": …} or {"error": …} ──────────────────────────────────┘

A fork takes milliseconds, and most of its memory is its siblings' as well; to start Python with all that is needed here
takes a good part of a second. :mod:`erofsgen.host.mount.fuse` starts this where it is not running; it ends when nothing
was wanted for a while, and servers live on: each until its mount is gone. When one dies before, nobody can take its
place: readers get ENOTCONN, or EIO through EROFS.

``ROOT/lock.servers`` is held by the one that listens.
"""

from __future__ import annotations

import argparse
import fcntl
import gc
import json
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, NoReturn

import msgspec

from erofsgen import __version__
from erofsgen.errors import BusyError, ErofsgenError
from erofsgen.host import logs
from erofsgen.host.daemon.control import listen
from erofsgen.host.mount.fuse import SERVERS
from fusefallback.serving import Order, serve

_logger: Final = logging.getLogger(__name__)

_IDLE: Final = 60.0
"""Seconds without an order after which this ends."""
_PATIENCE: Final = 10.0
"""Seconds that somebody who has connected has for the order."""
_LIMIT: Final = 1 << 16


def _take_order(connection: socket.socket, own: Sequence[int]) -> bool:
    """Read an order and fork a server for it, without the descriptors ``own``. False: it is for another version."""
    connection.settimeout(_PATIENCE)
    data, descriptors, _, _ = socket.recv_fds(connection, _LIMIT, 1)
    if not descriptors:
        return True
    (device,) = descriptors
    try:
        message = json.loads(data)
        if message["version"] != __version__:
            return False
        order = msgspec.convert(message["order"], Order)
        if os.fork() == 0:
            for descriptor in own:  # or nobody could take this process's place while the server lives
                os.close(descriptor)
            _become_server(connection, order, device)
    except (KeyError, TypeError, ValueError, msgspec.ValidationError) as error:
        _logger.error("not an order: %s", error)
    finally:
        os.close(device)
    return True


def _become_server(connection: socket.socket, order: Order, device: int) -> NoReturn:
    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.set_inheritable(device, False)

        def ready() -> None:
            _say(connection, {"pid": os.getpid()})

        serve(order, device, ready)
        code = 0
    except ErofsgenError as error:
        _say(connection, {"error": str(error), "kind": type(error).__name__, "hint": error.hint})
    except BaseException:
        _logger.exception("server %d of %s", os.getpid(), order.mount, extra={"mount": order.mount})
    os._exit(code)


def _say(connection: socket.socket, message: dict[str, Any]) -> None:
    with suppress(OSError):  # whoever wanted it has gone
        connection.send(json.dumps(message).encode())
    connection.close()


def _listen(root: Path) -> tuple[socket.socket, int]:
    """The socket, and the lock's descriptor. Raises BusyError where another listens, StorageError."""
    lock = os.open(root / "lock.servers", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BusyError(f"{root}: servers are started by another process") from None
    return listen(root, SERVERS, socket.SOCK_SEQPACKET), lock


def main() -> None:
    """Listen, in the background once that is ready."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--root", type=Path, required=True)
    options = parser.parse_args()
    logs.set_up()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # two files for every pack
    try:
        listening, lock = _listen(options.root)
    except ErofsgenError as error:
        sys.stderr.write(f"error: {error}\n" + (f"hint: {error.hint}\n" if error.hint else ""))
        sys.exit(error.exit_code)
    if os.fork():
        os._exit(0)
    os.setsid()
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # servers that end leave nothing to wait for
    gc.collect()
    gc.freeze()
    listening.settimeout(_IDLE)
    with suppress(TimeoutError):
        while True:
            connection, _ = listening.accept()
            with connection, suppress(OSError):
                if not _take_order(connection, [listening.fileno(), lock]):
                    break
    # whoever connects from now on is refused, and starts another
    with suppress(OSError):
        (options.root / SERVERS).unlink()


if __name__ == "__main__":
    main()
