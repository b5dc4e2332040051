"""Ranges of remote blobs into buffers: the one way on which bytes come from S3, registries and web servers.

A store says where a blob is (:class:`Location`: a URL that may carry a signature, headers that may carry a token); this
module makes the request, checks that the answer is the range asked for, and lets the socket write into the caller's
buffer: there is no other copy. Digests are not looked at here.

Failures that may pass are :class:`~erofsgen.oci.patience.Transient`, tried again as often as the policy says.
"""

from __future__ import annotations

import http.client
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final, NamedTuple, TypeVar
from urllib.parse import SplitResult, urljoin, urlsplit

from erofsgen import __version__
from erofsgen.errors import ErofsgenError, IntegrityError, NotFoundError, RemoteError
from erofsgen.oci.patience import Patience, Policy, Transient, printable, retry_after
from erofsgen.store.base import Speed
from erofsgen.store.connections import Connection, Connections, Route

T = TypeVar("T")

_REDIRECTS: Final = 5
_REDIRECT_CODES: Final = frozenset({301, 302, 303, 307, 308})
_REFUSALS: Final = frozenset({400, 401, 403})
_TRANSIENT: Final = frozenset({408, 425, 429})
_MOVED: Final = 300.0
"""Seconds that a redirect is remembered: it spares a round trip for each range."""
_ERROR_BODY: Final = 64 << 10
_SKIP: Final = 4 << 20
"""Bytes that are read and dropped at most where a server answers with more than the range."""
_LARGE: Final = 256 << 10
"""Bytes from which on a body says something about bandwidth."""
_SHARE: Final = 0.2
"""Weight of the newest measurement."""
_CONTENT_RANGE: Final = re.compile(r"bytes ([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19}|\*)", re.ASCII)

_S3_ERROR: Final = re.compile(r"<Error>.*?<Code>([^<]*)</Code>(?:.*?<Message>([^<]*)</Message>)?", re.DOTALL)


class Location(NamedTuple):
    """Where a blob can be read. ``headers`` go to this place only, not to where it sends us."""

    url: str
    headers: Mapping[str, str] = {}


class Refusal(NamedTuple):
    """Why a location did not let us in. ``headers`` have lower-case names."""

    location: Location
    status: int
    headers: Mapping[str, str]
    body: str


Locate = Callable[[Refusal | None], Location]
"""Says where a blob is; with a refusal of what it said before, another way in. Raises an ErofsgenError or Transient."""


