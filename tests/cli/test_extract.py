"""extract: GNU tar's opinion of the sample against ours, as a directory and as a tar."""

from __future__ import annotations

import os
import stat
import subprocess
import tarfile
from pathlib import Path

import pytest
import samples

TAR = ["--xattrs", "--xattrs-include=*", "--numeric-owner", "--same-owner", "--same-permissions"]


def untar(tar: Path, place: Path) -> Path:
    place.mkdir()
    subprocess.run(["tar", "--extract", "--file", tar, "--directory", place, *TAR], check=True)
    return place


def test_a_directory_gets_everything(sample, unpacked: tuple[Path, Path], tmp_path: Path):
    for number in (1, 2):
        result = sample("extract", f"sample:{number}", tmp_path / f"out{number}", "--json").json
        expected = samples.snapshot(unpacked[number - 1])
        assert samples.snapshot(tmp_path / f"out{number}") == expected
        assert result["entries"] == len(expected)
        assert result["notes"] == []


def test_holes_stay_holes(sample, tmp_path: Path):
    sample("extract", "sample:1", tmp_path / "out")
    zeros, big = os.stat(tmp_path / "out/data/zeros"), os.stat(tmp_path / "out/data/big")
    assert (zeros.st_size, zeros.st_blocks) == (5 << 20, 0)
    assert big.st_blocks * 512 < big.st_size - (1 << 20) + 65536


def test_only_into_nothing(sample, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    sample("extract", "sample:1", tmp_path / "empty")
    before = samples.snapshot(tmp_path / "empty")
    assert "not empty" in sample("extract", "sample:1", tmp_path / "empty", code=2).err
    assert samples.snapshot(tmp_path / "empty") == before
    (tmp_path / "file").write_text("here")
    assert "File exists" in sample("extract", "sample:1", tmp_path / "file", code=7).err
    assert (tmp_path / "file").read_text() == "here"


def test_through_a_link_to_the_destination(sample, tmp_path: Path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    sample("extract", "sample:1", tmp_path / "link")
    assert (tmp_path / "real/data/small").read_text() == "a few bytes\n"


def test_without_root(sample, unpacked: tuple[Path, Path], tmp_path: Path):
    """An ordinary user gets files and links, and is told what is missing."""
    sample("extract", "sample:1", tmp_path / "imports")  # the interpreter's files may not be everybody's
    out = tmp_path / "out"
    out.mkdir()
    os.chown(out, 65534, 65534)
    way = {place: place.stat().st_mode for place in (*out.parents, sample.store, *sample.store.parents)}
    groups = os.getgroups()
    try:
        for place, mode in way.items():
            place.chmod(mode | 0o055)
        os.setgroups([])
        os.setegid(65534)
        os.seteuid(65534)
        outcome = sample("extract", "sample:1", out)
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups)
        for place, mode in way.items():
            place.chmod(mode)
    assert "devices left out: 2 (only root may make them)" in outcome.err
    assert "privileged extended attributes left out: 3" in outcome.err
    expected = {}
    for path, (mode, _, _, mtime, _, content, xattrs, *links) in samples.snapshot(unpacked[0]).items():
        if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
            continue
        kept = tuple((key, value) for key, value in xattrs if key.startswith("user."))
        shown = mode if stat.S_ISLNK(mode) else mode & ~0o6000
        expected[path] = (shown, 65534, 65534, mtime, 0, content, kept, *links)
    assert samples.snapshot(out) == expected


@pytest.mark.mount
def test_a_full_disk_is_one_line(sample, mount_point: Path):
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "none", mount_point], check=True)
    outcome = sample("extract", "sample:1", mount_point / "out", code=7)
    assert f"{mount_point}/out/data/" in outcome.err
    assert "No space left on device" in outcome.err
    assert "No space left on device" in sample("extract", "sample:1", "--tar", mount_point / "tar", code=7).err
    assert not (mount_point / "tar").exists()


# --- tar -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def archive(sample, tmp_path: Path) -> Path:
    sample("extract", "sample:1", "--tar", tmp_path / "sample.tar")
    return tmp_path / "sample.tar"


def test_gnu_tar_unpacks_the_same_tree(archive: Path, unpacked: tuple[Path, Path], tmp_path: Path):
    assert samples.snapshot(untar(archive, tmp_path / "out")) == samples.snapshot(unpacked[0])


def test_the_tar_is_the_same_every_time(sample, archive: Path):
    assert sample("extract", "sample:1", "--tar", "-").out == archive.read_bytes()
    assert archive.stat().st_size % 10240 == 0


def test_holes_take_no_room(archive: Path):
    assert archive.stat().st_size < 10 << 20  # data/ alone would have more than sixteen


def test_python_reads_it(archive: Path):
    with tarfile.open(archive, errors="surrogateescape") as tar:
        names = [entry.name for entry in tar]
        assert names[0] == "."
        assert names[1:] == [
            os.fsdecode(name) for name in sorted(map(os.fsencode, names[1:]), key=lambda n: n.split(b"/"))
        ]
        for path in ("data/big", "data/copy"):
            file = tar.extractfile(path)
            assert file
            assert file.read() == samples.big()
        zeros = tar.extractfile("data/zeros")
        assert zeros
        assert zeros.read() == bytes(5 << 20)
        assert tar.getmember("owners/big").uid == 4_000_000_000
        assert tar.getmember("times/fraction").pax_headers["mtime"] == "1600000000.123456789"
        assert tar.getmember("times/before").mtime == -1.5
        assert os.fsdecode(b"names/caf\xe9") in names


def test_building_from_it_gives_the_same_index(sample, erofsgen, archive: Path):
    """Nothing is lost on the way out and in again."""
    sample("extract", "sample:1", "--tar", archive)
    erofsgen.store = erofsgen.store.with_name("again")
    erofsgen.options[1] = str(erofsgen.store)
    erofsgen("build", f"tar:{archive}", "--tag", "again")
    before = sample("inspect", "sample:1", "--json").json
    after = erofsgen("inspect", "again", "--json").json
    assert after["index"] == before["index"]


def test_a_tar_that_cannot_be_finished_is_removed(own_sample, tmp_path: Path):
    for pack in own_sample("inspect", "sample:1", "--json").json["packs"]:
        (own_sample.store / "blobs" / "sha256" / pack["digest"][7:]).unlink()
    assert "no blob sha256:" in own_sample("extract", "sample:1", "--tar", tmp_path / "out.tar", code=3).err
    assert not (tmp_path / "out.tar").exists()
    assert "No such file or directory" in own_sample("extract", "sample:1", "--tar", tmp_path / "no/out", code=7).err


def test_no_tar_to_a_terminal(sample):
    outer, inner = os.openpty()
    done = sample.process("extract", "sample:1", "--tar", "-", stdout=inner)
    _, err = done.communicate(timeout=60)
    os.close(outer)
    os.close(inner)
    assert done.returncode == 2
    assert b"will not write a tar to a terminal" in err


def test_no_json_in_a_tar(sample):
    assert "both want standard output" in sample("extract", "sample:1", "--tar", "-", "--json", code=2).err


def test_special_destinations(sample, tmp_path: Path):
    sample("extract", "sample:1", "--tar", "/dev/null")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    assert "No space left on device" in sample("extract", "sample:1", "--tar", "/dev/full", code=7).err
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)
