"""build, rm, gc, mount, umount, mounts: what they print, and what is in the store and on the host afterwards."""

from __future__ import annotations

import os
import subprocess
import tarfile
from pathlib import Path

import pytest
import samples

# --- build -----------------------------------------------------------------------------------------------------------


def test_build_says_what_it_did(erofsgen, sample_tars: tuple[Path, Path]):
    first = erofsgen("build", f"tar:{sample_tars[0]}", "--tag", "a", "--json").json
    assert first["name"] == "a"
    assert (first["layers"], first["reused_layers"]) == (1, 0)
    assert first["file_bytes"] == sum(
        row["size"]
        for row in erofsgen("ls", "-R", "--json", "a").json
        if row["mode"] >> 12 == 8 and not _second_name(row)
    )
    assert first["new_packs"] == first["packs"] == len(erofsgen("inspect", "a", "--json").json["packs"])
    assert first["inodes"] == sum(erofsgen("inspect", "a", "--json").json["index"]["inodes"].values())

    again = erofsgen("build", f"tar:{sample_tars[0]}", "--tag", "b", "--json").json
    assert (again["digest"], again["reused_layers"], again["new_packs"]) == (first["digest"], 1, 0)

    second = erofsgen("build", f"tar:{sample_tars[1]}", "--tag", "c", "--json").json
    assert 0 < second["new_bytes"] < first["new_bytes"]
    assert second["deduplicated_bytes"] > second["new_bytes"]
    assert [image["name"] for image in erofsgen("images", "--json").json] == ["a", "b", "c"]


def _second_name(row: dict) -> bool:
    return row["path"] in ("links/second", "links/third", f"{samples.DEEP}/link-to-bottom")


def test_build_for_people(erofsgen, sample_tars: tuple[Path, Path]):
    outcome = erofsgen("build", f"tar:{sample_tars[0]}", "--tag", "a")
    facts = dict(line.split(maxsplit=1) for line in outcome.lines)
    assert facts["image"] == "a"
    assert facts["digest"] == erofsgen("inspect", "a", "--json").json["digest"]
    assert outcome.err.startswith("erofsgen: ")
    assert erofsgen("--quiet", "build", f"tar:{sample_tars[0]}", "--tag", "a").err == ""


def test_options_reach_the_build(erofsgen, sample_tars: tuple[Path, Path]):
    tar = f"tar:{sample_tars[0]}"
    erofsgen("build", tar, "--tag", "small", "--chunk-size", "64K", "--threads", "1")
    assert erofsgen("inspect", "small", "--json").json["chunk_size"] == 64 << 10
    erofsgen("build", tar, "--tag", "default")
    hard = erofsgen("build", tar, "--tag", "hard", "--no-dedup", "--compression-level", "19", "--json").json
    assert hard["pack_bytes"] < sum(pack["stored"] for pack in erofsgen("inspect", "default", "--json").json["packs"])
    # text and noise go to packs of different kinds: one device cannot be enough
    assert "--max-devices" in erofsgen("build", tar, "--tag", "one", "--no-dedup", "--max-devices", "1", code=8).err
    assert {image["name"] for image in erofsgen("images", "--json").json} == {"small", "default", "hard"}


@pytest.mark.parametrize(
    ("content", "code", "message"),
    [
        (None, 3, "does not exist"),
        (b"", 4, "is empty"),
        (b"not a tar" * 1000, 4, "this is not a tar archive"),
        (b"\x1f\x8b\x08 not gzip either", 4, "bad gzip data"),
    ],
)
def test_sources_that_are_none(erofsgen, tmp_path: Path, content: bytes | None, code: int, message: str):
    source = tmp_path / "source.tar"
    if content is not None:
        source.write_bytes(content)
    assert message in erofsgen("build", f"tar:{source}", code=code).err
    assert erofsgen("images", "--json").json == []


