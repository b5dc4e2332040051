"""Reading from web servers that misbehave: nginx behind a proxy that injects one fault per test."""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from servers import faultproxy, nginx
from servers.exchange import Exchange
from servers.faultproxy import Action, FaultProxy

from erofsgen.errors import ErofsgenError, IntegrityError, NotFoundError, RemoteError, UsageError
from erofsgen.oci.patience import Policy
from erofsgen.store.directory import DirectoryStore
from erofsgen.store.http import HttpStore
from erofsgen.store.open import open_store

pytestmark = [pytest.mark.server, pytest.mark.timeout(60)]

BLOB = random.Random(11).randbytes(3 << 20)
START, LENGTH = 100_000, 50_000
QUICK = Policy(attempts=3, backoff=0.01, max_backoff=0.02, read_timeout=0.5, connect_timeout=2)

Open = Callable[..., HttpStore]


class Site:
    """A store that nginx serves, and the blob in it."""

    def __init__(self, server: nginx.StaticServer) -> None:
        self.url = server.url
        self.store = DirectoryStore(server.directory, create=True)
        self.digest, _ = self.store.put(BLOB)

    def reads(self, store: HttpStore, start: int = START, length: int = LENGTH) -> None:
        """The right bytes, or what reading raises."""
        assert store.read(self.digest, start, length) == BLOB[start : start + length]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    root = tmp_path_factory.mktemp("site")
    (root / "www").mkdir()
    with nginx.nginx(root / "nginx", nginx.static_files(root / "www")) as url:
        yield Site(nginx.StaticServer(url, root / "www"))


@pytest.fixture
def proxy(site: Site) -> Iterator[FaultProxy]:
    with FaultProxy(site.url) as proxy:
        yield proxy


@pytest.fixture
def opened() -> Iterator[Open]:
    """Opens stores with little patience, and closes them."""
    stores: list[HttpStore] = []

    def make(url: str, *, policy: Policy = QUICK, **more: bool | str) -> HttpStore:
        stores.append(HttpStore(url, policy=policy, **more))  # type: ignore[arg-type]
        return stores[-1]

    yield make
    for store in stores:
        store.close()


@pytest.fixture
def store(proxy: FaultProxy, opened: Open) -> HttpStore:
    return opened(proxy.url)


def statuses(proxy: FaultProxy) -> list[int | None]:
    return [request.status for request in proxy.requests]


# --- one fault, one test ---------------------------------------------------------------------------------------------

