"""S3: presigned URLs, credentials that end, uploads that do not, options, and what is said when things go wrong."""

from __future__ import annotations

import dataclasses
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from servers import faultproxy
from servers.faultproxy import FaultProxy, s3_error
from servers.s3 import S3Server
from storekit import Place, named, open_s3, s3_place, sha256

from erofsgen.errors import IntegrityError, NotFoundError, RemoteError, StorageError, UsageError
from erofsgen.store.open import open_store

LARGE = random.Random(5).randbytes(33 << 20)
BLOB = random.Random(6).randbytes(400_000)
DIGEST = sha256(BLOB)


@pytest.fixture
def proxy(s3_server: S3Server) -> Iterator[FaultProxy]:
    with FaultProxy(s3_server) as proxy:
        yield proxy


@pytest.fixture
def proxied(proxy: FaultProxy, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """A place in Ceph behind a proxy, with a blob."""
    place = s3_place(dataclasses.replace(s3_server, endpoint=proxy.url), monkeypatch)
    place.open().put(BLOB)
    yield place
    place.close()


def bucket_of(place: Place) -> str:
    return urlsplit(place.url).netloc


# --- ranges ----------------------------------------------------------------------------------------------------------


@pytest.mark.server
def test_one_url_serves_all_ranges_of_a_blob(proxied: Place, proxy: FaultProxy):
    store = proxied.open()
    for offset in range(0, 50_000, 10_000):
        assert store.read(DIGEST, offset, 50_000) == BLOB[offset : offset + 50_000]
    assert store.read(DIGEST, 0, len(BLOB)) == BLOB
    reads = proxy.seen(DIGEST[7:], "GET")
    assert len(reads) == 6
    assert len({request.path for request in reads}) == 1
    assert "Authorization" not in reads[0].headers
    assert parse_qs(urlsplit(reads[0].path).query)["X-Amz-Expires"] == ["3600"]
    assert store.speed is not None


@pytest.mark.server
def test_boto3_reads_ranges_where_it_is_told_to(proxied: Place, proxy: FaultProxy):
    assert proxied.open("client=boto3").read(DIGEST, 10, 100) == BLOB[10:110]
    (request,) = proxy.seen(DIGEST[7:], "GET")
    assert request.headers["Authorization"].startswith("AWS4-HMAC-SHA256")
    assert "erofsgen/" in request.headers["User-Agent"]


@pytest.mark.server
def test_a_url_that_has_expired_is_signed_anew(ceph_place: Place, monkeypatch: pytest.MonkeyPatch):
    from erofsgen.store import s3client

    monkeypatch.setattr(s3client, "_VALID", 1)
    store = ceph_place.open()
    store.put(BLOB)
    assert store.read(DIGEST, 0, 10) == BLOB[:10]
    time.sleep(2.1)
    assert store.read(DIGEST, 10, 10) == BLOB[10:20]


@pytest.mark.server
@pytest.mark.parametrize(
    ("code", "status"),
    [("ExpiredToken", 400), ("ExpiredToken", 403), ("RequestExpired", 403), ("AccessDenied", 403)],
)
def test_a_refusal_is_met_with_new_credentials_once(proxied: Place, proxy: FaultProxy, code: str, status: int):
    store = proxied.open()
    proxy.fault(DIGEST[7:], s3_error(code, status), method="GET")
    assert store.read(DIGEST, 5, 10) == BLOB[5:15]
    assert [request.status for request in proxy.seen(DIGEST[7:], "GET")] == [status, 206]
    proxy.fault(DIGEST[7:], s3_error(code, status), times=2, method="GET")
    with pytest.raises(RemoteError, match=f"{code}: injected") as caught:
        store.read(DIGEST, 5, 10)
    assert caught.value.hint
    assert [request.status for request in proxy.seen(DIGEST[7:], "GET")][2:] == [status, status]


@pytest.mark.server
def test_a_wrong_clock_is_said_to_be_wrong(proxied: Place, proxy: FaultProxy):
    proxy.fault(DIGEST[7:], s3_error("RequestTimeTooSkewed", 403), times=None, method="GET")
    for client in ("http", "boto3"):
        with pytest.raises(RemoteError, match="RequestTimeTooSkewed: injected") as caught:
            proxied.open(f"client={client}").read(DIGEST, 0, 1)
        assert "clock" in caught.value.hint


@pytest.mark.server
@pytest.mark.parametrize(
    ("wrong", "client"),
    [("aws_access_key_id", "http"), ("aws_secret_access_key", "http"), ("aws_access_key_id", "boto3")],
)
def test_credentials_that_change_are_looked_for_again(
    ceph_place: Place, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str, client: str
):
    """As when a session has ended and somebody has written new credentials for it."""
    ceph_place.open().put(BLOB)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    right = {"aws_access_key_id": s3_server.access_key, "aws_secret_access_key": s3_server.secret_key}

    def write(keys: dict[str, str]) -> None:
        lines = ["[tests]", *(f"{name} = {value}" for name, value in keys.items())]
        (tmp_path / "aws-credentials").write_text("\n".join(lines))

    write({**right, wrong: "0123456789"})
    url = f"{ceph_place.url}?profile=tests&client={client}"
    old = open_store(url)
    with pytest.raises(RemoteError):
        open_store(url).read(DIGEST, 0, 10)
    write(right)
    assert old.read(DIGEST, 0, 10) == BLOB[:10]
    old.close()


@pytest.mark.server
@pytest.mark.parametrize("client", ["http", "boto3"])
def test_failures_that_pass_are_tried_again(proxied: Place, proxy: FaultProxy, client: str):
    store = proxied.open(f"client={client}")
    for fault in (
        s3_error("SlowDown", 503), s3_error("InternalError", 500), faultproxy.reset(), faultproxy.short(10),
    ):  # fmt: skip
        proxy.fault(DIGEST[7:], fault, method="GET")
        assert store.read(DIGEST, 1000, 70_000) == BLOB[1000:71_000]
    proxy.fault(DIGEST[7:], s3_error("SlowDown", 503), times=None, method="GET")
    with pytest.raises(RemoteError, match="SlowDown: injected") as caught:
        proxied.open(f"client={client}", attempts=2).read(DIGEST, 0, 1)
    assert "rate" in caught.value.hint
    assert len(proxy.seen(DIGEST[7:], "GET")) == 4 * 2 + 2


@pytest.mark.server
@pytest.mark.parametrize("client", ["http", "boto3"])
def test_another_range_than_asked_for_is_no_answer(proxied: Place, proxy: FaultProxy, client: str):
    proxy.fault(DIGEST[7:], faultproxy.other_range(7), times=None, method="GET")
    with pytest.raises(RemoteError, match="another range"):
        proxied.open(f"client={client}").read(DIGEST, 1000, 100)


@pytest.mark.server
def test_only_ranges_go_through_a_proxy(ceph_place: Place, proxy: FaultProxy):
    ceph_place.open().put(BLOB)
    store = ceph_place.open(proxy=proxy.url)
    store.tag("name", named(1))
    assert store.size(DIGEST) == len(BLOB)
    assert store.read(DIGEST, 7, 70) == BLOB[7:77]
    (request,) = proxy.requests
    assert request.path.startswith("http://")
    assert DIGEST[7:] in request.path


@pytest.mark.server
def test_connections_come_from_the_named_addresses(ceph_place: Place):
    ceph_place.open().put(BLOB)
    assert ceph_place.open("source-address=127.0.0.2,127.0.0.3").read(DIGEST, 0, 5) == BLOB[:5]
    with pytest.raises(RemoteError, match="Cannot assign requested address"):
        ceph_place.open("source-address=192.0.2.1").read(DIGEST, 0, 5)


# --- what is written -------------------------------------------------------------------------------------------------

WRITER = """
import sys
from erofsgen.store.open import open_store
with open_store(sys.argv[1]).create() as blob:
    blob.write(sys.stdin.buffer.read())
    blob.commit()
"""


@pytest.mark.server
def test_a_writer_that_is_killed_leaves_nothing_that_can_be_seen(
    proxied: Place, proxy: FaultProxy, s3_server: S3Server
):
    digest = sha256(LARGE)
    proxy.fault(r"partNumber=2\b", faultproxy.silent(60), times=None, method="PUT")
    writer = subprocess.Popen([sys.executable, "-c", WRITER, proxied.url], stdin=subprocess.PIPE)
    writer.stdin.write(LARGE)
    writer.stdin.close()
    deadline = time.monotonic() + 60
    while {request.status for request in proxy.seen(r"partNumber=[13]\b")} != {200} and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(writer.pid, signal.SIGKILL)
    assert writer.wait(60) == -signal.SIGKILL

    client, bucket = s3_server.client(), bucket_of(proxied)
    assert len(client.list_multipart_uploads(Bucket=bucket)["Uploads"]) == 1
    store = proxied.open()
    assert store.size(digest) is None
    assert [found for found, _ in store.blobs()] == [DIGEST]
    with pytest.raises(NotFoundError):
        store.read(digest, 0, 1)
    with store.collecting():
        pass
    assert "Uploads" not in client.list_multipart_uploads(Bucket=bucket)
    proxy.faults.clear()
    assert store.put(LARGE) == (digest, len(LARGE))
    assert store.read(digest, len(LARGE) - 5, 5) == LARGE[-5:]


@pytest.mark.server
def test_an_upload_that_fails_is_aborted(proxied: Place, proxy: FaultProxy, s3_server: S3Server):
    store = proxied.open(attempts=2)
    proxy.fault(r"partNumber=2\b", s3_error("InternalError", 500), times=None, method="PUT")
    with pytest.raises(RemoteError, match="InternalError: injected") as caught:
        store.put(LARGE)
    assert caught.value.hint == "try again later"
    assert store.size(sha256(LARGE)) is None
    assert "Uploads" not in s3_server.client().list_multipart_uploads(Bucket=bucket_of(proxied))


@pytest.mark.server
def test_blobs_that_are_there_or_not_as_announced_are_not_uploaded(proxied: Place, proxy: FaultProxy):
    store = proxied.open()
    proxy.requests.clear()
    assert store.put(BLOB) == (DIGEST, len(BLOB))
    with store.create(digest=DIGEST) as blob:
        blob.write(b"other")
        with pytest.raises(IntegrityError):
            blob.commit()
    with store.create(size=3) as blob:
        blob.write(b"other")
        with pytest.raises(IntegrityError):
            blob.commit()
    assert [request.method for request in proxy.requests] == ["HEAD"]


@pytest.mark.mount
def test_a_full_disk_is_said_to_be_full(moto_place: Place, small_disk: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(small_disk))
    store = moto_place.open()
    with pytest.raises(StorageError, match="No space left on device") as caught:
        store.put(bytes(3 << 20))
    assert "XDG_CACHE_HOME" in caught.value.hint
    assert list(store.blobs()) == []
    assert store.put(BLOB) == (DIGEST, len(BLOB))
    moto_place.close()


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("AES256", {"ServerSideEncryption": "AES256"}),
        ("aws:kms", {"ServerSideEncryption": "aws:kms"}),
        (
            "aws:kms:arn:aws:kms:us-east-1:1:key/2",
            {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": "arn:aws:kms:us-east-1:1:key/2"},
        ),
    ],
)
def test_whatever_is_written_is_encrypted_as_told(
    moto_place: Place, moto_s3: S3Server, option: str, expected: dict[str, str]
):
    store = moto_place.open(f"sse={option}")
    digest, _ = store.put(LARGE)
    store.put(BLOB)
    store.tag("name", named(1))
    assert store.read(digest, 20 << 20, 10) == LARGE[20 << 20 : (20 << 20) + 10]
    client, bucket = moto_s3.client(), bucket_of(moto_place)
    objects = client.list_objects_v2(Bucket=bucket)["Contents"]
    assert len(objects) == 3
    for found in objects:
        head = client.head_object(Bucket=bucket, Key=found["Key"])
        assert {name: head.get(name) for name in expected} == expected
    moto_place.close()


