"""``erofsgen profile show``, from what a host and a store know."""

from __future__ import annotations

import struct
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from erofsgen.host.profiles import HostProfiles
from erofsgen.profile import beside
from erofsgen.profile.chunks import BLOCK, Chunks
from erofsgen.profile.profile import RECORDED, ROW, Profile, ordered
from erofsgen.profile.trace import BROUGHT, HERE, TOUCH, Trace
from erofsgen.store.directory import DirectoryStore
from erofsgen.store.image import Image

STORE = "s3://bucket/<i>"


class Known:
    """What is known of an image: every second of its chunks is touched, the later ones by fewer runs."""

    def __init__(self, store: Path, root: Path, name: str = "sample:1") -> None:
        self.image = Image.open(DirectoryStore(store), name)
        self.chunks = Chunks(self.image.index)
        self.host = HostProfiles(root)
        self.table = self.chunks.table[::2]

    def profile(self, command: str, *, runs: int = 2) -> Profile:
        rows = np.zeros(len(self.table), ROW)
        rows["pack"], rows["block"] = self.table["device"] - 1, self.table["block"]
        rows["length"], rows["first"] = self.table["length"], 10 * np.arange(len(rows))
        rows["seen"] = np.linspace(runs, runs / 4, len(rows))
        rows["reason"][-1] = 1
        return Profile(command, runs, self.chunks.packs, [RECORDED, "loader"], ordered(rows))

    def trace(self, command: str) -> Trace:
        """All but the last chunk; the first is waited for, the second was prefetched."""
        some = self.table[:-1]
        touches = np.zeros(len(some), TOUCH)
        touches["at"], touches["pack"] = 10 * np.arange(len(some)), some["device"] - 1
        touches["offset"], touches["length"] = some["block"].astype(int) * BLOCK, some["length"]
        touches["waited"][0], touches["source"][:2] = 7_250, 1
        second = touches[1]
        brought = [(4, second["pack"], 0, second["offset"], second["length"], 1, 0, True, True)]
        return Trace(
            self.image.digest, command, "fuse", 1.8e9, True, self.chunks.packs, [(0, "")], [HERE, STORE], touches,
            [RECORDED], np.array(brought, BROUGHT),
        )  # fmt: skip


@pytest.fixture
def known(own_sample) -> Known:
    return Known(own_sample.store, own_sample.root)


def table(lines: list[str]) -> list[list[str]]:
    """The lines behind the empty one, by columns."""
    body = lines[lines.index("") + 1 :]
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in body]


def test_without_a_run(own_sample, known):
    known.host.add(known.image.digest, known.profile("serve --port 80"))
    out = own_sample("profile", "show", "sample:1").lines
    heading, *rows = table(out)
    assert heading == ["#", "FIRST", "FILE", "CHUNKS", "BYTES", "OF", "SURE", "WHY"]
    assert rows[0][:3] == ["1", "0", known.chunks.paths[known.table["file"][0]].decode()]
    assert 90 < int(rows[0][6].removesuffix(" %")) <= 100
    assert rows[-1][-1] == "loader"
    assert any(line.startswith("command") and line.endswith("serve --port 80") for line in out)
    assert any(line.startswith("last run") and "none" in line for line in out)
    everything = table(own_sample("profile", "show", "sample:1", "--all").lines)
    assert len(everything) == len(known.table) + 1
    assert everything[1][6:] == [str(known.table["block"][0] * BLOCK), "100 %", RECORDED]


def test_with_the_last_run(own_sample, known, tmp_path):
    known.host.add(known.image.digest, known.profile("serve"))
    known.host.put_trace(known.trace("serve"))
    out = own_sample("profile", "show", "sample:1").lines
    heading, *rows = table(out)
    assert heading[-2:] == ["WAITED", "FROM"]
    assert any("last run: waited for" in line and "0.007 s" in line for line in out)
    chunks = table(own_sample("profile", "show", "sample:1", "--all").lines)
    assert chunks[1][-2:] == ["7.2", STORE]
    assert chunks[2][-2:] == ["0", f"prefetched from {STORE}"]
    assert chunks[3][-2:] == ["0", HERE]
    assert chunks[-1][-2:] == ["-", "not touched"]

    facts = own_sample("profile", "show", "sample:1", "--json").json
    assert (facts["digest"], facts["command"], facts["runs"]) == (known.image.digest, "serve", 2)
    assert facts["last_run"]["totals"]["misses"] == 1
    assert facts["last_run"]["totals"]["prefetched_touches"] == 1
    assert sum(reason["chunks"] for reason in facts["reasons"]) == len(known.table)
    assert len(facts["files"]) == len(rows)
    assert "chunks" not in facts
    assert len(own_sample("profile", "show", "sample:1", "--json", "--all").json["chunks"]) == len(known.table)


def test_pictures(own_sample, known, tmp_path):
    known.host.add(known.image.digest, known.profile("serve"))
    page, picture = tmp_path / "page.html", tmp_path / "picture.png"
    for run in (False, True):
        if run:
            known.host.put_trace(known.trace("serve"))
        out = own_sample("profile", "show", "sample:1", "--html", page, "--png", picture)
        assert "" not in out.lines
        text = page.read_text()
        HTMLParser().feed(text)
        assert ("<th>FROM</th>" in text) == run
        assert STORE not in text
        data = picture.read_bytes()
        assert data.startswith(b"\x89PNG\r\n\x1a\n")
        assert all(side > 100 for side in struct.unpack(">II", data[16:24]))
    own_sample("profile", "show", "sample:1", "--html", tmp_path / "missing" / "page.html", code=7)


def test_which_command(own_sample, known):
    for command in ("serve", "", "train"):
        known.host.add(known.image.digest, known.profile(command))
    error = own_sample("profile", "show", "sample:1", code=2).err
    assert "3 commands: " in error
    assert all(name in error for name in ('""', "serve", "train", "--command"))
    assert own_sample("profile", "show", "sample:1", "--command", "", "--json").json["command"] == ""
    assert "train" in own_sample("profile", "show", "sample:1", "--command", "train").out.decode()
    assert "no profile of 'evaluate'" in own_sample("profile", "show", "sample:1", "--command", "evaluate", code=3).err
    assert "profile record" in own_sample("profile", "show", "sample:2", code=3).err


def test_what_the_store_has(own_sample, known):
    """What others recorded and pushed is shown without having run anything here."""
    beside.add_all(known.image.store, known.image.descriptor, [known.profile("serve", runs=3)])
    assert own_sample("profile", "show", "sample:1", "--json").json["runs"] == 3
    known.host.add(known.image.digest, known.profile("serve", runs=1))
    assert own_sample("profile", "show", "sample:1", "--json").json["runs"] == 4