PASSING: dict[str, tuple[Action, str]] = {
    "reset": (faultproxy.reset(), "cannot reach HOST: Connection reset by peer"),
    "closed": (faultproxy.raw(b""), "cannot reach HOST: Remote end closed connection without response"),
    "no answer in time": (faultproxy.silent(5), "no answer from HOST for WHAT in time"),
    "408": (faultproxy.status(408), "HOST answered 408 for WHAT"),
    "425": (faultproxy.status(425), "HOST answered 425 for WHAT"),
    "429": (faultproxy.status(429), "HOST answered 429 for WHAT"),
    "429 with Retry-After": (faultproxy.status(429, Retry_After="0"), "HOST answered 429 for WHAT"),
    "500": (faultproxy.status(500, b"<b>oops</b>\n\x1b[31m"), r"HOST answered 500 for WHAT: oops \[31m"),
    "502": (faultproxy.status(502), "HOST answered 502 for WHAT"),
    "503": (faultproxy.status(503), "HOST answered 503 for WHAT"),
    "503 with Retry-After": (
        faultproxy.status(503, Retry_After="Mon, 01 Jan 2001 00:00:00 GMT"),
        "HOST answered 503 for WHAT",
    ),
    "too few bytes": (faultproxy.short(20_000), "HOST: WHAT ended after 20000 of 50000 bytes"),
    "no byte": (faultproxy.short(0), "HOST: WHAT ended after 0 of 50000 bytes"),
    "too few bytes, announced": (faultproxy.short_lie(9), "HOST sends 49991 bytes of WHAT, 50000 expected"),
    "too many bytes": (faultproxy.long(5), "HOST sends 50005 bytes of WHAT, 50000 expected"),
    "another range": (
        faultproxy.other_range(4096),
        "HOST answers with another range of WHAT: bytes 104096-154095/3145728",
    ),
    "gzip": (faultproxy.gzip_encoded(), "HOST compressed WHAT, which was not asked for"),
    "slow drip": (faultproxy.drip(20, 0.05), "HOST is too slow: [0-9]+ bytes in [01] s of WHAT"),
    "half a head": (faultproxy.raw(b"HTTP/1.1 206 Par"), "HOST answers with another range of WHAT: none"),
    "no HTTP": (faultproxy.raw(b"SSH-2.0-OpenSSH_9.2\r\n"), "HOST does not speak HTTP properly: BadStatusLine SSH-2"),
    "zeros": (faultproxy.raw(bytes(100_000)), "HOST does not speak HTTP properly: LineTooLong"),
    "too many headers": (
        faultproxy.raw(b"HTTP/1.1 206 OK\r\n" + b"X: y\r\n" * 5000 + b"\r\n"),
        "HOST does not speak HTTP properly: HTTPException got more than 100 headers",
    ),
    "a header without end": (
        faultproxy.raw(b"HTTP/1.1 206 OK\r\nX: " + b"y" * 1_000_000 + b"\r\n\r\n"),
        "HOST does not speak HTTP properly: LineTooLong",
    ),
    "a broken chunk": (
        faultproxy.raw(
            b"HTTP/1.1 206 OK\r\nContent-Range: bytes 100000-149999/3145728\r\n"
            b"Transfer-Encoding: chunked\r\n\r\nzzz\r\n"
        ),
        "HOST does not speak HTTP properly: IncompleteRead",
    ),
    "a cut chunk": (
        faultproxy.raw(
            b"HTTP/1.1 206 OK\r\nContent-Range: bytes 100000-149999/3145728\r\n"
            b"Transfer-Encoding: chunked\r\n\r\nfff\r\nabc"
        ),
        "HOST does not speak HTTP properly: IncompleteRead",
    ),
    "several ranges": (
        faultproxy.raw(
            b"HTTP/1.1 206 OK\r\nContent-Type: multipart/byteranges; boundary=x\r\nContent-Length: 5\r\n\r\n--x--"
        ),
        "HOST answers with another range of WHAT: none",
    ),
}

