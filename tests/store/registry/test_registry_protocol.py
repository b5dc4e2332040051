"""The protocol, to the request: uploads that break, tokens that expire, redirects, and the referrers API."""

from __future__ import annotations

import json
import random
import threading
from urllib.parse import parse_qs, urlsplit

import msgspec
import pytest
import servers
from servers import cut, redirect, silent, status
from servers.fullregistry import FullRegistry

from erofsgen.errors import FormatError, IntegrityError, NotFoundError, RemoteError, UnsupportedError
from erofsgen.oci.patience import Policy
from erofsgen.store.base import Descriptor
from erofsgen.store.check import check
from erofsgen.store.image import Image
from erofsgen.store.manifest import ARTIFACT_TYPE, MANIFEST_TYPE

pytestmark = [pytest.mark.server, pytest.mark.timeout(60)]

BLOB = random.Random(5).randbytes(3_000_000)
DIGEST = servers.digest_of(BLOB)
BEGIN, SEND = "/blobs/uploads/$", r"/blobs/uploads/.*\?.*digest="


def put(store, data=BLOB, **announced):
    with store.create(**announced) as blob:
        for start in range(0, len(data), 1 << 20):
            blob.write(data[start : start + (1 << 20)])
        return blob.commit()


def artifact(registry: FullRegistry, subject: str | None, tag: str, **fields) -> str:
    """A manifest of our type, or another, that somebody has pushed; its digest."""
    registry.blobs[servers.digest_of(b"{}")] = b"{}"
    document = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "artifactType": ARTIFACT_TYPE,
        "config": {"mediaType": servers.OCI_CONFIG, "digest": servers.digest_of(b"{}"), "size": 2},
        "layers": [],
        **fields,
    }
    if subject is not None:
        document["subject"] = {"mediaType": MANIFEST_TYPE, "digest": subject, "size": 2}
    return registry.add_manifest(document, tag)


def scopes(registry: FullRegistry) -> list[str]:
    return [parse_qs(urlsplit(request.path).query)["scope"][0] for request in registry.seen("^/token")]


# --- uploads ---------------------------------------------------------------------------------------------------------


def test_one_upload_is_one_put(full, open_registry):
    store = open_registry(full)
    assert put(store) == (DIGEST, len(BLOB))
    assert full.blobs == {DIGEST: BLOB}
    assert len(full.sent("POST", BEGIN)) == len(full.sent("PUT", SEND)) == 1
    assert put(store, digest=DIGEST, size=len(BLOB)) == (DIGEST, len(BLOB))
    assert len(full.sent("PUT", SEND)) == 1
    assert list((store.scratch / "tmp").iterdir()) == []


@pytest.mark.parametrize("where", [BEGIN, SEND])
@pytest.mark.parametrize(
    "fault", [status(503), status(429, Retry_After="0"), status(500), silent(0), cut(10)], ids=lambda _: ""
)
def test_what_fails_is_begun_again(full, open_registry, where, fault):
    full.fault(where, fault, times=2)
    assert put(open_registry(full)) == (DIGEST, len(BLOB))
    assert full.blobs == {DIGEST: BLOB}


def test_an_upload_that_the_registry_forgot(full, open_registry):
    full.fault(SEND, status(404))
    put(open_registry(full))
    assert len(full.sent("POST", BEGIN)) == 2


def test_an_upload_without_a_place(full, open_registry):
    full.fault(BEGIN, status(202))
    with pytest.raises(RemoteError, match="does not say where to send the upload of blob"):
        put(open_registry(full))


def test_patience_ends(full, open_registry):
    full.fault(SEND, status(503, b'{"errors":[{"message":"no room"}]}'), times=10)
    with pytest.raises(RemoteError, match=f"answered 503 for upload of blob {DIGEST} to team/app: no room"):
        put(open_registry(full))
    assert len(full.sent("PUT", SEND)) == 3
    assert full.blobs == {}


def test_a_slow_registry_may_think_about_an_upload(full, open_registry):
    def think(handler):
        handler.registry.closing.wait(1)
        handler.behave()

    full.fault(SEND, think)
    policy = Policy(attempts=1, read_timeout=0.3, connect_timeout=5)
    assert put(open_registry(full, policy=policy)) == (DIGEST, len(BLOB))


def test_what_is_written_does_not_follow_redirects(full, elsewhere, open_registry):
    full.fault(SEND, redirect(f"http://{elsewhere.host}/v2/x/y/z"))
    with pytest.raises(RemoteError, match=f"redirects PUT to {elsewhere.host}"):
        put(open_registry(full))
    assert elsewhere.requests == []


