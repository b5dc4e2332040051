"""Stores that are away or damaged, and a cache that has no room: errors, never wrong bytes, and an end to them."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fusekit import EACH_PLANE, ONLY_FUSE, Site, Variant
from handmade import CHUNK, Sample, make_wide, read_tree
from lazykit import Reader, eventually

from erofsgen.cli.main import run
from erofsgen.host.cache.cache import HostCache
from erofsgen.host.pull import complete
from erofsgen.store.directory import DirectoryStore

pytestmark = [pytest.mark.mount, pytest.mark.usefixtures("require_root")]


def is_eio(result: bytes | OSError) -> bool:
    return isinstance(result, OSError) and result.errno == errno.EIO


def test_a_store_that_is_away(site: Site, wide: Sample) -> None:
    target = site.mount(wide.image, read_ahead=128)
    assert Reader(target / "two", 0, CHUNK).get() == wide.files["two"][:CHUNK]  # type: ignore[index]
    away = site.store.with_name("away")
    site.store.rename(away)
    try:
        started = time.monotonic()
        assert is_eio(Reader(target / "one").get(within=60))
        assert time.monotonic() - started < 45
        assert str(site.store) in site.host.status()["errors"][-1]["error"]
        assert sorted(os.listdir(target)) == ["all", "one", "three", "two"]
        assert Reader(target / "two", 0, CHUNK).get() == wide.files["two"][:CHUNK]  # type: ignore[index]
    finally:
        away.rename(site.store)
    eventually(lambda: Reader(target / "one").get() == wide.files["one"][:4096])  # type: ignore[index]
    assert read_tree(target) == wide.files


@ONLY_FUSE
def test_a_read_does_not_outlive_its_deadline(make_site: Callable[..., Site], variant: Variant) -> None:
    site = make_site(variant, deadline=1)
    wide = make_wide(site.maker)
    target = site.mount(wide.image, read_ahead=128)
    worker = site.host.running("worker")["worker"]
    os.kill(worker, signal.SIGSTOP)
    try:
        started = time.monotonic()
        assert is_eio(Reader(target / "one").get())
        assert time.monotonic() - started < 6
        assert "not here in time" in site.host.status()["errors"][-1]["error"]
    finally:
        os.kill(worker, signal.SIGCONT)
    eventually(lambda: Reader(target / "one").get() == wide.files["one"][:4096])  # type: ignore[index]
    assert read_tree(target) == wide.files


def test_a_bad_frame_is_never_seen(site: Site, wide: Sample) -> None:
    """Raw, so that the frame's bytes are the blob's."""
    right = wide.files["two"]
    assert isinstance(right, bytes)
    blob = DirectoryStore(site.store).blob_path(wide.image.packs[1].digest)
    with blob.open("r+b") as file:
        file.seek(3 * CHUNK + 5)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    target = site.mount(wide.image, read_ahead=128)
    for offset in (2 * CHUNK, 0, 3 * CHUNK):
        assert is_eio(Reader(target / "two", offset).get())
    assert "differs from its digest" in site.host.status()["errors"][-1]["error"]
    assert Reader(target / "two", 60 * CHUNK).get() == right[60 * CHUNK :][:4096]
    with blob.open("r+b") as file:
        file.seek(3 * CHUNK + 5)
        file.write(byte)
    eventually(lambda: Reader(target / "two", 2 * CHUNK).get() == right[2 * CHUNK :][:4096])
    assert read_tree(target) == wide.files


@EACH_PLANE
def test_a_full_cache_is_an_error_and_heals(own_site: Site) -> None:
    """Half of the image fits: nothing in use is given up; once it is not in use, it makes room for another."""
    site, wide = own_site, make_wide(own_site.maker)
    other = site.maker.image("other", {"copy": wide.files["two"]}, wide.packs[1:2])
    cache = HostCache(site.host.root, max_bytes=8 << 20)
    target = site.mount(wide.image)
    results = {name: Reader(target / name, 0, 96 * CHUNK).get() for name in ("one", "two")}
    assert results["one"] == wide.files["one"]
    assert is_eio(results["two"])
    assert Reader(target / "one", 0, 96 * CHUNK).get() == wide.files["one"]
    site.unmount(target)
    eventually(lambda: site.host.status()["servers"] == 0)
    target = site.mount(other)
    assert Reader(target / "copy", 0, 96 * CHUNK).get() == wide.files["two"]
    assert cache.layout.allocated() <= 8 << 20


def test_what_a_server_has_open_stays_in_the_cache(site: Site, wide: Sample) -> None:
    target = site.mount(wide.image)
    right = wide.files["one"]
    assert isinstance(right, bytes)
    assert Reader(target / "one", 0, len(right)).get() == right
    frames = site.host.engine()["frames"]
    root = ["--root", str(site.host.root), "--store", str(site.store)]
    packs = [site.cache.files(pack.hex).data for pack in wide.image.packs]
    before = [path.stat().st_blocks for path in packs]
    for command in (["cache", "gc", "--images"], ["cache", "clear"]):
        run([*root, *command])
        assert [path.stat().st_blocks for path in packs] == before, command
    Path("/proc/sys/vm/drop_caches").write_text("1")
    assert Reader(target / "one", 0, len(right)).get() == right
    assert site.host.engine()["frames"] == frames, "nothing was fetched again"
    site.unmount(target)
    eventually(lambda: site.host.status()["servers"] == 0)

    def cleared() -> bool:
        run([*root, "cache", "clear"])
        return not any(path.exists() for path in packs)

    eventually(cleared)
    again = site.mount(wide.image)
    assert read_tree(again) == wide.files


@ONLY_FUSE
def test_what_a_command_has_completed_can_be_removed(site: Site, wide: Sample) -> None:
    """The daemon lets go of packs that it has filled for a command, although nothing was ever mounted."""
    if not site.daemon():
        site.start()
    cached = site.cache.add(wide.image)
    complete(site.cache, cached, wide.image)
    assert all(site.cache.files(pack.hex).data.stat().st_blocks for pack in wide.image.packs)
    run(["--root", str(site.host.root), "--store", str(site.store), "cache", "clear"])
    assert not any(site.cache.layout.find(pack.hex) for pack in wide.image.packs)


@ONLY_FUSE
def test_completing_does_not_disturb_readers(site: Site, wide: Sample) -> None:
    target = site.mount(wide.image)
    reader = Reader(target / "two", 0, 40 * CHUNK)
    complete(site.cache, site.cache.open_image(wide.image.digest), wide.image)
    assert reader.get() == wide.files["two"][: 40 * CHUNK]  # type: ignore[index]
    assert read_tree(target) == wide.files
