"""Debian's docker-registry as a store, and what skopeo and we make of each other's images in it."""

from __future__ import annotations

import base64
import json
import random
import threading
from contextlib import closing
from pathlib import Path

import httpx
import pytest
import samples
import servers

from erofsgen.build.options import BuildOptions
from erofsgen.build.pipeline import build_image
from erofsgen.cli.main import run
from erofsgen.errors import NotFoundError, RemoteError, UnsupportedError, UsageError
from erofsgen.oci.images import open_image
from erofsgen.oci.manifest import OCI_INDEX
from erofsgen.store.base import Descriptor
from erofsgen.store.check import check
from erofsgen.store.directory import DirectoryStore
from erofsgen.store.extract import extract
from erofsgen.store.image import Image
from erofsgen.store.manifest import ARTIFACT_TYPE, MANIFEST_TYPE
from erofsgen.store.open import open_store

pytestmark = [pytest.mark.server, pytest.mark.timeout(120)]


def retagged(image: Image, **annotations: str) -> Descriptor:
    """Another manifest for the same image, as a blob of its store."""
    document = json.loads(image.store.read(image.digest, 0, image.manifest_size))
    document["annotations"] |= annotations
    return Descriptor(MANIFEST_TYPE, *image.store.put(json.dumps(document).encode()), artifact_type=ARTIFACT_TYPE)


def fallback_list(registry: str, repository: str, subject: str) -> list[dict]:
    tag = subject.replace(":", "-")
    answer = httpx.get(f"http://{registry}/v2/{repository}/manifests/{tag}", headers={"Accept": OCI_INDEX})
    return answer.raise_for_status().json()["manifests"]


def test_a_copy_is_the_image(registry, open_registry, built, push, tmp_path, require_root):
    store = open_registry(registry, "copy/app")
    assert store.references() == {}
    digest = push(store)
    assert store.references() == {
        "lazy": Descriptor(MANIFEST_TYPE, digest, built.image.manifest_size, artifact_type=ARTIFACT_TYPE)
    }
    image = Image.open(store, "lazy")
    assert image.manifest == built.image.manifest
    assert image.manifest.subject is not None
    assert image.config == built.image.config
    rng = random.Random(1)
    for blob in (image.manifest.config, *image.manifest.layers):
        assert store.size(blob.digest) == blob.size
        for _ in range(10):
            start = rng.randrange(blob.size)
            length = rng.randint(1, blob.size - start)
            assert store.read(blob.digest, start, length) == built.image.store.read(blob.digest, start, length)
    assert check(store).problems == []
    extract(image, tmp_path / "there")
    extract(built.image, tmp_path / "here")
    assert samples.snapshot(tmp_path / "there") == samples.snapshot(tmp_path / "here")
    assert store.speed is not None


def test_what_is_not_there(registry, open_registry, push):
    store = open_registry(registry, "missing/app")
    push(store)
    nothing = "sha256:" + "0" * 64
    assert store.size(nothing) is None
    with pytest.raises(NotFoundError, match=f"has no blob {nothing}"):
        store.read(nothing, 0, 1)
    assert store.reference("other") is None
    assert store.reference("docker.io/library/python:3.11") is None
    assert store.reference(nothing) is None
    store.delete(nothing)
    with pytest.raises(NotFoundError, match="no image 'other'"):
        store.untag("other")
    with pytest.raises(NotFoundError, match="no image 'python:3'"):
        Image.open(store, "python:3")


def test_a_second_copy_sends_nothing(registry, open_registry, built, push):
    store = open_registry(registry, "twice/app")
    push(store)
    blobs = [blob.digest for blob in (built.image.manifest.config, *built.image.manifest.layers)]
    for digest in blobs:
        store.delete(digest)
        assert store.size(digest) is None
    push(store)
    assert check(store).problems == []
    assert store.put(b"{}")[0] == store.put(b"{}")[0]


def test_skopeo_takes_our_artifact_as_it_is(registry, open_registry, push, skopeo, tmp_path):
    digest = push(open_registry(registry, "skopeo/from"))
    skopeo(f"docker://{registry}/skopeo/from:lazy", f"oci:{tmp_path / 'layout'}:copied")
    layout = DirectoryStore(tmp_path / "layout", create=False)
    assert Image.open(layout, "copied").digest == digest
    assert check(layout).problems == []


def test_what_skopeo_has_pushed(registry, open_registry, built, skopeo):
    """The manifest is no blob there."""
    skopeo(f"oci:{built.directory}:app:1", f"docker://{registry}/skopeo/to:copied")
    store = open_registry(registry, "skopeo/to")
    image = Image.open(store, "copied")
    assert image.digest == built.image.digest
    assert httpx.head(f"http://{registry}/v2/skopeo/to/blobs/{image.digest}").status_code == 404
    assert store.size(image.digest) == image.manifest_size
    whole = built.image.store.read(image.digest, 0, image.manifest_size)
    assert store.read(image.digest, 100, 50) == whole[100:150]
    assert check(store).problems == []
    store.tag("renamed", store.references()["copied"])
    assert Image.open(store, "renamed").digest == image.digest


