"""The presence map ``packs/<sha256>.map``: which frames of a pack this host has.

::

    0      header: magic, version, number of frames, boot id; zeros up to
    4096   one byte per frame, a State; zeros up to a multiple of 4
    …      four bytes per frame: when it was used last, in minutes since 1970; 0 where it never was

    ABSENT ──write──► WRITTEN ──data file synced──► DURABLE
      ▲                  │ opened in another boot
      └──── SUSPECT ◄────┘        any ──punched, found bad──► ABSENT

All processes read the map through one shared mapping and change it with ``pwrite`` of single bytes, which the page
cache makes atomic and which can fail, as a store to a mapping on a full disk cannot (it kills). Neither reading nor
:meth:`Presence.mark_written` takes a lock.

What a mark promises. A frame is marked only when the ``pwrite`` of its verified bytes has returned, so the death of a
process leaves none marked too early. A power failure may keep the mark and lose the bytes: a WRITTEN counts only in
the boot whose id is in the header, and the first to open the map in another boot turns each into SUSPECT, which counts
for nothing until the bytes were compared with their digest. DURABLE is marked after ``fdatasync`` of the data file and
always counts. A map that is damaged says nothing of any frame: it is made anew, all ABSENT, in place, because others
may have it mapped. If ``pwrite`` of a mark is lost with the power, the frame is fetched once more.

Locks: an open-file-description lock on the header, held while the map is opened and while marks are taken back or
made durable, and one behind it, shared, by processes that read the data file by themselves (:meth:`Presence.obey`).
``flock`` on the map is not this module's: with it the cache says who uses a pack.

Small processes use this module: nothing heavy is imported.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import re
import sys
import threading
import time
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from enum import IntEnum
from pathlib import Path
from struct import Struct
from typing import Final

from erofsgen.errors import StorageError

HEADER_SIZE: Final = 4096
"""Bytes before the first frame's."""

_HEADER: Final = Struct("<8sII16s")  # magic, version, number of frames, boot id
_MAGIC: Final = b"EGPRESNT"
_VERSION: Final = 2
_FLOCK: Final = Struct("@hhqqi4x")  # struct flock of 64-bit machines: type, whence, start, length, pid
_BOOT_ID: Final = "/proc/sys/kernel/random/boot_id"


class State(IntEnum):
    """What is known of a frame's bytes in the data file."""

    ABSENT = 0
    WRITTEN = 1
    DURABLE = 2
    SUSPECT = 3


_READY: Final = bytes((State.WRITTEN, State.DURABLE))
_MISSING: Final = re.compile(b"[^%s]" % re.escape(_READY))
_USED: Final = Struct("<I")
_MINUTE: Final = 60
_AFTER_BOOT: Final = bytes((State.ABSENT, State.SUSPECT, State.DURABLE, State.SUSPECT)).ljust(256, b"\0")


def boot_id() -> bytes:
    """The 16 bytes that tell this boot of the machine from every other."""
    with open(_BOOT_ID) as file:
        return bytes.fromhex(file.read().strip().replace("-", ""))


