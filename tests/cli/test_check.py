"""check: whatever is damaged is found and named; and every other verb meets the same damage with a clean error."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from erofsgen.pack.toc import read_dictionary
from erofsgen.pack.writer import PackWriter
from erofsgen.store.directory import DirectoryStore
from erofsgen.store.image import Image


class Victim:
    """A store of the samples that is going to suffer."""

    def __init__(self, erofsgen: Any) -> None:
        self.erofsgen = erofsgen
        self.store = DirectoryStore(erofsgen.store)
        self.image = Image.open(self.store, "sample:1")
        self.packs = self.image.packs

    def path(self, digest: str) -> Path:
        return self.store.blob_path(digest)

    def flip(self, digest: str, offset: int) -> None:
        data = bytearray(self.path(digest).read_bytes())
        data[offset] ^= 0x10
        self.path(digest).write_bytes(data)

    def replace_manifest(self, change: Callable[[dict[str, Any]], None]) -> None:
        """Name a manifest ``sample:1`` that was made for the purpose: all digests are right."""
        document = json.loads(self.path(self.image.digest).read_bytes())
        change(document)
        data = json.dumps(document).encode()
        self.path(f"sha256:{hashlib.sha256(data).hexdigest()}").write_bytes(data)
        index = json.loads((self.store.path / "index.json").read_bytes())
        for manifest in index["manifests"]:
            if manifest["digest"] == self.image.digest:
                manifest["digest"] = f"sha256:{hashlib.sha256(data).hexdigest()}"
                manifest["size"] = len(data)
        (self.store.path / "index.json").write_text(json.dumps(index))

    def problems(self, *names: str) -> list[dict[str, str]]:
        return self.erofsgen("check", *names, "--json", code=5).json["problems"]

    def text(self, *names: str) -> str:
        return "\n".join(" ".join(problem.values()) for problem in self.problems(*names))


@pytest.fixture
def victim(own_sample) -> Victim:
    return Victim(own_sample)


def test_a_sound_store(sample):
    report = sample("check", "--json").json
    assert report["problems"] == []
    assert report["unreferenced"] == {}
    assert report["images"] == 2
    blobs = [entry.stat().st_size for entry in os.scandir(sample.store / "blobs" / "sha256")]
    packs = {
        pack["digest"] for number in "12" for pack in sample("inspect", f"sample:{number}", "--json").json["packs"]
    }
    assert report["packs"] == len(packs)
    assert report["frames"] > 4
    assert report["chunks"] > 8
    tables = report["bytes"]
    assert sum(blobs) <= tables < sum(blobs) + (1 << 20)  # every byte; a config may serve two images
    assert sample("check").lines == [f"2 images, {len(packs)} packs, {sample('check').lines[0].split(', ')[2]}"]


def test_one_image(sample):
    report = sample("check", "sample:1", "--json").json
    assert (report["images"], report["problems"], report["unreferenced"]) == (1, [], {})


# --- the parts of an image -------------------------------------------------------------------------------------------


def test_references(victim: Victim):
    (victim.store.path / "index.json").write_text("{")
    assert "index.json" in victim.text()


def test_manifest(victim: Victim):
    victim.flip(victim.image.digest, 30)
    (problem,) = victim.problems()
    assert victim.image.digest in problem["what"]
    assert "differs from its digest" in problem["what"]
    assert victim.erofsgen("check", "sample:2").code == 0


def test_missing_manifest(victim: Victim):
    victim.path(victim.image.digest).unlink()
    assert f"no blob {victim.image.digest}" in victim.text()


@pytest.mark.parametrize("part", ["config", "index"])
def test_config_and_index(victim: Victim, part: str):
    digest = victim.image.manifest.config.digest if part == "config" else victim.image.index_descriptor.digest
    victim.flip(digest, 20)
    assert f"blob {digest} differs from its digest" in victim.text()
    with open(victim.path(digest), "ab") as blob:
        blob.write(b"x")
    assert f"blob {digest} differs from its digest or length" in victim.text()
    os.truncate(victim.path(digest), 10)
    assert f"{digest[7:]}: ends at byte 10" in victim.text()
    victim.path(digest).unlink()
    assert f"no blob {digest}" in victim.text()


def test_frame(victim: Victim):
    """A damaged frame is named with its place and with the files that are in it."""
    for pack in victim.packs:
        victim.flip(pack.digest, 1000)
    what = victim.text()
    for pack in victim.packs:
        assert f"{pack.digest} frame 0 " in what
        assert f"{pack.digest} pack differs from its digest" in what
    assert "device bytes 0+" in what
    assert "cannot be read for it: /" in what
    assert "/data/big" in what
    both = [problem for problem in victim.problems() if "cannot be read" in problem["what"]]
    assert {problem["image"] for problem in both} == {"sample:1", "sample:2"}


def test_frames_that_still_decompress(victim: Victim):
    """A raw pack has no checksum but the frame's digest."""
    raw = next(pack for pack in victim.packs if pack.raw)
    victim.flip(raw.digest, 5)
    assert (
        f"{raw.digest} frame 0 differs from its digest (stored bytes 0+1048576, device bytes 0+1048576)"
        in victim.text()
    )


