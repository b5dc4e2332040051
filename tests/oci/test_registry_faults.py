"""Pulls from a registry that misbehaves. Each test is one misbehaviour."""

from __future__ import annotations

import dataclasses
import email.utils
import random
import re
import resource
import socket
import threading
import time

import pytest
import servers
from servers import body, chunked, cut, endless, ignore_range, redirect, silent, status

from erofsgen.errors import FormatError, IntegrityError, NotFoundError, RemoteError, StorageError, UnsupportedError
from erofsgen.oci.patience import Policy

pytestmark = [pytest.mark.server, pytest.mark.timeout(60)]

LAYER = random.Random(7).randbytes(200_000)
OTHER = random.Random(8).randbytes(50_000)
DIGEST = servers.digest_of(LAYER)
BLOB = f"/blobs/{DIGEST}$"
QUICK = Policy(attempts=3, backoff=0.01, read_timeout=5, connect_timeout=5)


@pytest.fixture
def image(faulty):
    """The registry's image has one layer, LAYER."""
    return faulty.add_image(LAYER)


def ranges(registry):
    """The Range header of each request for the layer."""
    return [request.headers.get("Range") for request in registry.seen(BLOB)]


def pulled(pull, registry, read_layers, **options):
    with pull(registry, **options) as opened:
        return read_layers(opened)


def plant(tmp_path, data):
    """What an earlier run left behind."""
    downloads = tmp_path / "downloads"
    downloads.mkdir(exist_ok=True)
    (downloads / f"{DIGEST[7:]}.partial").write_bytes(data)
    return downloads


# --- broken connections ----------------------------------------------------------------------------------------------


def test_a_broken_download_is_continued(image, faulty, pull, read_layers):
    faulty.fault(BLOB, cut(70_000))
    faulty.fault(BLOB, cut(30_000))
    assert pulled(pull, faulty, read_layers) == [LAYER]
    first, second, third = ranges(faulty)
    assert first is None
    assert 0 < int(second[6:-1]) <= 70_000
    assert int(second[6:-1]) < int(third[6:-1]) <= 100_000


def test_a_server_that_ignores_the_range_is_read_from_the_start(image, faulty, pull, read_layers):
    faulty.fault(BLOB, cut(70_000))
    faulty.fault(BLOB, ignore_range)
    assert pulled(pull, faulty, read_layers) == [LAYER]
    assert len(ranges(faulty)) == 2


@pytest.mark.parametrize(
    "content_range",
    ["bytes 0-199999/200000", "bytes 70001-199999/200000", "bytes 70000-299999/300000", "pages 1-2/3", "", "bytes */9"],
)
def test_a_wrong_range_is_not_taken(content_range, image, faulty, pull, read_layers, tmp_path):
    downloads = plant(tmp_path, LAYER[:70_000])

    def wrong(handler):
        handler.answer(LAYER[70_000:], 206, {"Content-Range": content_range} if content_range else {})

    faulty.fault(BLOB, wrong)
    assert pulled(pull, faulty, read_layers, downloads=downloads) == [LAYER]
    assert ranges(faulty) == ["bytes=70000-", None]


def test_an_unknown_total_is_taken(image, faulty, pull, read_layers, tmp_path):
    downloads = plant(tmp_path, LAYER[:70_000])
    faulty.fault(BLOB, lambda handler: handler.answer(LAYER[70_000:], 206, {"Content-Range": "bytes 70000-199999/*"}))
    assert pulled(pull, faulty, read_layers, downloads=downloads) == [LAYER]
    assert ranges(faulty) == ["bytes=70000-"]


def test_a_range_that_cannot_be_satisfied_starts_anew(image, faulty, pull, read_layers, tmp_path):
    downloads = plant(tmp_path, LAYER[:70_000])
    faulty.fault(BLOB, status(416))
    assert pulled(pull, faulty, read_layers, downloads=downloads) == [LAYER]
    assert ranges(faulty) == ["bytes=70000-", None]


