"""What mounts touch, from the planes to traces and profiles."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from handmade import CHUNK, ImageMaker, Sample, make_wide
from lazykit import Host, eventually, processes

from erofsgen.errors import FormatError
from erofsgen.host.cache.cache import HostCache
from erofsgen.host.daemon import recorder
from erofsgen.host.daemon.client import Client
from erofsgen.host.daemon.recorder import Recorder
from erofsgen.host.mount.mounts import unmount
from erofsgen.host.mount.state import Plane
from erofsgen.host.prefetch.recording import read
from erofsgen.host.prefetch.start import Start
from erofsgen.host.profiles import HostProfiles
from erofsgen.profile.trace import HERE

A, B = "a" * 64, "b" * 64


# --- the supervisor's side -------------------------------------------------------------------------------------------


def test_a_recording_keeps_first_touches_in_order_with_waits_and_processes(tmp_path: Path) -> None:
    made = Recorder(tmp_path)
    made.begin("m", [A, B], {"image": "sha256:1", "command": "run"}, active=True)
    made.touched(A, 0, 4096, os.getpid())
    made.touched(B, 8192, 100, os.getpid(), 7)
    time.sleep(0.02)
    made.answered(7)
    made.touched(A, 0, 4096, os.getpid())  # not the first time
    made.touched("c" * 64, 0, 4096, os.getpid())  # of no mount
    counted = made.status()["m"]
    assert (counted["touches"], counted["misses"], counted["missed_bytes"]) == (3, 1, 100)
    assert 0.02 <= counted["waited"] < 10
    assert made.end("m")
    assert not len(made)

    found = read(tmp_path / "recordings" / "m.touches")
    assert [(int(row["pack"]), int(row["offset"]), int(row["length"])) for row in found.touches] == [
        (0, 0, 4096),
        (1, 8192, 100),
    ]
    assert found.touches["waited"][0] == 0
    assert found.touches["waited"][1] >= 20_000
    assert (found.header.image, found.header.command, found.header.complete) == ("sha256:1", "run", True)
    assert found.header.processes == [(os.getpid(), recorder.name_of(os.getpid()))]


def test_readers_are_told_apart_by_their_root_directory(tmp_path: Path) -> None:
    made = Recorder(tmp_path)
    made.begin("mine", [A], {})
    made.begin("other", [A], {})
    made.mounted("mine", os.stat("/").st_dev)
    made.mounted("other", 12345)
    made.touched(A, 0, 4096, os.getpid())
    assert [counted["touches"] for counted in made.status().values()] == [1, 0]
    made.touched(A, 0, 4096, 0, None, "other")  # the plane knows
    assert [counted["touches"] for counted in made.status().values()] == [1, 1]
    made.mounted("mine", 54321)
    made.touched(A, 4096, 4096, os.getpid())  # nobody knows
    assert [counted["touches"] for counted in made.status().values()] == [2, 2]


def test_recordings_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "ROWS", 10)
    made = Recorder(tmp_path)
    made.begin("m", [A], {})
    for page in range(20):
        made.touched(A, page * 4096, 4096, 1)
    assert made.status()["m"]["touches"] == 20
    made.end("m")
    found = read(tmp_path / "recordings" / "m.touches")
    assert len(found.touches) == 10
    assert not found.header.complete


def test_a_recording_ends_after_a_while_and_its_mount_is_counted_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Recorder(tmp_path)
    made.begin("m", [A], {}, active=True)
    assert made.wants(A)
    made.touched(A, 0, 4096, 1)
    assert not made.expire()
    monkeypatch.setattr(recorder, "SECONDS", 0.0)
    assert made.expire()
    assert not made.wants(A)
    made.touched(A, 4096, 4096, 1)
    assert made.status()["m"]["touches"] == 2
    assert not read(tmp_path / "recordings" / "m.touches").header.complete
    assert not made.end("m")


def test_mounts_that_have_gone_are_known_by_their_device(tmp_path: Path) -> None:
    made = Recorder(tmp_path)
    made.begin("being made", [A], {})
    made.begin("m", [A], {})
    made.mounted("m", 77)
    assert made.gone({77, 78}) == []
    assert made.gone({78}) == ["m"]


DAMAGED = [
    b"", b"{}\n", b"[1]\n", b'{"rows": 1}\n', b"\xff\n", b"{}" + bytes(10_000), b'{"mount": "m"}\n' + bytes(24),
]  # fmt: skip


@pytest.mark.parametrize("data", DAMAGED)
def test_damaged_recordings_are_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.touches"
    path.write_bytes(data)
    with pytest.raises(FormatError):
        read(path)


# --- with daemons ----------------------------------------------------------------------------------------------------


@pytest.fixture
def wide(maker: ImageMaker) -> Sample:
    return make_wide(maker)


@pytest.fixture(params=["fanotify", "blockfuse", "fuse"])
def host(root: Path, request: pytest.FixtureRequest) -> Iterator[Host]:
    """A daemon that completes no packs by itself, and reads nothing ahead."""
    plane: Plane = request.param
    made = Host(root, plane, read_ahead=0)
    made.start("--worker=--complete-at", "--worker=2")
    yield made
    made.end()
    eventually(lambda: processes(root) == [])


def take_in(host: Host, token: str = "") -> list[dict[str, object]]:
    connection = Client.connect(host.root)
    assert connection is not None
    with connection:
        found: list[dict[str, object]] = connection.worker("take in", token=token)["recordings"]
    return found


@pytest.mark.mount
def test_a_start_is_recorded_and_replayed(host: Host, wide: Sample, mount_point: Path) -> None:
    names = [name for name, content in wide.files.items() if isinstance(content, bytes) and len(content) > 30 * CHUNK]
    first, second = names[:2]

    def start(*, mode: str, token: str = "") -> None:
        host.mount(wide.image, mount_point, start=Start(command="serve", mode=mode, token=token))  # type: ignore[arg-type]
        for name, offset in ((first, 20 * CHUNK), (second, 0)):
            with (mount_point / name).open("rb", buffering=0) as file:
                assert os.pread(file.fileno(), 4096, offset) == wide.files[name][offset : offset + 4096]  # type: ignore[index]

    start(mode="none", token="t")
    counted = next(iter(host.status()["mounts"].values()))
    assert (counted["target"], counted["command"]) == (str(mount_point), "serve")
    assert counted["misses"] >= 2
    unmount(mount_point, root=host.root)
    (recorded,) = take_in(host, "t")
    assert (recorded["command"], recorded["runs"]) == ("serve", 1)

    profiles = HostProfiles(host.root)
    profile = profiles.find(wide.image.digest, "serve")
    assert profile is not None
    trace = profiles.trace(wide.image.digest, "serve")
    assert trace is not None
    assert trace.complete
    assert trace.plane == host.plane
    assert (trace.touches["waited"] > 0).all()
    assert {trace.sources[number] for number in trace.touches["source"]} == {wide.image.store.url}
    if host.plane == "fanotify":
        assert (os.getpid(), recorder.name_of(os.getpid())) in trace.processes

    from erofsgen.host.cache.manage import clear

    host.end()
    clear(HostCache(host.root))
    host.start("--worker=--complete-at", "--worker=2")
    host.mount(wide.image, mount_point, start=Start(command="serve", mode="profile"))

    def prefetched() -> bool:
        connection = Client.connect(host.root)
        assert connection is not None
        with connection:
            mounts = connection.worker("status")["prefetch"]["mounts"]
        return [facts["state"] for facts in mounts.values()] == ["done"]

    eventually(prefetched)
    for name, offset in ((first, 20 * CHUNK), (second, 0)):
        with (mount_point / name).open("rb", buffering=0) as file:
            assert os.pread(file.fileno(), 4096, offset) == wide.files[name][offset : offset + 4096]  # type: ignore[index]
    counted = next(iter(host.status()["mounts"].values()))
    assert counted["misses"] == 0
    assert counted["touches"] >= 2
    unmount(mount_point, root=host.root)
    take_in(host)
    trace = profiles.trace(wide.image.digest, "serve")
    assert trace is not None
    assert not trace.touches["waited"].any()
    assert HERE not in {trace.sources[number] for number in trace.touches["source"]}
    assert len(trace.brought)
    assert trace.brought["used"].all()
    again = profiles.find(wide.image.digest, "serve")
    assert again is not None
    assert again.runs == 2
    assert np.allclose(again.confidence(), 1)

    host.end()
    for path in (host.root / "packs").glob("*.map"):
        with path.open("r+b") as map_file:
            map_file.seek(16)
            map_file.write(b"another boot's !")
    host.start("--worker=--complete-at", "--worker=2")
    host.mount(wide.image, mount_point, start=Start(command="serve", mode="profile"))
    eventually(prefetched)
    assert host.engine()["frames"] == 0, "what an earlier boot left is compared"


def test_mounts_that_are_gone_count_on(tmp_path: Path) -> None:
    made = recorder.Recorder(tmp_path)
    for number in range(3):
        made.begin(str(number), ["aa"], {"name": "web"}, record=False)
        made.touched("aa", 0, 100, 0)
        made.touched("aa", 100, 50, 0, number)
        made.answered(number)
        made.end(str(number))
    made.begin("untouched", ["aa"], {"name": "idle"}, record=False)
    made.end("untouched")
    counted = made.unmounted()
    assert list(counted) == ["web"]
    assert counted["web"].pop("waited") > 0
    assert counted["web"] == {"touches": 6, "touched_bytes": 450, "misses": 3, "missed_bytes": 150}
    for number in range(1100):
        made.begin("a", ["aa"], {"name": f"image {number}"}, record=False)
        made.touched("aa", 0, 100, 0)
        made.end("a")
    assert len(counted) == 1001
    assert sum(total["touches"] for total in counted.values()) == 1106
    assert counted[""]["touches"] == 101
