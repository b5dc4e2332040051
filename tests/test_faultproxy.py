"""The fault-injecting proxy changes nothing unasked, and what it is asked to."""

from __future__ import annotations

import dataclasses
import gzip
import socket
import time

import httpx
import pytest
from botocore.exceptions import ClientError
from servers import faultproxy, nginx
from servers.faultproxy import FaultProxy, s3_error

pytestmark = pytest.mark.server

BODY = bytes(range(256)) * 40
RANGE = {"Range": "bytes=100-199"}


@pytest.fixture
def proxy(nginx_static):
    (nginx_static.directory / "file").write_bytes(BODY)
    with FaultProxy(nginx_static.url) as proxy:
        yield proxy


@pytest.fixture
def client(proxy):
    with httpx.Client(base_url=proxy.url, timeout=5) as client:
        yield client


@pytest.fixture
def s3(s3_server):
    """A proxy, the service behind it as its clients see it, and a bucket with BODY in it."""
    bucket = s3_server.bucket()
    s3_server.client().put_object(Bucket=bucket, Key="file", Body=BODY)
    with FaultProxy(s3_server) as proxy:
        yield proxy, dataclasses.replace(s3_server, endpoint=proxy.url), bucket


def test_without_a_fault_everything_passes(client, proxy):
    assert client.get("/file").content == BODY
    partial = client.get("/file", headers=RANGE)
    assert (partial.status_code, partial.content) == (206, BODY[100:200])
    assert client.head("/file").headers["Content-Length"] == str(len(BODY))
    assert client.get("/absent?x=1").status_code == 404
    assert [(request.method, request.path, request.status) for request in proxy.requests] == [
        ("GET", "/file", 200), ("GET", "/file", 206), ("HEAD", "/file", 200), ("GET", "/absent?x=1", 404),
    ]  # fmt: skip
    assert [request.headers.get("range") for request in proxy.seen("^/file$", "GET")] == [None, "bytes=100-199"]


def test_a_fault_applies_as_often_as_told_to_what_it_names(client, proxy):
    proxy.fault("^/file", faultproxy.status(503, b"later", Retry_After="7"), times=2, method="GET")
    assert client.head("/file").status_code == 200
    for _ in range(2):
        answer = client.get("/file")
        assert (answer.status_code, answer.content, answer.headers["Retry-After"]) == (503, b"later", "7")
    assert client.get("/file").status_code == 200
    proxy.fault("^/file", faultproxy.status(404), times=None)
    assert {client.get("/file").status_code for _ in range(5)} == {404}


@pytest.mark.parametrize(
    ("action", "expected"),
    [
        (faultproxy.short_lie(10), BODY[100:190]),
        (faultproxy.long(10), BODY[100:200] + bytes(10)),
        (faultproxy.flip(3), BODY[100:103] + bytes([103 ^ 0x10]) + BODY[104:200]),
        (faultproxy.other_range(50), BODY[150:250]),
        (faultproxy.other_range(50, lie=True), BODY[150:250]),
        (faultproxy.ignore_range, BODY),
        (faultproxy.gzip_encoded(), BODY[100:200]),
        (faultproxy.drip(10, 0.001), BODY[100:200]),
        (faultproxy.delay(0.01), BODY[100:200]),
    ],
    ids=["short_lie", "long", "flip", "other_range", "other_range_lie", "ignore_range", "gzip", "drip", "delay"],
)
def test_other_bodies(client, proxy, action, expected):
    """All of them leave the connection fit for use."""
    proxy.fault("file", action)
    assert client.get("/file", headers=RANGE).content == expected
    assert client.get("/file", headers=RANGE).content == BODY[100:200]


def test_what_else_is_said_about_other_bodies(client, proxy):
    def headers_with(action):
        proxy.fault("file", action)
        return client.get("/file", headers=RANGE).headers

    assert headers_with(faultproxy.other_range(50))["Content-Range"] == f"bytes 150-249/{len(BODY)}"
    assert headers_with(faultproxy.other_range(50, lie=True))["Content-Range"] == f"bytes 100-199/{len(BODY)}"
    assert "Content-Range" not in headers_with(faultproxy.ignore_range)
    assert headers_with(faultproxy.gzip_encoded())["Content-Encoding"] == "gzip"
    assert headers_with(faultproxy.redirect("http://elsewhere/", 302))["Location"] == "http://elsewhere/"


