"""What every plane does the same on every kernel that has it."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from handmade import CHUNK, chunks_of, contents, read_tree
from lazykit import Reader, eventually
from sites import check_reads, drop_caches

from erofsgen.errors import StorageError
from erofsgen.host.cache.cache import HostCache
from erofsgen.host.daemon.client import Client
from erofsgen.host.linux import process_start
from erofsgen.host.prefetch.start import Start
from erofsgen.store.directory import DirectoryStore

case = pytest.mark.case


def is_eio(result):
    return isinstance(result, OSError) and result.errno == errno.EIO


@case("tree equality")
def test_the_tree_is_the_images(shared):
    content, small = contents(5, 3 * CHUNK + 17, 100)
    pack = shared.maker.pack(chunks_of(content))
    files = {"a/b/file": content, "a/small": small, "a/link": "b/file", "empty": None}
    files["hole"] = content[:CHUNK] + bytes(2 * CHUNK + 100)
    mounted = shared.mount(shared.maker.image("tree", files, [pack]))
    assert read_tree(mounted) == files
    top, file = mounted.stat(), (mounted / "a/b/file").stat()
    assert (top.st_mode & 0o7777, top.st_uid, top.st_gid, top.st_mtime_ns) == (0o751, 7, 8, 10**18)
    assert (file.st_mode & 0o7777, file.st_size, file.st_mtime_ns) == (0o640, len(content), 123_456_789)


@case("cold read")
def test_a_cold_read(shared, fresh):
    mounted = shared.mount(fresh.image)
    before = shared.frames()
    assert Reader(mounted / "all", 0, len(fresh.files["all"])).get() == fresh.files["all"]
    assert shared.frames() - before == (0 if shared.plane == "eager" else 61)


@case("warm read")
def test_a_warm_read(shared, fresh):
    mounted = shared.mount(fresh.image)
    assert read_tree(mounted) == fresh.files
    before = shared.frames()
    for _ in range(2):
        drop_caches()
        assert read_tree(mounted) == fresh.files
    assert shared.frames() == before


@case("partial reads")
def test_partial_reads(shared, fresh):
    mounted = shared.mount(fresh.image)
    check_reads(mounted, fresh.files, 1, 60)
    with open(mounted / "one", "rb", buffering=0) as file:
        assert os.pread(file.fileno(), 4096, len(fresh.files["one"]) - 10) == fresh.files["one"][-10:]
        assert os.pread(file.fileno(), 4096, len(fresh.files["one"])) == b""


@case("concurrent readers")
def test_concurrent_readers(shared, fresh):
    mounted = shared.mount(fresh.image)
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda seed: check_reads(mounted, fresh.files, seed), range(16), timeout=240))


@case("two images sharing packs")
def test_two_images_share_packs(shared, fresh):
    other = shared.maker.image(
        "other", {"copy": fresh.files["one"], "part": fresh.files["two"][: 8 * CHUNK]}, fresh.packs
    )
    first, second = shared.mount(fresh.image), shared.mount(other, "other")
    assert (first / "one").read_bytes() == fresh.files["one"]
    before = shared.frames()
    assert (second / "copy").read_bytes() == fresh.files["one"]
    assert shared.frames() == before
    assert (second / "part").read_bytes() == fresh.files["two"][: 8 * CHUNK]
    shared.unmount(first)
    assert (second / "copy").read_bytes() == fresh.files["one"]


@case("100 mounts")
def test_100_mounts(shared, fresh):
    images = [fresh.image, shared.maker.image("other", {"copy": fresh.files["one"]}, fresh.packs)]
    mounted = [shared.mount(images[number % 2], f"m{number}") for number in range(100)]
    for number in (0, 1, 50, 99):
        name = ("one", "copy")[number % 2]
        assert (mounted[number] / name).read_bytes() == fresh.files["one"]
    for target in mounted:
        shared.unmount(target)
    if shared.plane != "eager":
        eventually(shared.idle)


@case("unmount while reading")
def test_unmounting_while_somebody_reads(shared, fresh):
    mounted = shared.mount(fresh.image)
    with open(mounted / "all", "rb", buffering=0) as file:
        assert file.read(CHUNK) == fresh.files["all"][:CHUNK]
        shared.unmount(mounted, force=True)
        for offset in range(CHUNK, 40 * CHUNK, 7 * CHUNK):
            assert os.pread(file.fileno(), CHUNK, offset) == fresh.files["all"][offset : offset + CHUNK]
    if shared.plane != "eager":
        eventually(shared.idle)


@case("profile recorded and replayed")
def test_a_start_is_recorded_and_replayed(lazy_plane, site, wide):
    def worker(do, **arguments):
        client = Client.connect(site.host.root)
        assert client is not None
        with client:
            return client.worker(do, **arguments)

    def start(mounted):
        for name, offset in (("two", 9 * CHUNK), ("one", 0)):
            data = wide.files[name][offset : offset + 4096]
            assert Reader(mounted / name, offset, 4096).get() == data

    mounted = site.mount(wide.image, start=Start(command="serve", mode="none", token="t"))
    start(mounted)
    site.unmount(mounted)
    (recorded,) = worker("take in", token="t")["recordings"]
    assert (recorded["command"], recorded["runs"]) == ("serve", 1)
    eventually(site.idle)
    worker("clear")
    mounted = site.mount(wide.image, start=Start(command="serve", mode="profile"))
    eventually(lambda: [facts["state"] for facts in worker("status")["prefetch"]["mounts"].values()] == ["done"])
    before = site.frames()
    start(mounted)
    assert site.frames() == before


@case("worker killed")
def test_a_killed_worker_is_not_noticed(lazy_plane, site, wide):
    mounted = site.mount(wide.image)
    site.host.kill("worker", send=signal.SIGSTOP)
    reader = Reader(mounted / "two", 5 * CHUNK, 20 * CHUNK)
    eventually(lambda: site.host.status()["waiting"] > 0)
    site.host.kill("worker")
    assert reader.get() == wide.files["two"][5 * CHUNK : 25 * CHUNK]
    assert site.host.status()["errors"] == []


@case("daemon killed and restarted")
@pytest.mark.parametrize("victims", [["pid"], ["worker", "pid"], ["standby"]], ids="+".join)
def test_a_killed_daemon_is_replaced(lazy_plane, site, wide, victims):
    mounted = site.mount(wide.image)
    first = site.host.running("worker")
    os.kill(first["worker"], signal.SIGSTOP)
    reader = Reader(mounted / "one", 5 * CHUNK, 20 * CHUNK)
    eventually(lambda: site.host.status()["waiting"] > 0)
    site.host.kill(*victims)
    if "worker" not in victims:
        os.kill(first["worker"], signal.SIGCONT)
    assert reader.get() == wide.files["one"][5 * CHUNK : 25 * CHUNK]
    assert read_tree(mounted) == wide.files
    assert site.host.status()["errors"] == []


@case("all of the daemon killed: fails closed")
def test_readers_get_errors_when_nobody_is_left(lazy_plane, site, wide):
    mounted = site.mount(wide.image)
    assert Reader(mounted / "one").get() == wide.files["one"][:4096]
    status = site.host.running("standby", "worker")
    os.kill(status["pid"], signal.SIGSTOP)  # or it would start another standby
    for name in ("standby", "pid", "worker"):
        os.kill(status[name], signal.SIGKILL)
    eventually(lambda: not any(process_start(status[name]) for name in ("standby", "pid", "worker")))
    site.started = False
    if site.plane in ("blockfuse", "fuse"):  # their servers are still there, and find the next daemon
        assert is_eio(Reader(mounted / "one", 40 * CHUNK).get())
        site.start()
        assert Reader(mounted / "one", 40 * CHUNK).get() == wide.files["one"][40 * CHUNK :][:4096]
    else:
        site.start()
        assert isinstance(Reader(mounted / "one", 40 * CHUNK).get(), OSError)  # fscache: ENOBUFS
    site.unmount(mounted, force=True)
    assert read_tree(site.mount(wide.image, "again")) == wide.files


@case("store down")
def test_a_store_that_is_away(lazy_plane, site, wide):
    HostCache(site.host.root).add(wide.image)
    site.host.options.append("--deadline=20")
    mounted = site.mount(wide.image)
    site.store.rename(site.place / "away")
    assert is_eio(Reader(mounted / "one").get())
    assert str(site.store) in site.host.status()["errors"][-1]["error"]
    (site.place / "away").rename(site.store)
    eventually(lambda: Reader(mounted / "one").get() == wide.files["one"][:4096])
    assert read_tree(mounted) == wide.files


@case("store hangs: EIO at the deadline")
def test_a_read_does_not_outlive_its_deadline(lazy_plane, site, wide):
    site.host.options.append("--deadline=3")
    mounted = site.mount(wide.image)
    worker = site.host.running("worker")["worker"]
    os.kill(worker, signal.SIGSTOP)
    started = time.monotonic()
    try:
        assert is_eio(Reader(mounted / "one").get())
        assert time.monotonic() - started < 20
        assert "not here in time" in site.host.status()["errors"][-1]["error"]
    finally:
        os.kill(worker, signal.SIGCONT)
    eventually(lambda: Reader(mounted / "one").get() == wide.files["one"][:4096])


@case("corrupt frame")
def test_a_bad_frame_is_never_seen(lazy_plane, site, wide):
    blob = DirectoryStore(site.store).blob_path(wide.image.packs[1].digest)
    with blob.open("r+b") as file:
        file.seek(3 * CHUNK + 5)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    mounted = site.mount(wide.image)
    assert is_eio(Reader(mounted / "two", 2 * CHUNK).get())
    assert "differs from its digest" in site.host.status()["errors"][-1]["error"]
    assert Reader(mounted / "two", 60 * CHUNK).get() == wide.files["two"][60 * CHUNK :][:4096]
    with blob.open("r+b") as file:
        file.seek(3 * CHUNK + 5)
        file.write(byte)
    eventually(lambda: Reader(mounted / "two", 2 * CHUNK).get() == wide.files["two"][2 * CHUNK :][:4096])


@case("cache full")
def test_a_full_cache_is_an_error_and_heals(site, wide):
    """Half of the image fits: nothing in use is given up; once it is not in use, it makes room for another."""
    other = site.maker.image("other", {"copy": wide.files["two"]}, wide.packs[1:2])
    cache = HostCache(site.host.root, max_bytes=8 << 20)
    cache.add(wide.image)
    if site.plane == "eager":
        with pytest.raises(StorageError, match="cache is full"):
            site.mount(wide.image)
        return
    mounted = site.mount(wide.image)
    results = {name: Reader(mounted / name, 0, len(wide.files[name])).get() for name in ("one", "two")}
    assert results["one"] == wide.files["one"]
    assert is_eio(results["two"])
    site.unmount(mounted)
    eventually(site.idle)
    mounted = site.mount(other)
    assert Reader(mounted / "copy", 0, len(wide.files["two"])).get() == wide.files["two"]
    assert cache.layout.allocated() <= 8 << 20


@case("worker killed under load")
def test_many_readers_while_the_worker_is_killed(lazy_plane, site, wide):
    site.host.options.append("--deadline=300")  # workers take seconds to start in a guest
    mounted = site.mount(wide.image)
    stop = threading.Event()

    def killer():
        while not stop.wait(1):  # the supervisor knows that the last one is dead
            site.frames()  # the worker answers: it has started, which takes seconds in a guest
            if not stop.wait(1):  # and it can do something, or a read may be unlucky until its deadline
                site.host.kill("worker")

    thread = threading.Thread(target=killer)
    thread.start()
    try:
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(lambda seed: check_reads(mounted, wide.files, seed), range(16), timeout=400))
    finally:
        stop.set()
        thread.join()
    assert site.host.status()["errors"] == []