@pytest.mark.server
def test_a_requester_says_that_he_pays(proxied: Place, proxy: FaultProxy):
    store = proxied.open("requester-pays=true")
    proxy.requests.clear()
    store.put(b"blob")
    store.tag("name", named(1))
    store.untag("name")
    assert store.read(DIGEST, 0, 5) == BLOB[:5]
    assert list(store.references()) == []
    assert {request.headers.get("x-amz-request-payer") for request in proxy.requests} == {"requester"}


# --- places ----------------------------------------------------------------------------------------------------------


def test_a_bucket_is_made_only_for_who_builds(moto_s3: S3Server, moto_place: Place):
    url = "s3://not-there-yet/prefix"
    for use in (
        lambda: open_store(url).references(),
        lambda: open_store(url).reference("name"),
        lambda: list(open_store(url).blobs()),
        lambda: open_store(url).read(DIGEST, 0, 1),
        lambda: open_store(url).put(b"data"),
        lambda: open_store(url).building().__enter__(),
    ):
        with pytest.raises(NotFoundError) as caught:
            use()
        assert "\n" not in str(caught.value)
    assert "not-there-yet" not in [bucket["Name"] for bucket in moto_s3.client().list_buckets()["Buckets"]]
    for _ in range(2):
        store = open_store(url, create=True)
        store.put(BLOB)
        store.close()


