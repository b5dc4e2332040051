"""The fscache plane: holds ``/dev/cachefiles``, opens objects, answers what is present, hands on what is not.

``mount -t erofs none DIR -o fsid=F,domain_id=erofsgen`` makes the kernel ask for the object F, an index, and for one
object for every pack, by its SHA-256. Their bytes are in the kernel's own cache; where it finds a hole it asks here,
and looks again when it has an answer. A range that is still a hole then is EIO for the reader, so nothing can go wrong
that an answer too early would make worse. (Not so what was written: the kernel takes it as it is.)

What dies, and what is left:

- this process: the standby holds the device, readers wait. The next supervisor has the kernel tell again whatever was
  not answered (``restore``); objects whose descriptor went with this process are opened anew before that.
- everyone: the device is closed; the kernel fails all that waits and comes until the image is mounted anew.

Descriptors of objects are this process's and its worker's only. Were another to hold one, the kernel would think the
object open and not open it anew.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any, Final

from erofsgen.errors import ErofsgenError, NotFoundError, StorageError, UnsupportedError
from erofsgen.host.cache.files import Layout
from erofsgen.host.cache.objects import Key, Objects, Stored, is_digest, is_ours
from erofsgen.host.daemon.journal import Entry
from erofsgen.host.daemon.planes import Done, Introduction, Supervisor
from erofsgen.host.daemon.writers import Writers
from fscache_daemon import protocol
from fscache_daemon.device import Device, Limits
from fscache_daemon.names import index_named
from fscache_daemon.opened import PAGE, OpenIndex, OpenPack
from fscache_daemon.recover import recovered, settle

_logger: Final = logging.getLogger(__name__)

_AGAIN: Final = 0.05
"""Seconds until the kernel is asked again for what it told of an object that is not open here."""
_CLOSING: Final = 2.0
"""Seconds that the kernel has for letting go of objects when the plane ends."""
_LOOK: Final = 0.02
_ERRNO: Final[dict[type[Exception], int]] = {NotFoundError: errno.ENOENT, UnsupportedError: errno.EOPNOTSUPP}
_PUT_AWAY: Final = 1.0
"""Seconds after which an object that was closed has its name."""


class Plane:
    """Objects of the cache below ``root``, through ``device``, which is opened and bound where it is None.

    ``read_ahead``: bytes to bring ahead of a sequential reader at most; ``brun``, ``bcull``, ``bstop``: see
    :class:`Limits`. All but :func:`settle` runs in the supervisor's thread. Raises what :meth:`Device.bind` does.
    """

    name = "fscache"
    journalled = False
    serves = False

    def __init__(
        self,
        device: int | Device | None = None,
        *,
        root: Path,
        read_ahead: int = 32 << 20,
        brun: str | int = 7,
        bcull: str | int = 5,
        bstop: str | int = 1,
    ) -> None:
        self._supervisor: Supervisor
        self._layout = Layout(root)
        self._objects = Objects(self._layout)
        self._writers = Writers()
        self._read_ahead = read_ahead
        self._limits = Limits(int(brun), int(bcull), int(bstop))
        self._open: dict[int, OpenIndex | OpenPack] = {}
        self._waiting: dict[int, OpenPack] = {}  # messages that the worker sees to
        self._unsettled: set[OpenPack] = set()  # closed, and not yet known to be on the disk
        self._asked_again = False
        self._closing = False
        self._culled = 0
        if device is None:
            device = self._bind()
        self._device = Device(device) if isinstance(device, int) else device
        self.survives = self._device.restore()

    def _bind(self) -> Device:
        try:
            self._objects.create()
        except OSError as error:
            raise StorageError(f"{error.filename}: {error.strerror}") from error
        self._objects.cleaned()
        recovered(self._layout.root, self._objects)
        return Device.bind(self._objects.directory, self._limits)

    def attach(self, supervisor: Supervisor) -> None:
        """Must come before anything else."""
        self._supervisor = supervisor
        # another descriptor of the device, because a loop knows each once; edges, because the state may last
        pressure = os.dup(self._device.fileno())
        supervisor.watch(pressure, self._under_pressure, select.EPOLLOUT | select.EPOLLET)

    def moved(self) -> None:
        pass

    def fileno(self) -> int:
        """The device."""
        return self._device.fileno()

    def in_use(self) -> bool:
        """Whether an image is mounted, by us or by hand."""
        return bool(self._open)

    def facts(self) -> dict[str, Any]:
        """For ``status``."""
        return {"open_objects": len(self._open), "culled_objects": self._culled}

    # --- messages ----------------------------------------------------------------------------------------------------

    def serve(self) -> None:
        """Read messages and answer them, or hand them on."""
        while True:
            try:
                data = self._device.read()
            except OSError as error:  # the kernel has failed the request itself: no descriptor to spare, for instance
                _logger.error("a message of cachefiles: %s", error.strerror)
                return
            if not data:
                return
            match protocol.parse(data):
                case protocol.Open() as message:
                    self._opened(message)
                case protocol.Read() as message:
                    self._read(message)
                case protocol.Close() as message:
                    self._closed(message.object)
                case protocol.Malformed() as message:
                    _logger.error("cachefiles: %s", message.why)
                    if message.message is not None:
                        self._refuse(message.message, message.descriptor, errno.EINVAL)

    def _opened(self, message: protocol.Open) -> None:
        key = Key(message.volume, message.cookie)
        try:
            # the kernel does not set it, and neither the standby nor a worker may have it by inheritance
            os.set_inheritable(message.descriptor, False)
            if self._closing:
                raise NotFoundError(f"{key.cookie}: the daemon is stopping")
            found = self._resolve(key, message.descriptor)
        except (ErofsgenError, OSError) as error:
            self._supervisor.failed(f"{key.cookie}: not opened: {error}")
            self._refuse(message.message, message.descriptor, _ERRNO.get(type(error), errno.EIO))
            return
        self._open[message.object] = found
        if not self._device.opened(message.message, found.size):
            self._let_go(message.object)

    def _resolve(self, key: Key, descriptor: int) -> OpenIndex | OpenPack:
        """The object that a mount wants, by its name."""
        if not is_ours(key):
            raise NotFoundError(f"{key}: no name of ours", hint="use the digest of the image's manifest as fsid")
        if is_digest(key.cookie):
            files = self._layout.find(key.cookie)
            if files is not None:
                return OpenPack(key, files, self._objects, descriptor, self._read_ahead)
        digest = index_named(self._layout, key.cookie)
        self._objects.claim(key, digest)
        return OpenIndex(key, self._layout.image_path(digest, "erofs"), descriptor)

    def _refuse(self, message: int, descriptor: int, number: int) -> None:
        self._device.opened(message, -number)
        if descriptor >= 0:
            with suppress(OSError):
                os.close(descriptor)

    def _read(self, message: protocol.Read) -> None:
        found = self._open.get(message.object)
        offset, length = message.offset, message.length
        if found is None:
            self._ask_again()
        elif message.message in self._waiting:
            pass  # told twice
        elif self._closing or not 0 < length <= -(-found.size // PAGE) * PAGE - offset:
            if not self._closing:
                self._supervisor.failed(f"{found.key.cookie}: bytes {offset}+{length}: outside of {found.size}")
            self._device.complete(found.descriptor, message.message)
        elif isinstance(found, OpenIndex):
            try:
                found.supply(offset, length)
            except OSError as error:
                self._supervisor.failed(f"{found.key.cookie}: bytes {offset}+{length}: {error.strerror}")
            self._device.complete(found.descriptor, message.message)
        else:
            self._read_pack(found, message)

    def _read_pack(self, pack: OpenPack, message: protocol.Read) -> None:
        try:
            pack.look()
            ready = pack.truly_ready(message.offset, message.length)
        except (ErofsgenError, OSError) as error:
            self._supervisor.failed(f"pack {pack.hex}: {error}", pack.hex)
            self._device.complete(pack.descriptor, message.message)
            return
        if ready:
            self._device.complete(pack.descriptor, message.message)
            self._supervisor.touched(pack.hex, message.offset, message.length, 0)
        else:
            self._supervisor.touched(pack.hex, message.offset, message.length, 0, message.message)
            self._waiting[message.message] = pack
            self._supervisor.missing(message.message, _name(message.object, pack), message.offset, message.length)
        for _, offset, length in pack.read(message.offset, message.length):
            self._supervisor.ahead(_name(message.object, pack), offset, length)

    def answer(self, key: int, *, failed: bool) -> None:  # noqa: ARG002  (the kernel sees for itself)
        """End a request that was handed on."""
        pack = self._waiting.pop(key, None)
        if pack is not None and pack.descriptor >= 0:
            self._device.complete(pack.descriptor, key)

    def _ask_again(self) -> None:
        """A read of an object that is not open here: a dead supervisor's worker, which is about to end, has it still.

        Once it has not, the kernel opens the object anew, and tells again what it wants of it.
        """

        def again() -> None:
            self._asked_again = False
            self._device.restore()

        if not self._asked_again:
            self._asked_again = True
            self._supervisor.after(_AGAIN, again)

    def _closed(self, number: int) -> None:
        found = self._open.get(number)
        if isinstance(found, OpenPack):
            self._unsettled.add(found)
        self._let_go(number)

    def _let_go(self, number: int) -> None:
        found = self._open.pop(number, None)
        if found is None:
            return
        if isinstance(found, OpenPack):
            self._waiting = {key: pack for key, pack in self._waiting.items() if pack is not found}
            self._supervisor.forget(_name(number, found))
        found.close()
        self._objects.used(found.key)

    # --- packs -------------------------------------------------------------------------------------------------------

    def through(self, packs: Sequence[str]) -> list[str | None]:
        names = {
            found.key.cookie: _name(number, found)
            for number, found in self._open.items()
            if isinstance(found, OpenPack)
        }
        return [names.get(pack) for pack in packs]

    def introduce(self, pack: str) -> Introduction | None:
        """The object's own descriptor, which writes only; or that of a data file of the host cache."""
        hexadecimal, _, number = pack.partition(":")
        if not number:
            descriptor = self._writers.get(pack)
            return None if descriptor is None else Introduction(descriptor, {})
        found = self._open.get(int(number))
        if not isinstance(found, OpenPack):
            return None
        return Introduction(found.descriptor, {"of": hexadecimal, "map": os.fspath(found.map)})

    def arm(self, mount: str, paths: Iterable[Path], done: Done) -> None:
        """Let the worker write to the host cache. Mounts need nothing: the kernel asks when it mounts."""
        self._writers.arm(mount, paths, done)

    def made(self, mount: str) -> None:
        """The mount was made, or the worker has written what it wanted."""
        for pack in self._writers.leave(mount):
            self._supervisor.forget(pack)

    def completed(self, name: str) -> None:
        pass  # the kernel does not ask for what is there

    def prove(self, paths: Iterable[Path], done: Done) -> None:  # noqa: ARG002
        done(None)

    def sweep(self) -> None:
        """Make durable what closed objects have, once the kernel has put them away."""
        before = time.monotonic() - _PUT_AWAY
        due = [pack for pack in self._unsettled if pack.closed_at < before]
        self._unsettled.difference_update(due)
        if due:
            Thread(target=settle, args=(self._objects, due), name="settle", daemon=True).start()

    # --- room --------------------------------------------------------------------------------------------------------

    def cull(self, wanted: int | None, keep: Collection[str] | None) -> int:
        """Remove objects that are not in use, those first that were not for longest."""
        kept = self._objects.pinned() if keep is None else keep
        used = {found.key for found in self._open.values()}

        def take(stored: Stored) -> bool:
            taken = stored.key not in used and self._device.cull(stored.file)
            self._culled += taken
            return taken

        return self._objects.remove(kept, wanted, take)

    def _under_pressure(self) -> None:
        """The disk is getting full: cull until there is as much free space as the kernel wants."""
        disk = os.statvfs(self._objects.directory)
        lacking = disk.f_blocks * self._limits.run // 100 + 1 - disk.f_bavail
        if lacking > 0:
            freed = self.cull(lacking * disk.f_frsize, None)
            if freed:
                _logger.info("%s: little free space: %d bytes culled", self._objects.directory, freed)
                self._supervisor.gave_back(freed)

    # --- changes of supervisor ---------------------------------------------------------------------------------------

    def inherit(self, entries: Sequence[Entry], highest: int) -> list[Entry]:  # noqa: ARG002
        """Nothing: the kernel, asked when this plane was made, tells all of it again."""
        return []

    def close_for_good(self, paths: Iterable[Path], done: Callable[[list[Path]], None]) -> None:  # noqa: ARG002
        """Let the kernel put away what is no longer mounted. What still is fails when the device is closed."""
        self._closing = True
        turns = int(_CLOSING / _LOOK)

        def look() -> None:
            nonlocal turns
            turns -= 1
            if self._open and turns:
                self._supervisor.after(_LOOK, look)
            else:
                done([])

        look()


def _name(number: int, pack: OpenPack) -> str:
    """What supervisor and worker call an object's pack; one pack can be several objects, in several domains."""
    return f"{pack.hex}:{number}"
