"""Who builds into an object store and who collects its garbage: locks that are objects.

::

    erofsgen/locks/build-<random>   somebody writes blobs that no reference reaches yet
    erofsgen/locks/gc-<random>      somebody deletes blobs, or waits for builders to end

A lock is a small object with its holder's host, process and start as JSON: for messages only. What counts is that it is
there, and when the server says it was written.

**Taking one.** Write the own lock, then list all locks. Listings see every write that ended before, so of two that come
at once at least one sees the other. A builder that sees a collector removes its lock, waits until that one is gone and
begins again. A collector begins only once it is alone: it waits for the builders that are there, or gives up; new ones
wait for it. Of two collectors the one whose lock is older stays, the other gives up at once; who thinks to be the
older one waits a moment for the other to go, and gives up if it does not, since that one may have begun before.

**Keeping it.** A thread writes the lock again every ``refresh`` seconds. One that was not written for ``stale`` seconds
counts for nothing. Ages are differences between times the server gave to the own lock and to the other: this machine's
clock is not asked. A holder that could not write its lock for ``trust`` seconds (of a clock that goes on while the
machine sleeps) must not go on, and never trusts that lock again: a collector may have passed. Naming an image, deleting
a blob and leaving the block then raise RemoteError. What is left is a holder that is stopped between that look and its
one request for longer than ``stale`` less ``trust``.

**Crashes.** The lock of a holder that died is there until it is stale: collectors that meet a dead builder's give up or
wait that long, builders wait for a dead collector that long. The next collector removes stale locks. A collector that
died half-way has deleted blobs that nothing reached, which is as good as not having begun.
"""

from __future__ import annotations

import datetime as dt
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from erofsgen.errors import BusyError, ErofsgenError, RemoteError
from erofsgen.oci.patience import printable
from erofsgen.store import keys

if TYPE_CHECKING:
    from erofsgen.store.objects import Object, Objects

_BUILD: Final = "build"
_GC: Final = "gc"
_DOES: Final = {_BUILD: "a build is running", _GC: "garbage is being collected"}
_LIMIT: Final = 64 << 10

_logger: Final = logging.getLogger(__name__)


class Times(NamedTuple):
    """Seconds. ``poll``: between two looks at the locks of others. ``settle``: how long one that should give way may
    take to do so. The others are explained above."""

    refresh: float = 300.0
    trust: float = 1500.0
    stale: float = 1800.0
    poll: float = 2.0
    settle: float = 10.0


class _Holder(msgspec.Struct):
    host: str
    pid: int
    since: str


class Locks:
    """The locks of one store, whose name ``url`` is for messages."""

    def __init__(self, objects: Objects, url: str, times: Times) -> None:
        self._objects = objects
        self._url = url
        self._times = times
        self._held: set[_Lock] = set()

    def check(self) -> None:
        """Raises RemoteError where a lock that is held was not written again in time: others may think it is gone."""
        for lock in list(self._held):
            lock.check()

    @contextmanager
    def building(self) -> Iterator[None]:
        """Held by a builder; waits for collectors to end. Raises RemoteError, also where it was lost meanwhile."""
        while True:
            with self._holding(_BUILD) as own:
                collectors = [other for other in own.others() if _kind(other) == _GC]
                if not collectors:
                    yield
                    return
            self._wait_for(collectors)

    @contextmanager
    def collecting(self, wait: float) -> Iterator[None]:
        """Held by a collector, who waits ``wait`` seconds for builders.

        Raises BusyError, RemoteError, also where it was lost meanwhile.
        """
        with self._holding(_GC) as own:
            began = time.monotonic()
            while others := own.others():
                passed = time.monotonic() - began
                before = [other for other in others if (other.modified, other.key) < (own.modified, own.key)]
                rivals = [other for other in before if _kind(other) == _GC]
                if rivals or passed >= (wait if before else max(wait, self._times.settle)):
                    raise self._busy((rivals or before or others)[0])
                time.sleep(min(self._times.poll, max(0.05, wait - passed)))
            for lock in own.stale:
                self._objects.delete(lock.key)
            yield

    @contextmanager
    def _holding(self, kind: str) -> Iterator[_Lock]:
        own = _Lock(self._objects, kind, self._url, self._times)
        try:
            own.take()
            self._held.add(own)
            yield own
            own.check()
        finally:
            self._held.discard(own)
            own.release()

    def _wait_for(self, collectors: list[Object]) -> None:
        """Until they are gone, at most until it is time to look again, by a new lock of our own, if they are stale."""
        _logger.warning("%s; waiting for it to end", self._busy(collectors[0]))
        names = {lock.key for lock in collectors}
        until = time.monotonic() + self._times.refresh
        while time.monotonic() < until and names & {lock.key for lock in self._objects.list(keys.LOCKS)}:
            time.sleep(self._times.poll)

    def _busy(self, other: Object) -> BusyError:
        data = self._objects.get(other.key, _LIMIT)
        try:
            holder = msgspec.json.decode(data or b"", type=_Holder)
            who = f" on {printable(holder.host)} (process {holder.pid}) since {printable(holder.since)}"
        except msgspec.MsgspecError:
            who = ""
        return BusyError(
            f"{self._url}: {_DOES.get(_kind(other), 'somebody is at work')}{who}",
            hint="try again when it has finished, or wait for it with --wait; "
            f"a lock that a crash has left ends after {self._times.stale / 60:.0f} minutes",
        )