class Transport:
    """Reads ranges. Thread-safe. ``proxy`` and ``sources``: see :class:`~erofsgen.store.connections.Connections`."""

    def __init__(
        self,
        *,
        policy: Policy | None = None,
        tls: ssl.SSLContext | None = None,
        proxy: str | None = None,
        sources: Sequence[str] = (),
    ) -> None:
        self.policy = policy or Policy()
        self.stop = threading.Event()
        self._connections = Connections(
            tls=tls, connect_timeout=self.policy.connect_timeout, proxy=proxy, sources=sources
        )
        self._lock = threading.Lock()
        self._moved: dict[tuple[str, str], tuple[float, str]] = {}
        self.speed: Speed | None = None

    def read_into(self, locate: Locate, offset: int, buffer: memoryview, what: str) -> None:
        """Fill ``buffer`` with the bytes at ``offset`` of ``what``.

        Raises NotFoundError, IntegrityError (it is shorter), RemoteError, and what ``locate`` raises.
        """
        if len(buffer):
            self._patiently(lambda: self._read_range(locate, offset, buffer, what))

    def get(self, locate: Locate, limit: int, what: str) -> bytes:
        """All of ``what``, at most ``limit`` bytes. Raises NotFoundError, RemoteError."""
        return self._patiently(lambda: self._read_all(locate, limit, what))

    def size(self, locate: Locate, what: str) -> int | None:
        """Bytes of ``what``, None where there is none. Raises RemoteError."""
        try:
            return self._patiently(lambda: self._head(locate, what))
        except NotFoundError:
            return None

    def close(self) -> None:
        """Break what is running; later reads fail."""
        self.stop.set()
        self._connections.close()

    def _patiently(self, attempt: Callable[[], T]) -> T:
        patience = Patience(self.policy, self.stop)
        while True:
            try:
                return attempt()
            except Transient as failure:
                patience.pause(failure)

    # --- one attempt -------------------------------------------------------------------------------------------------

    def _read_range(self, locate: Locate, offset: int, buffer: memoryview, what: str) -> None:
        end = offset + len(buffer)
        headers = {"Range": f"bytes={offset}-{end - 1}"}
        with self._answer("GET", locate, headers, what) as answer:
            response = answer.response
            if response.status == 416:
                raise IntegrityError(f"{answer.where}: {what} ends before byte {end}")
            skip = _bytes_before(answer, offset, end, what)
            length = response.length  # None: the end is marked otherwise
            if length is not None and response.status == 206 and length != len(buffer):
                raise Transient(RemoteError(f"{answer.where} sends {length} bytes of {what}, {len(buffer)} expected"))
            began = time.monotonic()
            if skip:
                answer.fill(memoryview(bytearray(skip)), what)
            answer.fill(buffer, what)
            self._measured(answer.latency, len(buffer), time.monotonic() - began)

    def _read_all(self, locate: Locate, limit: int, what: str) -> bytes:
        with self._answer("GET", locate, {}, what) as answer:
            return answer.body(limit, what)

    def _head(self, locate: Locate, what: str) -> int:
        with self._answer("HEAD", locate, {}, what) as answer:
            length = answer.response.getheader("Content-Length", "")
            answer.response.read()  # nothing, but http.client wants it said
            if not length.isdigit():
                raise RemoteError(f"{answer.where} does not say how long {what} is")
            return int(length)

    @contextmanager
    def _answer(self, method: str, locate: Locate, headers: Mapping[str, str], what: str) -> Iterator[_Answer]:
        """The successful answer of whoever has ``what``; a place that refuses us is asked for another way in once."""
        refusal: Refusal | None = None
        while True:
            location = locate(refusal)
            with self._follow(method, location, headers, what) as answer:
                status = answer.response.status
                if status in (200, 206, 416):
                    if answer.response.getheader("Content-Encoding", "identity").lower() != "identity":
                        raise Transient(RemoteError(f"{answer.where} compressed {what}, which was not asked for"))
                    yield answer
                    return
                body = answer.error_text()
            self._forget_moves(method, location.url)
            moved = answer.url != location.url
            if refusal is None and (status in _REFUSALS or (moved and status in (404, 410))):
                given = answer.response.headers
                names = {name.lower(): ", ".join(given.get_all(name, [])) for name in given}
                refusal = Refusal(location, status, names, body)
                continue
            raise _failure(answer, what, body)

    @contextmanager
    def _follow(self, method: str, location: Location, headers: Mapping[str, str], what: str) -> Iterator[_Answer]:
        """The answer that is no redirect. What a location's headers hold does not go to another origin."""
        url = self._moved_to(method, location.url)
        for _ in range(_REDIRECTS):
            own = location.headers if _origin(url) == _origin(location.url) else {}
            with self._send(method, url, {**headers, **own}, what) as answer:
                target = answer.response.getheader("Location")
                if answer.response.status not in _REDIRECT_CODES or not target:
                    yield answer
                    return
                answer.error_text()  # so that the connection can be used again
            target = urljoin(url, target)
            if urlsplit(target).scheme not in ("http", "https") or not urlsplit(target).hostname:
                raise RemoteError(f"{answer.where} redirects to {printable(target)!a}, which is not HTTP")
            if url.startswith("https:") and target.startswith("http:"):
                raise RemoteError(f"{answer.where} redirects from HTTPS to plain HTTP")
            url = target
            with self._lock:
                self._moved[method, location.url] = time.monotonic() + _MOVED, url
        raise RemoteError(f"{_host(urlsplit(location.url))} redirects more than {_REDIRECTS} times")

    @contextmanager
    def _send(self, method: str, url: str, headers: Mapping[str, str], what: str) -> Iterator[_Answer]:
        """The answer to one request. Its connection is kept if all of it was read."""
        parts = urlsplit(url)
        where = _host(parts)
        route = self._connections.route(parts)
        answer: _Answer | None = None
        while answer is None:
            with _translated(where, what):
                if self.stop.is_set():
                    raise RemoteError(f"the request to {where} was given up")
                connection, used = self._connections.take(route)
                try:
                    answer = _ask(connection, route, method, parts, headers, self.policy)
                except (ConnectionError, http.client.BadStatusLine):
                    connection.close()
                    if not used:  # one that was idle may have been closed meanwhile
                        raise
                except BaseException:
                    connection.close()
                    raise
        try:
            with _translated(where, what):
                yield answer
            if answer.response.isclosed() and not answer.response.will_close:
                self._connections.give_back(route, connection)
            else:
                connection.close()
        except BaseException:
            connection.close()
            raise

    # --- what was learnt ---------------------------------------------------------------------------------------------

    def _moved_to(self, method: str, url: str) -> str:
        with self._lock:  # by method, because signatures hold for one
            until, target = self._moved.get((method, url), (0.0, url))
            return target if time.monotonic() < until else url

    def _forget_moves(self, method: str, url: str) -> None:
        with self._lock:
            self._moved.pop((method, url), None)

    def _measured(self, latency: float, length: int, seconds: float) -> None:
        with self._lock:
            if self.speed is None:
                self.speed = Speed(latency, length / max(seconds, 1e-6))
                return
            known = self.speed
            bandwidth = known.bandwidth
            if length >= _LARGE:
                bandwidth += _SHARE * (length / max(seconds, 1e-6) - bandwidth)
            self.speed = Speed(known.latency + _SHARE * (latency - known.latency), bandwidth)


