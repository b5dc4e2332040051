"""Pulls from a real registry."""

from __future__ import annotations

import base64
import json
import os
import stat
import sys

import pytest
import servers

from erofsgen.errors import NotFoundError, RemoteError
from erofsgen.oci.images import open_image

pytestmark = pytest.mark.server


def write_auth(path, host, user=servers.USER, password=servers.PASSWORD):
    path.parent.mkdir(parents=True, exist_ok=True)
    entry = {"auth": base64.b64encode(f"{user}:{password}".encode()).decode()}
    path.write_text(json.dumps({"auths": {host: entry}}))
    return str(path)


@pytest.fixture(scope="module")
def private(tmp_path_factory, sample, copy_image):
    """A registry that asks for a password."""
    with servers.docker_registry(tmp_path_factory.mktemp("private"), password=True) as host:
        credentials = f"--dest-creds={servers.USER}:{servers.PASSWORD}"
        copy_image(f"oci:{sample.layout}:v1", f"docker://{host}/team/sample:v1", credentials)
        yield host


@pytest.fixture(scope="module")
def encrypted(tmp_path_factory, sample, copy_image):
    """(HOST:PORT, certificate) of a registry that speaks TLS."""
    root = tmp_path_factory.mktemp("encrypted")
    certificate = servers.make_certificate(root)
    with servers.docker_registry(root, certificate=certificate) as host:
        copy_image(f"oci:{sample.layout}:v1", f"docker://{host}/team/sample:v1")
        yield host, certificate[0]


@pytest.mark.parametrize("prefix", ["docker://", ""])
def test_an_image_is_the_same_as_in_its_layout(prefix, registry, sample, read_layers):
    with open_image(f"{prefix}{registry}/team/sample:v1") as image, open_image(f"oci:{sample.layout}:v1") as layout:
        assert image.name == f"{registry}/team/sample:v1"
        assert image.subject == layout.subject
        assert image.config == layout.config
        assert image.layers == layout.layers
        assert read_layers(image) == read_layers(layout) == sample.layers


def test_dockers_types(registry, sample, read_layers):
    with open_image(f"{registry}/team/sample:v2s2") as image:
        assert image.subject.media_type == "application/vnd.docker.distribution.manifest.v2+json"
        assert {layer.media_type for layer in image.layers} == {"application/vnd.docker.image.rootfs.diff.tar.gzip"}
        assert read_layers(image) == sample.layers


def test_by_digest(registry, sample, read_layers):
    with open_image(f"{registry}/team/sample:v1") as image:
        digest = image.subject.digest
    for reference in (f"team/sample@{digest}", f"team/sample:v2s2@{digest}"):
        with open_image(f"{registry}/{reference}") as image:
            assert image.name == f"{registry}/{reference}"
            assert image.subject.digest == digest
            assert read_layers(image) == sample.layers


