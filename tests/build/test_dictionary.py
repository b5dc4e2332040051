"""The chunk dictionary: what it finds, what it forgets, and that it is only a cache."""

from __future__ import annotations

import multiprocessing
import shutil

import numpy as np
import pytest
from blake3 import blake3

from erofsgen.build.dictionary import Dictionary, stored
from erofsgen.build.packer import NewPack, Packer
from erofsgen.store.directory import DirectoryStore


@pytest.fixture
def store(tmp_path):
    return DirectoryStore(tmp_path / "store")


def new_pack(store: DirectoryStore, texts: list[bytes]) -> NewPack:
    with Packer(store, level=1, threads=1, pack_size=8 << 20) as packer:
        for text in texts:
            packer.add(text, blake3(text).digest(), raw=False)
        (pack,) = packer.flush()
    return pack


def test_finds_chunks_of_new_packs(store):
    dictionary = Dictionary(store.dictionary, store, stored(store))
    texts = [b"chunk %d" % number for number in range(1000)]
    pack = new_pack(store, texts)
    assert dictionary.find(blake3(texts[0]).digest()) is None
    dictionary.add([pack])
    for block, text in enumerate(texts):
        place = dictionary.find(blake3(text).digest())
        assert dictionary.packs[place.pack] == pack.descriptor
        assert (place.block, place.length) == (block, len(text))
    dictionary.close()


def test_survives_reopening_and_forgets_deleted_packs(store):
    kept, gone = new_pack(store, [b"kept"]), new_pack(store, [b"gone"])
    dictionary = Dictionary(store.dictionary, store, stored(store))
    dictionary.add([kept, gone])
    dictionary.close()
    store.delete(gone.descriptor.digest)
    dictionary = Dictionary(store.dictionary, store, stored(store))
    assert dictionary.find(blake3(b"kept").digest()) is not None
    assert dictionary.find(blake3(b"gone").digest()) is None
    assert dictionary.prune() == 1
    assert dictionary.prune() == 0
    dictionary.close()


def test_a_damaged_database_is_replaced(store):
    Dictionary(store.dictionary, store, stored(store)).close()
    for file in store.dictionary.iterdir():
        file.write_bytes(b"\xff" * 8192)
    dictionary = Dictionary(store.dictionary, store, stored(store))
    assert dictionary.find(bytes(32)) is None
    dictionary.close()


def _add(path, number):
    store = DirectoryStore(path)
    dictionary = Dictionary(store.dictionary, store, stored(store))
    dictionary.add([new_pack(store, [b"%d %d" % (number, chunk) for chunk in range(200)])])
    dictionary.close()


def test_two_builders_at_once_lose_nothing(store):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_add, args=(store.path, number)) for number in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    dictionary = Dictionary(store.dictionary, store, stored(store))
    places = [dictionary.find(blake3(b"%d %d" % (n, c)).digest()) for n in range(3) for c in range(200)]
    assert None not in places
    assert len({place.pack for place in places}) == 3
    dictionary.close()


def test_deleting_it_costs_nothing_but_time(store, make_image):
    """Rebuilt from the packs of the named images."""
    make_image(store, "a", {b"f%d" % n: np.random.default_rng(n).bytes(5000) for n in range(20)})
    dictionary = Dictionary(store.dictionary, store, stored(store))
    digests = [blake3(np.random.default_rng(n).bytes(5000)).digest() for n in range(20)]
    before = [dictionary.find(digest) for digest in digests]
    names = {dictionary.packs[place.pack].digest for place in before}
    dictionary.close()
    shutil.rmtree(store.dictionary)
    dictionary = Dictionary(store.dictionary, store, stored(store))
    after = [dictionary.find(digest) for digest in digests]
    assert {dictionary.packs[place.pack].digest for place in after} == names
    assert [(place.block, place.length) for place in after] == [(place.block, place.length) for place in before]
    dictionary.close()
