"""Profiles of one build of an image for another: chunks are found by what they hold."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3
from handmade import ImageMaker
from hypothesis import given, settings
from hypothesis import strategies as st
from profilekit import PACKS, facts, profile_of, run_of

from erofsgen.errors import IntegrityError
from erofsgen.profile.carry import PLACE, Places, carry, places, prefixes, with_digests
from erofsgen.profile.profile import Profile
from erofsgen.store.directory import DirectoryStore
from erofsgen.store.image import Image, open_pack


def digest_of(content: int) -> bytes:
    return blake3(b"%d" % content).digest()[:8]


def places_of(packs: list[str], where: dict[tuple[int, int], int]) -> Places:
    """``where``: number of the pack and block to a content, whose number says its length, too."""
    table = np.array(
        [(pack, block, content % 7 + 1, digest_of(content)) for (pack, block), content in where.items()], PLACE
    )
    return Places(packs, table)


def touching(packs: list[str], where: dict[tuple[int, int], int], dice: random.Random) -> Profile:
    """A profile that touches some of it, some of that without knowing digests."""
    return profile_of(
        [
            (
                pack,
                block,
                content % 7 + 1,
                digest_of(content) if dice.random() < 0.8 else bytes(8),
                dice.randrange(99),
                2,
            )
            for (pack, block), content in where.items()
            if dice.random() < 0.7
        ],
        runs=3,
        packs=packs,
    )


def layout(dice: random.Random, contents: list[int], packs: int) -> dict[tuple[int, int], int]:
    places = dice.sample([(pack, block) for pack in range(packs) for block in range(30)], len(contents))
    return dict(zip(places, contents, strict=True))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 32))
def test_every_chunk_that_is_still_there_is_found(seed: int):
    """Whatever moved where: a pack that both builds have holds the same chunks in both."""
    dice = random.Random(seed)
    old_packs, new_packs = dice.sample(PACKS, 3), dice.sample(PACKS, 3)
    old = layout(dice, [dice.randrange(40) for _ in range(dice.randrange(30))], 3)
    new = layout(dice, [dice.randrange(40) for _ in range(dice.randrange(30))], 3)
    for (pack, block), content in old.items():  # of packs that stay, some chunks are not needed any more
        if old_packs[pack] in new_packs and dice.random() < 0.8:
            new[new_packs.index(old_packs[pack]), block] = content
    new = {
        (pack, block): content
        for (pack, block), content in new.items()
        if new_packs[pack] not in old_packs or old.get((old_packs.index(new_packs[pack]), block), content) == content
    }
    profile = touching(old_packs, old, dice)
    carried = carry(profile, places_of(new_packs, new))
    expected: dict[int, int] = {}
    for row in profile.rows:
        content = old[int(row["pack"]), int(row["block"])]
        name, block = profile.packs[row["pack"]], int(row["block"])
        stays = name in new_packs and (new_packs.index(name), block) in new
        if stays or (content in new.values() and any(row["digest"].tobytes())):
            expected[content] = min(int(row["first"]), expected.get(content, 99))
    found: dict[int, int] = {}
    for row in carried.rows:
        content = new[new_packs.index(carried.packs[row["pack"]]), int(row["block"])]
        assert row["digest"].tobytes() == digest_of(content)
        assert row["length"] == content % 7 + 1
        assert row["seen"] == 2
        found[content] = min(int(row["first"]), found.get(content, 99))
    assert found == expected
    assert (carried.command, carried.runs, list(carried.reasons)) == ("app", 3, ["recorded"])
    assert sorted(set(carried.rows["pack"].tolist())) == list(range(len(carried.packs)))
    assert (np.diff(carried.rows["first"].astype(np.int64)) >= 0).all()
    again = carry(carried, places_of(new_packs, new))
    assert facts(again) == facts(carried)


def test_chunks_that_become_one():
    old = profile_of([(0, 1, 5, b"same----", 30, 1), (1, 7, 5, b"same----", 20, 2)], runs=2)
    one = Places([PACKS[3]], np.array([(0, 4, 5, b"same----")], PLACE))
    assert facts(carry(old, one)) == {(PACKS[3], 4): (5, 20, 2.0, b"same----")}


def test_another_length_is_another_chunk():
    old = profile_of([(0, 1, 5, b"same----", 30, 1)])
    for there in (Places([PACKS[3]], np.array([(0, 4, 6, b"same----")], PLACE)),
                  Places([PACKS[0]], np.array([(0, 1, 6, b"other---")], PLACE)),
                  Places([], np.zeros(0, PLACE))):  # fmt: skip
        carried = carry(old, there)
        assert (len(carried.rows), list(carried.packs)) == (0, [])


def test_nothing_known_stays_nothing():
    """Rows without digests are not mistaken for each other."""
    old = profile_of([(0, 1, 5, bytes(8), 30, 1)])
    assert len(carry(old, Places([PACKS[3]], np.array([(0, 4, 5, bytes(8))], PLACE))).rows) == 0


def test_carrying_is_quick():
    """Very many chunks of which most moved: no loop over them in Python."""
    count = 200_000
    table = np.zeros(count, PLACE)
    table["block"], table["length"] = np.arange(count), 4096
    table["digest"] = np.random.default_rng(1).integers(1, 1 << 63, count).view("V8")
    profile = profile_of([], packs=PACKS[:1])
    rows = np.zeros(count, profile.rows.dtype)
    rows["block"], rows["length"], rows["digest"], rows["seen"] = np.arange(count), 4096, table["digest"][::-1], 1
    assert len(carry(replace(profile, rows=rows), Places(PACKS[1:2], table)).rows) == count


# --- images ----------------------------------------------------------------------------------------------------------


def files_of(dice: random.Random, count: int) -> dict[str, bytes]:
    return {f"d{number % 3}/f{number}": dice.randbytes(dice.randrange(512, 9000)) for number in range(count)}


def build(store: DirectoryStore, name: str, files: dict[str, bytes], cuts: list[int]) -> Image:
    maker = ImageMaker(store)
    contents = list(files.values())
    bounds = [0, *cuts, len(contents)]
    packs = [maker.pack(contents[start:end]) for start, end in pairwise(bounds) if start < end]
    return maker.image(name, dict(files), packs)


def what(image: Image, profile: Profile) -> list[bytes]:
    """The chunks' bytes in order."""
    slots = {pack.hex: pack.slot for pack in image.packs}
    return [
        image.pack_reader(slots[profile.packs[row["pack"]]]).read(int(row["block"]) * 4096, int(row["length"]))
        for row in profile.rows
    ]


