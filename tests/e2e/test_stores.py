"""An image pushed to every kind of store, and mounted lazily from there, nothing of it local: the whole tree."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from lazykit import Host
from samples import snapshot
from servers import docker_registry
from servers.nginx import nginx, static_files

from erofsgen.cli.main import run
from erofsgen.store.image import Image
from erofsgen.store.open import open_store

pytestmark = [pytest.mark.mount, pytest.mark.server, pytest.mark.usefixtures("require_root")]


@pytest.fixture(scope="module")
def source(tmp_path_factory, demo_image) -> Path:
    """A directory store with the demo image."""
    store = tmp_path_factory.mktemp("source")
    assert run(["--store", str(store), "--quiet", "build", f"oci:{demo_image.reference}", "--tag", "demo:1"]) == 0
    return store


@pytest.fixture
def servers() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def in_directory(stack, request, tmp_path, source):
    return str(tmp_path / "pushed"), "demo:1"


def in_s3(stack, request, tmp_path, source):
    server = request.getfixturevalue("s3_server")
    monkeypatch = request.getfixturevalue("monkeypatch")
    for name, value in server.environment().items():  # the daemon has it from here
        monkeypatch.setenv(name, value)
    return f"s3://{server.bucket()}/some/prefix", "demo:1"


def in_registry(stack, request, tmp_path, source):
    address = stack.enter_context(docker_registry(tmp_path / "registry"))
    return f"docker://{address}/team/demo", "1"


def behind_http(stack, request, tmp_path, source):
    """The directory that was pushed to, as a web server shows it."""
    url = stack.enter_context(nginx(tmp_path / "nginx", static_files(tmp_path / "pushed")))
    return url, "demo:1"


KINDS: dict[str, Callable[..., tuple[str, str]]] = {
    "directory": in_directory,
    "s3": in_s3,
    "registry": in_registry,
    "http": behind_http,
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_tree_is_all_there(kind, servers, request, tmp_path, source, umoci_unpacked):
    url, name = KINDS[kind](servers, request, tmp_path, source)
    pushed = str(tmp_path / "pushed") if kind == "http" else url
    assert run(["--store", str(source), "--quiet", "push", "demo:1", pushed]) == 0
    before = Image.open(open_store(str(source)), "demo:1")
    image = Image.open(open_store(url), name)
    assert image.digest == before.digest
    host = Host(tmp_path / "host")
    target = tmp_path / "mnt"
    target.mkdir()
    try:
        mount = ["--store", url, "--root", str(host.root), "--quiet", "mount", "--plane", "fanotify", name, str(target)]
        assert run(mount) == 0
        fetched = host.engine()["bytes_fetched"]
        assert fetched < 1 << 20
        ours, theirs = snapshot(target), snapshot(umoci_unpacked)
        assert sorted(ours) == sorted(theirs)
        assert [path for path in ours if ours[path] != theirs[path]] == []
        sources = host.engine()["sources"]
        assert list(sources) == [url]
        assert sources[url]["failed"] == sources[url]["bad_frames"] == 0
        assert sources[url]["bytes"] > 50 << 20
    finally:
        subprocess.run(["umount", "--lazy", target], check=False)
        host.end()
    assert os.listdir(target) == []
