"""A process that holds what the supervisor holds, does nothing, and becomes the supervisor when that dies.

While it lives the kernel keeps readers waiting, whoever else dies. Under systemd there is none: systemd's descriptor
store does the same, and would end a process it does not expect.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Final, NoReturn

_DISMISSED: Final = b"."


class Standby:
    """The supervisor's side. ``descriptors``: what to hold, by name; ``arguments``: of the supervisor to become."""

    def __init__(self, descriptors: Mapping[str, int], arguments: Sequence[str]) -> None:
        self._descriptors = dict(descriptors)
        self._arguments = list(arguments)
        self._pipe = -1
        self.pid = 0

    def start(self) -> None:
        """Fork it. The caller must have no other threads that matter: only this one lives on in the child."""
        read, write = os.pipe2(os.O_CLOEXEC)
        pid = os.fork()
        if pid == 0:
            try:
                os.close(write)
                _stand_by(read, self._descriptors, self._arguments)
            finally:
                os._exit(1)
        os.close(read)
        self._pipe, self.pid = write, pid

    def died(self, pid: int) -> bool:
        """A child has ended. True: it was the standby, and :meth:`start` is due."""
        if pid != self.pid:
            return False
        os.close(self._pipe)
        self.pid = 0
        return True

    def dismiss(self) -> None:
        """Let it end, now that there is nothing left to hold."""
        if self.pid:
            os.write(self._pipe, _DISMISSED)
            os.waitpid(self.pid, 0)
            self.died(self.pid)


def _stand_by(pipe: int, descriptors: Mapping[str, int], arguments: Sequence[str]) -> NoReturn:
    os.setsid()
    signal.set_wakeup_fd(-1)
    for ignored in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(ignored, signal.SIG_IGN)  # only the supervisor's end matters
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    os.dup2(null, 0)
    held = {*descriptors.values(), pipe}
    for name in os.listdir("/proc/self/fd"):
        number = int(name)
        if number > 2 and number not in held:  # it must not keep data files, or a worker's channel, open
            with suppress(OSError):  # the directory listing's own
                os.close(number)
    if os.read(pipe, 1) == _DISMISSED:
        os._exit(0)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    become(descriptors, arguments)


def become(descriptors: Mapping[str, int], arguments: Sequence[str]) -> NoReturn:
    """Turn this process into a supervisor that goes on with ``descriptors``."""
    for descriptor in descriptors.values():
        os.set_inheritable(descriptor, True)
    inherited = ",".join(f"{name}={number}" for name, number in descriptors.items())
    os.execv(  # noqa: S606  (the same program, by its own name)
        sys.executable,
        [sys.executable, "-m", "erofsgen.host.daemon", *arguments, "--inherit", inherited],
    )
