"""What every store that can be written to does alike, whatever its kind."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
from storekit import Place, named, sha256

from erofsgen.errors import BusyError, FormatError, IntegrityError, NotFoundError
from erofsgen.store.base import Store

LARGE = random.Random(7).randbytes((33 << 20) + 5)
"""More than stores that upload in parts put into two of them."""


@pytest.fixture
def store(any_store: Store) -> Store:
    return any_store


# --- blobs -----------------------------------------------------------------------------------------------------------


def test_a_new_store_is_empty(store: Store):
    assert list(store.blobs()) == []
    assert store.references() == {}
    assert list(store.records()) == []
    assert store.reference("name") is None
    assert store.record("key") is None


def test_blobs_come_back_as_they_were_written(store: Store, place: Place):
    pieces = [random.Random(1).randbytes(size) for size in (0, 1, 70_000, 3 << 20)]
    data = b"".join(pieces)
    with store.create() as blob:
        for piece in pieces:
            blob.write(memoryview(piece))
        assert store.size(sha256(data)) is None
        assert blob.commit() == (sha256(data), len(data))
    for reader in (store, place.open()):
        assert reader.size(sha256(data)) == len(data)
        assert reader.read(sha256(data), 0, len(data)) == data
        assert list(reader.blobs()) == [(sha256(data), len(data))]
    assert store.put(b"") == (sha256(b""), 0)
    assert store.size(sha256(b"")) == 0
    assert store.read(sha256(b""), 0, 0) == b""


def test_ranges(store: Store):
    digest, size = store.put(LARGE)
    assert size == len(LARGE)
    dice = random.Random(2)
    ranges = [(0, 1), (size - 1, 1), (0, 4096), (16 << 20, 1), ((16 << 20) - 3, 7), (size - 70_001, 70_001), (5, 0)]
    ranges += [(offset, dice.randrange(1, 2 << 20)) for offset in dice.choices(range(size - (2 << 20)), k=20)]
    with ThreadPoolExecutor(8) as pool:
        for (offset, length), data in zip(
            ranges, pool.map(lambda item: store.read(digest, *item), ranges), strict=True
        ):
            assert data == LARGE[offset : offset + length], (offset, length)


def test_a_blob_can_be_read_into_a_part_of_a_buffer(store: Store):
    digest, _ = store.put(LARGE[:50_000])
    buffer = bytearray(b"x" * 30)
    store.read_into(digest, 40_000, memoryview(buffer)[10:20])
    assert buffer == b"x" * 10 + LARGE[40_000:40_010] + b"x" * 10


def test_a_blob_that_is_too_short_is_said_to_be(store: Store):
    digest, size = store.put(b"short")
    for offset, length in ((2, size + 1), (size - 1, 2), (size, 1), (100, 3)):
        with pytest.raises(IntegrityError) as caught:
            store.read(digest, offset, length)
        assert "\n" not in str(caught.value)


def test_a_blob_that_is_not_there_is_said_not_to_be(store: Store):
    missing = sha256(b"never written")
    assert store.size(missing) is None
    with pytest.raises(NotFoundError, match=missing):
        store.read(missing, 0, 1)
    store.delete(missing)


@pytest.mark.parametrize("digest", ["sha256:../../../etc/passwd", "sha256:", "sha512:" + "0" * 64, "0" * 64, ""])
def test_a_digest_is_never_a_path(store: Store, digest: str):
    for use in (store.size, store.delete, lambda digest: store.read(digest, 0, 1)):
        with pytest.raises(FormatError, match="not a sha256 digest"):
            use(digest)


def test_a_blob_that_is_not_the_announced_one_does_not_appear(store: Store):
    with store.create(digest=sha256(b"blob"), size=5) as blob:
        blob.write(b"other")
        with pytest.raises(IntegrityError, match=sha256(b"other")):
            blob.commit()
    assert list(store.blobs()) == []
    with store.create(digest=sha256(b"blob"), size=4) as blob:
        blob.write(b"blob")
        assert blob.commit() == (sha256(b"blob"), 4)


def test_an_abandoned_blob_does_not_appear(store: Store):
    with store.create() as blob:
        blob.write(b"half")
    with suppress(RuntimeError), store.create() as blob:
        blob.write(b"half")
        raise RuntimeError
    assert list(store.blobs()) == []


def test_two_may_write_the_same_blob_at_once(place: Place):
    clients = [place.open(), place.open()]
    together = threading.Barrier(2)

    def write(store: Store) -> tuple[str, int]:
        with store.create() as blob:
            blob.write(LARGE)
            together.wait(60)
            return blob.commit()

    with ThreadPoolExecutor(2) as pool:
        assert set(pool.map(write, clients)) == {(sha256(LARGE), len(LARGE))}
    assert list(clients[0].blobs()) == [(sha256(LARGE), len(LARGE))]
    assert clients[1].read(sha256(LARGE), 0, len(LARGE)) == LARGE
    assert clients[0].put(LARGE) == (sha256(LARGE), len(LARGE))


def test_deleting(store: Store):
    digest, _ = store.put(b"gone")
    kept, _ = store.put(b"kept")
    with store.collecting():
        store.delete(digest)
        store.delete(digest)
    assert store.size(digest) is None
    assert [found for found, _ in store.blobs()] == [kept]


# --- references ------------------------------------------------------------------------------------------------------


def test_names_may_be_odd(place: Place):
    store = place.open()
    for number, name in enumerate(place.names):
        store.tag(name, named(number))
        assert store.reference(name).digest == named(number).digest
    assert {name: found.size for name, found in place.open().references().items()} == {
        name: number for number, name in enumerate(place.names)
    }
    for name in place.names:
        store.untag(name)
        assert store.reference(name) is None
    assert store.references() == {}


def test_a_name_means_the_last_manifest_it_was_given(store: Store, place: Place):
    name, other, missing = place.names[:3]
    for number in (1, 2):
        store.tag(name, named(number))
    store.tag(other, named(1))
    assert place.open().reference(name).digest == named(2).digest
    assert {name: found.digest for name, found in store.references().items()} == {
        name: named(2).digest, other: named(1).digest
    }  # fmt: skip
    with pytest.raises(NotFoundError, match="no image") as caught:
        store.untag(missing)
    assert caught.value.hint
    store.untag(name)
    assert set(store.references()) == {other}


def test_many_may_name_images_at_once(place: Place):
    clients = [place.open() for _ in range(4)]

    def name(worker: int) -> None:
        for number in range(5):
            clients[worker].tag(f"{worker}-{number}", named(number))
            if number % 2:
                clients[worker].untag(f"{worker}-{number}")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(name, range(4)))
    assert set(clients[0].references()) == {f"{worker}-{number}" for worker in range(4) for number in (0, 2, 4)}


# --- records ---------------------------------------------------------------------------------------------------------


def test_layer_records(store: Store):
    store.put_record("key", b"one")
    store.put_record("key", LARGE)
    store.put_record("other", b"")
    assert store.record("key") == LARGE
    assert store.record("other") == b""
    assert store.record("missing") is None
    assert sorted(store.records()) == ["key", "other"]
    store.delete_record("key")
    store.delete_record("key")
    assert list(store.records()) == ["other"]


# --- locks -----------------------------------------------------------------------------------------------------------


def test_builders_share_and_keep_the_collector_away(place: Place):
    one, two, collector = place.open(), place.open(), place.open()
    with one.building():
        with two.building(), pytest.raises(BusyError, match="a build is running") as caught, collector.collecting():
            pytest.fail("collected during a build")
        assert caught.value.hint
    with collector.collecting():
        pass


def test_a_collector_waits_for_builders_that_are_there(place: Place):
    builder, collector = place.open(), place.open()
    ended = threading.Event()
    with builder.building():

        def collect() -> None:
            with collector.collecting(wait=60):
                ended.set()

        thread = threading.Thread(target=collect)
        thread.start()
        assert not ended.wait(0.3)
    assert ended.wait(60)
    thread.join()


def test_builders_wait_for_the_collector(place: Place):
    builder, collector = place.open(), place.open()
    began = threading.Event()

    def build() -> None:
        with builder.building():
            began.set()

    thread = threading.Thread(target=build)
    with collector.collecting():
        thread.start()
        assert not began.wait(0.3)
    assert began.wait(60)
    thread.join()


def test_a_lock_ends_with_its_block_however_that_ends(place: Place):
    builder, collector = place.open(), place.open()
    with suppress(RuntimeError), builder.building():
        raise RuntimeError
    with suppress(RuntimeError), collector.collecting():
        raise RuntimeError
    with builder.building():
        pass
    with collector.collecting():
        pass
