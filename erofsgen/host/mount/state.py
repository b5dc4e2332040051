"""What is mounted, on disk: one file per mount, and the sweep that makes the files true again.

::

    ROOT/
    ├── mounts/<id>.json        a mount (MountInfo); replaced by rename
    ├── mnt/<id>/               a read-write mount's EROFS, attached only while its overlay is made
    ├── upper/<id>/             data and work directory of a read-write mount whose changes are thrown away
    └── lock.mounts             exclusive while any of these, or a mount, changes; never held while data is fetched

A state is written before its mount becomes visible and removed after it is gone. So a crash leaves a state without a
mount, never a mount without a state. Power takes the mounts away and may leave states empty, since nothing waits for
the disk here. Whoever takes the lock next sweeps: an empty state, and one whose mount is not in mountinfo any more
(crash, reboot, umount(8)) goes, together with the changes that were to be thrown away, and so does what lies in ``mnt``
and ``upper`` without a state. A mount is recognised by boot, mount id and device number. A mount in another
mount namespace cannot be seen from here: its state stays until it is unmounted there, or until the next boot.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

import msgspec

from erofsgen.errors import FormatError
from erofsgen.host import linux
from erofsgen.host.cache.part import storage

How = Literal["file-backed", "loop", "fscache", "fuse"]
Plane = Literal["eager", "fanotify", "fscache", "blockfuse", "fuse"]


class MountInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A mount, and all that is needed to undo it. Paths are absolute, without symbolic links.

    ``plane``            ``eager``: all of it was local when it was mounted; otherwise who brings what is missing
    ``how``              ``file-backed``: index and devices are files; ``loop``: one flat image under a loop device;
                         ``fscache``: the kernel's own cache has them; ``fuse``: no EROFS, the server answers
    ``index``            the index, or the flat image
    ``devices``          packs' data files in device-slot order; those of ``file-backed`` only
    ``fsid``             what an ``fscache`` mount calls the index
    ``server``           the process that answers for a ``fuse`` or ``blockfuse`` mount: its number and its start,
                         in clock ticks since the boot
    ``upper``, ``work``  the overlay's directories, None for a read-only mount
    ``keep``             ``upper`` was given by the user and outlives the mount
    ``mounted_at``       UTC, ISO 8601
    ``mount_id``, ``device``  as in mountinfo
    ``namespace``        inode of the mount namespace
    """

    id: str
    target: str
    image: str
    digest: str
    plane: Plane = "eager"
    how: How
    rw: bool
    upper: str | None
    work: str | None
    keep: bool
    index: str
    devices: list[str]
    fsid: str | None = None
    server: tuple[int, int] | None = None
    mounted_at: str
    mount_id: int
    device: str
    namespace: int
    boot_id: str

    def to_json(self) -> str:
        """One JSON object. Bytes of a path that are no UTF-8 come as escaped lone surrogates, as os.fsdecode gives."""
        return json.dumps(msgspec.to_builtins(self))


class MountStates:
    """The mounts of a root. :meth:`locked` first; everything else only while it is held."""

    def __init__(self, root: Path) -> None:
        self.root = Path(os.path.realpath(root))
        self._states = self.root / "mounts"
        self._private = self.root / "mnt"
        self._uppers = self.root / "upper"

    @contextmanager
    def locked(self) -> Iterator[list[MountInfo]]:
        """Hold the lock; yields the mounts there are, swept. Raises StorageError, FormatError (a damaged state)."""
        with storage(self.root):
            for directory in (self.root, self._states, self._private, self._uppers):
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = os.open(self.root / "lock.mounts", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield self._sweep()
        finally:
            os.close(lock)

    def write(self, info: MountInfo) -> None:
        """Record a mount that is about to become visible."""
        temporary = self._states / f"{info.id}.part"
        with storage(temporary):
            try:
                temporary.write_text(info.to_json())
                temporary.rename(self._states / f"{info.id}.json")
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise

    def forget(self, info: MountInfo) -> None:
        """Drop a mount that is gone, and its directories but for an upper directory to keep."""
        if info.keep and info.work is not None:
            _remove(Path(info.work))
        self.throw_away(info.id)
        with storage(self._states):
            (self._states / f"{info.id}.json").unlink(missing_ok=True)

    @contextmanager
    def private(self, identity: str) -> Iterator[Path]:
        """An empty directory to attach a mount to for a moment."""
        directory = self._private / identity
        with storage(directory):
            directory.mkdir(mode=0o700)
        try:
            yield directory
        finally:
            directory.rmdir()

    def throwaway(self, identity: str) -> Path:
        """Where changes that nobody wants to keep go: does not exist yet, but its parent does."""
        directory = self._uppers / identity
        with storage(directory):
            directory.mkdir(mode=0o700)
        return directory / "data"

    def throw_away(self, identity: str) -> None:
        """Remove what is in :meth:`throwaway`'s directory, and the directory."""
        _remove(self._uppers / identity)

    def exist(self) -> bool:
        """Whether anything was ever mounted. Needs no lock. Raises StorageError."""
        with storage(self.root):
            return self._states.is_dir()

    def hides(self, target: Path) -> bool:
        """Whether a mount on ``target`` would cover the root, or lie among files that are its own."""
        own = (self._states, self._private, self._uppers, self.root / "packs", self.root / "images")
        return self.root.is_relative_to(target) or any(target.is_relative_to(directory) for directory in own)

    def _is_mounted(self, info: MountInfo) -> bool:
        return info.boot_id == linux.boot_id() and any(
            point.id == info.mount_id and point.device == info.device for point in linux.mount_points()
        )

    def _sweep(self) -> list[MountInfo]:
        points = {point.id: point for point in linux.mount_points()}
        boot, here = linux.boot_id(), namespace()
        found = []
        for state in sorted(self._states.iterdir()):
            if state.suffix != ".json" or not state.stat().st_size:
                state.unlink(missing_ok=True)
                continue
            info = _read(state)
            point = points.get(info.mount_id)
            if info.boot_id == boot and info.namespace != here:
                found.append(info)
            elif info.boot_id == boot and point is not None and point.device == info.device:
                # a mount can be moved
                found.append(msgspec.structs.replace(info, target=point.target))
            elif not self._is_mounted(info):  # mountinfo is read in pieces while others mount: look again
                self.forget(info)
            else:
                found.append(info)
        for directory in self._private.iterdir():
            with suppress(OSError):
                while True:  # EINVAL: not a mount point any more
                    linux.umount(directory, linux.MNT_DETACH | linux.UMOUNT_NOFOLLOW)
            directory.rmdir()
        known = {info.id for info in found}
        for directory in self._uppers.iterdir():
            if directory.name not in known:
                _remove(directory)
        return found


def namespace() -> int:
    """Names this process's mount namespace."""
    return os.stat("/proc/self/ns/mnt").st_ino


def _read(state: Path) -> MountInfo:
    try:
        return msgspec.convert(json.loads(state.read_bytes()), MountInfo)
    except (ValueError, msgspec.ValidationError) as error:
        raise FormatError(f"{state}: {error}", hint="unmount what it names with umount(8), then remove it") from None


def _remove(directory: Path) -> None:
    with storage(directory), suppress(FileNotFoundError):
        shutil.rmtree(directory)
