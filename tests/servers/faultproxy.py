"""A reverse proxy between a client and a real server that adds latency, limits rates and misbehaves on request.

    with FaultProxy("http://127.0.0.1:8080") as proxy:
        proxy.fault(r"^/bucket/key", status(503, Retry_After="1"), times=2)
        ...  # talk to proxy.url
        assert [request.status for request in proxy.seen("key")] == [503, 503, 200]

Everything else passes as it came, Host included, so signatures stay valid.
"""

from __future__ import annotations

import gzip
import re
import socket
import struct
import threading
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass

import httpx
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from servers.exchange import Exchange, Link, Pace, Request
from servers.s3 import S3Server

Action = Callable[[Exchange], None]


@dataclass
class Fault:
    """``action`` answers the next ``times`` requests (None: all) of ``method`` (None: any) that match ``pattern``."""

    pattern: str
    action: Action
    times: int | None
    method: str | None

    def applies(self, request: Request) -> bool:
        return (
            self.times != 0
            and self.method in (None, request.method)
            and re.search(self.pattern, request.path) is not None
        )


class FaultProxy:
    """A context manager that serves ``url`` while it is open. Latency, rates and faults may change at any time.

    ``upstream`` is ``http://HOST:PORT``, or an S3Server where faults change requests, which then are signed anew.
    """

    def __init__(self, upstream: str | S3Server) -> None:
        self.s3 = upstream if isinstance(upstream, S3Server) else None
        endpoint = urllib.parse.urlsplit(upstream.endpoint if isinstance(upstream, S3Server) else upstream)
        self.upstream = endpoint.hostname, endpoint.port
        self.latency = 0.0
        """Seconds from a request's arrival until anything is done about it."""
        self.rate: float | None = None
        """Bytes of bodies a second on each connection."""
        self.total_rate: float | None = None
        """Bytes of bodies a second on all connections together."""
        self.pace = Pace()
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.accepted = 0
        """Connections that clients made."""
        self.closing = threading.Event()
        """Set when the proxy stops; whoever dawdles waits for it."""
        self._lock = threading.Lock()
        self._links: set[Link] = set()

    def __enter__(self) -> FaultProxy:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._acceptor = threading.Thread(target=self._accept)
        self._acceptor.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.closing.set()
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept
        self._acceptor.join()
        self._listener.close()
        with self._lock:
            links = list(self._links)
        for link in links:
            link.stop()
            link.thread.join()

    def fault(self, pattern: str, action: Action, times: int | None = 1, method: str | None = None) -> None:
        """Let ``action`` answer the next ``times`` requests (None: all from now on) whose path and query match."""
        with self._lock:
            self.faults.append(Fault(pattern, action, times, method))

    def seen(self, pattern: str, method: str | None = None) -> list[Request]:
        """The requests so far whose path and query match."""
        wanted = Fault(pattern, Exchange.relay, None, method)
        return [request for request in list(self.requests) if wanted.applies(request)]

    def arrived(self, request: Request) -> Action:
        """Take note of a request: what shall be done about it."""
        with self._lock:
            self.requests.append(request)
            for fault in self.faults:
                if fault.applies(request):
                    if fault.times is not None:
                        fault.times -= 1
                    return fault.action
        return Exchange.relay

    def gone(self, link: Link) -> None:
        with self._lock:
            self._links.discard(link)

    def _accept(self) -> None:
        while not self.closing.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            link = Link(self, connection)
            with self._lock:
                self.accepted += 1
                self._links.add(link)
            link.thread.start()


# --- no answer, or not the server's ----------------------------------------------------------------------------------


def silent(seconds: float) -> Action:
    """No answer for a while, then a closed connection."""

    def action(exchange: Exchange) -> None:
        exchange.proxy.closing.wait(seconds)
        exchange.keep = False

    return action


def reset() -> Action:
    """The connection is reset before any answer."""

    def action(exchange: Exchange) -> None:
        exchange.client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        exchange.keep = False

    return action


def raw(data: bytes, *, keep: bool = False) -> Action:
    """These bytes, whatever they mean, then a closed connection unless ``keep``."""

    def action(exchange: Exchange) -> None:
        exchange.drain()
        exchange.client.send(data)
        exchange.keep = keep

    return action


