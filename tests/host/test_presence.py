"""The presence map: what it says, and what it must never say."""

from __future__ import annotations

import fcntl
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from blake3 import blake3
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from erofsgen.errors import StorageError
from erofsgen.host.cache.presence import HEADER_SIZE, Presence, State, boot_id, map_size

ONE, TWO, THREE = (bytes([number]) * 16 for number in (1, 2, 3))
"""Boot ids."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "pack.map"


@pytest.fixture
def presence(path: Path) -> Iterator[Presence]:
    with Presence.open(path, 10, boot=ONE) as presence:
        yield presence


def states(presence: Presence) -> list[State]:
    return [presence.state(frame) for frame in range(presence.frames)]


def test_a_new_map_has_nothing(presence: Presence, path: Path) -> None:
    assert states(presence) == [State.ABSENT] * 10
    assert not presence.ready(0, 0)
    assert presence.missing(range(10)) == list(range(10))
    assert presence.count() == 0
    assert not presence.complete
    assert path.stat().st_size == map_size(10)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.stat().st_blocks * 512 >= map_size(10), "a mark must not find the disk full"


def test_marks(presence: Presence) -> None:
    for frame in (2, 3, 5):
        presence.mark_written(frame)
    presence.mark_durable([2, 4])
    assert states(presence)[2:6] == [State.DURABLE, State.WRITTEN, State.ABSENT, State.WRITTEN], "4 had no bytes"
    assert [presence.ready(2, last) for last in range(2, 6)] == [True, True, False, False]
    assert presence.missing(range(1, 7)) == [1, 4, 6]
    assert presence.missing(range(2, 4)) == []
    assert presence.missing(range(4, 4)) == []
    assert presence.ready(4, 3), "of no frames, all are there"
    assert presence.written() == [3, 5]
    assert presence.count() == 3
    presence.mark_absent(2)
    presence.mark_absent([5, 6])
    assert presence.written() == [3]
    assert presence.count() == 1
    presence.clear()
    assert presence.count() == 0


def test_complete(path: Path) -> None:
    with Presence.open(path, 3) as presence:
        presence.mark_written(0)
        presence.mark_written(1)
        assert not presence.complete
        presence.mark_written(2)
        presence.mark_durable([1])
        assert presence.complete


def test_a_pack_without_frames_is_complete(path: Path) -> None:
    with Presence.open(path, 0) as presence:
        assert presence.complete
        assert presence.ready(0, -1)
        assert presence.missing(range(0)) == []


def test_frames_outside_the_pack_are_refused_not_found_in_the_header(presence: Presence) -> None:
    for call in (
        lambda: presence.ready(-1, -1),
        lambda: presence.ready(10, 10),
        lambda: presence.ready(-2, 3),
        lambda: presence.ready(8, 10),
        lambda: presence.missing(range(8, 11)),
        lambda: presence.missing(range(-1, 3)),
        lambda: presence.state(10),
        lambda: presence.mark_written(10),
        lambda: presence.mark_written(-1),
        lambda: presence.mark_absent(-1),
        lambda: presence.mark_durable([10]),
    ):
        with pytest.raises(IndexError):
            call()  # type: ignore[no-untyped-call]
    assert states(presence) == [State.ABSENT] * 10


def mixed(path: Path) -> None:
    """Frame 0 ABSENT, 1 WRITTEN, 2 DURABLE, in boot ONE."""
    with Presence.open(path, 3, boot=ONE) as presence:
        presence.mark_written(1)
        presence.mark_written(2)
        presence.mark_durable([2])


def test_marks_outlive_the_process_in_the_same_boot(path: Path) -> None:
    mixed(path)
    with Presence.open(path, 3, boot=ONE) as presence:
        assert states(presence) == [State.ABSENT, State.WRITTEN, State.DURABLE]
        assert presence.suspects() == []


def test_another_boot_suspects_what_was_not_durable(path: Path) -> None:
    mixed(path)
    for boot in (TWO, THREE, THREE):  # a suspect stays one
        with Presence.open(path, 3, boot=boot) as presence:
            assert states(presence) == [State.ABSENT, State.SUSPECT, State.DURABLE]
            assert presence.suspects() == [1]
            assert not presence.ready(1, 1)
            assert not presence.ready(1, 2)
            assert presence.missing(range(3)) == [0, 1]
            assert presence.count() == 1
            presence.mark_durable([1])
            assert presence.make_durable(lambda: None) == 0
            assert presence.state(1) is State.SUSPECT, "synced or not, nobody compared it"
    with Presence.open(path, 3, boot=THREE) as presence:
        presence.mark_written(1)
        assert presence.ready(1, 2)
    with Presence.open(path, 3, boot=THREE) as presence:
        assert presence.state(1) is State.WRITTEN
    with Presence.open(path, 3, boot=ONE) as presence:
        assert presence.state(1) is State.SUSPECT, "a boot that was before is another boot"


def test_this_boot_has_an_id(path: Path) -> None:
    assert len(boot_id()) == 16
    assert boot_id() == boot_id() != bytes(16)
    with Presence.open(path, 3) as presence:
        presence.mark_written(1)
    with Presence.open(path, 3) as presence:
        assert presence.state(1) is State.WRITTEN
    with Presence.open(path, 3, boot=ONE) as presence:
        assert presence.state(1) is State.SUSPECT


def test_states_from_the_future_are_absent(path: Path) -> None:
    mixed(path)
    with path.open("r+b") as file:
        file.seek(HEADER_SIZE)
        file.write(b"\xff\x04\x02")
    with Presence.open(path, 3, boot=ONE) as presence:
        assert states(presence) == [State.ABSENT, State.ABSENT, State.DURABLE]
        assert presence.missing(range(3)) == [0, 1]
        assert presence.count() == 1
    with Presence.open(path, 3, boot=TWO) as presence:
        assert states(presence) == [State.ABSENT, State.ABSENT, State.DURABLE]
    assert path.read_bytes()[HEADER_SIZE : HEADER_SIZE + 3] == b"\0\0\2"


DAMAGES: dict[str, Any] = {
    "empty": lambda data: b"",
    "one byte": lambda data: data[:1],
    "half a header": lambda data: data[:20],
    "header alone": lambda data: data[:HEADER_SIZE],
    "one frame short": lambda data: data[:-1],
    "one frame long": lambda data: data + b"\2",
    "much longer": lambda data: data + b"\2" * 100_000,
    "zeros": lambda data: bytes(HEADER_SIZE) + data[HEADER_SIZE:],
    "wrong magic": lambda data: b"X" + data[1:],
    "wrong version": lambda data: data[:8] + b"\7" + data[9:],
    "wrong count": lambda data: data[:12] + b"\4" + data[13:],
    "other file": lambda data: b"\2" * len(data),
}


@pytest.mark.parametrize("boot", [ONE, TWO])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_map_says_nothing_and_is_made_anew(path: Path, damage: str, boot: bytes) -> None:
    mixed(path)
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    with Presence.open(path, 3, boot=boot) as presence:
        assert states(presence) == [State.ABSENT] * 3
        presence.mark_written(1)
    assert path.stat().st_size == map_size(3)
    with Presence.open(path, 3, boot=boot) as presence:
        assert states(presence) == [State.ABSENT, State.WRITTEN, State.ABSENT]


def test_the_map_of_a_pack_with_another_number_of_frames_is_made_anew(path: Path) -> None:
    mixed(path)
    with Presence.open(path, 4, boot=ONE) as presence:
        assert states(presence) == [State.ABSENT] * 4


def test_a_map_that_cannot_be_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=f"{tmp_path}/no/pack.map: No such file"):
        Presence.open(tmp_path / "no/pack.map", 3)
    with pytest.raises(StorageError, match="Is a directory"):
        Presence.open(tmp_path, 3)


def test_closing_twice_is_no_error(path: Path) -> None:
    before = set(os.listdir("/proc/self/fd"))
    presence = Presence.open(path, 3)
    presence.close()
    presence.close()
    assert set(os.listdir("/proc/self/fd")) == before
    with pytest.raises(ValueError, match="closed"):
        presence.ready(0, 0)


def test_a_map_that_failed_to_open_leaves_no_descriptor(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(StorageError, match="No space left"):
        Presence.open(path, 3)
    assert set(os.listdir("/proc/self/fd")) == before


def test_made_durable_is_what_was_written_before_the_sync(presence: Presence) -> None:
    presence.mark_written(1)
    presence.mark_written(2)
    seen = []

    def sync() -> None:
        seen.append(states(presence)[1:4])
        presence.mark_written(3)  # while the disk is busy

    assert presence.make_durable(sync) == 2
    assert seen == [[State.WRITTEN, State.WRITTEN, State.ABSENT]], "not before sync has returned"
    assert states(presence)[1:4] == [State.DURABLE, State.DURABLE, State.WRITTEN]
    assert presence.make_durable(lambda: None) == 1
    assert presence.make_durable(pytest.fail) == 0, "nothing to sync"


def test_what_could_not_be_synced_is_absent(presence: Presence) -> None:
    presence.mark_written(1)
    presence.make_durable(lambda: None)
    presence.mark_written(2)

    def sync() -> None:
        presence.mark_written(3)
        raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output"):
        presence.make_durable(sync)
    assert states(presence)[1:4] == [State.DURABLE, State.ABSENT, State.WRITTEN]
    presence.mark_absent(3)  # the lock is free again


def test_no_mark_is_taken_back_during_a_sync_by_this_or_another_opening(presence: Presence, path: Path) -> None:
    """Or a frame found bad meanwhile, fetched again and written would be called durable."""
    for other in (presence, Presence.open(path, 10, boot=ONE)):
        presence.mark_written(1)
        begun, back = threading.Event(), threading.Event()

        def take_back(other: Presence = other, begun: threading.Event = begun, back: threading.Event = back) -> None:
            begun.wait()
            other.mark_absent(1)
            back.set()

        def sync(begun: threading.Event = begun, back: threading.Event = back) -> None:
            begun.set()
            assert not back.wait(0.1)

        thread = threading.Thread(target=take_back)
        thread.start()
        presence.make_durable(sync)
        thread.join()
        assert presence.state(1) is State.ABSENT
    other.close()


def test_a_map_is_not_opened_while_another_opening_changes_it(presence: Presence, path: Path) -> None:
    """Else the marks of one who has opened it in this boot could become SUSPECT by one who began before."""
    presence.mark_written(1)
    opened = threading.Event()

    def open_it() -> None:
        with Presence.open(path, 10, boot=ONE):
            opened.set()

    thread = threading.Thread(target=open_it)

    def sync() -> None:
        thread.start()
        assert not opened.wait(0.1)

    presence.make_durable(sync)
    assert opened.wait(20)
    thread.join()


def test_flock_is_left_to_the_cache(presence: Presence, path: Path) -> None:
    fcntl.flock(presence.fileno(), fcntl.LOCK_SH)
    with Presence.open(path, 10, boot=TWO) as other, path.open("rb") as third:
        other.mark_absent(1)
        with pytest.raises(BlockingIOError):
            fcntl.flock(third, fcntl.LOCK_EX | fcntl.LOCK_NB)


CHILD = """
import os, sys, time
from pathlib import Path
from erofsgen.host.cache.presence import Presence
"""


def python(code: str, *arguments: object, **more: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD + code, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **more)


def test_two_processes_see_each_others_marks(path: Path) -> None:
    code = """
