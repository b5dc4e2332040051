"""The supervisor's side of FUSE servers: passes on what they are missing, and what became of it.

A mount has a server process of its own (:mod:`fusefallback.server`), which answers the kernel and reads the host cache
by itself. What is not there it asks for here, see :mod:`fusefallback.link`.

What dies, and what is left:

- a server: its mount, whose readers get ENOTCONN, or EIO through EROFS, until it is repaired.
- the worker: its requests are told to the next one.
- this process: servers find the next supervisor at the same socket, which the standby holds, and tell what waits.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
import select
import socket
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from erofsgen.errors import StorageError
from erofsgen.host.cache.files import Layout
from erofsgen.host.daemon.channel import Channel, Message
from erofsgen.host.daemon.control import listen
from erofsgen.host.daemon.journal import Entry
from erofsgen.host.daemon.planes import Done, Introduction, Supervisor
from erofsgen.host.daemon.writers import Writers

_logger: Final = logging.getLogger(__name__)

SOCKET: Final = "fuse.sock"
_PACK: Final = re.compile("[0-9a-f]{64}")
_FAR: Final = 1 << 63
"""Bytes; no device is as large."""
_AGAIN: Final = 0.005
"""Seconds until a server that is behind is told again."""
_DEAF: Final = 10_000
"""Answers that may wait for a server; the kernel lets fewer requests wait."""


class _Server:
    """A server process: its connection, its requests by their key there, and the packs it has asked for."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.mount = ""
        self.waiting: dict[int, int] = {}
        self.packs: set[str] = set()
        self.is_behind = False  # it is told again before long


