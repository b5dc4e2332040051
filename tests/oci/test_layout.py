from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess

import pytest

from erofsgen.errors import FormatError, IntegrityError, NotFoundError, UnsupportedError, UsageError
from erofsgen.oci.images import open_image
from erofsgen.oci.reference import ref_name


@pytest.fixture
def layout(sample, tmp_path):
    """A copy of the sample's layout, to be changed."""
    return shutil.copytree(sample.layout, tmp_path / "layout")


def edit_index(layout, change):
    path = layout / "index.json"
    index = json.loads(path.read_bytes())
    change(index)
    path.write_text(json.dumps(index))


def put(layout, document):
    data = json.dumps(document).encode()
    digest = hashlib.sha256(data).hexdigest()
    (layout / "blobs/sha256" / digest).write_bytes(data)
    return {"digest": f"sha256:{digest}", "size": len(data)}


def test_an_image_made_by_umoci(sample, read_layers):
    with open_image(f"oci:{sample.layout}:v1") as image:
        assert image.name == "v1"
        assert image.config == sample.blob(sample.manifest["config"]["digest"])
        assert image.subject.digest in (sample.layout / "index.json").read_text()
        assert [layer.digest for layer in image.layers] == [layer["digest"] for layer in sample.manifest["layers"]]
        assert [layer.diff_id for layer in image.layers] == json.loads(image.config)["rootfs"]["diff_ids"]
        assert [layer.size for layer in image.layers] == list(map(len, sample.layers))
        assert read_layers(image) == sample.layers


@pytest.mark.parametrize(("compression", "suffix"), [("gzip", "+gzip"), ("zstd", "+zstd")])
def test_compressions_made_by_skopeo(compression, suffix, sample, tmp_path, copy_image, read_layers):
    copy_image(
        f"oci:{sample.layout}:v1", f"oci:{tmp_path}/out:x", f"--dest-compress-format={compression}", "--dest-compress"
    )
    with open_image(f"oci:{tmp_path}/out:x") as image:
        assert all(layer.media_type.endswith(suffix) for layer in image.layers)
        for blob, tar in zip(read_layers(image), sample.tars, strict=True):
            assert subprocess.run([compression, "-dc"], input=blob, capture_output=True, check=True).stdout == tar


def test_the_only_image_needs_no_tag(layout):
    with open_image(f"oci:{layout}") as image:
        assert image.name == "layout"


def test_names_of_directories_become_valid(layout):
    odd = layout.rename(layout.with_name("my image (1)"))
    with open_image(f"oci:{odd}") as image:
        assert image.name == ref_name("my image (1)")
        assert image.name.startswith("my-image-1")


def test_tags_with_colons_and_paths_with_colons(layout, read_layers):
    edit_index(layout, lambda index: name(index["manifests"][0], "docker.io/library/app:1"))
    with open_image(f"oci:{layout}:docker.io/library/app:1") as image:
        assert image.name == "docker.io/library/app:1"
    odd = layout.rename(layout.with_name("a:b"))
    with open_image(f"oci:{odd}:docker.io/library/app:1") as image:
        assert len(read_layers(image)) == 3
    with open_image(f"oci:{odd}") as image:
        assert image.name.startswith("a:b")


def name(entry, *names):
    keys = ("org.opencontainers.image.ref.name", "io.containerd.image.name")
    entry["annotations"] = dict(zip(keys, names, strict=False))


def test_containerds_full_name(layout):
    edit_index(layout, lambda index: name(index["manifests"][0], "1", "docker.io/library/app:1"))
    for tag in ("1", "docker.io/library/app:1"):
        with open_image(f"oci:{layout}:{tag}") as image:
            assert image.name == tag


def test_several_images_need_a_tag(layout):
    def double(index):
        index["manifests"].append(json.loads(json.dumps(index["manifests"][0])))
        name(index["manifests"][1], "v2")

    edit_index(layout, double)
    with pytest.raises(UsageError, match="holds several images") as caught:
        open_image(f"oci:{layout}")
    assert caught.value.hint.endswith(":v1, :v2")
    with open_image(f"oci:{layout}:v2") as image:
        assert image.name == "v2"
    with pytest.raises(NotFoundError, match="has no image 'v3'") as caught:
        open_image(f"oci:{layout}:v3")
    assert caught.value.hint == "there are: :v1, :v2"