def test_a_truncated_source_names_nothing(erofsgen, sample_tars: tuple[Path, Path], tmp_path: Path):
    source = tmp_path / "half.tar"
    source.write_bytes(sample_tars[0].read_bytes()[: 3 << 20])
    erofsgen("build", f"tar:{source}", "--tag", "half", code=4)
    assert erofsgen("images", "--json").json == []
    assert os.listdir(erofsgen.store / "erofsgen" / "tmp") == []


@pytest.mark.mount
@pytest.mark.timeout(60)
def test_a_full_store(erofsgen, sample_tars: tuple[Path, Path], mount_point: Path):
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2M", "none", mount_point], check=True)
    erofsgen.options[1] = str(mount_point / "store")
    outcome = erofsgen("build", f"tar:{sample_tars[0]}", code=7)
    assert "No space left on device" in outcome.err
    assert "hint: free some space" in outcome.err
    assert erofsgen("images", "--json").json == []
    assert os.listdir(mount_point / "store" / "erofsgen" / "tmp") == []


def test_names_as_docker_has_them(own_sample, tmp_path):
    """What was built from Docker Hub is found by its short name, too."""
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/file").write_bytes(b"content" * 1000)
    own_sample("build", f"dir:{tmp_path / 'tree'}", "--tag", "docker.io/library/python:3")
    for name in (
        "python:3",
        "library/python:3",
        "docker.io/python:3",
        "docker://python:3",
        "docker.io/library/python:3",
    ):
        assert own_sample("inspect", name, "--json").json["name"] == "docker.io/library/python:3"
    own_sample("check", "python:3")
    assert own_sample("diff", "python:3", "docker://python:3", "--json").json == []
    own_sample("rm", "python:3")
    own_sample("inspect", "python:3", code=3)


# --- rm and gc -------------------------------------------------------------------------------------------------------


def test_rm(own_sample):
    digest = own_sample("inspect", "sample:1", "--json").json["digest"]
    assert own_sample("rm", "sample:1").out == b""
    assert [image["name"] for image in own_sample("images", "--json").json] == ["sample:2"]
    own_sample("rm", "sample:1", code=3)
    own_sample("inspect", digest, code=3)
    assert (own_sample.store / "blobs" / "sha256" / digest[7:]).exists()


def test_rm_by_digest_takes_all_names(own_sample, sample_tars: tuple[Path, Path]):
    own_sample("build", f"tar:{sample_tars[0]}", "--tag", "again")
    first, second = (own_sample("inspect", name, "--json").json["digest"] for name in ("sample:1", "again"))
    assert first == second
    assert sorted(own_sample("rm", first[7:20], "--json").json["removed"]) == ["again", "sample:1"]
    assert [image["name"] for image in own_sample("images", "--json").json] == ["sample:2"]


def test_rm_is_all_or_nothing(own_sample):
    own_sample("rm", "sample:1", "nothing", code=3)
    assert len(own_sample("images", "--json").json) == 2


def test_a_damaged_image_can_be_removed(own_sample):
    digest = own_sample("inspect", "sample:1", "--json").json["digest"]
    (own_sample.store / "blobs" / "sha256" / digest[7:]).write_bytes(b"damaged")
    own_sample("gc", code=5)  # what it needs is unknown
    own_sample("rm", "sample:1")
    own_sample("gc")
    assert own_sample("check", "--json").json["problems"] == []


def test_gc(own_sample):
    def blobs() -> dict[str, int]:
        return {entry.name: entry.stat().st_size for entry in (own_sample.store / "blobs" / "sha256").iterdir()}

    before = blobs()
    own_sample("rm", "sample:2")
    planned = own_sample("gc", "--dry-run", "--json").json
    assert blobs() == before
    assert own_sample("gc", "-n").lines[0].startswith(f"would delete {planned['blobs']} blobs, ")
    done = own_sample("gc", "--json").json
    after = blobs()
    assert done["blobs"] == planned["blobs"] == len(before) - len(after) > 0
    assert done["bytes"] == sum(before.values()) - sum(after.values())
    assert (done["kept_blobs"], done["kept_bytes"]) == (len(after), sum(after.values()))
    assert own_sample("gc").lines == [f"deleted 0 blobs, 0 B; kept {len(after)} blobs, {_size(sum(after.values()))}"]
    assert own_sample("check", "--json").json["problems"] == []


