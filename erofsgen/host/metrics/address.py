"""Where metrics are served: a Unix socket, or a port."""

from __future__ import annotations

import errno
import os
import re
import socket
import stat
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

from erofsgen.errors import BusyError, StorageError, UsageError
from erofsgen.host.daemon.control import address_of

VARIABLE: Final = "EROFSGEN_METRICS"
"""Names the address to the daemons that a command starts."""

_UNIX: Final = "unix:"
_LOOPBACK: Final = "127.0.0.1"
_BACKLOG: Final = 16
_MODE: Final = 0o660
_PLACE: Final = re.compile(r"(?:(?P<v6>\[[^]]+\])|(?P<host>[^:\[\]]+)):(?P<port>\d{1,5})", re.ASCII)


class Address(NamedTuple):
    """``unix:PATH``, ``HOST:PORT``, or ``PORT`` of the loopback. ``path`` is empty for the latter two."""

    path: str
    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Address:
        """What the user's word means; a relative path is one of the working directory. Raises UsageError."""
        if text.startswith(_UNIX):
            path = text.removeprefix(_UNIX)
            if not path or path.endswith("/"):
                raise UsageError(f"{text!r} names no socket", hint="write unix:/run/erofsgen/metrics.sock")
            return cls(os.path.abspath(path), "", 0)
        found = _PLACE.fullmatch(text if ":" in text else f"{_LOOPBACK}:{text}")
        port = int(found["port"]) if found else 0
        if found is None or not 0 < port < 1 << 16:
            raise UsageError(
                f"{text!r} is no address for metrics", hint="write unix:PATH, HOST:PORT, or PORT for the loopback"
            )
        return cls("", found["host"] or found["v6"][1:-1], port)

    def __str__(self) -> str:
        if self.path:
            return f"{_UNIX}{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def listen(self) -> socket.socket:
        """A socket that listens there. Raises BusyError (somebody does already), StorageError, UsageError (no host)."""
        try:
            return _listen_at(Path(self.path)) if self.path else self._listen_at_port()
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise BusyError(f"{self}: in use", hint="choose another address with --metrics") from error
            raise StorageError(f"{self}: {error.strerror or error}") from error

    def _listen_at_port(self) -> socket.socket:
        try:
            family, *_, place = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)[0]
        except socket.gaierror as error:
            raise UsageError(f"{self}: no such host: {error.strerror}") from error
        return socket.create_server(place[:2], family=family, backlog=_BACKLOG)


def _listen_at(path: Path) -> socket.socket:
    """A Unix socket for this user and, as the group of a set-group-ID directory, for those who scrape.

    It gets its name when it listens, in place of what a dead process has left there. Raises OSError, StorageError.
    """
    with suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise StorageError(f"{path}: there is something else than a socket")
        if _answers(path):
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
    part = path.with_name(f".{path.name}.{os.urandom(4).hex()}")
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        with address_of(path.parent, part.name) as address:
            listening.bind(address)
        part.chmod(_MODE)
        listening.listen(_BACKLOG)
        part.rename(path)
    except BaseException:
        listening.close()
        part.unlink(missing_ok=True)
        raise
    return listening


def _answers(path: Path) -> bool:
    """Whether somebody listens at a socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
        probe.setblocking(False)  # a full backlog is an answer, too
        try:
            with address_of(path.parent, path.name) as address:
                probe.connect(address)
        except ConnectionRefusedError:
            return False
        except BlockingIOError:
            return True
    return True
