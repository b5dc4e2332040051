"""`erofsgen explain`: what it says of files against what is known of the samples, the cache and the stores."""

from __future__ import annotations

import os
import re
import shutil
import socket
import stat
import subprocess
import time
from pathlib import Path

import pytest
from blake3 import blake3

from erofsgen.host.cache.files import Layout
from erofsgen.host.cache.objects import DOMAIN, Key, Objects
from erofsgen.host.cache.presence import Presence
from erofsgen.host.config import Config, Tier
from erofsgen.host.explain.sources import sources
from erofsgen.store.directory import DirectoryStore
from erofsgen.store.image import Image

CHUNK = 1 << 20


def data_of(sample, path: str) -> bytes:
    return sample("cat", "sample:1", path).out


def test_a_file_of_a_store(sample):
    data = data_of(sample, "data/edited")
    found = sample("explain", "sample:1", "data/edited", "--json").json
    assert found["inode"] | {"nid": 0} == {
        "path": "data/edited", "kind": "regular file", "nid": 0, "mode": stat.S_IFREG | 0o644, "uid": 0, "gid": 0,
        "nlink": 1, "size": len(data), "mtime": 1_600_000_000 * 10**9, "chunk_size": CHUNK,
    }  # fmt: skip
    assert found["cached"] is False
    assert found["mounts"] == found["problems"] == []
    image = Image.open(DirectoryStore(sample.store), "sample:1")
    at = 0
    for chunk in found["chunks"]:
        piece = data[at : at + CHUNK]
        assert (chunk["offset"], chunk["length"], chunk["digest"]) == (at, len(piece), blake3(piece).hexdigest())
        assert image.pack_reader(chunk["slot"]).read(chunk["device_offset"], len(piece)) == piece
        (frame,) = [
            frame for frame in found["frames"] if (frame["slot"], frame["frame"]) == (chunk["slot"], chunk["frame"])
        ]
        inside = chunk["device_offset"] - frame["device_offset"]
        assert 0 <= inside <= inside + len(piece) <= frame["device_size"]
        assert (frame["host_cache"], frame["fscache"], frame["used"], chunk["page_cache"]) == (
            "absent",
            None,
            None,
            None,
        )
        at += len(piece)
    assert at == len(data)
    assert [pack["slot"] for pack in found["packs"]] == sorted({chunk["slot"] for chunk in found["chunks"]})
    for pack in found["packs"]:
        named = image.packs[pack["slot"] - 1]
        assert (pack["digest"], pack["stored"], pack["kind"]) == (named.digest, named.size, "zstd")
        assert (pack["data"], pack["objects"], pack["here"]) == (None, [], 0)
    (source,) = found["sources"]
    assert (source["name"], source["level"], source["error"]) == (str(sample.store), None, None)
    assert source["packs"] == dict.fromkeys([pack["digest"] for pack in found["packs"]], True)


def test_what_other_images_and_other_files_share(sample):
    """The second sample changed one byte range of ``data/edited``; ``data/copy`` has what ``data/big`` has."""
    one, two = data_of(sample, "data/edited"), sample("cat", "sample:2", "data/edited").out
    digests = [
        {blake3(data[at : at + CHUNK]).digest() for at in range(0, len(data), CHUNK)} for data in (one, two)
    ]  # fmt: skip
    (sharer,) = sample("explain", "sample:1", "data/edited", "--json").json["shared"]
    everywhere = sample("explain", "sample:1", "/", "--json").json
    assert sharer["names"] == ["sample:2"]
    assert (sharer["known"], sharer["mounts"]) == (["store"], [])
    assert sharer["chunks"] >= len(digests[0] & digests[1])
    found = sample("explain", "sample:1", "data/copy", "--json").json
    assert {"data/big"} <= set(found["also"])
    assert found["also_files"] == len(found["also"])
    assert everywhere["chunks"] == everywhere["also"] == []
    alone = sample("explain", "sample:1", "data/noise", "--json").json
    assert alone["also"] == []
    assert sum(chunk["shared"] for chunk in alone["chunks"]) == sum(other["chunks"] for other in alone["shared"])


