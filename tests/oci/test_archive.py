from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import struct
import subprocess
import tarfile
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from erofsgen.errors import (
    ErofsgenError,
    FormatError,
    IntegrityError,
    NotFoundError,
    StorageError,
    UnsupportedError,
    UsageError,
)
from erofsgen.oci.images import RootfsImage, open_image
from erofsgen.oci.members import Archive

TAR = "application/vnd.oci.image.layer.v1.tar"


@pytest.fixture(scope="session")
def docker_archive(sample, tmp_path_factory, copy_image):
    """What skopeo writes: layers by digest, with symlinks where old tools look for them."""
    path = tmp_path_factory.mktemp("docker") / "app.tar"
    copy_image(f"oci:{sample.layout}:v1", f"docker-archive:{path}:team/app:1")
    return path


@pytest.fixture(scope="session")
def oci_archive(sample, tmp_path_factory, copy_image):
    path = tmp_path_factory.mktemp("oci") / "app.tar"
    copy_image(f"oci:{sample.layout}:v1", f"oci-archive:{path}:v1")
    return path


class Writer:
    """A tar, member by member."""

    def __init__(self, path, **options):
        self.tar = tarfile.open(path, "w", **options)  # noqa: SIM115

    def add(self, name, data=b"", kind=tarfile.REGTYPE, link=""):
        member = tarfile.TarInfo(name)
        member.type, member.linkname, member.size = kind, link, len(data)
        self.tar.addfile(member, io.BytesIO(data))

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.tar.close()


