from __future__ import annotations

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from erofsgen.errors import (
    ErofsgenError,
    FormatError,
    IntegrityError,
    NotFoundError,
    UnsupportedError,
    UsageError,
)
from erofsgen.oci import manifest as m
from erofsgen.oci.platforms import Platform

LAYER = {"mediaType": m.OCI_LAYER, "digest": f"sha256:{'1' * 64}", "size": 10}


class Blobs:
    """Documents by digest, as a registry has them."""

    def __init__(self):
        self.content = {}
        self.reads = 0

    def add(self, document, media_type, **fields):
        data = document if isinstance(document, bytes) else json.dumps(document).encode()
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        self.content[digest] = data
        return {"mediaType": media_type, "digest": digest, "size": len(data), **fields}

    def image(
        self, platform=None, *, layers=(LAYER,), config_type="application/vnd.oci.image.config.v1+json", **config
    ):
        """An image's descriptor. ``platform`` goes into its config and, as a dictionary, into the descriptor."""
        parts = (platform or "linux/amd64").split("/")
        fields = dict(zip(("os", "architecture", "variant"), parts, strict=False))
        described = self.add({**fields, **config}, config_type)
        document = {"schemaVersion": 2, "mediaType": m.OCI_MANIFEST, "config": described, "layers": list(layers)}
        return self.add(document, m.OCI_MANIFEST, **({"platform": fields} if platform else {}))

    def index(self, *entries, media_type=m.OCI_INDEX, **fields):
        return self.add({"schemaVersion": 2, "mediaType": media_type, "manifests": entries}, media_type, **fields)

    def read(self, descriptor):
        self.reads += 1
        return self.content[descriptor.digest]

    def resolve(self, *roots, platform=None):
        tops = [m.decode(json.dumps(root).encode(), m.Descriptor, "root") for root in roots]
        return m.resolve(tops, self.read, platform, "demo")


@pytest.fixture
def blobs():
    return Blobs()


@pytest.fixture
def on_amd64(monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")


# --- platforms -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("linux/amd64", "linux/amd64"), ("linux/x86_64", "linux/amd64"), ("linux/amd64/v1", "linux/amd64"),
        ("linux/amd64/v3", "linux/amd64/v3"), ("linux/arm64", "linux/arm64"), ("linux/aarch64", "linux/arm64"),
        ("linux/arm64/v8", "linux/arm64"), ("linux/arm64/8", "linux/arm64"), ("linux/arm", "linux/arm/v7"),
        ("linux/arm/v6", "linux/arm/v6"), ("linux/armhf", "linux/arm/v7"), ("linux/armel", "linux/arm/v6"),
        ("linux/i386", "linux/386"), ("LINUX/AMD64", "linux/amd64"), ("macos/arm64", "darwin/arm64"),
        ("arm64", "linux/arm64"), ("windows", "windows/amd64"), ("linux/riscv64", "linux/riscv64"),
    ],
)  # fmt: skip
def test_platforms_are_normalised(text, shown, on_amd64):
    assert str(Platform.parse(text)) == shown
    assert Platform.parse(shown) == Platform.parse(text)


@pytest.mark.parametrize("text", ["", "/", "linux/", "/amd64", "linux/arm/v7/x", "linux amd64", "linux/ä"])
def test_malformed_platforms(text):
    with pytest.raises(UsageError):
        Platform.parse(text)


@pytest.mark.parametrize(
    ("machine", "shown"),
    [
        ("x86_64", "linux/amd64"), ("aarch64", "linux/arm64"), ("armv7l", "linux/arm/v7"), ("armv6l", "linux/arm/v6"),
        ("i686", "linux/386"), ("ppc64le", "linux/ppc64le"), ("loongarch64", "linux/loong64"),
    ],
)  # fmt: skip
def test_this_machine(machine, shown, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: machine)
    assert str(Platform.host()) == shown


