"""One request through the fault-injecting proxy, and the two connections it uses."""

from __future__ import annotations

import contextlib
import http
import select
import socket
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import httpx

from servers.wire import Head, Wire

if TYPE_CHECKING:
    from servers.faultproxy import FaultProxy


@dataclass
class Pace:
    """Spreads bytes over time, for everyone who shares it."""

    free_at: float = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def delay(self, count: int, rate: float) -> float:
        """The seconds to wait after ``count`` more bytes to keep within ``rate`` bytes a second."""
        with self.lock:
            now = time.monotonic()
            self.free_at = max(self.free_at, now) + count / rate
            return self.free_at - now


@dataclass
class Request:
    """What a client asked and was told."""

    method: str
    path: str
    """With the query."""
    headers: httpx.Headers
    time: float
    """When its head had arrived, in seconds of the monotonic clock."""
    status: int | None = None
    """None while, and where, no answer was begun."""


class Link:
    """A client's connection, and the one to the upstream that its requests are sent through."""

    def __init__(self, proxy: FaultProxy, connection: socket.socket) -> None:
        self.proxy = proxy
        self.client = Wire(connection)
        self.pace = Pace()
        self.thread = threading.Thread(target=self._serve)
        self._upstream: Wire | None = None

    def upstream(self) -> Wire:
        """A connection that the upstream has not closed."""
        if self._upstream and select.select([self._upstream.socket], [], [], 0)[0]:
            self._upstream.socket.close()
            self._upstream = None
        if not self._upstream:
            self._upstream = Wire(socket.create_connection(self.proxy.upstream))
            if self.proxy.closing.is_set():  # stop() may have come too early to see it
                raise ConnectionError("the proxy stops")
        return self._upstream

    def stop(self) -> None:
        """Wake the thread, whatever it waits for."""
        for wire in filter(None, (self.client, self._upstream)):
            with contextlib.suppress(OSError):
                wire.socket.shutdown(socket.SHUT_RDWR)

    def _serve(self) -> None:
        try:
            # Either side may hang up at any time: that is passed on by hanging up on the other.
            with contextlib.suppress(OSError):
                while head := self.client.read_head():
                    request = Request(head.method, head.target, head.headers, time.monotonic())
                    exchange = Exchange(self, head, request)
                    action = self.proxy.arrived(request)
                    self.proxy.closing.wait(self.proxy.latency)
                    action(exchange)
                    if not exchange.keep:
                        break
                    exchange.drain()
        finally:
            self.client.socket.close()
            if self._upstream:
                self._upstream.socket.close()
            self.proxy.gone(self)


class Exchange:
    """A request and the means to answer it. Whoever leaves an answer or its body unread clears ``keep``."""

    def __init__(self, link: Link, head: Head, request: Request) -> None:
        self.proxy = link.proxy
        self.client = link.client
        self.head = head
        self.keep = not head.closes
        """Whether both connections can be used for another request."""
        self._link = link
        self._request = request
        self._upstream: Wire
        self._unread = head.chunked or bool(head.length)

    def relay(self) -> None:
        """Pass the request on, and the upstream's answer back, as they are."""
        response = self.forward()
        self.begin(response)
        limited = self.proxy.rate or self.proxy.total_rate
        if response.length and not response.chunked and not limited and self._has_body(response):
            self._upstream.pass_on(response.length, self.client)
        else:
            self.send(self._body(response, framed=True))

    def forward(self, headers: httpx.Headers | None = None) -> Head:
        """Send the request with its body upstream, with other ``headers`` where given: the answer's head."""
        upstream = self._upstream = self._link.upstream()
        upstream.send(Head(self.head.first, headers or self.head.headers).encode())
        if self._unread and "Expect" not in self.head.headers:
            self._send_request_body(upstream)
        while (response := upstream.read_head()) and response.status < 200:
            self.client.send(response.encode())
            if self._unread:
                self._send_request_body(upstream)
        if not response:
            raise ConnectionError("the upstream closed the connection")
        # A client that was told the outcome first may still send its body, or not.
        self.keep = self.keep and not response.closes and not self._unread
        return response

    def read(self, response: Head) -> bytes:
        """The whole body behind ``response``."""
        return b"".join(map(bytes, self._body(response, framed=False)))

    def begin(self, response: Head) -> None:
        self._request.status = response.status
        self.client.send(response.encode())

    def send(self, pieces: Iterable[memoryview | bytes]) -> None:
        """Send the client the pieces of a body, no faster than the proxy's rates allow."""
        self._pour(pieces, self.client)

    def reply(self, response: Head, body: bytes, *, announced: int | None = None) -> None:
        """Send the client ``response`` with another ``body``, ``announced`` with another length where given."""
        if self.head.method != "HEAD":
            response.headers.pop("Transfer-Encoding", None)
            response.headers["Content-Length"] = str(len(body) if announced is None else announced)
        self.begin(response)
        step = self._step()
        self.send(body[start : start + step] for start in range(0, len(body), step))

    def answer(self, code: int, body: bytes, headers: Mapping[str, str]) -> None:
        """Answer without the upstream. A HEAD request gets the headers only."""
        self.drain()
        head = Head(f"HTTP/1.1 {code} {http.HTTPStatus(code).phrase}", httpx.Headers(headers))
        self.reply(head, body if self.head.method != "HEAD" else b"")

    def drain(self) -> None:
        """Read what the client has to send before it looks for an answer."""
        if self._unread:
            if "Expect" in self.head.headers:
                self.client.send(b"HTTP/1.1 100 Continue\r\n\r\n")
            for _ in self.client.body(self.head):
                pass
            self._unread = False

    def _send_request_body(self, upstream: Wire) -> None:
        self._pour(self.client.body(self.head, at_once=self._step()), upstream)
        self._unread = False

    def _has_body(self, response: Head) -> bool:
        return self.head.method != "HEAD" and response.status not in (204, 304)

    def _body(self, response: Head, *, framed: bool) -> Iterable[memoryview | bytes]:
        if not self._has_body(response):
            return ()
        if response.length is None and not response.chunked:
            self.keep = False  # it ends where the connection does
        return self._upstream.body(response, at_once=self._step(), framed=framed)

    def _pour(self, pieces: Iterable[memoryview | bytes], to: Wire) -> None:
        for piece in pieces:
            to.send(piece)
            for rate, pace in ((self.proxy.rate, self._link.pace), (self.proxy.total_rate, self.proxy.pace)):
                if rate:
                    self.proxy.closing.wait(pace.delay(len(piece), rate))

    def _step(self) -> int:
        """Bytes to send at once: a hundredth of a second's, so that a limited rate is an even one."""
        rate = min(filter(None, (self.proxy.rate, self.proxy.total_rate)), default=None)
        return max(1024, int(rate / 100)) if rate else 1 << 18