def test_connections_that_always_break(image, faulty, pull, read_layers):
    faulty.fault(BLOB, cut(0), times=100)
    with pytest.raises(RemoteError, match="cannot reach localhost"):
        pulled(pull, faulty, read_layers)
    assert len(ranges(faulty)) == QUICK.attempts


def test_progress_renews_patience(faulty, pull, read_layers):
    """More breaks than attempts, but a megabyte and more between them."""
    large = random.Random(9).randbytes(12 << 20)
    faulty.add_image(large)
    faulty.fault("/blobs/", lambda handler: handler.behave())  # the config
    faulty.fault("/blobs/", cut(2 << 20), times=5)
    assert pulled(pull, faulty, read_layers) == [large]


def test_a_manifest_on_a_broken_connection(image, faulty, pull):
    faulty.fault("/manifests/", cut(10))
    pull(faulty).close()
    assert len(faulty.seen("/manifests/")) == 2


def test_a_body_that_ends_with_its_connection(image, faulty, pull, read_layers):
    """HTTP/1.0 has no better way; when it is cut there, only the manifest can tell."""

    def old(handler):
        handler.start()
        handler.wfile.write(LAYER[:90_000])

    faulty.fault(BLOB, old)
    assert pulled(pull, faulty, read_layers) == [LAYER]
    assert ranges(faulty) == [None, "bytes=90000-"]


# --- later runs ------------------------------------------------------------------------------------------------------


def test_a_later_run_continues(image, faulty, pull, read_layers, tmp_path):
    faulty.fault(BLOB, cut(120_000), times=1)
    faulty.fault(BLOB, status(400), times=1)
    downloads = tmp_path / "downloads"
    with pytest.raises(RemoteError):
        pulled(pull, faulty, read_layers, downloads=downloads)
    (partial,) = downloads.iterdir()
    assert partial.name == f"{DIGEST[7:]}.partial"
    have = partial.stat().st_size
    assert partial.read_bytes() == LAYER[:have]
    assert have > 60_000
    faulty.requests.clear()
    assert pulled(pull, faulty, read_layers, downloads=downloads) == [LAYER]
    assert ranges(faulty) == [f"bytes={have}-"]
    assert list(downloads.iterdir()) == []


@pytest.mark.parametrize(
    ("left", "expected"),
    [(LAYER[:1], "bytes=1-"), (LAYER, "none"), (b"", None), (LAYER + b"x", None), (b"x" * 300_000, None)],
    ids=["one byte", "everything", "nothing", "too much", "much too much"],
)
def test_what_is_left_behind(left, expected, image, faulty, pull, read_layers, tmp_path):
    downloads = plant(tmp_path, left)
    assert pulled(pull, faulty, read_layers, downloads=downloads) == [LAYER]
    assert ranges(faulty) == ([] if expected == "none" else [expected])


@pytest.mark.parametrize("size", [100_000, 200_000])
def test_what_is_left_behind_is_not_trusted(size, image, faulty, pull, read_layers, tmp_path):
    """A damaged partial file costs one more download, and nothing else."""
    downloads = plant(tmp_path, b"x" + LAYER[1:size])
    assert pulled(pull, faulty, read_layers, downloads=downloads) == [LAYER]
    assert ranges(faulty)[-1] is None


def test_whole_files_of_an_interrupted_run_are_used(image, faulty, pull, read_layers, tmp_path):
    def interrupted():
        with pull(faulty, downloads=tmp_path) as opened:
            read_layers(opened)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (tmp_path / DIGEST[7:]).read_bytes() == LAYER
    faulty.requests.clear()
    assert pulled(pull, faulty, read_layers, downloads=tmp_path) == [LAYER]
    assert ranges(faulty) == []
    assert not (tmp_path / DIGEST[7:]).exists()


def test_a_damaged_whole_file_is_not_used(image, faulty, pull, read_layers, tmp_path):
    (tmp_path / DIGEST[7:]).write_bytes(LAYER[:-1] + b"x")
    assert pulled(pull, faulty, read_layers, downloads=tmp_path) == [LAYER]