def config_of(*tars, **more):
    ids = [f"sha256:{hashlib.sha256(data).hexdigest()}" for data in tars]
    fields = {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": ids}, **more}
    return json.dumps(fields).encode()


def saved(path, *images, extra=(), **options):
    """A docker archive; each image is (tags, config, [(member name, data)])."""
    with Writer(path, **options) as archive:
        manifest = []
        for tags, config, layers in images:
            name = f"{hashlib.sha256(config).hexdigest()}.json"
            archive.add(name, config)
            for member, data in layers:
                if data is not None:
                    archive.add(member, data)
            manifest.append({"Config": name, "RepoTags": tags, "Layers": [member for member, _ in layers]})
        for member in extra:
            archive.add(*member)
        archive.add("manifest.json", json.dumps(manifest).encode())
    return path


# --- docker-archive --------------------------------------------------------------------------------------------------


def test_a_docker_archive_made_by_skopeo(docker_archive, sample, read_layers):
    with open_image(f"docker-archive:{docker_archive}") as image:
        assert image.name == "docker.io/team/app:1"
        assert image.subject is None
        assert [layer.media_type for layer in image.layers] == [TAR] * 3
        assert [layer.digest for layer in image.layers] == [layer.diff_id for layer in image.layers]
        assert [layer.size for layer in image.layers] == list(map(len, sample.tars))
        assert read_layers(image) == list(sample.tars)
        assert json.loads(image.config)["rootfs"]["diff_ids"] == [layer.diff_id for layer in image.layers]


@pytest.mark.parametrize("reference", ["team/app:1", "docker.io/team/app:1", "@0"])
def test_an_image_is_chosen(reference, docker_archive):
    with open_image(f"docker-archive:{docker_archive}:{reference}") as image:
        assert image.name == "docker.io/team/app:1"


@pytest.mark.parametrize("reference", ["team/app:2", "team/app", "@1", "@999999"])
def test_a_missing_image_lists_those_there_are(reference, docker_archive):
    with pytest.raises(NotFoundError, match="has no image") as caught:
        open_image(f"docker-archive:{docker_archive}:{reference}")
    assert caught.value.hint == "there are: :docker.io/team/app:1"


def test_docker_save_up_to_24(sample, tmp_path, read_layers):
    """<id>/layer.tar, the third one a link to the first."""
    config = config_of(*sample.tars)
    layers = [
        ("a" * 64 + "/layer.tar", sample.tars[0]),
        ("b" * 64 + "/layer.tar", sample.tars[1]),
        ("c" * 64 + "/layer.tar", None),
    ]
    link = ("c" * 64 + "/layer.tar", b"", tarfile.SYMTYPE, f"../{'a' * 64}/layer.tar")
    path = saved(tmp_path / "x.tar", (["python:3.11-slim"], config, layers), extra=[link])
    with open_image(f"docker-archive:{path}") as image:
        assert image.name == "docker.io/library/python:3.11-slim"
        assert read_layers(image) == list(sample.tars)


def test_docker_save_since_25(oci_archive, sample, tmp_path, read_layers):
    """An OCI layout with a manifest.json: both transports read it, layers compressed or not."""
    manifest = sample.manifest
    layers = [layer["digest"].replace("sha256:", "blobs/sha256/") for layer in manifest["layers"]]
    path = tmp_path / "both.tar"
    with tarfile.open(oci_archive) as old, Writer(path) as new:
        for member in old:
            new.tar.addfile(member, old.extractfile(member))
        config = manifest["config"]["digest"].replace("sha256:", "blobs/sha256/")
        new.add("manifest.json", json.dumps([{"Config": config, "RepoTags": ["app:1"], "Layers": layers}]).encode())
    for transport, name in (("docker-archive", "docker.io/library/app:1"), ("oci-archive", "both")):
        with open_image(f"{transport}:{path}") as image:
            assert image.name == name
            assert [layer.digest for layer in image.layers] == [layer["digest"] for layer in manifest["layers"]]
            assert [layer.media_type for layer in image.layers] == [f"{TAR}+gzip"] * 3
            assert read_layers(image) == sample.layers


def test_an_image_without_tag_is_called_after_its_file(sample, tmp_path):
    path = saved(tmp_path / "my-app.docker.tar", (None, config_of(sample.tars[1]), [("1/layer.tar", sample.tars[1])]))
    with open_image(f"docker-archive:{path}") as image:
        assert image.name == "my-app"


def test_several_images(sample, tmp_path, read_layers):
    images = [
        ([f"app:{number}"], config_of(tar), [(f"{number}.tar", tar)]) for number, tar in enumerate(sample.tars[:2])
    ]
    path = saved(tmp_path / "x.tar", *images)
    with pytest.raises(UsageError, match="holds several images") as caught:
        open_image(f"docker-archive:{path}")
    assert caught.value.hint.endswith(":docker.io/library/app:0, :docker.io/library/app:1")
    for reference in ("app:1", "@1"):
        with open_image(f"docker-archive:{path}:{reference}") as image:
            assert read_layers(image) == [sample.tars[1]]


def test_compressed_layers_are_named_by_their_own_digest(sample, tmp_path, read_layers):
    blob = gzip.compress(sample.tars[1])
    path = saved(tmp_path / "x.tar", (["app:1"], config_of(sample.tars[1]), [("1/layer.tar", blob)]))
    with open_image(f"docker-archive:{path}") as image:
        (layer,) = image.layers
        assert layer.digest == f"sha256:{hashlib.sha256(blob).hexdigest()}"
        assert layer.diff_id == f"sha256:{hashlib.sha256(sample.tars[1]).hexdigest()}"
        assert layer.media_type == f"{TAR}+gzip"
        assert read_layers(image) == [blob]


@pytest.mark.parametrize("command", [["gzip"], ["zstd"], ["xz", "-0"], ["bzip2"]], ids=lambda command: command[0])
@pytest.mark.parametrize("transport", ["docker-archive", "oci-archive"])
def test_compressed_archives(command, transport, docker_archive, oci_archive, tmp_path, read_layers):
    plain = docker_archive if transport == "docker-archive" else oci_archive
    packed = tmp_path / "app.tar.packed"
    with plain.open("rb") as source, packed.open("wb") as target:
        subprocess.run([*command, "-c"], stdin=source, stdout=target, check=True)
    spool = tmp_path / "downloads"
    with open_image(f"{transport}:{plain}") as expected, open_image(f"{transport}:{packed}", downloads=spool) as image:
        assert image.layers == expected.layers
        assert read_layers(image) == read_layers(expected)
        assert list(spool.iterdir()) == []  # the unpacked file has no name


def test_an_archive_through_a_pipe(docker_archive, sample, tmp_path, read_layers):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    thread = threading.Thread(target=lambda: pipe.write_bytes(docker_archive.read_bytes()))
    thread.start()
    with open_image(f"docker-archive:{pipe}") as image:
        assert read_layers(image) == list(sample.tars)
    thread.join()


def test_layers_outlive_the_image(docker_archive, sample):
    with open_image(f"docker-archive:{docker_archive}") as image:
        file = image.open_layer(0)
    with file:
        assert file.read() == sample.tars[0]


@pytest.mark.parametrize("platform", ["linux/arm64", "windows/amd64"])
def test_another_platform(platform, docker_archive):
    with pytest.raises(NotFoundError, match=f"is not for {platform}"):
        open_image(f"docker-archive:{docker_archive}", platform=platform)


def test_a_damaged_config(sample, tmp_path):
    config = config_of(sample.tars[1])
    path = saved(tmp_path / "x.tar", (["app:1"], config, [("1/layer.tar", sample.tars[1])]))
    data = path.read_bytes()
    path.write_bytes(data.replace(b"amd64", b"arm64", 1))
    with pytest.raises(IntegrityError, match=hashlib.sha256(config).hexdigest()):
        open_image(f"docker-archive:{path}")


def test_layers_and_diff_ids_must_match(sample, tmp_path):
    path = saved(tmp_path / "x.tar", (["app:1"], config_of(*sample.tars), [("1/layer.tar", sample.tars[1])]))
    with pytest.raises(FormatError, match="3 diff_ids for 1 layers"):
        open_image(f"docker-archive:{path}")


@pytest.mark.parametrize(
    ("member", "transport", "error", "hint"),
    [
        ("index.json", "docker-archive", FormatError, "try oci-archive:"),
        ("manifest.json", "oci-archive", FormatError, "try docker-archive:"),
        ("repositories", "docker-archive", UnsupportedError, "save the image again"),
        ("other", "docker-archive", FormatError, None),
        ("other", "oci-archive", FormatError, None),
    ],
)
def test_archives_of_another_kind(member, transport, error, hint, tmp_path):
    with Writer(tmp_path / "x.tar") as archive:
        archive.add(member, b"{}")
    with pytest.raises(error) as caught:
        open_image(f"{transport}:{tmp_path}/x.tar")
    assert (caught.value.hint or "").startswith(hint or "")


@pytest.mark.parametrize(
    "document", [b"{", b"[1]", b'[{"Config": 1}]', b"[" * 100_000, b"[" + b" " * (5 << 20) + b"]"], ids=range(5)
)
def test_a_malformed_manifest(document, tmp_path):
    with Writer(tmp_path / "x.tar") as archive:
        archive.add("manifest.json", document)
    with pytest.raises(FormatError):
        open_image(f"docker-archive:{tmp_path}/x.tar")


# --- oci-archive -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tag", "name"), [(":v1", "v1"), ("", "app")])
def test_an_oci_archive_made_by_skopeo(tag, name, oci_archive, sample, read_layers):
    with open_image(f"oci-archive:{oci_archive}{tag}") as image, open_image(f"oci:{sample.layout}:v1") as layout:
        assert image.name == name
        assert image.subject == layout.subject
        assert image.config == layout.config
        assert image.layers == layout.layers
        assert read_layers(image) == sample.layers


def test_an_oci_archive_without_the_tag(oci_archive):
    with pytest.raises(NotFoundError, match="has no image 'v2'"):
        open_image(f"oci-archive:{oci_archive}:v2")


# --- hostile archives ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target", ["/etc/passwd", "../../../../../../etc/passwd", "nowhere", "a/../../etc/passwd", "1"], ids=str
)
@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE], ids=["symlink", "hard link"])
def test_links_stay_inside(target, kind, tmp_path):
    path = saved(tmp_path / "x.tar", (["app:1"], config_of(b"x"), [("1", None)]), extra=[("1", b"", kind, target)])
    with pytest.raises((NotFoundError, FormatError)) as caught:
        open_image(f"docker-archive:{path}")
    assert "root:" not in str(caught.value)


