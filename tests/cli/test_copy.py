"""Images between stores: ``copy``, ``push``, ``pull --from``."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from servers import docker_registry

from erofsgen.store.directory import DirectoryStore
from erofsgen.store.image import Image


def test_push_sends_what_is_missing(sample, tmp_path):
    other = tmp_path / "other"
    first = sample("push", "sample:1", other, "--json").json[0]
    image = Image.open(DirectoryStore(other, create=False), "sample:1")
    assert first["digest"] == image.digest
    assert first["blobs"] == len(image.packs) + 2
    assert first["kept_blobs"] == 0
    again = sample("push", "sample:1", other, "--json").json[0]
    assert (again["blobs"], again["bytes"], again["kept_bytes"]) == (0, 0, first["bytes"])
    second = sample("push", "sample:2", other)
    assert b"were there" in second.out
    assert sample("--store", other, "check").code == 0


def test_copies_are_the_image(sample, tmp_path):
    """Everything, config and tree included, and plain tools find the layout."""
    other = tmp_path / "other"
    rows = sample("copy", sample.store, other).lines
    assert len(rows) == 2
    assert sorted(DirectoryStore(other, create=False).references()) == ["sample:1", "sample:2"]
    for name in ("sample:1", "sample:2"):
        here, there = (Image.open(DirectoryStore(path, create=False), name) for path in (sample.store, other))
        assert here.config == there.config
        assert here.index_bytes() == there.index_bytes()
        assert sample("--store", other, "inspect", name, "--json").json["digest"] == here.digest
    assert sample("--store", other, "extract", "sample:1", tmp_path / "tree").code == 0


def test_pull_from(sample, erofsgen, tmp_path):
    erofsgen.options[1] = str(tmp_path / "mine")
    erofsgen("pull", "--from", sample.store, "sample:1", "--as", "renamed")
    assert [row["name"] for row in erofsgen("images", "--json").json] == ["renamed"]
    assert not (erofsgen.root / "images").exists()


def test_one_name_is_not_for_several(sample, tmp_path):
    outcome = sample("push", "sample:1", "sample:2", tmp_path / "other", "--as", "x", code=2)
    assert "one by one" in outcome.err
    twice = sample("copy", sample.store, "docker://localhost:1/team/demo", "a:1", "b:1", code=2)
    assert "'1'" in twice.err
    assert "--from" in sample("pull", "sample:1", "--as", "x", code=2).err


def test_an_interrupted_copy_goes_on(sample, tmp_path):
    """The blobs that had arrived are not sent again; no name is there before the last of them."""
    other = tmp_path / "other"
    image = Image.open(DirectoryStore(sample.store, create=False), "sample:1")
    source = tmp_path / "source"
    shutil.copytree(sample.store, source)
    victim = DirectoryStore(source).blob_path(image.packs[-1].digest)
    data = victim.read_bytes()
    victim.unlink()
    outcome = sample("copy", source, other, "sample:1", code=3)
    assert image.packs[-1].digest in outcome.err
    assert DirectoryStore(other, create=False).references() == {}
    victim.write_bytes(data)
    arrived = sum(1 for _ in DirectoryStore(other, create=False).blobs())
    assert sample("copy", source, other, "sample:1", "--json").json[0]["kept_blobs"] == arrived


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:5000] + b"\xff" + data[5001:]])
def test_damage_is_not_passed_on(sample, tmp_path, damage):
    source, other = tmp_path / "source", tmp_path / "other"
    shutil.copytree(sample.store, source)
    image = Image.open(DirectoryStore(source), "sample:1")
    blob = DirectoryStore(source).blob_path(image.packs[0].digest)
    blob.write_bytes(damage(blob.read_bytes()))
    assert sample("copy", source, other, "sample:1", code=5).err
    copied = DirectoryStore(other, create=False)
    assert copied.references() == {}
    assert copied.size(image.packs[0].digest) is None
    assert list(Path(other, "erofsgen", "tmp").iterdir()) == []


@pytest.mark.mount
def test_a_full_disk_and_what_follows(sample, mount_point, require_root):
    """The copy fails in one line, no name is there; with more room it goes on."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96K", "none", mount_point], check=True)
    outcome = sample("copy", sample.store, mount_point, "sample:1", code=7)
    assert "No space left on device" in outcome.err
    assert "hint: free some space" in outcome.err
    assert DirectoryStore(mount_point, create=False).references() == {}
    subprocess.run(["mount", "-o", "remount,size=64M", mount_point], check=True)
    sample("copy", sample.store, mount_point, "sample:1")
    assert sample("--store", mount_point, "check").code == 0


@pytest.mark.server
@pytest.mark.parametrize("kind", ["s3", "registry"])
def test_two_hosts_push_the_same_image(sample, kind, request, tmp_path, monkeypatch):
    """Both succeed, and what is there is right."""
    if kind == "s3":
        server = request.getfixturevalue("s3_server")
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        url = f"s3://{server.bucket()}"
    else:
        url = f"docker://{request.getfixturevalue('registry')}/team/sample"
    pushes = [sample.process("push", "sample:1", url) for _ in range(2)]
    for push in pushes:
        _, said = push.communicate(timeout=60)
        assert push.returncode == 0, said
    sample("--store", url, "check")
    assert len(sample("--store", url, "images", "--json").json) == 1


@pytest.fixture
def registry(tmp_path):
    with docker_registry(tmp_path / "registry") as address:
        yield address
