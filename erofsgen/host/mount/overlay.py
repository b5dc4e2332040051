"""The upper side of a read-write mount: where changes go, and the overlay over an EROFS mount."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from erofsgen.errors import UsageError
from erofsgen.host import linux
from erofsgen.host.cache.part import storage
from erofsgen.host.mount import superblock


class Upper:
    """An overlay's upper and work directories.

    ``data`` holds the changes; ``keep`` says that it outlives the mount. ``work`` is beside it, since overlayfs wants
    both on one mount, and belongs to the mount alone. Raises UsageError, StorageError.
    """

    def __init__(self, data: Path, *, keep: bool) -> None:
        self.data = data
        self.work = data.with_name(f".{data.name}.erofsgen-work")
        self.keep = keep
        with storage(data):
            if data.exists() and (not data.is_dir() or os.stat(data).st_dev != os.stat(data.parent).st_dev):
                what = "a mount point" if data.is_dir() else "not a directory"
                raise UsageError(f"{data}: {what}", hint="name a directory below a mount point as the upper directory")
            self._made = not data.exists()
            if self._made:
                data.mkdir(mode=0o700)
            try:
                self.work.mkdir(mode=0o700, exist_ok=True)
            except BaseException:
                self.undo()
                raise

    def overlay(self, lower: int, private: Path) -> int:
        """A detached overlay over the detached mount ``lower``, which is attached to ``private`` meanwhile."""
        with storage(private):
            place = os.open(private, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                linux.move_mount(lower, place)
            finally:
                os.close(place)
        try:
            if self._made:
                with storage(self.data):
                    _copy_attributes(private, self.data)
            return superblock.mount_overlay(private, self.data, self.work, volatile=not self.keep)
        finally:
            # overlayfs has its own clone of the mount by now
            linux.umount(private, linux.MNT_DETACH | linux.UMOUNT_NOFOLLOW)

    def undo(self) -> None:
        """Remove what the constructor made."""
        shutil.rmtree(self.work, ignore_errors=True)
        if self._made:
            with suppress(OSError):
                self.data.rmdir()


def _copy_attributes(source: Path, target: Path) -> None:
    """An overlay's root directory is its upper directory: give a new one what the image's root has."""
    status = os.stat(source)
    os.chown(target, status.st_uid, status.st_gid)
    os.chmod(target, status.st_mode & 0o7777)
    for name in os.listxattr(source):
        if not name.startswith("trusted.overlay."):
            os.setxattr(target, name, os.getxattr(source, name))
    os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))