def test_links_may_leave_at_the_top_and_come_back_in(sample, tmp_path, read_layers):
    """As chroot has it: the archive's root is its own parent."""
    tar = sample.tars[1]
    extra = [("a/b/1.tar", b"", tarfile.SYMTYPE, "../../../real.tar"), ("2.tar", b"", tarfile.LNKTYPE, "a/b/1.tar")]
    layers = [("a/b/1.tar", None), ("./real.tar", tar), ("2.tar", None)]
    path = saved(tmp_path / "x.tar", (["app:1"], config_of(tar, tar, tar), layers), extra=extra)
    with open_image(f"docker-archive:{path}") as image:
        assert read_layers(image) == [tar] * 3


def test_the_last_of_equal_names_counts(tmp_path):
    with Writer(tmp_path / "x.tar") as writer:
        writer.add("a", b"old")
        writer.add("./a", b"new")
    archive = Archive((tmp_path / "x.tar").open("rb"), "x")
    file, size = archive.open("a")
    with file:
        assert (file.read(), size) == (b"new", 3)
    archive.close()


@pytest.mark.parametrize(
    "form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["ustar", "gnu", "pax"]
)
def test_tar_formats_and_long_names(form, tmp_path):
    long = "/".join(["d" * 60] * (2 if form == tarfile.USTAR_FORMAT else 30)) + "/" + "n" * 60
    with Writer(tmp_path / "x.tar", format=form) as writer:
        writer.add(long, b"content")
        if form != tarfile.USTAR_FORMAT:
            writer.add("link", b"", tarfile.LNKTYPE, long)
    archive = Archive((tmp_path / "x.tar").open("rb"), "x")
    for name in [long, "link"][: 1 if form == tarfile.USTAR_FORMAT else 2]:
        file, size = archive.open(name)
        with file:
            assert file.read() == b"content"
        assert archive.size(name) == size == 7
    archive.close()


