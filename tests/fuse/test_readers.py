"""Readers that are killed, interrupted or in the way, and how mounts and their servers end."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from fusekit import ONLY_FUSE, Site, outcome
from handmade import CHUNK, Sample, erofs_mounts_below, loops_over, read_tree
from lazykit import WAIT, Reader, eventually

from erofsgen.errors import BusyError
from erofsgen.host.mount.mounts import mounts

pytestmark = [pytest.mark.mount, pytest.mark.usefixtures("require_root")]

ONE = 4 * CHUNK
"""Bytes of a frame."""


@contextmanager
def stalled(site: Site) -> Iterator[None]:
    """Nothing that is missing is brought meanwhile."""
    worker = site.host.running("worker")["worker"]
    os.kill(worker, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(worker, signal.SIGCONT)


def reads(site: Site, target: Path, name: str, offset: int) -> subprocess.Popen[bytes]:
    """A process that waits for a frame."""
    before = site.host.status()["waiting"]
    command = ["dd", f"if={target / name}", f"bs={ONE}", f"skip={offset // ONE}", "count=1", "status=none"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    eventually(lambda: site.host.status()["waiting"] > before)
    return process


def test_a_killed_reader_harms_nobody(site: Site, wide: Sample) -> None:
    target = site.mount(wide.image, read_ahead=128)
    one = wide.files["one"]
    assert isinstance(one, bytes)
    denied = site.host.status()["denied"]
    with stalled(site):
        victims = [reads(site, target, "one", number * ONE) for number in (4, 8, 12)]
        other = Reader(target / "one", 12 * ONE + 5, 1000)
        for victim in victims:
            victim.kill()
        for victim in victims:
            assert victim.wait(WAIT) == -signal.SIGKILL
            assert victim.stdout is not None
            victim.stdout.close()
        assert Reader(target / "three", 0, 0).get() == b"", "others are served"
    assert other.get() == one[12 * ONE + 5 :][:1000]
    assert read_tree(target) == wide.files
    assert site.host.status()["denied"] == denied


@ONLY_FUSE
@pytest.mark.parametrize("direct", [False, True], ids=["cached", "direct"])
def test_signals_do_not_disturb_a_reader(site: Site, wide_called: Callable[..., Sample], direct: bool) -> None:
    """With O_DIRECT the kernel tells the server of each of them."""
    wide = wide_called(f"signals{direct}")
    target = site.mount(wide.image, read_ahead=128)
    right = wide.files["two"]
    assert isinstance(right, bytes)
    with stalled(site):
        pid = os.fork()
        if not pid:
            try:
                signal.signal(signal.SIGALRM, lambda *_: None)
                signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
                buffer = mmap.mmap(-1, ONE)
                descriptor = os.open(target / "two", os.O_RDONLY | (os.O_DIRECT if direct else 0))
                count = os.preadv(descriptor, [buffer], ONE)
                os._exit(0 if buffer[:count] == right[ONE : 2 * ONE] else 1)
            finally:
                os._exit(2)
        eventually(lambda: site.host.status()["waiting"] > 0)
        time.sleep(0.3)
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), "it waits"
    ended = []
    eventually(lambda: ended.append(os.waitpid(pid, os.WNOHANG)) or ended[-1][0])
    assert os.waitstatus_to_exitcode(ended[-1][1]) == 0
    assert read_tree(target) == wide.files


def test_a_busy_mount_names_its_holder(site: Site, wide: Sample) -> None:
    target = site.mount(wide.image)
    one = wide.files["one"]
    assert isinstance(one, bytes)
    (server,) = site.servers()
    with (target / "one").open("rb") as file:
        holder = subprocess.Popen(["sleep", "60"], stdin=file)
    try:
        with pytest.raises(BusyError, match=rf"in use by sleep \(pid {holder.pid}\)"):
            site.unmount(target)
        assert read_tree(target) == wide.files
        kept = (target / "one").open("rb", buffering=0)
        site.unmount(target, force=True)
        assert list(target.iterdir()) == []
        assert mounts(site.host.root) == []
        kept.seek(40 * CHUNK)
        assert kept.read(4096) == one[40 * CHUNK :][:4096]
        assert site.servers() == [server], "somebody still reads"
        kept.close()
    finally:
        holder.kill()
        holder.wait()
    eventually(lambda: site.servers() == [])


def test_a_detached_mount_goes_on_with_what_is_missing(site: Site, wide: Sample) -> None:
    target = site.mount(wide.image)
    two = wide.files["two"]
    assert isinstance(two, bytes)
    with (target / "two").open("rb", buffering=0) as kept:
        site.unmount(target, force=True)
        kept.seek(60 * CHUNK)
        assert kept.read(ONE) == two[60 * CHUNK : 60 * CHUNK + ONE]
        again = site.mount(wide.image)
        assert read_tree(again) == wide.files
        assert len(site.servers()) == 2
    eventually(lambda: len(site.servers()) == 1)
    site.unmount(again)
    eventually(lambda: site.servers() == [])


def test_nothing_is_left_of_a_mount(site: Site, wide: Sample) -> None:
    for _ in range(3):
        target = site.mount(wide.image)
        assert Reader(target / "one").get() == wide.files["one"][:4096]  # type: ignore[index]
        assert mounts(site.host.root) == [site.info]
        site.unmount(target)
        eventually(lambda: site.servers() == [])
    assert erofs_mounts_below(site.place) == []
    assert loops_over(site.place) == []
    eventually(lambda: site.host.status()["servers"] == 0)


def test_umount_8_will_do(site: Site, wide: Sample) -> None:
    target = site.mount(wide.image)
    subprocess.run(["umount", target], check=True, timeout=WAIT)
    eventually(lambda: site.servers() == [])
    assert mounts(site.host.root) == []


def test_an_overlay_on_top(site: Site, wide: Sample, tmp_path: Path) -> None:
    target = site.mount(wide.image, upper=tmp_path / "changes")
    one = wide.files["one"]
    assert isinstance(one, bytes)
    with (target / "one").open("r+b") as file:  # copied up, so all of it is read
        file.write(b"changed")
    os.unlink(target / "two")
    assert (target / "one").read_bytes() == b"changed" + one[7:]
    assert outcome((target / "two").read_bytes) == "error 2 ENOENT"
    site.unmount(target)
    eventually(lambda: site.servers() == [])
    assert (tmp_path / "changes/one").exists()


def test_many_mounts_of_one_image(site: Site, wide: Sample) -> None:
    before = site.host.engine()["frames"]
    targets = [site.mount(wide.image, f"m{number}") for number in range(3)]
    assert len(site.servers()) == 3
    for target in targets:
        assert read_tree(target) == wide.files
    assert site.host.engine()["frames"] - before == 24 + 24 + 13, "each is fetched once"
    for target in targets:
        site.unmount(target)
    eventually(lambda: site.servers() == [])
