"""Commands that the worker carries out for clients, each in a thread: ``{"do": name, …}`` in, facts out."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final

import msgspec

from erofsgen.errors import ErofsgenError, UsageError
from erofsgen.host.cache.filling import fill_packs, take_over
from erofsgen.host.cache.manage import Removed, clear, collect, packs_of
from erofsgen.host.cache.verify import Report, verify
from erofsgen.progress import Task
from erofsgen.store.image import Image
from erofsgen.store.open import open_store

if TYPE_CHECKING:
    from erofsgen.host.daemon.worker import Worker

_logger: Final = logging.getLogger(__name__)

_INTERVAL: Final = 0.2
"""Seconds between two lines of progress."""


class Tasks:
    """The commands of ``worker``'s clients."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._commands: dict[str, Callable[[dict[str, Any], _Progress], Any]] = {
            "complete": self._complete,
            "gc": self._gc,
            "clear": self._clear,
            "verify": self._verify,
            "status": self._status,
            "take in": self._take_in,
            "expect": self._expect,
            "add": self._add,
        }

    def start(self, command: dict[str, Any], client: socket.socket) -> None:
        """Carry out ``command`` and reply to ``client``."""
        threading.Thread(target=self._run, args=(command, client), name="task", daemon=True).start()

    def _run(self, command: dict[str, Any], client: socket.socket) -> None:
        with client:
            client.setblocking(True)
            try:
                carry_out = self._commands.get(command["do"])
                if carry_out is None:
                    raise UsageError(f"unknown command {command['do']!r}", hint="is the daemon of another version?")
                reply = {"ok": msgspec.to_builtins(carry_out(command, _Progress(client)))}
            except ErofsgenError as error:
                reply = {"error": str(error), "kind": type(error).__name__, "hint": error.hint}
            except Exception as error:
                _logger.exception("%s", command, extra={"command": command})
                reply = {"error": f"{type(error).__name__}: {error}", "kind": "ErofsgenError", "hint": None}
            with suppress(OSError):
                client.sendall(json.dumps(reply).encode() + b"\n")

    def _complete(self, command: dict[str, Any], progress: _Progress) -> dict[str, Any]:
        """Bring all of an image."""
        worker = self._worker
        image = worker.cache.image(str(command["image"]), "")
        worker.add_stores(image)
        store = None
        with suppress(ErofsgenError):  # all may be here; of others nothing can be taken over
            store = next((open_store(url) for url in image.stores if "://" not in url), None)
        with worker.wanting([pack.hex for pack in image.packs]) as files:
            for pack, file in zip(image.packs, files, strict=True):
                take_over(worker.cache, pack, file, store)
            fill_packs(worker.engine, files, progress)
        return {}

    def _gc(self, command: dict[str, Any], progress: _Progress) -> Removed:  # noqa: ARG002
        return collect(self._worker.cache, images=bool(command["images"]), dry_run=bool(command["dry_run"]))

    def _clear(self, command: dict[str, Any], progress: _Progress) -> Removed:  # noqa: ARG002
        return clear(self._worker.cache)

    def _verify(self, command: dict[str, Any], progress: _Progress) -> Report:
        """Compare all packs with their digests."""
        worker = self._worker
        return verify(packs_of(worker.images()), worker.opened, worker.engine if command["repair"] else None, progress)

    def _status(self, command: dict[str, Any], progress: _Progress) -> dict[str, Any]:  # noqa: ARG002
        return self._worker.status()

    def _expect(self, command: dict[str, Any], progress: _Progress) -> dict[str, Any]:  # noqa: ARG002
        """Open a store that an image is about to come from."""
        self._worker.expect(str(command["store"]))
        return {}

    def _add(self, command: dict[str, Any], progress: _Progress) -> dict[str, Any]:
        """Have in the cache what a mount of an image needs."""
        worker = self._worker
        # The tiers before it are about to be read, too
        threading.Thread(target=worker.expect, args=(str(command["store"]),), name="expect", daemon=True).start()
        image = Image.open(worker.store(str(command["store"])), str(command["name"]))
        worker.cache.layout.reload()  # another process may have added a directory
        added = worker.cache.add(image, progress)
        return {"digest": added.digest, "name": added.name}

    def _take_in(self, command: dict[str, Any], progress: _Progress) -> dict[str, Any]:  # noqa: ARG002
        """Make profiles of what was recorded."""
        return {"recordings": self._worker.prefetching.take_in(str(command["token"]))}


class _Progress:
    """Work's progress as lines to the client."""

    def __init__(self, client: socket.socket) -> None:
        self._client = client
        self._lock = threading.Lock()

    @contextmanager
    def task(self, label: str, total: int | None = None) -> Iterator[Task]:
        task = _Task(self, label, total)
        yield task
        task.show()

    def show(self, facts: dict[str, Any]) -> None:
        with self._lock, suppress(OSError):
            self._client.sendall(json.dumps({"progress": facts}).encode() + b"\n")


class _Task:
    def __init__(self, progress: _Progress, label: str, total: int | None) -> None:
        self._progress = progress
        self._label = label
        self._total = total
        self._done = 0
        self._next = 0.0
        self._lock = threading.Lock()

    def advance(self, amount: int) -> None:
        with self._lock:
            self._done += amount
            now = time.monotonic()
            if now < self._next:
                return
            self._next = now + _INTERVAL
        self.show()

    def show(self) -> None:
        self._progress.show({"label": self._label, "total": self._total, "done": self._done})