def header(name=b"manifest.json", size=0, kind=b"0", raw_size=None):
    block = bytearray(512)
    block[: len(name)] = name
    block[124:136] = raw_size if raw_size is not None else b"%011o\0" % size
    block[156:157] = kind
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (header(size=0o77777777777), "claims 8589934591 bytes, more than the archive has left"),
        (header(raw_size=b"\x80" + b"\0" * 3 + struct.pack(">Q", 1 << 62)), "more than the archive has left"),
        (header(raw_size=b"\x80" + b"\xff" * 11), "more than the archive has left"),
        (header(raw_size=b"\xff" * 12), "negative size"),
        (header(raw_size=b"12345678xyz\0"), "not a tar archive"),
        (header(name=b"p", kind=b"x", size=0o77777777), "more than the archive has left"),
        (header(kind=b"x", size=10) + b"99 size=9\n".ljust(512, b"\0"), "bad PAX header"),
        (
            header(kind=b"x", size=20) + b"20 size=99999999999\n".ljust(512, b"\0") + header(),
            "claims 99999999999 bytes",
        ),
        (header(kind=b"x", size=12) + b"12 size=-99\n".ljust(512, b"\0") + header(), "size is not a number"),
        (header(kind=b"L", size=3 << 20) + bytes(3 << 20), "too long"),
        (b"\1" * 512, "not a tar archive"),
        (header()[:300], "not a tar archive"),
        (b"", "not a tar archive, or an empty one"),
        (bytes(10240), "not a tar archive, or an empty one"),
        (header(name=b"a" + b"/.." * 30), None),
        (header(name=b"n" * 99, size=100) + b"x" * 50, "more than the archive has left"),
    ],
    ids=range(16),
)
def test_hostile_headers(data, message, tmp_path):
    (tmp_path / "x.tar").write_bytes(data)
    with pytest.raises(FormatError, match=message):
        open_image(f"docker-archive:{tmp_path}/x.tar")