def test_an_upload_at_another_host_gets_no_token(full, elsewhere, open_registry):
    full.tokens = set()
    elsewhere.uploads.add("there")

    def send_there(handler):
        if handler._let_in():
            handler.answer(b"", 202, {"Location": f"http://{elsewhere.host}/v2/x/blobs/uploads/there?state=a%2Bb"})

    full.fault(BEGIN, send_there, times=2)
    put(open_registry(full))
    assert elsewhere.blobs == {DIGEST: BLOB}
    assert [request.headers.get("Authorization") for request in elsewhere.requests] == [None]


@pytest.mark.parametrize("announced", [{"digest": "sha256:" + "0" * 64}, {"size": 5}])
def test_another_blob_than_announced_is_not_sent(full, open_registry, announced):
    with pytest.raises(IntegrityError):
        put(open_registry(full), **announced)
    assert full.sent("POST", "") == []


def test_a_blob_that_is_given_up_leaves_nothing(full, open_registry):
    store = open_registry(full)
    with store.create() as blob:
        blob.write(b"data")
    assert full.requests == []
    assert list((store.scratch / "tmp").iterdir()) == []


# --- tokens ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("refusal", [401, 400, 403])
def test_a_token_that_expires_in_the_middle(full, open_registry, push, built, refusal):
    store = open_registry(full)
    push(store)
    full.tokens, full.refusal = set(), refusal
    image = Image.open(store, "lazy")
    pack = image.packs[0]
    for start in range(0, pack.size - 10, pack.size // 7):
        full.expire_tokens()
        assert store.read(pack.digest, start, 10) == built.image.store.read(pack.digest, start, 10)
    assert full.issued >= 8
    assert set(scopes(full)) == {"repository:team/app:pull"}


def test_many_readers_make_one_renewal(full, open_registry, push):
    store = open_registry(full)
    push(store)
    full.tokens = set()
    image = Image.open(store, "lazy")
    issued = full.issued
    full.expire_tokens()
    barrier = threading.Barrier(8)

    def read() -> None:
        barrier.wait()
        store.read(image.packs[0].digest, 0, 10)

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert full.issued == issued + 1


def test_readers_do_not_take_from_writers(full, open_registry, push):
    full.tokens = set()
    store = open_registry(full)
    assert store.reference("lazy") is None
    push(store)
    assert scopes(full) == ["repository:team/app:pull", "repository:team/app:pull,push"]
    full.expire_tokens()
    assert store.reference("lazy") is not None
    put(store)
    assert scopes(full)[2:] == ["repository:team/app:pull,push"]


def test_who_may_only_read(full, open_registry, push):
    push(open_registry(full))
    full.tokens = set()
    store = open_registry(full)
    refused = servers.faultyregistry.Fault("scope=[^&]*push", status(401, b'{"errors":[{"message":"no"}]}'), times=10)
    full.faults.append(refused)
    with pytest.raises(RemoteError, match="refused anonymous access") as caught:
        put(store)
    assert "skopeo login" in caught.value.hint
    full.expire_tokens()
    assert store.reference("lazy") is not None


# --- ranges ----------------------------------------------------------------------------------------------------------


def test_storage_elsewhere_is_remembered_and_gets_no_token(full, elsewhere, open_registry):
    full.tokens = set()
    full.blobs[DIGEST] = elsewhere.blobs[DIGEST] = BLOB

    def send_there(handler):
        if handler._let_in():
            place = f"http://{elsewhere.host}/v2/x/blobs/{DIGEST}?signed={handler.command}"
            handler.answer(b"", 307, {"Location": place})

    full.fault("/blobs/", send_there, times=100)
    store = open_registry(full)
    assert store.size(DIGEST) == len(BLOB)
    for start in range(0, 1_000_000, 100_000):
        assert store.read(DIGEST, start, 1000) == BLOB[start : start + 1000]
    assert len(full.sent("GET", "/blobs/")) == 1
    assert [request.path.partition("signed=")[2] for request in elsewhere.requests] == ["HEAD"] + ["GET"] * 10
    assert not any("Authorization" in request.headers for request in elsewhere.requests)
    elsewhere.fault("signed=", status(403, b"<Message>Request has expired</Message>"))
    assert store.read(DIGEST, 5, 5) == BLOB[5:10]
    assert len(full.sent("GET", "/blobs/")) == 2


def test_a_shorter_blob(full, open_registry):
    full.blobs[DIGEST] = BLOB[:1000]
    with pytest.raises(IntegrityError, match="1001 expected"):
        open_registry(full).read(DIGEST, 0, 1001)


# --- lists -----------------------------------------------------------------------------------------------------------


def test_lists_in_pages(full, open_registry):
    full.page = 2
    names = {f"tag{number}" for number in range(7)}
    for name in names:
        artifact(full, None, name, annotations={"name": name})
    artifact(full, None, "foreign", artifactType="application/spdx+json")
    full.add_manifest({"schemaVersion": 2, "mediaType": MANIFEST_TYPE, "layers": 5}, "damaged")
    full.add_image(b"layer", tag="source")
    assert set(open_registry(full).references()) == names
    assert len(full.sent("GET", "/tags/list")) == 5


def test_a_list_without_end(full, open_registry, monkeypatch):
    monkeypatch.setattr("erofsgen.oci.registryclient._PAGES", 5)
    full.fault("/tags/list", status(200, b"{}", Link='<list?again>; rel="next"'), times=100)
    with pytest.raises(RemoteError, match="without end"):
        open_registry(full).references()


@pytest.mark.parametrize("filters", [True, False])
def test_referrers_by_the_api(full, open_registry, filters):
    full.filters, full.page = filters, 2
    source = full.add_image(b"layer", tag="v1")
    other = full.add_image(b"other", tag="v2")
    artifact(full, other, "not-this", annotations={"of": "v2"})
    for number in range(3):
        artifact(full, source, f"sbom{number}", artifactType="application/spdx+json", annotations={"n": str(number)})
    ours = artifact(full, source, "lazy")
    store = open_registry(full)
    assert store.reference("v1") == Descriptor(
        MANIFEST_TYPE, ours, len(full.manifests[ours][1]), artifact_type=ARTIFACT_TYPE
    )
    assert full.seen("sha256-") == []


def test_a_push_where_the_api_is(full, open_registry, push, built):
    store = open_registry(full)
    digest = push(store)
    full.manifests["v1"] = full.manifests[built.image.manifest.subject.digest] = (
        MANIFEST_TYPE,
        (built.source / "blobs" / built.image.manifest.subject.digest.replace(":", "/")).read_bytes(),
    )
    assert store.reference("v1").digest == digest
    assert set(full.tags()) == {"lazy", "v1"}
    assert check(store).problems == []


@pytest.mark.parametrize("has_referrers", [True, False])
@pytest.mark.parametrize(
    ("created", "chosen"),
    [
        ([None, None, None], 2),
        (["2024-05-01T00:00:00Z", "2024-04-30T23:30:00-02:00", None], 1),
        (["2024-05-01T00:00:00Z", "2023-05-01T00:00:00Z", "nonsense"], 0),
        (["2024-05-01T00:00:00Z", "2024-05-01T00:00:00Z", None], 1),
    ],
)
def test_the_newest_of_several(full, open_registry, has_referrers, created, chosen):
    full.has_referrers = has_referrers
    source = full.add_image(b"layer", tag="v1")
    store = open_registry(full)
    digests = []
    for number, moment in enumerate(created):
        annotations = {"number": str(number)} | ({"org.opencontainers.image.created": moment} if moment else {})
        digests.append(artifact(full, source, f"t{number}", annotations=annotations))
        data = full.manifests[digests[-1]][1]
        store.tag(f"t{number}", Descriptor(MANIFEST_TYPE, digests[-1], len(data)))
    assert store.reference("v1").digest == digests[chosen]


def test_a_page_for_everything_is_no_api(full, open_registry):
    full.add_image(b"layer", tag="v1")
    full.fault("/referrers/", status(200, b"<html>", Content_Type="text/html"))
    assert open_registry(full).reference("v1") is None


def test_two_pushers_read_the_same_list(full, open_registry):
    """Whoever writes last has not seen what the other wrote."""
    full.has_referrers = False
    source = full.add_image(b"layer", tag="v1")
    digests = [artifact(full, source, f"t{number}", annotations={"n": str(number)}) for number in range(2)]
    both = threading.Barrier(2)

    def together(handler):
        both.wait(10)
        handler.behave()

    full.fault(f"/manifests/{source.replace(':', '-')}", together, times=2)
    stores = [open_registry(full) for _ in digests]
    threads = [
        threading.Thread(
            target=store.tag, args=(f"t{number}", Descriptor(MANIFEST_TYPE, digest, len(full.manifests[digest][1])))
        )
        for number, (store, digest) in enumerate(zip(stores, digests, strict=True))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    listed = json.loads(full.tags()[source.replace(":", "-")])["manifests"]
    assert {item["digest"] for item in listed} == set(digests)
    writes = full.sent("PUT", "/manifests/sha256-")
    assert len(writes) == 3  # one had to begin anew


def test_a_list_that_others_undo(full, open_registry, monkeypatch):
    monkeypatch.setattr("erofsgen.store.referrers._ATTEMPTS", 3)
    full.has_referrers = False
    source = full.add_image(b"layer", tag="v1")
    digest = artifact(full, source, "lazy")
    undo = full.manifests.pop

    def undone(handler):
        undo(source.replace(":", "-"), None)
        handler.behave()

    full.fault("/manifests/sha256-", undone, times=100)
    with pytest.raises(RemoteError, match="changed by too many at once"):
        open_registry(full).tag("lazy", Descriptor(MANIFEST_TYPE, digest, len(full.manifests[digest][1])))
    assert len(full.sent("PUT", "/manifests/sha256-")) == 3


def test_entries_of_what_is_gone_are_dropped(full, open_registry):
    """A registry may refuse a list that names what its garbage collector has taken."""
    full.has_referrers = False
    source = full.add_image(b"layer", tag="v1")
    store = open_registry(full)
    digests = [artifact(full, source, f"t{number}", annotations={"n": str(number)}) for number in range(3)]
    for number, digest in enumerate(digests):
        store.tag(f"t{number}", Descriptor(MANIFEST_TYPE, digest, len(full.manifests[digest][1])))
        if number == 0:
            del full.manifests[digest]
    listed = json.loads(full.tags()[source.replace(":", "-")])["manifests"]
    assert [item["digest"] for item in listed] == digests[1:]


# --- removal ---------------------------------------------------------------------------------------------------------


def test_a_tag_is_removed_where_that_is_allowed(full, open_registry, push):
    store = open_registry(full)
    digest = push(store, "one")
    push(store, "two")
    store.untag("one")
    assert set(full.tags()) == {"two"}
    assert digest in full.manifests
    assert full.sent("DELETE", "") == ["/v2/team/app/manifests/one"]
    with pytest.raises(NotFoundError, match="no image 'one'"):
        store.untag("one")


def test_a_registry_that_deletes_nothing(full, open_registry, push, built):
    full.deletes = ()
    store = open_registry(full)
    push(store)
    with pytest.raises(UnsupportedError, match="does not delete anything"):
        store.untag("lazy")
    with pytest.raises(UnsupportedError, match="does not delete anything"):
        store.delete(built.image.packs[0].digest)
    assert set(store.references()) == {"lazy"}


# --- what is damaged -------------------------------------------------------------------------------------------------


def test_a_manifest_that_is_not_its_digest(full, open_registry, push):
    store = open_registry(full)
    digest = push(store)
    media_type, data = full.manifests[digest]
    full.manifests[digest] = media_type, data.replace(b"org.erofsgen", b"org.erofsgem")
    full.blobs[digest] = full.manifests[digest][1]
    with pytest.raises(IntegrityError):
        Image.open(store, digest)
    with pytest.raises(IntegrityError):
        Image(store, "lazy", Descriptor(MANIFEST_TYPE, digest, len(data)))


@pytest.mark.parametrize("digest", ["sha256:short", "sha512:" + "0" * 128, "../../x"])
def test_digests_are_looked_at(full, open_registry, digest):
    store = open_registry(full)
    with pytest.raises(FormatError, match="not a sha256 digest"):
        store.size(digest)
    with pytest.raises(FormatError, match="not a sha256 digest"):
        store.read(digest, 0, 1)
    assert full.requests == []


def test_a_malformed_list_of_tags(full, open_registry):
    full.fault("/tags/list", status(200, b'{"tags": 5}'))
    with pytest.raises(FormatError, match="list of tags is malformed"):
        open_registry(full).references()


def test_the_listed_descriptor_is_kept(full, open_registry, push, built):
    """What other clients read from the list: type, artifact type, annotations."""
    full.has_referrers = False
    push(open_registry(full))
    listed = json.loads(full.tags()[built.image.manifest.subject.digest.replace(":", "-")])
    assert listed["schemaVersion"] == 2
    assert listed["mediaType"] == "application/vnd.oci.image.index.v1+json"
    assert msgspec.convert(listed["manifests"], list[Descriptor])[0].artifact_type == ARTIFACT_TYPE
