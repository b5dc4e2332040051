"""``erofsgen profile``: ls, export, import, push, rm."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from profilekit import facts, run_of

from erofsgen.host.profiles import HostProfiles
from erofsgen.profile import beside
from erofsgen.profile.carry import with_digests
from erofsgen.store.directory import DirectoryStore
from erofsgen.store.image import Image

EMPTY = '{"command": "x", "runs": 1, "chunks": []}'


def opened(program, name: str = "sample:1") -> Image:
    return Image.open(DirectoryStore(program.store, create=False), name)


def recorded(program, numbers=None, name: str = "sample:1", command: str = "serve") -> Image:
    """What a run leaves on the host; the image is in its cache."""
    program("pull", name)
    image = opened(program, name)
    HostProfiles(program.root).add(image.digest, run_of(image, numbers, command=command))
    return image


def test_ls(own_sample):
    assert own_sample("profile", "ls", "--json").json == []
    assert len(own_sample("profile", "ls").lines) == 1
    image = recorded(own_sample, [0, 2])
    beside.save(image.store, image.descriptor, [run_of(image, [1], command="")])
    other = opened(own_sample, "sample:2")
    beside.save(other.store, other.descriptor, [run_of(other, command="bad\x1b[31m\ncommand")])
    rows = own_sample("profile", "ls", "--json").json
    assert {(row["names"][0], row["command"][:5], row["runs"], row["chunks"], row["where"]) for row in rows} == {
        ("sample:1", "serve", 1, 2, "host"),
        ("sample:1", "", 1, 1, "store"),
        ("sample:2", "bad\x1b[", 1, len(run_of(other).rows), "store"),
    }
    assert rows == sorted(rows, key=lambda row: row["image"])
    table = own_sample("profile", "ls").out.decode()
    assert "\x1b" not in table
    assert len(table.splitlines()) == 4
    (only,) = own_sample("profile", "ls", "sample:2", "--json").json
    assert only["bytes"] == run_of(other).size
    assert own_sample("profile", "ls", "missing", code=3).err


def test_ls_without_the_store(own_sample):
    """What is kept here is known without it."""
    image = recorded(own_sample, [0])
    HostProfiles(own_sample.root).keep(image.digest, [run_of(image, [1], command="train")])
    shutil.rmtree(own_sample.store)
    for arguments in (["ls"], ["ls", image.digest]):
        rows = own_sample("profile", *arguments, "--json").json
        assert [(row["command"], row["where"]) for row in rows] == [("serve", "host"), ("train", "fetched")]
    exported = json.loads(own_sample("profile", "export", image.digest).out)
    assert [profile["command"] for profile in exported["profiles"]] == ["serve", "train"]


def test_a_damaged_profile_is_told(own_sample):
    image = opened(own_sample)
    beside.save(image.store, image.descriptor, [run_of(image)])
    path = image.store.blob_path(image.store.profiles(image.digest).digest)
    path.write_bytes(b"x" * path.stat().st_size)
    assert path.name in own_sample("profile", "ls").lines[1]
    assert own_sample("images").lines
    assert own_sample("pull", "sample:1").code == 0


def test_export(own_sample, tmp_path):
    image = recorded(own_sample, [3, 0, 1])
    document = json.loads(own_sample("profile", "export", "sample:1").out)
    assert (document["version"], document["image"]) == (1, image.digest)
    (profile,) = document["profiles"]
    assert (profile["command"], profile["runs"]) == ("serve", 1)
    complete = with_digests(image.store, image, run_of(image, [3, 0, 1]))
    for chunk, row in zip(profile["chunks"], complete.rows, strict=True):
        data = image.pack_reader(int(row["pack"]) + 1).read(chunk["offset"], chunk["length"])
        path = chunk.pop("path").encode("utf-8", "surrogateescape")
        assert data in b"".join(image.read(image.index.lookup(path)))
        assert chunk == {
            "pack": complete.packs[row["pack"]],
            "offset": int(row["block"]) * 4096,
            "length": int(row["length"]),
            "digest": row["digest"].tobytes().hex(),
            "first_ms": int(row["first"]),
            "confidence": 1.0,
            "reason": "recorded",
        }
    own_sample("profile", "export", "sample:1", "-o", tmp_path / "out.json", "--command", "serve")
    assert json.loads((tmp_path / "out.json").read_text())["image"] == image.digest
    assert "'train'" in own_sample("profile", "export", "sample:1", "--command", "train", code=3).err
    assert own_sample("profile", "export", "sample:2", code=3).err
    assert own_sample("profile", "export", "sample:1", "-o", tmp_path / "no" / "out", code=7).err


def test_import_into_another_build(own_sample, tmp_path):
    """Chunks are found by their digests; those that changed are left out."""
    old = recorded(own_sample)
    own_sample("profile", "export", "sample:1", "-o", tmp_path / "p.json")
    (told,) = own_sample("profile", "import", "sample:2", tmp_path / "p.json", "--json").json
    assert told["command"] == "serve"
    assert 0 < told["chunks"] < len(run_of(old).rows)
    new = opened(own_sample, "sample:2")
    (there,) = beside.load(new.store, new.digest)
    assert len(there.rows) == told["chunks"]
    known = {row["digest"].tobytes() for row in with_digests(old.store, old, run_of(old)).rows}
    assert {row["digest"].tobytes() for row in there.rows} <= known
    own_sample("profile", "import", "sample:2", tmp_path / "p.json", "--to", "host")
    (here,) = HostProfiles(own_sample.root).recorded(new.digest)
    assert facts(here) == facts(there)


def test_an_export_comes_back_as_it_was(own_sample, tmp_path):
    image = recorded(own_sample)
    own_sample("profile", "export", "sample:1", "-o", tmp_path / "p.json")
    own_sample("profile", "rm", "sample:1")
    line = own_sample("profile", "import", "sample:1", tmp_path / "p.json").lines
    assert line == [f"serve: {len(run_of(image).rows)} chunks"]
    assert facts(beside.load(image.store, image.digest)[0]) == facts(with_digests(image.store, image, run_of(image)))
    piped = own_sample.process("profile", "import", "sample:1", "-", stdin=subprocess.PIPE)
    piped.communicate((tmp_path / "p.json").read_bytes(), timeout=60)
    assert piped.returncode == 0
    assert [profile.runs for profile in beside.load(image.store, image.digest)] == [2]


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "{}", "[" * 100_000, '{"version": 2, "image": "", "profiles": []}',
        '{"version": 1, "image": "", "profiles": [{"command": "x", "runs": 99, "chunks": []}]}',
        '{"version": 1, "image": "", "profiles": [{"command": "x", "runs": 1, "chunks": [{"pack": "../../x"}]}]}',
        f'{{"version": 1, "image": "", "profiles": [{", ".join([EMPTY] * 2)}]}}',
    ],
    ids=range(9),
)  # fmt: skip
def test_what_is_no_export(sample, tmp_path, text):
    (tmp_path / "p.json").write_text(text)
    assert "p.json: " in sample("profile", "import", "sample:1", tmp_path / "p.json", code=4).err


def test_nothing_to_import(sample, tmp_path):
    (tmp_path / "p.json").write_text('{"version": 1, "image": "", "profiles": []}')
    assert "nothing in it" in sample("profile", "import", "sample:1", tmp_path / "p.json", code=3).err


def test_push(own_sample):
    image = recorded(own_sample, [0, 1])
    assert own_sample("profile", "push", "sample:1").lines == ["serve: 1 run"]
    assert [row["where"] for row in own_sample("profile", "ls", "--json").json] == ["store"]
    assert own_sample("profile", "push", "sample:1", code=3).err
    recorded(own_sample, [1])
    assert own_sample("profile", "push", "sample:1", "--json").json == [{"command": "serve", "runs": 1, "chunks": 1}]
    assert [profile.runs for profile in beside.load(image.store, image.digest)] == [2]
    assert HostProfiles(own_sample.root).find(image.digest, "serve").runs == 2


def test_rm(own_sample):
    image = recorded(own_sample)
    profiles = HostProfiles(own_sample.root)

    def anew() -> None:
        profiles.add(image.digest, run_of(image, command="train"))
        beside.save(image.store, image.descriptor, [run_of(image, command=name) for name in ("serve", "eval")])
        profiles.refresh(image.store, image.digest)

    anew()
    assert own_sample("profile", "rm", "sample:1", "--command", "serve").lines == ["serve"]
    assert own_sample("profile", "rm", "sample:1", "--command", "serve", code=3).err
    assert [(row["command"], row["where"]) for row in own_sample("profile", "ls", "--json").json] == [
        ("train", "host"), ("eval", "store")
    ]  # fmt: skip
    anew()
    assert own_sample("profile", "rm", "sample:1", "--from", "host", "--json").json == {
        "removed": ["train", "serve", "eval"]
    }
    assert len(beside.load(image.store, image.digest)) == 2
    own_sample("pull", "sample:1")
    assert len(profiles.fetched(image.digest)) == 2
    anew()
    assert own_sample("profile", "rm", "sample:1", "--from", "store").lines == ["serve", "eval"]
    assert [profile.command for profile in profiles.all(image.digest)] == ["train"]
    anew()
    assert set(own_sample("profile", "rm", "sample:1").lines) == {"serve", "eval", "train"}
    assert own_sample("profile", "ls", "--json").json == []


def test_copies_and_removal_by_the_verbs(own_sample, tmp_path):
    image = opened(own_sample)
    beside.save(image.store, image.descriptor, [run_of(image)])
    assert own_sample("push", "sample:1", tmp_path / "there", "--json").json[0]["profiles"] == 1
    there = Image.open(DirectoryStore(tmp_path / "there", create=False), "sample:1")
    assert len(beside.load(there.store, there.digest)) == 1
    own_sample("--store", tmp_path / "there", "rm", "sample:1")
    assert there.store.profiled() == set()
    own_sample("--store", tmp_path / "there", "pull", "--from", own_sample.store, "sample:1")
    assert there.store.profiled() == {image.digest}
    assert [row["name"] for row in own_sample("images", "--json").json] == ["sample:1", "sample:2"]
    assert own_sample("check").code == 0
    assert own_sample("gc", "--json").json["kept_blobs"] > 0
    assert len(beside.load(image.store, image.digest)) == 1


def test_help_imports_little():
    """Each sub-verb is imported when it is used."""
    code = "import sys; from erofsgen.cli.main import run; run(['profile', '--help']); print('numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, cwd=Path(__file__).parents[2])
    text = done.stdout.decode()
    assert text.endswith("False\n")
    assert all(f"  {verb} " in text for verb in ("ls", "export", "import", "push", "rm"))
