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

from erofsgen.errors import UsageError
from erofsgen.oci.basic import basic
from erofsgen.oci.reference import is_loopback

_IDLE: Final = 20.0
"""Seconds that a connection nobody uses is kept: less than servers keep theirs."""
_RESOLVED: Final = 60.0
"""Seconds that the addresses of a name hold."""
_PORTS: Final = {"http": 80, "https": 443}

Connection = http.client.HTTPConnection


class Route(NamedTuple):
    """How a URL is reached."""

    secure: bool
    host: str
    port: int
    tunnel: tuple[str, int] | None = None
    """The server that a proxy at ``host`` connects us to."""

    absolute: bool = False
    """Whether the request names the whole URL, for a proxy that makes it for us."""

    password: str | None = None
    """What a proxy wants to see in Proxy-Authorization."""


class Connections:
    """Idle connections, and new ones. ``proxy`` (``http://HOST:PORT``) is asked for everything, HTTPS included, and may
    keep what it brings; without it those of the environment hold, but never for this machine. Connections come from the
    addresses ``sources`` in turn. Thread-safe.
    """

    def __init__(
        self, *, tls: ssl.SSLContext | None, connect_timeout: float, proxy: str | None, sources: Sequence[str] = ()
    ) -> None:
        self._tls = tls
        self._connect_timeout = connect_timeout
        self._proxy = proxy
        self._sources = sources or [""]
        self._turn = itertools.count()
        self._lock = threading.Lock()
        self._routes: dict[tuple[str, str], Route] = {}  # asking the environment for each request takes its time
        self._idle: dict[Route, list[tuple[float, Connection]]] = {}
        self._addresses: dict[tuple[str, int], tuple[float, list[str]]] = {}
        self._open: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self.closed = False

    def route(self, url: SplitResult) -> Route:
        """How ``url`` is reached. Raises UsageError for a proxy that is none."""
        server = url.scheme, url.netloc
        route = self._routes.get(server)
        if route is None:
            route = self._routes[server] = self._find_route(url)
        return route

    def _find_route(self, url: SplitResult) -> Route:
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
            while idle and now - idle[0][0] > _IDLE:
                idle.pop(0)[1].close()
            while idle:
                _, connection = idle.pop()
                if _is_quiet(connection):
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
            for sock in self._open:
                with suppress(OSError):
                    socket.socket.shutdown(sock, socket.SHUT_RDWR)  # below TLS, which would want to say good-bye

    def __del__(self) -> None:
        """Stores are often just dropped, and what is idle with them."""
        for _, connection in itertools.chain.from_iterable(self._idle.values()):
            connection.close()

    def _connect(self, route: Route) -> Connection:
        addresses = self._resolve(route.host, route.port)
        turn = next(self._turn)
        error: OSError | None = None
        for number in range(turn, turn + max(len(addresses), len(self._sources))):
            address, source = addresses[number % len(addresses)], self._sources[number % len(self._sources)]
            try:
                sock = socket.create_connection(
                    (address, route.port), self._connect_timeout, (source, 0) if source else None
                )
            except OSError as failed:
                error = failed
                self._avoid(route, address)
                continue
            return self._dress(route, sock)
        raise error or OSError(f"{route.host} has no address")

    def _dress(self, route: Route, sock: socket.socket) -> Connection:
        """HTTP on a socket, behind TLS where the route asks for it."""
        try:
            self._keep_track(sock)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection = Connection(route.host, route.port)
            if route.tunnel:
                headers = {"Proxy-Authorization": route.password} if route.password else {}
                connection.set_tunnel(*route.tunnel, headers=headers)
                connection.sock = sock
                connection._tunnel()  # type: ignore[attr-defined]  # what connect() does behind a connected socket
            connection.sock = sock
            if route.tunnel or route.secure:
                tls = self._tls or ssl.create_default_context()
                name = route.tunnel[0] if route.tunnel else route.host
                sock = connection.sock = tls.wrap_socket(sock, server_hostname=name, do_handshake_on_connect=False)
                self._keep_track(sock)
                sock.do_handshake()
        except BaseException:
            sock.close()
            raise
        return connection

    def _keep_track(self, sock: socket.socket) -> None:
        """So that close() can break it, whoever uses it by then."""
        with self._lock:
            if self.closed:
                raise ConnectionAbortedError("the client was closed")
            self._open.add(sock)

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

    def _avoid(self, route: Route, address: str) -> None:
        """Leave an address that does not answer out until the name is resolved again, unless it is the last."""
        with self._lock:
            until, addresses = self._addresses[route.host, route.port]
            if others := [other for other in addresses if other != address]:
                self._addresses[route.host, route.port] = until, others


def _via(proxy: str, *, absolute: bool) -> Route:
    try:
        parts = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        default = _PORTS[parts.scheme]
        port = parts.port or default
    except (ValueError, KeyError):
        where = proxy.rpartition("@")[2]
        raise UsageError(f"{where} is not an HTTP proxy", hint="http://HOST:PORT") from None
    password = None
    if parts.username is not None:
        password = basic(urllib.parse.unquote(parts.username), urllib.parse.unquote(parts.password or ""))
    return Route(parts.scheme == "https", parts.hostname or "", port, absolute=absolute, password=password)


def _is_quiet(connection: Connection) -> bool:
    """Whether the server has neither said anything nor gone since the last response."""
    sock = connection.sock
    if sock is None or sock.fileno() < 0:
        return False
    poll = select.poll()
    poll.register(sock, select.POLLIN | select.POLLHUP | select.POLLERR)
    return not poll.poll(0)