class Plane:
    """Serves servers that connect to ``listening``; None: to a new socket below ``root``.

    ``read_ahead``: bytes that servers bring ahead of a sequential reader at most. Raises StorageError.
    """

    name = "fuse"
    journalled = False
    serves = True
    survives = True

    def __init__(self, listening: int | None = None, *, root: Path, read_ahead: int = 32 << 20) -> None:
        self._supervisor: Supervisor
        self._layout = Layout(root)
        self._read_ahead = read_ahead
        if listening is None:
            self._listening = listen(root, SOCKET, socket.SOCK_SEQPACKET)
        else:
            self._listening = socket.socket(fileno=listening)
        self._listening.setblocking(False)
        self._servers: set[_Server] = set()
        self._keys = itertools.count(1)
        self._asked: dict[int, tuple[_Server, int]] = {}  # by our key: who, and its own key
        self._writers = Writers()

    def attach(self, supervisor: Supervisor) -> None:
        """Must come before anything else."""
        self._supervisor = supervisor

    def moved(self) -> None:
        pass

    def fileno(self) -> int:
        """The listening socket: readable when a server connects, and all there is to hand on."""
        return self._listening.fileno()

    def in_use(self) -> bool:
        """Whether a mount's server is connected."""
        return bool(self._servers)

    def facts(self) -> dict[str, Any]:
        """For ``status``."""
        return {"servers": len(self._servers)}

    # --- servers -----------------------------------------------------------------------------------------------------

    def serve(self) -> None:
        """Accept a server."""
        try:
            end, _ = self._listening.accept()
        except (BlockingIOError, ConnectionError):
            return
        end.setblocking(False)
        server = _Server(Channel(end))
        self._servers.add(server)
        self._supervisor.watch(end.fileno(), lambda: self._readable(server), select.EPOLLIN)

    def _readable(self, server: _Server) -> None:
        try:
            while server in self._servers:
                received = server.channel.receive()
                if received is None:
                    self._gone(server)
                    return
                message, descriptors = received
                for descriptor in descriptors:  # nobody has any to give
                    os.close(descriptor)
                self._heard(server, message)
        except BlockingIOError:
            pass
        except (KeyError, RecursionError, TypeError, ValueError) as error:
            _logger.error("not a message of a server: %s: %s", type(error).__name__, error)
            self._gone(server)

    def _heard(self, server: _Server, message: Message) -> None:
        match message["do"]:
            case "hello":
                server.mount = str(message["mount"])
                self._say(server, {"deadline": self._supervisor.deadline, "read_ahead": self._read_ahead})
            case "touch":
                self._supervisor.touched(*_range(message), 0, None, server.mount)
            case "fill":
                self._fill(server, int(message["key"]), *_range(message))
            case "ahead":
                pack, offset, length = _range(message)
                if self._use(server, pack) is None:
                    self._supervisor.ahead(pack, offset, length)
            case unknown:
                raise ValueError(unknown)

    def _fill(self, server: _Server, theirs: int, pack: str, offset: int, length: int) -> None:
        error = self._use(server, pack)
        if error is not None:
            self._supervisor.failed(error, pack)
            self._say(server, {"key": theirs, "error": error})
            return
        key = next(self._keys)
        self._asked[key] = server, theirs
        server.waiting[theirs] = key
        self._supervisor.touched(pack, offset, length, 0, key, server.mount)
        self._supervisor.missing(key, pack, offset, length)

    def answer(self, key: int, *, failed: bool) -> None:
        """End a request that was handed on."""
        server, theirs = self._asked.pop(key)
        if server.waiting.pop(theirs, None) is not None:
            self._say(server, {"key": theirs, "error": "it could not be brought" if failed else None})

    def _say(self, server: _Server, message: Message) -> None:
        with suppress(OSError):  # it has gone, which the loop is about to tell
            server.channel.send(message)
        if not server.is_behind:
            self._flush(server)

    def _flush(self, server: _Server) -> None:
        server.is_behind = False
        with suppress(OSError):
            if server in self._servers and not server.channel.flush():
                if len(server.channel) > _DEAF:
                    _logger.error("the server of %s does not listen", server.mount, extra={"mount": server.mount})
                    self._gone(server)
                    return
                server.is_behind = True
                self._supervisor.after(_AGAIN, lambda: self._flush(server))

    def _gone(self, server: _Server) -> None:
        self._servers.discard(server)
        self._supervisor.unwatch(server.channel.fileno())
        server.channel.close()
        server.waiting.clear()
        self._leave(server)

    # --- packs -------------------------------------------------------------------------------------------------------

    def _use(self, server: _Server, pack: str) -> str | None:
        """A server has bytes of a pack brought. Returns why that cannot be."""
        if pack not in server.packs:
            files = self._layout.find(pack)
            if files is None:
                return f"pack {pack}: not in the cache"
            try:
                self._writers.use(server, files.data)
            except StorageError as error:
                return str(error)
            server.packs.add(pack)
        return None

    def _leave(self, user: Hashable) -> None:
        for pack in self._writers.leave(user):
            self._supervisor.forget(pack)

    def through(self, packs: Sequence[str]) -> None:  # noqa: ARG002
        return None

    def introduce(self, pack: str) -> Introduction | None:
        """The data file, open for writing."""
        descriptor = self._writers.get(pack)
        return None if descriptor is None else Introduction(descriptor, {})

    def arm(self, mount: str, paths: Iterable[Path], done: Done) -> None:
        """Let the worker write to packs, whether a server asks for them or not."""
        self._writers.arm(mount, paths, done)

    def made(self, mount: str) -> None:
        """The mount was made, or the worker has written what it wanted."""
        self._leave(mount)

    def completed(self, name: str) -> None:
        pass  # servers see for themselves

    def sweep(self) -> None:
        pass  # servers say when they go

    def cull(self, wanted: int | None, keep: Collection[str] | None) -> int:  # noqa: ARG002  (the kernel keeps nothing)
        return 0

    def prove(self, paths: Iterable[Path], done: Done) -> None:  # noqa: ARG002
        done(None)

    # --- changes of supervisor ---------------------------------------------------------------------------------------

    def inherit(self, entries: Sequence[Entry], highest: int) -> list[Entry]:  # noqa: ARG002
        """Nothing: servers tell all of it again."""
        return []

    def close_for_good(self, paths: Iterable[Path], done: Callable[[list[Path]], None]) -> None:  # noqa: ARG002
        """Nothing to cut off: a server gives no byte that its map does not vouch for."""
        with suppress(OSError):
            (self._layout.root / SOCKET).unlink()
        done([])


def _range(message: Message) -> tuple[str, int, int]:
    """The pack, offset and length of a message. Raises KeyError, TypeError, ValueError."""
    pack, offset, length = message["pack"], message["offset"], message["length"]
    if not isinstance(pack, str) or type(offset) is not int or type(length) is not int:
        raise TypeError(message)
    if not _PACK.fullmatch(pack) or offset < 0 or length < 0 or offset + length > _FAR:
        raise ValueError(message)
    return pack, offset, length


class BlockPlane(Plane):
    """The same, for servers of packs below the kernel's EROFS."""

    name = "blockfuse"
