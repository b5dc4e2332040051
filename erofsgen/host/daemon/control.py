"""The control socket ``ROOT/control.sock``: commands of root, one JSON object a line each way.

::

    → {"do": "arm", "mount": "…", "packs": ["…/<sha256>.data", …]}
    ← {"progress": {…}} …                  any number of them
    ← {"ok": {…}}   or   {"error": "…", "kind": "StorageError", "hint": "…"}

What the supervisor does not know itself goes to the worker, with the connection; a connection is for one command then.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from erofsgen import errors
from erofsgen.errors import BusyError, ErofsgenError, StorageError, UsageError
from erofsgen.host.daemon.loop import Loop

_logger: Final = logging.getLogger(__name__)

SOCKET: Final = "control.sock"
_LINE_LIMIT: Final = 16 << 20
"""Bytes of a command: 65,535 paths."""
_BACKLOG: Final = 64
_UCRED: Final = struct.Struct("=iII")  # struct ucred: pid, uid, gid


class Connection:
    """A client. :meth:`reply` and :meth:`fail` end the command; ``closed`` is called when the client goes."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self.closed: Callable[[], None] = lambda: None
        self.buffer = b""

    def fileno(self) -> int:
        """To wait on, or to hand on."""
        return self._socket.fileno()

    def reply(self, facts: dict[str, Any]) -> None:
        """The command succeeded."""
        self._send({"ok": facts})

    def fail(self, error: ErofsgenError) -> None:
        """The command failed."""
        self._send({"error": str(error), "kind": type(error).__name__, "hint": error.hint})

    def receive(self) -> bytes:
        """What has come; nothing at the end."""
        with suppress(ConnectionError):
            return self._socket.recv(1 << 16)
        return b""

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    def _send(self, message: dict[str, Any]) -> None:
        with suppress(OSError):  # the client has gone
            self._socket.sendall(json.dumps(message).encode() + b"\n")


Command = Callable[[Connection, dict[str, Any]], None]


class ControlServer:
    """Accepts clients of this user on ``listening`` and calls ``command(connection, command)`` for each line."""

    def __init__(self, loop: Loop, listening: socket.socket, command: Command) -> None:
        self._loop = loop
        self._listening = listening
        self._command = command
        self._connections: dict[int, Connection] = {}
        listening.setblocking(False)
        loop.watch(listening.fileno(), self._accept)

    def fileno(self) -> int:
        """The listening socket, to be handed on."""
        return self._listening.fileno()

    def take(self, connection: Connection) -> int:
        """A duplicate of the connection's descriptor, for the worker; here the connection ends."""
        descriptor = os.dup(connection.fileno())
        self._drop(connection)
        return descriptor

    def close(self) -> None:
        """Hang up on everybody."""
        for connection in list(self._connections.values()):
            self._drop(connection)
        self._loop.unwatch(self._listening.fileno())
        self._listening.close()

    def _accept(self) -> None:
        try:
            end, _ = self._listening.accept()
        except (BlockingIOError, ConnectionError):
            return
        _, uid, _ = _UCRED.unpack(end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        if uid not in (0, os.geteuid()):
            end.close()
            return
        connection = Connection(end)
        self._connections[end.fileno()] = connection
        self._loop.watch(end.fileno(), lambda: self._readable(connection))

    def _readable(self, connection: Connection) -> None:
        data = connection.receive()
        connection.buffer += data
        if not data or len(connection.buffer) > _LINE_LIMIT:
            self._drop(connection)
            connection.closed()
            return
        while b"\n" in connection.buffer and connection.fileno() in self._connections:
            line, _, connection.buffer = connection.buffer.partition(b"\n")
            try:
                command = json.loads(line)
                if not isinstance(command, dict):
                    raise UsageError("a command is a JSON object")
                self._command(connection, command)
            except ErofsgenError as error:
                connection.fail(error)
            except (KeyError, RecursionError, TypeError, ValueError) as error:
                connection.fail(UsageError(f"not a command: {type(error).__name__}: {error}"))

    def _drop(self, connection: Connection) -> None:
        self._connections.pop(connection.fileno(), None)
        self._loop.unwatch(connection.fileno())
        connection.close()


def listen(root: Path, name: str = SOCKET, kind: int = socket.SOCK_STREAM) -> socket.socket:
    """A socket below ``root``, made anew: the caller holds the daemon's lock. Raises StorageError."""
    path = root / name
    listening = socket.socket(socket.AF_UNIX, kind | socket.SOCK_CLOEXEC)
    before = os.umask(0o177)
    try:
        path.unlink(missing_ok=True)
        with address_of(root, name) as address:
            listening.bind(address)
        listening.listen(_BACKLOG)
    except OSError as error:
        listening.close()
        raise StorageError(f"{path}: {error.strerror}") from error
    finally:
        os.umask(before)
    return listening


@contextmanager
def address_of(root: Path, name: str) -> Iterator[str]:
    """A socket's address where its path may be of any length: sun_path has 108 bytes. Raises OSError."""
    directory = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{name}"
    finally:
        os.close(directory)


def connect(root: Path) -> socket.socket | None:
    """A connection to the daemon of ``root``; None where there is none. Raises StorageError."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        with address_of(root, SOCKET) as address:
            connection.connect(address)
    except (FileNotFoundError, ConnectionRefusedError):
        connection.close()
        return None
    except OSError as error:
        connection.close()
        raise StorageError(f"{root / SOCKET}: {error.strerror}", hint="only root may talk to the daemon") from error
    return connection


def error_of(message: dict[str, Any]) -> ErofsgenError:
    """The error that a reply names."""
    kind = getattr(errors, str(message.get("kind")), ErofsgenError)
    if not (isinstance(kind, type) and issubclass(kind, ErofsgenError)):
        kind = ErofsgenError
    return kind(str(message["error"]), hint=message.get("hint"))


def no_answer() -> BusyError:
    """For a command whose connection broke."""
    return BusyError("the daemon hung up", hint="try again; see `erofsgen status`")