@pytest.mark.parametrize("seed", range(4))
def test_a_rebuilt_image_keeps_its_profile(tmp_path: Path, seed: int):
    dice = random.Random(seed)
    store = DirectoryStore(tmp_path / "store")
    files = files_of(dice, 20)
    old = build(store, "old", files, [5, 12])
    order = dice.sample(range(20), 12)
    recorded = run_of(old, order)
    assert not recorded.rows["digest"].astype("V8").tobytes().strip(b"\0")
    complete = with_digests(store, old, recorded)
    read = what(old, complete)
    assert [row["digest"].tobytes() for row in complete.rows] == [blake3(chunk).digest()[:8] for chunk in read]
    kept = {name: content for number, (name, content) in enumerate(files.items()) if number % 5}
    moved = dict(dice.sample([*kept.items(), *files_of(dice, 6).items()], len(kept) + 6))
    new = build(store, "new", moved, [7, 9, 15])
    carried = carry(complete, places(new))
    assert what(new, carried) == [chunk for chunk in read if chunk in moved.values()]
    assert facts(carry(recorded, places(old))) == facts(complete), "where nothing moved, digests are filled in"
    assert facts(with_digests(store, old, complete)) == facts(complete)


def test_only_chunks_that_files_have(tmp_path: Path):
    """A pack that both builds have may hold what only the older one needs."""
    store = DirectoryStore(tmp_path / "store")
    maker = ImageMaker(store)
    files = files_of(random.Random(1), 6)
    pack = maker.pack(list(files.values()))
    old = maker.image("old", dict(files), [pack])
    half = dict(list(files.items())[::2])
    new = maker.image("new", dict(half), [pack])
    carried = carry(with_digests(store, old, run_of(old)), places(new))
    assert sorted(what(new, carried)) == sorted(half.values())


def test_damage_is_told(tmp_path: Path):
    store = DirectoryStore(tmp_path / "store")
    image = build(store, "one", files_of(random.Random(1), 4), [])
    profile = run_of(image)
    path = store.blob_path(image.packs[0].digest)
    data = bytearray(path.read_bytes())
    data[image.packs[0].toc.offset + 20] ^= 1
    path.write_bytes(data)
    for use in (lambda: places(image), lambda: with_digests(store, image, profile)):
        with pytest.raises(IntegrityError):
            use()


def test_a_dictionary_is_only_a_hint(tmp_path: Path):
    """It has no digest of its own: lies in it lead to rows that are wrong or missing, never to anything else."""
    store = DirectoryStore(tmp_path / "store")
    image = build(store, "one", files_of(random.Random(1), 4), [])
    profile = run_of(image)
    toc = open_pack(store, image.packs[0]).toc
    path = store.blob_path(image.packs[0].digest)
    data = bytearray(path.read_bytes())
    start, size = toc.dictionary
    entry = start + 8 + 16 + 32  # behind the frame's header, the dictionary's, and the first digest
    data[entry : entry + 4] = (2).to_bytes(4, "little")
    assert entry < start + size
    path.write_bytes(data)
    found = places(image)
    assert len(with_digests(store, image, profile).rows) == len(profile.rows)
    assert carry(profile, found).size <= profile.size


def test_prefixes():
    digests = np.frombuffer(bytes(range(64)), "V32")
    assert [digest.tobytes() for digest in prefixes(digests)] == [bytes(range(8)), bytes(range(32, 40))]
    assert len(prefixes(np.zeros(0, "V32"))) == 0
