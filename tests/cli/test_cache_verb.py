"""``erofsgen cache``: du, gc, pin, unpin, verify, clear."""

from __future__ import annotations

import os
import shutil
import time

import pytest

from erofsgen.host.daemon.client import Client


@pytest.fixture
def pulled(own_sample):
    """Both versions of the sample in the cache, with all their data."""
    for version in (1, 2):
        own_sample("pull", "--all", f"sample:{version}")
    return own_sample


@pytest.fixture(params=["here", pytest.param("daemon", marks=pytest.mark.mount)])
def anywhere(request, pulled):
    """The same, without and with a daemon that does the work."""
    if request.param == "here":
        yield pulled
        return
    request.getfixturevalue("require_root")
    Client.start(pulled.root).close()
    yield pulled
    with Client.connect(pulled.root) as client:
        client.call("stop")


def usage(program):
    return program("cache", "du", "--json").json


def data_files(program):
    return sorted((program.root / "packs").glob("*.data"))


def spoil(path):
    """Change a byte of the first frame."""
    with path.open("r+b") as file:
        byte = file.read(1)
        file.seek(0)
        file.write(bytes([byte[0] ^ 1]))


def test_du(pulled):
    found = usage(pulled)
    assert [image["names"] for image in sorted(found["images"], key=lambda image: image["names"])] == [
        ["sample:1"],
        ["sample:2"],
    ]
    sizes = {path.stem: path.stat().st_size for path in data_files(pulled)}
    assert {pack["pack"]: pack["device"] for pack in found["packs"]} == sizes
    for pack in found["packs"]:
        assert pack["present"] == pack["device"]
        assert pack["images"] == sum(pack["pack"] in image["packs"] for image in found["images"]) > 0
        assert not pack["in_use"]
        assert not pack["pinned"]
    with data_files(pulled)[0].open("rb"):
        assert [pack["in_use"] for pack in usage(pulled)["packs"]].count(True) == 1
    lines = pulled("cache", "du").lines
    assert len(lines) == 4
    assert lines[-1].endswith("no limit")


def test_du_of_what_was_pulled_without_data(own_sample):
    own_sample("pull", "sample:1")
    (image,) = usage(own_sample)["images"]
    assert image["present"] == 0 < image["device"]


def test_pins(pulled):
    pulled("cache", "pin", "sample:1")
    assert [image["names"] for image in usage(pulled)["images"] if image["pinned"]] == [["sample:1"]]
    pulled("cache", "gc", "--images")
    assert [image["names"] for image in usage(pulled)["images"]] == [["sample:1"]]
    pulled("cache", "unpin", "sample:1")
    assert not usage(pulled)["images"][0]["pinned"]
    pulled("cache", "pin", "sample:3", code=3)


def test_gc_keeps_what_images_need(anywhere):
    before = data_files(anywhere)
    removed = anywhere("cache", "gc", "--json").json
    assert (removed["images"], removed["packs"], removed["leftovers"], removed["bytes"]) == ([], [], [], 0)
    assert data_files(anywhere) == before


def test_gc(anywhere):
    digest = next(image["digest"] for image in usage(anywhere)["images"] if image["names"] == ["sample:2"])
    needed = {pack for image in usage(anywhere)["images"] if image["digest"] != digest for pack in image["packs"]}
    for path in (anywhere.root / "images").glob(f"{digest[7:]}.*"):
        path.unlink()
    old, new = anywhere.root / "images" / "old.part", anywhere.root / "packs" / "new.part"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 100_000,) * 2)
    before = data_files(anywhere)
    would = anywhere("cache", "gc", "--dry-run", "--json").json
    assert data_files(anywhere) == before
    assert old.exists()
    removed = anywhere("cache", "gc", "--json").json
    assert removed == would
    assert removed["leftovers"] == [str(old)]
    assert new.exists()
    assert {path.stem for path in data_files(anywhere)} == needed
    assert set(removed["packs"]) == {path.stem for path in before} - needed
    assert {path.stem for path in (anywhere.root / "packs").glob("*.toc")} == needed


def test_gc_evicts_beyond_the_limit(pulled):
    limit = usage(pulled)["allocated"] - 8192
    pulled("pull", "--max-bytes", str(limit), "sample:1")
    pulled("cache", "gc")
    assert usage(pulled)["allocated"] <= limit
    assert len(usage(pulled)["images"]) == 2


def test_clear_leaves_what_is_open(anywhere):
    kept = data_files(anywhere)[0]
    with kept.open("rb"):
        anywhere("cache", "clear")
        assert data_files(anywhere) == [kept]
    assert anywhere("cache", "clear", "--json").json["packs"] == [kept.stem]
    assert usage(anywhere)["packs"] == usage(anywhere)["images"] == []
    anywhere("pull", "--all", "sample:1")
    assert usage(anywhere)["images"][0]["present"] > 0


def test_verify_finds_nothing(anywhere):
    report = anywhere("cache", "verify", "--json").json
    assert report["bad"] == []
    assert report["packs"] == len(data_files(anywhere))
    assert report["bytes"] == sum(path.stat().st_size for path in data_files(anywhere))


def test_verify_repairs(anywhere):
    path = data_files(anywhere)[0]
    right = path.read_bytes()
    spoil(path)
    report = anywhere("cache", "verify", "--no-repair", "--json", code=5).json
    assert [(bad["pack"], bad["frame"], bad["outcome"]) for bad in report["bad"]] == [(path.stem, 0, "bad")]
    report = anywhere("cache", "verify", "--json").json
    assert [(bad["pack"], bad["frame"], bad["outcome"]) for bad in report["bad"]] == [(path.stem, 0, "repaired")]
    assert path.read_bytes() == right
    assert anywhere("cache", "verify").lines[-1].endswith("nothing bad")


def test_verify_without_the_store(pulled):
    """What is bad and cannot be fetched counts no more, unless somebody has the whole pack open."""
    path = data_files(pulled)[0]
    spoil(path)
    shutil.move(pulled.store, pulled.store.with_name("away"))
    with path.open("rb"):
        report = pulled("cache", "verify", "--json", code=5).json
        assert [bad["outcome"] for bad in report["bad"]] == ["bad"]
    report = pulled("cache", "verify", "--json", code=5).json
    assert [bad["outcome"] for bad in report["bad"]] == ["absent"]
    pack = next(pack for pack in usage(pulled)["packs"] if pack["pack"] == path.stem)
    assert pack["present"] < pack["device"]
    assert pulled("cache", "verify", "--json").json["bad"] == []


@pytest.mark.mount
def test_what_is_mounted_stays(pulled, tmp_path, require_root):
    place = tmp_path / "mnt"
    place.mkdir()
    pulled("mount", "--eager", "sample:1", place)
    try:
        pulled("cache", "clear")
        (image,) = usage(pulled)["images"]
        assert image["names"] == ["sample:1"]
        assert image["in_use"]
        assert image["present"] == image["device"]
        for path in place.rglob("*"):
            if not path.is_symlink() and path.is_file():
                path.read_bytes()
    finally:
        pulled("umount", place)