def test_members_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr("erofsgen.oci.members._MEMBERS", 1000)
    (tmp_path / "x.tar").write_bytes(b"".join(header(b"%d" % number) for number in range(1002)))
    with pytest.raises(FormatError, match="more than 1000 members"):
        open_image(f"docker-archive:{tmp_path}/x.tar")


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_damaged_archive_is_an_error_or_the_same_image(data, docker_archive, tmp_path_factory):
    content = bytearray(docker_archive.read_bytes())
    heads = [0, *range(len(content) - 20 * 512, len(content), 512)]
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.sampled_from(heads)) + data.draw(st.integers(0, 511))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.tar"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    try:
        with open_image(f"docker-archive:{path}") as image:
            assert len(image.layers) <= 3
    except ErofsgenError as error:
        assert str(error).isprintable()  # noqa: PT017


@pytest.mark.parametrize("transport", ["docker-archive", "oci-archive"])
@pytest.mark.parametrize("command", ["gzip", "xz", "zstd"])
def test_a_truncated_compressed_archive(transport, command, docker_archive, tmp_path):
    packed = subprocess.run([command, "-c", docker_archive], capture_output=True, check=True).stdout
    (tmp_path / "x.tar").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(FormatError, match=r"x\.tar: .* ends"):
        open_image(f"{transport}:{tmp_path}/x.tar")


@pytest.mark.parametrize("transport", ["docker-archive", "oci-archive", "tar"])
def test_files_that_are_not_there(transport, tmp_path):
    with pytest.raises(NotFoundError, match="does not exist"):
        open_image(f"{transport}:{tmp_path}/nowhere.tar")
    with pytest.raises(StorageError, match="Is a directory"):
        open_image(f"{transport}:{tmp_path}")


# --- tar: and dir: ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "suffix", "name"),
    [
        (["cat"], "", "root.tar"), (["gzip", "-c"], "+gzip", "root.tar.gz"), (["zstd", "-c"], "+zstd", "root.tar.zst"),
        (["xz", "-c0"], "+xz", "root.txz"), (["bzip2", "-c"], "+bzip2", "root.tar.bz2"),
    ],
)  # fmt: skip
def test_a_root_file_system_in_a_tar(command, suffix, name, sample, tmp_path, read_layers):
    blob = subprocess.run(command, input=sample.tars[0], capture_output=True, check=True).stdout
    (tmp_path / name).write_bytes(blob)
    digest = f"sha256:{hashlib.sha256(blob).hexdigest()}"
    with open_image(f"tar:{tmp_path}/{name}", platform="linux/arm64") as image:
        assert image.name == "root"
        assert image.subject is None
        (layer,) = image.layers
        assert (layer.digest, layer.size, layer.media_type) == (digest, len(blob), TAR + suffix)
        assert layer.diff_id == (None if suffix else digest)
        config = json.loads(image.config)
        assert (config["os"], config["architecture"]) == ("linux", "arm64")
        assert config["rootfs"]["diff_ids"] == ([] if suffix else [digest])
        assert read_layers(image) == [blob]
        assert read_layers(image) == [blob]


def test_a_tar_through_a_pipe(sample, tmp_path, read_layers):
    blob = gzip.compress(sample.tars[1])
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    thread = threading.Thread(target=lambda: pipe.write_bytes(blob))
    thread.start()
    with open_image(f"tar:{pipe}") as image:
        assert image.layers[0].media_type == f"{TAR}+gzip"
        assert read_layers(image) == [blob]
    thread.join()


