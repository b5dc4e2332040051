"""HTTP as a registry needs it: redirects that leak nothing, TLS per host, patience with limits.

Bodies are streamed, both ways. Failures come in two kinds: :class:`Transient` may be tried again, an
:class:`~erofsgen.errors.ErofsgenError` may not.
"""

from __future__ import annotations

import socket
import ssl
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import Any, Final, NamedTuple, TypeVar

import httpx
import msgspec

from erofsgen import __version__
from erofsgen.errors import ErofsgenError, NotFoundError, RemoteError
from erofsgen.oci.patience import Policy, Transient, printable, retry_after
from erofsgen.oci.reference import is_loopback
from erofsgen.oci.tls import CERTS_DIRS, tls_context

_REDIRECTS: Final = 10
_REDIRECT_CODES: Final = frozenset({301, 302, 303, 307, 308})
_ERROR_BODY: Final = 64 << 10
_HEADERS: Final = {"User-Agent": f"erofsgen/{__version__}", "Accept-Encoding": "identity"}
"""Identity: digests and ranges are about a blob's own bytes, and a bomb must not unfold in here."""

E = TypeVar("E", bound=BaseException)


class _ErrorEntry(msgspec.Struct):
    message: str | None = None


class _Errors(msgspec.Struct):
    """The body of a registry's error, after the OCI distribution specification."""

    errors: list[_ErrorEntry] = []


class Body(NamedTuple):
    """What a request sends: ``size`` bytes, which each call of ``pieces`` gives anew from their start."""

    size: int
    pieces: Callable[[], Iterable[bytes]]


