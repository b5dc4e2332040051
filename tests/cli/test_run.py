"""run: real containers of the demo image, by a real OCI runtime."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest

from erofsgen.host import linux
from erofsgen.store.base import Descriptor
from erofsgen.store.directory import DirectoryStore
from erofsgen.store.image import Image
from erofsgen.store.manifest import MANIFEST_TYPE

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(not (shutil.which("runc") or shutil.which("crun")), reason="no OCI runtime is installed"),
]


@pytest.fixture
def demo(demo, monkeypatch):
    """Ends what a test started and did not end; after each test nothing is left of its containers."""
    demo.options.append("--quiet")
    with ExitStack() as stack:
        start = demo.process

        def process(*arguments, **options):
            process = stack.enter_context(start(*arguments, **options))
            stack.callback(process.terminate)
            return process

        monkeypatch.setattr(demo, "process", process)
        yield demo
    assert left_of(demo) == ([], [], [])


def left_of(program) -> tuple[list[str], list[str], list[str]]:
    """Directories of runs, states of mounts, and mounts, without anything having been swept."""
    run, mounts = program.root / "run", program.root / "mounts"
    return (
        os.listdir(run) if run.exists() else [],
        os.listdir(mounts) if mounts.exists() else [],
        [point.target for point in linux.mount_points() if Path(point.target).is_relative_to(program.root)],
    )


def started(process: subprocess.Popen[bytes]) -> str:
    """The first line a container prints."""
    assert process.stdout is not None
    return process.stdout.readline().decode().strip()


def configured(program, name: str, **config: object) -> str:
    """The demo image with another config."""
    store = DirectoryStore(program.store)
    image = Image.open(store, "demo")
    digest, size = store.put(json.dumps({**image.config, "config": config}).encode())
    blob = Descriptor(image.manifest.config.media_type, digest, size)
    digest, size = store.put(msgspec.json.encode(msgspec.structs.replace(image.manifest, config=blob)))
    store.tag(name, Descriptor(MANIFEST_TYPE, digest, size))
    return name


def test_a_program_of_the_image(demo):
    outcome = demo("run", "demo", "--", "python3", "-c", "import os, sys; print(sys.prefix, os.getpid(), os.getcwd())")
    assert outcome.out == b"/usr 1 /\n"


def test_options_behind_the_image_are_the_commands(demo):
    outcome = demo("run", "demo", "python3", "-c", "import sys; print(sys.argv)", "--rw", "-t", "--", "--quiet")
    assert outcome.out == b"['-c', '--rw', '-t', '--', '--quiet']\n"


def test_the_images_config(demo):
    name = configured(
        demo,
        "configured",
        Entrypoint=["/bin/sh", "-c", 'echo "$0 $@"; id -u; id -g; id -G; pwd; echo "$A $B $HOME"; umask'],
        Cmd=["from", "cmd"],
        Env=["A=1", "B=2"],
        User="daemon:games",
        WorkingDir="/srv/not/there/yet",
    )
    path = "/usr/sbin:/usr/bin:/sbin:/bin"
    outcome = demo("run", "-e", f"PATH={path}", name)
    assert outcome.lines == ["from cmd", "1", "60", "60", "/srv/not/there/yet", "1 2 /usr/sbin", "0022"]
    outcome = demo("run", "-e", "B=x", "-u", "0", "-w", "/opt", name, "other")
    assert outcome.lines == ["other ", "0", "0", "0", "/opt", "1 x /root", "0022"]
    assert demo("run", "--entrypoint", "/bin/echo", name).out == b"\n"
    assert demo("run", "--entrypoint", '["/bin/echo", "-n"]', name, "x").out == b"x"


def test_a_variable_of_the_caller(demo, monkeypatch):
    monkeypatch.setenv("GIVEN", "on")
    monkeypatch.delenv("ABSENT", raising=False)
    outcome = demo("run", "-e", "GIVEN", "-e", "ABSENT", "demo", "sh", "-c", "echo $GIVEN ${ABSENT-none}")
    assert outcome.out == b"on none\n"


def test_supplementary_groups(demo):
    outcome = demo("run", "demo", "sh", "-c", "echo 'audio:x:29:nobody' >/etc/group; grep -c . /etc/group")
    assert outcome.out == b"1\n"  # changes are the container's
    name = configured(demo, "grouped", Cmd=["id", "-G"], User="backup")
    assert demo("run", name).out.split()[0] == b"34"


@pytest.mark.parametrize("code", [0, 1, 7, 255])
def test_exit_codes(demo, code):
    process = demo.process("run", "demo", "sh", "-c", f"exit {code}")
    assert process.communicate(timeout=20) == (b"", b"")
    assert process.returncode == code


def test_errors_before_the_command(demo, tmp_path):
    assert "no program 'frobnicate' in its PATH" in demo("run", "demo", "frobnicate", code=3).err
    assert "no user 'who'" in demo("run", "-u", "who", "demo", "true", code=3).err
    assert "no image 'none'" in demo("run", "none", "true", code=3).err
    assert "no such" in demo("run", "-v", f"{tmp_path}/none:/x", "demo", "true", code=3).err.replace(
        "no /", "no such /"
    )
    assert "is no name of a container" in demo("run", "--name", "../x", "demo", "true", code=2).err
    assert "contradict" in demo("run", "--rw", "--read-only", "demo", "true", code=2).err
    assert "no OCI runtime none" in demo("run", "--runtime", "none", "demo", "true", code=3).err


def test_standard_streams(demo):
    process = demo.process("run", "-i", "demo", "sh", "-c", "cat; echo said >&2", stdin=subprocess.PIPE)
    out, err = process.communicate(b"given\n", timeout=20)
    assert (process.returncode, out, err) == (0, b"given\n", b"said\n")
    process = demo.process("run", "demo", "cat", stdin=subprocess.PIPE)
    assert process.communicate(b"ignored\n", timeout=20)[0] == b""


def test_a_reader_that_goes_away(demo):
    process = demo.process("run", "-t", "demo", "yes")
    assert started(process) == "y"
    process.stdout.close()
    assert process.wait(20) == 128 + signal.SIGPIPE
    assert process.stderr.read() == b""


def test_isolation(demo):
    script = "ls /proc | grep -c '^[0-9]'; hostname; touch /sys/x 2>/dev/null || echo ro"
    lines = demo("run", "--hostname", "inside", "demo", "sh", "-c", f"{script}; true").lines
    assert int(lines[0]) < 6
    assert lines[1:] == ["inside", "ro"]
    effective = demo("run", "demo", "grep", "CapEff", "/proc/self/status").out.split()[1]
    assert int(effective, 16) == 0x800405FB  # chown, … setfcap: podman's eleven
    assert demo("run", "-u", "1000", "demo", "grep", "CapEff", "/proc/self/status").out.split()[1] == b"0" * 16


def test_network(demo):
    list_links = ["python3", "-c", "import socket; print(sorted(name for _, name in socket.if_nameindex()))"]
    ours = subprocess.run(["readlink", "/proc/self/ns/net"], capture_output=True, text=True, check=True).stdout
    assert demo("run", "demo", "readlink", "/proc/self/ns/net").out.decode() == ours
    assert b"'lo'" in demo("run", "--network", "none", "demo", *list_links).out
    assert demo("run", "--network", "none", "demo", "readlink", "/proc/self/ns/net").out.decode() != ours
    if os.path.exists("/etc/resolv.conf"):
        assert demo("run", "demo", "cat", "/etc/resolv.conf").out == Path("/etc/resolv.conf").read_bytes()


def test_read_only(demo):
    script = "touch /opt/x || echo no; touch /tmp/x /run/x /var/tmp/x && echo yes"
    assert demo("run", "--read-only", "-w", "/made", "demo", "sh", "-c", script).lines == ["no", "yes"]
    assert demo("run", "demo", "sh", "-c", "touch /opt/x && ls /opt").lines == ["app", "x"]
    assert demo("run", "demo", "ls", "/opt").lines == ["app"]


def test_changes_are_kept(demo, tmp_path):
    upper = tmp_path / "upper"
    demo("run", "--upper", upper, "demo", "sh", "-c", "echo kept >/opt/file; rm /opt/app/VERSION")
    assert (upper / "opt/file").read_text() == "kept\n"
    script = "cat /opt/file; test -e /opt/app/VERSION || echo gone"
    assert demo("run", "--upper", upper, "demo", "sh", "-c", script).lines == ["kept", "gone"]


def test_volumes(demo, tmp_path, monkeypatch):
    shared, fixed = tmp_path / "shared", tmp_path / "fixed"
    shared.mkdir()
    fixed.mkdir()
    (fixed / "file").write_text("of the host\n")
    script = "cat /a/b/file; echo new >/w/new; touch /a/b/x 2>/dev/null || echo ro; cat /etc/motd"
    volumes = ["-v", f"{shared}:/w", "-v", f"{fixed}:/a/b:ro", "-v", f"{fixed}/file:/etc/motd:ro"]
    assert demo("run", *volumes, "demo", "sh", "-c", script).lines == ["of the host", "ro", "of the host"]
    assert (shared / "new").read_text() == "new\n"
    monkeypatch.chdir(tmp_path)
    assert demo("run", "-v", "./fixed:/x", "demo", "ls", "/x").lines == ["file"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_go_to_the_container(demo, number):
    script = (
        "import signal, sys, time\n"
        f"signal.signal({int(number)}, lambda *_: sys.exit(42))\n"
        "print('up', flush=True)\nwhile True: time.sleep(0.05)"  # no signal falls between a check and a long sleep
    )
    process = demo.process("run", "demo", "python3", "-c", script)
    assert started(process) == "up"
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (42, b"")


def test_a_signal_that_ends_the_container(demo):
    script = "import os, signal; signal.signal(15, signal.SIG_DFL); print('up', flush=True); os.read(0, 1)"
    process = demo.process("run", "-i", "--name", "ended", "demo", "python3", "-c", script, stdin=subprocess.PIPE)
    assert started(process) == "up"
    pid = int((demo.root / "run/ended/pid").read_text())
    os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGKILL


def test_an_interrupted_mount_leaves_nothing(demo):
    """SIGTERM at any time before the container runs."""
    for delay in (0.2, 0.3, 0.4):
        process = demo.process("run", "demo", "sleep", "1")
        time.sleep(delay)
        process.terminate()
        _, err = process.communicate(timeout=20)
        # 2 is runc's, where the signal meets its own process between start and exec
        assert process.returncode in (0, 2, 128 + signal.SIGTERM, -signal.SIGTERM), err
        assert left_of(demo) == ([], [], []), err


def test_two_at_once(demo):
    script = "echo mine >/opt/mine; hostname; read line; cat /opt/mine; ls /opt | wc -l"
    runs = [demo.process("run", "-i", "demo", "sh", "-c", script, stdin=subprocess.PIPE) for _ in range(2)]
    names = {started(process) for process in runs}
    assert len(names) == 2
    assert names == set(os.listdir(demo.root / "run"))
    for process in runs:
        assert process.communicate(b"\n", timeout=20)[0] == b"mine\n2\n"
        assert process.returncode == 0


def test_a_name_is_taken_while_its_container_runs(demo):
    process = demo.process("run", "--name", "one", "-i", "demo", "sh", "-c", "hostname; cat", stdin=subprocess.PIPE)
    assert started(process) == "one"
    assert "a container one is running" in demo("run", "--name", "one", "demo", "true", code=9).err
    process.communicate(timeout=20)
    assert demo("run", "--name", "one", "demo", "hostname").out == b"one\n"


def test_a_killed_run_is_swept_by_the_next(demo):
    process = demo.process("run", "--name", "killed", "demo", "sh", "-c", "echo up; exec sleep 1000")
    assert started(process) == "up"
    pid = int((demo.root / "run/killed/pid").read_text())
    process.kill()
    process.wait()
    assert os.path.exists(f"/proc/{pid}")
    assert os.path.ismount(demo.root / "run/killed/rootfs")
    assert demo("run", "demo", "echo", "next").out == b"next\n"
    assert not os.path.exists(f"/proc/{pid}") or "(sleep) Z" in Path(f"/proc/{pid}/stat").read_text()
    assert left_of(demo) == ([], [], [])


def test_a_killed_runs_kept_changes_survive_the_sweep(demo, tmp_path):
    upper = tmp_path / "upper"
    process = demo.process("run", "--upper", upper, "demo", "sh", "-c", "echo x >/kept; echo up; exec sleep 1000")
    assert started(process) == "up"
    process.kill()
    process.wait()
    demo("run", "demo", "true")
    assert (upper / "kept").read_text() == "x\n"


def test_auto_takes_a_runtime_that_works(demo, tmp_path, monkeypatch):
    """Not one that merely has the right name."""
    working = next(name for name in ("runc", "crun") if demo.any("run", "--runtime", name, "demo", "true").code == 0)
    (tmp_path / "runc").write_text("#!/bin/sh\necho 'runc: not today' >&2\nexit 1\n")
    (tmp_path / "runc").chmod(0o755)
    (tmp_path / "crun").symlink_to(shutil.which(working))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    outcome = demo("run", "demo", "echo", "done")
    assert (outcome.out, outcome.err) == (b"done\n", "runc: not today\n")
    (tmp_path / "crun").unlink()
    (tmp_path / "crun").symlink_to("runc")
    assert left_of(demo) == ([], [], [])
    assert "runc or crun could not create the container" in demo("run", "demo", "true", code=8).err
    assert demo("run", "--runtime", shutil.which(working, path="/usr/sbin:/usr/bin"), "demo", "echo", "x").out == b"x\n"


class TestTerminal:
    """The container's terminal, through a terminal of our own."""

    @pytest.fixture
    def terminal(self):
        master, slave = pty.openpty()
        set_size(slave, 31, 87)
        yield Screen(master), slave
        os.close(master)
        os.close(slave)

    def test_a_dialogue(self, demo, terminal):
        screen, slave = terminal
        script = (
            "stty size; read line; echo got:$line; trap 'stty size; resized=1' WINCH; echo ready; "
            'until [ "$resized" ]; do sleep 0.1; done; read line; exit 9'
        )
        streams = {"stdin": slave, "stdout": slave, "stderr": slave}
        process = demo.process("run", "-it", "demo", "bash", "-c", script, **streams)
        screen.wait_for("31 87")
        screen.type(b"hello\n")
        screen.wait_for("got:hello")
        screen.wait_for("ready")
        set_size(slave, 10, 20)
        process.send_signal(signal.SIGWINCH)
        screen.wait_for("10 20")
        screen.type(b"\n")
        assert process.wait(20) == 9

    def test_control_c_is_the_containers(self, demo, terminal):
        screen, slave = terminal
        script = "trap 'echo caught; exit 5' INT; echo ready; sleep 60 & wait"
        process = demo.process("run", "-it", "demo", "bash", "-c", script, stdin=slave, stdout=slave, stderr=slave)
        screen.wait_for("ready")
        screen.type(b"\x03")
        screen.wait_for("caught")
        assert process.wait(20) == 5

    def test_without_a_terminal_of_ours(self, demo):
        outcome = demo("run", "-t", "demo", "sh", "-c", "tty; head -c 300000 /dev/zero | tr '\\0' x; exit 0")
        assert re.fullmatch(rb"/dev/pts/0\r\nx{300000}", outcome.out)
        process = demo.process("run", "-it", "demo", "cat", stdin=subprocess.PIPE)
        assert process.communicate(b"line\n", timeout=20)[0].count(b"line\r\n") == 2  # echoed, and by cat


def set_size(descriptor: int, rows: int, columns: int) -> None:
    subprocess.run(["stty", "rows", str(rows), "cols", str(columns)], stdin=descriptor, check=True)


class Screen:
    """What a person at the terminal sees and types."""

    def __init__(self, master: int) -> None:
        self._master = master
        self._seen = b""

    def type(self, keys: bytes) -> None:
        os.write(self._master, keys)

    def wait_for(self, text: str) -> None:
        """``text`` appears, behind what was waited for before."""
        deadline = time.monotonic() + 20
        while text.encode() not in self._seen:
            assert select.select([self._master], [], [], max(0, deadline - time.monotonic()))[0], self._seen
            self._seen += os.read(self._master, 4096)
        self._seen = self._seen.partition(text.encode())[2]