def status(code: int, body: bytes = b"", **headers: str) -> Action:
    """This status instead of the server's; ``Retry_After`` is the header Retry-After."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda exchange: exchange.answer(code, body, named)


def s3_error(code: str, status_code: int, **headers: str) -> Action:
    """An error as S3 services word it, e.g. ``s3_error("SlowDown", 503)``."""
    body = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>injected</Message></Error>'
    return status(status_code, body.encode(), Content_Type="application/xml", **headers)


def redirect(url: str, code: int = 307) -> Action:
    """Somewhere else."""
    return status(code, Location=url)


# --- another body ----------------------------------------------------------------------------------------------------


def short(count: int) -> Action:
    """The whole length is announced, ``count`` bytes come, and the connection is closed."""

    def action(exchange: Exchange) -> None:
        response = exchange.forward()
        body = exchange.read(response)
        exchange.reply(response, body[:count], announced=len(body))
        exchange.keep = False

    return action


def short_lie(count: int) -> Action:
    """``count`` bytes fewer than there are, announced as if that were all."""
    return _altered(lambda body: body[: max(0, len(body) - count)])


def long(count: int) -> Action:
    """``count`` bytes more than there are, and announced."""
    return _altered(lambda body: body + bytes(count))


def flip(offset: int) -> Action:
    """The right body but for one bit of the byte at ``offset``."""
    return _altered(lambda body: body[:offset] + bytes([body[offset] ^ 0x10]) + body[offset + 1 :])


def gzip_encoded() -> Action:
    """The right body as Content-Encoding: gzip, whether or not the client takes that."""
    return _altered(gzip.compress, {"Content-Encoding": "gzip"})


def _altered(alter: Callable[[bytes], bytes], headers: dict[str, str] | None = None) -> Action:
    def action(exchange: Exchange) -> None:
        response = exchange.forward()
        response.headers.update(headers)
        body = exchange.read(response)
        exchange.reply(response, alter(body) if exchange.head.method != "HEAD" else body)

    return action


# --- another range ---------------------------------------------------------------------------------------------------


def other_range(shift: int, *, lie: bool = False) -> Action:
    """The range ``shift`` bytes further on, with its true Content-Range; with ``lie``, the one that was asked for."""

    def action(exchange: Exchange) -> None:
        first, last = exchange.head.headers["Range"].removeprefix("bytes=").split("-")
        shifted = f"bytes={int(first) + shift}-{int(last) + shift if last else ''}"
        response = exchange.forward(_with_range(exchange, shifted))
        if lie:
            true_last, size = response.headers["Content-Range"].rpartition("-")[2].split("/")
            response.headers["Content-Range"] = f"bytes {first}-{int(true_last) - shift}/{size}"
        exchange.reply(response, exchange.read(response))

    return action


def ignore_range(exchange: Exchange) -> None:
    """The whole object, as 200."""
    response = exchange.forward(_with_range(exchange, None))
    exchange.reply(response, exchange.read(response))


def _with_range(exchange: Exchange, value: str | None) -> httpx.Headers:
    """The request's headers with another range, signed anew if they were signed."""
    headers = exchange.head.headers.copy()
    headers.pop("Range", None)
    if value:
        headers["Range"] = value
    if headers.get("Authorization", "").startswith("AWS4"):
        server = exchange.proxy.s3
        assert server, "to change a signed request the proxy needs the S3Server as its upstream"
        signed = AWSRequest(
            exchange.head.method,
            f"http://{headers['Host']}{exchange.head.target}",
            headers={"Range": value} if value else {},
        )
        S3SigV4Auth(Credentials(server.access_key, server.secret_key), "s3", server.region).add_auth(signed)
        headers.update(dict(signed.headers))
    return headers


# --- the right body, late --------------------------------------------------------------------------------------------


def delay(seconds: float) -> Action:
    """The right answer, later."""

    def action(exchange: Exchange) -> None:
        exchange.proxy.closing.wait(seconds)
        exchange.relay()

    return action


def drip(count: int, interval: float) -> Action:
    """The right answer, ``count`` bytes of its body every ``interval`` seconds."""

    def action(exchange: Exchange) -> None:
        response = exchange.forward()
        body = exchange.read(response)
        exchange.reply(response, b"", announced=len(body))
        for start in range(0, len(body), count):
            exchange.send([body[start : start + count]])
            exchange.proxy.closing.wait(interval)

    return action
