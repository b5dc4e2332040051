"""The daemon's parts: journal, requests, streams, what fanotify says, and systemd as its keeper."""

from __future__ import annotations

import argparse
import errno
import hashlib
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fillkit import make_pack
from handmade import CHUNK, ImageMaker, chunks_of, contents
from hypothesis import given, settings
from hypothesis import strategies as st
from lazykit import WAIT, Host, eventually, processes

from erofsgen.errors import FormatError
from erofsgen.host import linux
from erofsgen.host.cache.frames import frame_starts
from erofsgen.host.daemon import control, systemd
from erofsgen.host.daemon.journal import Entry, Journal
from erofsgen.host.daemon.requests import Requests
from erofsgen.host.daemon.streams import Ahead, Streams
from erofsgen.host.daemon.supervisor import Supervisor
from erofsgen.host.mount.mounts import unmount
from erofsgen.store.directory import DirectoryStore
from fanotify_daemon import protocol

PACK = "ab" * 32


# --- journal and requests --------------------------------------------------------------------------------------------


def test_a_journal_outlives_its_writer() -> None:
    journal = Journal.create(100)
    journal.saw(7)
    journal.add(7, PACK, 4096, 8192)
    journal.saw(40)
    journal.add(40, PACK, 0, 1)
    journal.remove(40)
    heir = Journal(os.dup(journal.fileno()))
    journal.close()
    assert list(heir.entries()) == [Entry(7, PACK, 4096, 8192)]
    assert heir.highest == 41
    heir.close()


def test_what_is_no_journal_is_refused() -> None:
    descriptor = os.memfd_create("x")
    os.ftruncate(descriptor, 8192)
    with pytest.raises(ValueError, match="not a journal"):
        Journal(descriptor)
    os.close(descriptor)


def test_a_journal_refuses_keys_without_a_slot() -> None:
    journal = Journal.create(4)
    with pytest.raises(IndexError):
        journal.add(4, PACK, 0, 1)
    journal.close()


def test_requests_expire_in_order_and_are_not_waited_for_again_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("erofsgen.host.daemon.requests.time.monotonic", lambda: now[0])
    requests = Requests(Journal.create(100), 30.0)
    requests.add(5, PACK, 1000, 1000)
    now[0] = 110.0
    requests.add(6, PACK, 5000, 1000)
    now[0] = 131.0
    assert [request.key for request in requests.expired()] == [5]
    requests.answered(5)
    assert requests.is_stale(PACK, 1999, 10)
    assert not requests.is_stale(PACK, 2000, 10)
    assert not requests.is_stale("cd" * 32, 1000, 10)
    now[0] = 134.0
    assert not requests.is_stale(PACK, 1000, 10)
    assert [request.key for request in requests] == [6]


class RecordedPlane:
    """A plane that knows no packs and records what the kernel would be told."""

    name = "recorded"

    def __init__(self) -> None:
        self.answers: list[tuple[int, bool]] = []

    def attach(self, _supervisor: object) -> None:
        pass

    def introduce(self, _pack: str) -> None:
        return None

    def answer(self, key: int, *, failed: bool) -> None:
        self.answers.append((key, failed))


def test_a_late_answer_is_not_taken_for_another_request(tmp_path: Path) -> None:
    """The kernel uses a key again once it was answered; the worker may still be at what the first one asked for."""
    plane, journal = RecordedPlane(), Journal.create(100)
    options = argparse.Namespace(deadline=30.0, worker=[])
    supervisor = Supervisor(tmp_path, plane, journal, control.listen(tmp_path), {}, [], options)
    supervisor.missing(5, PACK, 0, 4096)
    (first,) = supervisor._requests
    supervisor._from_worker({"do": "done", "key": 5, "serial": first.serial, "error": "no"})
    supervisor.missing(5, PACK, 1 << 20, 4096)
    (second,) = supervisor._requests
    supervisor._from_worker({"do": "done", "key": 5, "serial": first.serial, "error": None})
    assert plane.answers == [(5, True)], "the second is not there yet"
    supervisor._from_worker({"do": "done", "key": 5, "serial": second.serial, "error": None})
    assert plane.answers == [(5, True), (5, False)]
    supervisor._control.close()
    journal.close()


