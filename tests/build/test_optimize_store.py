"""Hot packs in a store: large files, garbage collection, later builds, damage, copies."""

from __future__ import annotations

import random

import numpy as np
import pytest
from blake3 import blake3
from handmade import CHUNK, ImageMaker, chunks_of, contents
from optimizekit import assert_reads, assert_sound, digests, hot_digests, hot_pack, places_of, profile_of

from erofsgen.build.gc import collect
from erofsgen.build.hotset import WHOLE_SIZE
from erofsgen.build.optimize import optimize
from erofsgen.errors import FormatError, IntegrityError
from erofsgen.pack.format import CHUNK as CHUNK_ROW
from erofsgen.pack.format import DICTIONARY_HEADER, SKIPPABLE_HEADER
from erofsgen.profile.profile import RECORDED, ROW, Profile, ordered
from erofsgen.store.copy import copy_image
from erofsgen.store.diff import diff
from erofsgen.store.directory import DirectoryStore
from erofsgen.store.image import Image


def random_files(seed: int, count: int = 60) -> dict[bytes, bytes]:
    generator = random.Random(seed)
    return {
        b"d%d/f%d" % (number % 3, number): generator.randbytes(generator.randrange(9000)) for number in range(count)
    }


def test_large_files_that_are_read_whole_stay(maker: ImageMaker):
    weights, header = contents(5, WHOLE_SIZE, 3 * CHUNK)
    chunks = chunks_of(weights)
    image = maker.image(
        "image", {"weights": weights, "other": header}, [maker.pack(chunks), maker.pack(chunks_of(header))]
    )
    count = len(chunks)
    whole = [("weights", number) for number in range(count * 9 // 10 + 1)]
    part = [("weights", number) for number in range(count * 8 // 10)]
    read = profile_of(image, ("other", 1), *whole, ("other", 0), command="read", carry=True)
    peek = profile_of(image, ("weights", 3), ("other", 2), command="peek", carry=True)
    result = optimize(image, [read, peek], name="hot").result
    new = Image.open(maker.store, "hot")
    # nor does another command's profile take chunks out of it
    assert hot_digests(new) == digests(*(chunks_of(header)[number] for number in (2, 1, 0)))
    assert (result.whole_files, result.whole_bytes, result.hot_chunks) == (1, WHOLE_SIZE, 3)
    # a file that is read in part goes to the hot pack in part; by then, only the old hot pack has the other
    result = optimize(new, [profile_of(image, ("other", 1), *part, carry=True)]).result
    assert (result.whole_files, result.hot_chunks) == (0, 1 + len(part))
    assert_reads(Image.open(maker.store, "hot"), {"weights": weights, "other": header})
    # and back again, when the profile says that it is read whole
    again = Image.open(maker.store, "hot")
    result = optimize(again, [read, peek]).result
    assert result.digest == new.digest
    # all of it is weights: there is nothing to optimize
    result = optimize(image, [profile_of(image, *whole)], name="same").result
    assert (result.hot_pack, result.whole_files) == (None, 1)
    assert Image.open(maker.store, "same").index_bytes() == image.index_bytes()


def test_gc_keeps_what_is_needed(tmp_path, make_image):
    store = DirectoryStore(tmp_path / "store")
    files = random_files(1)
    made = make_image(store, "image", files)
    before = Image.open(store, "image")
    names = [path.decode() for path, data in files.items() if len(data) > 4096]
    optimize(before, [profile_of(before, *((name, 0) for name in names[:5]))])
    first = Image.open(store, "image")
    first_hot = hot_pack(first).digest
    result = optimize(first, [profile_of(first, *((name, 0) for name in names[3:9]))]).result
    gone = collect(store)
    # manifest and index of the image before and of the first time, with the first hot pack and profiles, two blobs
    assert (gone.blobs, gone.profiles) == (7, 1)
    assert store.size(first_hot) is store.size(made.digest) is None
    new = Image.open(store, "image")
    assert new.digest == result.digest
    assert_reads(new, {path.decode(): data for path, data in files.items()})
    assert_sound(store)
    assert (gone.layer_records, collect(store).blobs) == (0, 0)


def test_later_builds_share_with_the_packs_and_not_the_hot_one(tmp_path, make_image):
    """A hot pack suits one image, and goes when that is optimized again."""
    store = DirectoryStore(tmp_path / "store")
    files = random_files(2)
    make_image(store, "image", files)
    before = Image.open(store, "image")
    names = [path.decode() for path, data in files.items() if len(data) > 4096]
    optimize(before, [profile_of(before, *((name, 0) for name in names[:12]))])
    optimized = Image.open(store, "image")
    more = {**files, b"more": bytes(range(256)) * 40}
    built = make_image(store, "more", more)
    assert (built.new_bytes, built.deduplicated_bytes) == (256 * 40, sum(len(d) for d in files.values() if len(d) > 64))
    assert hot_pack(optimized).digest not in {pack.digest for pack in Image.open(store, "more").packs}
    assert_reads(Image.open(store, "more"), {path.decode(): data for path, data in more.items()})
    # where nothing else has a chunk, the hot pack is better than to store it again
    everything = [(path.decode(), 0) for path, data in files.items() if len(data) > 64]
    optimize(optimized, [profile_of(optimized, *everything)])
    store.untag("more")
    collect(store)
    assert [pack.hot is not None for pack in Image.open(store, "image").packs] == [True]
    assert make_image(store, "again", files).new_bytes == 0
    assert_reads(Image.open(store, "again"), {path.decode(): data for path, data in files.items()})
    collect(store)
    assert_sound(store)


def test_the_same_image_to_whoever_looks(tmp_path, make_image):
    store, elsewhere = DirectoryStore(tmp_path / "store"), DirectoryStore(tmp_path / "elsewhere")
    files = random_files(3)
    make_image(store, "image", files, share_pages=True)
    before = Image.open(store, "image")
    names = [path.decode() for path, data in files.items() if len(data) > 4096]
    optimize(before, [profile_of(before, (names[3], 0), (names[1], 0))], name="hot")
    after = Image.open(store, "hot")
    assert diff(before, after) == []
    for (path, one), (other_path, other) in zip(before.index.walk(), after.index.walk(), strict=True):
        assert (path, one.fingerprint()) == (other_path, other.fingerprint())
    copy_image(after, elsewhere)
    copied = Image.open(elsewhere, "hot")
    assert copied.digest == after.digest
    assert hot_pack(copied) == hot_pack(after)
    assert_reads(copied, {path.decode(): data for path, data in files.items()})


def test_damage_changes_no_name(maker: ImageMaker):
    first, second = contents(2, 8 * CHUNK, 4 * CHUNK)
    packs = [maker.pack(chunks_of(first), raw=True), maker.pack(chunks_of(second))]
    image = maker.image("image", {"one": first, "two": second}, packs)
    profile = profile_of(image, ("one", 5), ("two", 0))
    path = maker.store.blob_path(packs[0].descriptor.digest)
    sound = path.read_bytes()
    toc_start = image.packs[0].toc.offset
    for offset, error in (
        (5 * CHUNK, IntegrityError),
        (toc_start + 40, IntegrityError),
        (8 * CHUNK + 30, IntegrityError),
    ):
        damaged = bytearray(sound)
        damaged[offset + (5 * 40 if offset == 8 * CHUNK + 30 else 0)] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(error):
            optimize(image, [profile])
        assert Image.open(maker.store, "image").digest == image.digest
    path.write_bytes(sound[: 8 * CHUNK])
    with pytest.raises(FormatError):
        optimize(image, [profile])
    path.write_bytes(sound)
    optimize(image, [profile])
    assert hot_digests(Image.open(maker.store, "image")) == digests(chunks_of(first)[5], chunks_of(second)[0])


def test_chunks_that_go_back_are_compared(maker: ImageMaker):
    """Where they lay before is taken from dictionaries, which only hint."""
    first, second = contents(2, 8 * CHUNK, 4 * CHUNK)
    packs = [maker.pack(chunks_of(first), raw=True), maker.pack(chunks_of(second))]
    image = maker.image("image", {"one": first, "two": second}, packs)
    optimize(image, [profile_of(image, ("one", 5), ("two", 0))])
    optimized = Image.open(maker.store, "image")
    path = maker.store.blob_path(packs[0].descriptor.digest)
    data = bytearray(path.read_bytes())
    # in the dictionary, chunk 2 claims to be what chunk 5 is
    entry = 8 * CHUNK + SKIPPABLE_HEADER.size + DICTIONARY_HEADER.size + 2 * CHUNK_ROW.itemsize
    data[entry : entry + 32] = blake3(chunks_of(first)[5]).digest()
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match="differs from its digest"):
        optimize(optimized, [profile_of(image, ("two", 1))])
    assert Image.open(maker.store, "image").digest == optimized.digest


def test_chunks_in_several_packs_are_one(maker: ImageMaker):
    """Images may have the same chunk in two packs, where layers were built apart."""
    first, second = contents(4, 4 * CHUNK, 3 * CHUNK)
    a, b = chunks_of(first), chunks_of(second)
    one, two = maker.pack([*a, b[0]]), maker.pack([b[1], b[0], b[2]])
    files = {"one": first, "two": second}
    image = maker.image("image", files, [two, one])
    touched = profile_of(image, ("two", 0), ("one", 1))
    rows = np.zeros(1, ROW)
    rows[0] = (0, one.places[blake3(b[0]).digest()], CHUNK, np.void(bytes(8)), 5, 1, 0)
    other = Profile("other", 1, [one.hex], [RECORDED], ordered(rows))
    # a place that no file of the image has: not its chunk
    assert optimize(image, [touched, other]).result.unknown_rows == 1
    rows["digest"] = np.void(blake3(b[0]).digest()[:8])
    result = optimize(image, [touched, Profile("other", 1, [one.hex], [RECORDED], ordered(rows))]).result
    assert (result.unknown_rows, result.shared_bytes) == (0, CHUNK)
    new = Image.open(maker.store, "image")
    assert hot_digests(new) == digests(b[0], a[1])
    assert_reads(new, files)
    # back to the first pack that has it
    optimize(new, [profile_of(new, ("one", 1))])
    assert places_of(Image.open(maker.store, "image"), "two")[0] == places_of(image, "two")[0]
