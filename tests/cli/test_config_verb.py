"""The configuration as a user has it: check, show, the default store, and tiers of a lazy mount."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from lazykit import eventually
from servers.nginx import StaticServer

from erofsgen.cli.main import run


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "config.toml"


def test_without_a_file_the_defaults_hold(erofsgen) -> None:
    facts = erofsgen("config", "show", "--json").json
    assert facts["tier"] == []
    assert facts["origin"] == {"timeout": 10.0, "concurrency": 64, "hedge": True}
    assert erofsgen("config", "check").code == 0
    assert "no such configuration" in erofsgen("config", "check", "/nowhere.toml", code=3).err


def test_a_mistake_is_found_wherever_the_file_is_named(erofsgen, file: Path, mount_point: Path) -> None:
    file.write_text('[[tier]]\nname = "a"\nurl = "/a"\ntimeout = 0\n')
    expected = f"erofsgen: error: {file}: tier[0].timeout: expected `float` > 0.0"
    assert erofsgen("config", "check", file, code=4).err.splitlines()[0] == expected
    assert erofsgen("--config", file, "config", "show", code=4).err.splitlines()[0] == expected
    assert erofsgen("daemon", "--config", file, "--plane", "fuse", code=4).err.splitlines()[0] == expected


def test_show_has_everything(erofsgen, file: Path) -> None:
    file.write_text('store = "/a"\n[[tier]]\nname = "near"\nproxy = "http://b:1"\nfor = ["s3://c"]\nweight = 3\n')
    facts = erofsgen("config", "show", "--json", "--config", file).json
    assert facts["file"] == str(file)
    assert facts["tier"][0]["for"] == ["s3://c"]
    lines = erofsgen("config", "show", "--config", file).lines
    assert lines[0].split() == ["file", str(file)]
    assert lines[3].split() == ["near", "1", "proxy", "http://b:1", "s3://c", "3", "2", "s", "16", "hedge"]


@pytest.mark.server
def test_check_tries_every_tier(erofsgen, file: Path, nginx_static: StaticServer, tmp_path: Path) -> None:
    (nginx_static.directory / "index.json").write_text("{}")
    tiers = [
        ("good", "url", nginx_static.url),
        ("proxy", "proxy", nginx_static.url),
        ("dead", "url", "http://127.0.0.1:1"),
        ("dead-proxy", "proxy", "http://127.0.0.1:1"),
        ("missing", "url", tmp_path / "missing"),
    ]
    file.write_text("".join(f'[[tier]]\nname = "{name}"\n{way} = "{url}"\n' for name, way, url in tiers))
    outcome = erofsgen("config", "check", file, "--json", code=6)
    assert "error: dead: cannot reach 127.0.0.1:1" in outcome.err, "the first"
    facts = outcome.json["tried"]
    assert [one["name"] for one in facts if one["error"] is None] == ["good", "proxy"]
    assert f"no store at {tmp_path}/missing" in facts[4]["error"]
    assert all(0 < one["latency"] < 2 for one in facts[:2])
    lines = erofsgen("config", "check", file, code=6).lines
    assert lines[0].split() == ["TIER", "LEVEL", "URL", "STATE"]
    assert lines[1].split()[:4] == ["good", "1", nginx_static.url, "ok,"]
    assert "cannot reach 127.0.0.1:1" in lines[3]
    assert erofsgen("config", "check", file, "--offline").code == 0
    assert erofsgen("config", "check", file, "--offline", "--json").json["tried"] == []


@pytest.mark.server
def test_check_asks_a_proxy_for_the_store(erofsgen, file: Path, nginx_static: StaticServer) -> None:
    """A web server that is no proxy looks at the path alone, and so does the store behind it."""
    file.write_text(f'store = "{nginx_static.url}/x"\n[[tier]]\nname = "through"\nproxy = "{nginx_static.url}"\n')
    facts = erofsgen("config", "check", file, "--json").json["tried"]
    assert [(one["name"], one["error"]) for one in facts] == [("through", None), ("origin", None)]


def test_the_file_names_the_store(
    sample_store: Path, file: Path, capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text(f'store = "{sample_store}"')
    monkeypatch.delenv("EROFSGEN_STORE", raising=False)
    assert run(["--config", str(file), "images"]) == 0
    assert b"sample:1" in capfdbinary.readouterr().out
    monkeypatch.setenv("EROFSGEN_STORE", "/nowhere")
    assert run(["images"]) == 3


@pytest.mark.mount
@pytest.mark.usefixtures("require_root")
def test_a_lazy_mount_reads_through_its_tiers_and_feeds_them(sample, file: Path, mount_point: Path, tmp_path: Path):
    shutil.copytree(sample.store, tmp_path / "copy")
    file.write_text(
        f'[[tier]]\nname = "fed"\nurl = "{tmp_path}/fed"\nfeed = true\n'
        f'[[tier]]\nname = "copy"\nurl = "{tmp_path}/copy"\n'
    )
    sample("--config", file, "mount", "sample:1", mount_point)
    files = [path for path in mount_point.rglob("*") if not path.is_symlink() and path.is_file()]
    for path in files:
        path.read_bytes()
    facts = json.loads(sample("status", "--json").out)["engine"]["sources"]
    assert list(facts) == ["fed", "copy", str(sample.store)]
    assert (facts["fed"]["level"], facts["copy"]["level"], facts[str(sample.store)]["level"]) == (1, 2, None)
    assert facts["fed"]["absent"] > 0
    assert facts["copy"]["reads"] > 0
    assert facts[str(sample.store)]["reads"] == 0
    packs = {path.stem for path in sample.root.rglob("*.data")}
    fed = tmp_path / "fed/blobs/sha256"
    eventually(lambda: fed.exists() and set(os.listdir(fed)) & packs)
    lines = [line for line in sample("status").lines if line.split()[0] in ("tier", "store")]
    assert [line.split()[:2] for line in lines] == [
        ["tier", "fed:"], ["tier", "copy:"], ["store", f"{sample.store}:"],
    ]  # fmt: skip
    assert "ok" in lines[0]
    sample("umount", mount_point)


@pytest.mark.usefixtures("require_root")
def test_all_of_an_image_comes_through_tiers_too(own_sample, file: Path, tmp_path: Path):
    """Its packs are gone from the store, and only the tier has them."""
    shutil.copytree(own_sample.store, tmp_path / "copy")
    file.write_text(f'[[tier]]\nname = "copy"\nurl = "{tmp_path}/copy"\n')
    own_sample("pull", "sample:1")
    for path in own_sample.root.rglob("*.data"):
        (own_sample.store / "blobs/sha256" / path.stem).unlink()
    assert "no blob" in own_sample("pull", "sample:1", "--all", code=3).err
    assert own_sample("--config", file, "pull", "sample:1", "--all", "--json").json["complete"] is True
