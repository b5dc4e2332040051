"""`erofsgen optimize` as a user runs it: whose profiles decide, what it prints, what the image is afterwards."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from erofsgen.errors import FormatError, NotFoundError, UsageError
from erofsgen.host.profiles import HostProfiles
from erofsgen.profile import beside
from erofsgen.profile.chunks import Chunks
from erofsgen.profile.profile import RECORDED, ROW, Profile, decode, ordered
from erofsgen.store.base import Descriptor
from erofsgen.store.directory import DirectoryStore
from erofsgen.store.image import Image
from erofsgen.store.manifest import MANIFEST_TYPE


def image_of(erofsgen, name: str = "sample:1") -> Image:
    return Image.open(DirectoryStore(erofsgen.store), name)


def profile(image: Image, command: str, every: int, runs: int = 1) -> Profile:
    """A profile that touches every so-manieth chunk, the last first; of 0 runs it is guessed."""
    table = Chunks(image.index).table[::-every]
    rows = np.zeros(len(table), ROW)
    rows["pack"], rows["block"], rows["length"] = table["device"] - 1, table["block"], table["length"]
    rows["first"], rows["seen"] = np.arange(len(table)), runs
    reason = RECORDED if runs else "loader"
    return Profile(command, runs, [pack.hex for pack in image.packs], [reason], ordered(rows))


def lay_beside(image: Image, *profiles: Profile) -> None:
    manifest = Descriptor(MANIFEST_TYPE, image.digest, image.manifest_size)
    beside.save(image.store, manifest, profiles)


def test_without_profiles_there_is_nothing_to_do(own_sample):
    outcome = own_sample("optimize", "sample:1", code=NotFoundError.exit_code)
    assert "sample:1: no profile" in outcome.err
    assert "hint: run `erofsgen profile record` first" in outcome.err
    image = image_of(own_sample)
    lay_beside(image, profile(image, "guessed", 2, runs=0))
    assert "no profile" in own_sample("optimize", "sample:1", code=NotFoundError.exit_code).err
    # but whoever names a guess means it
    assert own_sample("optimize", "sample:1", "--command", "guessed", "--json").json["commands"] == ["guessed"]
    own_sample("optimize", "none", code=NotFoundError.exit_code)


def test_profiles_of_host_and_store(own_sample):
    before = image_of(own_sample)
    lay_beside(before, profile(before, "serve", 2), profile(before, "guessed", 1, runs=0))
    HostProfiles(own_sample.root).add(before.digest, profile(before, "train", 3))
    HostProfiles(own_sample.root).add(before.digest, profile(before, "serve", 3))
    tree = own_sample("ls", "-R", "sample:1").out
    result = own_sample("optimize", "sample:1", "--json").json
    after = image_of(own_sample)
    assert result["digest"] == after.digest != before.digest
    assert (result["name"], result["commands"], result["profiles"]) == ("sample:1", ["serve", "train"], 3)
    # half of serve's runs, one of two, touched each of its chunks
    touched = {row.tobytes() for every in (2, 3) for row in Chunks(before.index).table[::-every][["device", "block"]]}
    assert result["hot_chunks"] == len(touched)
    assert after.packs[-1].hot == result["shared_bytes"] + sum(-length % 4096 for length in _lengths(before, 3))
    assert after.packs[-1].digest == result["hot_pack"]
    # the same files, another digest; sound
    assert own_sample("ls", "-R", "sample:1").out == tree
    assert own_sample("check", "--json").json["problems"] == []
    # profiles went along, and a host that has the image gets them
    listed = own_sample("profile", "ls", "sample:1", "--json").json
    assert sorted((one["command"], one["runs"], one["where"]) for one in listed) == [
        ("guessed", 0, "store"), ("serve", 2, "store"), ("train", 1, "store"),
    ]  # fmt: skip
    found = {one.command: one for one in beside.load(after.store, after.digest)}
    assert {one.packs[0] for one in found.values()} == {after.packs[-1].hex}
    packs = own_sample("inspect", "sample:1", "--json").json["packs"]
    assert [pack["hot"] for pack in packs][-1] == after.packs[-1].hot
    assert [line for line in own_sample("inspect", "sample:1").lines if "zstd, hot" in line]
    # again, by what lies beside it now: nothing changes
    lines = own_sample("optimize", "sample:1").lines
    assert image_of(own_sample).digest == after.digest
    assert lines[1] == f"digest    {after.digest}"
    assert lines[2] == "commands  serve, train"
    assert len(lines) == 8
    own_sample("gc")
    assert own_sample("ls", "-R", "sample:1").out == tree


def _lengths(image: Image, every: int) -> list[int]:
    return Chunks(image.index).table[::-every]["length"].tolist()


def test_one_command_under_another_name(own_sample):
    before = image_of(own_sample)
    lay_beside(before, profile(before, "serve", 2), profile(before, "train", 3))
    arguments = ("optimize", "sample:1", "--as", "sample:hot", "--command", "train", "--threshold", "100")
    result = own_sample(*arguments, "--max-bytes", "8K", "--json").json
    assert (result["name"], result["commands"], result["profiles"]) == ("sample:hot", ["train"], 2)
    assert result["skipped_bytes"] > 0
    assert result["hot_bytes"] <= 8192
    assert image_of(own_sample).digest == before.digest
    assert image_of(own_sample, "sample:hot").digest == result["digest"]
    own_sample("diff", "--exit-code", "sample:1", "sample:hot")
    outcome = own_sample("optimize", "sample:1", "--command", "other", code=NotFoundError.exit_code)
    assert "no profile of 'other'" in outcome.err
    for wrong in (("--max-bytes", "1"), ("--max-bytes", "4G"), ("--threshold", "101"), ("--threshold", "x")):
        own_sample("optimize", "sample:1", *wrong, code=UsageError.exit_code)


def test_profiles_in_files(own_sample, tmp_path: Path):
    """As they are exported, and as stores keep them; of another build of the image, too."""
    one, two = image_of(own_sample), image_of(own_sample, "sample:2")
    lay_beside(one, profile(one, "serve", 2))
    exported = tmp_path / "exported.json"
    own_sample("profile", "export", "sample:1", "-o", exported)
    assert json.loads(exported.read_bytes())["profiles"][0]["command"] == "serve"
    by_store = own_sample("optimize", "sample:1", "--as", "by-store", "--json").json
    by_file = own_sample("optimize", "sample:1", "--as", "by-file", "--profile", exported, "--json").json
    assert by_file["digest"] == by_store["digest"]
    encoded = tmp_path / "encoded"
    encoded.write_bytes(profile(two, "other", 3).encode())
    assert decode(encoded.read_bytes(), "it").command == "other"
    arguments = ("--profile", exported, "--profile", encoded)
    result = own_sample("optimize", "sample:2", "--as", "both", *arguments, "--json").json
    assert result["commands"] == ["other", "serve"]
    assert result["hot_chunks"] > 0
    own_sample("diff", "--exit-code", "sample:2", "both")
    damaged = tmp_path / "damaged"
    damaged.write_bytes(encoded.read_bytes()[:-3])
    for wrong in (damaged, Path(__file__)):
        outcome = own_sample("optimize", "sample:1", "--profile", wrong, code=FormatError.exit_code)
        assert str(wrong) in outcome.err
    assert own_sample("optimize", "sample:1", "--profile", tmp_path / "none", code=2).err
