"""build-many: the list it reads, what it prints, how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import servers
from batchkit import layer, processes, write_layout, write_list
from lazykit import eventually

IMAGES = ("one", "two", "three")


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with three layouts that share a layer."""
    place = tmp_path_factory.mktemp("layouts")
    for name in IMAGES:
        write_layout(place / name, layer("base"), layer(name))
    return place


# --- the list --------------------------------------------------------------------------------------------------------


def test_a_list(erofsgen, layouts: Path, tmp_path: Path):
    (tmp_path / "with a space").symlink_to(layouts / "three")
    given = write_list(
        tmp_path / "list",
        "# three images",
        "",
        f"oci:{layouts / 'one'}",
        f"  oci:{layouts / 'two'}:latest\ttag=second platform=linux/amd64  # the second",
        f'"oci:{tmp_path / "with a space"}" tag=third',
    )
    outcome = erofsgen("build-many", given, "--jobs", "2")
    *rows, summary = [line.split() for line in outcome.lines[1:]]
    assert outcome.lines[0].split() == ["IMAGE", "STATUS", "DIGEST", "SECONDS"]
    assert [row[:2] for row in rows] == [["one", "built"], ["second", "built"], ["third", "built"]]
    images = {image["name"]: image["digest"] for image in erofsgen("images", "--json").json}
    assert [images[row[0]].removeprefix("sha256:")[:12] for row in rows] == [row[2] for row in rows]
    assert summary[:6] == ["3", "built,", "0", "unchanged,", "0", "failed"]
    assert f"erofsgen: 1/3 oci:{layouts / 'one'}\n" in outcome.err
    assert erofsgen("check", "--json").json["problems"] == []
    again = erofsgen("--quiet", "build-many", given)
    assert again.err == ""
    assert again.lines[-1].startswith("0 built, 3 unchanged, 0 failed in ")


def test_the_list_may_come_from_a_pipe(erofsgen, layouts: Path):
    process = erofsgen.process("build-many", "-", "--json", stdin=subprocess.PIPE)
    out, err = process.communicate(f"oci:{layouts / 'one'}\n".encode(), timeout=60)
    assert process.returncode == 0, err
    (outcome,) = json.loads(out)
    assert outcome.keys() == {"image", "name", "status", "digest", "seconds", "attempts", "error"}
    assert (outcome["image"], outcome["name"], outcome["status"]) == (f"oci:{layouts / 'one'}", "one", "built")
    assert (outcome["attempts"], outcome["error"]) == (1, None)
    assert outcome["digest"] == erofsgen("inspect", "one", "--json").json["digest"]
    process = erofsgen.process("build-many", "-", stdin=subprocess.PIPE)
    _, err = process.communicate(b"\noci:", timeout=60)
    assert process.returncode == 2
    assert err.startswith(b"erofsgen: error: <stdin>, line 2: oci: names no file\n")


def test_an_empty_list(erofsgen, tmp_path: Path):
    assert erofsgen("build-many", write_list(tmp_path / "list", "# nothing"), "--json").json == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("python:3 slim", "line 3: 'slim' is neither tag=NAME nor platform=OS/ARCH"),
        ("python:3 tag=", "line 3: 'tag=' is neither"),
        ("python:3 tag=a tag=b", "line 3: tag is given twice"),
        ("python:3 platform=linux//", "line 3: platform 'linux//' is malformed"),
        ("Python:3", "line 3: image reference 'Python:3' is malformed"),
        ("oci:", "line 3: oci: names no file"),
        ("containers-storage:python", "line 3: cannot read containers-storage: images"),
        ('"python:3', "line 3: no closing quotation"),
        ("docker://one/two", "line 3: docker://one/two becomes docker.io/one/two:latest, as the image of line 1 does"),
        ("python:3 tag=docker.io/one/two:latest", "line 3: python:3 becomes docker.io/one/two:latest"),
    ],
)
def test_lines_that_are_none(erofsgen, tmp_path: Path, line: str, message: str):
    given = write_list(tmp_path / "list", "one/two", "", line)
    outcome = erofsgen("build-many", given, code=2)
    assert f"erofsgen: error: {given}, {message}" in outcome.err
    assert "\nhint: " in outcome.err
    assert erofsgen("images", "--json").json == []


def test_options_are_looked_at_first(erofsgen, layouts: Path, tmp_path: Path):
    given = write_list(tmp_path / "list", f"oci:{layouts / 'one'}")
    assert "chunk size" in erofsgen("build-many", given, "--chunk-size", "3K", code=2).err
    assert "does-not-exist" in erofsgen("build-many", tmp_path / "does-not-exist", code=2).err
    assert not erofsgen.store.exists()


def test_options_reach_the_builds(erofsgen, layouts: Path, tmp_path: Path):
    given = write_list(tmp_path / "list", f"oci:{layouts / 'one'}")
    erofsgen("build-many", given, "--chunk-size", "64K", "--threads", "1", "--retries", "0", "--no-dedup")
    assert erofsgen("inspect", "one", "--json").json["chunk_size"] == 64 << 10
    assert "1 unchanged" in erofsgen("build-many", given, "--chunk-size", "64K", "--no-dedup").lines[-1]
    assert "1 built" in erofsgen("build-many", given, "--chunk-size", "64K", "--no-dedup", "--force").lines[-1]


# --- failures --------------------------------------------------------------------------------------------------------


