"""Connections to web servers: which are made, from where and to where, over what, and which are used again."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from servers import faultproxy, make_certificate, nginx
from servers.faultproxy import FaultProxy

from erofsgen.errors import RemoteError, UsageError
from erofsgen.oci.patience import Policy
from erofsgen.store.directory import DirectoryStore
from erofsgen.store.http import HttpStore
from erofsgen.store.transport import Location, Transport

pytestmark = [pytest.mark.server, pytest.mark.timeout(60)]

BLOB = random.Random(12).randbytes(1 << 20)
QUICK = Policy(attempts=2, backoff=0.01, read_timeout=2, connect_timeout=2)
NAME = "store.example"
"""A name that no resolver has, for :func:`resolve`."""

Open = Callable[..., HttpStore]


class Web:
    """What nginx serves, on loopback addresses and over TLS, and what it noted: who asked whom over what."""

    def __init__(self, root: Path, port: int, certificate: Path) -> None:
        self.root = root
        self.port = port
        self.tls_port = port + 1
        self.certificate = certificate
        self.url = f"http://127.0.0.1:{port}"
        self.digest, _ = DirectoryStore(root / "www", create=True).put(BLOB)
        self._seen = 0

    def reads(self, store: HttpStore, times: int = 1) -> None:
        for start in range(0, times * 5000, 5000):
            assert store.read(self.digest, start, 5000) == BLOB[start : start + 5000]

    def noted(self, count: int) -> list[list[str]]:
        """The next ``count`` requests: server's address, client's address, number of the connection, Authorization."""
        until = time.monotonic() + 5
        while True:
            lines = (self.root / "access").read_text().splitlines()[self._seen :]
            if len(lines) >= count or time.monotonic() > until:
                self._seen += len(lines)
                assert len(lines) == count, lines
                return [line.split("|") for line in lines]
            time.sleep(0.01)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_certificate(tmp_path_factory.mktemp("certificate"))


@pytest.fixture
def web(tmp_path: Path, certificate: tuple[Path, Path]) -> Iterator[Web]:
    root = tmp_path / "web"
    root.mkdir()

    def http(port: int) -> str:
        return f"""
            log_format told '$server_addr|$remote_addr|$connection|$http_authorization';
            keepalive_timeout 1s;
            server {{
                access_log {root}/access told;
                listen 127.0.0.1:{port}; listen 127.0.0.2:{port}; root {root}/www;
                location /password/ {{ auth_basic erofsgen; auth_basic_user_file {root}/users; alias {root}/www/; }}
            }}
            server {{
                access_log {root}/access told;
                listen 127.0.0.1:{port + 1} ssl; root {root}/www;
                ssl_certificate {certificate[0]}; ssl_certificate_key {certificate[1]};
            }}"""

    (root / "users").write_text("me:{PLAIN}secret\n")
    (root / "www").mkdir()
    with nginx.nginx(root / "nginx", http) as url:
        yield Web(root, int(url.rpartition(":")[2]), certificate[0])


@pytest.fixture
def proxy(web: Web) -> Iterator[FaultProxy]:
    with FaultProxy(web.url) as proxy:
        yield proxy


@pytest.fixture
def opened() -> Iterator[Open]:
    """Opens stores with little patience, and closes them."""
    stores: list[HttpStore] = []

    def make(url: str, *, policy: Policy = QUICK, **more: Any) -> HttpStore:
        stores.append(HttpStore(url, policy=policy, **more))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No proxies and no passwords but a test's own."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY", "SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


@pytest.fixture
def resolve(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Lets NAME have addresses. Returns what was asked for."""
    real = socket.getaddrinfo

    def have(*addresses: str) -> list[str]:
        asked: list[str] = []

        def fake(host: Any, port: Any, *rest: Any, **more: Any) -> Any:
            if host != NAME:
                return real(host, port, *rest, **more)
            asked.append(host)
            if not addresses:
                raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

        monkeypatch.setattr(socket, "getaddrinfo", fake)
        return asked

    return have


# --- used again, or not ----------------------------------------------------------------------------------------------


def test_one_reader_needs_one_connection(web: Web, proxy: FaultProxy, opened: Open) -> None:
    store = opened(proxy.url)
    web.reads(store, 20)
    assert store.size(web.digest) == len(BLOB)
    assert store.size(f"sha256:{'0' * 64}") is None
    assert proxy.accepted == 1


