"""Real images, built and mounted by the kernel, against independent tools: umoci, fsck.erofs, dump.erofs, zstd, mount.

Every entry is compared: type, mode, owner, mtime to the nanosecond, size, content, xattrs, link groups, device number.
"""

from __future__ import annotations

import hashlib
import stat
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
from lazykit import Host
from samples import assert_same, whole_tree
from servers import docker_registry
from stockkit import devices_by_zstd, index_by_zstd

from erofsgen.build.pipeline import build_image
from erofsgen.host.mount.mounts import mount, unmount
from erofsgen.oci.images import open_image
from erofsgen.store.directory import DirectoryStore
from erofsgen.store.image import Image

pytestmark = [pytest.mark.mount, pytest.mark.usefixtures("require_root")]


@pytest.fixture(scope="module")
def image(demo_store) -> Image:
    return Image.open(demo_store, "demo")


@pytest.mark.parametrize("via", ["file-backed", "loop"])
def test_the_kernel_shows_what_umoci_unpacks(image, expected, tmp_path, mount_point, via):
    root = tmp_path / "host"
    mount(image, mount_point, root=root, via=via)
    assert_same(whole_tree(mount_point), expected)
    unmount(mount_point, root=root)


@pytest.mark.server
def test_an_image_from_a_registry(demo_image, image, tmp_path):
    """The same blobs come of it, and so the same tree."""
    store = DirectoryStore(tmp_path / "pulled")
    with docker_registry(tmp_path / "registry") as address:
        name = f"docker://{address}/demo:v1"
        copy = ["skopeo", "copy", "--quiet", "--dest-tls-verify=false", f"oci:{demo_image.reference}", name]
        subprocess.run(copy, check=True)
        with open_image(name, downloads=store.downloads) as source:
            build_image(source, store, tag="demo")
    from_registry = Image.open(store, "demo")
    assert from_registry.manifest.layers == image.manifest.layers
    for layer in image.manifest.layers:
        assert digest_of(store.blob_path(layer.digest)) == layer.digest
    assert list(store.downloads.iterdir()) == []


def digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


class ByZstd(NamedTuple):
    """Where stock zstd has put the index and every pack; raw ones are as they were."""

    index: Path
    devices: list[Path]


@pytest.fixture(scope="module")
def by_zstd(demo_store, image, tmp_path_factory) -> ByZstd:
    directory = tmp_path_factory.mktemp("by-zstd")
    return ByZstd(index_by_zstd(demo_store, image, directory), devices_by_zstd(demo_store, image, directory))


def test_stock_tools_alone_mount_it(by_zstd, expected, mount_point):
    """zstd, losetup and mount(8); nothing of ours runs."""
    loops: list[str] = []
    try:
        for path in (by_zstd.index, *by_zstd.devices):
            done = subprocess.run(
                ["losetup", "--read-only", "--show", "--find", path], check=True, capture_output=True, text=True
            )
            loops.append(done.stdout.strip())
        options = ",".join(["ro", *(f"device={loop}" for loop in loops[1:])])
        subprocess.run(["mount", "-t", "erofs", "-o", options, loops[0], mount_point], check=True)
        assert_same(whole_tree(mount_point), expected)
    finally:
        subprocess.run(["umount", "--lazy", mount_point], check=False)
        for loop in loops:
            subprocess.run(["losetup", "--detach", loop], check=True)


def test_fsck_extracts_the_same(image, by_zstd, expected, tmp_path, erofs_utils):
    """erofs-utils read the index and the packs with code that is not the kernel's either.

    No release up to 1.9.4 extracts holes at the end of a file: it leaves them out, and the file is too short.
    """
    options = [f"--device={path}" for path in by_zstd.devices]
    command = [erofs_utils / "fsck.erofs", *options, f"--extract={tmp_path / 'out'}", by_zstd.index]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    extracted = {path: _comparable(entry) for path, entry in whole_tree(tmp_path / "out").items()}
    theirs = {path: _comparable(entry) for path, entry in expected.items()}
    for path, node in image.index.walk():
        if stat.S_ISREG(node.mode) and any(extent.device is None for extent in node.extents()):
            del extracted[path], theirs[path]
    assert_same(extracted, theirs)


def _comparable(entry: tuple) -> tuple:
    mode, uid, gid, mtime, *rest = entry
    return mode, uid, gid, mtime if stat.S_ISREG(mode) else None, *rest[:2]


def test_dump_agrees_on_the_superblock(by_zstd, expected, erofs_utils):
    options = [f"--device={path}" for path in by_zstd.devices]
    inodes = len({entry[7] if len(entry) > 7 else path for path, entry in expected.items()})
    for tool in ("dump.erofs", erofs_utils / "dump.erofs"):
        done = subprocess.run([tool, *options, "-s", by_zstd.index], capture_output=True, text=True, check=True)
        fields = dict(line.split(":", 1) for line in done.stdout.splitlines() if ":" in line)
        assert int(fields["Filesystem inode count"]) == inodes
        assert {"sb_csum", "chunked_file", "device_table"} <= set(fields["Filesystem features"].split())


@pytest.mark.parametrize("plane", ["fanotify", "blockfuse", "fuse"])
def test_a_lazy_mount_is_the_same_and_brings_what_is_used(image, expected, tmp_path, mount_point, plane):
    """From an empty cache: an import out of the mount, then every byte of the tree."""
    host = Host(tmp_path / "host", plane)
    try:
        host.mount(image, mount_point)
        program = "import numpy, scipy; print(numpy.sum(numpy.arange(5)))"
        environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONDONTWRITEBYTECODE": "1"}
        result = subprocess.run(
            ["chroot", mount_point, "/usr/bin/python3", "-c", program],
            capture_output=True,
            text=True,
            env=environment,
            timeout=60,
        )
        assert (result.stdout, result.stderr) == ("10\n", "")
        engine = host.engine()
        size = sum(pack.device_size for pack in image.packs)
        print(
            f"\n{plane}, import of numpy and scipy: {engine['bytes_written'] / 1e6:.1f} of {size / 1e6:.1f} MB,",
            f"{engine['bytes_fetched'] / 1e6:.1f} MB fetched",
        )
        assert engine["bytes_written"] < size / 2
        assert_same(whole_tree(mount_point), expected)
        assert host.status()["denied"] == 0
        unmount(mount_point, root=host.root)
    finally:
        host.end()