presence = Presence.open(Path(sys.argv[1]), 1000)
print("open", flush=True)
for line in sys.stdin:
    frame = int(line)
    assert presence.ready(frame, frame)
    presence.mark_written(frame + 1)
    print(frame + 1, flush=True)
"""
    with Presence.open(path, 1000) as presence, python(code, path) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stdout.readline() == "open\n"
        for frame in range(0, 100, 2):
            assert presence.missing(range(frame, frame + 2)) == [frame, frame + 1]
            presence.mark_written(frame)
            print(frame, file=child.stdin, flush=True)
            assert child.stdout.readline() == f"{frame + 1}\n"
            assert presence.ready(0, frame + 1)
        child.stdin.close()
        assert child.wait(20) == 0
        assert presence.count() == 100


def test_processes_that_open_at_once_agree(path: Path) -> None:
    """In another boot each may find the old marks, and none may undo what one of the others has marked since."""
    code = """
number, boot = int(sys.argv[2]), bytes.fromhex(sys.argv[3])
sys.stdin.readline()
presence = Presence.open(Path(sys.argv[1]), 8, boot=boot)
presence.mark_written(number)
"""
    with Presence.open(path, 8, boot=ONE) as presence:
        for frame in range(8):
            presence.mark_written(frame)
    children = [python(code, path, number, TWO.hex()) for number in range(4)]
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
    for child in children:
        with child:
            assert child.wait(20) == 0
    with Presence.open(path, 8, boot=TWO) as presence:
        assert states(presence) == [State.WRITTEN] * 4 + [State.SUSPECT] * 4


FRAME = 64 << 10


def test_a_killed_process_leaves_no_frame_marked_whose_bytes_are_wrong(path: Path, tmp_path: Path) -> None:
    code = """
