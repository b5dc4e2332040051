"""Profiles beside images, in every kind of store that can be written to, and what becomes of them."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest
from handmade import ImageMaker
from profilekit import run_of
from servers.nginx import StaticServer
from storekit import Place, named, sha256

from erofsgen.build.gc import collect
from erofsgen.errors import FormatError, IntegrityError, NotFoundError, UnsupportedError, UsageError
from erofsgen.profile import beside
from erofsgen.profile.profile import Profile
from erofsgen.store import profiles as kept
from erofsgen.store.base import Descriptor, Store
from erofsgen.store.check import check
from erofsgen.store.copy import copy_image
from erofsgen.store.directory import DirectoryStore
from erofsgen.store.image import Image
from erofsgen.store.inspect import list_images
from erofsgen.store.manifest import MANIFEST_TYPE, Manifest
from erofsgen.store.open import open_store
from erofsgen.store.remove import remove


@pytest.fixture
def place(directory_place: Place) -> Iterator[Place]:
    """What does not depend on the kind of store is tested in a directory."""
    yield directory_place
    directory_place.close()


@pytest.fixture
def store(place: Place) -> Store:
    return place.open()


@pytest.fixture(params=["directory", "moto", pytest.param("ceph", marks=pytest.mark.server)])
def any_place(request: pytest.FixtureRequest) -> Iterator[Place]:
    """Who reads the ranges of S3 is another test's matter."""
    place: Place = request.getfixturevalue(f"{request.param}_place")
    yield place
    place.close()


@pytest.fixture(params=["directory", "moto"])
def any_store(request: pytest.FixtureRequest) -> Iterator[Store]:
    place: Place = request.getfixturevalue(f"{request.param}_place")
    yield place.open()
    place.close()


def problems(store: Store, names: list[str] | None = None) -> list[str]:
    """What ``check`` finds, but for what images made by hand lack."""
    return [problem.line() for problem in check(store, names).problems if "schema and types" not in problem.what]


@pytest.fixture
def image(store: Store) -> Image:
    return an_image(store)


def an_image(store: Store, name: str = "app:1", seed: int = 1) -> Image:
    dice = random.Random(seed)
    maker = ImageMaker(store)  # type: ignore[arg-type]  (any store does)
    files = {f"f{number}": dice.randbytes(3000) for number in range(4)}
    return maker.image(name, dict(files), [maker.pack(list(files.values()))])


def name_of(image: Image) -> str:
    return f"sha256-{image.digest.removeprefix('sha256:')}.profile"


def same(found: list[Profile], expected: list[Profile]) -> bool:
    return [profile.encode() for profile in found] == [profile.encode() for profile in expected]


# --- what lies beside an image ---------------------------------------------------------------------------------------


def test_profiles_lie_beside_their_image(any_place: Place):
    store = any_place.open()
    image = an_image(store)
    assert beside.load(store, image.digest) == []
    assert store.profiled() == set()
    serve, train, plain = (run_of(image, numbers, command=command) for numbers, command in (
        ([2, 0], "serve --port '80'"), ([1], "größe"), ([3], "")
    ))  # fmt: skip
    beside.save(store, image.descriptor, [serve, train, plain])
    for reader in (store, any_place.open()):
        assert same(beside.load(reader, image.digest), [serve, train, plain])
        assert reader.profiled() == {image.digest}
    beside.save(store, image.descriptor, [train])
    assert same(beside.load(any_place.open(), image.digest), [train])
    beside.save(store, image.descriptor, [])
    assert beside.load(store, image.digest) == []
    assert store.profiled() == set()
    beside.save(store, image.descriptor, [])


def test_runs_are_merged(store: Store, image: Image):
    first = beside.add(store, image.descriptor, run_of(image, [0, 1]))
    beside.add(store, image.descriptor, run_of(image, [3], command="other"))
    second = beside.add(store, image.descriptor, run_of(image, [1, 2]))
    assert (first.runs, second.runs) == (1, 2)
    assert sorted(second.confidence()) == [0.5, 0.5, 1.0]
    found = beside.load(store, image.digest)
    assert [(profile.command, profile.runs) for profile in found] == [("app", 2), ("other", 1)], "the last one first"
    both = [run_of(image, [0], command=command) for command in ("third", "other")]
    assert [profile.command for profile in beside.add_all(store, image.descriptor, both)] == ["third", "other", "app"]
    assert [profile.runs for profile in beside.load(store, image.digest)] == [1, 2, 2]


