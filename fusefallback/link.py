"""A server's side of its connection with the supervisor: asks for what is missing, and waits.

::

    server ── {"do": "hello", "mount": …} ─────────────► supervisor
           ◄── {"deadline": seconds, "read_ahead": …} ──
           ── {"do": "fill", "key": 7, "pack": …, "offset": …, "length": …} ──►
           ◄── {"key": 7, "error": null, or why not} ───
           ── {"do": "ahead", "pack": …, "offset": …, "length": …} ──►
           ── {"do": "touch", "pack": …, "offset": …, "length": …} ──►    what was there, the first time it is read

The supervisor may die and be replaced at any time: the socket that it listens at outlives it. All that waits is told to
the next one. Where there is none, reads of what is missing fail.
"""

from __future__ import annotations

import itertools
import logging
import socket
from pathlib import Path
from typing import Final

import trio

from erofsgen.errors import BusyError, ErofsgenError, RemoteError
from erofsgen.host.daemon.channel import Channel, Message
from erofsgen.host.daemon.control import address_of
from fusefallback.plane import SOCKET

_logger: Final = logging.getLogger(__name__)

_HELLO: Final = 30.0
"""Seconds that a supervisor has to greet in."""
_GRACE: Final = 10.0
"""Seconds beyond the supervisor's deadline after which nothing is expected of it any more."""


class Link:
    """To the supervisor of ``root``, on behalf of the mount ``mount``. :meth:`connect` first; then :meth:`run` runs."""

    def __init__(self, root: Path, mount: str) -> None:
        self._root = root
        self.mount = mount
        self._keys = itertools.count(1)
        self._waiting: dict[int, Asked] = {}
        self._channel: Channel | None = None
        self._needed = trio.Event()
        self._unsent = trio.Event()
        self.deadline = 0.0
        self.read_ahead = 0
        """Bytes that the supervisor wants brought ahead of a sequential reader at most."""

    async def connect(self) -> None:
        """Find the supervisor and greet it. Raises BusyError where none is there."""
        end = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        channel = Channel(end)
        try:
            with address_of(self._root, SOCKET) as address:
                end.connect(address)
            channel.send({"do": "hello", "mount": self.mount})
            with trio.fail_after(_HELLO):
                await trio.lowlevel.wait_readable(end)
            received = channel.receive()
            if received is None:
                raise ConnectionError
            greeting, _ = received
        except (OSError, trio.TooSlowError) as error:
            channel.close()
            raise BusyError(f"{self._root}: no daemon is running", hint="start `erofsgen daemon`") from error
        self.deadline, self.read_ahead = greeting["deadline"], greeting["read_ahead"]
        self._channel = channel

    async def run(self) -> None:
        """Hear answers, and find the next supervisor when this one is gone, for as long as the process lives."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._flush)
            while True:
                if self._channel is None:
                    await self._needed.wait()
                    await self._greet_the_next()
                else:
                    await self._hear(self._channel)

    def ask(self, pack: str, offset: int, length: int) -> Asked:
        """Have a range of a pack brought; :meth:`answer` waits until it is there."""
        key = next(self._keys)
        asked = Asked({"do": "fill", "key": key, "pack": pack, "offset": offset, "length": length})
        self._waiting[key] = asked
        if self._channel is None:
            self._needed.set()
        else:
            self._send(asked.message)
        return asked

    async def answer(self, asked: Asked) -> None:
        """Return when the range is there. Raises RemoteError when it cannot be brought, or not in time."""
        with trio.move_on_after(self.deadline + _GRACE):
            await asked.answered.wait()
        self._waiting.pop(asked.message["key"], None)
        if asked.error is not None:
            raise RemoteError(asked.error)

    def ahead(self, pack: str, offset: int, length: int) -> None:
        """Have a range brought that nobody waits for yet."""
        self._send({"do": "ahead", "pack": pack, "offset": offset, "length": length})

    def touched(self, pack: str, offset: int, length: int) -> None:
        """Tell of a read of what is there."""
        self._send({"do": "touch", "pack": pack, "offset": offset, "length": length})

    def _send(self, message: Message) -> None:
        if self._channel is not None:
            try:
                self._channel.send(message)
                if not self._channel.flush():
                    self._unsent.set()
            except OSError:
                pass  # it is gone: the next is told what waits

    async def _flush(self) -> None:
        """Send what the supervisor could not take at once."""
        while True:
            await self._unsent.wait()
            self._unsent = trio.Event()
            channel = self._channel
            try:
                while channel is not None and not channel.flush():
                    await trio.lowlevel.wait_writable(channel.fileno())
            except OSError:
                pass  # as above

    async def _hear(self, channel: Channel) -> None:
        await trio.lowlevel.wait_readable(channel.fileno())
        try:
            received = channel.receive()
        except BlockingIOError:
            return
        if received is not None:
            answer, _ = received
            waiting = self._waiting.pop(answer["key"], None)
            if waiting is not None:
                waiting.error = answer["error"]
                waiting.answered.set()
            return
        trio.lowlevel.notify_closing(channel.fileno())
        channel.close()
        self._channel = None
        if self._waiting:
            self._needed.set()

    async def _greet_the_next(self) -> None:
        self._needed = trio.Event()
        try:
            await self.connect()
        except ErofsgenError as error:
            _logger.error("%s", error, extra={"mount": self.mount})
            for waiting in self._waiting.values():
                waiting.error = str(error)
                waiting.answered.set()
            return
        for waiting in list(self._waiting.values()):
            self._send(waiting.message)


class Asked:
    """A request: what was asked, and, once ``answered``, what went wrong."""

    def __init__(self, message: Message) -> None:
        self.message = message
        self.answered = trio.Event()
        self.error: str | None = f"pack {message['pack']}: the daemon does not answer"