def _size(count: int) -> str:
    return f"{count / (1 << 20):.1f} MiB"


def test_what_another_tool_has_written(sample, erofsgen):
    """A layout that skopeo made has no directory of ours; every verb works on it."""
    target = f"oci:{erofsgen.store}:copied"
    subprocess.run(["skopeo", "copy", "--quiet", f"oci:{sample.store}:sample:1", target], check=True)
    assert not (erofsgen.store / "erofsgen").exists()
    assert (
        erofsgen("inspect", "copied", "--json").json["digest"] == sample("inspect", "sample:1", "--json").json["digest"]
    )
    assert erofsgen("check", "--json").json["problems"] == []
    assert erofsgen("cat", "copied", "data/small").out == b"a few bytes\n"
    assert not (erofsgen.store / "erofsgen").exists()
    erofsgen("gc")
    erofsgen("rm", "copied")
    assert erofsgen("gc", "--json").json["kept_blobs"] == 0


# --- mount -----------------------------------------------------------------------------------------------------------


@pytest.mark.mount
def test_mounting(sample, unpacked: tuple[Path, Path], mount_point: Path):
    info = sample("mount", "sample:1", mount_point, "--eager", "--json").json
    try:
        assert (info["image"], info["target"], info["rw"]) == ("sample:1", str(mount_point), False)
        assert samples.snapshot(mount_point) == samples.snapshot(unpacked[0])
        assert [mount["target"] for mount in sample("mounts", "--json").json] == [str(mount_point)]
        heading, line = sample("mounts").lines
        assert heading.split() == ["TARGET", "IMAGE", "DIGEST", "ACCESS", "PLANE"]
        assert line.split() == [str(mount_point), "sample:1", info["digest"][7:19], "ro", "eager"]
        sample("mount", "sample:2", mount_point, "--eager", code=9)
    finally:
        sample("umount", mount_point)
    assert sample("mounts", "--json").json == []
    assert sample("mounts").lines == ["TARGET  IMAGE  DIGEST  ACCESS  PLANE"]
    sample("umount", mount_point, code=3)


@pytest.mark.mount
def test_writing_to_a_mount(sample, mount_point: Path, tmp_path: Path):
    for _ in range(2):
        info = sample("mount", "sample:1", mount_point, "--eager", "--upper", tmp_path / "upper", "--json").json
        assert info["rw"]
        (mount_point / "data/small").write_text("changed\n")
        sample("umount", mount_point)
    assert sample("cat", "sample:1", "data/small").out == b"a few bytes\n"
    sample("mount", "sample:1", mount_point, "--eager", "--rw")
    assert (mount_point / "data/small").read_text() == "a few bytes\n"
    (mount_point / "data/small").write_text("thrown away\n")
    with open(mount_point / "data/small"):
        assert "in use" in sample("umount", mount_point, code=9).err
        sample("umount", "--force", mount_point)


def test_where_not_to_mount(sample, tmp_path: Path):
    sample("mount", "sample:1", tmp_path / "nowhere", "--eager", code=3)
    (tmp_path / "file").touch()
    sample("mount", "sample:1", tmp_path / "file", "--eager", code=2)
    sample("mount", "nothing", tmp_path, "--eager", code=3)
    assert sample("mounts", "--json").json == []


def test_a_rootfs(erofsgen, tmp_path: Path, unpacked: tuple[Path, Path]):
    """An image built from a directory is the directory."""
    erofsgen("build", f"dir:{unpacked[1]}", "--tag", "directory")
    erofsgen("extract", "directory", "--tar", tmp_path / "out.tar")
    with tarfile.open(tmp_path / "out.tar", errors="surrogateescape") as tar:
        names = {os.fsencode(name) for name in tar.getnames()} - {b"."}
    assert names == samples.snapshot(unpacked[1]).keys()