def test_two_runs_share_a_directory(image, faulty, pull, read_layers, tmp_path):
    """One downloads, the other waits and takes what it got, even when the first has dropped its files by then."""
    released = threading.Event()

    def slow(handler):
        released.wait(10)
        handler.behave()

    faulty.fault(BLOB, slow)
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(pulled(pull, faulty, read_layers, downloads=tmp_path / "d")))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    while not faulty.seen(BLOB):
        time.sleep(0.01)
    released.set()
    for thread in threads:
        thread.join()
    assert results == [[LAYER], [LAYER]]
    assert list((tmp_path / "d").iterdir()) == []


def test_a_directory_that_cannot_be_written(image, faulty, pull, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot write download"):
        pull(faulty, downloads=tmp_path / "file" / "x")


def test_a_full_disk(image, faulty, pull, read_layers, tmp_path):
    """The kernel refuses in the middle, as it does at a quota or at the end of the disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pull(faulty, downloads=tmp_path) as opened:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            with pytest.raises(StorageError, match=f"cannot write download .*{DIGEST[7:]}.*: File too large") as caught:
                read_layers(opened)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "free space" in caught.value.hint


def test_a_link_in_the_directory_is_not_followed(image, faulty, pull, read_layers, tmp_path):
    (tmp_path / "precious").write_bytes(b"precious")
    (tmp_path / f"{DIGEST[7:]}.partial").symlink_to(tmp_path / "precious")
    with pytest.raises(StorageError, match="symbolic links"):
        pulled(pull, faulty, read_layers, downloads=tmp_path)
    assert (tmp_path / "precious").read_bytes() == b"precious"


# --- wrong bytes -----------------------------------------------------------------------------------------------------

WRONG = {
    "another content": body(LAYER[:-1] + b"x"),
    "a byte short": body(LAYER[:-1]),
    "a byte long": body(LAYER + b"x"),
    "short in chunks": chunked(LAYER[:1000], LAYER[1000:-1]),
    "long in chunks": chunked(LAYER, b"x"),
    "endless": endless(LAYER),
    "empty": body(b""),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_wrong_bytes_are_refused_and_dropped(wrong, image, faulty, pull, read_layers, tmp_path):
    faulty.fault(BLOB, wrong)
    with pytest.raises(IntegrityError, match=f"blob {DIGEST} of {faulty.host}/team/app:latest"):
        pulled(pull, faulty, read_layers, downloads=tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(DIGEST[7:])]
    assert len(ranges(faulty)) == 1


def test_a_blob_that_changes_between_two_pieces(image, faulty, pull, read_layers):
    """The pieces do not fit: it is read once more, in one piece."""
    faulty.fault(BLOB, lambda handler: (handler.start(Content_Length="200000"), handler.wfile.write(b"x" * 50_000)))
    assert pulled(pull, faulty, read_layers) == [LAYER]
    assert ranges(faulty) == [None, "bytes=50000-", None]


@pytest.mark.parametrize("which", ["manifest", "config"])
@pytest.mark.parametrize("wrong", ["content", "short", "long"])
def test_a_wrong_document(which, wrong, image, faulty, pull):
    change = {
        "content": lambda data: data[:-2] + b" }",
        "short": lambda data: data[:-1],
        "long": lambda data: data + b" ",
    }
    if which == "manifest":
        _, data = faulty.manifests[image]
        faulty.fault("/manifests/", lambda handler: handler.answer(change[wrong](data)))
    else:
        (digest,) = [digest for digest in faulty.blobs if digest != DIGEST]
        faulty.blobs[digest] = change[wrong](faulty.blobs[digest])
    with pytest.raises(IntegrityError):
        pull(faulty, f"team/app@{image}")


def test_a_tag_whose_digest_header_does_not_fit(image, faulty, pull):
    media_type, data = faulty.manifests[image]
    headers = {"Content-Type": media_type, "Docker-Content-Digest": f"sha256:{'0' * 64}"}
    faulty.fault("/manifests/", lambda handler: handler.answer(data, 200, headers))
    with pytest.raises(IntegrityError, match="manifest latest of team/app does not have its digest"):
        pull(faulty)


@pytest.mark.parametrize("path", ["/manifests/", "/blobs/", "/token"])
def test_an_endless_document(path, image, faulty, pull):
    faulty.tokens = set()
    faulty.fault(path, endless(b" " * 65536), times=9)
    with pytest.raises(RemoteError, match=r"sent more than \d+ bytes as "):
        pull(faulty)


def test_a_compressed_document(image, faulty, pull):
    faulty.fault("/manifests/", body(b"\x1f\x8b", Content_Encoding="gzip"))
    with pytest.raises(RemoteError, match="compressed manifest latest"):
        pull(faulty)


def test_a_page_instead_of_a_manifest(image, faulty, pull):
    faulty.fault("/manifests/", body(b"<html>", Content_Type="text/html"))
    with pytest.raises(UnsupportedError, match="'text/html'"):
        pull(faulty)


def test_a_manifest_without_a_type(image, faulty, pull, read_layers):
    _, data = faulty.manifests["latest"]
    faulty.fault("/manifests/", body(data, Content_Type="application/octet-stream"))
    assert pulled(pull, faulty, read_layers) == [LAYER]


def test_a_deep_manifest(image, faulty, pull):
    faulty.fault("/manifests/", body(b'{"layers":' * 100_000))
    with pytest.raises(FormatError, match="malformed"):
        pull(faulty)


# --- status codes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [408, 429, 500, 502, 503, 504])
@pytest.mark.parametrize("path", ["/manifests/", BLOB])
def test_passing_errors_are_tried_again(code, path, image, faulty, pull, read_layers):
    faulty.fault(path, status(code), times=2)
    assert pulled(pull, faulty, read_layers) == [LAYER]
    assert len(faulty.seen(path)) == 3


@pytest.mark.parametrize("path", ["/manifests/", BLOB])
def test_errors_that_do_not_pass(path, image, faulty, pull, read_layers):
    faulty.fault(path, status(503, b'{"errors":[{"message":"down for\\u001b[31m repair\\n"}]}'), times=100)
    with pytest.raises(RemoteError, match=r"^localhost:\d+ answered 503 for .* down for \[31m repair$") as caught:
        pulled(pull, faulty, read_layers)
    assert len(faulty.seen(path)) == QUICK.attempts
    assert caught.value.hint == "try again later"


@pytest.mark.parametrize(
    ("code", "error", "message"),
    [
        (400, RemoteError, "answered 400"), (401, RemoteError, "answered 401"), (403, RemoteError, "answered 403"),
        (404, NotFoundError, "has no"), (405, RemoteError, "answered 405"), (410, NotFoundError, "has no"),
        (204, RemoteError, "answered 204"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/manifests/", BLOB])
def test_final_errors_are_not(code, error, message, path, image, faulty, pull, read_layers):
    faulty.fault(path, status(code), times=100)
    with pytest.raises(error, match=message) as caught:
        pulled(pull, faulty, read_layers)
    assert type(caught.value) is error
    assert len(faulty.seen(path)) == 1
    if code in (401, 403):
        assert "no such image, or it needs credentials" in caught.value.hint


def test_retry_after_in_seconds(image, faulty, pull, read_layers):
    faulty.fault(BLOB, status(429, Retry_After="1"))
    started = time.monotonic()
    assert pulled(pull, faulty, read_layers) == [LAYER]
    assert time.monotonic() - started >= 1


def test_retry_after_as_a_date(image, faulty, pull, read_layers):
    faulty.fault(BLOB, status(503, Retry_After=email.utils.formatdate(time.time() + 2, usegmt=True)))
    started = time.monotonic()
    assert pulled(pull, faulty, read_layers) == [LAYER]
    assert time.monotonic() - started >= 0.9  # the header has whole seconds


@pytest.mark.parametrize(
    "value", ["", "soon", "-1", "1e3", "Mon, 99 Foo 2026 00:00:00 GMT", "Thu, 01 Jan 1970 00:00:00 GMT"]
)
def test_retry_after_that_means_nothing(value, image, faulty, pull, read_layers):
    faulty.fault(BLOB, status(429, Retry_After=value))
    assert pulled(pull, faulty, read_layers) == [LAYER]


def test_retry_after_that_is_too_long(image, faulty, pull, read_layers):
    faulty.fault(BLOB, status(429, b'{"errors":[{"message":"pull rate limit"}]}', Retry_After="3600"), times=9)
    with pytest.raises(RemoteError, match=r"limits our rate for .*: pull rate limit") as caught:
        pulled(pull, faulty, read_layers)
    assert caught.value.hint == "the server asks to wait 3600 s"
    assert len(ranges(faulty)) == 1


# --- redirects -------------------------------------------------------------------------------------------------------


def test_no_secret_follows_a_redirect_to_another_port(faulty, elsewhere, pull, read_layers):
    faulty.tokens = set()
    faulty.add_image(LAYER)
    elsewhere.blobs[DIGEST] = LAYER
    faulty.fault(BLOB, redirect(f"http://{elsewhere.host}/v2/x/blobs/{DIGEST}"))
    assert pulled(pull, faulty, read_layers) == [LAYER]
    assert faulty.seen(BLOB)[0].headers["Authorization"].startswith("Bearer ")
    (request,) = elsewhere.requests
    assert "Authorization" not in request.headers


def test_no_secret_follows_a_redirect_to_another_host(faulty, pull, read_layers):
    faulty.tokens = set()
    faulty.add_image(LAYER)
    target = f"http://{faulty.host.replace('localhost', '127.0.0.1')}/v2/other{BLOB[:-1]}"
    faulty.fault("/v2/team/app" + BLOB, redirect(target))
    faulty.fault("/v2/other", lambda handler: handler.answer(LAYER))
    assert pulled(pull, faulty, read_layers) == [LAYER]
    assert "Authorization" not in faulty.seen("/v2/other")[0].headers


def test_a_secret_does_not_come_back_with_a_second_redirect(faulty, elsewhere, pull, read_layers):
    faulty.tokens = set()
    faulty.add_image(LAYER)
    elsewhere.fault("", redirect(f"http://{faulty.host}/v2/back{BLOB[:-1]}"))
    faulty.fault("/v2/team/app" + BLOB, redirect(f"http://{elsewhere.host}/"))
    faulty.fault("/v2/back", lambda handler: handler.answer(LAYER))
    assert pulled(pull, faulty, read_layers) == [LAYER]
    assert "Authorization" not in faulty.seen("/v2/back")[0].headers


def test_the_secret_stays_with_its_own_server(faulty, pull, read_layers):
    faulty.tokens = set()
    faulty.add_image(LAYER)
    faulty.fault("/v2/team/app" + BLOB, redirect(f"/v2/moved{BLOB[:-1]}"))
    assert pulled(pull, faulty, read_layers) == [LAYER]
    assert "Authorization" in faulty.seen("/v2/moved")[0].headers


def test_a_resumed_download_asks_the_registry_again(image, faulty, elsewhere, pull, read_layers):
    """Links to storage expire: each attempt gets a new one, and keeps its range."""
    elsewhere.blobs[DIGEST] = LAYER
    faulty.fault(BLOB, redirect(f"http://{elsewhere.host}/v2/x/blobs/{DIGEST}"), times=2)
    elsewhere.fault("", cut(60_000))
    assert pulled(pull, faulty, read_layers) == [LAYER]
    assert len(faulty.seen(BLOB)) == 2
    assert elsewhere.requests[1].headers["Range"].startswith("bytes=")


@pytest.mark.parametrize("code", [400, 403])
def test_a_link_that_expired(code, image, faulty, elsewhere, pull, read_layers):
    elsewhere.blobs[DIGEST] = LAYER
    faulty.fault(BLOB, redirect(f"http://{elsewhere.host}/v2/x/blobs/{DIGEST}"), times=2)
    elsewhere.fault("", status(code, b"<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>"))
    assert pulled(pull, faulty, read_layers) == [LAYER]
    assert len(elsewhere.requests) == 2


def test_redirects_without_end(image, faulty, pull):
    faulty.fault("/manifests/", redirect("/v2/team/app/manifests/latest"), times=100)
    with pytest.raises(RemoteError, match="redirects more than 10 times"):
        pull(faulty)


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://example.com/", "http://a:b/"])
def test_redirects_to_nowhere(url, image, faulty, pull):
    faulty.fault("/manifests/", redirect(url), times=9)
    with pytest.raises(RemoteError, match=r"redirects to|Invalid URL"):
        pull(faulty)


def test_no_redirect_from_https_to_http(tmp_path, pull, monkeypatch):
    certificate = servers.make_certificate(tmp_path)
    with servers.faulty_registry(certificate) as registry:
        (tmp_path / "certs.d" / registry.host).mkdir(parents=True)
        certificate[0].rename(tmp_path / "certs.d" / registry.host / "ca.crt")
        monkeypatch.setattr("erofsgen.oci.tls.CERTS_DIRS", (tmp_path / "certs.d", tmp_path / "certs.d"))
        registry.add_image(LAYER)
        registry.fault("/manifests/", redirect("http://example.invalid/"))
        with pytest.raises(RemoteError, match=r"redirects from HTTPS to plain HTTP at example\.invalid"):
            pull(registry)


# --- slowness --------------------------------------------------------------------------------------------------------

HASTY = dataclasses.replace(QUICK, read_timeout=0.3, document_timeout=0.5)


@pytest.mark.parametrize("path", ["/manifests/", BLOB])
def test_silence(path, image, faulty, pull, read_layers):
    faulty.fault(path, silent(1))
    assert pulled(pull, faulty, read_layers, policy=HASTY) == [LAYER]
    faulty.fault(path, silent(1), times=9)
    with pytest.raises(RemoteError, match=r"no answer from localhost:\d+ in time"):
        pulled(pull, faulty, read_layers, policy=HASTY)


def drip(handler):
    """A byte now and then: never silent for long, never done."""
    handler.start(Content_Length="200000")
    for _ in range(300):
        handler.wfile.write(b"x")
        handler.registry.closing.wait(0.02)


@pytest.mark.parametrize("path", ["/manifests/", BLOB])
def test_dripping(path, image, faulty, pull, read_layers):
    faulty.fault(path, drip, times=9)
    started = time.monotonic()
    with pytest.raises(RemoteError, match="is too slow"):
        pulled(pull, faulty, read_layers, policy=HASTY)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("headers", [True, False], ids=["for bytes", "for an answer"])
def test_closing_does_not_wait_for_the_network(headers, image, faulty, pull):
    began = threading.Event()

    def stall(handler):
        if headers:
            handler.start(Content_Length="200000")
            handler.wfile.write(LAYER[:1000])
        began.set()
        handler.registry.closing.wait(5)

    faulty.fault(BLOB, stall)
    opened = pull(faulty, policy=dataclasses.replace(QUICK, read_timeout=30))
    opened.fetch([0])
    assert began.wait(5)
    started = time.monotonic()
    opened.close()
    assert time.monotonic() - started < 1


def test_closing_does_not_wait_for_a_pause(image, faulty, pull):
    faulty.fault(BLOB, status(429, Retry_After="60"))
    opened = pull(faulty)
    opened.fetch([0])
    while not faulty.seen(BLOB):
        time.sleep(0.01)
    started = time.monotonic()
    opened.close()
    assert time.monotonic() - started < 1


def test_nobody_listens(pull):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(RemoteError, match=rf"cannot reach localhost:{port}: Connection refused"):
        pull(f"localhost:{port}")


@pytest.mark.parametrize(
    ("code", "message", "times"),
    [(socket.EAI_NONAME, "cannot be resolved", 1), (socket.EAI_AGAIN, "cannot reach registry.invalid", 3)],
)
def test_names_that_cannot_be_resolved(code, message, times, pull, monkeypatch):
    asked = []

    def getaddrinfo(host, *args, **kwargs):
        asked.append(host)
        raise socket.gaierror(code, "told by the test")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with pytest.raises(RemoteError, match=message):
        pull("registry.invalid")
    assert asked == ["registry.invalid"] * times


# --- layers ----------------------------------------------------------------------------------------------------------


def test_layers_come_four_at_a_time(faulty, pull, read_layers):
    layers = [bytes([number]) * 1000 for number in range(9)]
    faulty.add_image(*layers)
    lock, running, most = threading.Lock(), [0], [0]

    def count(handler):
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.1)
        handler.behave()
        with lock:
            running[0] -= 1

    with pull(faulty) as opened:
        faulty.fault("/blobs/", count, times=9)
        assert read_layers(opened) == layers
    assert most == [4]


def test_a_layer_that_comes_twice_is_fetched_once(faulty, pull, read_layers):
    faulty.add_image(LAYER, OTHER, LAYER)
    assert pulled(pull, faulty, read_layers) == [LAYER, OTHER, LAYER]
    assert len(faulty.seen(BLOB)) == 1


def test_layers_can_be_opened_without_notice_and_again(image, faulty, pull):
    with pull(faulty) as opened:
        for _ in range(2):
            with opened.open_layer(0) as file:
                assert file.read(10) == LAYER[:10]
        assert len(faulty.seen(BLOB)) == 1


def test_an_empty_layer(faulty, pull, read_layers):
    faulty.add_image(b"")
    assert pulled(pull, faulty, read_layers) == [b""]


FOREIGN = "application/vnd.oci.image.layer.nondistributable.v1.tar"


def test_a_foreign_layer_comes_from_its_own_address(faulty, elsewhere, pull, read_layers):
    faulty.tokens = set()
    faulty.add_image(LAYER, mediaType=FOREIGN, urls=[f"http://{elsewhere.host}/v2/x/blobs/{DIGEST}"])
    del faulty.blobs[DIGEST]
    elsewhere.blobs[DIGEST] = LAYER
    elsewhere.fault("", cut(50_000))
    assert pulled(pull, faulty, read_layers) == [LAYER]
    assert len(elsewhere.requests) == 2
    assert not any("Authorization" in request.headers for request in elsewhere.requests)


def test_a_foreign_layer_that_only_the_registry_has(faulty, elsewhere, pull, read_layers):
    urls = ["file:///etc/passwd", "http://[", f"http://{elsewhere.host}/nowhere"]
    faulty.add_image(LAYER, mediaType=FOREIGN, urls=urls)
    assert pulled(pull, faulty, read_layers) == [LAYER]


def test_a_foreign_layer_that_nobody_has(faulty, elsewhere, pull, read_layers):
    faulty.add_image(LAYER, mediaType=FOREIGN, urls=[f"http://{elsewhere.host}/nowhere"])
    del faulty.blobs[DIGEST]
    with pytest.raises(NotFoundError, match=f"has no blob {DIGEST}"):
        pulled(pull, faulty, read_layers)


def test_addresses_of_other_layers_are_not_used(faulty, elsewhere, pull, read_layers):
    faulty.add_image(LAYER, urls=[f"http://{elsewhere.host}/"])
    assert pulled(pull, faulty, read_layers) == [LAYER]
    assert elsewhere.requests == []


def test_progress_is_told(image, faulty, pull, read_layers):
    class Shown:
        done = 0

        def task(self, label, total=None):
            self.label, self.total = label, total
            return self

        def advance(self, amount):
            self.done += amount

        def __enter__(self):
            return self

        def __exit__(self, *exc):
            pass

    shown = Shown()
    faulty.fault(BLOB, cut(70_000))
    faulty.fault(BLOB, ignore_range)
    assert pulled(pull, faulty, read_layers, progress=shown) == [LAYER]
    assert re.fullmatch(r"layer [0-9a-f]{12}", shown.label)
    assert shown.done == shown.total == len(LAYER)
