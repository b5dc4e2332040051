"""images, inspect, ls, cat: what they say against what coreutils and the tar say."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
import time
from pathlib import Path

import pytest
import samples

# --- images and inspect ----------------------------------------------------------------------------------------------


def test_images(sample):
    first, second = sample("images", "--json").json
    assert (first["name"], second["name"]) == ("sample:1", "sample:2")
    for image in (first, second):
        assert image["problem"] is None
        assert 0 < image["own_bytes"] < image["stored_bytes"]  # both have the packs of the first
        assert image["digest"] == sample("inspect", image["name"], "--json").json["digest"]
    lines = sample("images").lines
    assert lines[0].split() == ["IMAGE", "DIGEST", "PACKS", "SIZE", "OWN"]
    assert [line.split()[0] for line in lines[1:]] == ["sample:1", "sample:2"]
    assert all(line == line.rstrip() for line in lines)


def test_a_damaged_image_is_listed(own_sample):
    digest = own_sample("inspect", "sample:1", "--json").json["digest"]
    blob = own_sample.store / "blobs" / "sha256" / digest[7:]
    blob.write_bytes(blob.read_bytes().replace(b"schemaVersion", b"SchemaVersion"))
    first, second = own_sample("images", "--json").json
    assert "differs from its digest" in first["problem"]
    assert second["problem"] is None
    assert "PROBLEM" in own_sample("images").lines[0]


def test_inspect(sample):
    facts = sample("inspect", "sample:1", "--json").json
    raw = (sample.store / "blobs" / "sha256" / facts["digest"][7:]).read_bytes()
    assert facts["manifest"] == json.loads(raw)
    assert hashlib.sha256(raw).hexdigest() == facts["digest"][7:]
    assert facts["chunk_size"] == 1 << 20
    assert facts["names"] == ["sample:1"]
    inodes = facts["index"]["inodes"]
    assert inodes["symbolic links"] == 9
    assert (inodes["character devices"], inodes["block devices"], inodes["fifos"]) == (1, 1, 1)
    index = facts["index"]
    assert index["file_bytes"] == index["mapped_bytes"] + index["inline_bytes"] + index["hole_bytes"]
    assert index["hole_bytes"] == 5 << 20  # what zeros there are before data are data
    blob = sample.store / "blobs" / "sha256" / index["digest"][7:]
    assert index["stored"] == blob.stat().st_size
    unzipped = subprocess.run(["zstd", "-dc", blob], stdout=subprocess.PIPE, check=True).stdout
    assert index["size"] == len(unzipped)
    assert facts["packs"]
    for pack in facts["packs"]:
        assert pack["stored"] == (sample.store / "blobs" / "sha256" / pack["digest"][7:]).stat().st_size
        assert 0 < pack["used"] <= pack["device_size"]
        assert not pack["missing"]
    assert {pack["kind"] for pack in facts["packs"]} == {"zstd", "raw"}
    # alone in a new store an image uses all of its packs, and nothing of them twice
    assert sum(pack["used"] for pack in facts["packs"]) == sum(pack["device_size"] for pack in facts["packs"])
    assert index["unique_bytes"] < index["mapped_bytes"]


def test_inspect_says_who_shares(sample):
    first = sample("inspect", "sample:1", "--json").json
    second = sample("inspect", "sample:2", "--json").json
    common = {pack["digest"] for pack in first["packs"]} & {pack["digest"] for pack in second["packs"]}
    assert common
    for facts, other in ((first, "sample:2"), (second, "sample:1")):
        for pack in facts["packs"]:
            assert pack["shared_with"] == ([other] if pack["digest"] in common else [])
    assert "sample:2" in sample("inspect", "sample:1").out.decode()


def test_inspect_counts_all_names(own_sample):
    index = own_sample.store / "index.json"
    document = json.loads(index.read_bytes())
    again = json.loads(json.dumps(document["manifests"][0]))
    again["annotations"]["org.opencontainers.image.ref.name"] = "another:1"
    document["manifests"].append(again)
    index.write_text(json.dumps(document))
    facts = own_sample("inspect", "sample:1", "--json").json
    assert facts["names"] == ["another:1", "sample:1"]
    assert all("another:1" not in pack["shared_with"] for pack in facts["packs"])
    assert "another:1" in own_sample("inspect", "sample:1").out.decode()


# --- ls --------------------------------------------------------------------------------------------------------------


def coreutils(place: Path, *options: str) -> list[str]:
    command = ["ls", "-A", "--time-style=long-iso", "--quoting-style=literal", *options]
    result = subprocess.run(command, cwd=place, stdout=subprocess.PIPE, check=True, env={**os.environ, "LC_ALL": "C"})
    return [line for line in result.stdout.decode().splitlines() if not line.startswith("total ")]


@pytest.mark.parametrize("directory", ["data", "links", "modes", "owners", "special", "times", "xattrs"])
@pytest.mark.parametrize("zone", ["UTC", "Asia/Kathmandu"])
def test_the_long_format_is_that_of_coreutils(
    sample, unpacked: tuple[Path, Path], directory: str, zone: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        ours = sample("ls", "-l", "sample:1", directory).lines
        theirs = coreutils(unpacked[0] / directory, "-ln")
    finally:
        monkeypatch.undo()
        time.tzset()
    # columns may be wider, coreutils marks files with ACLs, and a directory's size is its file system's business
    ours, theirs = ([line.replace("+ ", " ").split() for line in lines] for lines in (ours, theirs))
    for line in ours + theirs:
        if line[0].startswith("d"):
            line[4] = "size"
    assert ours == theirs


def test_names_only(sample, unpacked: tuple[Path, Path]):
    assert sample("ls", "sample:1").lines == coreutils(unpacked[0])
    assert sample("ls", "sample:1", "/data/").lines == coreutils(unpacked[0] / "data")
    assert sample("ls", "sample:1", "data/small").lines == ["small"]


def test_recursion(sample, unpacked: tuple[Path, Path]):
    ours = sample("ls", "-R", "sample:1", "deep").lines
    theirs = coreutils(unpacked[0], "-R", "deep")
    assert ours == [f"/{line}" if line.endswith(":") else line for line in theirs]


def test_odd_names(sample):
    lines = sample("ls", "sample:1", "names").lines
    assert lines == [
        "\\x1b[31mred",
        " blank ",
        "-dash",
        "back\\\\slash",
        "caf\\xe9",
        "grüße",
        "new\\x0aline",
        "n" * 255,
        "tab\\x09here",
    ]
    names = [row["name"].encode("utf-8", "surrogateescape") for row in sample("ls", "--json", "sample:1", "names").json]
    assert names == sorted([*samples.ODD_NAMES, b"n" * 255])


def test_json_says_everything(sample, unpacked: tuple[Path, Path]):
    rows = {
        row["path"].encode("utf-8", "surrogateescape"): row for row in sample("ls", "-R", "--json", "sample:1").json
    }
    expected = samples.snapshot(unpacked[0])
    assert rows.keys() == expected.keys()
    for path, (mode, uid, gid, mtime, rdev, content, _, *links) in expected.items():
        row = rows[path]
        assert (row["mode"], row["uid"], row["gid"], row["mtime"], row["rdev"]) == (mode, uid, gid, mtime, rdev), path
        assert row["target"] == (os.fsdecode(content) if stat.S_ISLNK(mode) else None)
        if links:
            assert row["nlink"] == len(links[0])
        if stat.S_ISREG(mode):
            assert row["size"] == os.lstat(os.path.join(os.fsencode(unpacked[0]), path)).st_size


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("links/dir", ["links/dir -> ../data"]),
        ("links/dir/small", ["links/dir/small"]),
        ("nowhere", None),
        ("data/small/", None),
        ("data/small/x", None),
        ("links/loop/x", None),
        ("links/dangling", ["links/dangling -> nowhere"]),
    ],
)
def test_paths_that_are_links(sample, path: str, expected: list[str] | None):
    outcome = sample("ls", "-l", "sample:1", path, code=0 if expected else 3)
    if expected:
        assert outcome.lines[0].endswith(expected[0].rpartition("/")[2] if "->" not in expected[0] else expected[0][6:])
    else:
        assert path in outcome.err


def test_a_link_to_a_directory_is_followed_in_the_short_format(sample):
    assert sample("ls", "sample:1", "links/dir").lines == sample("ls", "sample:1", "data").lines


# --- cat -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("data/big", samples.big()),
        ("/data/small", b"a few bytes\n"),
        ("data/empty", b""),
        ("data/zeros", bytes(5 << 20)),
        ("links/relative", b"a few bytes\n"),
        ("links/absolute", b"a few bytes\n"),
        ("links/dir/small", b"a few bytes\n"),
        ("links/up", b"a few bytes\n"),
        ("links/../links/./dir/../data//small", b"a few bytes\n"),
        ("links/second", b"several names\n" * 300),
        ("modes/closed/inside", b"still there"),
        (os.fsdecode(b"names/caf\xe9"), b"named caf\xe9"),
        (f"{samples.DEEP}/bottom", b"a path of some hundred bytes"),
    ],
)
def test_cat(sample, path: str, content: bytes):
    assert sample("cat", "sample:1", path).out == content


@pytest.mark.parametrize(
    ("path", "code", "message"),
    [
        ("data", 2, "data: not a regular file"),
        ("special/fifo", 2, "not a regular file"),
        ("nowhere", 3, "nowhere: no such file or directory"),
        ("data/small/", 3, "data/small/: not a directory"),
        ("data/small/below", 3, "not a directory (at /data/small)"),
        ("links/dangling", 3, "links/dangling: no such file or directory (at /links/nowhere)"),
        ("links/loop", 3, "links/loop: too many levels of symbolic links"),
        ("", 2, "not a regular file"),
    ],
)
def test_cat_refuses(sample, path: str, code: int, message: str):
    outcome = sample("cat", "sample:1", path, code=code)
    assert message in outcome.err
    assert outcome.out == b""


def test_cat_of_damaged_data_is_no_data(own_sample):
    for pack in own_sample("inspect", "sample:1", "--json").json["packs"]:
        blob = own_sample.store / "blobs" / "sha256" / pack["digest"][7:]
        data = bytearray(blob.read_bytes())
        data[100] ^= 1
        blob.write_bytes(data)
    outcome = own_sample("cat", "sample:1", "data/big", code=5)
    assert outcome.out == b""
    assert "frame 0" in outcome.err
