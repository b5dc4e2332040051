"""An image that knows its source, and registries to put both into."""

from __future__ import annotations

import gzip
import hashlib
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
import samples
import servers
from servers.fullregistry import FullRegistry, full_registry

from erofsgen.build.options import BuildOptions
from erofsgen.build.pipeline import build_image
from erofsgen.oci.images import open_image
from erofsgen.oci.patience import Policy
from erofsgen.store.base import Descriptor
from erofsgen.store.copy import copy_image
from erofsgen.store.directory import DirectoryStore
from erofsgen.store.image import Image
from erofsgen.store.manifest import MANIFEST_TYPE
from erofsgen.store.registry import RegistryStore

QUICK = Policy(attempts=3, backoff=0.01, read_timeout=5, connect_timeout=5)


@pytest.fixture(autouse=True)
def no_settings_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Credentials, proxies and caches of whoever runs the tests stay out of them."""
    for name in os.environ:
        if name.lower().endswith("_proxy") or name in ("REGISTRY_AUTH_FILE", "XDG_CONFIG_HOME", "DOCKER_CONFIG"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))


@dataclass(frozen=True)
class Built:
    """``image``, in a directory store, was built from the OCI layout ``source``, tagged ``v1``. Read only!"""

    source: Path
    image: Image

    @property
    def directory(self) -> Path:
        return Path(self.image.store.url)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    place = tmp_path_factory.mktemp("built")
    layer = samples.write_sample(place / "layer.tar").read_bytes()
    source = DirectoryStore(place / "source")
    rootfs = {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"]}
    config = {"architecture": "amd64", "os": "linux", "rootfs": rootfs}
    document = {"schemaVersion": 2, "mediaType": MANIFEST_TYPE}
    blobs = []
    packed = gzip.compress(layer)  # what is not, skopeo compresses on its way, and the digest is another
    for data, kind in ((msgspec.json.encode(config), "config.v1+json"), (packed, "layer.v1.tar+gzip")):
        digest, size = source.put(data)
        blobs.append({"mediaType": f"application/vnd.oci.image.{kind}", "digest": digest, "size": size})
    document |= {"config": blobs[0], "layers": blobs[1:]}
    source.tag("v1", Descriptor(MANIFEST_TYPE, *source.put(msgspec.json.encode(document))))
    store = DirectoryStore(place / "store")
    with open_image(f"oci:{source.path}:v1") as opened:
        build_image(opened, store, tag="app:1", options=BuildOptions(chunk_size=64 << 10))
    return Built(source.path, Image.open(store, "app:1"))


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """HOST:PORT of Debian's docker-registry. Each test uses repositories of its own."""
    with servers.docker_registry(tmp_path_factory.mktemp("registry")) as host:
        yield host


@pytest.fixture
def full() -> Iterator[FullRegistry]:
    """A registry in this process that has the referrers API."""
    with full_registry() as registry:
        yield registry


@pytest.fixture
def elsewhere() -> Iterator[FullRegistry]:
    """Another one. Ask for it before ``open_registry``: it waits for connections to end."""
    with full_registry() as registry:
        yield registry


@pytest.fixture
def open_registry() -> Iterator[Callable[..., RegistryStore]]:
    """open_registry(registry, repository="team/app", **options) -> RegistryStore, with little patience."""
    opened: list[RegistryStore] = []

    def open_it(registry: str | FullRegistry, repository: str = "team/app", **options) -> RegistryStore:
        host = registry if isinstance(registry, str) else registry.host
        opened.append(RegistryStore(f"docker://{host}/{repository}", **{"policy": QUICK, **options}))
        return opened[-1]

    yield open_it
    for store in opened:
        store.close()


@pytest.fixture
def push(built: Built) -> Callable[..., str]:
    """push(store, name="lazy", image=…) copies the built image; its manifest's digest."""

    def copy(store: RegistryStore, name: str = "lazy", image: Image = built.image) -> str:
        return copy_image(image, store, name).digest

    return copy


@pytest.fixture(scope="session")
def skopeo() -> Callable[[str, str], None]:
    """skopeo(source, destination) copies an image between any two places that skopeo knows."""

    def copy(source: str, destination: str) -> None:
        options = ["--quiet", "--src-tls-verify=false", "--dest-tls-verify=false"]
        done = subprocess.run(["skopeo", "copy", *options, source, destination], capture_output=True, timeout=60)
        assert done.returncode == 0, done.stderr

    return copy