def test_the_image_of_a_source_image(registry, open_registry, built, push, skopeo):
    """This registry has no referrers API: the list under a tag is ours to keep."""
    source = f"{registry}/source/app"
    skopeo(f"oci:{built.source}:v1", f"docker://{source}:v1")
    store = open_registry(registry, "source/app")
    assert store.reference("v1") is None
    digest = push(store)
    subject = built.image.manifest.subject
    (entry,) = fallback_list(registry, "source/app", subject.digest)
    assert entry == {
        "mediaType": MANIFEST_TYPE,
        "digest": digest,
        "size": built.image.manifest_size,
        "artifactType": ARTIFACT_TYPE,
        "annotations": built.image.manifest.annotations,
    }
    assert store.reference("v1").digest == digest
    assert store.reference(subject.digest).digest == digest
    assert Image.open(store, "v1").digest == digest
    assert set(store.references()) == {"lazy"}
    push(store, "again")
    assert len(fallback_list(registry, "source/app", subject.digest)) == 1
    newer = retagged(built.image, note="newer")
    store.tag("newer", Descriptor(MANIFEST_TYPE, *store.put(built.image.store.read(newer.digest, 0, newer.size))))
    assert store.reference("v1").digest == newer.digest
    with open_image(f"docker://{source}:v1", tls_verify=False) as opened:
        assert opened.subject.digest == subject.digest


def test_an_index_of_several_platforms_as_source(registry, open_registry, built, push, skopeo):
    skopeo(f"oci:{built.source}:v1", f"docker://{registry}/multi/app:amd64")
    store = open_registry(registry, "multi/app")
    subject = built.image.manifest.subject
    entry = {"mediaType": MANIFEST_TYPE, "digest": subject.digest, "size": subject.size}
    platforms = [{"os": "linux", "architecture": name} for name in ("amd64", "arm64", "riscv64", "s390x", "ppc64le")]
    document = {
        "schemaVersion": 2,
        "mediaType": OCI_INDEX,
        "manifests": [{**entry, "platform": platform} for platform in platforms],
    }
    headers = {"Content-Type": document["mediaType"]}
    httpx.put(
        f"http://{registry}/v2/multi/app/manifests/all", content=json.dumps(document), headers=headers
    ).raise_for_status()
    digest = push(store)
    assert store.reference("all").digest == digest


def test_builds_into_a_registry(registry, open_registry, tmp_path):
    """A second build finds the packs of the first by the images that are there."""
    store = open_registry(registry, "build/app")
    with open_image(f"tar:{samples.write_sample(tmp_path / 'one.tar', 1)}") as source:
        first = build_image(source, store, tag="one")
    with open_image(f"tar:{samples.write_sample(tmp_path / 'two.tar', 2)}") as source:
        second = build_image(source, store, tag="two")
        unshared = build_image(source, store, tag="three", options=BuildOptions(dedup=False))
    assert second.packs - second.new_packs > 0
    assert second.deduplicated_bytes > first.deduplicated_bytes
    assert second.new_bytes < unshared.new_bytes
    assert set(store.references()) == {"one", "two", "three"}
    assert check(store).problems == []
    assert list(store.records()) == []
    assert list((store.scratch / "tmp").iterdir()) == []


def test_names_are_tags(registry, open_registry, built, tmp_path):
    store = open_registry(registry, "names/app")
    manifest = Descriptor(MANIFEST_TYPE, built.image.digest, built.image.manifest_size)
    with pytest.raises(UsageError, match=r"'docker\.io/library/python:3\.11' is no tag") as caught:
        store.tag("docker.io/library/python:3.11", manifest)
    assert caught.value.hint.endswith(": 3.11")
    with open_image(f"tar:{samples.write_sample(tmp_path / 'one.tar')}") as source:
        with pytest.raises(UsageError, match="'a/b' is no tag"):
            build_image(source, store, tag="a/b")
        assert build_image(source, store).name == "one"


@pytest.mark.parametrize(
    ("name", "tag"),
    [
        ("docker.io/library/python:3.11-slim", "3.11-slim"),
        ("app", "app"),
        ("localhost:5000/app", "latest"),
        ("docker.io/library/python@sha256:" + "0" * 64, "latest"),
        ("Some Thing/else", "Some-Thing-else"),
        ("/", "latest"),
    ],
)
def test_what_images_are_called(open_registry, name, tag):
    assert open_registry("localhost:1").called(name) == tag
    open_registry("localhost:1").check_name(tag)


