"""Which plane ``auto`` means where others do not work, and what is said where FUSE cannot be."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from fusekit import servers
from handmade import ImageMaker, chunks_of, contents, erofs_mounts_below
from lazykit import Host, eventually, processes

from erofsgen.cli.main import run
from erofsgen.cli.shared import Settings
from erofsgen.errors import BusyError, StorageError, UnsupportedError
from erofsgen.host import doctor, linux, probes
from erofsgen.host.cache.cache import HostCache
from erofsgen.host.mount import fuse
from erofsgen.host.mount.mounts import mounts, unmount
from erofsgen.host.mount.state import Plane
from erofsgen.host.probes import Finding


def works(_: Path) -> Finding:
    return Finding("a check", "ok", "works")


def lacks(what: str) -> doctor.Check:
    return lambda _: Finding(what, "missing", f"no {what} here", "get another kernel")


@pytest.fixture
def planes(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[tuple[doctor.Check, ...], ...]]:
    """What planes need, to be changed: nothing works that is not said to."""
    needs = {plane: ((lacks(plane),),) for plane in doctor.PLANES}
    monkeypatch.setattr(doctor, "PLANES", needs)
    return needs  # type: ignore[return-value]


@pytest.fixture
def chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def choose(*, quiet: bool = False) -> tuple[str, list[str]]:
        settings = Settings()
        settings.root, settings.quiet = tmp_path / "root", quiet
        plane = settings.plane("auto")
        return plane, capsys.readouterr().err.splitlines()

    return choose


def test_the_first_that_works_and_why_not_others(planes, chosen) -> None:
    planes["blockfuse"] = planes["fuse"] = ((works,),)
    plane, (said,) = chosen()
    assert plane == "blockfuse"
    assert "plane blockfuse" in said
    assert "fanotify: fanotify: no fanotify here" in said
    assert "fscache: fscache: no fscache here" in said
    assert chosen(quiet=True) == ("blockfuse", [])


def test_a_kernel_that_asks_by_itself_needs_no_words(planes, chosen) -> None:
    planes["fscache"] = planes["blockfuse"] = ((works,),)
    assert chosen() == ("fscache", [])


def test_without_root_it_is_fuse(monkeypatch, chosen) -> None:
    """The real needs, but for what a plain user lacks."""
    needs = {
        plane: tuple(
            tuple(lacks("CAP_SYS_ADMIN") if check is probes.privilege else works for check in group) for group in groups
        )
        for plane, groups in doctor.PLANES.items()
    }
    monkeypatch.setattr(doctor, "PLANES", needs)
    plane, (said,) = chosen()
    assert plane == "fuse"
    assert "blockfuse: CAP_SYS_ADMIN" in said


def test_nothing_works(planes, chosen) -> None:
    with pytest.raises(UnsupportedError, match="blockfuse: blockfuse: no blockfuse here; fuse: fuse: no") as caught:
        chosen()
    assert "--eager" in str(caught.value.hint)


# --- what is missing -------------------------------------------------------------------------------------------------


@pytest.fixture
def image(maker: ImageMaker):
    (content,) = contents(1, 100_000)
    return maker.image("small", {"file": content}, [maker.pack(chunks_of(content))])


@pytest.fixture
def host(root: Path, request: pytest.FixtureRequest) -> Iterator[Host]:
    host = Host(root, request.param)
    yield host
    host.end()


BOTH = pytest.mark.parametrize("host", ["fuse", "blockfuse"], indirect=True)


def nothing_is_left(host: Host) -> None:
    assert erofs_mounts_below(host.root.parent) == []
    assert mounts(host.root) == []
    eventually(lambda: servers(host.root) == [])


@pytest.mark.mount
@BOTH
def test_no_pyfuse3(image, host: Host, mount_point: Path, store_dir: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(
        fuse,
        "importlib",
        SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: None if name == "pyfuse3" else 1)),
    )
    with pytest.raises(UnsupportedError, match="pyfuse3 is not installed") as caught:
        host.mount(image, mount_point)
    assert "pip install" in str(caught.value.hint)
    options = ["--store", str(store_dir), "--root", str(host.root)]
    code = run([*options, "mount", "small", str(mount_point), "--plane", host.plane])
    assert code == UnsupportedError.exit_code
    assert "erofsgen[fuse]" in capsys.readouterr().err
    nothing_is_left(host)
    assert processes(host.root) == [], "not even a daemon"


@pytest.mark.mount
@BOTH
def test_no_device(image, host: Host, mount_point: Path, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fuse, "_DEVICE", str(tmp_path / "none"))
    with pytest.raises(UnsupportedError, match="No such file") as caught:
        host.mount(image, mount_point)
    assert "modprobe fuse" in str(caught.value.hint)
    nothing_is_left(host)


@pytest.mark.mount
@BOTH
def test_a_server_that_cannot_start_leaves_no_mount(image, host: Host, mount_point: Path, monkeypatch) -> None:
    monkeypatch.setenv("EROFSGEN_FUSE", "speed=all")
    with pytest.raises(Exception, match="'speed=all' is no setting"):
        host.mount(image, mount_point)
    nothing_is_left(host)
    monkeypatch.delenv("EROFSGEN_FUSE")
    host.mount(image, mount_point)
    assert os.listdir(mount_point) == ["file"]


@pytest.mark.mount
@BOTH
def test_a_damaged_table_of_contents(image, host: Host, mount_point: Path) -> None:
    """The server says what is wrong, in the words of who looked."""
    host.mount(image, mount_point)
    unmount(mount_point, root=host.root)
    (toc,) = [HostCache(host.root).files(pack.hex).toc for pack in image.packs]
    toc.write_bytes(b"no table of contents")
    cached = HostCache(host.root).image("small", str(image.store.path))
    with pytest.raises(Exception, match=image.packs[0].hex):
        host.mount(cached, mount_point)
    nothing_is_left(host)


@pytest.mark.mount
def test_another_planes_daemon(image, root: Path, mount_point: Path) -> None:
    """A root has one daemon, of one plane: mounts of others are refused, and nothing of them is left."""
    host = Host(root, "fuse")
    try:
        host.start()
        other: Plane = "blockfuse"
        with pytest.raises(BusyError, match="the daemon is of plane fuse"):
            Host(root, other).mount(image, mount_point)
        assert erofs_mounts_below(root.parent) == []
    finally:
        host.end()


@pytest.mark.mount
@BOTH
def test_a_target_that_cannot_be_mounted_on(image, host: Host, mount_point: Path, monkeypatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.EPERM, "no")

    monkeypatch.setattr(linux, "move_mount", refused)
    with pytest.raises(StorageError):
        host.mount(image, mount_point)
    nothing_is_left(host)
