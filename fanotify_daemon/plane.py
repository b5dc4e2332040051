"""The fanotify plane: holds the group, answers what is present, hands on what is not.

Every pack that an image may read lazily carries a FAN_PRE_ACCESS mark on its data file. A read of EROFS that its own
page cache cannot serve then waits for our answer. The presence map says at once whether the bytes are there; if they
are not, the request goes to the worker and is answered when that has brought them, or with EIO.

Why nobody sees a hole:

- The mark is set before EROFS opens the file. The kernel decides when a file is opened whether its reads raise events
  at all, so a pack is marked for the time a mount is made even when it is complete; and :meth:`arm` proves each mark of
  an incomplete pack by a read of its own, which has to come back denied.
- The queue is unlimited: the kernel lets a read pass for which it has no room (fs/notify/fanotify).
- A mark goes only when the pack is complete, or when no open file but ours refers to its data (a write lease proves
  that, :func:`erofsgen.host.linux.sole_user`), not even in a mount that was lazily detached.
- The group outlives this process: the standby or systemd's descriptor store holds it too. Marks go when it goes for
  good, and before that :meth:`Plane.close_for_good` cuts off data files that are in use.

Data files are written through descriptors of events, which raise no events themselves. Any other descriptor would make
the writer wait for itself.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Final

from erofsgen.errors import ErofsgenError, StorageError, UnsupportedError
from erofsgen.host import linux
from erofsgen.host.cache.cutoff import cut_off
from erofsgen.host.daemon.journal import Entry
from erofsgen.host.daemon.planes import Done, Introduction, Supervisor
from fanotify_daemon import protocol
from fanotify_daemon.packs import MarkedPack

_logger: Final = logging.getLogger(__name__)

_GROUP_FLAGS: Final = (
    linux.FAN_CLASS_PRE_CONTENT
    | linux.FAN_CLOEXEC
    | linux.FAN_NONBLOCK
    | linux.FAN_UNLIMITED_QUEUE
    | linux.FAN_UNLIMITED_MARKS
)
_EVENT_FLAGS: Final = os.O_RDWR | os.O_LARGEFILE | os.O_CLOEXEC


class Plane:
    """Packs under marks of the group ``group``, which is a new one where it is None. ``root`` is for other planes.

    ``read_ahead``: bytes to bring ahead of a sequential reader at most. All but probes and cutting off runs in the
    supervisor's thread. Raises UnsupportedError where the kernel has no pre-content events.
    """

    name = "fanotify"
    journalled = True
    serves = False
    survives = True

    def __init__(self, group: int | None = None, *, root: Path, read_ahead: int = 32 << 20) -> None:  # noqa: ARG002
        self._supervisor: Supervisor
        self._packs: dict[tuple[int, int], MarkedPack] = {}
        self._probing: dict[tuple[int, int], MarkedPack] = {}
        self._closing = False
        self._not_ours: set[int] = set()  # keys of a dead supervisor that are numbers of other files here
        self._read_ahead = read_ahead
        self._self = os.getpid()
        self._group = _new_group() if group is None else group

    def attach(self, supervisor: Supervisor) -> None:
        """Must come before anything else."""
        self._supervisor = supervisor

    def moved(self) -> None:
        """This process was forked since the plane was made."""
        self._self = os.getpid()

    def fileno(self) -> int:
        """The group: readable when requests wait, and all there is to hand on."""
        return self._group

    def in_use(self) -> bool:
        """No: what is marked is marked for our own mounts."""
        return False

    def facts(self) -> dict[str, int]:
        """For ``status``."""
        return {"marked_packs": len(self._packs)}

    # --- requests ----------------------------------------------------------------------------------------------------

    def serve(self) -> None:
        """Read requests and answer those whose bytes are there."""
        try:
            data = os.read(self._group, protocol.BUFFER)
        except BlockingIOError:
            return
        for event in protocol.events(data):
            if event.fd >= 0:
                self._supervisor.saw(event.fd)
                self._event(event)

    def _event(self, event: protocol.Event) -> None:
        status = os.fstat(event.fd)
        inode = (status.st_dev, status.st_ino)
        if event.pid == self._self or self._closing:
            self._own(inode, event)
            return
        pack = self._packs.get(inode)
        if pack is None:
            pack = self._adopt(event.fd)
            if pack is None:
                self._respond(protocol.deny(event.fd))
                os.close(event.fd)
                return
        if pack.ready(event.offset, event.length):
            self._respond(protocol.allow(event.fd))
            os.close(event.fd)
            self._supervisor.touched(pack.hex, event.offset, event.length, event.pid)
        else:
            self._supervisor.touched(pack.hex, event.offset, event.length, event.pid, event.fd)
            if pack.descriptor < 0:
                pack.descriptor = os.dup(event.fd)
            self._supervisor.missing(event.fd, pack.hex, event.offset, event.length)
        following = self.pack(pack.following) if pack.following else None
        for wanted, offset, length in pack.read(event.offset, event.length, following):
            self._supervisor.ahead(wanted.hex, offset, length)

    def answer(self, key: int, *, failed: bool) -> None:
        """End a request that was handed on."""
        self._respond(protocol.deny(key) if failed else protocol.allow(key))
        if key in self._not_ours:
            self._not_ours.discard(key)
        else:
            os.close(key)

    def _respond(self, response: bytes) -> None:
        with suppress(FileNotFoundError):  # the reader was killed, and its request went with it
            os.write(self._group, response)

    def _adopt(self, descriptor: int) -> MarkedPack | None:
        """A pack that an earlier supervisor has marked, found by its name."""
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        try:
            if path.suffix != ".data":
                raise StorageError(f"{path}: not a pack of the cache")
            pack = MarkedPack(path, self._read_ahead)
            pack.descriptor = os.dup(descriptor)
        except ErofsgenError as error:
            _logger.error("%s: reads fail: %s", path, error, extra={"pack": path.stem})
            return None
        self._packs[pack.inode] = pack
        return pack

    # --- packs -------------------------------------------------------------------------------------------------------

    def through(self, packs: Sequence[str]) -> None:  # noqa: ARG002
        return None

    def introduce(self, pack: str) -> Introduction | None:
        """The descriptor of an event, which writes without raising any."""
        found = self.pack(pack)
        return None if found is None or found.descriptor < 0 else Introduction(found.descriptor, {})

    def pack(self, name: str) -> MarkedPack | None:
        """The pack with this SHA-256, if it is marked."""
        return next((pack for pack in self._packs.values() if pack.hex == name), None)

    def arm(self, mount: str, paths: Iterable[Path], done: Done) -> None:
        """Mark packs for a mount about to be made, prove the marks, then call ``done`` with what went wrong, if so.

        :meth:`made` must follow, whatever became of the mount.
        """
        unproved = []
        before: MarkedPack | None = None
        try:
            for path in paths:
                pack = self._mark(path)
                pack.making.add(mount)
                if before is not None:
                    before.following = pack.hex
                before = pack
                if pack.descriptor < 0 and not pack.complete:
                    unproved.append(pack)
        except ErofsgenError as error:
            done(error)
            return
        if not unproved:
            done(None)
            return
        self._probing.update((pack.inode, pack) for pack in unproved)
        Thread(target=self._probe, args=(unproved, done), name="probe", daemon=True).start()

    def made(self, mount: str) -> None:
        """The mount was made, or given up."""
        for pack in list(self._packs.values()):
            if mount in pack.making:
                pack.making.discard(mount)
                self._release(pack)

    def completed(self, name: str) -> None:
        """All of a pack may be there: if so, it needs no mark any more."""
        pack = self.pack(name)
        if pack is not None:
            self._release(pack)

    def sweep(self) -> None:
        """Let go of packs that nothing uses any more."""
        for pack in list(self._packs.values()):
            self._release(pack)

    def cull(self, wanted: int | None, keep: Collection[str] | None) -> int:  # noqa: ARG002  (the kernel keeps nothing)
        return 0

    def _mark(self, path: Path) -> MarkedPack:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise StorageError(f"{path}: {error.strerror}", hint="run `erofsgen pull` again") from error
        try:
            status = os.fstat(descriptor)
            pack = self._packs.get((status.st_dev, status.st_ino))
            if pack is None:
                pack = MarkedPack(path, self._read_ahead)
                linux.fanotify_mark(self._group, linux.FAN_MARK_ADD, linux.FAN_PRE_ACCESS, descriptor)
                self._packs[pack.inode] = pack
            return pack
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.EINVAL):
                raise UnsupportedError(
                    f"{path}: the file system has no pre-content events", hint="use a cache on ext4, xfs or btrfs"
                ) from error
            raise StorageError(f"{path}: {error.strerror}") from error
        finally:
            os.close(descriptor)

    def _release(self, pack: MarkedPack) -> None:
        """Take the mark off a pack that is complete or that nothing uses, and forget it."""
        if self._closing or pack.making or pack.inode in self._probing:
            return
        if pack.complete:
            if not self._supervisor.cannot_see(pack.hex):
                return
        elif not (pack.descriptor >= 0 and linux.sole_user(pack.descriptor)):
            return
        with suppress(OSError):  # the file is gone, and the mark with it
            descriptor = os.open(pack.data, os.O_RDONLY | os.O_CLOEXEC)
            try:
                linux.fanotify_mark(self._group, linux.FAN_MARK_REMOVE, linux.FAN_PRE_ACCESS, descriptor)
            finally:
                os.close(descriptor)
        del self._packs[pack.inode]
        self._supervisor.forget(pack.hex)
        pack.close()

    # --- proof -------------------------------------------------------------------------------------------------------

    def prove(self, paths: Iterable[Path], done: Done) -> None:
        """Get a descriptor to write with for each pack, which is marked already, then call ``done``."""

        def proved(error: ErofsgenError | None) -> None:
            self.made("proof")
            done(error)

        self.arm("proof", paths, proved)

    def _probe(self, packs: Sequence[MarkedPack], done: Done) -> None:
        """Read a byte of each pack. Runs in a thread of its own: the reads wait for the supervisor's."""
        result: ErofsgenError | None = None
        for pack in packs:
            try:
                descriptor = os.open(pack.data, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    os.pread(descriptor, 1, 0)
                finally:
                    os.close(descriptor)
                result = UnsupportedError(
                    f"{pack.data}: a mark on it has no effect", hint="see `erofsgen doctor`; mount with --eager"
                )
            except OSError as error:
                if error.errno != errno.EIO:
                    result = StorageError(f"{pack.data}: {error.strerror}")
        self._supervisor.call(lambda: self._proved(packs, result, done))

    def _proved(self, packs: Sequence[MarkedPack], error: ErofsgenError | None, done: Done) -> None:
        for pack in packs:
            self._probing.pop(pack.inode, None)
            if error is None and pack.descriptor < 0:
                error = StorageError(f"{pack.data}: a read of it failed before its mark was asked")
        done(error)

    def _own(self, inode: tuple[int, int], event: protocol.Event) -> None:
        """A probe; or, when closing, our own cutting off, which may go on, or a read of anybody's, which may not."""
        pack = self._probing.get(inode)
        if pack is not None and pack.descriptor < 0:
            pack.descriptor = os.dup(event.fd)
        allowed = self._closing and event.pid == self._self
        self._respond(protocol.allow(event.fd) if allowed else protocol.deny(event.fd))
        os.close(event.fd)

    # --- changes of supervisor ---------------------------------------------------------------------------------------

    def inherit(self, entries: Sequence[Entry], highest: int) -> list[Entry]:
        """Take over what a dead supervisor has read and not answered; ``highest``: keys it saw are below that.

        Those in its journal wait on. The others were being looked at when it died, and what they ask for is not known:
        they fail. Keys are descriptor numbers, which the kernel must not give to new requests meanwhile.
        """
        known = {entry.key for entry in entries}
        null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        for key in range(highest):
            if key not in known:
                self._respond(protocol.deny(key))
            elif _is_open(key):
                self._not_ours.add(key)
            else:
                os.dup2(null, key, inheritable=False)
        os.close(null)
        return list(entries)

    def close_for_good(self, paths: Iterable[Path], done: Callable[[list[Path]], None]) -> None:
        """Before the group goes for good: let no read of a hole succeed afterwards, then call ``done``.

        ``paths``: data files that may be in use besides the packs known. ``done`` gets those cut off. Requests that
        the worker has must have been answered, and the worker must be gone, since it has the files open.
        """
        self._closing = True
        packs = list(self._packs.values())
        self._packs.clear()
        for pack in packs:
            pack.close()
        data = {*paths, *(pack.data for pack in packs)}

        def cut() -> None:  # in a thread: truncating a marked file asks this one
            given_up = [path for path in sorted(data) if cut_off(path)]
            self._supervisor.call(lambda: done(given_up))

        Thread(target=cut, name="cut-off", daemon=True).start()


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def _new_group() -> int:
    try:
        return linux.fanotify_init(_GROUP_FLAGS, _EVENT_FLAGS)
    except OSError as error:
        if error.errno == errno.EPERM:
            raise UnsupportedError("fanotify is not permitted", hint="run as root (CAP_SYS_ADMIN)") from error
        raise UnsupportedError(
            f"this kernel has no fanotify permission events: {error.strerror}",
            hint="use Linux 6.14 or newer with CONFIG_FANOTIFY_ACCESS_PERMISSIONS, or mount with --eager",
        ) from error
