"""Hot packs through the public door: what is in them, what stays, and that the image is the same image."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest
from blake3 import blake3
from handmade import CHUNK, ImageMaker, chunks_of, contents
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from optimizekit import (
    assert_reads,
    assert_sound,
    digests,
    hot_digests,
    hot_pack,
    places_of,
    profile_of,
    same_image,
)

from erofsgen.build.gc import collect
from erofsgen.build.optimize import optimize
from erofsgen.erofs.tree import BLOCK
from erofsgen.errors import NotFoundError, UsageError
from erofsgen.profile import beside
from erofsgen.profile.chunks import Chunks
from erofsgen.profile.profile import RECORDED, ROW, Profile, ordered
from erofsgen.store.directory import DirectoryStore
from erofsgen.store.image import Image
from erofsgen.store.manifest import HOT


@pytest.fixture
def parts(maker: ImageMaker):
    """(a, b, c, image, files): chunks of three packs, which the files take from all over."""
    first, second, third = contents(1, 6 * CHUNK, 6 * CHUNK, 9 * CHUNK + 5000)
    a, b, c = chunks_of(first), chunks_of(second), chunks_of(third)
    files: dict[str, bytes | str | None] = {
        "small": b"a few bytes",
        "mixed": a[0] + b[1] + c[2] + a[3] + b[4] + c[5] + c[6] + bytes(CHUNK),
        "one": first,
        "two": second,
        "three": third,
        "link": "small",
        "tmp": None,
    }
    return a, b, c, maker.image("image", files, [maker.pack(a), maker.pack(b), maker.pack(c, raw=True)]), files


def test_the_hot_pack_is_what_was_touched_in_order(parts, maker):
    a, b, c, image, files = parts
    profile = profile_of(image, ("three", 9), ("one", 2), ("mixed", 1), ("mixed", 0), ("three", 2))
    optimized = optimize(image, [profile])
    new = Image.open(maker.store, "image")
    assert new.digest == optimized.manifest.digest == optimized.result.digest != image.digest
    assert hot_digests(new) == digests(c[9], a[2], b[1], a[0], c[2])
    # one zstd pack, although two of the chunks were in a raw one; and all of it is what this one command reads
    pack = hot_pack(new)
    assert (pack.slot, pack.raw, pack.hot) == (4, False, pack.device_size)
    assert pack.device_size == 4 * CHUNK + -(-len(c[9]) // BLOCK) * BLOCK
    # the other packs are the very same ones
    assert [p.digest for p in new.packs[:3]] == [p.digest for p in image.packs]
    assert_reads(new, files)
    # every file that has a touched chunk reads it there, those that nobody has touched, too
    assert places_of(new, "one")[0][0] == places_of(new, "three")[2][0] == 4
    assert [slot for slot, _, _ in places_of(new, "two")] == [2, 4, 2, 2, 2, 2]
    assert new.index.superblock.uuid != image.index.superblock.uuid
    assert new.manifest.config == image.manifest.config
    assert new.manifest.annotations == image.manifest.annotations
    result = optimized.result
    assert (result.hot_chunks, result.hot_bytes, result.shared_bytes) == (5, 4 * CHUNK + 5000, 4 * CHUNK + 5000)
    assert (result.packs, result.reused_packs, result.skipped_bytes, result.unknown_rows) == (4, 3, 0, 0)
    assert (result.hot_pack, result.stored_bytes) == (pack.digest, pack.size)
    assert_sound(maker.store)


def test_moved_profiles_read_the_hot_pack_from_its_start_to_its_end(parts, maker):
    a, _, _, image, _ = parts
    profile = profile_of(image, ("three", 9), ("one", 2), ("mixed", 1), ("one", 5), seen=[2, 2, 2, 0.5], runs=2)
    optimized = optimize(image, [profile])
    new = Image.open(maker.store, "image")
    (moved,) = optimized.moved
    pack = hot_pack(new)
    hot = moved.rows[moved.rows["pack"] == list(moved.packs).index(pack.hex)]
    ends = hot["block"] + -(-hot["length"].astype(int) // BLOCK)
    assert hot["block"].tolist() == [0, *ends[:-1].tolist()]
    assert ends[-1] * BLOCK == pack.device_size
    assert [row.tobytes() for row in hot["digest"]] == [digest[:8] for digest in hot_digests(new)]
    # what is not sure enough stays where it was, and in the profile
    assert (moved.command, moved.runs, len(moved.rows)) == ("", 2, 4)
    last = moved.rows[3]
    assert (moved.packs[last["pack"]], last["block"]) == (image.packs[0].hex, places_of(image, "one")[5][1])
    assert last["digest"].tobytes() == blake3(a[5]).digest()[:8]
    assert moved.rows["first"].tolist() == profile.rows["first"].tolist()
    # a host finds its rows among the new image's chunks
    table = Chunks(new.index).table
    known = {(int(row["device"]), int(row["block"]), int(row["length"])) for row in table}
    slots = {pack.hex: pack.slot for pack in new.packs}
    for row in moved.rows:
        assert (slots[moved.packs[row["pack"]]], int(row["block"]), int(row["length"])) in known


def test_commands_share_the_beginning(parts, maker):
    a, b, c, image, files = parts
    serve = profile_of(image, ("one", 0), ("two", 0), ("one", 1), ("two", 1), command="serve")
    train = profile_of(image, ("one", 3), ("one", 1), ("one", 0), ("three", 0), command="train")
    rest = profile_of(image, ("one", 4), ("two", 0), command="idle")
    for order in ([serve, train], [train, serve]):
        result = optimize(image, order, others=[rest]).result
        new = Image.open(maker.store, "image")
        # all commands' first, by the mean of their times; then serve's own, then train's
        assert hot_digests(new) == digests(a[0], a[1], b[0], b[1], a[3], c[0])
        assert hot_pack(new).hot == result.shared_bytes == 2 * CHUNK
        assert result.commands == ["serve", "train"]
        assert_reads(new, files)
    moved = optimize(image, [serve, train], others=[rest]).moved
    assert [profile.command for profile in moved] == ["serve", "train", "idle"]
    hot = hot_pack(new).hex
    assert [moved[2].packs[row["pack"]] == hot for row in moved[2].rows] == [False, True]
    # of one command there may be several profiles; a chunk that either run touches is not sure
    again = optimize(image, [serve, profile_of(image, ("one", 0), command="serve")], threshold=0.6).result
    assert again.commands == ["serve"]
    assert hot_digests(Image.open(maker.store, "image")) == digests(a[0])


def test_limits(parts, maker):
    a, _, _, image, _ = parts
    profile = profile_of(image, ("one", 2), ("one", 1), ("one", 4), seen=[4, 3, 1], runs=4)
    for threshold, expected in ((0.0, [2, 1, 4]), (0.25, [2, 1, 4]), (0.5, [2, 1]), (0.8, [2]), (1.0, [2])):
        optimize(image, [profile], threshold=threshold)
        assert hot_digests(Image.open(maker.store, "image")) == digests(*(a[number] for number in expected))
    result = optimize(image, [profile], threshold=0, max_bytes=2 * CHUNK + BLOCK).result
    assert hot_digests(Image.open(maker.store, "image")) == digests(a[2], a[1])
    assert (result.hot_bytes, result.skipped_bytes) == (2 * CHUNK, CHUNK)
    # nothing fits: the image is what it was
    result = optimize(image, [profile], max_bytes=BLOCK).result
    assert (result.hot_pack, result.hot_chunks, result.packs) == (None, 0, 3)
    assert same_image(Image.open(maker.store, "image"), image)
    for bad in ({"max_bytes": 100}, {"max_bytes": 3 << 30}, {"threshold": 1.5}, {"threshold": -1}):
        with pytest.raises(UsageError):
            optimize(image, [profile], **bad)


def test_what_profiles_cannot_tell(parts, maker):
    a, _, _, image, _ = parts
    with pytest.raises(NotFoundError) as caught:
        optimize(image, [])
    assert caught.value.hint == "run `erofsgen profile record` first"
    rows = np.zeros(4, ROW)
    rows["block"] = [1, 16, 7, 9999]  # in the middle of a chunk; a chunk; a chunk by its digest; beyond
    rows["length"], rows["seen"] = 1, 1
    rows["pack"] = [0, 0, 1, 0]
    rows["digest"][2] = np.void(blake3(a[3]).digest()[:8])
    packs = [image.packs[0].hex, "f" * 64]
    result = optimize(image, [Profile("", 1, packs, [RECORDED], ordered(rows))]).result
    assert result.unknown_rows == 2
    assert hot_digests(Image.open(maker.store, "image")) == digests(a[1], a[3])
    with pytest.raises(NotFoundError, match="name no chunk"):
        optimize(image, [Profile("", 1, packs, [RECORDED], rows[[0, 3]])])
    with pytest.raises(NotFoundError, match="name no chunk"):
        optimize(image, [Profile("", 1, [], [], rows[:0])])


def test_another_name(parts, maker):
    image = parts[3]
    profile = profile_of(image, ("one", 2))
    result = optimize(image, [profile], name="hot").result
    assert result.name == "hot"
    assert Image.open(maker.store, "image").digest == image.digest
    assert Image.open(maker.store, "hot").digest == result.digest != image.digest


def test_profiles_lie_beside_the_new_image(parts, maker):
    image = parts[3]
    serve = profile_of(image, ("one", 2), command="serve")
    guess = profile_of(image, ("one", 2), ("two", 0), command="guess", runs=0)
    optimized = optimize(image, [serve], others=[guess])
    assert optimized.result.profiles == 2
    found = beside.load(maker.store, optimized.manifest.digest)
    assert [profile.encode() for profile in found] == [profile.encode() for profile in optimized.moved]
    assert [profile.command for profile in found] == ["serve", "guess"]
    assert beside.load(maker.store, image.digest) == []
    # those of other commands stay when the same image is made again
    optimize(image, [serve])
    assert [profile.command for profile in beside.load(maker.store, optimized.manifest.digest)] == ["serve", "guess"]
    collect(maker.store)
    assert len(beside.load(maker.store, optimized.manifest.digest)) == 2


# --- again and again -------------------------------------------------------------------------------------------------


def test_twice_is_once(parts, maker):
    image = parts[3]
    profile = profile_of(image, ("three", 9), ("one", 2), ("mixed", 1), ("mixed", 0), ("three", 2))
    other = profile_of(image, ("one", 2), ("two", 4), command="other")
    once = optimize(image, [profile, other])
    blobs = {digest for digest, _ in maker.store.blobs()}
    for profiles in ([profile, other], once.moved):
        again = optimize(Image.open(maker.store, "image"), profiles)
        assert again.manifest == once.manifest
        assert [moved.encode() for moved in again.moved] == [moved.encode() for moved in once.moved]
    assert {digest for digest, _ in maker.store.blobs()} == blobs


def test_another_profile_takes_the_place(parts, maker):
    """As if the image had never been optimized."""
    image, files = parts[3], parts[4]
    first = profile_of(image, ("three", 9), ("one", 2), ("mixed", 1))
    second = profile_of(image, ("one", 2), ("two", 4), ("mixed", 2))
    expected = optimize(image, [second], name="expected").result
    optimize(image, [first])
    optimized = Image.open(maker.store, "image")
    assert optimize(optimized, [second]).result.digest == expected.digest
    # and by a profile that was recorded of the optimized image
    recorded = profile_of(optimized, ("one", 2), ("two", 4), ("mixed", 2))
    assert optimize(optimized, [recorded]).result.digest == expected.digest
    assert_reads(Image.open(maker.store, "image"), files)
    # nothing is hot any more: neither is there a hot pack
    unsure = profile_of(image, ("one", 2), seen=0.1)
    optimize(optimized, [unsure])
    assert same_image(Image.open(maker.store, "image"), image)


def test_packs_whose_chunks_are_all_hot_go(maker):
    """And the old hot pack stays, as an ordinary one, while nothing else has what it has."""
    first, second = contents(2, 4 * CHUNK, 4 * CHUNK)
    files = {"one": first, "two": second}
    image = maker.image("image", files, [maker.pack(chunks_of(first)), maker.pack(chunks_of(second))])
    everything = [(name, number) for number in range(4) for name in files]
    optimized = optimize(image, [profile_of(image, *everything)])
    once = Image.open(maker.store, "image")
    assert len(once.packs) == 1
    assert once.packs[0].hot is not None
    collect(maker.store)
    assert_reads(once, files)

    again = optimize(once, optimized.moved)
    assert again.result.digest == once.digest
    for number in range(3):  # nothing piles up
        image = Image.open(maker.store, "image")
        some = profile_of(image, ("one", number), ("two", 3 - number))
        optimize(image, [some])
        new = Image.open(maker.store, "image")
        assert [pack.digest for pack in new.packs][:-1] == [once.packs[0].digest]
        assert [pack.hot is None for pack in new.packs] == [True, False]
        assert HOT not in new.manifest.layers[1].annotations
        assert hot_digests(new) == digests(chunks_of(first)[number], chunks_of(second)[3 - number])
        assert_reads(new, files)
        collect(maker.store)
        assert_sound(maker.store)
    image = Image.open(maker.store, "image")
    optimize(image, [profile_of(image, *everything)])
    new = Image.open(maker.store, "image")
    assert [pack.digest for pack in new.packs] == [once.packs[0].digest]
    assert new.packs[0].hot == new.packs[0].device_size


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_image_and_any_profiles(tmp_path_factory, data):
    """Whatever is touched, again and again: every file reads the same, and only the last profiles count."""
    store = DirectoryStore(tmp_path_factory.mktemp("any") / "store")
    maker = ImageMaker(store)
    generator = random.Random(data.draw(st.integers(0, 1 << 30)))
    pool = [generator.randbytes(generator.choice([600, BLOCK, CHUNK])) for _ in range(data.draw(st.integers(1, 12)))]
    whole = [chunk for chunk in pool if len(chunk) == CHUNK]
    packs, left = [], list(pool)
    while left:
        count = data.draw(st.integers(1, len(left)))
        packs.append(maker.pack(left[:count], raw=data.draw(st.booleans())))
        left = left[count:]
    files: dict[str, bytes | str | None] = {f"all/{number}": chunk for number, chunk in enumerate(pool)}
    for number in range(data.draw(st.integers(0, 4))):
        body = data.draw(st.lists(st.sampled_from([*whole, bytes(CHUNK)]), max_size=4)) if whole else []
        files[f"mixed{number}"] = b"".join([*body, data.draw(st.sampled_from(pool))])
    image = maker.image("image", files, packs)
    touchable = [(path, number) for path in files for number in range(len(places_of(image, path)))]

    def draw_profiles() -> list[Profile]:
        return [
            profile_of(
                image,
                *data.draw(st.lists(st.sampled_from(touchable), min_size=1, max_size=10, unique=True)),
                command=command,
                runs=2,
                carry=True,
                first=data.draw(st.integers(0, 3)),  # at one moment
                seen=data.draw(st.sampled_from([0.5, 1.0, 2.0])),
            )
            for command in data.draw(st.sampled_from([["a"], ["a", "b"], ["a", "b", "c"]]))
        ]

    expected = dict(files)
    name = "image"
    for _ in range(data.draw(st.integers(1, 3))):
        profiles = draw_profiles()
        limit = data.draw(st.sampled_from([1 << 20, CHUNK]))
        optimized = optimize(Image.open(store, name), profiles, max_bytes=limit)
        new = Image.open(store, name)
        assert_reads(new, expected)
        hot = [pack for pack in new.packs if pack.hot is not None]
        assert len(hot) == (optimized.result.hot_pack is not None) == bool(optimized.result.hot_chunks)
        assert sum(pack.device_size for pack in hot) <= limit
        touched = {blake3(chunks_of(files[path])[number]).digest() for path, number in touchable}
        assert touched.issuperset(hot_digests(new) if hot else [])
        # from the profiles as they moved along
        again = optimize(new, optimized.moved, max_bytes=limit)
        assert again.result.digest == optimized.result.digest
        assert [moved.encode() for moved in again.moved] == [moved.encode() for moved in optimized.moved]
        for before, after in zip(sorted(profiles, key=lambda p: p.command), optimized.moved, strict=True):
            assert len(after.rows) <= len(before.rows)
            slots = [new.packs[[p.hex for p in new.packs].index(pack)] for pack in after.packs]
            blocks = [row["block"] for row in after.rows if slots[row["pack"]].hot is not None]
            if len(profiles) == 1:
                assert all(one < other for one, other in pairwise(blocks))
    assert_sound(store)