class Presence:
    """The map at ``path`` of a pack with ``frames`` frames. May be used by several threads.

    Methods raise IndexError for a frame that the pack does not have, StorageError where the map cannot be written.
    """

    def __init__(self, path: Path, frames: int, descriptor: int, states: mmap.mmap) -> None:
        """Use :meth:`open`."""
        self.path = path
        self.frames = frames
        self._descriptor = descriptor
        self._map = states
        self._lock = threading.Lock()
        self._used_at = _used_at(frames)
        self._touched: dict[int, int] = {}  # frames whose use of this minute is in the map

    @classmethod
    def open(cls, path: Path, frames: int, *, boot: bytes | None = None) -> Presence:
        """Open the map, after making it where it is missing or damaged. ``boot``: instead of :func:`boot_id`.

        Raises StorageError.
        """
        size = map_size(frames)
        with _storage(path):
            boot = boot_id() if boot is None else boot
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                with locked(descriptor):
                    header = os.pread(descriptor, _HEADER.size, 0)
                    if header != _HEADER.pack(_MAGIC, _VERSION, frames, boot) or os.fstat(descriptor).st_size != size:
                        _renew(descriptor, frames, boot)
                return cls(path, frames, descriptor, mmap.mmap(descriptor, size, access=mmap.ACCESS_READ))
            except BaseException:
                os.close(descriptor)
                raise

    @classmethod
    def frames_of(cls, path: Path) -> int:
        """How many frames the map at ``path`` is for, by its header; 0 where that is damaged. Raises StorageError."""
        with _storage(path), open(path, "rb") as file:
            header = file.read(_HEADER.size)
        if len(header) < _HEADER.size:
            return 0
        magic, version, frames, _ = _HEADER.unpack(header)
        return int(frames) if (magic, version) == (_MAGIC, _VERSION) else 0

    def fileno(self) -> int:
        """The map's descriptor, for the cache to ``flock``."""
        return self._descriptor

    def state(self, frame: int) -> State:
        """What is known of a frame."""
        value = self._map[self._place(frame)]
        return State(value) if value <= State.SUSPECT else State.ABSENT

    def ready(self, first: int, last: int) -> bool:
        """Whether all frames from ``first`` to ``last``, both included, can be read."""
        if first == last:
            return self._map[self._place(first)] in _READY
        return not self._states(first, last + 1).translate(None, _READY)

    def missing(self, frames: range) -> list[int]:
        """Those of ``frames`` (of step 1) that cannot be read, in order."""
        states = self._states(frames.start, frames.stop)
        return [frames.start + found.start() for found in _MISSING.finditer(states)]

    def touch(self, first: int, last: int) -> None:
        """Frames from ``first`` to ``last``, both included, are being used. Costs nothing twice in a minute.

        A use that cannot be noted is no error: it only makes the frame look older.
        """
        now = int(time.time()) // _MINUTE
        for frame in range(first, last + 1):
            if self._touched.get(frame) != now:
                self._touched[frame] = now
                with suppress(OSError):
                    _write(self._descriptor, _USED.pack(now), self._used_at + _USED.size * frame)

    def last_uses(self) -> list[int]:
        """When each frame was used last, in minutes since 1970."""
        uses = array("I", self._map[self._used_at : self._used_at + _USED.size * self.frames])
        if sys.byteorder == "big":
            uses.byteswap()
        return uses.tolist()

    def written(self) -> list[int]:
        """The frames that are WRITTEN, in order."""
        return self._in_state(State.WRITTEN)

    def suspects(self) -> list[int]:
        """The frames whose bytes must be compared with their digest before they count, in order."""
        return self._in_state(State.SUSPECT)

    def occupied(self, frame: int) -> bool:
        """Whether a frame's bytes, right or not, take room in the data file."""
        return self._map[self._place(frame)] != State.ABSENT

    def count(self) -> int:
        """How many frames can be read."""
        states = self._states(0, self.frames)
        return states.count(State.WRITTEN) + states.count(State.DURABLE)

    @property
    def complete(self) -> bool:
        """Whether all frames can be read."""
        return self.count() == self.frames

    def mark_written(self, frame: int) -> None:
        """The frame's verified bytes are in the data file: ``pwrite`` has returned."""
        self._mark(frame, State.WRITTEN)

    def mark_durable(self, frames: Iterable[int]) -> None:
        """``fdatasync`` of the data file has returned since these frames were WRITTEN. Passes over those that are not.

        :meth:`make_durable` also excludes that a frame was taken back and written again during the ``fdatasync``.
        """
        with self._exclusive():
            self._mark_durable(frames)

    def make_durable(self, sync: Callable[[], None]) -> int:
        """Turn what is WRITTEN into DURABLE by ``sync``, ``fdatasync`` of the data file. Returns how many frames.

        Raises what ``sync`` raises. All frames it was for are ABSENT then: the kernel forgets pages it could not write,
        and reads of what it still holds of them would prove nothing. Others cannot take marks back meanwhile.
        """
        with self._exclusive():
            frames = self.written()
            if not frames:
                return 0
            try:
                sync()
            except BaseException:
                for frame in frames:
                    self._mark(frame, State.ABSENT)
                raise
            self._mark_durable(frames)
            return len(frames)

    def mark_absent(self, frames: int | Iterable[int]) -> None:
        """Take marks back, for frames found bad or about to be punched out.

        That is durable on return: were it lost with the power, DURABLE would vouch for bytes that are gone.
        """
        with self._exclusive():
            for frame in (frames,) if isinstance(frames, int) else frames:
                self._mark(frame, State.ABSENT)
            self._sync()

    def clear(self) -> None:
        """Take all marks back, because the data file is a new one. Durable on return."""
        with self._exclusive():
            with _storage(self.path):
                _write(self._descriptor, bytes(self.frames), HEADER_SIZE)
            self._sync()

    def obey(self) -> None:
        """Say, until :meth:`close`, that this process has the data file open and reads no frame that is not marked."""
        with _storage(self.path):
            fcntl.fcntl(self._descriptor, fcntl.F_OFD_SETLKW, _obedient(fcntl.F_RDLCK))

    @property
    def obeyed(self) -> bool:
        """Whether another opening of the map has said so."""
        with _storage(self.path):
            found = fcntl.fcntl(self._descriptor, fcntl.F_OFD_GETLK, _obedient(fcntl.F_WRLCK))
        return bool(_FLOCK.unpack(found)[0] != fcntl.F_UNLCK)

    def close(self) -> None:
        """Let go of the map. The object is of no use afterwards."""
        if self._descriptor >= 0:
            self._map.close()
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Presence:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _place(self, frame: int) -> int:
        if not 0 <= frame < self.frames:
            raise IndexError(f"{self.path}: no frame {frame}")
        return HEADER_SIZE + frame

    def _states(self, start: int, stop: int) -> bytes:
        if not 0 <= start <= stop <= self.frames:
            raise IndexError(f"{self.path}: no frames {start} to {stop - 1}")
        return self._map[HEADER_SIZE + start : HEADER_SIZE + stop]

    def _in_state(self, state: State) -> list[int]:
        states = self._states(0, self.frames)
        return [found.start() for found in re.finditer(re.escape(_BYTES[state]), states)]

    def _mark(self, frame: int, state: State) -> None:
        try:
            _write(self._descriptor, _BYTES[state], self._place(frame))
        except OSError as error:
            raise StorageError(f"{self.path}: {error.strerror}") from error

    def _mark_durable(self, frames: Iterable[int]) -> None:
        for frame in frames:
            if self._map[self._place(frame)] == State.WRITTEN:
                self._mark(frame, State.DURABLE)

    def _sync(self) -> None:
        with _storage(self.path):
            os.fdatasync(self._descriptor)

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        # the lock on the file keeps other openings of the map out, the other one this opening's threads
        with self._lock, locked(self._descriptor):
            yield