LASTING: dict[str, tuple[Action, type[ErofsgenError], str, int]] = {
    "401": (faultproxy.status(401), RemoteError, "HOST answered 401 for WHAT", 2),
    "403": (faultproxy.status(403, b"no"), RemoteError, "HOST answered 403 for WHAT: no", 2),
    "404": (faultproxy.status(404), NotFoundError, "HOST has no WHAT", 1),
    "410": (faultproxy.status(410), NotFoundError, "HOST has no WHAT", 1),
    "405": (faultproxy.status(405), RemoteError, "HOST answered 405 for WHAT", 1),
    "416": (faultproxy.status(416), IntegrityError, "HOST: WHAT ends before byte 150000", 1),
    "204": (faultproxy.status(204), RemoteError, "HOST answered 204 for WHAT", 1),
    "a redirect to nowhere": (faultproxy.status(302), RemoteError, "HOST answered 302 for WHAT", 1),
    "a redirect to a file": (
        faultproxy.redirect("file:///etc/passwd"), RemoteError,
        "HOST redirects to 'file:///etc/passwd', which is no URL of the web", 1,
    ),
    "a redirect to no URL": (
        faultproxy.redirect("http://[::1"), RemoteError, "HOST redirects to 'http://.::1', which is no URL", 1,
    ),
    "a redirect to no port": (
        faultproxy.redirect("http://localhost:99999/"), RemoteError, "HOST redirects to .* which is no URL", 1,
    ),
    "a redirect to no name": (
        faultproxy.redirect(f"http://{'x' * 70}/"), RemoteError, "'x{70}' is not the name of a host", 1,
    ),
    "Retry-After in an hour": (faultproxy.status(503, Retry_After="3600"), RemoteError, "HOST answered 503", 1),
    "a shorter blob": (
        faultproxy.raw(b"HTTP/1.1 206 OK\r\nContent-Range: bytes 100000-100003/100004\r\nContent-Length: 4\r\n\r\n"),
        IntegrityError, "HOST: WHAT is 100004 bytes, 150000 expected", 1,
    ),
    "all of a shorter blob": (
        faultproxy.raw(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nabcd"),
        IntegrityError, "HOST: WHAT is 4 bytes, 150000 expected", 1,
    ),
}  # fmt: skip


def wording(pattern: str, proxy: FaultProxy, site: Site) -> str:
    host = re.escape(proxy.url.removeprefix("http://"))
    return "^" + pattern.replace("HOST", host).replace("WHAT", f"blob {site.digest}")


@pytest.mark.parametrize("fault", PASSING)
def test_a_fault_that_passes_is_not_noticed(fault: str, site: Site, proxy: FaultProxy, store: HttpStore) -> None:
    proxy.fault("/blobs/", PASSING[fault][0])
    site.reads(store)
    assert len(proxy.requests) == 2
    assert statuses(proxy)[1] == 206


@pytest.mark.parametrize("fault", PASSING)
def test_a_fault_that_stays_is_told_in_one_line(fault: str, site: Site, proxy: FaultProxy, store: HttpStore) -> None:
    action, pattern = PASSING[fault]
    proxy.fault("/blobs/", action, times=None)
    with pytest.raises(RemoteError, match=wording(pattern, proxy, site)) as caught:
        site.reads(store)
    assert str(caught.value).isprintable()
    assert len(proxy.requests) == QUICK.attempts
    proxy.faults.clear()
    site.reads(store)


@pytest.mark.parametrize("fault", LASTING)
def test_what_does_not_pass_is_not_tried_again(fault: str, site: Site, proxy: FaultProxy, store: HttpStore) -> None:
    action, kind, pattern, requests = LASTING[fault]
    proxy.fault("/blobs/", action, times=None)
    with pytest.raises(kind, match=wording(pattern, proxy, site)):
        site.reads(store)
    assert len(proxy.requests) == requests
    proxy.faults.clear()
    site.reads(store)


def test_credentials_are_looked_at_where_they_are_refused(site: Site, proxy: FaultProxy, store: HttpStore) -> None:
    proxy.fault("/blobs/", faultproxy.status(403), times=None)
    with pytest.raises(RemoteError) as caught:
        site.reads(store)
    assert caught.value.hint == "check the credentials and what they allow"


def test_a_server_is_asked_again_when_it_said(site: Site, proxy: FaultProxy, store: HttpStore) -> None:
    proxy.fault("/blobs/", faultproxy.status(503, Retry_After="1"))
    site.reads(store)
    first, second = proxy.requests
    assert 1 <= second.time - first.time < 2


# --- answers that are right in another way ---------------------------------------------------------------------------


def test_a_server_that_ignores_ranges_is_read_up_to_the_range(site: Site, proxy: FaultProxy, store: HttpStore) -> None:
    proxy.fault("/blobs/", faultproxy.ignore_range, times=None)
    site.reads(store, 0, 10)
    site.reads(store, START, LENGTH)
    site.reads(store, len(BLOB) - 7, 7)
    assert statuses(proxy) == [200] * 3


def test_what_lies_far_in_is_not_read_over_a_server_that_ignores_ranges(
    site: Site, proxy: FaultProxy, store: HttpStore
) -> None:
    digest, _ = site.store.put(bytes(6 << 20))
    proxy.fault("/blobs/", faultproxy.ignore_range, times=None)
    with pytest.raises(RemoteError, match="ignores ranges"):
        store.read(digest, 5 << 20, 10)


def answering(head: bytes, encode: Callable[[bytes], bytes] = bytes, *, keep: bool = False) -> Action:
    """Reads the range asked for off the request and answers it by hand."""

    def action(exchange: Exchange) -> None:
        first, last = map(int, exchange.head.headers["Range"].removeprefix("bytes=").split("-"))
        body = BLOB[first : last + 1]
        words = {b"FIRST": first, b"LAST": last, b"LENGTH": len(body), b"TOTAL": len(BLOB)}
        said = head
        for word, number in words.items():
            said = said.replace(word, b"%d" % number)
        faultproxy.raw(said + encode(body), keep=keep)(exchange)

    return action


def chunks(body: bytes) -> bytes:
    pieces = [body[start : start + 7001] for start in range(0, len(body), 7001)]
    return b"".join(b"%x;why=not\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\nTrailer: x\r\n\r\n"


RANGE = b"Content-Range: bytes FIRST-LAST/TOTAL\r\n"
LENGTHY = b"Content-Length: LENGTH\r\n"


@pytest.mark.parametrize(
    "action",
    [
        answering(b"HTTP/1.1 206 Partial Content\r\n" + RANGE + b"Transfer-Encoding: chunked\r\n\r\n", chunks),
        answering(b"HTTP/1.1 206 Partial Content\r\n" + RANGE + b"\r\n"),
        answering(b"HTTP/1.0 206 Partial Content\r\n" + RANGE + LENGTHY + b"\r\n"),
        answering(b"HTTP/1.0 206 Partial Content\r\n" + RANGE + b"\r\n"),
        answering(b"HTTP/1.1 206\r\nContent-Range: bytes FIRST-LAST/*\r\n" + LENGTHY + b"\r\n", keep=True),
        answering(b"HTTP/1.1 206 OK\r\n" + RANGE + LENGTHY + b"Content-Encoding: identity\r\n\r\n", keep=True),
        answering(
            b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"
            b"HTTP/1.1 206 Partial Content\r\n" + RANGE + LENGTHY + b"\r\n",
            keep=True,
        ),
    ],
    ids=["chunked", "up to the end", "HTTP/1.0", "HTTP/1.0 up to the end", "no total", "identity", "1xx"],
)
def test_other_right_answers(action: Action, site: Site, proxy: FaultProxy, store: HttpStore) -> None:
    proxy.fault("/blobs/", action, times=3)
    for start in (0, START, len(BLOB) - LENGTH):
        site.reads(store, start)
    assert len(proxy.requests) == 3
    site.reads(store)


def test_bytes_behind_an_answer_are_of_no_other(site: Site, proxy: FaultProxy, store: HttpStore) -> None:
    """More than was announced, here a second answer that looks right but for what it holds."""
    head = b"HTTP/1.1 206 OK\r\n" + RANGE + LENGTHY + b"\r\n"
    surplus = head.replace(b"LENGTH", b"50000") + bytes(50_000)
    proxy.fault("/blobs/", answering(head, lambda body: body + surplus, keep=True), times=1)
    for _ in range(3):
        site.reads(store)
    assert proxy.accepted == 2


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    first=st.sampled_from([0, START - 1, START, START + 1]),
    last=st.sampled_from([START, START + LENGTH - 2, START + LENGTH - 1, START + LENGTH, len(BLOB) - 1]),
    total=st.sampled_from(["*", "0", "150000", "149999", str(len(BLOB)), "-1", "²"]),
    announced=st.booleans(),
    form=st.sampled_from(
        ["bytes {}-{}/{}", "bytes={}-{}/{}", "bytes {} - {}/{}", " bytes {}-{}/{} ", "octets {}-{}/{}"]
    ),
)
def test_no_content_range_makes_wrong_bytes(
    first: int, last: int, total: str, announced: bool, form: str, site: Site, proxy: FaultProxy, opened: Open
) -> None:
    body = BLOB[first : last + 1]
    head = f"HTTP/1.1 206 OK\r\nContent-Range: {form.format(first, last, total)}\r\n"
    if announced:
        head += f"Content-Length: {len(body)}\r\n"
    proxy.faults.clear()
    proxy.fault("/blobs/", faultproxy.raw(f"{head}\r\n".encode("latin-1") + body), times=None)
    right = (first, last) == (START, START + LENGTH - 1) and form.strip().startswith("bytes {}-")
    try:
        site.reads(opened(proxy.url, policy=Policy(attempts=1)))
    except (RemoteError, IntegrityError):
        assert not right or total in ("-1", "²")
    else:
        assert right


# --- other questions -------------------------------------------------------------------------------------------------


def test_the_size_of_a_blob(site: Site, proxy: FaultProxy, store: HttpStore) -> None:
    proxy.fault("/blobs/", faultproxy.status(500))
    assert store.size(site.digest) == len(BLOB)
    assert store.size(f"sha256:{'0' * 64}") is None
    proxy.fault("/blobs/", faultproxy.raw(b"HTTP/1.1 200 OK\r\n\r\n"))
    with pytest.raises(RemoteError, match="does not say how long"):
        store.size(site.digest)
    proxy.fault("/blobs/", faultproxy.raw("HTTP/1.1 200 OK\r\nContent-Length: ²\r\n\r\n".encode("latin-1")))
    with pytest.raises(RemoteError, match="does not say how long"):
        store.size(site.digest)
    proxy.fault("/blobs/", faultproxy.raw(b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 5\r\n\r\n"))
    assert store.size(site.digest) == len(BLOB)


@pytest.mark.parametrize(
    ("action", "kind", "pattern"),
    [
        (faultproxy.raw(b"HTTP/1.1 200 OK\r\n\r\n" + bytes(70 << 20)), RemoteError, "sent more than [0-9]+ bytes as"),
        (faultproxy.status(416, b"{}"), RemoteError, "answered 416 for index.json: {}"),
        (faultproxy.status(206, b"{}"), RemoteError, "answered 206 for index.json: {}"),
        (faultproxy.short(3), RemoteError, "index.json ended after 3 bytes"),
        (faultproxy.drip(1, 0.04), RemoteError, "is too slow: [0-9]+ bytes in [01] s of index.json"),
        (faultproxy.status(200, b"[1, 2"), ErofsgenError, "index.json"),
    ],
    ids=["endless", "416", "206", "short", "slow", "no JSON"],
)
def test_documents(
    action: Action, kind: type[ErofsgenError], pattern: str, site: Site, proxy: FaultProxy, store: HttpStore
) -> None:
    proxy.fault("/index.json", action, times=None)
    with pytest.raises(kind, match=pattern):
        store.references()
    proxy.faults.clear()
    assert store.references() == {}


def test_an_endless_trickle_in_chunks_is_ended(site: Site, proxy: FaultProxy, store: HttpStore) -> None:
    def trickle(exchange: Exchange) -> None:
        exchange.client.send(
            b"HTTP/1.1 206 OK\r\nContent-Range: bytes 100000-149999/3145728\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        while not exchange.proxy.closing.wait(0.05):
            exchange.client.send(b"1\r\nx\r\n")
        exchange.keep = False

    proxy.fault("/blobs/", trickle)
    began = time.monotonic()
    site.reads(store)
    assert time.monotonic() - began < 3


def test_a_head_that_trickles_is_ended(site: Site, proxy: FaultProxy, store: HttpStore) -> None:
    def trickle(exchange: Exchange) -> None:
        exchange.client.send(b"HTTP/1.1 206 OK\r\n")
        while not exchange.proxy.closing.wait(0.05):
            exchange.client.send(b"X: y\r\n")
        exchange.keep = False

    proxy.fault("/blobs/", trickle)
    began = time.monotonic()
    site.reads(store)
    assert time.monotonic() - began < 3


# --- many at once, and the end ---------------------------------------------------------------------------------------


def test_many_readers_over_a_bad_line_never_get_wrong_bytes(site: Site, proxy: FaultProxy, opened: Open) -> None:
    chance = random.Random(5)
    faults = [
        faultproxy.reset(), faultproxy.status(500), faultproxy.status(503, Retry_After="0"), faultproxy.short(100),
        faultproxy.short_lie(1), faultproxy.long(77), faultproxy.other_range(512), faultproxy.ignore_range,
        faultproxy.gzip_encoded(), faultproxy.raw(b"HTTP/1.1 206 OK\r\n\r\nhello"), faultproxy.delay(0.05),
    ]  # fmt: skip

    def chaos(exchange: Exchange) -> None:
        (chance.choice(faults) if chance.random() < 0.3 else Exchange.relay)(exchange)

    proxy.fault("/blobs/", chaos, times=None)
    store = opened(proxy.url, policy=Policy(attempts=30, backoff=0.001, max_backoff=0.01, read_timeout=10))
    ranges = [(chance.randrange(len(BLOB) - 9000), chance.randrange(1, 9000)) for _ in range(640)]
    with ThreadPoolExecutor(64) as pool:
        list(pool.map(lambda at: site.reads(store, *at), ranges))
    assert len(proxy.requests) > 640


def test_close_wakes_readers(site: Site, proxy: FaultProxy, opened: Open) -> None:
    for action in (
        faultproxy.silent(30),
        faultproxy.drip(1, 0.2),
        answering(b"HTTP/1.0 206 OK\r\n" + RANGE + LENGTHY + b"\r\n", lambda body: body[:9], keep=True),
    ):
        store = opened(proxy.url, policy=Policy(attempts=3, read_timeout=30))
        proxy.faults.clear()
        proxy.fault("/blobs/", action, times=None)
        with ThreadPoolExecutor(4) as pool:
            before = len(proxy.requests)
            readers = [pool.submit(site.reads, store) for _ in range(4)]
            while len(proxy.requests) < before + 4:
                time.sleep(0.01)
            began = time.monotonic()
            store.close()
            for reader in readers:
                with pytest.raises(RemoteError, match=r"given up|ended after|cannot reach"):
                    reader.result(5)
            assert time.monotonic() - began < 2
        with pytest.raises(RemoteError, match="given up"):
            site.reads(store)
        for link in list(proxy._links):
            link.stop()


def test_a_closed_store_does_not_wait_for_its_pause(site: Site, proxy: FaultProxy, opened: Open) -> None:
    store = opened(proxy.url, policy=Policy(backoff=60, max_backoff=60))
    proxy.fault("/blobs/", faultproxy.status(500), times=None)
    threading.Timer(0.3, store.close).start()
    began = time.monotonic()
    with pytest.raises(RemoteError, match="given up"):
        site.reads(store)
    assert time.monotonic() - began < 5


def test_the_speed_of_a_store_is_measured(site: Site, proxy: FaultProxy, store: HttpStore) -> None:
    proxy.latency, proxy.rate = 0.05, 8e6
    site.reads(store, 0, 100)
    assert store.speed is None, "a hundred bytes say nothing about bandwidth"
    for start in range(4):
        site.reads(store, start << 19, 1 << 19)
    assert store.speed is not None
    assert 0.05 <= store.speed.latency < 0.12
    assert 4e6 < store.speed.bandwidth < 16e6


@pytest.mark.parametrize(
    ("url", "pattern"),
    [
        ("http://localhost:99999/x", "not a URL"),
        ("http://[::1/x", "not a URL"),
        ("http:///x", "not a URL"),
        ("http://me:secret@localhost/x", "^localhost: a store's URL has no password in it"),
        ("http://localhost/x?proxy=1", "unknown option"),
    ],
)
def test_urls_that_are_none(url: str, pattern: str) -> None:
    with pytest.raises(UsageError, match=pattern):
        open_store(url)


def test_paths_that_no_url_may_hold(tmp_path, site: Site, opened: Open, nginx_static: nginx.StaticServer) -> None:
    digest, _ = DirectoryStore(nginx_static.directory / "a b/ü%41", create=True).put(b"here")
    assert opened(f"{nginx_static.url}/a b/ü%2541/").read(digest, 0, 4) == b"here"
