"""diff: every kind of change, and that equal content is recognised without reading it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import samples

from erofsgen.store.directory import DirectoryStore
from erofsgen.store.image import Image

PROGRAM = Path(sys.executable).with_name("erofsgen")


def changes(document: list[dict]) -> dict[str, dict[bytes, set[str]]]:
    found: dict[str, dict[bytes, set[str]]] = {"added": {}, "removed": {}, "changed": {}}
    for change in document:
        what = set(change["attributes"]) | ({"content"} if change["content"] else set())
        found[change["kind"]][change["path"].encode("utf-8", "surrogateescape")] = what
    return found


def test_what_changed(sample):
    found = changes(sample("diff", "sample:1", "sample:2", "--json").json)
    assert found["added"].keys() == samples.CHANGES["added"]
    assert found["removed"].keys() == samples.CHANGES["removed"]
    assert found["changed"] == samples.CHANGES["changed"]


def test_the_other_way_round(sample):
    found = changes(sample("diff", "sample:2", "sample:1", "--json").json)
    assert found["added"].keys() == samples.CHANGES["removed"]
    assert found["removed"].keys() == samples.CHANGES["added"]
    assert found["changed"] == samples.CHANGES["changed"]


def test_for_people(sample):
    lines = sample("diff", "sample:1", "sample:2").lines
    assert "+ /data/new" in lines
    assert "- /olddir/below" in lines
    assert "~ /data/edited (content)" in lines
    assert "~ /modes/private (mode 0600 → 0640)" in lines
    assert "~ /data/grown (size 5000 → 5001, content)" in lines
    assert "~ /links/turned (target old → new)" in lines
    assert "~ /special/null (device 1:3 → 1:5)" in lines
    assert "~ /becomes (type - → d, mode 0644 → 0755)" in lines
    assert "~ /links/third (links [links/first, links/second] → [])" in lines


def test_nothing_changed(sample):
    assert sample("diff", "sample:1", "sample:1", "--exit-code").out == b""
    assert sample("diff", "sample:1", "sample:1", "--json").json == []
    sample("diff", "sample:1", "sample:2", "--exit-code", code=1)


@pytest.fixture(scope="session")
def many_ways(sample_tars: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with one sample that was cut and packed in different ways."""
    store = tmp_path_factory.mktemp("stores") / "many"
    for name, options in (
        ("one", []),
        ("packed", ["--no-dedup", "--compression-level", "1"]),
        ("cut", ["--chunk-size", "64K"]),
        ("shared", ["--share-pages"]),
    ):
        command = [PROGRAM, "--store", store, "-q", "build", f"tar:{sample_tars[0]}", "--tag", name, *options]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return store


@pytest.mark.parametrize(("other", "reads"), [("one", False), ("packed", False), ("cut", True), ("shared", False)])
def test_equal_content_is_equal_however_it_is_kept(
    many_ways: Path, other: str, reads: bool, erofsgen, monkeypatch: pytest.MonkeyPatch
):
    """What is cut alike is compared by chunk digests, what is cut differently byte by byte."""
    read = []
    original = Image.read

    def spy(self, node, **options):
        read.append(node.size)
        return original(self, node, **options)

    monkeypatch.setattr(Image, "read", spy)
    erofsgen.options[1] = str(many_ways)
    assert erofsgen("diff", "one", other, "--json").json == []
    assert bool(read) == reads
    store = DirectoryStore(many_ways, create=False)
    assert {pack.digest for pack in Image.open(store, "one").packs} != {
        pack.digest for pack in Image.open(store, "cut").packs
    }
