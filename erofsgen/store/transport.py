"""Ranges of remote blobs into buffers: the one way on which bytes come from S3, registries and web servers.

A store says where a blob is (:class:`Location`: a URL that may carry a signature, headers that may carry a token); this
module makes the request, checks that the answer is the range asked for, and lets the socket write into the caller's
buffer: there is no other copy. Digests are not looked at here.

Failures that may pass are :class:`~erofsgen.oci.patience.Transient`, tried again as often as the policy says.
"""

from __future__ import annotations

import http.client
import re
import ssl
import string
import threading
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Final, NamedTuple, TypeVar
from urllib.parse import quote, urldefrag, urljoin, urlsplit

from erofsgen.errors import ErofsgenError, IntegrityError, NotFoundError, RemoteError
from erofsgen.oci.patience import Policy, Transient, patiently, printable, retry_after
from erofsgen.store.answers import Answer, ask, host_of, translated
from erofsgen.store.base import Speed
from erofsgen.store.connections import Connections

T = TypeVar("T")

_REDIRECTS: Final = 5
_REDIRECT_CODES: Final = frozenset({301, 302, 303, 307, 308})
_REFUSALS: Final = frozenset({400, 401, 403})
_TRANSIENT: Final = frozenset({408, 425, 429})
_MOVED: Final = 300.0
"""Seconds that a redirect is remembered: it spares a round trip for each range."""
_MOVES: Final = 4096
"""Redirects that are remembered; signed URLs may have one each."""
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
        self._latency: float | None = None
        self.speed: Speed | None = None
        """None until something was read that is large enough to say what the bandwidth is."""

    def read_into(self, locate: Locate, offset: int, buffer: memoryview, what: str) -> None:
        """Fill ``buffer`` with the bytes at ``offset`` of ``what``.

        Raises NotFoundError, IntegrityError (it is shorter), RemoteError, and what ``locate`` raises.
        """
        if len(buffer):
            self._patiently(lambda: self._read_range(locate, offset, buffer, what))

    def get(self, locate: Locate, limit: int, what: str) -> bytes:
        """All of ``what``, at most ``limit`` bytes. Raises NotFoundError, RemoteError."""
        return self._patiently(lambda: self._read_all(locate, limit, what))

    def size(self, locate: Locate, what: str, *others: Locate) -> int | None:
        """Bytes of ``what``, which may be in ``others`` places, too; None where there is none. Raises RemoteError."""

        def attempt() -> int | None:
            for place in (locate, *others):
                with suppress(NotFoundError):
                    return self._head(place, what)
            return None

        return self._patiently(attempt)

    def doubt(self) -> None:
        """Forget where redirects led: what came from there was wrong."""
        with self._lock:
            self._moved.clear()

    def close(self) -> None:
        """Break what is running; later reads fail."""
        self.stop.set()
        self._connections.close()

    def _patiently(self, attempt: Callable[[], T]) -> T:
        return patiently(self.policy, self.stop, attempt)

    # --- one attempt -------------------------------------------------------------------------------------------------

    def _read_range(self, locate: Locate, offset: int, buffer: memoryview, what: str) -> None:
        end = offset + len(buffer)
        headers = {"Range": f"bytes={offset}-{end - 1}"}
        with self._answer("GET", locate, headers, what, good=(200, 206, 416)) as answer:
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
            if not length.isdecimal():
                raise RemoteError(f"{answer.where} does not say how long {what} is")
            return int(length)

    @contextmanager
    def _answer(
        self, method: str, locate: Locate, headers: Mapping[str, str], what: str, *, good: Container[int] = (200,)
    ) -> Iterator[Answer]:
        """The answer with a ``good`` status; a place that refuses us is asked for another way in once."""
        refusal: Refusal | None = None
        while True:
            location = locate(refusal)
            try:
                with self._follow(method, location, headers, what) as answer:
                    status = answer.response.status
                    if status in good:
                        if answer.response.getheader("Content-Encoding", "identity").strip().lower() != "identity":
                            raise Transient(RemoteError(f"{answer.where} compressed {what}, which was not asked for"))
                        yield answer
                        return
                    body = answer.error_text()
            except BaseException:  # where it moved to may be what is wrong
                self._forget_moves(method, location.url)
                raise
            self._forget_moves(method, location.url)
            moved = answer.url != location.url
            if refusal is None and (status in _REFUSALS or (moved and status in (404, 410))):
                given = answer.response.headers
                names = {name.lower(): ", ".join(given.get_all(name, [])) for name in given}
                refusal = Refusal(location, status, names, body)
                continue
            raise _failure(answer, what, body)

    @contextmanager
    def _follow(self, method: str, location: Location, headers: Mapping[str, str], what: str) -> Iterator[Answer]:
        """The answer that is no redirect. What a location's headers hold does not go to another origin."""
        url = self._moved_to(method, location.url)
        for _ in range(_REDIRECTS + 1):
            own = location.headers if _origin(url) == _origin(location.url) else {}
            with self._send(method, url, {**headers, **own}, what) as answer:
                target = answer.response.getheader("Location")
                if answer.response.status not in _REDIRECT_CODES or not target:
                    yield answer
                    return
                answer.error_text()  # so that the connection can be used again
            url = _redirected(answer, target)
            with self._lock:
                if len(self._moved) >= _MOVES:
                    self._moved.clear()
                self._moved[method, location.url] = time.monotonic() + _MOVED, url
        raise RemoteError(f"{host_of(urlsplit(location.url))} redirects more than {_REDIRECTS} times")

    @contextmanager
    def _send(self, method: str, url: str, headers: Mapping[str, str], what: str) -> Iterator[Answer]:
        """The answer to one request. Its connection is kept if all of it was read."""
        parts = urlsplit(url)
        where = host_of(parts)
        route = self._connections.route(parts)
        answer: Answer | None = None
        while answer is None:
            with translated(where, what):
                if self.stop.is_set():
                    raise RemoteError(f"the request to {where} was given up")
                connection, used = self._connections.take(route)
                try:
                    answer = ask(connection, route, method, parts, headers, self.policy)
                except (ConnectionError, ssl.SSLEOFError, http.client.BadStatusLine):
                    connection.close()
                    if not used:  # one that was idle may have been closed meanwhile
                        raise
                except BaseException:
                    connection.close()
                    raise
        keep = False
        try:
            with translated(where, what):
                yield answer
            keep = answer.response.isclosed() and not answer.response.will_close
        finally:
            answer.response.close()
            if keep:
                self._connections.give_back(route, connection)
            else:
                connection.close()

    # --- what was learnt ---------------------------------------------------------------------------------------------

    def _moved_to(self, method: str, url: str) -> str:
        with self._lock:  # by method, because signatures hold for one
            until, target = self._moved.get((method, url), (0.0, url))
            return target if time.monotonic() < until else url

    def _forget_moves(self, method: str, url: str) -> None:
        with self._lock:
            self._moved.pop((method, url), None)

    def _measured(self, latency: float, length: int, seconds: float) -> None:
        bandwidth = length / max(seconds, 1e-6)
        with self._lock:
            self._latency = latency = _blend(self._latency, latency)
            if length >= _LARGE:
                self.speed = Speed(latency, _blend(self.speed and self.speed.bandwidth, bandwidth))
            elif self.speed is not None:
                self.speed = Speed(latency, self.speed.bandwidth)


