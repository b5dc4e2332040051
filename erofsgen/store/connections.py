"""Connections to HTTP servers, kept and used again: many flows, over all of a server's addresses.

Clouds limit what one flow may carry, and so do network cards: connections of a host take turns over the addresses its
name has and over the source addresses that the user named. A connection is given back in a known state (its response
was read to the end) or closed.
"""

from __future__ import annotations

import http.client
import itertools
import select
import socket
import ssl
import threading
import time
import urllib.parse
import urllib.request
import weakref
from collections.abc import Sequence
from contextlib import suppress
from typing import Final, NamedTuple
from urllib.parse import SplitResult

from erofsgen.oci.reference import is_loopback

_IDLE: Final = 20.0
"""Seconds that a connection nobody uses is kept: less than servers keep theirs."""
_RESOLVED: Final = 60.0
"""Seconds that the addresses of a name hold."""
_PORTS: Final = {"http": 80, "https": 443}

Connection = http.client.HTTPConnection


class Route(NamedTuple):
    """How a URL is reached. ``absolute``: the request names the whole URL, for a proxy that makes it for us."""

    secure: bool
    host: str
    port: int
    tunnel: tuple[str, int] | None = None
    absolute: bool = False


class Connections:
    """Idle connections, and new ones. ``proxy`` (``http://HOST:PORT``) is asked for everything, HTTPS included, and may
    keep what it brings; without it those of the environment hold, but never for this machine. Thread-safe.
    """

    def __init__(
        self, *, tls: ssl.SSLContext | None, connect_timeout: float, proxy: str | None, sources: Sequence[str] = ()
    ) -> None:
        self._tls = tls
        self._connect_timeout = connect_timeout
        self._proxy = proxy
        self._sources = itertools.cycle(sources or [""])
        self._turn = itertools.count()
        self._lock = threading.Lock()
        self._idle: dict[Route, list[tuple[float, Connection]]] = {}
        self._addresses: dict[tuple[str, int], tuple[float, list[str]]] = {}
        self._open: weakref.WeakSet[Connection] = weakref.WeakSet()
        self.closed = False

    def route(self, url: SplitResult) -> Route:
        """How ``url`` is reached."""
        host, port = url.hostname or "", url.port or _PORTS[url.scheme]
        secure = url.scheme == "https"
        if self._proxy:
            return _via(self._proxy, absolute=True)
        proxy = None
        if not is_loopback(host) and not urllib.request.proxy_bypass(host):
            proxy = urllib.request.getproxies().get(url.scheme)
        if not proxy:
            return Route(secure, host, port)
        return _via(proxy, absolute=not secure)._replace(tunnel=(host, port) if secure else None)

    def take(self, route: Route) -> tuple[Connection, bool]:
        """A connection, and whether it was used before. Raises OSError."""
        now = time.monotonic()
        with self._lock:
            idle = self._idle.get(route, [])
            while idle:
                since, connection = idle.pop()
                if now - since < _IDLE and _is_quiet(connection):
                    return connection, True
                connection.close()
        return self._connect(route), False

    def give_back(self, route: Route, connection: Connection) -> None:
        """Keep a connection whose last response was read to its end."""
        with self._lock:
            if not self.closed and connection.sock is not None:
                self._idle.setdefault(route, []).append((time.monotonic(), connection))
                return
        connection.close()

    def close(self) -> None:
        """Close what is idle, and break what is in use."""
        with self._lock:
            self.closed = True
            for _, connection in itertools.chain.from_iterable(self._idle.values()):
                connection.close()
            self._idle.clear()
            for connection in self._open:
                if connection.sock is not None:
                    with suppress(OSError):
                        socket.socket.shutdown(connection.sock, socket.SHUT_RDWR)

    def __del__(self) -> None:
        """Stores are often just dropped, and what is idle with them."""
        for _, connection in itertools.chain.from_iterable(self._idle.values()):
            connection.close()

    def _connect(self, route: Route) -> Connection:
        addresses = self._resolve(route.host, route.port)
        start = next(self._turn)
        error: OSError | None = None
        for number in range(len(addresses)):
            address = addresses[(start + number) % len(addresses)]
            with self._lock:
                source = next(self._sources)
            try:
                sock = socket.create_connection(
                    (address, route.port), self._connect_timeout, (source, 0) if source else None
                )
            except OSError as failed:
                error = failed
                continue
            return self._dress(route, sock)
        raise error or OSError(f"{route.host} has no address")

    def _dress(self, route: Route, sock: socket.socket) -> Connection:
        """HTTP on a socket, behind TLS where the route asks for it."""
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection = Connection(route.host, route.port)
            connection.sock = sock
            if route.tunnel:
                host, port = route.tunnel
                connection.set_tunnel(host, port)
                connection._tunnel()  # type: ignore[attr-defined]  # what connect() does behind a connected socket
                connection.sock = (self._tls or ssl.create_default_context()).wrap_socket(sock, server_hostname=host)
            elif route.secure:
                tls = self._tls or ssl.create_default_context()
                connection.sock = tls.wrap_socket(sock, server_hostname=route.host)
        except BaseException:
            sock.close()
            raise
        with self._lock:
            self._open.add(connection)
        return connection

    def _resolve(self, host: str, port: int) -> list[str]:
        now = time.monotonic()
        with self._lock:
            known = self._addresses.get((host, port))
        if known is not None and now < known[0]:
            return known[1]
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        with self._lock:
            self._addresses[host, port] = now + _RESOLVED, addresses
        return addresses


def _via(proxy: str, *, absolute: bool) -> Route:
    parts = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    return Route(parts.scheme == "https", parts.hostname or "", parts.port or _PORTS[parts.scheme], absolute=absolute)


def _is_quiet(connection: Connection) -> bool:
    """Whether the server has neither said anything nor gone since the last response."""
    sock = connection.sock
    if sock is None or sock.fileno() < 0:
        return False
    poll = select.poll()
    poll.register(sock, select.POLLIN | select.POLLHUP | select.POLLERR)
    return not poll.poll(0)