def test_an_image_for_several_platforms(registry, sample, tmp_path, copy_image, read_layers):
    """An OCI index, pushed by skopeo."""
    blobs = tmp_path / "multi/blobs/sha256"
    copy_image(f"oci:{sample.layout}:v1", f"oci:{tmp_path}/multi:x")
    entries = []

    def put(data, **fields):
        digest = servers.digest_of(data)
        (blobs / digest.removeprefix("sha256:")).write_bytes(data)
        return {"digest": digest, "size": len(data), **fields}

    for architecture in ("amd64", "arm64", "s390x"):
        config = {**json.loads(sample.blob(sample.manifest["config"]["digest"])), "architecture": architecture}
        described = put(json.dumps(config).encode(), mediaType=servers.OCI_CONFIG)
        manifest = {**sample.manifest, "mediaType": servers.OCI_MANIFEST, "config": described}
        platform = {"os": "linux", "architecture": architecture}
        entries.append(put(json.dumps(manifest).encode(), mediaType=servers.OCI_MANIFEST, platform=platform))
    index_type = "application/vnd.oci.image.index.v1+json"
    index = {"schemaVersion": 2, "mediaType": index_type, "manifests": entries}
    top = put(json.dumps(index).encode(), mediaType=index_type)
    top["annotations"] = {"org.opencontainers.image.ref.name": "all"}
    (tmp_path / "multi/index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [top]}))
    copy_image(f"oci:{tmp_path}/multi:all", f"docker://{registry}/team/multi:1", "--all")
    for entry in entries:
        architecture = entry["platform"]["architecture"]
        with open_image(f"{registry}/team/multi:1", platform=f"linux/{architecture}") as image:
            assert image.subject.digest == entry["digest"]
            assert json.loads(image.config)["architecture"] == architecture
            assert read_layers(image) == sample.layers
    with pytest.raises(NotFoundError) as caught:
        open_image(f"{registry}/team/multi:1", platform="linux/arm/v6")
    assert caught.value.hint == "choose with --platform: linux/amd64, linux/arm64, linux/s390x"


@pytest.mark.parametrize("reference", ["team/sample:nope", "team/nowhere:v1", f"team/sample@sha256:{'0' * 64}"])
def test_images_that_are_not_there(reference, registry):
    with pytest.raises(NotFoundError, match=r"^localhost:\d+ has no manifest "):
        open_image(f"{registry}/{reference}")


def test_files_are_dropped(registry, tmp_path, read_layers, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with open_image(f"{registry}/team/sample:v1") as image:
        read_layers(image)
        (directory,) = tmp_path.glob("erofsgen-*")
        assert len(list(directory.iterdir())) == 2  # the third layer is the first
    assert not list(tmp_path.glob("erofsgen-*"))


def test_a_proxy_is_not_for_loopback(registry, monkeypatch, read_layers):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with open_image(f"{registry}/team/sample:v1") as image:
        assert len(read_layers(image)) == 3


# --- passwords -------------------------------------------------------------------------------------------------------


def test_a_password_from_the_option(private, tmp_path, sample, read_layers):
    authfile = write_auth(tmp_path / "auth.json", private)
    with open_image(f"{private}/team/sample:v1", authfile=authfile) as image:
        assert read_layers(image) == sample.layers


def test_a_password_from_a_helper(private, tmp_path, monkeypatch, sample, read_layers):
    helper = tmp_path / "bin/docker-credential-test"
    helper.parent.mkdir()
    answer = json.dumps({"ServerURL": private, "Username": servers.USER, "Secret": servers.PASSWORD})
    helper.write_text(f"#!{sys.executable}\nprint({answer!r})\n")
    helper.chmod(helper.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{helper.parent}:{os.environ['PATH']}")
    config = tmp_path / "home/.docker/config.json"
    config.parent.mkdir()
    config.write_text(json.dumps({"credHelpers": {private: "test"}}))
    with open_image(f"{private}/team/sample:v1") as image:
        assert read_layers(image) == sample.layers


def test_no_password(private):
    with pytest.raises(RemoteError, match="asks for credentials") as caught:
        open_image(f"{private}/team/sample:v1")
    assert f"skopeo login {private}" in caught.value.hint


def test_a_wrong_password(private, tmp_path):
    authfile = write_auth(tmp_path / "auth.json", private, password="wrong-secret")
    with pytest.raises(RemoteError, match=r"answered 401 for manifest v1") as caught:
        open_image(f"{private}/team/sample:v1", authfile=authfile)
    assert caught.value.hint == f"the credentials for {private} do not allow it"
    assert "wrong-secret" not in str(caught.value)


# --- TLS -------------------------------------------------------------------------------------------------------------


def test_an_authority_from_certs_d(encrypted, tmp_path, monkeypatch, sample, read_layers):
    host, certificate = encrypted
    (tmp_path / "certs.d" / host).mkdir(parents=True)
    (tmp_path / "certs.d" / host / "ca.crt").write_bytes(certificate.read_bytes())
    monkeypatch.setattr("erofsgen.oci.tls.CERTS_DIRS", (tmp_path / "none", tmp_path / "certs.d"))
    with open_image(f"{host}/team/sample:v1") as image:
        assert read_layers(image) == sample.layers


def test_an_unknown_authority(encrypted):
    with pytest.raises(RemoteError, match="is not trusted: self-signed certificate") as caught:
        open_image(f"{encrypted[0]}/team/sample:v1")
    assert "certs.d" in caught.value.hint


def test_verification_can_be_turned_off(encrypted, sample, read_layers):
    with open_image(f"{encrypted[0]}/team/sample:v1", tls_verify=False) as image:
        assert read_layers(image) == sample.layers


def test_a_broken_certificate_is_named(encrypted, tmp_path, monkeypatch):
    host, _ = encrypted
    (tmp_path / "certs.d" / host).mkdir(parents=True)
    (tmp_path / "certs.d" / host / "ca.crt").write_text("nonsense")
    monkeypatch.setattr("erofsgen.oci.tls.CERTS_DIRS", (tmp_path / "certs.d", tmp_path / "certs.d"))
    with pytest.raises(RemoteError, match=r"cannot load the certificates in .*certs\.d"):
        open_image(f"{host}/team/sample:v1")