def _blend(known: float | None, measured: float) -> float:
    return measured if known is None else known + _SHARE * (measured - known)


def _redirected(answer: Answer, location: str) -> str:
    """The URL that a redirect's ``Location`` means. Raises RemoteError."""
    try:
        # servers send what no URL may hold: spaces, and bytes that http.client takes for Latin-1
        target = urljoin(answer.url, quote(location.strip(), safe=string.punctuation, encoding="latin-1"))
        parts = urlsplit(urldefrag(target).url)
        valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        valid = False
    if not valid:
        raise RemoteError(f"{answer.where} redirects to {printable(location)!a}, which is no URL of the web")
    if urlsplit(answer.url).scheme == "https" != parts.scheme:
        raise RemoteError(f"{answer.where} redirects from HTTPS to plain HTTP")
    return parts.geturl()


def _bytes_before(answer: Answer, offset: int, end: int, what: str) -> int:
    """How many bytes of the body come before the range asked for. Raises Transient, IntegrityError."""
    response = answer.response
    if response.status == 200:  # all of it, Range was ignored
        if response.length is not None and response.length < end:
            raise IntegrityError(f"{answer.where}: {what} is {response.length} bytes, {end} expected")
        if offset > _SKIP:
            raise Transient(RemoteError(f"{answer.where} ignores ranges", hint="use a server that serves them"))
        return offset
    match = _CONTENT_RANGE.fullmatch(response.getheader("Content-Range", "").strip())
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


def _failure(answer: Answer, what: str, body: str) -> ErofsgenError | Transient:
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
    allowed = "check the credentials and what they allow" if status in _REFUSALS else None
    return RemoteError(f"{where} answered {status} for {what}{detail}", hint=allowed)


def _origin(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.netloc
