"""A root with a daemon of its own, for the tests of lazy mounts."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from erofsgen.errors import BusyError
from erofsgen.host.daemon import client
from erofsgen.host.daemon.client import Client
from erofsgen.host.mount.mounts import mount
from erofsgen.host.mount.state import Plane

WAIT = 120.0 if "EROFSGEN_VM" in os.environ else 20.0
"""Seconds that no test waits for anything that works; a guest without KVM is slow."""


class Host:
    """Below ``root``: mounts, and the daemon of ``plane``, which :meth:`end` takes away whatever state it is in."""

    def __init__(self, root: Path, plane: Plane = "fanotify", **options: float) -> None:
        self.root = root
        self.plane = plane
        self.options = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]

    def start(self, *more: str) -> None:
        client.start(self.root, ["--plane", self.plane, *self.options, *more])

    def call(self, do: str, **arguments: Any) -> dict[str, Any]:
        connection = Client.connect(self.root)
        assert connection is not None
        with connection:
            return connection.call(do, **arguments)

    def status(self) -> dict[str, Any]:
        """Also while one supervisor takes the place of another."""
        for _ in range(100):
            try:
                return self.call("status")
            except BusyError:
                time.sleep(0.05)
        return self.call("status")

    def engine(self) -> dict[str, Any]:
        connection = Client.connect(self.root)
        assert connection is not None
        with connection:
            return connection.worker("status")["engine"]

    def mount(self, image: Any, target: Path, **more: Any) -> Any:
        target.mkdir(exist_ok=True)
        return mount(image, target, root=self.root, plane=self.plane, **more)

    def running(self, *names: str) -> dict[str, Any]:
        """The status once these processes of the daemon run: ``pid``, which is the supervisor, ``standby``, ``worker``.

        While one is started anew its number is 0, and what is sent to that ends the whole test run, see kill(2).
        """
        status = self.status()
        eventually(lambda: all(status[name] for name in names) or status.update(self.status()))
        return status

    def kill(self, *names: str, send: int = signal.SIGKILL) -> None:
        """Send a signal to processes of the daemon at one go. Names as for :meth:`running`."""
        status = self.running(*names)
        for name in names:
            os.kill(status[name], send)

    def log(self) -> str:
        path = self.root / client.LOG
        return path.read_text() if path.exists() else ""

    def end(self) -> None:
        """Stop the daemon; where it does not answer, end its processes by their numbers."""
        try:
            connection = Client.connect(self.root)
            if connection is not None:
                with connection:
                    connection.stop(force=True)
        except BusyError as error:
            try:  # it may have been stopping already
                eventually(lambda: processes(self.root) == [])
            except AssertionError:
                raise AssertionError(self.log()) from error  # it says why
        finally:
            for pid in processes(self.root):
                os.kill(pid, signal.SIGKILL)


def processes(root: Path) -> list[int]:
    """Supervisors, standbys and workers of a root, and the servers of its FUSE mounts."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            arguments = Path("/proc", name, "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        of_daemon = any(b"erofsgen.host.daemon" in word for word in arguments) and os.fsencode(root) in arguments
        if of_daemon or (b"fusefallback.server" in arguments and b"--root=" + os.fsencode(root) in arguments):
            found.append(int(name))
    return found


def eventually(condition: Callable[[], object], within: float = WAIT) -> None:
    until = time.monotonic() + within
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


class Reader(threading.Thread):
    """Reads a range in a thread: a read that hangs must not hang the test."""

    def __init__(self, path: Path, offset: int = 0, length: int = 4096) -> None:
        super().__init__(daemon=True)
        self.path, self.offset, self.length = path, offset, length
        self.result: bytes | OSError | None = None
        self.start()

    def run(self) -> None:
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(self.offset)
                pieces = []
                while sum(map(len, pieces)) < self.length:
                    pieces.append(file.read(self.length - sum(map(len, pieces))))
                    if not pieces[-1]:
                        break
                self.result = b"".join(pieces)
        except OSError as error:
            self.result = error

    def get(self, within: float = WAIT) -> bytes | OSError:
        self.join(within)
        assert self.result is not None, f"{self.path}: still waiting after {within} s"
        return self.result
