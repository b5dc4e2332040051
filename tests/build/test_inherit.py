"""Profiles through rebuilds: the next build of an image gets what was learnt of the one before it."""

from __future__ import annotations

import io
import json
import random
import tarfile
from dataclasses import replace

import pytest
from blake3 import blake3
from profilekit import run_of

from erofsgen.build.options import BuildOptions
from erofsgen.build.pipeline import build_image
from erofsgen.errors import RemoteError
from erofsgen.oci.images import open_image
from erofsgen.profile import beside
from erofsgen.profile.carry import with_digests
from erofsgen.store.directory import DirectoryStore
from erofsgen.store.image import Image

FILES = {b"f%d" % number: random.Random(number).randbytes(5000 + number) for number in range(30)}
CHANGED = {**FILES, b"f3": b"another" * 1000, b"f7": b"different" * 900, b"more": b"new" * 3000}


@pytest.fixture
def store(tmp_path):
    return DirectoryStore(tmp_path / "store")


def learn(store, name, command="app"):
    """A profile of all of an image, laid beside it as hosts do."""
    image = Image.open(store, name)
    profile = with_digests(store, image, run_of(image, command=command))
    return beside.add(store, image.descriptor, profile)


def digests(store, name):
    """Per command, the digests of a profile's chunks, which are at the places that it says."""
    image = Image.open(store, name)
    slots = {pack.hex: pack.slot for pack in image.packs}
    found = {}
    for profile in beside.load(store, image.digest):
        found[profile.command] = {row["digest"].tobytes() for row in profile.rows}
        for row in profile.rows:
            reader = image.pack_reader(slots[profile.packs[row["pack"]]])
            chunk = reader.read(int(row["block"]) * 4096, int(row["length"]))
            assert blake3(chunk).digest()[:8] == row["digest"].tobytes()
    return found


def expected(files):
    return {blake3(content).digest()[:8] for content in files.values()}


@pytest.mark.parametrize("dedup", [True, False])
def test_a_rebuild_keeps_its_profiles(store, make_image, dedup):
    """Whether what did not change stayed in its packs or was packed anew."""
    first = make_image(store, "app", FILES)
    assert first.profiles == 0
    learn(store, "app")
    learn(store, "app", "other")
    second = make_image(store, "app", CHANGED, dedup=dedup, reuse_layers=False)
    assert second.profiles == 2
    there = expected({name: content for name, content in FILES.items() if name not in (b"f3", b"f7")})
    assert digests(store, "app") == {"app": there, "other": there}
    assert [profile.runs for profile in beside.load(store, second.digest)] == [1, 1]
    assert beside.load(store, first.digest), "beside the older image, too, until garbage is collected"


def test_the_same_image_is_left_alone(store, make_image):
    first = make_image(store, "app", FILES)
    learn(store, "app")
    before = store.profiles(first.digest)
    again = make_image(store, "app", FILES)
    assert (again.digest, again.profiles) == (first.digest, 0)
    assert store.profiles(first.digest) == before


def test_what_the_image_knows_itself_stays(store, make_image):
    """Back to what was built before: its own runs say more than those of another build."""
    make_image(store, "app", FILES)
    learn(store, "app")
    make_image(store, "app", CHANGED)
    learn(store, "app")
    learn(store, "app", "only there")
    back = make_image(store, "app", FILES)
    assert back.profiles == 1
    assert {profile.command: profile.runs for profile in beside.load(store, back.digest)} == {"app": 1, "only there": 1}
    assert digests(store, "app")["app"] == expected(FILES)


def test_guesses_are_made_anew(store, make_image):
    """And keep nobody from what was recorded of another image of the repository."""
    make_image(store, "app:1", FILES)
    image = Image.open(store, "app:1")
    beside.save(store, image.descriptor, [replace(run_of(image), runs=0)])
    assert make_image(store, "app:1", CHANGED).profiles == 0
    beside.save(store, image.descriptor, [replace(run_of(image), runs=0)])
    make_image(store, "app:2", {**FILES, b"x": b"x" * 900})
    learn(store, "app:2", "run")
    make_image(store, "app:1", FILES)
    assert make_image(store, "app:1", {**CHANGED, b"y": b"y" * 900}).profiles == 1


def dated(tmp_path, store, tag, files, created):
    """Build an image whose config says when it was made."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name.decode())
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    tar = packed.getvalue()
    layout = DirectoryStore(tmp_path / f"layout-{len(list(tmp_path.iterdir()))}")
    digest, size = layout.put(tar)
    config = {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": [digest]}}
    config |= {"created": created} if created else {}
    config_digest, config_size = layout.put(json.dumps(config).encode())
    kind = "application/vnd.oci.image."
    document = {
        "schemaVersion": 2,
        "mediaType": f"{kind}manifest.v1+json",
        "config": {"mediaType": f"{kind}config.v1+json", "digest": config_digest, "size": config_size},
        "layers": [{"mediaType": f"{kind}layer.v1.tar", "digest": digest, "size": size}],
    }
    manifest_digest, manifest_size = layout.put(json.dumps(document).encode())
    index = {"schemaVersion": 2, "manifests": [{
        "mediaType": document["mediaType"], "digest": manifest_digest, "size": manifest_size,
        "annotations": {"org.opencontainers.image.ref.name": "x"},
    }]}  # fmt: skip
    (layout.path / "index.json").write_text(json.dumps(index))
    with open_image(f"oci:{layout.path}:x") as source:
        return build_image(source, store, tag=tag, options=BuildOptions())


@pytest.mark.parametrize(
    ("one", "two", "chosen"),
    [
        ("2024-05-01T00:00:00Z", "2023-05-01T00:00:00Z", "one"),
        ("2023-05-01T00:00:00Z", "2024-05-01T00:00:00.123456789Z", "two"),
        (None, "2024-05-01T00:00:00+02:00", "two"),
        ("nonsense", None, "two"),
    ],
)
def test_a_new_tag_gets_those_of_the_newest(store, tmp_path, one, two, chosen):
    dated(tmp_path, store, "team/app:1", FILES, one)
    dated(tmp_path, store, "team/app:2", {**FILES, b"x": b"2" * 900}, two)
    dated(tmp_path, store, "team/app:3", {**FILES, b"x": b"3" * 900}, "2025-01-01T00:00:00Z")  # nobody ran it
    dated(tmp_path, store, "other/app:1", CHANGED, None)
    for name, command in (("team/app:1", "one"), ("team/app:2", "two"), ("other/app:1", "three")):
        learn(store, name, command)
    assert dated(tmp_path, store, "team/app:4", {**CHANGED, b"y": b"y" * 900}, None).profiles == 1
    assert list(digests(store, "team/app:4")) == [chosen]


def test_a_store_that_fails_then_fails_no_build(store, make_image, monkeypatch, caplog):
    make_image(store, "app", FILES)
    learn(store, "app")

    def fail(*_):
        raise RemoteError("no more")

    monkeypatch.setattr(store, "profiled", fail)
    assert make_image(store, "app", CHANGED).profiles == 0
    assert "no profiles are taken over from earlier builds: no more" in caplog.text
    monkeypatch.undo()
    make_image(store, "app", FILES)
    monkeypatch.setattr(store, "tag_profiles", fail)
    result = make_image(store, "app", {**CHANGED, b"z": b"z" * 999})
    assert result.profiles == 0
    assert Image.open(store, "app").digest == result.digest
    assert "no more" in caplog.records[-1].getMessage()
