"""What readers see when processes die: right bytes or an error, never zeros, and no wait without an end."""

from __future__ import annotations

import errno
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from fusekit import EACH_PLANE, ONLY_FUSE, Site
from handmade import CHUNK, Sample, erofs_mounts_below, make_wide, read_tree
from lazykit import Host, Reader, eventually

from erofsgen.host.doctor import plane_works
from erofsgen.host.mount.mounts import mounts

pytestmark = [pytest.mark.mount, pytest.mark.usefixtures("require_root")]

LOST = {"fuse": {errno.ENOTCONN, errno.ECONNABORTED}, "blockfuse": {errno.EIO}}
"""What reads fail with whose server is dead: the connection is cut for the one who waits, and is not there for others.
"""


def number_of(result: bytes | OSError) -> int | None:
    return result.errno if isinstance(result, OSError) else None


def test_a_killed_server(site: Site, wide: Sample) -> None:
    target = site.mount(wide.image, read_ahead=128)
    assert Reader(target / "two", 0, CHUNK).get() == wide.files["two"][:CHUNK]  # type: ignore[index]
    lost = LOST[site.variant.plane]
    worker = site.host.running("worker")["worker"]
    os.kill(worker, signal.SIGSTOP)
    waiting = Reader(target / "one", 20 * CHUNK)
    eventually(lambda: site.host.status()["waiting"] > 0)
    assert site.info.server is not None
    os.kill(site.info.server[0], signal.SIGKILL)
    assert number_of(waiting.get()) in lost
    os.kill(worker, signal.SIGCONT)
    for name, offset in (("one", 20 * CHUNK), ("three", 0), ("all", 90 * CHUNK)):
        assert number_of(Reader(target / name, offset).get()) in lost, name
    eventually(lambda: site.host.status()["servers"] == 0)
    assert mounts(site.host.root) == [site.info]
    site.unmount(target)
    assert erofs_mounts_below(site.place) == []
    again = site.mount(wide.image)
    assert read_tree(again) == wide.files
    site.unmount(again)


def test_a_dead_mount_in_use_can_be_detached(site: Site, wide: Sample) -> None:
    target = site.mount(wide.image, read_ahead=128)
    kept = os.open(target / "one", os.O_RDONLY)
    try:
        assert site.info.server is not None
        os.kill(site.info.server[0], signal.SIGKILL)
        eventually(lambda: site.servers() == [])
        site.unmount(target, force=True)
        assert erofs_mounts_below(site.place) == []
        with pytest.raises(OSError) as caught:
            os.pread(kept, 4096, 60 * CHUNK)
        assert caught.value.errno in LOST[site.variant.plane]
    finally:
        with suppress(OSError):  # the kernel tells the server, which is dead
            os.close(kept)


class Load:
    """Reads at random of many threads, until the with block ends; every byte is compared."""

    def __init__(self, target: Path, sample: Sample, threads: int = 16) -> None:
        self.target, self.files = target, sample.files
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(threads)
        self._running = [self._pool.submit(self._read, seed) for seed in range(threads)]

    def _read(self, seed: int) -> int:
        chance = random.Random(seed)
        done = 0
        while not self._stop.is_set() or done < 4:
            name = chance.choice(list(self.files))
            content = self.files[name]
            assert isinstance(content, bytes)
            offset, length = chance.randrange(len(content)), chance.choice([1, 4096, 100_000, 600_000])
            descriptor = os.open(self.target / name, os.O_RDONLY)
            try:
                got = os.pread(descriptor, length, offset)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)
            assert got == content[offset : offset + length], (name, offset, length)
            done += 1
            time.sleep(0.01)
        return done

    def end(self) -> None:
        self._stop.set()
        try:
            assert sum(running.result(60) for running in self._running) >= 64
        finally:
            self._pool.shutdown(wait=False, cancel_futures=True)


@contextmanager
def load(target: Path, sample: Sample) -> Iterator[None]:
    readers = Load(target, sample)
    try:
        yield
    finally:
        readers.end()


def test_a_server_killed_under_load(site: Site, wide: Sample) -> None:
    """Every read has an end: right bytes, or the error."""
    target = site.mount(wide.image, read_ahead=128)
    lost = LOST[site.variant.plane]
    killed = threading.Event()

    def read(seed: int) -> int:
        chance = random.Random(seed)
        after = failed = 0
        while after < 3:
            after += killed.is_set()
            name = chance.choice(list(wide.files))
            content = wide.files[name]
            assert isinstance(content, bytes)
            offset, length = chance.randrange(len(content)), chance.choice([1, 4096, 100_000, 600_000])
            got = Reader(target / name, offset, length).get()
            if isinstance(got, OSError):
                assert killed.is_set()
                assert got.errno in lost
                failed += 1
            else:
                assert got == content[offset : offset + length], (name, offset, length)
        return failed

    with ThreadPoolExecutor(16) as pool:
        running = [pool.submit(read, seed) for seed in range(16)]
        eventually(lambda: site.host.engine()["frames"] > 0)
        time.sleep(0.1)
        assert site.info.server is not None
        killed.set()
        os.kill(site.info.server[0], signal.SIGKILL)
        assert sum(ended.result(60) for ended in running) > 0


def test_a_daemon_killed_under_load(site: Site, wide: Sample) -> None:
    target = site.mount(wide.image, read_ahead=128)
    denied = site.host.status()["denied"]
    with load(target, wide):
        for victims in (["worker"], ["pid"], ["standby"], ["pid", "worker"]):
            eventually(lambda: site.host.status()["standby"] != 0)
            before = site.host.status()
            site.host.kill(*victims)
            for name in victims:
                eventually(lambda name=name, before=before: site.host.status()[name] not in (0, before[name]))
            time.sleep(0.1)
    assert read_tree(target) == wide.files
    assert site.host.status()["denied"] == (0 if site.host.status()["pid"] != before["pid"] else denied)


