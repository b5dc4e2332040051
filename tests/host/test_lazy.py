"""Lazy mounts by the fanotify plane, with real daemons, and what happens when parts of them die."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from handmade import CHUNK, ImageMaker, Sample, erofs_mounts_below, make_wide, read_tree
from lazykit import WAIT, Host, Reader, eventually, processes

from erofsgen.errors import BusyError, NotFoundError
from erofsgen.host.cache.cache import HostCache
from erofsgen.host.mount.mounts import mount, mounts, unmount
from erofsgen.host.pull import find
from erofsgen.store.directory import DirectoryStore

pytestmark = pytest.mark.mount

TOTAL = (96 + 96 + 50) * CHUNK


@pytest.fixture
def wide(maker: ImageMaker) -> Sample:
    return make_wide(maker)


@pytest.fixture
def make_host(root: Path) -> Iterator[Callable[..., Host]]:
    made = []

    def make(**options: float) -> Host:
        made.append(Host(root, **options))
        return made[-1]

    yield make
    for host in made:
        host.end()
    eventually(lambda: processes(root) == [])


@pytest.fixture
def host(make_host: Callable[..., Host]) -> Host:
    """A daemon that completes no packs behind the tests' back, and reads nothing ahead."""
    made = make_host(read_ahead=0)
    made.start("--worker=--complete-at", "--worker=2")
    return made


def frames_present(root: Path) -> int:
    cache = HostCache(root)
    found = 0
    for image in cache.images():
        for pack in image.packs:
            file = cache.open_pack(pack)
            found += file.presence.count()
            file.close()
    return found


def drop_page_cache() -> None:
    subprocess.run(["sync"], check=True)
    Path("/proc/sys/vm/drop_caches").write_text("3")


def test_what_is_read_arrives_and_nothing_else(wide: Sample, host: Host, mount_point: Path) -> None:
    info = host.mount(wide.image, mount_point)
    assert (info.plane, info.how) == ("fanotify", "file-backed")
    assert frames_present(host.root) == 0
    assert sorted(os.listdir(mount_point)) == ["all", "one", "three", "two"]
    assert (mount_point / "all").stat().st_size == TOTAL
    assert host.engine()["frames"] == 0, "metadata is local"
    assert Reader(mount_point / "two", 17 * CHUNK + 100, 10).get() == wide.files["two"][17 * CHUNK + 100 :][:10]
    assert 1 <= frames_present(host.root) <= 5
    assert read_tree(mount_point) == wide.files
    assert host.status()["denied"] == 0
    assert mounts(host.root) == [info]
    unmount(mount_point, root=host.root)
    eventually(lambda: host.status()["marked_packs"] == 0)