def test_readers_at_once_need_no_more_connections_than_there_are_readers(
    web: Web, proxy: FaultProxy, opened: Open
) -> None:
    store = opened(proxy.url)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: web.reads(store, 5), range(40)))
    assert proxy.accepted <= 8


@pytest.mark.parametrize(
    ("action", "connections"),
    [
        (faultproxy.status(503, b"busy"), 1),
        (faultproxy.status(503, bytes(200_000)), 2),
        (faultproxy.reset(), 2),
        (faultproxy.short(100), 2),
        (faultproxy.short_lie(1), 2),
        (faultproxy.long(100), 2),
        (faultproxy.other_range(100), 2),
        (faultproxy.gzip_encoded(), 2),
        (faultproxy.ignore_range, 2),
    ],
    ids=["an error", "a long error", "reset", "short", "short lie", "long", "other range", "gzip", "whole"],
)
def test_only_what_was_read_to_its_end_is_used_again(
    action: faultproxy.Action, connections: int, web: Web, proxy: FaultProxy, opened: Open
) -> None:
    proxy.fault("/blobs/", action)
    web.reads(opened(proxy.url), 3)
    assert proxy.accepted == connections


def test_a_connection_that_the_server_closed_is_replaced(web: Web, opened: Open) -> None:
    store = opened(web.url, policy=Policy(attempts=1))
    web.reads(store)
    time.sleep(1.3)  # nginx keeps connections for 1 s here
    web.reads(store)
    assert len({number for _, _, number, _ in web.noted(2)}) == 2


def test_a_connection_that_breaks_when_it_is_used_again_is_replaced(web: Web, proxy: FaultProxy, opened: Open) -> None:
    store = opened(proxy.url, policy=Policy(attempts=1))
    for action in (faultproxy.reset(), faultproxy.raw(b""), faultproxy.raw(b"garbage\r\n")):
        web.reads(store)
        proxy.fault("/blobs/", action)
        web.reads(store)
    proxy.fault("/blobs/", faultproxy.reset(), times=2)
    with pytest.raises(RemoteError, match="reset by peer"):  # a new one, too
        web.reads(store)


def test_nothing_is_left_open(web: Web, proxy: FaultProxy, opened: Open) -> None:
    def sockets() -> int:
        return sum(link.is_socket() for link in Path("/proc/self/fd").iterdir())

    store = opened(web.url)
    before = sockets()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: web.reads(store, 5), range(40)))
    assert sockets() > before
    store.close()
    assert sockets() == before


# --- redirects -------------------------------------------------------------------------------------------------------


def test_redirects_are_followed_once_and_remembered(web: Web, proxy: FaultProxy, opened: Open) -> None:
    proxy.fault("/blobs/", faultproxy.redirect(f"{web.url}/blobs/sha256/{web.digest[7:]}"), times=None)
    web.reads(opened(proxy.url), 4)
    assert len(proxy.requests) == 1
    assert len({number for _, _, number, _ in web.noted(4)}) == 1


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_relative_redirects(status: int, web: Web, proxy: FaultProxy, opened: Open) -> None:
    proxy.fault("^/old/", faultproxy.redirect(f"../../../blobs/sha256/{web.digest[7:]}#part", status))
    web.reads(opened(f"{proxy.url}/old"))
    assert [request.path.split("/")[1] for request in proxy.requests] == ["old", "blobs"]
    assert proxy.accepted == 1


@pytest.mark.parametrize(
    "action", [faultproxy.status(403), faultproxy.status(404), faultproxy.status(500), faultproxy.reset()]
)
def test_where_it_moved_to_is_forgotten_when_it_fails_there(
    action: faultproxy.Action, web: Web, proxy: FaultProxy, opened: Open
) -> None:
    with FaultProxy(web.url) as target:
        proxy.fault("/blobs/", faultproxy.redirect(f"{target.url}/blobs/sha256/{web.digest[7:]}"))
        store = opened(proxy.url)
        web.reads(store, 2)
        assert (len(proxy.requests), len(target.requests)) == (1, 2)
        target.fault("/blobs/", action, times=2)  # an idle connection that breaks is replaced at once
        web.reads(store)
        web.reads(store)
        assert [request.status for request in proxy.requests] == [307, 206, 206]


