"""The servers the other tests rely on do what those tests take for granted."""

from __future__ import annotations

import dataclasses

import httpx
import pytest
from botocore.exceptions import ClientError

pytestmark = pytest.mark.server


def test_ceph_serves_ranges_to_those_who_sign(s3_server):
    bucket, client = s3_server.bucket(), s3_server.client()
    client.put_object(Bucket=bucket, Key="key", Body=b"0123456789")
    answer = client.get_object(Bucket=bucket, Key="key", Range="bytes=2-4")
    assert (answer["Body"].read(), answer["ContentRange"]) == (b"234", "bytes 2-4/10")
    with pytest.raises(ClientError, match="SignatureDoesNotMatch"):
        dataclasses.replace(s3_server, secret_key="wrong").client().get_object(Bucket=bucket, Key="key")
    assert httpx.get(f"{s3_server.endpoint}/{bucket}/key").status_code == 403


def test_moto_serves_ranges(moto_s3):
    bucket, client = moto_s3.bucket(), moto_s3.client()
    client.put_object(Bucket=bucket, Key="key", Body=b"0123456789")
    assert client.get_object(Bucket=bucket, Key="key", Range="bytes=2-4")["Body"].read() == b"234"


def test_nginx_serves_files_and_ranges_and_lists_nothing(nginx_static):
    (nginx_static.directory / "file").write_bytes(b"0123456789")
    answer = httpx.get(f"{nginx_static.url}/file", headers={"Range": "bytes=2-4"})
    assert (answer.status_code, answer.content) == (206, b"234")
    assert httpx.get(nginx_static.url).status_code == 403