@pytest.mark.parametrize(
    ("path", "kind", "said"),
    [
        ("data/small", "regular file", r"12 B: 12 B in the index"),
        ("data/empty", "regular file", r"0 B"),
        ("data/zeros", "regular file", r"5.0 MiB: 5.0 MiB holes"),
        ("special/null", "character device", r"none: a character device"),
        ("data", "directory", r"\d+ files below, \S+ MiB: \S+ MiB in \d+ chunks of \d+ frames in \d+ packs, .*"),
        ("/", "directory", r"\d+ files below, .* in \d+ chunks of .*"),
    ],
)
def test_what_has_no_chunks_of_its_own(sample, path: str, kind: str, said: str):
    lines = dict(line.split(maxsplit=1) for line in sample("explain", "sample:1", path).lines if line.strip())
    assert re.fullmatch(said, lines["data"])
    found = sample("explain", "sample:1", path, "--json").json
    assert found["inode"]["kind"] == kind
    assert [chunk["slot"] for chunk in found["chunks"]] == ([None] if path == "data/zeros" else [])
    content = found["content"]
    assert content["bytes"] == content["mapped"] + content["inline"] + content["holes"]
    assert content["chunks"] <= sum(frame["bytes"] for frame in found["frames"])


def test_links_are_followed_and_names_cannot_drive_the_terminal(sample):
    found = sample("explain", "sample:1", "links/absolute", "--json").json
    assert not found["inode"]["path"].startswith("links/")
    said = sample("explain", "sample:1", os.fsdecode(b"names/\x1b[31mred")).out
    assert b"\x1b" not in said
    assert b"/names/\\x1b[31mred" in said
    assert "no such file" in sample("explain", "sample:1", "nothing", code=3).err
    assert "no image" in sample("explain", "nothing", "/", code=3).err


def test_long_tables_are_cut(own_sample, tmp_path: Path):
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "long").write_bytes(os.urandom(30 * 4096))
    subprocess.run(["tar", "-C", tmp_path / "tree", "-cf", tmp_path / "tree.tar", "."], check=True)
    own_sample("build", f"tar:{tmp_path}/tree.tar", "--tag", "long", "--chunk-size", "4K")
    lines = own_sample("explain", "long", "long").lines
    assert "and 6 chunks more: see --all" in lines
    assert not any("more" in line for line in own_sample("explain", "long", "long", "--all").lines)


@pytest.mark.mount
@pytest.mark.usefixtures("require_root")
def test_a_mounted_file(own_sample, mount_point: Path, tmp_path: Path):
    """Then without its store: what is here needs nobody."""
    sample = own_sample
    sample("mount", "sample:1", mount_point, "--plane", "fanotify")
    with (mount_point / "data/edited").open("rb") as file:
        file.read(4096)
    sample("pull", "sample:2")
    before = time.time()
    found = sample("explain", "sample:1", "data/edited", "--json").json
    first, *rest = found["chunks"]
    frames = {(frame["slot"], frame["frame"]): frame for frame in found["frames"]}
    frame = frames[first["slot"], first["frame"]]
    assert frame["host_cache"] in ("present", "durable")
    assert abs(frame["used"] - before) < 120
    assert {frames[chunk["slot"], chunk["frame"]]["host_cache"] for chunk in rest} <= {"present", "absent"}
    here = sum(frame["bytes"] for frame in frames.values() if frame["host_cache"] == "present")
    assert found["content"]["here"] == here >= 4096
    assert first["page_cache"] is None or first["page_cache"] > 0
    (mounted,) = found["mounts"]
    assert (mounted["target"], mounted["plane"]) == (str(mount_point), "fanotify")
    assert mounted["page_cache"] is None or 4096 <= mounted["page_cache"] <= found["inode"]["size"]
    assert [(other["names"], other["known"]) for other in found["shared"]] == [(["sample:2"], ["host cache", "store"])]
    assert [pack["data"] is not None for pack in found["packs"]] == [True] * len(found["packs"])
    sample.store.rename(tmp_path / "away")
    alone = sample("explain", "sample:1", "data/edited", "--json", "--no-remote").json
    assert alone["frames"] == found["frames"]
    assert [chunk["digest"] for chunk in alone["chunks"]] == [None] * len(found["chunks"])
    assert [(other["names"], other["known"]) for other in alone["shared"]] == [(["sample:2"], ["host cache"])]
    assert alone["problems"] == [f"store: no store at {sample.store}"]
    (source,) = alone["sources"]
    assert source["error"] == f"no store at {sample.store}"
    lines = sample("explain", "sample:1", "data/edited").lines
    assert f"not known: store: no store at {sample.store}" in lines
    sample("umount", mount_point)
    assert "no store" in sample("explain", "other", "data/edited", code=3).err


