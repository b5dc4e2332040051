"""An image pushed to every kind of store that is remote, and mounted lazily from there: the whole tree.

From a directory it is mounted on every plane in ``test_differential``.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from lazykit import Host
from samples import assert_same, whole_tree
from servers import docker_registry
from servers.nginx import nginx, static_files

from erofsgen.cli.main import run
from erofsgen.store.image import Image
from erofsgen.store.open import open_store

pytestmark = [pytest.mark.mount, pytest.mark.server, pytest.mark.usefixtures("require_root")]


@pytest.fixture
def servers() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def in_s3(stack, request, tmp_path):
    server = request.getfixturevalue("s3_server")
    monkeypatch = request.getfixturevalue("monkeypatch")
    for name, value in server.environment().items():  # the daemon has it from here
        monkeypatch.setenv(name, value)
    return f"s3://{server.bucket()}/some/prefix", "demo"


def in_registry(stack, request, tmp_path):
    address = stack.enter_context(docker_registry(tmp_path / "registry"))
    return f"docker://{address}/team/demo", "demo"


def behind_http(stack, request, tmp_path):
    """The directory that was pushed to, as a web server shows it."""
    url = stack.enter_context(nginx(tmp_path / "nginx", static_files(tmp_path / "pushed")))
    return url, "demo"


KINDS: dict[str, Callable[..., tuple[str, str]]] = {
    "s3": in_s3,
    "registry": in_registry,
    "http": behind_http,
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_tree_is_all_there(kind, servers, request, tmp_path, demo_store, expected):
    url, name = KINDS[kind](servers, request, tmp_path)
    pushed = str(tmp_path / "pushed") if kind == "http" else url
    assert run(["--store", str(demo_store.path), "--quiet", "push", "demo", pushed]) == 0
    image = Image.open(open_store(url), name)
    assert image.digest == Image.open(demo_store, "demo").digest
    host = Host(tmp_path / "host")
    target = tmp_path / "mnt"
    target.mkdir()
    try:
        mount = ["--store", url, "--root", str(host.root), "--quiet", "mount", "--plane", "fanotify", name, str(target)]
        assert run(mount) == 0
        fetched = host.engine()["bytes_fetched"]
        assert fetched < 1 << 20
        assert_same(whole_tree(target), expected)
        sources = host.engine()["sources"]
        assert list(sources) == [url]
        assert sources[url]["failed"] == sources[url]["bad_frames"] == 0
        assert sources[url]["bytes"] > 50 << 20
    finally:
        subprocess.run(["umount", "--lazy", target], check=False)
        host.end()
    assert os.listdir(target) == []