class HttpClient:
    """Streams responses for one registry and the hosts it sends us to. Thread-safe.

    TLS is verified with the system's authorities, and ``certs.d`` for the registry itself. Proxies come from the
    environment, but never for this machine.
    """

    def __init__(self, registry: str, *, tls_verify: bool = True, policy: Policy | None = None) -> None:
        self.policy = policy or Policy()
        self.stop = threading.Event()
        self._registry = registry
        self._tls_verify = tls_verify
        self._lock = threading.Lock()
        self._clients: dict[tuple[str, bool, bool], httpx.Client] = {}
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()

    @cached_property
    def tls(self) -> ssl.SSLContext:
        """How the registry itself shows who it is."""
        return tls_context(self._registry, verify=self._tls_verify)

    def may_use(self, url: httpx.URL) -> bool:
        """Whether a secret may travel to ``url``: over TLS, within this machine, or the user gave up on TLS."""
        return url.scheme == "https" or (
            url.scheme == "http" and (not self._tls_verify or is_loopback(_host_port(url)))
        )

    @contextmanager
    def stream(
        self,
        method: str,
        url: str | httpx.URL,
        headers: Mapping[str, str],
        *,
        form: Mapping[str, str] | None = None,
        body: Body | None = None,
    ) -> Iterator[httpx.Response]:
        """The response to one request, of any status but a redirect, its body not yet read.

        Redirects are followed where something is asked for, not where something is changed. ``Authorization`` does not
        follow to another scheme, host or port. Raises Transient, RemoteError.
        """
        target = httpx.URL(url)
        sent = dict(headers)
        for _ in range(_REDIRECTS):
            with self._send(method, target, sent, form, body) as response:
                location = response.headers.get("Location")
                if response.status_code not in _REDIRECT_CODES or not location:
                    yield response
                    return
            following = self.join(target, location)
            if form is None and method not in ("GET", "HEAD"):
                raise RemoteError(
                    f"{_origin_text(target)} redirects {method} to {_origin_text(following)}, which is not followed"
                )
            if origin(following) != origin(target):
                sent.pop("Authorization", None)
            target, method, form = following, method if form is None else "GET", None
        raise RemoteError(f"{_origin_text(httpx.URL(url))} redirects more than {_REDIRECTS} times")

    def body(self, response: httpx.Response, limit: int, what: str) -> bytes:
        """A whole body of at most ``limit`` bytes.

        Raises Transient (too slow), RemoteError (longer, or compressed unasked).
        """
        where = _origin_text(response.url)
        if response.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise RemoteError(f"{where} compressed {what}, which was not asked for")
        data = bytearray()
        deadline = time.monotonic() + self.policy.document_timeout
        for piece in response.iter_raw():
            data += piece
            if len(data) > limit:
                raise RemoteError(f"{where} sent more than {limit} bytes as {what}")
            if time.monotonic() > deadline:
                raise Transient(RemoteError(f"{where} is too slow with {what}"))
        return bytes(data)

    def error_text(self, response: httpx.Response) -> str:
        """The start of an error's body. Never raises: the status is what counts."""
        data = bytearray()
        deadline = time.monotonic() + self.policy.document_timeout
        with suppress(httpx.HTTPError):
            for piece in response.iter_raw():
                data += piece
                if len(data) >= _ERROR_BODY or time.monotonic() > deadline:
                    break
        return bytes(data[:_ERROR_BODY]).decode("utf-8", "replace")

    def pieces(self, response: httpx.Response) -> Iterator[bytes]:
        """A long body as it comes. Raises Transient (slower than the policy's ``min_rate``)."""
        began, received = time.monotonic(), 0
        for piece in response.iter_raw():
            yield piece
            received += len(piece)
            elapsed = time.monotonic() - began
            if elapsed > self.policy.read_timeout:
                if received < elapsed * self.policy.min_rate:
                    raise Transient(
                        RemoteError(f"{_origin_text(response.url)} is too slow: {received} bytes in {elapsed:.0f} s")
                    )
                began, received = time.monotonic(), 0

    def close(self) -> None:
        """Break what is running and close all connections."""
        self.stop.set()
        with self._lock:
            for connection in self._sockets:
                _break(connection)

    def dispose(self) -> None:
        """Free the connections, once no thread uses them any more."""
        with self._lock:
            clients, self._clients = self._clients, {}
        for client in clients.values():
            client.close()

    def __del__(self) -> None:
        """Stores are often just dropped, and their connections with them."""
        self.dispose()

    @contextmanager
    def _send(
        self,
        method: str,
        url: httpx.URL,
        headers: Mapping[str, str],
        form: Mapping[str, str] | None,
        body: Body | None,
    ) -> Iterator[httpx.Response]:
        where = _origin_text(url)
        policy = self.policy
        timeout = httpx.Timeout(policy.read_timeout, connect=policy.connect_timeout, pool=None)
        content = None
        if body is not None:
            headers = {**headers, "Content-Length": str(body.size)}
            content = body.pieces()
            timeout.read = policy.upload_timeout
        with _translated(where):
            if self.stop.is_set():
                raise RemoteError(f"the request to {where} was given up")
            client = self._client(url)
            request = client.build_request(
                method,
                url,
                headers=headers,
                data=form,
                content=content,
                timeout=timeout,
                extensions={"trace": self._trace},
            )
            response = client.send(request, stream=True)
        try:
            with _translated(where):
                yield response
        finally:
            response.close()

    def _trace(self, event: str, info: Mapping[str, Any]) -> None:
        """httpcore tells what it does: each new connection's socket is kept, to be broken by :meth:`close`."""
        if event in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            connection = info["return_value"].get_extra_info("socket")
            with self._lock:
                self._sockets.add(connection)
                if self.stop.is_set():
                    _break(connection)

    def _client(self, url: httpx.URL) -> httpx.Client:
        own = _host_port(url) == self._registry.lower().removesuffix(":443")
        local = is_loopback(_host_port(url))
        key = (url.scheme, own, local)
        with self._lock:
            if key not in self._clients:
                if url.scheme == "https":
                    context = self.tls if own else tls_context(None, verify=self._tls_verify)
                else:  # never used, and reading the system's authorities takes its time
                    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
                self._clients[key] = httpx.Client(
                    headers=_HEADERS,
                    verify=context,
                    limits=httpx.Limits(max_connections=None),
                    trust_env=not local,
                )
            return self._clients[key]

    def join(self, base: httpx.URL, location: str) -> httpx.URL:
        """Where a server sends us with its ``Location``. Raises RemoteError (nowhere, or away from TLS)."""
        where = _origin_text(base)
        try:
            url = base.join(location)
        except httpx.InvalidURL as error:
            raise RemoteError(f"{where} redirects to {printable(location)!a}, which is no URL") from error
        if url.scheme not in ("http", "https") or not url.host:
            raise RemoteError(f"{where} redirects to {printable(str(url))!a}, which is not HTTP")
        if base.scheme == "https" and url.scheme == "http" and not self.may_use(url):
            raise RemoteError(f"{where} redirects from HTTPS to plain HTTP at {_origin_text(url)}")
        return url


