"""Profiles in registries: under a tag, among the referrers of their image, and never taken for an image."""

from __future__ import annotations

import json

import httpx
import pytest
from profilekit import run_of

from erofsgen.errors import NotFoundError, UnsupportedError, UsageError
from erofsgen.oci.manifest import OCI_INDEX
from erofsgen.profile import beside
from erofsgen.store import profiles as kept
from erofsgen.store.check import check
from erofsgen.store.copy import copy_image
from erofsgen.store.directory import DirectoryStore
from erofsgen.store.image import Image
from erofsgen.store.manifest import ARTIFACT_TYPE
from erofsgen.store.remove import remove

pytestmark = [pytest.mark.server, pytest.mark.timeout(120)]


def tag_of(image: Image) -> str:
    return f"sha256-{image.digest.removeprefix('sha256:')}.profile"


def loaded(store, image: Image) -> list[tuple[str, int]]:
    return [(profile.command, profile.runs) for profile in beside.load(store, image.digest)]


def referrers_of(full, digest: str) -> list[tuple[str, str]]:
    """Types and digests of what refers to a manifest, by the API or the list."""
    if full.has_referrers:
        data = httpx.get(f"http://{full.host}/v2/team/app/referrers/{digest}").raise_for_status().content
    else:
        data = full.tags().get(digest.replace(":", "-"), b'{"manifests": []}')
    return [(item["artifactType"], item["digest"]) for item in json.loads(data)["manifests"]]


def test_in_a_real_registry(registry, open_registry, built, push, skopeo, tmp_path):
    """Debian's, which has no referrers API and deletes no tags."""
    store = open_registry(registry, "profiles/app")
    push(store)
    image = Image.open(store, "lazy")
    assert loaded(store, image) == []
    for number in range(2):
        beside.add(store, image.descriptor, run_of(image, [number]))
        (entry,) = httpx.get(
            f"http://{registry}/v2/profiles/app/manifests/{image.digest.replace(':', '-')}",
            headers={"Accept": OCI_INDEX},
        ).json()["manifests"]
        assert entry["artifactType"] == kept.TYPE
        assert entry["digest"] == store.profiles(image.digest).digest, "what was there before is gone"
    assert loaded(open_registry(registry, "profiles/app"), image) == [("app", 2)]
    assert set(store.references()) == {"lazy"}
    assert store.profiled() == {image.digest}
    assert check(store).problems == []
    skopeo(f"docker://{registry}/profiles/app:{tag_of(image)}", f"oci:{tmp_path}/layout:{tag_of(image)}")
    assert loaded(DirectoryStore(tmp_path / "layout", create=False), image) == [("app", 2)]
    other = open_registry(registry, "profiles/other")
    assert copy_image(image, other).profiles == 1
    assert loaded(other, image) == [("app", 2)]
    assert remove(store, ["lazy"]) == ["lazy"]
    assert store.profiled() == set()
    assert loaded(store, image) == []


@pytest.mark.parametrize("has_referrers", [True, False])
def test_they_refer_to_their_image(full, open_registry, built, push, has_referrers):
    full.has_referrers = has_referrers
    store = open_registry(full)
    push(store)
    source = built.image.manifest.subject.digest
    for number in range(3):
        beside.add(store, built.image.descriptor, run_of(built.image, [number]))
    assert loaded(store, built.image) == [("app", 3)]
    manifest = store.profiles(built.image.digest)
    assert referrers_of(full, built.image.digest) == [(kept.TYPE, manifest.digest)]
    assert referrers_of(full, source) == [(ARTIFACT_TYPE, built.image.digest)]
    assert store.reference("lazy").digest == built.image.digest
    assert store.reference(built.image.digest).digest == built.image.digest
    beside.save(store, built.image.descriptor, [])
    assert referrers_of(full, built.image.digest) == []
    assert tag_of(built.image) not in full.tags()
    assert manifest.digest not in full.manifests


def test_nobody_takes_them_for_images(full, open_registry, built, push):
    store = open_registry(full)
    push(store)
    beside.add(store, built.image.descriptor, run_of(built.image))
    full.requests.clear()
    assert set(store.references()) == {"lazy"}
    assert store.reference(tag_of(built.image)) is None
    assert full.sent("GET", "profile") == [], "not even asked"
    with pytest.raises(NotFoundError):
        Image.open(store, tag_of(built.image))
    with pytest.raises(UsageError, match="reserved"):
        store.tag(tag_of(built.image), built.image.descriptor)
    assert store.repository("one") == store.repository("other")


def test_an_image_without_profiles_costs_one_request(full, open_registry, built, push):
    store = open_registry(full)
    push(store)
    full.requests.clear()
    assert beside.load(store, built.image.digest) == []
    assert len(full.requests) == 1


def test_an_image_and_its_profiles_cost_a_request_each(full, open_registry, built, push):
    store = open_registry(full)
    push(store)
    beside.add(store, built.image.descriptor, run_of(built.image))
    full.requests.clear()
    image = Image.open(store, "lazy")
    assert [profile.runs for profile in beside.load(store, image.digest)] == [1]
    assert len(full.requests) == 2


def test_a_registry_that_deletes_nothing(full, open_registry, built, push):
    """What was replaced stays there; what is to go cannot."""
    full.deletes = ()
    store = open_registry(full)
    push(store)
    for number in range(2):
        beside.add(store, built.image.descriptor, run_of(built.image, [number]))
    assert loaded(store, built.image) == [("app", 2)]
    with pytest.raises(UnsupportedError, match="does not delete anything"):
        beside.save(store, built.image.descriptor, [])
    assert loaded(store, built.image) == [("app", 2)]


def test_a_registry_that_deletes_tags_only(full, open_registry, built, push):
    full.deletes = ("tags",)
    store = open_registry(full)
    push(store)
    beside.add(store, built.image.descriptor, run_of(built.image))
    beside.save(store, built.image.descriptor, [])
    assert loaded(store, built.image) == []
    assert remove(store, ["lazy"]) == ["lazy"]