def test_redirects_in_a_circle(web: Web, proxy: FaultProxy, opened: Open) -> None:
    proxy.fault("/blobs/", faultproxy.redirect("?"), times=None)
    with pytest.raises(RemoteError, match="redirects more than 5 times"):
        web.reads(opened(proxy.url))
    assert len(proxy.requests) == 6


def test_passwords_go_to_no_other_server(web: Web, proxy: FaultProxy, tmp_path: Path, opened: Open) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password pass:word\n")
    proxy.fault("/blobs/", faultproxy.redirect(f"{web.url}/blobs/sha256/{web.digest[7:]}"), times=None)
    web.reads(opened(proxy.url), 2)
    assert proxy.requests[0].headers["Authorization"] == "Basic bWU6cGFzczp3b3Jk"
    assert [password for *_, password in web.noted(2)] == ["-", "-"]


# --- passwords -------------------------------------------------------------------------------------------------------


def test_passwords_of_netrc(web: Web, tmp_path: Path, opened: Open) -> None:
    with pytest.raises(RemoteError, match="answered 401") as caught:
        web.reads(opened(f"{web.url}/password"))
    assert caught.value.hint == "check the credentials and what they allow"
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password secret\n")
    web.reads(opened(f"{web.url}/password"))
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password wrong\n")
    with pytest.raises(RemoteError, match="answered 401"):
        web.reads(opened(f"{web.url}/password"))
    for broken in (b"machine", b"\xff\xfe"):
        (tmp_path / "netrc").write_bytes(broken)
        web.reads(opened(web.url))
    (tmp_path / "netrc").unlink()
    (tmp_path / "netrc").mkdir()
    web.reads(opened(web.url))


# --- addresses -------------------------------------------------------------------------------------------------------


def test_addresses_take_turns(web: Web, opened: Open, resolve: Callable[..., list[str]]) -> None:
    asked = resolve("127.0.0.1", "127.0.0.2")
    store = opened(f"http://{NAME}:{web.port}")
    barrier = threading.Barrier(4)

    def read(_: int) -> None:
        barrier.wait()
        assert store.read(web.digest, 0, len(BLOB)) == BLOB

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(read, range(4)))
    servers = [server for server, *_ in web.noted(4)]
    assert set(servers) == {"127.0.0.1", "127.0.0.2"}
    assert len(asked) <= 4
    web.reads(store)


def test_an_address_that_does_not_answer_is_passed_over(
    web: Web, opened: Open, resolve: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve("127.0.0.3", "127.0.0.2")
    store = opened(f"http://{NAME}:{web.port}", policy=Policy(attempts=1))
    web.reads(store)
    tried: list[str] = []
    connect = socket.create_connection
    monkeypatch.setattr(
        socket, "create_connection", lambda address, *rest: tried.append(address[0]) or connect(address, *rest)
    )
    barrier = threading.Barrier(8)

    def read(_: int) -> None:
        barrier.wait()
        assert store.read(web.digest, 0, len(BLOB)) == BLOB

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(read, range(8)))
    assert {server for server, *_ in web.noted(9)} == {"127.0.0.2"}
    assert set(tried) <= {"127.0.0.2"}


def test_no_address_answers(web: Web, opened: Open, resolve: Callable[..., list[str]]) -> None:
    resolve("127.0.0.3", "127.0.0.4")
    with pytest.raises(RemoteError, match=f"^cannot reach {NAME}:{web.port}: Connection refused"):
        web.reads(opened(f"http://{NAME}:{web.port}"))


def test_names_that_cannot_be_resolved(web: Web, opened: Open, resolve: Callable[..., list[str]]) -> None:
    asked = resolve()
    with pytest.raises(RemoteError, match=f"the name of {NAME}:{web.port} cannot be resolved: Temporary failure"):
        web.reads(opened(f"http://{NAME}:{web.port}"))
    assert len(asked) == QUICK.attempts
    with pytest.raises(RemoteError, match=r"the name of nowhere.invalid cannot be resolved"):
        web.reads(opened("http://nowhere.invalid"))