def test_one_image_for_two_platforms(layout, sample):
    arm_config = {**json.loads(sample.blob(sample.manifest["config"]["digest"])), "architecture": "arm64"}
    config = {**sample.manifest["config"], **put(layout, arm_config)}
    manifest_type = "application/vnd.oci.image.manifest.v1+json"
    arm = {"mediaType": manifest_type, **put(layout, {**sample.manifest, "config": config})}

    def add(index):
        index["manifests"][0]["platform"] = {"os": "linux", "architecture": "amd64"}
        index["manifests"].append(
            {**index["manifests"][0], **arm, "platform": {"os": "linux", "architecture": "arm64"}}
        )

    edit_index(layout, add)
    with open_image(f"oci:{layout}:v1", platform="linux/arm64") as image:
        assert image.subject.digest == arm["digest"]
        assert json.loads(image.config)["architecture"] == "arm64"
    with open_image(f"oci:{layout}", platform="linux/amd64") as image:
        assert json.loads(image.config)["architecture"] == "amd64"
    with pytest.raises(NotFoundError) as caught:
        open_image(f"oci:{layout}", platform="linux/s390x")
    assert "linux/amd64, linux/arm64" in caught.value.hint


def test_no_images(layout):
    edit_index(layout, lambda index: index.update(manifests=None))
    with pytest.raises(NotFoundError, match="holds no image"):
        open_image(f"oci:{layout}")


@pytest.mark.parametrize("missing", ["index.json", "oci-layout", ""])
def test_no_layout(missing, layout):
    shutil.rmtree(layout) if not missing else (layout / missing).unlink()
    with pytest.raises(NotFoundError, match="is not an OCI image layout" if missing else "does not exist"):
        open_image(f"oci:{layout}")


def test_a_layout_from_the_future(layout):
    (layout / "oci-layout").write_text('{"imageLayoutVersion": "2.0.0"}')
    with pytest.raises(UnsupportedError, match=r"version '2\.0\.0'"):
        open_image(f"oci:{layout}")


@pytest.mark.parametrize("document", ["index.json", "oci-layout"])
def test_malformed_documents(document, layout):
    (layout / document).write_text("{")
    with pytest.raises(FormatError, match=f"{document} of .* is malformed"):
        open_image(f"oci:{layout}")


@pytest.mark.parametrize("what", ["manifest", "config"])
def test_a_damaged_document(what, layout, sample):
    index = json.loads((layout / "index.json").read_bytes())
    digest = index["manifests"][0]["digest"] if what == "manifest" else sample.manifest["config"]["digest"]
    path = layout / "blobs" / digest.replace(":", "/")
    data = bytearray(path.read_bytes())
    data[20] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match=digest):
        open_image(f"oci:{layout}")


def layer_path(layout, sample, index=0):
    return layout / "blobs" / sample.manifest["layers"][index]["digest"].replace(":", "/")


def test_a_missing_layer(layout, sample):
    layer_path(layout, sample).unlink()
    with open_image(f"oci:{layout}") as image, pytest.raises(NotFoundError, match="does not exist"):
        image.open_layer(0)


def test_a_missing_foreign_layer(layout, sample):
    manifest = sample.manifest
    manifest["layers"][0]["mediaType"] = "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"
    edit_index(layout, lambda index: index["manifests"][0].update(put(layout, manifest)))
    layer_path(layout, sample).unlink()
    with open_image(f"oci:{layout}") as image, pytest.raises(NotFoundError) as caught:
        image.open_layer(0)
    assert "foreign layer" in caught.value.hint


@pytest.mark.parametrize("change", [-1, 1])
def test_a_layer_of_another_length(change, layout, sample):
    path = layer_path(layout, sample)
    path.chmod(0o644)
    os.truncate(path, path.stat().st_size + change)
    with open_image(f"oci:{layout}") as image, pytest.raises(IntegrityError, match=f"blob {image.layers[0].digest}"):
        image.open_layer(0)


@pytest.mark.parametrize("digest", ["sha256:../../../etc/passwd", "sha256:" + "/" * 64, "../x:y"])
def test_digests_are_no_paths(digest, layout):
    edit_index(layout, lambda index: index["manifests"][0].update(digest=digest))
    with pytest.raises(FormatError, match="malformed digest"):
        open_image(f"oci:{layout}")


@pytest.mark.timeout(10)
@pytest.mark.parametrize("name", ["index.json", "layer"])
def test_pipes_and_devices_are_no_blobs(name, layout, sample):
    path = layout / name if name != "layer" else layer_path(layout, sample)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(FormatError, match="is not a regular file"), open_image(f"oci:{layout}") as image:
        image.open_layer(0)


def test_a_huge_index_is_not_read(layout):
    os.truncate(layout / "index.json", 1 << 40)
    with pytest.raises(FormatError, match=r"index\.json of .* has 1099511627776 bytes"):
        open_image(f"oci:{layout}")
