"""HTTP/1.1 as bytes on a socket: heads, and bodies that are passed on as they arrive."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass

import httpx

_BUFFER = 1 << 18
_HEAD_LIMIT = 1 << 17


@dataclass
class Head:
    """A request or a response without its body; ``headers`` keep their order and spelling."""

    first: str
    """The request or status line."""
    headers: httpx.Headers

    def encode(self) -> bytes:
        lines = [self.first.encode("latin-1"), *(b"%s: %s" % pair for pair in self.headers.raw)]
        return b"\r\n".join([*lines, b"", b""])

    @property
    def status(self) -> int:
        return int(self.first.split(" ")[1])

    @property
    def method(self) -> str:
        return self.first.split(" ")[0]

    @property
    def target(self) -> str:
        """The path with its query."""
        return self.first.split(" ")[1]

    @property
    def chunked(self) -> bool:
        return self.headers.get("Transfer-Encoding", "").lower() == "chunked"

    @property
    def length(self) -> int | None:
        """The announced length of the body."""
        return int(self.headers["Content-Length"]) if "Content-Length" in self.headers else None

    @property
    def closes(self) -> bool:
        """Whether the sender will not use the connection again."""
        return self.headers.get("Connection", "").lower() == "close" or "HTTP/1.0" in self.first


class Wire:
    """One end of a connection. What it is sent too early waits in a buffer.

    Raises ConnectionError where the other side closes in the middle of something.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = connection
        self._early = b""
        self._buffer = memoryview(bytearray(_BUFFER))

    def send(self, data: bytes | memoryview) -> None:
        self.socket.sendall(data)

    def read_head(self) -> Head | None:
        """The next head; None where the other side closes before it begins."""
        while (end := self._early.find(b"\r\n\r\n")) < 0:
            if not self._more():
                if self._early:
                    raise ConnectionError("closed within a head")
                return None
        data, self._early = self._early[:end], self._early[end + 4 :]
        first, *lines = data.split(b"\r\n")
        pairs = (line.partition(b":") for line in lines)
        return Head(first.decode("latin-1"), httpx.Headers([(name, value.strip()) for name, _, value in pairs]))

    def body(self, head: Head, *, at_once: int = _BUFFER, framed: bool = True) -> Iterator[memoryview | bytes]:
        """The body behind ``head`` in pieces of at most ``at_once`` bytes, each good until the next is asked for.

        A chunked body comes with its framing, or without. One that ends with the connection is read to that end.
        """
        if head.chunked:
            return self._chunks(at_once, framed)
        if head.length is None:
            return self._rest(at_once)
        return self._pieces(head.length, at_once)

    def pass_on(self, count: int, to: Wire) -> None:
        """Send ``to`` the next ``count`` bytes without copying them to here and back."""
        early, self._early = self._early[:count], self._early[count:]
        if early:
            to.send(early)
            count -= len(early)
        if not count:
            return
        end, begin = os.pipe()
        try:
            fcntl.fcntl(begin, fcntl.F_SETPIPE_SZ, 1 << 20)
            while count:
                if not (held := os.splice(self.socket.fileno(), begin, min(count, 1 << 20))):
                    raise ConnectionError("closed within a body")
                count -= held
                while held:
                    held -= os.splice(end, to.socket.fileno(), held)
        finally:
            os.close(end)
            os.close(begin)

    def _pieces(self, count: int, at_once: int) -> Iterator[memoryview]:
        while count:
            if not (piece := self._receive(min(count, at_once))):
                raise ConnectionError("closed within a body")
            count -= len(piece)
            yield piece

    def _rest(self, at_once: int) -> Iterator[memoryview]:
        while piece := self._receive(at_once):
            yield piece

    def _chunks(self, at_once: int, framed: bool) -> Iterator[memoryview | bytes]:
        size = None
        while size != 0:
            line = self._line()
            size = int(line.split(b";")[0], 16)
            if framed:
                yield line
            if size:
                yield from self._pieces(size, at_once)
                end = self._line()
                if framed:
                    yield end
        while line != b"\r\n":  # trailers
            line = self._line()
            if framed:
                yield line

    def _line(self) -> bytes:
        while (end := self._early.find(b"\n")) < 0:
            if not self._more():
                raise ConnectionError("closed within a line")
        line, self._early = self._early[: end + 1], self._early[end + 1 :]
        return line

    def _more(self) -> bool:
        if len(self._early) > _HEAD_LIMIT:
            raise ConnectionError("a head or line is too long")
        count = self.socket.recv_into(self._buffer[: 1 << 16])
        self._early += self._buffer[:count]
        return bool(count)

    def _receive(self, at_most: int) -> memoryview:
        at_most = min(at_most, _BUFFER)
        if self._early:
            piece, self._early = self._early[:at_most], self._early[at_most:]
            return memoryview(piece)
        return self._buffer[: self.socket.recv_into(self._buffer[:at_most])]