@pytest.mark.parametrize("place", ["dictionary", "digests", "seek table", "footer"])
def test_tables(victim: Victim, place: str):
    for pack in victim.packs:
        dictionary_end = pack.toc.offset
        offset = {
            "dictionary": dictionary_end - 20,
            "digests": pack.toc.offset + 40,
            "seek table": pack.size - 9 - 4,
            "footer": pack.size - 1,
        }[place]
        victim.flip(pack.digest, offset)
    what = victim.text()
    for pack in victim.packs:
        assert f"{pack.digest} pack differs from its digest" in what
        if place == "dictionary":
            assert f"{pack.digest} chunk " in what
            assert "differs from the chunk dictionary" in what
        else:
            assert f"{pack.digest} the table of contents differs from its digest" in what
    assert ("cannot be read" in what) == (place != "dictionary")


@pytest.mark.parametrize("keep", [0, 10, 5000, -1])
def test_truncated_pack(victim: Victim, keep: int):
    for pack in victim.packs:
        os.truncate(victim.path(pack.digest), keep if keep >= 0 else pack.size - 1)
        assert f"{pack.digest} pack is {keep % pack.size} bytes, the manifest says {pack.size}" in victim.text()
    assert "cannot be read for it" in victim.text()


def test_longer_pack(victim: Victim):
    pack = victim.packs[0]
    with open(victim.path(pack.digest), "ab") as blob:
        blob.write(b"x")
    what = victim.text()
    assert f"{pack.digest} pack is {pack.size + 1} bytes" in what
    assert f"{pack.digest} pack differs from its digest" in what


def test_missing_pack(victim: Victim):
    pack = victim.packs[0]
    victim.path(pack.digest).unlink()
    assert f"{pack.digest} pack is missing" in victim.text()
    assert "/data/big" in victim.text("sample:1")


@pytest.mark.parametrize("seed", range(24))
def test_any_flipped_bit_anywhere(victim: Victim, seed: int):
    numbers = random.Random(seed)
    blob = numbers.choice(sorted(os.scandir(victim.store.path / "blobs" / "sha256"), key=lambda entry: entry.name))
    victim.flip(f"sha256:{blob.name}", numbers.randrange(blob.stat().st_size))
    assert blob.name in victim.text()