def failure(response: httpx.Response, what: str, body: str) -> ErofsgenError | Transient:
    """What to raise for a response that is no success: ``what`` was asked for, ``body`` is its text."""
    where, status = _origin_text(response.url), response.status_code
    asked = retry_after(response.headers.get("Retry-After", ""))
    try:
        said = msgspec.json.decode(body, type=_Errors).errors[0].message or ""
    except (msgspec.MsgspecError, RecursionError, IndexError):
        said = ""
    detail = f": {printable(said)}" if said else ""
    if status in (404, 410):
        return NotFoundError(f"{where} has no {what}{detail}")
    if status == 429:
        hint = "wait, or log in for a higher limit"
        return Transient(RemoteError(f"{where} limits our rate for {what}{detail}", hint=hint), asked)
    error = RemoteError(
        f"{where} answered {status} for {what}{detail}", hint="try again later" if status >= 500 else None
    )
    return Transient(error, asked) if status >= 500 or status in (408, 425) else error


@contextmanager
def _translated(where: str) -> Iterator[None]:
    """What httpx raises, in this project's words."""
    try:
        yield
    except httpx.TimeoutException as error:
        late = "connection" if isinstance(error, httpx.ConnectTimeout) else "answer"
        raise Transient(RemoteError(f"no {late} from {where} in time", hint="check the network and proxies")) from error
    except httpx.UnsupportedProtocol as error:
        raise RemoteError(f"cannot reach {where}: {error}") from error
    except httpx.TransportError as error:
        raise _unreachable(where, error) from error
    except (httpx.InvalidURL, httpx.HTTPError, httpx.StreamError) as error:
        raise RemoteError(f"cannot reach {where}: {printable(str(error))}") from error


def _unreachable(where: str, error: httpx.TransportError) -> RemoteError | Transient:
    certificate = _cause(error, ssl.SSLCertVerificationError)
    if certificate:
        return RemoteError(
            f"the certificate of {where} is not trusted: {certificate.verify_message}",
            hint=f"put its authority into {CERTS_DIRS[1]}/HOST[:PORT]/ca.crt, or turn off verification",
        )
    name = _cause(error, socket.gaierror)
    if name and name.errno in (socket.EAI_NONAME, socket.EAI_NODATA):
        return RemoteError(f"the name of {where} cannot be resolved", hint="check the spelling and the network")
    refused = _cause(error, OSError)
    reason = refused.strerror if refused and refused.strerror else printable(str(error)) or type(error).__name__
    return Transient(RemoteError(f"cannot reach {where}: {reason}", hint="check the network and proxies"))


def _break(connection: socket.socket) -> None:
    """Wake a thread that waits for bytes. The plain call: a TLS socket's own may not be made from another thread."""
    with suppress(OSError):
        socket.socket.shutdown(connection, socket.SHUT_RDWR)


def _cause(error: BaseException | None, kind: type[E]) -> E | None:
    while error is not None:
        if isinstance(error, kind):
            return error
        error = error.__cause__ or error.__context__
    return None


def origin(url: httpx.URL) -> tuple[str, str, int | None]:
    """Scheme, host and port: what a secret is bound to."""
    return url.scheme, url.host, url.port or {"http": 80, "https": 443}.get(url.scheme)


def _host_port(url: httpx.URL) -> str:
    return url.netloc.decode("ascii", "replace")


def _origin_text(url: httpx.URL) -> str:
    """Where a request went, without its path: signed URLs carry secrets there."""
    return printable(_host_port(url))