def test_stores_of_one_bucket_do_not_see_each_other(moto_s3: S3Server, monkeypatch: pytest.MonkeyPatch):
    bucket = s3_place(moto_s3, monkeypatch)
    places = [Place(f"s3://{bucket_of(bucket)}{prefix}", opener=open_s3) for prefix in ("", "/a", "/a/ü b/")]
    for number, place in enumerate(places):
        store = place.open()
        assert store.references() == {}
        assert list(store.blobs()) == []
        with store.building():
            store.put(b"%d" % number)
            store.tag(f"name-{number}", named(number))
    for number, place in enumerate(places):
        (store,) = place.opened
        assert list(store.references()) == [f"name-{number}"]
        assert [digest for digest, _ in store.blobs()] == [sha256(b"%d" % number)]
        place.close()
    assert len({place.opened[0].scratch for place in places}) == 3


@pytest.mark.server
def test_public_images_need_no_credentials(ceph_place: Place, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch):
    writer = ceph_place.open()
    writer.put(BLOB)
    writer.tag("docker.io/library/name:1", named(1))
    client, bucket = s3_server.client(), bucket_of(ceph_place)
    for found in client.list_objects_v2(Bucket=bucket)["Contents"]:
        client.put_object_acl(Bucket=bucket, Key=found["Key"], ACL="public-read")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for reader in (ceph_place.open("anonymous=true"), ceph_place.open("anonymous=true&client=boto3")):
        assert reader.read(DIGEST, 50, 50) == BLOB[50:100]
        assert reader.size(DIGEST) == len(BLOB)
        assert reader.reference("docker.io/library/name:1").digest == named(1).digest
        assert reader.reference("name:1") is None  # which is denied to who may not list
        with pytest.raises(RemoteError, match="403") as caught:
            reader.references()
        assert caught.value.hint
    with pytest.raises(RemoteError, match="redentials") as caught:
        open_store(ceph_place.url).read(DIGEST, 0, 1)
    assert "anonymous=true" in caught.value.hint