# --- made for the purpose: digests are right, what they cover is not -----------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["layers"].reverse(), "not an erofsgen image"),
        (lambda m: m.update(layers=[]), "not an erofsgen image"),
        (lambda m: m.pop("config"), "config"),
        (lambda m: m.update(artifactType="application/other"), "schema and types"),
        (lambda m: m["layers"].insert(1, m["layers"].pop()), "devices are not the manifest's packs"),
        (lambda m: m["layers"].append(m["layers"][1]), "names a pack twice"),
        (lambda m: m["layers"].pop(), "devices are not the manifest's packs"),
        (lambda m: m["layers"][1].update(mediaType="text/plain"), "unknown media type 'text/plain'"),
        (lambda m: m["layers"][1].update(size=-1), "annotation"),
        (lambda m: m["layers"][1].update(digest="sha256:../../x"), "not a sha256 digest"),
        (lambda m: m["layers"][0]["annotations"].update({"org.erofsgen.index.size": "1"}), "1 expected"),
        (lambda m: m["layers"][0]["annotations"].update({"org.erofsgen.index.size": "x"}), "no usable"),
        (lambda m: m["layers"][0].update(size=1 << 50), "are sensible"),
        (
            lambda m: m["layers"][1]["annotations"].update({"org.erofsgen.toc.digest": "blake3:00"}),
            "differs from its digest",
        ),
        (
            lambda m: m["layers"][1]["annotations"].update({"org.erofsgen.toc.offset": "0"}),
            "does not end with the pack",
        ),
        (
            lambda m: m["layers"][1]["annotations"].update({"org.erofsgen.device.size": "4096"}),
            "contradicts the manifest",
        ),
        (lambda m: m["layers"][1]["annotations"].update({"org.erofsgen.device.size": "9" * 30}), "no usable"),
    ],
)
def test_manifests_that_lie(victim: Victim, change: Callable[[dict[str, Any]], None], message: str):
    victim.replace_manifest(change)
    assert message in victim.text()
    survive(victim)


def replace_pack(victim: Victim, slot: int, tamper: Callable[[list, list], None]) -> str:
    """Write pack ``slot`` again with its frames and chunks tampered with, and name it in the manifest."""
    pack = victim.packs[slot - 1]
    reader = victim.image.pack_reader(slot)
    toc = reader.toc

    def read(offset: int, length: int) -> bytes:
        return victim.store.read(pack.digest, offset, length)

    frames = [
        [read(int(toc.offsets[number]), int(toc.sizes[number])), int(toc.device_sizes[number]), toc.digest(number)]
        for number in range(len(toc))
    ]
    chunks = [
        [row["digest"].tobytes(), int(row["block"]), int(row["length"])]
        for row in read_dictionary(read, toc, what="pack")
    ]
    tamper(frames, chunks)
    with victim.store.create() as blob:
        writer = PackWriter(blob, raw=pack.raw)
        for stored, size, digest in frames:
            writer.add_frame(stored, size, digest)
        where = writer.finish([tuple(chunk) for chunk in chunks])
        digest, size = blob.commit()

    def change(document: dict[str, Any]) -> None:
        layer = document["layers"][slot]
        layer.update(digest=digest, size=size)
        layer["annotations"].update(
            {
                "org.erofsgen.toc.offset": str(where.offset),
                "org.erofsgen.toc.size": str(where.size),
                "org.erofsgen.toc.digest": f"blake3:{where.digest}",
            }
        )

    victim.replace_manifest(change)
    return digest


def swap_first_chunks(frames: list, chunks: list) -> None:
    chunks[0][0], chunks[1][0] = chunks[1][0], chunks[0][0]


def overlap(frames: list, chunks: list) -> None:
    chunks[1][1] = chunks[0][1]


def outside(frames: list, chunks: list) -> None:
    chunks[-1][1] += 1 << 20


def cross(frames: list, chunks: list) -> None:
    chunks[:] = [[chunks[0][0], 0, sum(frame[1] for frame in frames)]]


def wrong_frame_digest(frames: list, chunks: list) -> None:
    frames[0][2] = bytes(32)


def not_zstd(frames: list, chunks: list) -> None:
    frames[0][0] = b"not a zstd frame"


def bomb(frames: list, chunks: list) -> None:
    frames[0][0] = zstandard.compress(bytes(256 << 20))