def test_it_is_an_artifact_that_others_understand(store: Store, image: Image):
    beside.save(store, image.descriptor, [run_of(image, command="serve")])
    named = store.profiles(image.digest)
    document = msgspec.json.decode(store.read(named.digest, 0, named.size))
    (layer,) = document["layers"]
    assert document == {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "artifactType": "application/vnd.erofsgen.profile.v1",
        "config": {"mediaType": "application/vnd.oci.empty.v1+json", "digest": sha256(b"{}"), "size": 2},
        "layers": [layer],
        "subject": {"mediaType": MANIFEST_TYPE, "digest": image.digest, "size": image.manifest_size},
    }
    assert layer["mediaType"] == "application/vnd.erofsgen.profile.v1"
    assert layer["annotations"] == {"org.erofsgen.profile.command": "serve", "org.erofsgen.profile.runs": "1"}
    assert store.read(document["config"]["digest"], 0, 2) == b"{}"


def test_their_names_are_no_images(any_store: Store):
    store, image = any_store, an_image(any_store)
    beside.save(store, image.descriptor, [run_of(image)])
    assert set(store.references()) == {"app:1"}
    assert store.reference(name_of(image)) is None
    assert [found.name for found in list_images(store)] == ["app:1"]
    with pytest.raises(NotFoundError):
        Image.open(store, name_of(image))
    with pytest.raises(UsageError, match="reserved"):
        store.check_name(name_of(image))
    with pytest.raises(UsageError, match="reserved"):
        copy_image(image, store, name_of(image))
    report = check(store)
    assert (problems(store), report.unreferenced, report.images) == ([], {}, 1)
    assert problems(store, ["app:1"]) == []


def test_many_commands_are_bounded(store: Store, image: Image):
    """Those that were changed last stay."""
    for number in range(0, 40, 8):
        beside.add_all(store, image.descriptor, [run_of(image, [0], command=f"c{number + n}") for n in range(8)])
    found = [profile.command for profile in beside.load(store, image.digest)]
    assert len(found) == kept.COUNT == 32
    assert set(found) == {f"c{number}" for number in range(8, 40)}


def test_a_profile_that_is_too_large(store: Store, image: Image, monkeypatch: pytest.MonkeyPatch):
    small, large = run_of(image, [0], command="small"), run_of(image, command="large")
    beside.save(store, image.descriptor, [small])
    monkeypatch.setattr(kept, "LIMIT", len(small.encode()) + len(large.encode()) - 1)
    assert [profile.command for profile in beside.add_all(store, image.descriptor, [large])] == ["large", "small"]
    assert [profile.command for profile in beside.load(store, image.digest)] == ["large"]
    with pytest.raises(FormatError, match="300 characters"):
        beside.add(store, image.descriptor, run_of(image, command="x" * 300))
    monkeypatch.setattr(kept, "LIMIT", 50)
    with pytest.raises(FormatError, match="more than 50 bytes"):
        beside.save(store, image.descriptor, [large])


def test_several_who_push_at_once(place: Place):
    """A run may be lost, but what is there is whole."""
    image = an_image(place.open())
    clients = [place.open() for _ in range(3)]
    together = threading.Barrier(3)

    def push(number: int) -> None:
        together.wait(60)
        beside.add(clients[number], image.descriptor, run_of(image, [number], command="app"))

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(push, range(3)))
    (found,) = beside.load(clients[0], image.digest)
    assert 1 <= found.runs == len(found.rows) <= 3
    assert problems(clients[0]) == []


# --- what is hostile -------------------------------------------------------------------------------------------------


def plant(store: Store, image: Image, **changes: object) -> None:
    """Beside ``image``, a manifest like a right one but for ``changes``."""
    layer = kept.put(store, "app", 1, run_of(image).encode())
    fields = {
        "schema_version": 2,
        "media_type": MANIFEST_TYPE,
        "artifact_type": kept.TYPE,
        "config": Descriptor("application/vnd.oci.empty.v1+json", *store.put(b"{}")),
        "layers": [layer],
        "subject": image.descriptor,
        **changes,
    }
    digest, size = store.put(msgspec.json.encode(Manifest(**fields)))  # type: ignore[arg-type]
    store.tag_profiles(image.digest, Descriptor(MANIFEST_TYPE, digest, size))