class _Answer:
    """A response whose body is still to be read, within the policy's time."""

    def __init__(
        self, response: http.client.HTTPResponse, sock: socket.socket, url: str, latency: float, policy: Policy
    ) -> None:
        self.response = response
        self.url = url
        self.where = _host(urlsplit(url))
        self.latency = latency
        self._sock = sock
        self._policy = policy
        self._began = time.monotonic()

    def fill(self, buffer: memoryview, what: str) -> None:
        """Exactly as many bytes of the body. Raises Transient (it ends before, or is too slow), OSError."""
        done = 0
        while done < len(buffer):
            count = self._receive(buffer[done:])
            if not count:
                raise Transient(RemoteError(f"{self.where}: {what} ended after {done} of {len(buffer)} bytes"))
            done += count
            self._hurry(done, what)
        if self.response.length == 0:
            self.response.close()

    def body(self, limit: int, what: str) -> bytes:
        """All of the body. Raises Transient, RemoteError (more than ``limit`` bytes), OSError."""
        data = bytearray()
        while piece := self.response.read(min(limit + 1 - len(data), 1 << 20)):
            data += piece
            if len(data) > limit:
                raise RemoteError(f"{self.where} sent more than {limit} bytes as {what}")
            self._hurry(len(data), what)
        if self.response.length:
            raise Transient(RemoteError(f"{self.where}: {what} ended after {len(data)} bytes"))
        return bytes(data)

    def error_text(self) -> str:
        """The start of an error's body. Never raises for the network: the status is what counts."""
        try:
            return self.response.read(_ERROR_BODY).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException):
            return ""

    def _receive(self, buffer: memoryview) -> int:
        """One piece of the body, straight from the socket."""
        response = self.response
        if response.chunked or response.length is None or response.fp is None:
            return response.readinto(buffer)
        count = response.fp.readinto1(buffer[: response.length])
        response.length -= count
        return count

    def _hurry(self, done: int, what: str) -> None:
        """Raises Transient where the body comes slower than the policy allows."""
        elapsed = time.monotonic() - self._began
        if elapsed > self._policy.read_timeout and done < elapsed * self._policy.min_rate:
            raise Transient(RemoteError(f"{self.where} is too slow: {done} bytes of {what} in {elapsed:.0f} s"))