# --- choosing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("there", "wanted", "chosen"),
    [
        (["linux/amd64", "linux/arm64"], None, 0),
        (["linux/arm64", "linux/amd64"], None, 1),
        (["linux/amd64", "linux/arm64"], "linux/arm64", 1),
        (["linux/amd64", "linux/arm64/v8"], "linux/arm64", 1),
        (["linux/amd64", "linux/arm64"], "linux/arm64/v8", 1),
        (["linux/arm/v5", "linux/arm/v6", "linux/arm/v7"], "linux/arm", 2),
        (["linux/arm/v5", "linux/arm/v6", "linux/arm/v7"], "linux/arm/v6", 1),
        (["linux/arm/v5", "linux/arm/v6"], "linux/arm/v7", 1),
        (["linux/arm/v7", "linux/arm/v5"], "linux/arm/v6", 1),
        (["linux/amd64", "linux/amd64/v3"], "linux/amd64/v2", 0),
        (["linux/amd64", "linux/amd64/v3"], "linux/amd64/v4", 1),
        (["linux/amd64", "linux/amd64"], "linux/amd64", 0),
        (["windows/amd64", "linux/amd64"], None, 1),
    ],
)
def test_a_platform_is_chosen(there, wanted, chosen, blobs, on_amd64):
    entries = [blobs.image(platform, note=str(number)) for number, platform in enumerate(there)]
    resolved = blobs.resolve(blobs.index(*entries), platform=wanted)
    assert resolved.subject.digest == entries[chosen]["digest"]
    assert json.loads(resolved.config)["note"] == str(chosen)


@pytest.mark.parametrize(
    ("there", "wanted"),
    [
        (["linux/arm64", "linux/arm/v7"], None),
        (["linux/arm64", "linux/arm/v7"], "linux/arm/v6"),
        (["linux/arm64", "linux/arm/v7"], "linux/amd64"),
        (["linux/amd64/v3"], "linux/amd64"),
        (["windows/amd64"], "linux/amd64"),
        (["linux/arm64"], None),
    ],
)
def test_a_missing_platform_lists_those_there_are(there, wanted, blobs, on_amd64):
    index = blobs.index(*map(blobs.image, there))
    with pytest.raises(NotFoundError, match=f"demo has no image for {wanted or 'linux/amd64'}") as caught:
        blobs.resolve(index, platform=wanted)
    assert all(platform in caught.value.hint for platform in there)


def test_attestations_are_no_images(blobs, on_amd64):
    unknown = blobs.image("unknown/unknown")
    annotated = {**blobs.image(note="x"), "annotations": {"vnd.docker.reference.type": "attestation-manifest"}}
    image = blobs.image("linux/amd64")
    assert blobs.resolve(blobs.index(unknown, annotated, image)).subject.digest == image["digest"]
    with pytest.raises(NotFoundError):
        blobs.resolve(blobs.index(unknown, annotated))


def test_a_docker_manifest_list(blobs, on_amd64):
    image = blobs.image("linux/amd64")
    assert blobs.resolve(blobs.index(image, media_type=m.DOCKER_LIST)).subject.digest == image["digest"]


def test_nested_indexes(blobs, on_amd64):
    image = blobs.image("linux/arm64")
    inner = blobs.index(blobs.image("linux/amd64"), image)
    outer = blobs.index(inner, blobs.image("linux/s390x"))
    assert blobs.resolve(outer, platform="linux/arm64").subject.digest == image["digest"]


def test_nesting_ends(blobs):
    entry = blobs.image("linux/amd64")
    for _ in range(10):
        entry = blobs.index(entry)
    with pytest.raises(FormatError, match="nested too deeply"):
        blobs.resolve(entry)


def test_many_nested_indexes_are_not_all_read(blobs):
    entries = [blobs.index(blobs.image(f"linux/a{number}")) for number in range(1000)]
    with pytest.raises(FormatError, match="nested too deeply"):
        blobs.resolve(blobs.index(*entries))
    assert blobs.reads < 50


def test_a_single_image_is_taken_whatever_its_platform(blobs, on_amd64):
    image = blobs.image("linux/s390x")
    assert blobs.resolve(image).subject.digest == image["digest"]
    del image["platform"]
    assert blobs.resolve(image).subject.digest == image["digest"]


def test_a_single_image_for_another_platform_than_the_one_asked_for(blobs):
    image = blobs.image("linux/s390x")
    del image["platform"]
    assert blobs.resolve(image, platform="linux/s390x").subject.digest == image["digest"]
    with pytest.raises(NotFoundError, match="demo is not for linux/arm64"):
        blobs.resolve(image, platform="linux/arm64")


def test_an_index_entry_without_platform(blobs, on_amd64):
    image = blobs.image()
    assert blobs.resolve(blobs.index(image)).subject.digest == image["digest"]


