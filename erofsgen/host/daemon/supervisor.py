"""The supervisor: one thread that holds the plane's kernel descriptor, answers, and keeps a worker and a standby alive.

::

    ROOT/
    ├── control.sock        root's alone (0600)
    ├── lock.daemon         exclusive: the supervisor and its standby, which inherits it
    ├── lock.fill           exclusive: whoever puts bytes into the cache, here on behalf of the worker
    └── daemon.log          what supervisor and worker say, unless systemd takes it

What dies, and what is left:

- the worker: requests wait here; the next worker is told all of them.
- the supervisor: readers wait, since the standby holds the group; it becomes the supervisor, and goes on with the
  journal. What had been read from the kernel in the same instant, and was not in the journal yet, fails with EIO.
- both: the same. Supervisor and standby in one instant, without systemd: the kernel lets readers pass, and they may
  read holes. The next daemon finds packs in use that it holds no group for, and cuts them off.
- SIGTERM: lazy mounts are detached, packs still in use are cut off: they give EIO from then on. SIGHUP starts the same
  program anew, with all it holds.

Imports nothing heavy: it is small, starts fast, and is not disturbed by what the worker does.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from erofsgen import __version__
from erofsgen.errors import BusyError, ErofsgenError, UsageError
from erofsgen.host.cache.files import Layout
from erofsgen.host.daemon import control, systemd
from erofsgen.host.daemon.channel import Message
from erofsgen.host.daemon.control import Connection, ControlServer
from erofsgen.host.daemon.journal import Journal
from erofsgen.host.daemon.loop import Loop
from erofsgen.host.daemon.mounted import detach, lazy_mounts
from erofsgen.host.daemon.mountwatch import MountWatch
from erofsgen.host.daemon.planes import Plane
from erofsgen.host.daemon.requests import Request, Requests
from erofsgen.host.daemon.standby import Standby, become
from erofsgen.host.daemon.workerlink import WorkerLink, worker_command

_logger: Final = logging.getLogger(__name__)

_TICK: Final = 0.5
"""Seconds between looks at deadlines."""
_SWEEP: Final = 10.0
"""Seconds between looks for packs that nothing uses any more."""
_SOON: Final = (0.02, 0.2, 1.0)
"""The same, after an unmount: the kernel closes a superblock's files a moment later."""
_KEPT_ERRORS: Final = 16