import random
from blake3 import blake3
FRAME = 64 << 10
presence = Presence.open(Path(sys.argv[1]), 200)
data = os.open(sys.argv[2], os.O_RDWR)
print("open", flush=True)
order = list(range(200))
random.Random(int(sys.argv[3])).shuffle(order)
for frame in order:
    content = blake3(b"%d" % frame).digest(FRAME)
    if not presence.ready(frame, frame):
        os.pwrite(data, content, frame * FRAME)
        presence.mark_written(frame)
print("done", flush=True)
time.sleep(60)
"""
    data = tmp_path / "pack.data"
    with data.open("wb") as file:
        file.truncate(200 * FRAME)
    counts = []
    for seed in range(8):
        with python(code, path, data, seed) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == "open\n"
            time.sleep(random.Random(seed).uniform(0, 0.02))
            child.send_signal(signal.SIGKILL)
            child.wait()
        content = data.read_bytes()
        with Presence.open(path, 200) as presence:
            marked = [frame for frame in range(200) if presence.ready(frame, frame)]
            for frame in marked:
                assert content[frame * FRAME : (frame + 1) * FRAME] == blake3(b"%d" % frame).digest(FRAME)
            counts.append(len(marked))
            if len(marked) == 200:  # quick machine: begin again
                presence.clear()
    assert any(0 < count < 200 for count in counts), "killed in the midst of it at least once"


def test_a_process_killed_while_it_makes_the_map_harms_nobody(path: Path) -> None:
    """Whatever prefix of the steps of opening in another boot was done, the next opening has the same result."""
    mixed(path)
    before = path.read_bytes()
    with Presence.open(path, 3, boot=TWO):
        after = path.read_bytes()
    assert before[HEADER_SIZE:] != after[HEADER_SIZE:]
    assert before[:HEADER_SIZE] != after[:HEADER_SIZE]
    halfway = before[:HEADER_SIZE] + after[HEADER_SIZE:]
    for content in (before, halfway, after):
        path.write_bytes(content)
        with Presence.open(path, 3, boot=TWO) as presence:
            assert states(presence) == [State.ABSENT, State.SUSPECT, State.DURABLE]


class Model(RuleBasedStateMachine):
    """The map against a list of states, across boots, damage and two openings."""

    @initialize(frames=st.integers(0, 40))
    def begin(self, frames: int) -> None:
        self.place = tempfile.TemporaryDirectory()
        self.path = Path(self.place.name) / "map"
        self.frames = frames
        self.boot = ONE
        self.model = [State.ABSENT] * frames
        self.openings = [Presence.open(self.path, frames, boot=ONE) for _ in range(2)]

    def reopen(self) -> None:
        for presence in self.openings:
            presence.close()
        self.openings = [Presence.open(self.path, self.frames, boot=self.boot) for _ in range(2)]

    @precondition(lambda self: self.frames)
    @rule(data=st.data(), which=st.integers(0, 1))
    def write(self, data: st.DataObject, which: int) -> None:
        frame = data.draw(st.integers(0, self.frames - 1))
        self.openings[which].mark_written(frame)
        self.model[frame] = State.WRITTEN

    @precondition(lambda self: self.frames)
    @rule(data=st.data(), which=st.integers(0, 1))
    def write_many(self, data: st.DataObject, which: int) -> None:
        first = data.draw(st.integers(0, self.frames - 1))
        for frame in range(first, data.draw(st.integers(first, self.frames))):
            self.openings[which].mark_written(frame)
            self.model[frame] = State.WRITTEN

    @rule(data=st.data(), which=st.integers(0, 1))
    def take_back(self, data: st.DataObject, which: int) -> None:
        frames = data.draw(st.sets(st.integers(0, self.frames - 1))) if self.frames else set()
        self.openings[which].mark_absent(frames)
        for frame in frames:
            self.model[frame] = State.ABSENT

    @rule(which=st.integers(0, 1), works=st.booleans())
    def make_durable(self, which: int, works: bool) -> None:
        after = State.DURABLE if works else State.ABSENT
        expected = self.model.count(State.WRITTEN)

        def sync() -> None:
            if not works:
                raise OSError(5, "Input/output error")

        if works or not expected:
            assert self.openings[which].make_durable(sync) == expected
        else:
            with pytest.raises(OSError, match="Input/output"):
                self.openings[which].make_durable(sync)
        self.model = [after if state is State.WRITTEN else state for state in self.model]

    @rule(which=st.integers(0, 1))
    def clear(self, which: int) -> None:
        self.openings[which].clear()
        self.model = [State.ABSENT] * self.frames

    @rule(boot=st.sampled_from([ONE, TWO, THREE]))
    def start(self, boot: bytes) -> None:
        if boot != self.boot:
            self.model = [State.SUSPECT if state is State.WRITTEN else state for state in self.model]
        self.boot = boot
        self.reopen()

    @rule(size=st.integers(0, map_size(60)))
    def damage(self, size: int) -> None:
        for presence in self.openings:
            presence.close()
        if size != map_size(self.frames):
            self.model = [State.ABSENT] * self.frames
        os.truncate(self.path, size)
        self.reopen()

    @invariant()
    def agrees(self) -> None:
        here = [state in (State.WRITTEN, State.DURABLE) for state in self.model]
        for presence in self.openings:
            assert states(presence) == self.model
            assert presence.count() == sum(here)
            assert presence.complete == all(here)
            assert presence.suspects() == [i for i, state in enumerate(self.model) if state is State.SUSPECT]
            for first in range(0, self.frames, 7):
                for last in (first, self.frames - 1):
                    assert presence.ready(first, last) == all(here[first : last + 1])
                    missing = [i for i in range(first, last + 1) if not here[i]]
                    assert presence.missing(range(first, last + 1)) == missing

    def teardown(self) -> None:
        for presence in getattr(self, "openings", []):
            presence.close()
        if hasattr(self, "place"):
            self.place.cleanup()


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


def test_uses_are_remembered_by_the_minute(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1_800_000_000.0]
    monkeypatch.setattr("erofsgen.host.cache.presence.time.time", lambda: clock[0])
    with Presence.open(path, 5) as presence:
        assert presence.last_uses() == [0] * 5
        presence.touch(1, 2)
        clock[0] += 3600
        presence.touch(2, 2)
        with Presence.open(path, 5, boot=ONE) as other:
            assert other.last_uses() == [0, 30_000_000, 30_000_060, 0, 0]
            assert states(other) == [State.ABSENT] * 5, "to be used is not to be there"


def test_a_use_that_is_noted_costs_no_write(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Presence.open(path, 5) as presence:
        monkeypatch.setattr("erofsgen.host.cache.presence.time.time", lambda: 1_800_000_000.0)
        presence.touch(0, 4)
        monkeypatch.setattr("erofsgen.host.cache.presence._write", lambda *_: pytest.fail("written twice"))
        presence.touch(0, 4)