def test_failures_are_listed(erofsgen, layouts: Path, tmp_path: Path):
    missing, bad = "oci:/nowhere", tmp_path / "bad.tar"
    bad.write_bytes(b"not a tar" * 1000)
    given = write_list(tmp_path / "list", missing, f"oci:{layouts / 'one'}", f"tar:{bad}")
    outcome = erofsgen("build-many", given, code=1)  # for two reasons
    heading = next(number for number, line in enumerate(outcome.lines) if line.startswith("FAILED"))
    nowhere, tar = outcome.lines[heading + 1 : heading + 3]
    assert nowhere.split()[:2] == ["nowhere", "1"]
    assert "/nowhere does not exist" in nowhere
    assert "an OCI image layout is a directory" in nowhere
    assert tar.split()[:2] == ["bad", "1"]
    assert "this is not a tar archive" in tar
    assert outcome.lines[-1].startswith("1 built, 0 unchanged, 2 failed in ")
    assert "erofsgen: error: 2 of 3 images failed" in outcome.err

    write_list(given, missing, f"oci:{layouts / 'one'}", f"oci:{layouts / 'two'}")
    outcome = erofsgen("build-many", given, "--fail-fast", "--jobs", "1", "--json", code=3)
    (failed,) = outcome.json
    assert (failed["image"], failed["status"], failed["digest"], failed["attempts"]) == (missing, "failed", None, 1)
    assert failed["error"]["exit_code"] == 3
    outcome = erofsgen("build-many", given, "--fail-fast", "--jobs", "1", code=3)
    assert outcome.lines[-1].startswith("0 built, 0 unchanged, 1 failed, 2 not started in ")


def test_a_store_that_cannot_be(erofsgen, layouts: Path, tmp_path: Path):
    erofsgen.store.write_text("a file")
    given = write_list(tmp_path / "list", f"oci:{layouts / 'one'}")
    assert str(erofsgen.store) in erofsgen("build-many", given, code=7).err


@pytest.mark.server
def test_interrupting_and_going_on(erofsgen, tmp_path: Path):
    """Ctrl-C, as a terminal sends it to the whole process group, while the second image is on its way."""
    under_way = threading.Event()

    def dawdle(handler) -> None:
        under_way.set()
        handler.registry.closing.wait(30)

    with servers.faulty_registry() as registry:
        for name in IMAGES:
            registry.add_image(layer("base"), layer(name), tag=name)
        own = next(digest for digest, data in registry.blobs.items() if data == layer("two"))
        registry.fault(own.removeprefix("sha256:"), dawdle)
        lines = [f"{registry.host}/team/app:{name} tag={name}" for name in IMAGES]
        given = write_list(tmp_path / "list", *lines)
        process = erofsgen.process("build-many", given, "--jobs", "1", start_new_session=True)
        assert under_way.wait(30)
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=30)
        assert (process.returncode, out) == (130, b"")
        assert err.decode().splitlines()[-1] == "erofsgen: interrupted"
        assert b"Traceback" not in err
        eventually(lambda: all(left.group != process.pid for left in processes()))  # its worker is about to end
        assert [image["name"] for image in erofsgen("images", "--json").json] == ["one"]
        registry.requests.clear()
        outcomes = erofsgen("build-many", given, "--json").json
        assert [outcome["status"] for outcome in outcomes] == ["unchanged", "built", "built"]
        base = next(digest for digest, data in registry.blobs.items() if data == layer("base"))
        assert registry.seen(base.removeprefix("sha256:")) == []  # its record was there


@pytest.mark.server
def test_from_a_real_registry(erofsgen, layouts: Path, tmp_path: Path):
    with servers.docker_registry(tmp_path / "registry") as host:
        for name in IMAGES:
            source, target = f"oci:{layouts / name}:latest", f"docker://{host}/team/{name}:1"
            subprocess.run(["skopeo", "copy", "--quiet", "--dest-tls-verify=false", source, target], check=True)
        given = write_list(tmp_path / "list", *(f"{host}/team/{name}:1" for name in IMAGES))
        first = erofsgen("build-many", given, "--json").json
        second = erofsgen("build-many", given, "--json").json
    assert [(row["name"], row["status"]) for row in first] == [(f"{host}/team/{name}:1", "built") for name in IMAGES]
    assert [(row["digest"], row["status"]) for row in second] == [(row["digest"], "unchanged") for row in first]


@pytest.mark.server
def test_into_a_real_registry(erofsgen, layouts: Path, tmp_path: Path):
    """There names are tags: two images that are told apart by their repositories need names."""
    with servers.docker_registry(tmp_path / "registry") as host:
        erofsgen.options[1] = f"docker://{host}/lazy/images"
        given = write_list(tmp_path / "list", "team/one:1", "team/two:1")
        assert f"error: {given}, line 2: team/two:1 becomes 1, as" in erofsgen("build-many", given, code=2).err
        write_list(given, *(f"oci:{layouts / name}" for name in IMAGES))
        for status in ("built", "unchanged"):
            outcomes = erofsgen("build-many", given, "--json").json
            assert [(outcome["name"], outcome["status"]) for outcome in outcomes] == [(name, status) for name in IMAGES]
        assert erofsgen("check", "--json").json["problems"] == []


def test_a_cluster_needs_ray(erofsgen, layouts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    given = write_list(tmp_path / "list", f"oci:{layouts / 'one'}")
    for option in (["--cluster"], ["--cluster=127.0.0.1:6379"]):
        outcome = erofsgen("build-many", given, *option, code=8)
        assert "hint: pip install 'erofsgen[cluster]'" in outcome.err