def _ask(
    connection: Connection, route: Route, method: str, url: SplitResult, headers: Mapping[str, str], policy: Policy
) -> _Answer:
    """Send a request and read the answer's head. Raises OSError, HTTPException."""
    path = url.path or "/"
    target = url.geturl() if route.absolute else (f"{path}?{url.query}" if url.query else path)
    sock = connection.sock
    sock.settimeout(policy.read_timeout)
    began = time.monotonic()
    connection.putrequest(method, target, skip_host=True, skip_accept_encoding=True)
    common = {"Host": url.netloc.rpartition("@")[2], "User-Agent": f"erofsgen/{__version__}"}
    for name, value in {**common, "Accept-Encoding": "identity", **headers}.items():
        connection.putheader(name, value)
    connection.endheaders()
    response = connection.getresponse()
    return _Answer(response, sock, url.geturl(), time.monotonic() - began, policy)


def _bytes_before(answer: _Answer, offset: int, end: int, what: str) -> int:
    """How many bytes of the body come before the range asked for. Raises Transient, IntegrityError."""
    response = answer.response
    if response.status == 200:  # all of it, Range was ignored
        if response.length is not None and response.length < end:
            raise IntegrityError(f"{answer.where}: {what} is {response.length} bytes, {end} expected")
        if offset > _SKIP:
            raise Transient(RemoteError(f"{answer.where} ignores ranges", hint="use a server that serves them"))
        return offset
    match = _CONTENT_RANGE.fullmatch(response.getheader("Content-Range", ""))
    if not match or int(match[1]) != offset or int(match[2]) > end - 1:
        said = printable(response.getheader("Content-Range", "none"))
        raise Transient(RemoteError(f"{answer.where} answers with another range of {what}: {said}"))
    if int(match[2]) < end - 1:
        if match[3] != "*" and int(match[3]) < end:
            raise IntegrityError(f"{answer.where}: {what} is {match[3]} bytes, {end} expected")
        raise Transient(RemoteError(f"{answer.where} answers with less than the range of {what}"))
    return 0


def s3_error(body: str) -> tuple[str, str]:
    """Code and message of an error as S3 services word it, empty where ``body`` is none."""
    match = _S3_ERROR.search(body)
    return (match[1], match[2] or "") if match else ("", "")


def _failure(answer: _Answer, what: str, body: str) -> ErofsgenError | Transient:
    """What to raise for an answer that is no success."""
    status, where = answer.response.status, answer.where
    said = printable(": ".join(filter(None, s3_error(body))) or re.sub(r"<[^>]*>", " ", body), 120)
    detail = f": {said}" if said else ""
    if status in (404, 410):
        return NotFoundError(f"{where} has no {what}")
    if status >= 500 or status in _TRANSIENT:
        hint = "the server limits our rate" if status in (429, 503) else "try again later"
        error = RemoteError(f"{where} answered {status} for {what}{detail}", hint=hint)
        return Transient(error, retry_after(answer.response.getheader("Retry-After", "")))
    return RemoteError(
        f"{where} answered {status} for {what}{detail}", hint="check the credentials and what they allow"
    )


@contextmanager
def _translated(where: str, what: str) -> Iterator[None]:
    """What sockets and http.client raise, in this project's words."""
    try:
        yield
    except TimeoutError as error:
        raise Transient(RemoteError(f"no answer from {where} for {what} in time")) from error
    except ssl.SSLCertVerificationError as error:
        raise RemoteError(f"the certificate of {where} is not trusted: {error.verify_message}") from error
    except socket.gaierror as error:
        failed = RemoteError(f"the name of {where} cannot be resolved: {error.strerror}", hint="check the network")
        if error.errno in (socket.EAI_NONAME, socket.EAI_NODATA):
            raise failed from error
        raise Transient(failed) from error
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        raise Transient(RemoteError(f"cannot reach {where}: {reason}", hint="check the network")) from error
    except http.client.HTTPException as error:
        reason = printable(f"{type(error).__name__} {error}".strip())
        raise Transient(RemoteError(f"{where} does not speak HTTP properly: {reason}")) from error


def _origin(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.netloc


def _host(url: SplitResult) -> str:
    """Where a request went, without what may be secret in its URL."""
    return printable(url.netloc.rpartition("@")[2])