def test_flows_come_from_the_addresses_named(web: Web) -> None:
    def read(*sources: str) -> None:
        transport = Transport(policy=QUICK, sources=sources)
        barrier = threading.Barrier(4)

        def one(_: int) -> None:
            barrier.wait()
            buffer = bytearray(len(BLOB))
            location = Location(f"{web.url}/blobs/sha256/{web.digest[7:]}")
            transport.read_into(lambda _: location, 0, memoryview(buffer), "a blob")
            assert buffer == BLOB

        try:
            with ThreadPoolExecutor(4) as pool:
                list(pool.map(one, range(4)))
        finally:
            transport.close()

    read("127.0.0.5", "127.0.0.6")
    assert {client for _, client, *_ in web.noted(4)} == {"127.0.0.5", "127.0.0.6"}
    read("127.0.0.5", "192.0.2.1")  # which is none of ours
    assert {client for _, client, *_ in web.noted(4)} == {"127.0.0.5"}
    with pytest.raises(RemoteError, match=r"cannot reach .*: Cannot assign requested address"):
        read("192.0.2.1")


# --- proxies ---------------------------------------------------------------------------------------------------------


def test_a_tier_proxy_is_asked_for_everything(web: Web, tmp_path: Path, opened: Open) -> None:
    def http(port: int) -> str:
        return f"server {{ listen 127.0.0.1:{port}; location / {{ proxy_pass http://127.0.0.1:{web.port}; }} }}"

    with nginx.nginx(tmp_path / "nginx", http) as upstream, FaultProxy(upstream) as proxy:
        web.reads(opened(f"http://{NAME}/", proxy=proxy.url), 3)
        path = f"/blobs/sha256/{web.digest[7:]}"
        assert [request.path for request in proxy.requests] == [f"http://{NAME}{path}"] * 3
        assert {request.headers["Host"] for request in proxy.requests} == {NAME}
        assert proxy.accepted == 1
        web.reads(opened(f"https://{NAME}/", proxy=proxy.url.removeprefix("http://")))
        assert proxy.requests[-1].path == f"https://{NAME}{path}"


def test_proxies_of_the_environment(
    web: Web, proxy: FaultProxy, opened: Open, monkeypatch: pytest.MonkeyPatch, resolve: Callable[..., list[str]]
) -> None:
    monkeypatch.setenv("HTTP_PROXY", proxy.url.replace("//", "//me%40x:secret@"))
    web.reads(opened(f"http://{NAME}:{web.port}"))
    (request,) = proxy.requests
    assert request.path.startswith(f"http://{NAME}:{web.port}/blobs/")
    assert request.headers["Proxy-Authorization"] == "Basic bWVAeDpzZWNyZXQ="
    web.reads(opened(web.url))
    assert len(proxy.requests) == 1, "never for this machine"
    monkeypatch.setenv("NO_PROXY", NAME)
    resolve("127.0.0.1")
    web.reads(opened(f"http://{NAME}:{web.port}"))
    assert len(proxy.requests) == 1


