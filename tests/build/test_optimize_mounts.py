"""Optimized images as the kernel, every plane and erofs-utils read them: the same files as before."""

from __future__ import annotations

import os
import random
import subprocess
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from handmade import read_tree
from lazykit import Host, eventually
from stockkit import devices_by_zstd, index_by_zstd

from erofsgen.build.optimize import Optimized, optimize
from erofsgen.host.cache.cache import HostCache
from erofsgen.host.mount.mounts import mount, unmount
from erofsgen.host.prefetch.start import Start
from erofsgen.profile.chunks import Chunks
from erofsgen.profile.profile import RECORDED, ROW, Profile, ordered
from erofsgen.store.directory import DirectoryStore
from erofsgen.store.image import Image

pytestmark = [pytest.mark.mount, pytest.mark.usefixtures("require_root")]

CHUNK = 16 << 10


class Case(NamedTuple):
    store: DirectoryStore
    files: dict[str, bytes]
    before: Image
    after: Image
    optimized: Optimized


def every_third(image: Image) -> Profile:
    """A profile that touches every third chunk of an image, in an order of its own."""
    table = Chunks(image.index).table
    touched = np.random.default_rng(7).permutation(table)[::3]
    rows = np.zeros(len(touched), ROW)
    rows["pack"] = touched["device"] - 1
    rows["block"], rows["length"] = touched["block"], touched["length"]
    rows["first"], rows["seen"] = np.arange(len(touched)), 1
    return Profile("run", 1, [pack.hex for pack in image.packs], [RECORDED], ordered(rows))


@pytest.fixture
def case(make_image, tmp_path: Path) -> Case:
    """An image of several packs with files of all sizes, among them one with zeros before data."""
    store = DirectoryStore(tmp_path / "store")
    generator = random.Random(3)
    files = {}
    for number in range(150):
        size = generator.choice([10, generator.randrange(100, 5000), generator.randrange(5000, 6 * CHUNK)])
        data = generator.randbytes(size) if number % 2 else b"%d words of text " % number * (size // 16)
        files[f"d{number % 7}/f{number}"] = data
    files["sparse"] = generator.randbytes(CHUNK) + bytes(5 * CHUNK) + generator.randbytes(100)
    files["big"] = generator.randbytes(3 << 20)
    made = {name.encode(): data for name, data in files.items()}
    make_image(store, "image", made, chunk_size=CHUNK, pack_size=1 << 20, share_pages=True)
    before = Image.open(store, "image")
    assert len(before.packs) > 4
    optimized = optimize(before, [every_third(before)])
    return Case(store, files, before, Image.open(store, "image"), optimized)


@pytest.mark.parametrize("via", ["file-backed", "loop"])
def test_the_kernel_reads_the_same(case: Case, tmp_path: Path, mount_point: Path, via):
    mount(case.after, mount_point, root=tmp_path / "host", via=via)
    try:
        assert read_tree(mount_point) == case.files
    finally:
        unmount(mount_point, root=tmp_path / "host")


@pytest.mark.parametrize("plane", ["blockfuse", "fuse"])
def test_other_planes_read_the_same(case: Case, tmp_path: Path, mount_point: Path, plane):
    host = Host(tmp_path / "host", plane)
    try:
        host.mount(case.after, mount_point)
        assert read_tree(mount_point) == case.files
    finally:
        if os.path.ismount(mount_point):
            unmount(mount_point, root=host.root)
        host.end()


def test_erofs_utils_accept_it(case: Case, tmp_path: Path, erofs_utils: Path):
    """With devices, and in one piece. They extract no holes at the end of files; here are none."""
    index = index_by_zstd(case.store, case.after, tmp_path)
    devices = [f"--device={path}" for path in devices_by_zstd(case.store, case.after, tmp_path)]
    flat = HostCache(tmp_path / "host").materialise_flat(case.after)
    for number, command in enumerate(([*devices, index], [flat])):
        out = tmp_path / f"out{number}"
        subprocess.run([erofs_utils / "fsck.erofs", *command], check=True, stdout=subprocess.DEVNULL)
        extract = [erofs_utils / "fsck.erofs", f"--extract={out}", "--no-preserve", *command]
        subprocess.run(extract, check=True, stdout=subprocess.DEVNULL)
        assert read_tree(out) == case.files
        shown = subprocess.run([erofs_utils / "dump.erofs", "-s", *command], check=True, capture_output=True, text=True)
        assert "sb_csum" in shown.stdout


def test_zeros_are_extracted_as_holes(case: Case):
    """The chunk of zeros is hot, and has a frame of its own again."""
    image = case.after
    node = image.index.lookup(b"sparse")
    slots = {extent.device for extent in node.extents()}
    assert image.packs[-1].hot is not None
    assert len(image.packs) in slots
    holes = [extent for extent in image.sparse_extents(node) if extent.device is None]
    assert sum(extent.length for extent in holes) == 5 * CHUNK


def test_a_start_is_the_hot_pack(case: Case, tmp_path: Path, mount_point: Path):
    """The profile that lies beside the image is replayed: the hot pack arrives, in one range, and nothing else."""
    host = Host(tmp_path / "host", "fanotify", read_ahead=0)
    host.start("--worker=--complete-at", "--worker=2")
    try:
        host.mount(case.after, mount_point, start=Start(command="run", mode="profile"))
        cache = HostCache(host.root)
        frames: dict[str, tuple[int, int]] = {}

        def arrived() -> bool:
            for pack in case.after.packs:
                file = cache.open_pack(pack)
                frames[pack.hex] = file.presence.count(), len(case.after.pack_reader(pack.slot).toc)
                file.close()
            return frames[case.after.packs[-1].hex][0] == frames[case.after.packs[-1].hex][1]

        eventually(arrived)
        assert [pack.hex for pack in case.after.packs if frames[pack.hex][0]] == [case.after.packs[-1].hex]
        assert host.engine()["reads"] == 1
        # which has whatever the command touches
        (moved,) = case.optimized.moved
        assert set(moved.packs) == {case.after.packs[-1].hex}
        assert read_tree(mount_point) == case.files
    finally:
        unmount(mount_point, root=host.root)
        host.end()
