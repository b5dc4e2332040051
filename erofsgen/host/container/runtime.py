"""Drives an OCI runtime: create, start, wait, delete, for a container in the foreground.

``create`` and ``start`` instead of ``run``, since only so it can be told whether the *runtime* failed, upon which
another may be tried, or the container did. The container's first process becomes this process's child
(PR_SET_CHILD_SUBREAPER), so its exit status needs no help from the runtime. What a runtime has to say about a failure
goes to standard error, which is the container's, too.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Final, Self

from erofsgen.errors import NotFoundError, StorageError, UnsupportedError
from erofsgen.host import linux
from erofsgen.host.container.terminal import Terminal

KNOWN: Final = ("runc", "crun")
"""Runtimes that ``auto`` tries, in this order."""

_FORWARDED: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
_SYSTEMD: Final = ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "NOTIFY_SOCKET")
"""Variables that runtimes act on, but which are meant for somebody else."""


def find_runtimes(name: str) -> list[str]:
    """The programs behind ``auto``, a name or a path. Raises NotFoundError."""
    found = [path for path in map(shutil.which, KNOWN if name == "auto" else (name,)) if path]
    if not found:
        what = " or ".join(KNOWN) if name == "auto" else name
        raise NotFoundError(f"no OCI runtime {what} on this host", hint="install one: `apt-get install runc`")
    return [os.path.abspath(path) for path in found]


class Container:
    """A container in the making, below the directory ``place``, which is its bundle and keeps its runtime's state::

    place/state/      the runtime's own (``--root``)
    place/runtime     the runtime's path, written before it is started
    place/pid         of the container's first process, written by the runtime
    place/console     the socket over which a terminal is handed out
    """

    def __init__(self, place: Path, identity: str) -> None:
        self.place = place
        self.identity = identity

    def execute(self, runtimes: Sequence[str], *, terminal: bool, interactive: bool) -> int:
        """Run it with the first of ``runtimes`` that can create it; returns its exit code, 128 + N for signal N.

        Meanwhile signals to this process go to the container. Without ``interactive`` it reads nothing.

        Raises UnsupportedError where no runtime can create or start it, StorageError.
        """
        with ExitStack() as stack:
            signals = stack.enter_context(_Signals())
            stack.enter_context(_subreaper())
            console = stack.enter_context(Terminal(self.place / "console")) if terminal else None
            self._create(runtimes, console, interactive=interactive)
            first = stack.enter_context(_First(int((self.place / "pid").read_text())))
            if console is not None:
                console.accept()
            if self._call("start", self.identity, stdin=subprocess.DEVNULL):
                raise UnsupportedError("the OCI runtime could not start the container", hint="it says why above")
            signals.go_to(first.descriptor)
            if console is not None:
                console.relay(first.descriptor, interactive=interactive)
            signals.wait(first.descriptor)
            return first.wait()

    def delete(self) -> None:
        """End what still runs, and forget the container. It need not exist."""
        with suppress(FileNotFoundError):
            self._call("delete", "--force", self.identity, stdin=subprocess.DEVNULL, quiet=True)

    def _create(self, runtimes: Sequence[str], console: Terminal | None, *, interactive: bool) -> None:
        arguments = ["create", "--bundle", os.fspath(self.place), "--pid-file", os.fspath(self.place / "pid")]
        if console is not None:
            arguments += ["--console-socket", console.socket_path]
        inherit = interactive and console is None
        for runtime in runtimes:
            (self.place / "runtime").write_text(runtime)
            if self._call(*arguments, self.identity, stdin=None if inherit else subprocess.DEVNULL) == 0:
                return
            self.delete()
        tried = " or ".join(os.path.basename(runtime) for runtime in runtimes)
        raise UnsupportedError(f"{tried} could not create the container", hint="it says why above")

    def _call(self, *arguments: str, stdin: int | None, quiet: bool = False) -> int:
        runtime = (self.place / "runtime").read_text()
        silent = subprocess.DEVNULL if quiet else None
        # a new session: a terminal's Ctrl-C is for this process to pass on
        try:
            return subprocess.run(
                [runtime, "--root", os.fspath(self.place / "state"), "--log", os.devnull, *arguments],
                cwd=self.place,
                env={name: value for name, value in os.environ.items() if name not in _SYSTEMD},
                stdin=stdin,
                stdout=silent,
                stderr=silent,
                start_new_session=True,
                check=False,
            ).returncode
        except PermissionError as error:
            raise StorageError(f"{runtime}: {error.strerror}") from error


@contextmanager
def _subreaper() -> Iterator[None]:
    linux.set_child_subreaper(True)
    try:
        yield
    finally:
        linux.set_child_subreaper(False)


class _First:
    """A container's first process, a child of this one; it does not outlive the block."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._ended = False
        self.descriptor = os.pidfd_open(pid)

    def wait(self) -> int:
        """Its exit code, or 128 + the number of the signal that ended it."""
        _, status = os.waitpid(self._pid, 0)
        self._ended = True
        code = os.waitstatus_to_exitcode(status)
        return code if code >= 0 else 128 - code

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if not self._ended:  # a runtime would wait long for it to vanish, which it does when it is waited for
            signal.pidfd_send_signal(self.descriptor, signal.SIGKILL)
            self.wait()
        os.close(self.descriptor)


class _Signals:
    """What becomes of signals to this process: they go to the container, once there is one.

    One that comes before is kept, and interrupts if a second one comes or there will be no container: a runtime is
    better not killed halfway.
    """

    def __init__(self) -> None:
        self._process: int | None = None
        self._early: list[int] = []

    def go_to(self, process: int) -> None:
        """The container is there, behind a pidfd."""
        self._process = process
        while self._early:
            self._handle(self._early.pop(0))

    def wait(self, process: int) -> None:
        """Until the process behind a pidfd has ended; signals are passed on meanwhile.

        Not in waitpid(2): a signal that comes right before it is not handled until it returns.
        """
        while process not in select.select([process, self._woken], [], [])[0]:
            with suppress(BlockingIOError):
                os.read(self._woken, 4096)

    def _handle(self, number: int, frame: FrameType | None = None) -> None:  # noqa: ARG002  (a signal handler's)
        if self._process is not None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._process, signal.Signals(number))
            return
        self._early.append(number)
        if len(self._early) > 1:
            raise SystemExit(128 + number)

    def __enter__(self) -> Self:
        self._woken, self._wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._wakeup_before = signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, self._handle) for number in _FORWARDED}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._wake)
        os.close(self._woken)
        if self._early:
            raise SystemExit(128 + self._early[0])