def test_objects_of_the_kernels_own_cache(sample):
    """As the fscache plane records them."""
    sample("pull", "sample:1")
    found = sample("explain", "sample:1", "data/edited", "--json").json
    pack = found["packs"][0]["digest"].removeprefix("sha256:")
    objects = Objects(Layout(sample.root))
    key = Key(f"erofs,{DOMAIN}", pack)
    objects.map(key).parent.mkdir(parents=True)
    frames = Presence.frames_of(Layout(sample.root).find(pack).map)
    with Presence.open(objects.map(key), frames) as presence:
        presence.mark_written(found["chunks"][0]["frame"])
    again = sample("explain", "sample:1", "data/edited", "--json").json
    assert again["packs"][0]["objects"] == [f"erofs,{DOMAIN}/{pack}"]
    states = {frame["frame"]: (frame["host_cache"], frame["fscache"]) for frame in again["frames"]}
    assert states.pop(found["chunks"][0]["frame"]) == ("absent", "present")
    assert set(states.values()) <= {("absent", "absent"), ("absent", None)}
    assert again["content"]["here"] == CHUNK
    assert "in fscache 1 of" in "\n".join(sample("explain", "sample:1", "data/edited").lines)


def test_tiers(sample, tmp_path: Path):
    """One has the packs, one lacks them, one is not there, and one does not answer."""
    DirectoryStore(tmp_path / "far", create=True)
    shutil.copytree(sample.store, tmp_path / "near")
    silent = socket.create_server(("127.0.0.1", 0))
    port = silent.getsockname()[1]
    config = tmp_path / "config.toml"
    config.write_text(
        "".join(
            f'[[tier]]\nname = "{name}"\nurl = "{url}"\n'
            for name, url in (
                ("near", tmp_path / "near"), ("far", tmp_path / "far"), ("gone", tmp_path / "gone"),
                ("silent", f"http://127.0.0.1:{port}/x"),
            )
        )
    )  # fmt: skip
    began = time.monotonic()
    with silent:
        found = sample(
            "explain", "sample:1", "data/edited", "--json", "--timeout", "0.3", "--config", config
        ).json  # fmt: skip
        assert time.monotonic() - began < 5
        near, far, gone, quiet, own = found["sources"]
        packs = {pack["digest"] for pack in found["packs"]}
        assert near["packs"] == own["packs"] == dict.fromkeys(packs, True)
        assert far["packs"] == dict.fromkeys(packs, False)
        assert (near["level"], far["level"], gone["level"], own["level"]) == (1, 2, 3, None)
        assert gone["error"] == f"no store at {tmp_path}/gone"
        assert quiet["error"]
        assert quiet["packs"] == {}
        local = sample("explain", "sample:1", "data/edited", "--json", "--no-remote", "--config", config).json
        assert [source["asked"] for source in local["sources"]] == [True, True, True, False, True]
    lines = sample("explain", "sample:1", "data/edited", "--no-remote", "--config", config).lines
    table = [line.split() for line in lines[-6:]]
    assert [row[0] for row in table] == ["SOURCE", "near", "far", "gone", "silent", str(sample.store)]
    assert table[4][-2:] == ["not", "asked"]


def test_a_proxy_cannot_be_asked_what_it_keeps():
    """Only whether it is there; nor is anything asked of the stores that it stands for, where nobody wants that."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = f"http://127.0.0.1:{server.getsockname()[1]}"
        dead = "http://127.0.0.1:1"
        config = Config(tier=[Tier(name="dead", proxy=dead), Tier(name="proxy", proxy=place)])
        url = f"{dead}/store"
        first, second, origin = sources(config, [url], ["sha256:" + "0" * 64], remote=True, timeout=2.0)
        silent = sources(config, [url], [], remote=False, timeout=2.0)
    assert (first.name, first.proxy, first.url, first.packs) == (f"dead ({url})", True, dead, {})
    assert "refused" in first.error
    assert (second.name, second.error, second.packs) == (f"proxy ({url})", None, {})
    assert second.latency < 1
    assert origin.error
    assert not origin.proxy
    assert [(source.asked, source.error) for source in silent] == [(False, None)] * 3