class _Lock:
    """One that is held here."""

    def __init__(self, objects: Objects, kind: str, url: str, times: Times) -> None:
        self.key = f"{keys.LOCKS}{kind}-{secrets.token_hex(8)}"
        self.modified = 0.0
        """When the server last wrote it, as of the last listing."""
        self.stale: list[Object] = []
        """Locks that count for nothing, as of the last listing."""
        self._objects = objects
        self._url = url
        self._times = times
        since = dt.datetime.now(dt.UTC).isoformat(" ", "seconds")
        self._content = msgspec.json.encode(_Holder(socket.gethostname(), os.getpid(), since))
        self._mutex = threading.Lock()
        self._written = _now()
        self._lost = False
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lock", daemon=True)

    def take(self) -> None:
        """Write it, and go on doing so. Raises RemoteError."""
        self._write()
        self._thread.start()

    def others(self) -> list[Object]:
        """The locks of others that count. Raises RemoteError, also where the own one is not there."""
        found = {lock.key: lock for lock in self._objects.list(keys.LOCKS)}
        own = found.pop(self.key, None)
        if own is None:
            raise RemoteError(f"{self._url}: the lock {self.key} was removed", hint="run the command again")
        self.modified = own.modified
        oldest = own.modified - self._times.stale
        self.stale = [lock for lock in found.values() if lock.modified < oldest]
        return sorted((lock for lock in found.values() if lock.modified >= oldest), key=lambda lock: lock.modified)

    def check(self) -> None:
        """Raises RemoteError where it is not to be trusted any more."""
        with self._mutex:
            self._lost = self._lost or _now() - self._written > self._times.trust
            if self._lost:
                raise RemoteError(
                    f"{self._url}: the lock {self.key} could not be kept for {self._times.trust / 60:.0f} minutes, "
                    "so garbage may have been collected meanwhile",
                    hint="run the command again; what is in the store is used",
                )

    def release(self) -> None:
        """Remove it. A lock that cannot be removed ends when it is stale."""
        self._done.set()
        taken = self._thread.ident is not None
        if taken:
            self._thread.join()
        try:
            self._objects.delete(self.key)
        except ErofsgenError as error:
            if not taken:
                return  # what kept it from being written is being raised
            _logger.warning("cannot remove the lock %s, which keeps others waiting until it ends: %s", self.key, error)

    def _write(self) -> None:
        self.check()
        began = _now()  # the server's time is a later one
        self._objects.put(self.key, self._content)
        self.check()  # it may have arrived too late
        with self._mutex:
            self._written = began

    def _keep(self) -> None:
        while not self._done.wait(self._times.refresh):
            try:
                self._write()
            except ErofsgenError as error:
                _logger.warning("cannot write the lock %s: %s", self.key, error)
                if self._lost:
                    return


def _kind(lock: Object) -> str:
    return lock.key.removeprefix(keys.LOCKS).partition("-")[0]


def _now() -> float:
    """Seconds that go on while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