def test_a_waiting_reader_outlives_a_supervisor(site: Site, wide: Sample) -> None:
    target = site.mount(wide.image, read_ahead=128)
    first = site.host.running("worker")
    os.kill(first["worker"], signal.SIGSTOP)
    reader = Reader(target / "one", 5 * CHUNK, 20 * CHUNK)
    eventually(lambda: site.host.status()["waiting"] > 0)
    site.host.kill("pid", "worker")
    assert reader.get() == wide.files["one"][5 * CHUNK : 25 * CHUNK]  # type: ignore[index]
    second = site.host.running("worker")
    assert second["pid"] != first["pid"]
    os.kill(second["worker"], signal.SIGSTOP)
    reader = Reader(target / "two", 5 * CHUNK, 20 * CHUNK)
    eventually(lambda: site.host.status()["waiting"] > 0)
    os.kill(second["pid"], signal.SIGHUP)  # the same program anew
    assert reader.get() == wide.files["two"][5 * CHUNK : 25 * CHUNK]  # type: ignore[index]
    assert site.host.status()["denied"] == 0


def test_all_of_the_daemon_killed(own_site: Site) -> None:
    """What is missing is an error soon, what is there is not, and a new daemon serves the mount as it is."""
    site, wide = own_site, make_wide(own_site.maker)
    target = site.mount(wide.image, read_ahead=128)
    two = wide.files["two"]
    assert isinstance(two, bytes)
    assert Reader(target / "two", 0, 8 * CHUNK).get() == two[: 8 * CHUNK]
    status = site.host.running("standby", "worker")
    os.kill(status["worker"], signal.SIGSTOP)
    waiting = Reader(target / "one", 60 * CHUNK)
    eventually(lambda: site.host.status()["waiting"] > 0)
    os.kill(status["pid"], signal.SIGSTOP)  # or it would start another standby
    for name in ("standby", "pid", "worker"):
        os.kill(status[name], signal.SIGKILL)
    eventually(lambda: site.daemon() == [])
    started = time.monotonic()
    assert number_of(waiting.get()) == errno.EIO
    assert number_of(Reader(target / "one", 40 * CHUNK).get()) == errno.EIO
    assert time.monotonic() - started < 10
    assert Reader(target / "two", 0, 8 * CHUNK).get() == two[: 8 * CHUNK]
    Path("/proc/sys/vm/drop_caches").write_text("1")
    assert Reader(target / "two", 0, 8 * CHUNK).get() == two[: 8 * CHUNK], "from the disk as well"
    site.start()
    assert read_tree(target) == wide.files
    assert site.host.status()["servers"] == 1
    site.unmount(target)
    eventually(lambda: site.servers() == [])


@EACH_PLANE
def test_a_stopped_daemon_takes_its_mounts_away(own_site: Site) -> None:
    site, wide = own_site, make_wide(own_site.maker)
    target = site.mount(wide.image, read_ahead=128)
    with (target / "one").open("rb", buffering=0) as kept:
        site.host.kill("worker", send=signal.SIGSTOP)
        waiting = Reader(target / "two", 7 * CHUNK)
        eventually(lambda: site.host.status()["waiting"] > 0)
        site.host.kill("pid", send=signal.SIGTERM)
        eventually(lambda: site.daemon() == [])
        assert number_of(waiting.get()) == errno.EIO
        assert erofs_mounts_below(site.place) == []
        with pytest.raises(OSError) as caught:
            os.pread(kept.fileno(), 4096, 60 * CHUNK)
        assert caught.value.errno == errno.EIO
    eventually(lambda: site.servers() == [])
    assert mounts(site.host.root) == []


@ONLY_FUSE
def test_what_starts_servers_is_killed(site: Site, wide: Sample) -> None:
    """Mounts go on without it, and the next one starts another."""
    first = site.mount(wide.image, "first")
    (starter,) = site.starters()
    os.kill(starter, signal.SIGKILL)
    assert read_tree(first) == wide.files
    started = time.monotonic()
    second = site.mount(wide.image, "second")
    assert time.monotonic() - started < 15
    assert read_tree(second) == wide.files
    assert len(site.servers()) == 2
    assert site.starters() not in ([], [starter])


@ONLY_FUSE
def test_what_erofs_has_open_is_still_cut_off(own_site: Site) -> None:
    """A mount of another plane whose daemon was killed would read holes in the files that a server fills."""
    site, wide = own_site, make_wide(own_site.maker)
    if not plane_works(site.place, "fanotify").ok:
        pytest.skip("no fanotify plane here")
    before = Host(site.host.root, "fanotify", read_ahead=0)
    before.start("--worker=--complete-at", "--worker=2")
    before.mount(wide.image, site.place / "before")
    with (site.place / "before" / "one").open("rb", buffering=0) as kept:
        assert kept.read(CHUNK) == wide.files["one"][:CHUNK]  # type: ignore[index]
        status = before.running("standby", "worker")
        os.kill(status["pid"], signal.SIGSTOP)
        for name in ("standby", "pid", "worker"):
            os.kill(status[name], signal.SIGKILL)
        eventually(lambda: site.daemon() == [])
        target = site.mount(wide.image)
        assert read_tree(target) == wide.files
        with pytest.raises(OSError) as caught:
            os.pread(kept.fileno(), 4096, 60 * CHUNK)
        assert caught.value.errno == errno.EIO