@pytest.mark.parametrize("value", ["socks5://u:secret@127.0.0.1:1080", "http://127.0.0.1:99999"])
def test_proxies_that_are_none(value: str, web: Web, opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", value)
    with pytest.raises(UsageError, match="is not an HTTP proxy") as caught:
        web.reads(opened(f"http://{NAME}"))
    assert "secret" not in str(caught.value)


@contextmanager
def tunnels(to: int, answer: bytes = b"HTTP/1.1 200 OK\r\n\r\n") -> Iterator[tuple[str, list[bytes]]]:
    """A proxy that takes one connection at a time and connects each to a port here, whatever it asks for."""
    heads: list[bytes] = []

    def pump(source: socket.socket, target: socket.socket) -> None:
        while data := source.recv(1 << 16):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)

    def serve() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            with client, socket.create_connection(("127.0.0.1", to)) as server:
                head = b""
                while b"\r\n\r\n" not in head:
                    head += client.recv(1)
                heads.append(head)
                client.sendall(answer)
                back = threading.Thread(target=pump, args=(server, client))
                back.start()
                pump(client, server)
                back.join()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}", heads
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def test_https_goes_through_a_proxy_of_the_environment(web: Web, opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    with tunnels(web.tls_port) as (url, heads):
        monkeypatch.setenv("HTTPS_PROXY", url.replace("//", "//me:secret@"))
        store = opened(f"https://{NAME}", tls_verify=False)
        web.reads(store, 3)
        store.close()
    (head,) = heads
    assert head.startswith(f"CONNECT {NAME}:443 HTTP/1.".encode())
    assert b"Proxy-Authorization: Basic bWU6c2VjcmV0\r\n" in head


def test_a_proxy_that_makes_no_tunnel(web: Web, opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    with tunnels(web.tls_port, b"HTTP/1.1 403 Forbidden\r\n\r\n") as (url, _):
        monkeypatch.setenv("HTTPS_PROXY", url)
        with pytest.raises(RemoteError, match=r"cannot reach store\.example: Tunnel connection failed: 403 Forbidden"):
            web.reads(opened(f"https://{NAME}"))


# --- TLS -------------------------------------------------------------------------------------------------------------


def test_tls(web: Web, opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(web.certificate))
    store = opened(f"https://localhost:{web.tls_port}", policy=Policy(attempts=1))
    web.reads(store, 5)
    assert len({number for _, _, number, _ in web.noted(5)}) == 1
    time.sleep(1.3)
    web.reads(store)


def test_a_certificate_that_is_not_trusted(web: Web, opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    accepted: list[Any] = []
    connect = socket.create_connection
    monkeypatch.setattr(socket, "create_connection", lambda *rest: accepted.append(rest) or connect(*rest))
    with pytest.raises(RemoteError, match=f"^the certificate of localhost:{web.tls_port} is not trusted: self-signed"):
        web.reads(opened(f"https://localhost:{web.tls_port}"))
    assert len(accepted) == 1, "it is not tried again"
    web.reads(opened(f"https://localhost:{web.tls_port}", tls_verify=False))


def test_a_certificate_of_another_name(
    web: Web, opened: Open, monkeypatch: pytest.MonkeyPatch, resolve: Callable[..., list[str]]
) -> None:
    resolve("127.0.0.1")
    monkeypatch.setenv("SSL_CERT_FILE", str(web.certificate))
    with pytest.raises(RemoteError, match=f"{NAME}:{web.tls_port} is not trusted: Hostname mismatch"):
        web.reads(opened(f"https://{NAME}:{web.tls_port}"))


def test_tls_where_there_is_none(web: Web, opened: Open) -> None:
    with pytest.raises(RemoteError, match=f"^cannot reach localhost:{web.port}: .*SSL"):
        web.reads(opened(f"https://localhost:{web.port}"))


@pytest.mark.parametrize("scheme", ["http", "HTTP"])
def test_no_way_leads_from_https_to_http(
    scheme: str,
    web: Web,
    certificate: tuple[Path, Path],
    tmp_path: Path,
    opened: Open,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(web.certificate))

    def http(port: int) -> str:
        return (
            f"server {{ listen 127.0.0.1:{port} ssl; ssl_certificate {web.certificate};"
            f" ssl_certificate_key {certificate[1]}; location / {{ return 302 {scheme}://{web.url[7:]}/; }} }}"
        )

    with nginx.nginx(tmp_path / "nginx", http) as url:
        store = opened(url.replace("http:", "https:"))
        with pytest.raises(RemoteError, match="redirects from HTTPS to plain HTTP"):
            web.reads(store)


def test_from_http_to_https(web: Web, proxy: FaultProxy, opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(web.certificate))
    target = f"https://localhost:{web.tls_port}/blobs/sha256/{web.digest[7:]}"
    proxy.fault("/blobs/", faultproxy.redirect(target), times=None)
    web.reads(opened(proxy.url), 2)


def test_close_wakes_who_waits_for_a_handshake(web: Web, opened: Open) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        store = opened(f"https://127.0.0.1:{listener.getsockname()[1]}", policy=Policy(), tls_verify=False)
        with ThreadPoolExecutor(1) as pool:
            reader = pool.submit(web.reads, store)
            connection, _ = listener.accept()
            with connection:
                began = time.monotonic()
                connection.recv(1)  # the client has begun
                store.close()
                with pytest.raises(RemoteError):
                    reader.result(5)
                assert time.monotonic() - began < 3