def test_removal_by_digest(registry, open_registry, built, push, skopeo):
    """This registry does not delete tags."""
    skopeo(f"oci:{built.source}:v1", f"docker://{registry}/remove/app:v1")
    store = open_registry(registry, "remove/app")
    push(store, "one")
    push(store, "two")
    with pytest.raises(UnsupportedError, match=r"deletes images, not tags, and 'one' has the tag 'two', too"):
        store.untag("one")
    assert set(store.references()) == {"one", "two"}
    other = retagged(built.image, note="other")
    store.tag("two", Descriptor(MANIFEST_TYPE, *store.put(built.image.store.read(other.digest, 0, other.size))))
    store.untag("one")
    assert set(store.references()) == {"two"}
    assert store.reference("v1").digest == other.digest
    assert [item["digest"] for item in fallback_list(registry, "remove/app", built.image.manifest.subject.digest)] == [
        other.digest
    ]
    store.untag("two")
    assert store.references() == {}
    assert store.reference("v1") is None


def test_many_pushers_at_once(registry, open_registry, built, skopeo):
    """Each with an image of the same source, and nobody locks the list of what refers to it."""
    skopeo(f"oci:{built.source}:v1", f"docker://{registry}/race/app:v1")
    manifests = [retagged(built.image, number=str(number)) for number in range(6)]
    stores = [open_registry(registry, "race/app") for _ in manifests]
    for blob in (built.image.manifest.config, *built.image.manifest.layers):
        with stores[0].create() as writer:
            writer.write(built.image.store.read(blob.digest, 0, blob.size))
            writer.commit()
    for manifest in manifests:
        stores[0].put(built.image.store.read(manifest.digest, 0, manifest.size))
    threads = [
        threading.Thread(target=store.tag, args=(f"t{number}", manifest))
        for number, (store, manifest) in enumerate(zip(stores, manifests, strict=True))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    listed = fallback_list(registry, "race/app", built.image.manifest.subject.digest)
    assert {item["digest"] for item in listed} == {manifest.digest for manifest in manifests}


def test_what_a_registry_has_not(registry, open_registry):
    store = open_registry(registry, "nothing/app")
    with pytest.raises(UnsupportedError, match="does not list blobs"):
        list(store.blobs())
    with pytest.raises(UnsupportedError, match="collects its garbage itself"):
        store.collecting()
    store.put_record("key", b"record")
    assert store.record("key") is None
    store.delete_record("key")


# --- who may ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def private(tmp_path_factory):
    with servers.docker_registry(tmp_path_factory.mktemp("private"), password=True) as host:
        yield host


def write_auth(path: Path, host: str, password: str = servers.PASSWORD) -> str:
    auth = base64.b64encode(f"{servers.USER}:{password}".encode()).decode()
    path.write_text(json.dumps({"auths": {host: {"auth": auth}}}))
    return str(path)


def test_a_password(private, push, tmp_path):
    authfile = write_auth(tmp_path / "auth.json", private)
    with closing(open_store(f"docker://{private}/team/app?authfile={authfile}")) as store:
        digest = push(store)
        assert check(store).problems == []
        assert Image.open(store, "lazy").digest == digest


@pytest.mark.parametrize(("password", "said"), [("wrong-secret", "credentials"), (None, "skopeo login")])
def test_no_or_a_wrong_password(private, built, password, said, tmp_path, capfd):
    authfile = write_auth(tmp_path / "auth.json", private if password else "other", password or "")
    url = f"docker://{private}/team/app?authfile={authfile}"
    for arguments in (
        ["--store", url, "images"],
        ["--store", str(built.directory), "--quiet", "push", "app:1", url],
    ):
        assert run(arguments) == 6
        error, hint = capfd.readouterr().err.splitlines()
        assert error.startswith("erofsgen: error: ")
        assert private in error
        assert said in hint
        assert "wrong-secret" not in error + hint


def test_an_authority_of_ones_own(push, tmp_path, monkeypatch, open_registry):
    certificate = servers.make_certificate(tmp_path)
    with servers.docker_registry(tmp_path / "registry", certificate=certificate) as host:
        with pytest.raises(RemoteError, match="is not trusted"):
            push(open_registry(host))
        with closing(open_store(f"docker://{host}/team/app?tls-verify=false")) as store:
            push(store)
        (tmp_path / "certs.d" / host).mkdir(parents=True)
        certificate[0].rename(tmp_path / "certs.d" / host / "ca.crt")
        monkeypatch.setattr("erofsgen.oci.tls.CERTS_DIRS", (tmp_path / "none", tmp_path / "certs.d"))
        store = open_registry(host, "other/app")
        push(store)
        assert check(store).problems == []


@pytest.mark.parametrize(
    "place", ["localhost:5000/a:tag", "localhost:5000/a@sha256:" + "0" * 64, "localhost:5000/A", ""]
)
def test_malformed_places(place):
    with pytest.raises(UsageError):
        open_store(f"docker://{place}")


def test_unknown_options():
    with pytest.raises(UsageError, match="unknown option 'tls'"):
        open_store("docker://localhost:5000/a?tls=no")