def layer(**changes: object) -> Descriptor:
    fields = {
        "media_type": kept.TYPE,
        "digest": sha256(b"x"),
        "size": 1,
        "annotations": {kept.COMMAND: "a", kept.RUNS: "1"},
    }
    return Descriptor(**{**fields, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        {"artifact_type": "application/vnd.erofsgen.image.v1"},
        {"subject": None},
        {"subject": Descriptor(MANIFEST_TYPE, sha256(b"another"), 1)},
        {"layers": [layer(annotations={kept.COMMAND: str(number), kept.RUNS: "1"}) for number in range(33)]},
        {"layers": [layer(size=kept.LIMIT + 1)]},
        {"layers": [layer(size=-5)]},
        {"layers": [layer(media_type="text/html")]},
        {"layers": [layer(annotations={kept.RUNS: "1"})]},
        {"layers": [layer(annotations={kept.COMMAND: "a"})]},
        {"layers": [layer(annotations={kept.COMMAND: "a", kept.RUNS: "-1"})]},
        {"layers": [layer(annotations={kept.COMMAND: "a" * 201, kept.RUNS: "1"})]},
        {"layers": [layer(), layer()]},
        {"layers": [layer(digest="../../../etc/passwd")]},
        {"layers": [layer()]},
    ],
    ids=range(14),
)
def test_what_is_no_profile_is_refused(directory_place: Place, changes: dict[str, object]):
    store = directory_place.open()
    image = an_image(store)
    store.put(b"x")
    plant(store, image)
    assert len(beside.load(store, image.digest)) == 1
    plant(store, image, **changes)
    with pytest.raises(FormatError) as caught:
        beside.load(store, image.digest)
    assert "\n" not in str(caught.value)
    other = DirectoryStore(f"{directory_place.url}-other")
    copy_image(image, other)
    assert Image.open(other, "app:1").digest == image.digest
    found = beside.add(store, image.descriptor, run_of(image))  # that does not stay so for ever
    assert same(beside.load(store, image.digest), [found])


def test_a_profile_of_another_command(directory_place: Place):
    store = directory_place.open()
    image = an_image(store)
    plant(store, image, layers=[kept.put(store, "another", 1, run_of(image).encode())])
    with pytest.raises(FormatError, match="another command"):
        beside.load(store, image.digest)


@pytest.mark.parametrize("what", ["manifest", "layer"])
def test_damaged_blobs(directory_place: Place, what: str):
    store = directory_place.open()
    assert isinstance(store, DirectoryStore)
    image = an_image(store)
    layer = kept.put(store, "serve", 1, run_of(image).encode())
    kept.write(store, image.descriptor, [msgspec.structs.replace(layer, data=None)])
    found = kept.find(store, image.digest)
    path = store.blob_path((found.manifest if what == "manifest" else found.layers[0]).digest)
    path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(IntegrityError, match=path.name):
        beside.load(store, image.digest)
    assert [problem for problem in problems(store) if path.name in problem]
    path.unlink()
    with pytest.raises(NotFoundError, match=path.name):
        beside.load(store, image.digest)
    assert collect(store).profiles == 1
    assert beside.load(store, image.digest) == []
    assert problems(store) == []


# --- garbage, removal ------------------------------------------------------------------------------------------------


def test_garbage_collection(any_store: Store):
    store, image = any_store, an_image(any_store)
    other = an_image(store, "app:2", seed=2)
    profiles = [run_of(image), run_of(image, [1], command="x")]
    beside.save(store, image.descriptor, [run_of(image, [0])])
    beside.save(store, image.descriptor, profiles)
    beside.save(store, other.descriptor, [run_of(other)])
    result = collect(store)
    assert (result.blobs, result.profiles) == (2, 0), "what was there before"
    assert same(beside.load(store, image.digest), profiles)
    store.untag("app:2")
    gone = [other.digest, *(blob.digest for blob in other.manifest.layers)]
    assert collect(store, dry_run=True).profiles == 1
    assert store.profiled() == {image.digest, other.digest}
    result = collect(store)
    assert (result.blobs, result.profiles) == (len(gone) + 2, 1)
    assert store.profiled() == {image.digest}
    assert same(beside.load(store, image.digest), profiles)
    assert check(store).unreferenced == {}
    store.untag("app:1")
    collect(store)
    assert list(store.blobs()) == []
    assert store.profiled() == set()