def test_an_empty_tar(tmp_path):
    (tmp_path / "x.tar").touch()
    with pytest.raises(FormatError, match="is empty"):
        open_image(f"tar:{tmp_path}/x.tar")


def test_a_tar_that_shrinks(sample, tmp_path):
    (tmp_path / "x.tar").write_bytes(sample.tars[0])
    with open_image(f"tar:{tmp_path}/x.tar") as image:
        os.truncate(tmp_path / "x.tar", 100)
        with pytest.raises(IntegrityError, match="was truncated"):
            image.open_layer(0)


def test_a_root_file_system_in_a_directory(tmp_path):
    (tmp_path / "rootfs/etc").mkdir(parents=True)
    with open_image(f"dir:{tmp_path}/rootfs", platform="linux/arm/v6") as image:
        assert isinstance(image, RootfsImage)
        assert (image.name, image.subject, image.layers) == ("rootfs", None, ())
        assert image.rootfs == Path(tmp_path / "rootfs")
        assert json.loads(image.config)["variant"] == "v6"
        image.fetch([])
        with pytest.raises(IndexError):
            image.open_layer(0)


def test_a_root_file_system_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert open_image("dir:.").name == tmp_path.name.replace("_", "_")
    assert open_image("dir:/").name == "image"


def test_a_directory_that_skopeo_copied(sample, tmp_path, copy_image):
    copy_image(f"oci:{sample.layout}:v1", f"dir:{tmp_path}/copy")
    with pytest.raises(UsageError, match="skopeo") as caught:
        open_image(f"dir:{tmp_path}/copy")
    assert "skopeo copy" in caught.value.hint


def test_a_root_file_system_that_is_no_directory(tmp_path):
    (tmp_path / "x.tar").touch()
    with pytest.raises(UsageError) as caught:
        open_image(f"dir:{tmp_path}/x.tar")
    assert caught.value.hint.endswith(f"tar:{tmp_path}/x.tar")
    with pytest.raises(NotFoundError):
        open_image(f"dir:{tmp_path}/nowhere")


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["oci", "oci-archive", "docker-archive", "tar", "dir"])
def test_a_transport_needs_a_path(transport):
    with pytest.raises(UsageError, match="names no file"):
        open_image(f"{transport}:")


@pytest.mark.parametrize("transport", ["docker-daemon", "containers-storage", "ostree", "sif"])
def test_transports_of_others(transport):
    with pytest.raises(UnsupportedError) as caught:
        open_image(f"{transport}:x")
    assert f"skopeo copy {transport}:x" in caught.value.hint


def test_a_path_without_transport(docker_archive):
    with pytest.raises(UsageError) as caught:
        open_image(str(docker_archive))
    assert f"docker-archive:{docker_archive}" in caught.value.hint


@pytest.mark.parametrize("name", ["", "docker://", "docker://Quay.io/App", "a b"])
def test_names_that_are_malformed(name):
    with pytest.raises(UsageError, match="malformed"):
        open_image(name)


def test_progress_is_told(docker_archive, tmp_path):
    class Shown:
        def __init__(self):
            self.tasks = []

        def task(self, label, total=None):
            self.tasks.append([label, total, 0])
            return self

        def advance(self, amount):
            self.tasks[-1][2] += amount

        def __enter__(self):
            return self

        def __exit__(self, *exc):
            pass

    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(docker_archive.read_bytes()))
    size = (tmp_path / "x.tar.gz").stat().st_size
    shown = Shown()
    open_image(f"docker-archive:{tmp_path}/x.tar.gz", progress=shown).__exit__()
    open_image(f"tar:{tmp_path}/x.tar.gz", progress=shown).__exit__()
    assert shown.tasks == [["unpack x.tar.gz", size, size], ["hash x.tar.gz", size, size]]
