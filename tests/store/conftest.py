"""Stores of every kind that can be written to.

To have a kind tested as the others are: a fixture ``NAME_place`` here, and its name in ``KINDS``.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from servers.s3 import S3Server
from storekit import Place, s3_place

from erofsgen.store.base import Store

KINDS = ["directory", "moto", "moto_boto3", pytest.param("ceph", marks=pytest.mark.server)]


@pytest.fixture(autouse=True)
def own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Builders' files about stores stay in the test's directory; what this machine's user has set up is not seen."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "aws-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "aws-credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    """A place of every kind, with an empty store."""
    place: Place = request.getfixturevalue(f"{request.param}_place")
    yield place
    place.close()


@pytest.fixture
def any_store(place: Place) -> Store:
    return place.open()


@pytest.fixture
def directory_place(store_dir: Path) -> Place:
    return Place(str(store_dir))


@pytest.fixture
def moto_place(moto_s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Place:
    return s3_place(moto_s3, monkeypatch)


@pytest.fixture
def moto_boto3_place(moto_s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Place:
    return s3_place(moto_s3, monkeypatch, "?client=boto3")


@pytest.fixture
def ceph_place(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    place = s3_place(s3_server, monkeypatch)
    yield place
    place.close()


@pytest.fixture
def small_disk(mount_point: Path) -> Path:
    """A file system of one MiB."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "none", mount_point], check=True)
    return mount_point