def test_an_image_s_last_name_takes_its_profiles_along(any_store: Store):
    store, image = any_store, an_image(any_store)
    other = an_image(store, "other:1", seed=2)
    store.tag("app:again", image.descriptor)
    for one in (image, other):
        beside.save(store, one.descriptor, [run_of(one)])
    assert remove(store, ["app:1"]) == ["app:1"]
    assert store.profiled() == {image.digest, other.digest}
    with pytest.raises(NotFoundError):
        remove(store, ["other:1", "missing"])
    assert set(store.references()) == {"app:again", "other:1"}
    assert remove(store, [image.digest]) == ["app:again"]
    assert store.profiled() == {other.digest}
    assert remove(store, ["other:1"]) == ["other:1"]
    assert store.profiled() == set()
    an_image(store, "without")
    assert remove(store, ["without"]) == ["without"]


# --- copies ----------------------------------------------------------------------------------------------------------


def test_copies_bring_profiles(store: Store, image: Image, tmp_path):
    """Whose has more runs stays; copying again changes nothing."""
    source = DirectoryStore(tmp_path / "source")
    theirs = an_image(source)
    assert theirs.digest == image.digest
    assert copy_image(theirs, store, "app:1").profiles == 0
    few, many = run_of(image, [0]), run_of(image, [1]).merged(run_of(image, [2]))
    mine = run_of(image, [3], command="mine")
    beside.save(source, theirs.descriptor, [few])
    assert copy_image(theirs, store, "app:1").profiles == 1
    assert copy_image(theirs, store, "app:1").profiles == 0
    assert same(beside.load(store, image.digest), [few])
    beside.save(store, image.descriptor, [many, mine])
    assert copy_image(theirs, store, "app:1").profiles == 0
    assert same(beside.load(store, image.digest), [many, mine])
    fresh = run_of(image, [0, 3]).merged(run_of(image, [1]))
    beside.save(source, theirs.descriptor, [fresh])
    assert copy_image(theirs, store, "app:1").profiles == 1
    assert same(beside.load(store, image.digest), [fresh, mine])
    back = DirectoryStore(tmp_path / "back")
    assert copy_image(Image.open(store, "app:1"), back).profiles == 2
    assert same(beside.load(back, image.digest), [fresh, mine])


# --- over HTTP -------------------------------------------------------------------------------------------------------


@pytest.mark.server
def test_over_http(nginx_static: StaticServer):
    store = DirectoryStore(nginx_static.directory)
    image, other = an_image(store), an_image(store, "app:2", seed=2)
    beside.save(store, image.descriptor, [run_of(image)])
    served = open_store(nginx_static.url)
    assert same(beside.load(served, image.digest), [run_of(image)])
    assert beside.load(served, other.digest) == []
    assert served.profiled() == {image.digest}
    assert set(served.references()) == {"app:1", "app:2"}
    assert served.reference(name_of(image)) is None
    with pytest.raises(UnsupportedError, match="cannot be written to"):
        beside.add(served, image.descriptor, run_of(image))
    served.close()


@pytest.mark.server
def test_objects_over_http(nginx_static: StaticServer):
    """Where nothing is listed, an image without profiles costs one request after it was opened."""
    store = DirectoryStore(nginx_static.directory)
    image, other = an_image(store), an_image(store, "app:2", seed=2)
    beside.save(store, image.descriptor, [run_of(image)])
    references = nginx_static.directory / "erofsgen" / "references"
    references.mkdir()
    for name, manifest in store.references().items():
        (references / name.replace(":", "%3A")).write_bytes(msgspec.json.encode(manifest))
    (references / name_of(image)).write_bytes(msgspec.json.encode(store.profiles(image.digest)))
    (nginx_static.directory / "index.json").unlink()
    served = open_store(nginx_static.url)
    opened = Image.open(served, "app:1")
    asked: list[str] = []
    get = served._transport.get  # type: ignore[attr-defined]
    served._transport.get = lambda locate, limit, what: (asked.append(what), get(locate, limit, what))[1]  # type: ignore[attr-defined]
    assert beside.load(served, other.digest) == []
    assert len(asked) == 1
    assert same(beside.load(served, opened.digest), [run_of(image)])
    with pytest.raises(UnsupportedError):
        served.profiled()
    served.close()


def test_odd_names_stay_odd(store: Store):
    """Only what is exactly of the scheme is reserved."""
    image = "0" * 64
    for name in (
        f"sha256-{image}.sig",
        f"sha256-{image}.profiles",
        f"sha256-{image[1:]}.profile",
        f"xsha256-{image}.profile",
    ):
        store.check_name(name)
        store.tag(name, named(1))
        assert set(store.references()) == {name}
        assert store.profiled() == set()
        store.untag(name)
    with pytest.raises(FormatError, match="not a sha256 digest"):
        store.profiles("../../x")