def test_a_complete_pack_costs_nothing_any_more(wide: Sample, host: Host, mount_point: Path) -> None:
    host.mount(wide.image, mount_point)
    assert host.status()["marked_packs"] == 3
    assert read_tree(mount_point) == wide.files
    eventually(lambda: host.status()["marked_packs"] == 0)
    drop_page_cache()
    pid = host.status()["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        assert Reader(mount_point / "all", 0, TOTAL).get() == wide.files["all"]
    finally:
        os.kill(pid, signal.SIGCONT)


def test_a_pack_is_completed_when_most_of_it_is_there(wide: Sample, make_host: Callable[..., Host], mount_point: Path):
    host = make_host(read_ahead=0)
    host.start("--worker=--complete-at", "--worker=0.5")
    host.mount(wide.image, mount_point, read_ahead=128)
    Reader(mount_point / "one", 0, 8 * CHUNK).get()
    time.sleep(1.5)
    assert frames_present(host.root) < 12
    Reader(mount_point / "one", 0, 52 * CHUNK).get()
    eventually(lambda: host.status()["marked_packs"] == 2)


def test_sequential_readers_find_what_they_want_there(wide: Sample, make_host: Callable[..., Host], mount_point: Path):
    host = make_host(read_ahead=32 << 20)
    host.start("--worker=--complete-at", "--worker=2")
    host.mount(wide.image, mount_point, read_ahead=128)
    assert Reader(mount_point / "all", 0, 20 * CHUNK).get() == wide.files["all"][: 20 * CHUNK]
    eventually(lambda: frames_present(host.root) > 8)


def test_packs_of_one_image_serve_another(maker: ImageMaker, wide: Sample, host: Host, tmp_path: Path) -> None:
    other = maker.image("other", {"copy": wide.files["one"]}, wide.packs)
    host.mount(wide.image, tmp_path / "a")
    assert (tmp_path / "a/one").read_bytes() == wide.files["one"]
    before = host.engine()["frames"]
    host.mount(other, tmp_path / "b")
    assert (tmp_path / "b/copy").read_bytes() == wide.files["one"]
    assert host.engine()["frames"] == before


def test_read_write(wide: Sample, host: Host, mount_point: Path, tmp_path: Path) -> None:
    host.mount(wide.image, mount_point, upper=tmp_path / "changes")
    with (mount_point / "one").open("r+b") as file:  # copied up, so all of it is read
        file.write(b"changed")
    assert (mount_point / "one").read_bytes() == b"changed" + wide.files["one"][7:]
    assert (tmp_path / "changes/one").exists()
    unmount(mount_point, root=host.root)


def test_a_killed_worker_is_not_noticed(wide: Sample, host: Host, mount_point: Path) -> None:
    host.mount(wide.image, mount_point)
    for number, name in enumerate(("one", "two", "three")):
        host.kill("worker", send=signal.SIGSTOP)
        reader = Reader(mount_point / name, 5 * CHUNK, 20 * CHUNK)
        eventually(lambda: host.status()["waiting"] > 0)
        host.kill("worker")
        assert reader.get() == wide.files[name][5 * CHUNK : 25 * CHUNK]
        assert host.status()["worker_restarts"] == number + 1
    assert host.status()["denied"] == 0


@pytest.mark.parametrize("victims", [["pid"], ["pid", "worker"], ["worker", "pid"], ["standby"]])
def test_a_killed_supervisor_is_replaced(wide: Sample, host: Host, mount_point: Path, victims: list[str]) -> None:
    host.mount(wide.image, mount_point)
    first = host.running("worker")
    os.kill(first["worker"], signal.SIGSTOP)
    reader = Reader(mount_point / "one", 5 * CHUNK, 20 * CHUNK)
    eventually(lambda: host.status()["waiting"] > 0)
    host.kill(*victims)
    os.kill(first["worker"], signal.SIGCONT) if "worker" not in victims else None
    assert reader.get() == wide.files["one"][5 * CHUNK : 25 * CHUNK]
    assert read_tree(mount_point) == wide.files
    eventually(lambda: host.status()["standby"] not in (0, first["standby"]))
    assert host.status()["denied"] == 0
    unmount(mount_point, root=host.root)


def test_a_supervisor_can_be_replaced_by_a_new_version(wide: Sample, host: Host, mount_point: Path) -> None:
    host.mount(wide.image, mount_point)
    first = host.running("worker")
    os.kill(first["worker"], signal.SIGSTOP)
    reader = Reader(mount_point / "one", 5 * CHUNK, 20 * CHUNK)
    eventually(lambda: host.status()["waiting"] > 0)
    os.kill(first["pid"], signal.SIGHUP)
    assert reader.get() == wide.files["one"][5 * CHUNK : 25 * CHUNK]
    second = host.status()
    assert second["pid"] == first["pid"]
    assert second["started"] > first["started"]


def test_all_holders_killed_at_once(wide: Sample, host: Host, mount_point: Path) -> None:
    """The one case in which the kernel lets readers pass: the next daemon ends it before anything else happens."""
    host.mount(wide.image, mount_point)
    with (mount_point / "one").open("rb", buffering=0) as kept:
        assert kept.read(CHUNK) == wide.files["one"][:CHUNK]
        status = host.running("standby", "worker")
        os.kill(status["pid"], signal.SIGSTOP)  # or it would start another standby
        for name in ("standby", "pid", "worker"):
            os.kill(status[name], signal.SIGKILL)
        eventually(lambda: processes(host.root) == [])
        host.start()
        kept.seek(40 * CHUNK)
        with pytest.raises(OSError, match="Input/output error"):
            kept.read(4096)
        kept.seek(0)
        assert kept.read(CHUNK) == wide.files["one"][:CHUNK], "what EROFS has cached stays right"
    unmount(mount_point, root=host.root)
    host.mount(wide.image, mount_point)
    assert read_tree(mount_point) == wide.files, "a new mount has files of its own"


def test_stopping_under_a_mount_fails_closed(wide: Sample, host: Host, mount_point: Path) -> None:
    host.mount(wide.image, mount_point)
    kept = (mount_point / "one").open("rb", buffering=0)
    assert kept.read(CHUNK) == wide.files["one"][:CHUNK]
    with pytest.raises(BusyError, match="mounted lazily"):
        host.call("stop")
    host.kill("worker", send=signal.SIGSTOP)
    waiting = Reader(mount_point / "two", 7 * CHUNK)
    eventually(lambda: host.status()["waiting"] > 0)
    host.kill("pid", send=signal.SIGTERM)
    eventually(lambda: processes(host.root) == [])
    assert isinstance(waiting.get(), OSError)
    assert erofs_mounts_below(mount_point) == []
    with kept:
        kept.seek(40 * CHUNK)
        with pytest.raises(OSError, match="Input/output error"):
            kept.read(4096)
    assert mounts(host.root) == []


def test_a_detached_mount_in_use_goes_on(wide: Sample, host: Host, mount_point: Path) -> None:
    host.mount(wide.image, mount_point)
    with (mount_point / "two").open("rb", buffering=0) as kept:
        unmount(mount_point, root=host.root, force=True)
        time.sleep(1.5)
        assert host.status()["marked_packs"] == 3, "somebody can still read them"
        kept.seek(60 * CHUNK)
        assert kept.read(4096) == wide.files["two"][60 * CHUNK :][:4096]
    eventually(lambda: host.status()["marked_packs"] == 0, within=30)


def test_a_read_does_not_outlive_its_deadline(wide: Sample, make_host: Callable[..., Host], mount_point: Path) -> None:
    host = make_host(deadline=1, read_ahead=0)
    host.start()
    host.mount(wide.image, mount_point)
    worker = host.running("worker")["worker"]
    os.kill(worker, signal.SIGSTOP)
    started = time.monotonic()
    try:
        result = Reader(mount_point / "one").get()
        assert isinstance(result, OSError)
        assert result.errno == errno.EIO
        assert time.monotonic() - started < 4
        assert "not here in time" in host.status()["errors"][-1]["error"]
    finally:
        os.kill(worker, signal.SIGCONT)
    eventually(lambda: Reader(mount_point / "one").get() == wide.files["one"][:4096])


def test_a_store_that_is_away(wide: Sample, host: Host, mount_point: Path, store_dir: Path, tmp_path: Path) -> None:
    HostCache(host.root).add(wide.image)
    store_dir.rename(tmp_path / "away")
    cache = HostCache(host.root)
    with pytest.raises(NotFoundError, match="no store"):
        find(cache, str(store_dir), "never seen")
    host.mount(find(cache, str(store_dir), "wide"), mount_point)
    assert sorted(os.listdir(mount_point)) == ["all", "one", "three", "two"]
    result = Reader(mount_point / "one").get()
    assert isinstance(result, OSError)
    assert result.errno == errno.EIO
    assert str(store_dir) in host.status()["errors"][-1]["error"]
    (tmp_path / "away").rename(store_dir)
    assert read_tree(mount_point) == wide.files


def test_a_bad_frame_is_never_seen(wide: Sample, host: Host, mount_point: Path, store_dir: Path) -> None:
    blob = DirectoryStore(store_dir).blob_path(wide.image.packs[1].digest)
    with blob.open("r+b") as file:
        file.seek(3 * CHUNK + 5)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    host.mount(wide.image, mount_point, read_ahead=128)
    result = Reader(mount_point / "two", 2 * CHUNK).get()
    assert isinstance(result, OSError)
    assert result.errno == errno.EIO
    assert host.engine()["sources"][str(store_dir)]["bad_frames"] > 0
    assert "differs from its digest" in host.status()["errors"][-1]["error"]
    assert Reader(mount_point / "two", 60 * CHUNK).get() == wide.files["two"][60 * CHUNK :][:4096]


def test_frames_of_another_boot_are_compared_not_fetched(
    wide: Sample, host: Host, mount_point: Path, store_dir: Path, tmp_path: Path
) -> None:
    host.mount(wide.image, mount_point)
    assert read_tree(mount_point) == wide.files
    unmount(mount_point, root=host.root)
    eventually(lambda: host.status()["marked_packs"] == 0)
    host.end()
    for path in (host.root / "packs").glob("*.map"):
        with path.open("r+b") as file:  # the boot that wrote it was another one
            file.seek(16)
            file.write(b"another boot's !")
    one = (host.root / "packs" / f"{wide.packs[0].hex}.data").open("r+b")
    with one:
        one.seek(9 * CHUNK)
        one.write(b"power failed before this was on the disk")
    cached = HostCache(host.root).image("wide", str(store_dir))
    host.start()
    host.mount(cached, mount_point)
    assert read_tree(mount_point) == wide.files
    assert host.engine()["frames"] == 1


def test_an_eager_mount_lets_the_daemon_bring_it(wide: Sample, host: Host, mount_point: Path, tmp_path: Path) -> None:
    host.mount(wide.image, tmp_path / "lazy")
    mount(wide.image, mount_point, root=host.root)
    assert host.engine()["frames"] == 24 + 24 + 13
    assert read_tree(mount_point) == wide.files
    assert read_tree(tmp_path / "lazy") == wide.files


def test_a_full_disk_is_an_error_of_the_read(
    maker_on: Callable[[Path], Sample], make_file_system: Callable[[str, int], Path], tmp_path: Path
) -> None:
    place = make_file_system("ext4", 8)
    wide = make_wide(ImageMaker(DirectoryStore(tmp_path / "store")))
    host = Host(place / "root", read_ahead=0)
    host.start()
    try:
        host.mount(wide.image, tmp_path / "mnt")
        result = Reader(tmp_path / "mnt/all", 0, TOTAL).get()
        assert isinstance(result, OSError)
        assert result.errno == errno.EIO
        assert "No space left" in " ".join(error["error"] for error in host.status()["errors"])
        unmount(tmp_path / "mnt", root=host.root)
    finally:
        host.end()


def test_a_file_system_without_events(wide: Sample, tmp_path: Path, root: Path) -> None:
    place = tmp_path / "tmpfs"
    place.mkdir()
    (tmp_path / "mnt").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", str(place)], check=True)
    host = Host(place / "root")
    try:
        with pytest.raises(Exception, match=r"pre-content|ext4, xfs or btrfs|erofs"):
            host.mount(wide.image, tmp_path / "mnt")
        assert erofs_mounts_below(tmp_path) == []
    finally:
        host.end()
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_mount_that_fails_leaves_no_marks(wide: Sample, host: Host, mount_point: Path, monkeypatch) -> None:
    monkeypatch.setattr("erofsgen.host.mount.superblock.mount_files", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        host.mount(wide.image, mount_point)
    eventually(lambda: host.status()["marked_packs"] == 0)
    assert mounts(host.root) == []


def test_two_daemons_for_one_root(host: Host) -> None:
    again = subprocess.run(
        [sys.executable, "-m", "erofsgen.host.daemon", "--root", str(host.root)],
        capture_output=True,
        text=True,
        timeout=WAIT,
    )
    assert again.returncode == BusyError.exit_code
    assert "a daemon is running" in again.stderr


def test_the_control_socket_is_roots_alone(host: Host) -> None:
    assert (host.root / "control.sock").stat().st_mode & 0o777 == 0o600
    assert host.root.stat().st_mode & 0o777 == 0o700


def test_many_readers_while_the_worker_is_killed(maker: ImageMaker, host: Host, tmp_path: Path) -> None:
    """50 readers over 10 mounts of 3 images that share packs, cold and then warm."""
    base = make_wide(maker)
    images = [
        base.image,
        maker.image("second", {"one": base.files["one"], "three": base.files["three"]}, base.packs),
        maker.image("third", {"two": base.files["two"]}, base.packs),
    ]
    names = [["one", "two", "three", "all"], ["one", "three"], ["two"]]
    for number in range(10):
        host.mount(images[number % 3], tmp_path / f"m{number}")
    stop = threading.Event()
    kills = 0

    def killer() -> None:
        nonlocal kills
        while not stop.wait(0.4):
            host.kill("worker")
            kills += 1

    def read(seed: int) -> int:
        chance = random.Random(seed)
        number = chance.randrange(10)
        wrong = 0
        for _ in range(12):
            name = chance.choice(names[number % 3])
            content = base.files[name]
            offset = chance.randrange(len(content))
            length = chance.choice([1, 4096, 100_000, 600_000])
            with (tmp_path / f"m{number}" / name).open("rb", buffering=0) as file:
                wrong += os.pread(file.fileno(), length, offset) != content[offset : offset + length]
            time.sleep(0.02)
        return wrong

    thread = threading.Thread(target=killer)
    thread.start()
    try:
        for _ in ("cold", "warm"):
            with ThreadPoolExecutor(50) as pool:
                assert sum(pool.map(read, range(50), timeout=60)) == 0
    finally:
        stop.set()
        thread.join()
    assert kills > 0
    assert host.status()["denied"] == 0
    for number in range(10):
        unmount(tmp_path / f"m{number}", root=host.root)
    shutil.rmtree(tmp_path / "m0")


def test_scrubbing_repairs_under_a_mount(wide: Sample, make_host: Callable[..., Host], mount_point: Path) -> None:
    host = make_host(read_ahead=0)
    host.start(f"--worker=--scrub={1 << 30}")
    host.mount(wide.image, mount_point)
    assert read_tree(mount_point) == wide.files
    data = host.root / "packs" / f"{wide.packs[0].hex}.data"
    with data.open("r+b") as file:
        file.seek(9 * CHUNK + 17)
        file.write(b"the disk has forgotten")
    host.kill("worker")  # the next begins a pass at once
    eventually(lambda: "frame 2: repaired" in host.log())
    assert data.read_bytes() == wide.files["one"]
    drop_page_cache()
    assert read_tree(mount_point) == wide.files
