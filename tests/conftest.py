"""Fixtures every part's tests share: real images, an independent unpacker's opinion of them, a store, root, servers."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import imagemaker
from handmade import ImageMaker
from servers import ceph, moto, nginx
from servers.s3 import S3Server

from erofsgen.host import linux
from erofsgen.store.directory import DirectoryStore


@pytest.fixture(scope="session")
def demo_image() -> imagemaker.Image:
    """The demo image: Debian 12, PyPI packages and a small application, an OCI layout with three gzip layers.

    ``demo_image.reference`` goes behind ``oci:``; ``.layout`` is the directory, ``.tag`` its one tag.
    """
    return imagemaker.demo_image()


@pytest.fixture(scope="session")
def demo_store(demo_image: imagemaker.Image, tmp_path_factory: pytest.TempPathFactory) -> DirectoryStore:
    """A store with the demo image as ``demo``, built by the program. Add images to it, but remove none."""
    path = tmp_path_factory.mktemp("demo") / "store"
    program = Path(sys.executable).with_name("erofsgen")
    command = [program, "--store", path, "--quiet", "build", f"oci:{demo_image.reference}", "--tag", "demo"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return DirectoryStore(path)


@pytest.fixture(scope="session")
def umoci_unpacked(demo_image: imagemaker.Image) -> Path:
    """The demo image's root file system, by :func:`imagemaker.unpacked`. Read only!"""
    if os.geteuid() != 0:
        pytest.skip("unpacking with owners and devices needs root")
    return imagemaker.unpacked(demo_image)


@pytest.fixture(scope="session")
def require_root() -> None:
    """Skips where the test cannot mount; on a CI machine that is a failure, not a skip."""
    if os.geteuid() != 0:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("needs root")


@pytest.fixture
def store_dir(tmp_path: Path) -> Path:
    """Where a test's own store goes; it does not exist yet."""
    return tmp_path / "store"


@pytest.fixture
def maker(store_dir: Path) -> ImageMaker:
    return ImageMaker(DirectoryStore(store_dir))


@pytest.fixture
def root(tmp_path: Path, require_root: None) -> Iterator[Path]:
    """A root for the host cache. Whatever is still mounted below the test's directory afterwards is unmounted."""
    yield tmp_path / "root"
    while left := [point for point in linux.mount_points() if point.target.startswith(f"{tmp_path}/")]:
        linux.umount(left[-1].target, linux.MNT_DETACH)


@pytest.fixture
def mount_point(tmp_path: Path, require_root: None) -> Iterator[Path]:
    """An empty directory to mount on. Whatever is still mounted there afterwards is unmounted, lazily."""
    target = tmp_path / "mnt"
    target.mkdir()
    yield target
    while os.path.ismount(target):
        subprocess.run(["umount", "--lazy", str(target)], check=True)


@pytest.fixture(scope="session")
def erofs_utils() -> Path:
    """A directory with a current fsck.erofs and dump.erofs.

    Those of Debian 12 (1.5) do not look up plain inodes in the unified address space; kernels and 1.8 do.
    """
    fetch = Path(__file__).parents[1] / "packaging" / "fetch-erofs-utils"
    return Path(subprocess.run([fetch], check=True, capture_output=True, text=True).stdout.strip()).parent


@pytest.fixture(scope="session")
def botocore_models() -> None:
    """boto3's clients share what they read of its files on S3. To read it for each is half of what tests of S3 take."""
    from botocore import session  # takes a third of a second, which most test runs need not spend

    session.create_loader = functools.cache(session.create_loader)


@pytest.fixture(scope="session")
def s3_server(botocore_models: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """Ceph's S3 service. All tests share it; each makes its own ``bucket()``."""
    with ceph.ceph_rgw(tmp_path_factory.mktemp("ceph")) as server:
        yield server


@pytest.fixture(scope="session")
def moto_s3(botocore_models: None) -> Iterator[S3Server]:
    """An S3 service in this process that checks no signatures. All tests share it; each makes its own ``bucket()``."""
    with moto.moto_s3() as server:
        yield server


@pytest.fixture
def nginx_static(tmp_path: Path) -> Iterator[nginx.StaticServer]:
    """nginx that serves the files a test puts in ``nginx_static.directory``."""
    directory = tmp_path / "www"
    directory.mkdir()
    with nginx.nginx(tmp_path / "nginx", nginx.static_files(directory)) as url:
        yield nginx.StaticServer(url, directory)
