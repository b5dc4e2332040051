"""How a guest's end is noticed and brought about: a script in place of virtme-run, a sleeper in place of QEMU."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vmtests import guest
from vmtests.guest import End, Guest
from vmtests.kernels import Kernel

VIRTME = """\
import os, pathlib, subprocess, sys
behaviour, share, pid_file = sys.argv[1:]
share = pathlib.Path(share)
if behaviour == "done":
    (share / "status").write_text("1\\n")
elif behaviour != "crash":
    qemu = subprocess.Popen(["sleep", "60"])
    pathlib.Path(pid_file).write_text(f"{qemu.pid}\\n")
    if behaviour == "cut":
        (share / "power-cut").touch()
    qemu.wait()
"""

KERNEL = Kernel("6.12-ondemand", "6.12.117", Path("vmlinuz"), Path("config"), None)


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Starts a guest that behaves as told."""

    def start(behaviour):
        pid_file = tmp_path / "main-1.pid"
        command = [sys.executable, "-c", VIRTME, behaviour, str(tmp_path / "share"), str(pid_file)]
        monkeypatch.setattr(Guest, "_command", lambda *_: command)
        environment = {"QUOTED": "it's $HOME"}
        return Guest(KERNEL, tmp_path / "share", tmp_path / "main-1.console", {}, "true", environment, kvm=False)

    return start


@pytest.mark.parametrize(
    ("behaviour", "deadline", "end", "status"),
    [
        ("done", 60, End.DONE, 1),
        ("crash", 60, End.CRASHED, None),
        ("cut", 60, End.CUT, None),
        ("hang", 0.5, End.DEADLINE, None),
    ],
)
def test_how_a_guest_ended(start, tmp_path, behaviour, deadline, end, status):
    with start(behaviour) as running:
        outcome = running.wait(deadline)
    assert (outcome.end, outcome.status) == (end, status)
    assert outcome.seconds < 30
    assert not (tmp_path / "main-1.pid").exists()


def test_leaving_ends_the_guest(start, tmp_path):
    pid_file = tmp_path / "main-1.pid"
    with start("hang"):
        while not (pid_file.exists() and pid_file.read_text().endswith("\n")):
            time.sleep(0.01)
        pid = int(pid_file.read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_what_an_earlier_boot_left_is_not_taken_for_this_ones(start, tmp_path):
    (tmp_path / "share").mkdir()
    (tmp_path / "share/status").write_text("0\n")
    with start("crash") as running:
        assert running.wait(60).end is End.CRASHED


def test_the_environment_reaches_the_guest_as_it_is(start, tmp_path):
    with start("done") as running:
        running.wait(60)
    script = '. "$1" && printf %s "$QUOTED"'
    command = ["sh", "-c", script, "sh", tmp_path / "share/environment"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "it's $HOME"


def test_only_guests_that_were_left_are_ended(tmp_path):
    pid_file = tmp_path / "main-1.pid"
    sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
    with subprocess.Popen(sleeper) as other, subprocess.Popen([*sleeper, str(pid_file)]) as left:
        try:
            pid_file.write_text(f"{other.pid}\n")
            guest.end_left(tmp_path)
            pid_file.write_text(f"{left.pid}\n")
            while not Path(f"/proc/{left.pid}/cmdline").read_bytes():  # an instant after exec
                time.sleep(0.01)
            guest.end_left(tmp_path)
            assert left.wait(30) != 0
            assert other.poll() is None
        finally:
            other.kill()
            left.kill()


def filesystem(path):
    return subprocess.run(["blkid", "-o", "value", "-s", "TYPE", path], capture_output=True, text=True).stdout


def test_scratch_disks_are_new_and_sparse(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{os.environ['PATH']}:/usr/sbin:/sbin")
    for _ in range(2):
        disks = guest.make_disks(tmp_path)
        kinds = {kind: filesystem(path) for kind, path in disks.items()}
        assert kinds == {"ext4": "ext4\n", "xfs": "xfs\n"}
        assert all(path.stat().st_blocks * 512 < path.stat().st_size / 10 for path in disks.values())
        disks["ext4"].write_bytes(b"something else")