_BYTES: Final = [bytes([state]) for state in State]


def _used_at(frames: int) -> int:
    """Where the times of use begin."""
    return HEADER_SIZE + (frames + 3) // 4 * 4


def map_size(frames: int) -> int:
    """Bytes of the map of a pack with ``frames`` frames."""
    return _used_at(frames) + _USED.size * frames


def _renew(descriptor: int, frames: int, boot: bytes) -> None:
    """Make the map one of this boot. The header comes last: until then the next to open the map does the same again."""
    size = map_size(frames)
    old = os.pread(descriptor, size + 1, 0)
    if len(old) == size and _HEADER.unpack_from(old)[:3] == (_MAGIC, _VERSION, frames):
        _write(descriptor, old[HEADER_SIZE : HEADER_SIZE + frames].translate(_AFTER_BOOT), HEADER_SIZE)
    else:
        os.ftruncate(descriptor, size)
        os.posix_fallocate(descriptor, 0, size)  # so that no mark can find the disk full
        _write(descriptor, bytes(size - HEADER_SIZE), HEADER_SIZE)
        if old:
            os.fdatasync(descriptor)  # the power may not keep the header that follows and what the file held before
    _write(descriptor, _HEADER.pack(_MAGIC, _VERSION, frames, boot), 0)


def _write(descriptor: int, data: bytes, offset: int) -> None:
    if os.pwrite(descriptor, data, offset) != len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _obedient(kind: int) -> bytes:
    return _FLOCK.pack(kind, os.SEEK_SET, HEADER_SIZE, 1, 0)


@contextmanager
def locked(descriptor: int) -> Iterator[None]:
    """Hold an exclusive lock on a file's first bytes, as one opening of it among those of all processes."""
    fcntl.fcntl(descriptor, fcntl.F_OFD_SETLKW, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, HEADER_SIZE, 0))
    try:
        yield
    finally:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLKW, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, 0, HEADER_SIZE, 0))


@contextmanager
def _storage(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}") from error
