"""``/dev/cachefiles`` in on-demand mode (fs/cachefiles/daemon.c; Documentation/filesystems/caching/cachefiles.rst)."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from erofsgen.errors import BusyError, ErofsgenError, StorageError, UnsupportedError, UsageError
from fscache_daemon import protocol

PATH: Final = "/dev/cachefiles"
TAG: Final = "erofsgen"
_PATIENCE: Final = 2.0
"""Seconds for a daemon that has just ended to let the device go: it waits for the last object."""
_PAUSE: Final = 0.05
_HINT: Final = (
    "use Linux 5.19 to 7.1 with CONFIG_CACHEFILES_ONDEMAND and CONFIG_EROFS_FS_ONDEMAND; see `erofsgen doctor`"
)


class Limits:
    """Per cent of free space on the cache's disk: culling stops at ``run``, begins at ``cull``; nothing is written
    below ``stop``. Raises UsageError."""

    def __init__(self, run: int = 7, cull: int = 5, stop: int = 1) -> None:
        if not 0 <= stop < cull < run < 100:
            raise UsageError(
                f"free space to stop at {stop}%, to cull at {cull}%, to run at {run}%",
                hint="each must be above the one before, and below 100",
            )
        self.run, self.cull, self.stop = run, cull, stop


class Device:
    """The open device ``descriptor``, bound to a directory."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    @classmethod
    def bind(cls, directory: Path, limits: Limits) -> Device:
        """Have the kernel keep its cache in ``directory``, which exists, and ask here for what it lacks.

        Raises UnsupportedError (no device, no on-demand mode, no right to it, a file system without what cachefiles
        needs), BusyError (another daemon has the device), StorageError.
        """
        descriptor = _open()
        try:
            _command(descriptor, f"dir {directory}")
            _command(descriptor, f"tag {TAG}")
            for letter in "bf":  # blocks and inodes
                # one by one they must hold with what is set already: stop < cull < run
                for name, value in (("stop", 0), ("run", 99), ("cull", limits.cull)):
                    _command(descriptor, f"{letter}{name} {value}%")
                for name, value in (("stop", limits.stop), ("run", limits.run)):
                    _command(descriptor, f"{letter}{name} {value}%")
            try:
                _command(descriptor, "bind ondemand")
            except OSError as error:
                raise _not_bound(directory, error) from error
        except OSError as error:
            os.close(descriptor)
            raise StorageError(f"{PATH}: {error.strerror}", hint="see `dmesg` for the kernel's reasons") from error
        except BaseException:
            os.close(descriptor)
            raise
        return cls(descriptor)

    def fileno(self) -> int:
        """Readable when messages wait, writable when the kernel wants objects culled."""
        return self._descriptor

    def read(self) -> bytes:
        """A message; nothing where none waits. Raises OSError for one that the kernel itself gave up."""
        return os.read(self._descriptor, protocol.BUFFER)

    def opened(self, message: int, size: int) -> bool:
        """Answer an OPEN with a size or a negative errno. False: nobody waits for it any more."""
        try:
            os.write(self._descriptor, protocol.copen(message, size))
        except OSError:
            return False
        return True

    def complete(self, descriptor: int, message: int) -> None:
        """Answer a READ: the kernel looks again, and the reader gets EIO where the bytes are still missing."""
        with suppress(OSError):  # the reader was killed, or the object is gone
            fcntl.ioctl(descriptor, protocol.READ_COMPLETE, message)

    def restore(self) -> bool:
        """Have the kernel tell again whatever was not answered. False: this kernel cannot (before 6.8 and 6.1.95)."""
        try:
            _command(self._descriptor, "restore")
        except OSError:
            return False
        return True

    def cull(self, file: Path) -> bool:
        """Remove an object that is not in use. False: it is."""
        os.chdir(file.parent)  # the command means a name in the working directory
        try:
            _command(self._descriptor, f"cull {file.name}")
        except OSError as error:
            return error.errno in (errno.ESTALE, errno.ENOENT)
        finally:
            os.chdir("/")
        return True


def _open() -> int:
    until = time.monotonic() + _PATIENCE
    while True:
        try:
            return os.open(PATH, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            match error.errno:
                case errno.EBUSY if time.monotonic() < until:
                    time.sleep(_PAUSE)
                case errno.EBUSY:
                    raise BusyError(
                        f"{PATH}: another daemon has it", hint="one for each machine: cachefilesd, or another --root?"
                    ) from error
                case errno.EPERM | errno.EACCES:
                    raise UnsupportedError(f"{PATH}: not permitted", hint="run as root (CAP_SYS_ADMIN)") from error
                case errno.ENOENT | errno.ENODEV | errno.ENXIO:
                    raise UnsupportedError(f"no {PATH}", hint=f"modprobe cachefiles; {_HINT}") from error
                case _:
                    raise StorageError(f"{PATH}: {error.strerror}") from error


def _not_bound(directory: Path, error: OSError) -> ErofsgenError:
    match error.errno:
        case errno.EINVAL:
            return UnsupportedError("cachefiles of this kernel has no on-demand mode", hint=_HINT)
        case errno.EOPNOTSUPP | errno.EPERM | errno.EROFS:
            return UnsupportedError(
                f"{directory}: its file system is unfit for cachefiles: {error.strerror}",
                hint="use a cache on ext4, xfs or btrfs, mounted writable and with user.* xattrs",
            )
        case errno.ENOBUFS:
            return StorageError(f"{directory}: less free space than --bstop", hint="free some space on its disk")
        case errno.ENOENT | errno.ENOTDIR:
            return StorageError(f"{directory}: {error.strerror}")
        case _:
            return StorageError(
                f"{directory}: cachefiles: {error.strerror}", hint="see `dmesg` for the kernel's reasons"
            )


def _command(descriptor: int, line: str) -> None:
    os.write(descriptor, os.fsencode(line))