# --- documents -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("served", "own", "recognised"),
    [
        (m.OCI_MANIFEST, m.OCI_MANIFEST, m.OCI_MANIFEST),
        (m.OCI_MANIFEST, None, m.OCI_MANIFEST),
        (m.DOCKER_MANIFEST, m.DOCKER_MANIFEST, m.DOCKER_MANIFEST),
        ("application/json", m.DOCKER_MANIFEST, m.DOCKER_MANIFEST),
        ("application/json; charset=utf-8", None, m.OCI_MANIFEST),
        ("text/plain", m.OCI_MANIFEST, m.OCI_MANIFEST),
        ("", None, m.OCI_MANIFEST),
        (f"{m.OCI_MANIFEST}; charset=utf-8", None, m.OCI_MANIFEST),
    ],
)
def test_media_types_are_recognised(served, own, recognised):
    config = {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": f"sha256:{'2' * 64}", "size": 2}
    document = {"config": config, "layers": [LAYER], **({"mediaType": own} if own else {})}
    assert m.parse(json.dumps(document).encode(), served, "it")[0] == recognised


def test_an_index_without_any_type():
    assert m.parse(b'{"manifests": []}', "", "it") == (m.OCI_INDEX, m.Index(()))


CONFIG = {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": f"sha256:{'2' * 64}", "size": 2}


@pytest.mark.parametrize(
    ("served", "document", "error", "message"),
    [
        (m.OCI_MANIFEST, {"config": CONFIG, "layers": [], "manifests": []}, FormatError, "manifest at once"),
        (m.OCI_INDEX, {"config": CONFIG, "manifests": []}, FormatError, "index and a manifest at once"),
        (m.OCI_MANIFEST, {"mediaType": m.OCI_INDEX, "manifests": []}, FormatError, "calls itself"),
        (m.OCI_INDEX, {"mediaType": m.DOCKER_LIST, "manifests": []}, FormatError, "calls itself"),
        (m.OCI_MANIFEST, {"layers": []}, FormatError, "not what its media type"),
        (m.OCI_INDEX, {"config": CONFIG}, FormatError, "not what its media type"),
        (m.OCI_MANIFEST, {"config": {"digest": "x"}}, FormatError, "malformed"),
        (m.OCI_MANIFEST, {"config": {**CONFIG, "size": -1}}, FormatError, "malformed"),
        (m.OCI_MANIFEST, {"config": {**CONFIG, "size": 1 << 63}}, FormatError, "malformed"),
        (m.OCI_MANIFEST, {"config": {**CONFIG, "size": "9"}}, FormatError, "malformed"),
        (m.OCI_MANIFEST, [], FormatError, "malformed"),
        ("application/x-tar", {}, UnsupportedError, "application/x-tar"),
        ("", {"mediaType": "application/x-tar"}, UnsupportedError, "application/x-tar"),
        ("application/vnd.docker.distribution.manifest.v1+prettyjws", {}, UnsupportedError, "schema 1"),
        ("application/json", {"schemaVersion": 1, "fsLayers": []}, UnsupportedError, "schema 1"),
    ],
)  # fmt: skip
def test_documents_that_are_refused(served, document, error, message):
    with pytest.raises(error, match=message) as caught:
        m.parse(json.dumps(document).encode(), served, "manifest x of demo")
    assert type(caught.value) is error
    assert str(caught.value).startswith("manifest x of demo")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{", b"\xff", b"null", b'"\xed\xa0\x80"', b'{"a":' * 100_000, b"[" * 1_000_000, b'{"config":' * 50_000,
        b'{"layers":[' + b"[" * 100_000, b'{"manifests":"' + b"a" * 1000, b'{"schemaVersion":1e999999}x',
    ],
    ids=range(11),
)  # fmt: skip
def test_malformed_json_is_a_format_error(data):
    with pytest.raises(FormatError, match="it is malformed"):
        m.parse(data, m.OCI_MANIFEST, "it")


@given(st.binary(max_size=200) | st.text().map(str.encode))
def test_nothing_else_comes_out_of_any_bytes(data):
    with pytest.raises(ErofsgenError):
        m.parse(data, m.OCI_MANIFEST, "it")


def test_documents_have_a_limit(blobs):
    with pytest.raises(FormatError, match="longer than 4194304 bytes"):
        m.parse(b" " * ((4 << 20) + 1), m.OCI_MANIFEST, "it")
    huge = {**blobs.image(), "size": 5 << 20}
    with pytest.raises(FormatError, match="claims 5242880 bytes"):
        blobs.resolve(huge)
    assert blobs.reads == 0


# --- integrity -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["index", "manifest", "config"])
@pytest.mark.parametrize("damage", [lambda data: data[:-1] + b" ", lambda data: data + b" ", lambda data: data[:-1]])
def test_damaged_documents_are_found(which, damage, blobs, on_amd64):
    image = blobs.image("linux/amd64")
    index = blobs.index(image)
    config = json.loads(blobs.content[image["digest"]])["config"]
    digest = {"index": index, "manifest": image, "config": config}[which]["digest"]
    blobs.content[digest] = damage(blobs.content[digest])
    with pytest.raises(IntegrityError, match=f"{which} {digest} of demo"):
        blobs.resolve(index)


@pytest.mark.parametrize("digest", ["", "sha256", "sha256:..", "sha256:../../../etc/passwd", "md5:" + "0" * 32])
def test_malformed_digests(digest, blobs):
    with pytest.raises(FormatError, match="malformed digest"):
        blobs.resolve({**blobs.image(), "digest": digest})
    with pytest.raises(FormatError, match="malformed digest"):
        blobs.resolve(blobs.image(layers=[{**LAYER, "digest": digest}]))


# --- layers and configs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("media_type", sorted(m.LAYER_TYPES))
def test_layer_types(media_type, blobs):
    layer = {**LAYER, "mediaType": media_type, "urls": ["https://example.com/layer"]}
    resolved = blobs.resolve(blobs.image(layers=[layer]))
    assert resolved.layers[0].media_type == media_type
    assert resolved.blobs[0].urls == ("https://example.com/layer",)


@pytest.mark.parametrize(
    "media_type",
    ["", "text/plain", f"{m.OCI_LAYER}+xz", f"{m.OCI_LAYER}+gzip+encrypted", "application/vnd.cncf.helm.chart"],
)
def test_other_layer_types_are_named(media_type, blobs):
    with pytest.raises(UnsupportedError) as caught:
        blobs.resolve(blobs.image(layers=[{**LAYER, "mediaType": media_type}]))
    assert repr(media_type) in str(caught.value)
    assert LAYER["digest"] in str(caught.value)


def test_artifacts_are_no_images(blobs):
    with pytest.raises(UnsupportedError, match="helm") as caught:
        blobs.resolve(blobs.image(config_type="application/vnd.cncf.helm.config.v1+json"))
    assert caught.value.hint == "this is an artifact, not a container image"


def test_diff_ids_go_to_their_layers(blobs):
    ids = [f"sha256:{digit * 64}" for digit in "abc"]
    layers = [{**LAYER, "digest": f"sha256:{digit * 64}"} for digit in "123"]
    resolved = blobs.resolve(blobs.image(layers=layers, rootfs={"type": "layers", "diff_ids": ids}))
    assert [layer.diff_id for layer in resolved.layers] == ids
    assert [layer.digest for layer in resolved.layers] == [layer["digest"] for layer in layers]


@pytest.mark.parametrize("rootfs", [None, {}, {"diff_ids": None}, {"diff_ids": []}])
def test_diff_ids_may_be_absent(rootfs, blobs):
    resolved = blobs.resolve(blobs.image(layers=[LAYER, LAYER], rootfs=rootfs))
    assert [layer.diff_id for layer in resolved.layers] == [None, None]


@pytest.mark.parametrize("ids", [["sha256:" + "a" * 64], ["sha256:" + "a" * 64] * 3, ["x", "y"], ["", ""]])
def test_diff_ids_that_do_not_fit(ids, blobs):
    with pytest.raises(FormatError, match="diff_id"):
        blobs.resolve(blobs.image(layers=[LAYER, LAYER], rootfs={"diff_ids": ids}))


def test_an_image_without_layers(blobs):
    assert blobs.resolve(blobs.image(layers=[])).layers == ()


@pytest.mark.parametrize(
    ("platform", "fields"),
    [
        ("linux/arm64", {"os": "linux", "architecture": "arm64"}),
        ("linux/arm", {"os": "linux", "architecture": "arm", "variant": "v7"}),
        ("linux/amd64/v3", {"os": "linux", "architecture": "amd64", "variant": "v3"}),
    ],
)
def test_a_minimal_config(platform, fields):
    config = json.loads(m.minimal_config(platform, ["sha256:0"]))
    assert config == {**fields, "config": {}, "rootfs": {"type": "layers", "diff_ids": ["sha256:0"]}}


def test_hostile_words_do_not_reach_the_terminal(blobs, on_amd64):
    index = blobs.index(blobs.image("\x1b[2J\n/evil"), blobs.image("linux/s390x"))
    with pytest.raises(NotFoundError) as caught:
        blobs.resolve(index)
    assert caught.value.hint.isprintable()
    with pytest.raises(UnsupportedError) as caught:
        blobs.resolve(blobs.image(layers=[{**LAYER, "mediaType": "\x1b[2J\n"}]))
    assert str(caught.value).isprintable()
