"""One request over a connection, and its answer: a head, and a body that the socket writes where it is wanted.

http.client says what the bytes mean. What it leaves open is how long they may take: a server that sends one byte before
each time-out would hold its reader for ever.
"""

from __future__ import annotations

import http.client
import io
import math
import socket
import ssl
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final
from urllib.parse import SplitResult, urlsplit

from erofsgen import __version__
from erofsgen.errors import RemoteError
from erofsgen.oci.patience import Policy, Transient, printable
from erofsgen.store.connections import Connection, Route

_ERROR_BODY: Final = 64 << 10


class Answer:
    """A response whose body is still to be read."""

    def __init__(self, response: http.client.HTTPResponse, url: str, latency: float) -> None:
        self.response = response
        self.url = url
        self.where = host_of(urlsplit(url))
        self.latency = latency
        """Seconds from the request to the end of the answer's head."""

    def fill(self, buffer: memoryview, what: str) -> None:
        """Exactly as many bytes of the body. Raises Transient (it ends before), OSError, HTTPException."""
        done = 0
        while done < len(buffer):
            count = self._receive(buffer[done:])
            if not count:
                raise Transient(RemoteError(f"{self.where}: {what} ended after {done} of {len(buffer)} bytes"))
            done += count
        if self.response.length == 0:
            self.response.close()

    def body(self, limit: int, what: str) -> bytes:
        """All of the body. Raises Transient, RemoteError (more than ``limit`` bytes), OSError, HTTPException."""
        data = bytearray()
        while piece := self.response.read(min(limit + 1 - len(data), 1 << 20)):
            data += piece
            if len(data) > limit:
                raise RemoteError(f"{self.where} sent more than {limit} bytes as {what}")
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


def ask(
    connection: Connection, route: Route, method: str, url: SplitResult, headers: Mapping[str, str], policy: Policy
) -> Answer:
    """Send a request and read the answer's head. Raises OSError, HTTPException."""
    path = url.path or "/"
    target = url.geturl() if route.absolute else (f"{path}?{url.query}" if url.query else path)
    connection.sock.settimeout(policy.read_timeout)
    connection.response_class = lambda sock, method: _Response(sock, method, policy)  # type: ignore[assignment]
    began = time.monotonic()
    connection.putrequest(method, target, skip_host=True, skip_accept_encoding=True)
    common = {"Host": url.netloc.rpartition("@")[2], "User-Agent": f"erofsgen/{__version__}"}
    if route.absolute and route.password:
        common["Proxy-Authorization"] = route.password
    for name, value in {**common, "Accept-Encoding": "identity", **headers}.items():
        connection.putheader(name, value)
    connection.endheaders()
    response = connection.getresponse()
    return Answer(response, url.geturl(), time.monotonic() - began)


@contextmanager
def translated(where: str, what: str) -> Iterator[None]:
    """What sockets and http.client raise, in this project's words."""
    try:
        yield
    except _TooSlowError as error:
        raise Transient(RemoteError(f"{where} is too slow: {error} of {what}")) from error
    except TimeoutError as error:
        raise Transient(RemoteError(f"no answer from {where} for {what} in time")) from error
    except ssl.SSLCertVerificationError as error:
        raise RemoteError(f"the certificate of {where} is not trusted: {error.verify_message}") from error
    except socket.gaierror as error:
        failed = RemoteError(f"the name of {where} cannot be resolved: {error.strerror}", hint="check the network")
        if error.errno in (socket.EAI_NONAME, socket.EAI_NODATA):
            raise failed from error
        raise Transient(failed) from error
    except UnicodeError as error:  # from getaddrinfo, which encodes names first
        raise RemoteError(f"{where!a} is not the name of a host") from error
    except OSError as error:
        reason = printable(error.strerror or str(error) or type(error).__name__)
        raise Transient(RemoteError(f"cannot reach {where}: {reason}", hint="check the network")) from error
    except http.client.HTTPException as error:
        reason = printable(f"{type(error).__name__} {error}".strip())
        raise Transient(RemoteError(f"{where} does not speak HTTP properly: {reason}")) from error


def host_of(url: SplitResult) -> str:
    """Where a request went, without what may be secret in its URL."""
    return printable(url.netloc.rpartition("@")[2])


class _TooSlowError(TimeoutError):
    """The message is what came, and in how much time."""


class _Response(http.client.HTTPResponse):
    """The whole head has to come within the policy's read_timeout, the body at its min_rate at least."""

    def __init__(self, sock: socket.socket, method: str, policy: Policy) -> None:
        super().__init__(sock, method=method)
        self._pace = _Pace(self.fp.detach(), policy)
        self.fp = io.BufferedReader(self._pace)

    def begin(self) -> None:
        super().begin()
        self._pace.body()

    def _read_status(self) -> tuple[str, int, str]:
        """Makes begin(), which skips 100 (Continue) only, skip all heads that are not the last."""
        version, status, reason = super()._read_status()  # type: ignore[misc]
        return version, http.client.CONTINUE if status < 200 else status, reason


class _Pace(io.RawIOBase):
    """What a socket receives, while it comes fast enough. Raises _TooSlowError."""

    def __init__(self, raw: io.RawIOBase, policy: Policy) -> None:
        self._raw = raw
        self._policy = policy
        self._least = math.inf  # bytes per second; less than this will do within read_timeout only
        self._begin()

    def body(self) -> None:
        """What follows is a body."""
        self._least = self._policy.min_rate
        self._begin()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:  # noqa: ANN401  (mypy has no name for what is writable)
        count = self._raw.readinto(buffer) or 0
        self._done += count
        seconds = time.monotonic() - self._began
        if count and seconds > self._policy.read_timeout and self._done < seconds * self._least:
            raise _TooSlowError(f"{self._done} bytes in {seconds:.0f} s")
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()

    def _begin(self) -> None:
        self._began = time.monotonic()
        self._done = 0
