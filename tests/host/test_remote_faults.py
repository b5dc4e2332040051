"""Lazy mounts of stores that misbehave: readers get the right bytes or EIO in time, and ``status`` says what it was.

One daemon with one mount for all faults of a kind of store: it has to live through every one of them.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import random
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from handmade import CHUNK, FRAME_CHUNKS, ImageMaker, chunks_of
from lazykit import Host, Reader, eventually, processes
from servers import faultproxy, nginx
from servers.faultproxy import Action, FaultProxy

from erofsgen.cli.main import run
from erofsgen.store.copy import copy_image
from erofsgen.store.directory import DirectoryStore
from erofsgen.store.image import Image
from erofsgen.store.open import open_store

pytestmark = [pytest.mark.mount, pytest.mark.server, pytest.mark.usefixtures("require_root")]

FRAME = CHUNK * FRAME_CHUNKS
FRAMES = 64
CONTENT = random.Random(21).randbytes(FRAMES * FRAME)
DEADLINE, TIMEOUT = 0.4, 0.2
PACKS = "/blobs/sha256/"
BAD = "frame [0-9]+ (differs from its digest|does not decompress)"

Status = Callable[[], dict[str, Any]]


class Row:
    """A fault, what ``status`` counts it as, and what it says of it."""

    def __init__(self, action: Action, says: str, counter: str = "failed") -> None:
        self.action = action
        self.says = says
        self.counter = counter


HTTP = {
    "no answer": Row(faultproxy.silent(30), "no answer from HOST"),
    "reset": Row(faultproxy.reset(), "cannot reach HOST: Connection reset by peer"),
    "closed": Row(faultproxy.raw(b""), "cannot reach HOST: Remote end closed"),
    "no HTTP": Row(faultproxy.raw(b"\0" * 1000), "HOST does not speak HTTP properly"),
    "401": Row(faultproxy.status(401), "HOST answered 401"),
    "403": Row(faultproxy.status(403), "HOST answered 403"),
    "404": Row(faultproxy.status(404), "HOST has no blob", "absent"),
    "416": Row(faultproxy.status(416), "HOST: blob sha256:[0-9a-f]+ ends before byte"),
    "429": Row(faultproxy.status(429), "HOST answered 429"),
    "429 with Retry-After": Row(faultproxy.status(429, Retry_After="1"), "HOST answered 429"),
    "500": Row(faultproxy.status(500), "HOST answered 500"),
    "503": Row(faultproxy.status(503), "HOST answered 503"),
    "503 with Retry-After": Row(faultproxy.status(503, Retry_After="1"), "HOST answered 503"),
    "too few bytes": Row(faultproxy.short(5000), "blob sha256:[0-9a-f]+ ended after 5000 of"),
    "too few bytes, announced": Row(faultproxy.short_lie(7), "HOST sends [0-9]+ bytes"),
    "too many bytes": Row(faultproxy.long(7), "HOST sends [0-9]+ bytes"),
    "another range": Row(faultproxy.other_range(4096), "HOST answers with another range"),
    "another range, in secret": Row(faultproxy.other_range(4096, lie=True), BAD, "bad_frames"),
    "a flipped bit": Row(faultproxy.flip(1000), BAD, "bad_frames"),
    "gzip": Row(faultproxy.gzip_encoded(), "HOST compressed"),
    "redirected to other bytes": Row(faultproxy.redirect("/other"), BAD, "bad_frames"),
    "redirected to a dead host": Row(
        faultproxy.redirect("http://127.0.0.1:1/"), "cannot reach 127.0.0.1:1: Connection refused"
    ),
    "redirected in a circle": Row(faultproxy.redirect("?"), "redirects more than"),
    "slow drip": Row(faultproxy.drip(10, 0.05), "HOST is too slow"),
}

S3 = {
    name: row
    for name, row in HTTP.items()
    if name in ("no answer", "reset", "500", "too few bytes", "another range, in secret", "a flipped bit", "slow drip")
} | {
    "SlowDown": Row(faultproxy.s3_error("SlowDown", 503), "SlowDown"),
    "AccessDenied": Row(faultproxy.s3_error("AccessDenied", 403), "AccessDenied"),
    "ExpiredToken": Row(faultproxy.s3_error("ExpiredToken", 400), "ExpiredToken"),
    "a wrong clock": Row(faultproxy.s3_error("RequestTimeTooSkewed", 403), "RequestTimeTooSkewed"),
    "NoSuchKey": Row(faultproxy.s3_error("NoSuchKey", 404), "HOST has no blob", "absent"),
    "NoSuchBucket": Row(faultproxy.s3_error("NoSuchBucket", 404), "HOST has no blob", "absent"),
}


class Place:
    """A mounted image, the proxy before its store, and the daemon; each call of :meth:`fresh` is a frame not read."""

    def __init__(self, host: Host, url: str, proxy: FaultProxy, file: Path) -> None:
        self.host = host
        self.url = url
        self.proxy = proxy
        self.file = file
        self._next = iter(range(0, FRAMES * FRAME, FRAME))

    def fresh(self) -> int:
        self.proxy.faults.clear()  # of a test that failed
        return next(self._next)

    def read(self, offset: int) -> bytes | OSError:
        return Reader(self.file, offset, 4096).get(within=20)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Image:
    """The image in a directory store, beside a file that is as long as its pack but for the bytes."""
    directory = tmp_path_factory.mktemp("faults") / "www"
    maker = ImageMaker(DirectoryStore(directory))
    pack = maker.pack(chunks_of(CONTENT))
    (directory / "other").write_bytes(random.Random(22).randbytes(pack.descriptor.size))
    return maker.image("faulty", {"file": CONTENT}, [pack])


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pytest.MonkeyPatch]:
    """For the daemons: impatient with the stores of images."""
    config = tmp_path_factory.mktemp("config") / "config.toml"
    config.write_text(f"[origin]\ntimeout = {TIMEOUT}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EROFSGEN_CONFIG", str(config))
        yield patch


def mounted(stack: ExitStack, url: str, proxy: FaultProxy, directory: Path, deadline: float = DEADLINE) -> Place:
    """The image mounted from the store at ``url``, which ``proxy`` stands before."""
    host = Host(directory / "root", deadline=deadline, read_ahead=0)
    stack.callback(lambda: eventually(lambda: processes(host.root) == []))
    stack.callback(host.end)
    host.start("--worker=--complete-at", "--worker=2")
    target = directory / "mnt"
    stack.callback(lambda: subprocess.run(["umount", "--lazy", target], check=True))
    store = open_store(url)
    host.mount(Image.open(store, "faulty"), target, read_ahead=128)
    store.close()
    eventually(lambda: Reader(target / "file", FRAMES * FRAME - 4096).get() == CONTENT[-4096:])
    return Place(host, url, proxy, target / "file")


@pytest.fixture(scope="module")
def over_http(
    made: Image, environment: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Place]:
    directory = tmp_path_factory.mktemp("http")
    with ExitStack() as stack:
        url = stack.enter_context(nginx.nginx(directory / "nginx", nginx.static_files(Path(made.store.url))))
        proxy = stack.enter_context(FaultProxy(url))
        yield mounted(stack, proxy.url, proxy, directory)


@pytest.fixture(scope="module")
def over_http_with_time(
    made: Image, environment: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Place]:
    """Whose readers have time for more than one try, on a busy machine too."""
    directory = tmp_path_factory.mktemp("patient")
    with ExitStack() as stack:
        url = stack.enter_context(nginx.nginx(directory / "nginx", nginx.static_files(Path(made.store.url))))
        proxy = stack.enter_context(FaultProxy(url))
        yield mounted(stack, proxy.url, proxy, directory, deadline=30)


@pytest.fixture(scope="module")
def over_s3(
    made: Image, environment: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory, s3_server: Any
) -> Iterator[Place]:
    directory = tmp_path_factory.mktemp("s3")
    with ExitStack() as stack:
        proxy = stack.enter_context(FaultProxy(s3_server))
        for name, value in dataclasses.replace(s3_server, endpoint=proxy.url).environment().items():
            environment.setenv(name, value)
        url = f"s3://{s3_server.bucket()}/some/prefix"
        store = open_store(url)
        copy_image(made, store)
        store.close()
        yield mounted(stack, url, proxy, directory)


@pytest.fixture
def status(capsys: pytest.CaptureFixture[str]) -> Callable[[Place], dict[str, Any]]:
    """What ``erofsgen status --json`` says of the store."""

    def ask(place: Place) -> dict[str, Any]:
        assert run(["--root", str(place.host.root), "status", "--json"]) == 0
        source: dict[str, Any] = json.loads(capsys.readouterr().out)["engine"]["sources"][place.url]
        return source

    return ask


def lasting(place: Place, row: Row, status: Callable[[Place], dict[str, Any]]) -> None:
    """While the fault is there: EIO, in time, and the reason; afterwards: the right bytes, from the same daemon."""
    daemon = place.host.status()["pid"]
    before = status(place)[row.counter]
    offset = place.fresh()
    place.proxy.fault(PACKS, row.action, times=None)
    began = time.monotonic()
    result = place.read(offset)
    took = time.monotonic() - began
    assert isinstance(result, OSError), result
    assert result.errno == errno.EIO
    assert took < DEADLINE + 1.5
    source = status(place)
    assert source[row.counter] > before
    host = re.escape(place.proxy.url.removeprefix("http://"))
    # not to have a blob is no failure of a store, but one of the reader's
    error = place.host.status()["errors"][-1] if row.counter == "absent" else source["error"]
    assert re.search(row.says.replace("HOST", host), error["error"])
    place.proxy.faults.clear()
    eventually(lambda: place.read(offset) == CONTENT[offset : offset + 4096])
    assert place.host.status()["pid"] == daemon
    assert place.host.status()["worker_restarts"] == 0


def passing(place: Place, row: Row) -> None:
    """Once, and nobody notices."""
    offset = place.fresh()
    denied = place.host.status()["denied"]
    place.proxy.fault(PACKS, row.action, times=1)
    assert place.read(offset) == CONTENT[offset : offset + 4096]
    place.proxy.faults.clear()
    assert place.host.status()["denied"] == denied


@pytest.mark.parametrize("name", HTTP)
def test_a_web_server_that_misbehaves(name: str, over_http: Place, status: Callable[..., Any]) -> None:
    lasting(over_http, HTTP[name], status)


@pytest.mark.parametrize("name", S3)
def test_an_object_store_that_misbehaves(name: str, over_s3: Place, status: Callable[..., Any]) -> None:
    lasting(over_s3, S3[name], status)


@pytest.mark.parametrize("name", sorted(HTTP.keys() - {"404", "429 with Retry-After", "503 with Retry-After"}))
def test_a_web_server_that_misbehaves_once(name: str, over_http_with_time: Place) -> None:
    passing(over_http_with_time, HTTP[name])


def test_everything_is_right_in_the_end(over_http: Place, over_s3: Place) -> None:
    for place in (over_http, over_s3):
        place.proxy.faults.clear()
        eventually(lambda place=place: place.read(0) == CONTENT[:4096])
        assert Reader(place.file, 0, len(CONTENT)).get() == CONTENT
        assert os.listdir(place.file.parent) == ["file"]
