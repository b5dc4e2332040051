"""Small real images, made by umoci and skopeo, and the servers they are pulled from."""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import servers

from erofsgen.oci.patience import Policy
from erofsgen.oci.reference import Reference
from erofsgen.oci.registry import RegistryImage


@pytest.fixture(autouse=True)
def no_settings_of_this_machine(monkeypatch, tmp_path):
    """Credentials, proxies and temporary files of whoever runs the tests stay out of them."""
    home = tmp_path / "home"
    home.mkdir()
    for name in os.environ:
        if name.lower().endswith("_proxy") or name in ("REGISTRY_AUTH_FILE", "XDG_CONFIG_HOME", "DOCKER_CONFIG"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))


def make_tar(**files: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


@dataclass(frozen=True)
class Sample:
    """An OCI layout made by umoci. ``tars`` are its layers, uncompressed, bottom first."""

    layout: Path
    tag: str
    tars: tuple[bytes, ...]

    @property
    def manifest(self) -> dict:
        index = json.loads((self.layout / "index.json").read_bytes())
        return json.loads(self.blob(index["manifests"][0]["digest"]))

    def blob(self, digest: str) -> bytes:
        return (self.layout / "blobs" / digest.replace(":", "/")).read_bytes()

    @property
    def layers(self) -> list[bytes]:
        """The blobs as stored."""
        return [self.blob(layer["digest"]) for layer in self.manifest["layers"]]


def tool(*command: str | Path) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=60)


@pytest.fixture(scope="session")
def sample(tmp_path_factory) -> Sample:
    """Three layers, the last one equal to the first."""
    root = tmp_path_factory.mktemp("sample")
    noise = random.Random(1).randbytes(300_000)
    tars = (make_tar(one=noise, shared=b"1"), make_tar(two=b"2" * 5000), make_tar(one=noise, shared=b"1"))
    layout = root / "layout"
    tool("umoci", "init", "--layout", layout)
    tool("umoci", "new", "--image", f"{layout}:v1")
    for number, data in enumerate(tars):
        (root / f"{number}.tar").write_bytes(data)
        tool("umoci", "raw", "add-layer", "--image", f"{layout}:v1", root / f"{number}.tar")
    tool("umoci", "gc", "--layout", layout)
    return Sample(layout, "v1", tars)


@pytest.fixture(scope="session")
def copy_image():
    """copy_image(source, destination, *options): skopeo between transports, without TLS verification."""

    def copy(source: str, destination: str, *options: str) -> None:
        tool(
            "skopeo",
            "copy",
            "--quiet",
            "--src-tls-verify=false",
            "--dest-tls-verify=false",
            *options,
            source,
            destination,
        )

    return copy


@pytest.fixture(scope="session")
def registry(tmp_path_factory, sample, copy_image):
    """HOST:PORT of a real registry; it has the sample as ``team/sample:v1``, with Docker's types as ``:v2s2``."""
    with servers.docker_registry(tmp_path_factory.mktemp("registry")) as host:
        copy_image(f"oci:{sample.layout}:v1", f"docker://{host}/team/sample:v1")
        copy_image(f"oci:{sample.layout}:v1", f"docker://{host}/team/sample:v2s2", "--format=v2s2")
        yield host


@pytest.fixture
def faulty():
    with servers.faulty_registry() as registry:
        yield registry


@pytest.fixture
def elsewhere():
    """A second server, on another port."""
    with servers.faulty_registry() as registry:
        yield registry


QUICK = Policy(attempts=3, backoff=0.01, read_timeout=5, connect_timeout=5)


@pytest.fixture
def pull():
    """pull(registry, **options) -> RegistryImage, with little patience; ``repository`` defaults to team/app."""

    def open_quickly(registry, repository="team/app:latest", *, policy=QUICK, **options):
        host = registry if isinstance(registry, str) else registry.host
        return RegistryImage(Reference.parse(f"{host}/{repository}"), policy=policy, **options)

    return open_quickly


@pytest.fixture
def read_layers():
    """Every layer's bytes of an open image."""

    def read(image) -> list[bytes]:
        image.fetch(range(len(image.layers)))
        content = []
        for index in range(len(image.layers)):
            with image.open_layer(index) as file:
                content.append(file.read())
        return content

    return read