def test_broken_connections(client, proxy):
    proxy.fault("file", faultproxy.short(50))
    with pytest.raises(httpx.RemoteProtocolError, match="received 50 bytes, expected 100"):
        client.get("/file", headers=RANGE)
    proxy.fault("file", faultproxy.silent(0.1))
    with pytest.raises(httpx.RemoteProtocolError, match="without sending a response"):
        client.get("/file")
    proxy.fault("file", faultproxy.silent(60))
    with pytest.raises(httpx.ReadTimeout):
        client.get("/file", timeout=0.1)
    proxy.fault("file", faultproxy.reset())
    with socket.create_connection(("127.0.0.1", int(proxy.url.rpartition(":")[2]))) as connection:
        connection.sendall(b"GET /file HTTP/1.1\r\nHost: x\r\n\r\n")
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
    assert client.get("/file").content == BODY


def test_latency_and_rates(client, proxy):
    def seconds():
        begin = time.monotonic()
        assert client.get("/file").content == BODY
        return time.monotonic() - begin

    unlimited = min(seconds() for _ in range(5))
    assert unlimited < 0.1
    proxy.latency = 0.2
    assert seconds() >= 0.2
    proxy.latency, proxy.rate = 0, len(BODY) * 5
    assert seconds() >= 0.15
    proxy.rate, proxy.total_rate = None, len(BODY) * 5
    assert seconds() >= 0.15


def test_chunked_bodies(tmp_path):
    """As nginx sends what it compresses on the fly: passed on as they came, and altered."""
    (tmp_path / "file").write_bytes(BODY)

    def http(port):
        return f"gzip on; gzip_types *; server {{ listen 127.0.0.1:{port}; root {tmp_path}; }}"

    with nginx.nginx(tmp_path / "nginx", http) as url, FaultProxy(url) as proxy, httpx.Client() as client:
        passed = client.get(f"{proxy.url}/file")
        assert (passed.content, passed.headers["Transfer-Encoding"]) == (BODY, "chunked")
        proxy.fault("file", faultproxy.gzip_encoded())
        twice = client.get(f"{proxy.url}/file")
        assert gzip.decompress(twice.content) == BODY
        assert "Transfer-Encoding" not in twice.headers
        assert client.post(f"{proxy.url}/file", content=iter([BODY, BODY])).status_code == 405
        assert client.get(f"{proxy.url}/file").content == BODY


def test_signed_requests_stay_valid(s3):
    proxy, server, bucket = s3
    client = server.client()
    client.put_object(Bucket=bucket, Key="a b/ü", Body=BODY)
    assert proxy.seen("a%20b")[0].headers["Expect"] == "100-continue"
    assert client.get_object(Bucket=bucket, Key="a b/ü", Range="bytes=100-199")["Body"].read() == BODY[100:200]
    keys = [entry["Key"] for entry in client.list_objects_v2(Bucket=bucket, Prefix="a ")["Contents"]]
    assert keys == ["a b/ü"]
    proxy.fault("file", faultproxy.other_range(50))
    assert client.get_object(Bucket=bucket, Key="file", Range="bytes=100-199")["Body"].read() == BODY[150:250]
    proxy.fault("file", faultproxy.ignore_range)
    assert client.get_object(Bucket=bucket, Key="file", Range="bytes=100-199")["Body"].read() == BODY


def test_errors_worded_as_s3_does(s3):
    proxy, server, bucket = s3
    client = server.client()
    proxy.fault("file", s3_error("ExpiredToken", 400))
    with pytest.raises(ClientError, match="ExpiredToken"):
        client.get_object(Bucket=bucket, Key="file")
    proxy.fault("new", s3_error("AccessDenied", 403))
    with pytest.raises(ClientError, match="AccessDenied"):
        client.put_object(Bucket=bucket, Key="new", Body=BODY)
    client.put_object(Bucket=bucket, Key="new", Body=BODY)