# --- streams ---------------------------------------------------------------------------------------------------------

MIB = 1 << 20


def test_small_and_random_reads_are_no_stream() -> None:
    streams = Streams(32 * MIB)
    assert all(streams.read(number * 16 * MIB % (250 * MIB), 128 << 10) is None for number in range(100))
    assert [streams.read(number * 20_000, 20_000) for number in range(50)] == [None] * 50


@given(st.integers(1, 64), st.sampled_from([64 << 10, 128 << 10, MIB, 3 * MIB]))
def test_a_sequential_reader_never_catches_up(limit: int, step: int) -> None:
    """After the start, what it reads was asked for before, once, and never more than the limit ahead."""
    streams = Streams(limit * MIB)
    asked: list[Ahead] = []
    for offset in range(0, 120 * MIB, step):
        if offset >= 8 * MIB:
            assert asked
            assert asked[-1].offset + asked[-1].length >= min(offset + step, offset)
        ahead = streams.read(offset, step)
        if ahead is not None:
            assert not asked or ahead.offset >= asked[-1].offset + asked[-1].length
            assert ahead.offset + ahead.length <= offset + step + limit * MIB
            asked.append(ahead)


def test_two_readers_of_one_pack_are_two_streams() -> None:
    streams = Streams(8 * MIB)
    found = []
    for number in range(16):
        found += [streams.read(number * MIB, MIB), streams.read(100 * MIB + number * MIB, MIB)]
    assert any(ahead is not None and ahead.offset < 50 * MIB for ahead in found)
    assert any(ahead is not None and ahead.offset >= 100 * MIB for ahead in found)


def test_a_stream_goes_on_in_the_following_pack() -> None:
    streams = Streams(8 * MIB)
    streams.continued(6 * MIB)
    assert streams.read(0, MIB) is None, "six are on their way"
    assert streams.read(MIB, 2 * MIB) == Ahead(6 * MIB, 5 * MIB)


# --- formats ---------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=60))
def test_frames_begin_where_the_toc_says(sizes: list[int]) -> None:

    with tempfile.TemporaryDirectory() as place:
        pack = make_pack(DirectoryStore(place), sizes)
        toc = pack.blob[pack.toc.dictionary[0] + pack.toc.dictionary[1] :]
        starts = frame_starts(toc, what="pack")
        assert starts == [*pack.toc.device_offsets.tolist(), pack.toc.device_size]


@pytest.mark.parametrize("data", [b"", b"short", bytes(100), struct.pack("<IBI", 1 << 30, 0, 0x8F92EAB1)])
def test_what_is_no_toc_is_refused(data: bytes) -> None:
    with pytest.raises(FormatError, match="what it is"):
        frame_starts(data, what="what it is")


def test_events_and_responses_are_the_kernels() -> None:
    ranged = struct.pack("=IBBHQii", 48, 3, 0, 24, linux.FAN_PRE_ACCESS, 9, 1234)
    ranged += struct.pack("=BBHIQQ", 6, 0, 24, 0, 8192, 4096)
    whole = struct.pack("=IBBHQii", 24, 3, 0, 24, linux.FAN_PRE_ACCESS, 10, 1)
    first, second = protocol.events(ranged + whole)
    assert first == (9, 1234, 8192, 4096)
    assert second[:3] == (10, 1, 0)
    assert second.length > 1 << 40
    assert protocol.allow(9) == struct.pack("=iI", 9, 1)
    assert protocol.deny(9) == struct.pack("=iI", 9, 2 | errno.EIO << 24)
    with pytest.raises(ValueError, match="version 4"):
        list(protocol.events(struct.pack("=IBBHQii", 24, 4, 0, 24, 0, 0, 0)))


# --- systemd ---------------------------------------------------------------------------------------------------------