@pytest.mark.server
@pytest.mark.parametrize("client", ["http", "boto3"])
def test_a_wrong_secret_is_refused_in_one_line(ceph_place: Place, monkeypatch: pytest.MonkeyPatch, client: str):
    ceph_place.open().put(BLOB)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    store = open_store(f"{ceph_place.url}?client={client}")
    for use in (
        store.references,
        lambda: store.read(DIGEST, 0, 1),
        lambda: store.size(DIGEST),
        lambda: store.put(b"data"),
        lambda: store.building().__enter__(),
    ):
        with pytest.raises(RemoteError, match="403") as caught:
            use()
        assert caught.value.exit_code == 6
        assert "\n" not in str(caught.value)
        assert "credentials" in caught.value.hint
    store.close()


@pytest.mark.server
def test_a_name_that_is_too_long_is_refused(ceph_place: Place):
    store = ceph_place.open()
    store.check_name("漢" * 90)
    store.tag("漢" * 90, named(1))
    with pytest.raises(UsageError, match="too long"):
        store.check_name("漢" * 200)
    with pytest.raises(RemoteError) as caught:
        store.tag("漢" * 200, named(1))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "match"),
    [
        ("s3://", "not the name of a bucket"),
        ("s3:///prefix", "not the name of a bucket"),
        ("s3://bu cket", "not the name of a bucket"),
        ("s3://bucket?client=curl", "client is http or boto3"),
        ("s3://bucket?sse=rot13", "sse is AES256"),
        ("s3://bucket?path-style=maybe", "path-style is true or false"),
        ("s3://bucket?anonymous=maybe", "anonymous is true or false"),
        ("s3://bucket?regoin=x", "unknown option 'regoin'"),
        ("s3://bucket?endpoint=host:80", "Invalid endpoint"),
    ],
)
def test_what_is_wrong_with_a_url_is_said(url: str, match: str):
    with pytest.raises(UsageError, match=match):
        open_store(url)


@pytest.mark.parametrize(("option", "path"), [("true", "/bucket-x/"), ("false", "/")])
def test_the_buckets_name_is_where_it_shall_be(moto_place: Place, option: str, path: str):
    from erofsgen.oci.patience import Policy
    from erofsgen.store.open import Options
    from erofsgen.store.s3 import S3Objects, parse

    settings = parse("s3://bucket-x", Options("", f"path-style={option}&endpoint=http://s3.example.org"))
    location = S3Objects(settings, policy=Policy())._locate("key", None)
    url = urlsplit(location.url)
    assert url.path == f"{path}key"
    assert url.netloc == ("s3.example.org" if option == "true" else "bucket-x.s3.example.org")


def test_services_and_profiles_that_are_not_there(moto_place: Place, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(RemoteError, match=r"profile \(nobody\) could not be found"):
        open_store("s3://bucket?profile=nobody")
    store = open_store("s3://bucket?endpoint=http://127.0.0.1:9", attempts=1)
    for use in (store.references, lambda: store.read(DIGEST, 0, 1)):
        with pytest.raises(RemoteError, match=r"127\.0\.0\.1:9") as caught:
            use()
        assert "network" in caught.value.hint
        assert "?" not in str(caught.value)
