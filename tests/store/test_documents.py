"""What comes along with a name: opening an image, and finding what lies beside it, take one request each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import msgspec
import pytest
from handmade import ImageMaker
from profilekit import run_of
from servers.faultproxy import FaultProxy
from servers.s3 import S3Server
from storekit import Place, sha256

from erofsgen.profile import beside
from erofsgen.store import keys
from erofsgen.store.base import Descriptor, Store
from erofsgen.store.check import check
from erofsgen.store.copy import copy_image
from erofsgen.store.documents import EMBEDDED, Documents
from erofsgen.store.image import Image
from erofsgen.store.manifest import MANIFEST_TYPE

CONTENT = [b"a" * 3000, b"b" * 3000]


@pytest.fixture
def proxy(moto_s3: S3Server) -> Iterator[FaultProxy]:
    with FaultProxy(moto_s3) as proxy:
        yield proxy


@pytest.fixture
def open_store(moto_place: Place, proxy: FaultProxy) -> Iterator[Callable[[], Store]]:
    distant = replace(moto_place, url=f"{moto_place.url}?endpoint={proxy.url}")
    yield distant.open
    distant.close()


def an_image(store: Store, annotation: str = "") -> Image:
    maker = ImageMaker(store)  # type: ignore[arg-type]  (any store does)
    made = maker.image("made", dict(enumerate_names()), [maker.pack(CONTENT)])
    manifest = msgspec.structs.replace(made.manifest, annotations={"x": annotation})
    digest, size = store.put(msgspec.json.encode(manifest))
    image = Image(store, "app", Descriptor(MANIFEST_TYPE, digest, size))
    store.tag("app", image.descriptor)
    return Image.open(store, "app")


def enumerate_names() -> list[tuple[str, bytes]]:
    return [(f"f{number}", data) for number, data in enumerate(CONTENT)]


def paths(proxy: FaultProxy) -> list[str]:
    return [request.path.partition("?")[0].partition("erofsgen/")[2] or request.path for request in proxy.requests]


def test_an_image_in_s3_and_its_profiles(open_store: Callable[[], Store], proxy: FaultProxy):
    image = an_image(open_store())
    profile = run_of(image)
    beside.save(image.store, image.descriptor, [profile])
    reader = open_store()
    proxy.requests.clear()
    assert Image.open(reader, "app").digest == image.digest
    assert [found.encode() for found in beside.load(reader, image.digest)] == [profile.encode()]
    assert paths(proxy) == ["references/app", f"references/{keys.profiles(image.digest)}"]
    proxy.requests.clear()
    again = Image(reader, "app", image.descriptor)
    assert again.manifest == image.manifest
    assert len(proxy.requests) == 1, "what came along is used once"
    assert check(reader).problems == check(open_store(), ["app"]).problems


def test_a_copy_has_it_too(open_store: Callable[[], Store], proxy: FaultProxy, directory_place: Place):
    here = directory_place.open()
    image = an_image(here)
    beside.save(here, image.descriptor, [run_of(image)])
    copy_image(image, open_store(), "copied")
    reader = open_store()
    proxy.requests.clear()
    assert beside.load(reader, Image.open(reader, "copied").digest)[0].encode() == run_of(image).encode()
    assert len(proxy.requests) == 2
    assert here.reference("app").data is None, "an index of all images stays small"


def test_a_large_manifest_does_not_come_along(open_store: Callable[[], Store], proxy: FaultProxy):
    image = an_image(open_store(), "x" * EMBEDDED)
    reader = open_store()
    proxy.requests.clear()
    assert Image.open(reader, "app").digest == image.digest
    assert len(proxy.requests) == 2


@pytest.mark.parametrize("wrong", [b"", b"wrong", b"x" * (1 << 17)])
def test_what_is_not_what_its_digest_says_is_passed_over(open_store: Callable[[], Store], wrong: bytes):
    store = open_store()
    image = an_image(store)
    store.tag("app", msgspec.structs.replace(image.descriptor, data=wrong))
    assert Image.open(open_store(), "app").manifest == image.manifest
    layer = msgspec.structs.replace(beside_layer(store, image), data=wrong)
    beside.kept.write(store, image.descriptor, [layer])
    assert len(beside.load(open_store(), image.digest)) == 1


def beside_layer(store: Store, image: Image) -> Descriptor:
    encoded = run_of(image)
    return beside.kept.put(store, encoded.command, encoded.runs, encoded.encode())


def test_check_looks_into_the_store_itself(open_store: Callable[[], Store]):
    store = open_store()
    image = an_image(store)
    beside.save(store, image.descriptor, [run_of(image)])
    found = beside.kept.find(store, image.digest)
    before = len(check(open_store()).problems)
    store.delete(found.layers[0].digest)
    assert len(check(open_store()).problems) == before + 1
    store.delete(image.digest)
    Image.open(open_store(), "app")
    assert any(image.digest in problem.line() for problem in check(open_store()).problems)


def test_large_profiles_do_not_come_along_but_small_ones_do(directory_place: Place):
    store = directory_place.open()
    image = an_image(store)
    layers = [
        beside.kept.put(store, name, 1, name.encode() * size)
        for name, size in (("a", 30 << 10), ("b", 20 << 10), ("c", 9))
    ]
    beside.kept.write(store, image.descriptor, layers)
    found = beside.kept.find(store, image.digest)
    assert [layer.data is not None for layer in found.layers] == [True, False, True]
    assert [beside.kept.read(store, layer) for layer in found.layers] == [
        b"a" * (30 << 10),
        b"b" * (20 << 10),
        b"c" * 9,
    ]
    assert found.manifest.size < EMBEDDED


def test_documents_are_few():
    documents = Documents()
    for number in range(40):
        documents.keep(sha256(bytes([number])), bytes([number]))
    documents.keep(sha256(b"one"), b"another")
    buffer = memoryview(bytearray(1))
    found = [documents.read_into(sha256(bytes([number])), 0, buffer) for number in range(40)]
    assert found == [False] * 24 + [True] * 16
    assert not documents.read_into(sha256(b"one"), 0, buffer)
    documents.keep(sha256(b"four"), b"four")
    assert not documents.read_into(sha256(b"four"), 2, memoryview(bytearray(3))), "shorter than what is read"
