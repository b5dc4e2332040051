"""A registry in this process that behaves, but for the faults it was given."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes = b""


Action = Callable[["Handler"], None]
R = TypeVar("R", bound="FaultyRegistry")


@dataclass
class Fault:
    """``action`` answers the next ``times`` requests whose path matches ``pattern``."""

    pattern: str
    action: Action
    times: int = 1


@dataclass
class FaultyRegistry:
    """A registry in this process. It behaves, but for its ``faults``, and remembers every request."""

    host: str = ""
    manifests: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    tokens: set[str] | None = None
    """The bearer tokens that are good; None lets everybody in."""
    refusal: int = 401
    """The status for a token that was good once."""
    issued: int = 0
    expires_in: int = 300
    lock: threading.Lock = field(default_factory=threading.Lock)
    closing: threading.Event = field(default_factory=threading.Event)
    """Set when the server stops; whoever dawdles waits for it."""

    def fault(self, pattern: str, action: Action, times: int = 1) -> None:
        self.faults.append(Fault(pattern, action, times))

    def add_image(self, *layers: bytes, tag: str = "latest", **descriptor: Any) -> str:
        """An image with these uncompressed layers; ``descriptor`` adds to each layer's descriptor. Its digest."""
        config = json.dumps(
            {
                "architecture": "amd64",
                "os": "linux",
                "rootfs": {"type": "layers", "diff_ids": list(map(digest_of, layers))},
            }
        ).encode()
        for data in (config, *layers):
            self.blobs[digest_of(data)] = data

        def describe(data: bytes, media_type: str, **more: Any) -> dict[str, Any]:
            return {"mediaType": media_type, "digest": digest_of(data), "size": len(data), **more}

        manifest = {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": describe(config, OCI_CONFIG),
            "layers": [describe(data, OCI_LAYER, **descriptor) for data in layers],
        }
        return self.add_manifest(manifest, tag)

    def add_manifest(self, document: dict[str, Any] | bytes, tag: str, media_type: str = OCI_MANIFEST) -> str:
        data = document if isinstance(document, bytes) else json.dumps(document).encode()
        self.manifests[tag] = self.manifests[digest_of(data)] = media_type, data
        return digest_of(data)

    def expire_tokens(self) -> None:
        assert self.tokens is not None
        self.tokens.clear()

    def seen(self, pattern: str) -> list[Request]:
        return [request for request in self.requests if re.search(pattern, request.path)]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 10
    registry: FaultyRegistry

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        registry = self.registry
        self.received = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        with registry.lock:
            registry.requests.append(Request(self.command, self.path, dict(self.headers), self.received))
            fault = next(
                (fault for fault in registry.faults if fault.times and re.search(fault.pattern, self.path)), None
            )
            if fault:
                fault.times -= 1
        with contextlib.suppress(OSError):
            if fault:
                fault.action(self)
            else:
                self.behave()

    do_POST = do_GET  # noqa: N815

    def behave(self, *, ranges: bool = True) -> None:
        """Answer as a good registry does."""
        registry = self.registry
        if self.path.startswith("/token"):
            with registry.lock:
                registry.issued += 1
                token = f"token-{registry.issued}"
                if registry.tokens is not None:
                    registry.tokens.add(token)
            self.answer(json.dumps({"token": token, "expires_in": registry.expires_in}).encode())
            return
        if registry.tokens is not None and not self._let_in():
            return
        name = self.path.rpartition("/")[2]
        if "/manifests/" in self.path and name in registry.manifests:
            media_type, data = registry.manifests[name]
            self.answer(data, headers={"Content-Type": media_type, "Docker-Content-Digest": digest_of(data)})
        elif "/blobs/" in self.path and name in registry.blobs:
            self._send_blob(registry.blobs[name], ranges=ranges)
        elif self.path == "/v2/":
            self.answer(b"{}")
        else:
            self.answer(b'{"errors":[{"code":"UNKNOWN","message":"unknown to registry"}]}', 404)

    def answer(self, data: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def start(self, status: int = 200, **headers: str) -> None:
        """Headers only, for a body of one's own. The connection is closed behind it."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.close_connection = True

    def _let_in(self) -> bool:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token in (self.registry.tokens or ()):
            return True
        if token and self.registry.refusal != 401:
            message = b'{"errors":[{"code":"DENIED","message":"Your authorization token has expired."}]}'
            self.answer(message, self.registry.refusal)
            return False
        repository = self.path.removeprefix("/v2/").partition("/manifests/")[0].partition("/blobs/")[0]
        challenge = (
            f'Bearer realm="http://{self.registry.host}/token",service="faulty",scope="repository:{repository}:pull"'
        )
        self.answer(b"", 401, {"WWW-Authenticate": challenge})
        return False

    def _send_blob(self, data: bytes, *, ranges: bool) -> None:
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if not match or not ranges:
            self.answer(data)
        elif int(match[1]) >= len(data):
            self.answer(b"", 416, {"Content-Range": f"bytes */{len(data)}"})
        else:
            start = int(match[1])
            self.answer(data[start:], 206, {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"})


@contextlib.contextmanager
def serving(registry: R, handler_type: type[Handler], certificate: tuple[Path, Path] | None = None) -> Iterator[R]:
    """``registry``, with requests answered by ``handler_type``."""
    handler = type("BoundHandler", (handler_type,), {"registry": registry})

    class Server(ThreadingHTTPServer):
        daemon_threads = False  # server_close waits for them: nothing of one test runs into the next

        def handle_error(self, request: Any, client_address: Any) -> None:
            """Clients that hang up are part of the tests."""

    with Server(("127.0.0.1", 0), handler) as server:
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*certificate)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        registry.host = f"localhost:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield registry
        finally:
            registry.closing.set()
            server.shutdown()
            thread.join()


def faulty_registry(
    certificate: tuple[Path, Path] | None = None,
) -> contextlib.AbstractContextManager[FaultyRegistry]:
    return serving(FaultyRegistry(), Handler, certificate)


# --- faults ----------------------------------------------------------------------------------------------------------


def status(code: int, body: bytes = b"", **headers: str) -> Action:
    """Answer with this status."""
    return lambda handler: handler.answer(
        body, code, {name.replace("_", "-"): value for name, value in headers.items()}
    )


def cut(count: int) -> Action:
    """Break the connection ``count`` bytes into a body that was announced in full, ranges included."""

    def action(handler: Handler) -> None:
        def write(data: bytes, plain: Callable[[bytes], Any] = handler.wfile.write) -> None:
            if data.startswith(b"HTTP/"):
                plain(data)
            else:
                plain(data[:count])
                handler.wfile.flush()
                handler.connection.shutdown(socket.SHUT_RDWR)

        handler.wfile = _Writer(handler.wfile, write)
        handler.behave()
        handler.close_connection = True

    return action


class _Writer:
    def __init__(self, file: Any, write: Callable[[bytes], Any]) -> None:
        self._file = file
        self.write = write

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def body(data: bytes, **headers: str) -> Action:
    """These bytes instead of the right ones, with their own length unless ``headers`` say otherwise."""

    def action(handler: Handler) -> None:
        handler.start(**{"Content_Length": str(len(data)), **headers})
        handler.wfile.write(data)

    return action


def chunked(*pieces: bytes) -> Action:
    """A body without an announced length, properly ended."""

    def action(handler: Handler) -> None:
        handler.start(Transfer_Encoding="chunked")
        for piece in pieces:
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        handler.wfile.write(b"0\r\n\r\n")

    return action


def endless(piece: bytes, **headers: str) -> Action:
    """A body that never ends, in chunks."""

    def action(handler: Handler) -> None:
        handler.start(Transfer_Encoding="chunked", **headers)
        while True:
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))

    return action


def silent(seconds: float) -> Action:
    """No answer for a while, then a broken connection."""

    def action(handler: Handler) -> None:
        handler.registry.closing.wait(seconds)
        handler.close_connection = True

    return action


def redirect(url: str, code: int = 307) -> Action:
    return status(code, Location=url)


def ignore_range(handler: Handler) -> None:
    handler.behave(ranges=False)