def no_content_size(frames: list, chunks: list) -> None:
    data = zstandard.decompress(frames[0][0])
    frames[0][0] = zstandard.ZstdCompressor(write_content_size=False).compress(data)


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (swap_first_chunks, "chunk 0 differs from the chunk dictionary (device bytes 0+"),
        (overlap, "chunk dictionary is not in device order, or chunks overlap"),
        (outside, "a chunk lies outside the device"),
        (cross, "chunk 0 of the dictionary crosses the end of frame 0"),
        (wrong_frame_digest, "frame 0 differs from its digest"),
        (not_zstd, "frame 0 does not decompress"),
        (bomb, "frame 0 holds 268435456 bytes"),
        (no_content_size, "frame 0 holds"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_packs_that_lie(victim: Victim, tamper: Callable[[list, list], None], message: str):
    """The index does not fit the new pack either, which is a problem of its own."""
    slot = next(pack.slot for pack in victim.packs if not pack.raw)
    digest = replace_pack(victim, slot, tamper)
    assert f"{digest} {message}" in victim.text()
    survive(victim)


def test_an_index_that_lies(victim: Victim):
    """Whatever byte of an index is changed, with all digests set right: a clean answer from every verb."""
    numbers = random.Random(3)
    original = victim.image.index_bytes()
    manifest = victim.path(victim.image.digest).read_bytes()
    for _ in range(12):
        data = bytearray(original)
        for _ in range(numbers.choice((1, 1, 20))):
            data[numbers.randrange(len(data))] = numbers.choice((0, 1, 0xFF, numbers.randrange(256)))
        digest, size = victim.store.put(zstandard.compress(bytes(data)))

        def change(document: dict[str, Any], digest: str = digest, size: int = size) -> None:
            document["layers"][0].update(digest=digest, size=size)

        victim.path(victim.image.digest).write_bytes(manifest)
        victim.image = Image.open(victim.store, "sample:1")
        victim.replace_manifest(change)
        victim.image = Image.open(victim.store, "sample:1")
        survive(victim)
        report = victim.erofsgen.any("check", "sample:1", "--json")
        assert report.code == (5 if report.json["problems"] else 0)  # what is a lie may also be a valid index
        manifest = victim.path(victim.image.digest).read_bytes()


def survive(victim: Victim) -> None:
    """Every verb that reads, on what is damaged: it works or says in one line why not (see Erofsgen)."""
    run = victim.erofsgen
    out = run.store.parent / "out"
    for number, arguments in enumerate(
        [
            ["images"],
            ["inspect", "sample:1"],
            ["ls", "-lR", "sample:1"],
            ["cat", "sample:1", "data/big"],
            ["diff", "sample:1", "sample:2"],
            ["extract", "sample:1", f"{out}{random.randrange(1 << 60)}"],
            ["extract", "sample:1", "--tar", "/dev/null"],
        ]
    ):
        done = run.any(*arguments)
        assert done.code in ((0,) if not number else (0, 3, 4, 5, 7)), done


# --- what nobody refers to -------------------------------------------------------------------------------------------


def test_unreferenced_blobs_are_no_problem(victim: Victim):
    victim.erofsgen("rm", "sample:2")
    report = victim.erofsgen("check", "--json").json
    assert report["problems"] == []
    assert report["unreferenced"]
    assert "in no image; see `erofsgen gc`" in victim.erofsgen("check").lines[-1]
    digest = next(iter(report["unreferenced"]))
    victim.flip(digest, 3)
    assert f"{digest} differs from its digest (no image needs it)" in victim.text()
    victim.erofsgen("gc")
    report = victim.erofsgen("check", "--json").json
    assert (report["problems"], report["unreferenced"]) == ([], {})


def test_names_in_blobs_that_are_no_digests(victim: Victim):
    (victim.store.path / "blobs" / "sha256" / "README").write_text("not a blob")
    assert "README" in victim.text()


@pytest.mark.mount
def test_a_read_only_store_can_be_checked(sample, mount_point: Path):
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64M", "none", mount_point], check=True)
    shutil.copytree(sample.store, mount_point / "store")
    subprocess.run(["mount", "-o", "remount,ro", mount_point], check=True)
    sample.options[1] = str(mount_point / "store")
    assert sample("check", "--json").json["problems"] == []


def test_threads(sample):
    one, four = (sample("check", "--json", "--threads", number).json for number in "14")
    assert one == four
    sample("check", "--threads", "0", code=2)