class Supervisor:
    """Runs ``plane`` for ``root``. ``holds``: what a successor needs, by name. ``arguments``: to start one with."""

    def __init__(
        self,
        root: Path,
        plane: Plane,
        journal: Journal | None,
        listening: socket.socket,
        holds: dict[str, int],
        arguments: Sequence[str],
        options: argparse.Namespace,
    ) -> None:
        self.root = root
        self.deadline: float = options.deadline
        self._loop = Loop()
        self._plane = plane
        self._journal = journal
        self._holds = holds
        self._arguments = list(arguments)
        self._requests = Requests(journal, options.deadline)
        self._mounts = MountWatch(root, plane.name, lambda message: self._worker.tell(message))
        self._control = ControlServer(self._loop, listening, self._command)
        self._standby = Standby(holds, arguments)
        self._worker = WorkerLink(
            self._loop,
            worker_command(str(root), options.worker),
            self._requests,
            introduction=plane.introduce,
            received=self._from_worker,
            started=self._mounts.worker_started,
        )
        self._started = time.time()
        self._denied = 0
        self._errors: deque[dict[str, Any]] = deque(maxlen=_KEPT_ERRORS)
        self._wanted: set[str] = set()  # what the worker asked packs for
        self._is_stopping = False
        self._stop_asked: list[Connection] = []
        plane.attach(self)

    # --- life --------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Until told to stop."""
        self._inherit()
        signal.set_wakeup_fd(self._loop.wakeup, warn_on_full_buffer=False)
        self._on(signal.SIGTERM, lambda: self._stop(None))
        self._on(signal.SIGINT, lambda: self._stop(None))
        self._on(signal.SIGHUP, self._replace)
        self._on(signal.SIGCHLD, self._reap)
        if self._plane.survives and not os.environ.get("NOTIFY_SOCKET"):
            self._standby.start()
        self._worker.start()
        self._loop.watch(self._plane.fileno(), self._plane.serve)
        self._loop.every(_TICK, self._tick)
        self._loop.every(_SWEEP, self._sweep)
        systemd.notify("READY=1", f"STATUS=plane {self._plane.name}", f"MAINPID={os.getpid()}")
        _logger.info(
            "supervisor %d of %s: plane %s", os.getpid(), self.root, self._plane.name, extra={"plane": self._plane.name}
        )
        gc.collect()
        gc.freeze()
        self._loop.run()

    def _on(self, number: signal.Signals, handler: Callable[[], None]) -> None:
        signal.signal(number, lambda _number, _frame: self._loop.call(handler))

    def _inherit(self) -> None:
        """Go on with what a dead supervisor had read, and with its mounts."""
        self._mounts.inherit()
        read = list(self._journal.entries()) if self._journal is not None else []
        entries = self._plane.inherit(read, self._journal.highest if self._journal is not None else 0)
        for entry in entries:
            self._requests.add(entry.key, entry.pack, entry.offset, entry.length)
        paths = {entry.pack: self._data_file(entry.pack) for entry in entries}
        found = [path for path in paths.values() if path is not None]
        for request in self._requests:
            if paths[request.pack] is None:
                self._answer(request.key, f"pack {request.pack}: not in the cache")
        if found:
            self._plane.prove(found, self._proved)

    def _proved(self, error: ErofsgenError | None) -> None:
        for request in self._requests:
            if error is not None:
                self._answer(request.key, str(error))
            else:
                self._worker.fill(request)

    def _data_file(self, pack: str) -> Path | None:
        files = Layout(self.root).find(pack)
        return None if files is None else files.data

    def _reap(self) -> None:
        with suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    break
                if self._worker.died(pid, status):
                    for token in list(self._wanted):
                        self._left(token)
                elif self._standby.died(pid):
                    self._standby.start()

    def _tick(self) -> None:
        for request in self._requests.expired():
            self._answer(request.key, _late(request))

    def _sweep(self) -> None:
        self._mounts.sweep()
        self._plane.sweep()

    def _replace(self) -> None:
        """Become the program that is installed now, with everything that is held."""
        self._worker.kill()
        self._standby.dismiss()
        become(self._holds, self._arguments)

    def _stop(self, connection: Connection | None) -> None:
        """Detach lazy mounts, make what is still in use fail, and end."""
        if connection is not None:
            self._stop_asked.append(connection)
        if self._is_stopping:
            return
        self._is_stopping = True
        systemd.notify("STOPPING=1")
        self._mounts.recorder.end_all()
        mounts = lazy_mounts(self.root)
        for mount in mounts:
            detach(mount)
        self._worker.kill()
        for request in self._requests:
            self._answer(request.key, "the daemon is stopping")
        self._plane.close_for_good(Layout(self.root).data_files(), self._stopped)

    def _stopped(self, cut_off: list[Path]) -> None:
        for path in cut_off:
            _logger.warning(
                "%s: in use and incomplete: cut off, reads of it fail from now on", path, extra={"pack": path.stem}
            )
        for name in self._holds:
            systemd.drop(name)
        self._standby.dismiss()
        for connection in self._stop_asked:
            connection.reply({"cut_off": len(cut_off)})
        with suppress(OSError):
            (self.root / control.SOCKET).unlink()
        self._loop.stop()

    # --- the plane's side --------------------------------------------------------------------------------------------

    def saw(self, key: int) -> None:
        """See :class:`erofsgen.host.daemon.planes.Supervisor`; so are the following."""
        if self._journal is not None:
            self._journal.saw(key)

    def missing(self, key: int, pack: str, offset: int, length: int) -> None:
        request = self._requests.add(key, pack, offset, length)
        if self._requests.is_stale(pack, offset, length):
            self._answer(key, _late(request))
        self._worker.fill(request)

    def touched(
        self, pack: str, offset: int, length: int, pid: int, key: int | None = None, mount: str | None = None
    ) -> None:
        self._mounts.recorder.touched(pack, offset, length, pid, key, mount)

    def cannot_see(self, pack: str) -> bool:
        if self._mounts.recorder.wants(pack):
            return False
        self._mounts.recorder.cannot_see(pack)
        return True

    def ahead(self, pack: str, offset: int, length: int) -> None:
        self._worker.ahead(pack, offset, length)

    def forget(self, pack: str) -> None:
        self._worker.forget(pack)

    def gave_back(self, size: int) -> None:
        self._worker.tell({"do": "freed", "bytes": size})

    def failed(self, error: str, pack: str | None = None) -> None:
        self._denied += 1
        self._errors.append({"at": time.time(), "error": error})
        _logger.error("read failed: %s", error, extra={"pack": pack})

    def call(self, call: Callable[[], None]) -> None:
        self._loop.call(call)

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        self._loop.after(seconds, call)

    def watch(self, descriptor: int, ready: Callable[[], None], events: int) -> None:
        self._loop.watch(descriptor, ready, events)

    def unwatch(self, descriptor: int) -> None:
        self._loop.unwatch(descriptor)

    # --- the worker's side -------------------------------------------------------------------------------------------

    def _from_worker(self, message: Message) -> None:
        match message["do"]:
            case "done":
                request = self._requests.get(message["key"])
                if request is not None and request.serial == message["serial"]:
                    self._answer(request.key, message["error"])
            case "complete":
                self._plane.completed(message["pack"])
            case "want":
                self._want(message["token"], [Path(path) for path in message["packs"]])
            case "through":
                self._through(message["token"], message["packs"])
            case "prefetched":
                self._mounts.prefetched(message["mount"])
            case "leave":
                self._left(message["token"])
            case "cull":
                freed = self._plane.cull(message["wanted"], message["keep"])
                self._worker.tell({"do": "freed", "bytes": freed, "token": message["token"]})

    def _want(self, token: str, packs: list[Path]) -> None:
        """The worker wants to write to packs, whether they are mounted or not: it may through our descriptors only."""

        def done(error: ErofsgenError | None) -> None:
            for path in packs:
                self._worker.introduce(path.stem)
            self._worker.tell({"do": "wanted", "token": token, "error": None if error is None else str(error)})

        self._wanted.add(token)
        self._plane.arm(token, packs, done)

    def _through(self, token: str, packs: list[str]) -> None:
        """The worker wants to write to what is mounted of packs: it is told what to call them, if they have names."""
        names = self._plane.through(packs)
        for name in names or ():
            if name is not None:
                self._worker.introduce(name)
        self._worker.tell({"do": "named", "token": token, "names": names})

    def _left(self, token: str) -> None:
        self._wanted.discard(token)
        self._plane.made(token)

    def _answer(self, key: int, error: str | None) -> None:
        """The kernel is told, once."""
        request = self._requests.get(key)
        if request is None:
            return
        self._plane.answer(key, failed=error is not None)
        self._requests.answered(key)
        self._mounts.recorder.answered(key)
        if error is not None:
            self.failed(error, request.pack.partition(":")[0])

    # --- commands ----------------------------------------------------------------------------------------------------

    def _command(self, connection: Connection, command: dict[str, Any]) -> None:
        match command["do"]:
            case "hello":
                connection.reply({"version": __version__, "pid": os.getpid(), "plane": self._plane.name})
            case "arm":
                if command["plane"] != self._plane.name:
                    raise BusyError(
                        f"{self.root}: the daemon is of plane {self._plane.name}",
                        hint="stop it first, or use its plane",
                    )
                self._arm(connection, command)
            case "made":
                connection.closed = lambda: None
                self._plane.made(str(command["mount"]))
                self._mounts.made(str(command["mount"]), command)
                connection.reply({})
            case "unmounted":
                self._mounts.gone(str(command["mount"]))
                for seconds in _SOON:
                    self._loop.after(seconds, self._plane.sweep)
                connection.reply({})
            case "status":
                connection.reply(self._status())
            case "stop":
                self._stop_command(connection, force=bool(command.get("force")))
            case "worker":
                descriptor = self._control.take(connection)
                self._worker.client({"command": command["command"]}, descriptor)
            case unknown:
                raise UsageError(f"unknown command {unknown!r}", hint="is the daemon of another version?")

    def _arm(self, connection: Connection, command: dict[str, Any]) -> None:
        mount = str(command["mount"])
        packs = [Path(path) for path in command["packs"]]
        self._mounts.begin(mount, packs, command)
        connection.closed = lambda: self._not_made(mount)  # it died before it could say so

        def done(error: ErofsgenError | None) -> None:
            if error is None:
                facts = command.get("facts", {})
                _logger.info(
                    "mount %s: armed, packs: %d", mount, len(packs),
                    extra={
                        "mount": mount, "target": facts.get("target"), "image": facts.get("name"),
                        "digest": facts.get("image"), "command": facts.get("command") or None,
                    },
                )  # fmt: skip
                connection.reply({})
            else:
                connection.closed = lambda: None
                self._not_made(mount)
                connection.fail(error)

        self._plane.arm(mount, packs, done)

    def _not_made(self, mount: str) -> None:
        self._mounts.gone(mount)
        self._plane.made(mount)

    def _stop_command(self, connection: Connection, *, force: bool) -> None:
        mounted = [mount["target"] for mount in lazy_mounts(self.root)]
        if mounted and not force:
            more = f" and {len(mounted) - 1} more" if len(mounted) > 1 else ""
            raise BusyError(
                f"{mounted[0]}{more}: mounted lazily", hint="unmount first; --force makes reads of what is missing fail"
            )
        if self._plane.in_use() and not force:
            raise BusyError("images are mounted, by hand", hint="unmount first; --force makes reads of them fail")
        self._stop(connection)

    def _status(self) -> dict[str, Any]:
        return {
            "version": __version__,
            "pid": os.getpid(),
            "started": self._started,
            "plane": self._plane.name,
            "standby": self._standby.pid,
            "worker": self._worker.pid,
            "worker_restarts": self._worker.restarts,
            "waiting": len(self._requests),
            **self._mounts.status(),
            "denied": self._denied,
            "errors": list(self._errors),
            **self._plane.facts(),
        }


def _late(request: Request) -> str:
    return f"pack {request.pack}: bytes {request.offset}+{request.length}: not here in time"