class Manager:
    """What systemd is to a service of Type=notify with a descriptor store."""

    def __init__(self, place: Path, root: Path) -> None:
        self.root = root
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.address = place / "notify"
        self.socket.bind(str(self.address))
        self.socket.settimeout(WAIT)
        self.store: dict[str, int] = {}
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the service with what is in the store, and wait until it is ready."""
        names = list(self.store)
        moved = [os.dup(self.store[name]) for name in names]

        # as systemd does it: descriptors from 3 on, and the service's own process number
        code = (
            "import os, sys\n"
            "numbers = [int(word) for word in sys.argv[1].split(',') if word]\n"
            "high = [os.dup2(number, 200 + at) for at, number in enumerate(numbers)]\n"
            "[os.dup2(number, 3 + at, inheritable=True) for at, number in enumerate(high)]\n"
            "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(numbers)), LISTEN_FDNAMES=sys.argv[2])\n"
            "os.execv(sys.executable, [sys.executable, '-m', 'erofsgen.host.daemon', '--root', sys.argv[3],"
            " '--read-ahead=0'])\n"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, ",".join(map(str, moved)), ":".join(names), str(self.root)],
            env={**os.environ, "NOTIFY_SOCKET": str(self.address)},
            pass_fds=moved,
        )
        for descriptor in moved:
            os.close(descriptor)
        self.receive(until="READY=1")

    def receive(self, until: str) -> None:
        while True:
            data, descriptors, _, _ = socket.recv_fds(self.socket, 4096, 4)
            lines = data.decode().split("\n")
            facts = dict(line.split("=", 1) for line in lines)
            if "FDSTORE" in facts:
                self.store[facts["FDNAME"]] = descriptors[0]
            if "FDSTOREREMOVE" in facts:
                os.close(self.store.pop(facts["FDNAME"]))
            if until in lines:
                return

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        for descriptor in self.store.values():
            os.close(descriptor)
        self.socket.close()


@pytest.fixture
def manager(tmp_path: Path, root: Path) -> Iterator[Manager]:
    made = Manager(tmp_path, root)
    yield made
    Host(root).end()
    made.close()
    eventually(lambda: processes(root) == [])


@pytest.mark.mount
def test_systemd_keeps_readers_waiting_over_a_crash(
    maker: ImageMaker, manager: Manager, root: Path, mount_point: Path
) -> None:
    content = contents(1, 40 * CHUNK)[0]
    pack = maker.pack(chunks_of(content))
    image = maker.image("image", {"file": content}, [pack])
    manager.start()
    host = Host(root)
    assert set(manager.store) == {"fanotify", "journal", "lock", "fill", "listen"}
    assert host.status()["standby"] == 0, "systemd would end a process it does not know"
    host.mount(image, mount_point)
    host.kill("worker", send=signal.SIGSTOP)
    with subprocess.Popen(["sha256sum", mount_point / "file"], stdout=subprocess.PIPE) as reader:
        eventually(lambda: host.status()["waiting"] > 0)
        assert manager.process is not None
        for pid in processes(root):  # KillMode=control-group
            os.kill(pid, signal.SIGKILL)
        manager.process.wait()
        time.sleep(0.3)
        assert reader.poll() is None, "it waits"
        manager.start()

        assert reader.stdout is not None
        assert reader.stdout.read().split()[0].decode() == hashlib.sha256(content).hexdigest()
    unmount(mount_point, root=root)
    host.call("stop")
    manager.receive(until="STOPPING=1")
    assert manager.process.wait(WAIT) == 0


def test_the_unit_is_one_that_systemd_takes(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd is not installed")
    unit = Path(__file__).parents[2] / "packaging/systemd/erofsgen.service"
    copy = tmp_path / unit.name
    copy.write_text(unit.read_text().replace("/usr/bin/erofsgen", "/bin/true"))
    result = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(copy)], capture_output=True, text=True, timeout=WAIT
    )
    mine = [line for line in result.stderr.splitlines() if unit.name in line]
    assert mine == []


def test_a_restarted_service_keeps_its_plane(monkeypatch: pytest.MonkeyPatch) -> None:
    """systemd holds /dev/cachefiles: whoever tried the plane would find the device busy."""
    monkeypatch.setenv("LISTEN_FDNAMES", "lock:fscache:fill")
    monkeypatch.setenv("LISTEN_PID", "1")
    assert systemd.kept_names() == []
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
    assert "fscache" in systemd.kept_names()
