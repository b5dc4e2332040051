"""The kernel's EROFS over files or over one loop device, and overlayfs on top.

Functions return *detached* mounts: a descriptor whose mount is nowhere in the file tree and goes with it, until
:func:`erofsgen.host.linux.move_mount` attaches it. So a failure on the way leaves nothing mounted.

There is no mount(2) here. Every kernel that reads chunk-based EROFS files (5.15) has fsopen(2) (5.2), which takes any
number of devices, where mount(2)'s options end at 4095 bytes, and leaves commas and backslashes in paths alone.

There is no loop device per pack either. iomap's buffered reads join neighbouring sectors into one request without
looking at the device (fs/iomap/buffered-io.c), so a file whose chunks lie at neighbouring addresses of *two* block
devices would read wrong bytes. One file, one loop device and an index without devices is right on every kernel.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final

from erofsgen.errors import BusyError, ErofsgenError, FormatError, StorageError, UnsupportedError
from erofsgen.host import linux

_LOOP_ATTEMPTS: Final = 64
"""Loop devices to try: another process may take the free one first."""

_BLOCK: Final = 4096
"""EROFS's block size (erofsgen.erofs.tree), without importing all that writes it."""

_BACKING_DEVICES: Final = "/sys/class/bdi"

_SPECIAL: Final = frozenset(',:\\"')
"""What overlayfs's own option parser, or findmnt's reader, would trip over."""


def require() -> None:
    """Raises UnsupportedError where no EROFS can be mounted at all: no root, a kernel without it."""
    with _context("erofs", Path("erofs")):
        pass


def may_mount(fstype: str) -> bool:
    """Whether this process may mount such a file system at all."""
    try:
        os.close(linux.fsopen(fstype))
    except PermissionError:
        return False
    except OSError:
        return True  # whatever it is, mounting says it better
    return True


def can_back_by_file(index: Path) -> bool:
    """Whether this kernel mounts EROFS from files of ``index``'s file system, found by doing it.

    False before Linux 6.12, without CONFIG_EROFS_FS_BACKED_BY_FILE, and on stacked file systems such as overlayfs.
    """
    try:
        with _context("erofs", index) as context, _paths() as parameter:
            # no devices: the kernel takes them as parts of the index and does not look
            linux.fsconfig_string(context, "source", parameter(index))
            linux.fsconfig_flag(context, "ro")
            linux.fsconfig_create(context)
    except UnsupportedError as error:
        if isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.ENOTBLK:
            return False
        raise
    return True


def mount_files(index: Path, devices: Sequence[Path], *, read_ahead: int | None = None) -> int:
    """EROFS over an index and its devices, in slot order, all regular files.

    ``read_ahead``: KiB that the kernel reads ahead in it, instead of its default of 128.
    """
    before = _backing_devices() if read_ahead is not None else set()
    with _context("erofs", index) as context, _paths() as parameter:
        linux.fsconfig_string(context, "source", parameter(index))
        for device in devices:
            linux.fsconfig_string(context, "device", parameter(device))
        linux.fsconfig_flag(context, "ro")
        linux.fsconfig_create(context)
        mount = linux.fsmount(context, linux.MOUNT_ATTR_RDONLY)
    if read_ahead is not None:
        _read_ahead(before, read_ahead)
    return mount


def mount_fscache(fsid: str, domain: str, *, read_ahead: int) -> int:
    """EROFS over what the kernel's own cache has, or asks its daemon for (Linux 5.19 to 7.1).

    ``fsid`` names the index, once at a time in ``domain``: BusyError where it is mounted. ``read_ahead`` in KiB.
    """
    before = _backing_devices()
    with _context("erofs", Path(fsid)) as context:
        linux.fsconfig_string(context, "source", "none")
        linux.fsconfig_string(context, "fsid", fsid)
        linux.fsconfig_string(context, "domain_id", domain)
        linux.fsconfig_flag(context, "ro")
        linux.fsconfig_create(context)
        mount = linux.fsmount(context, linux.MOUNT_ATTR_RDONLY)
    _read_ahead(before, read_ahead)
    return mount


def mount_fuse(device: int, name: str, options: Sequence[str] = ()) -> int:
    """A FUSE mount of the image ``name`` that whoever reads ``device``, ``/dev/fuse``, answers for. Nobody waits yet.

    ``options``: further flags. What it looks like may not be asked before the server runs.
    """
    with _context("fuse", Path(name)) as context:
        for key, value in (
            ("source", name[: linux.FSCONFIG_STRING_LIMIT]),
            ("subtype", "erofsgen"),
            ("fd", str(device)),
            ("rootmode", f"{stat.S_IFDIR:o}"),
            ("user_id", str(os.geteuid())),
            ("group_id", str(os.getegid())),
        ):
            linux.fsconfig_string(context, key, value)
        for flag in ("ro", "default_permissions", *options):
            linux.fsconfig_flag(context, flag)
        linux.fsconfig_create(context)
        return linux.fsmount(context, linux.MOUNT_ATTR_RDONLY)


def read_ahead_of(device: int, read_ahead: int) -> None:
    """Have the kernel read ``read_ahead`` KiB ahead in the superblock whose files have the ``st_dev`` ``device``.

    Only root can; nothing happens otherwise.
    """
    with suppress(OSError):  # no sysfs, or a read-only one
        name = f"{os.major(device)}:{os.minor(device)}"
        Path(_BACKING_DEVICES, name, "read_ahead_kb").write_text(str(read_ahead))


def _read_ahead(before: set[str], read_ahead: int) -> None:
    """Set what is read ahead in the superblock that was made since ``before``."""
    # Nothing tells which of them is the new superblock's (super_setup_bdi() numbers them). Another mount made in the
    # same instant would get the setting, too, which does it no harm
    for name in _backing_devices() - before:
        with suppress(OSError):  # no sysfs, or a read-only one
            Path(_BACKING_DEVICES, name, "read_ahead_kb").write_text(str(read_ahead))


def _backing_devices() -> set[str]:
    """EROFS superblocks that no block device backs, as sysfs has them."""
    with suppress(OSError):
        return {name for name in os.listdir(_BACKING_DEVICES) if name.startswith("erofs-")}
    return set()


def mount_loop(flat: Path) -> int:
    """EROFS over a loop device over a flat image. The loop device goes with the last mount of the superblock."""
    with _context("erofs", flat) as context:
        loop = _attach_loop(flat)
        try:
            linux.fsconfig_string(context, "source", _loop_path(loop))
            linux.fsconfig_flag(context, "ro")
            linux.fsconfig_create(context)
            return linux.fsmount(context, linux.MOUNT_ATTR_RDONLY)
        finally:
            os.close(loop)


def mount_overlay(lower: Path, upper: Path, work: Path, *, volatile: bool) -> int:
    """overlayfs with one lower directory. It holds on to the lower mount, which may be detached afterwards.

    ``volatile``: nothing in ``upper`` needs to survive the mount, so nothing is synced (Linux 5.10).
    """
    with _context("overlay", upper) as context, _paths() as parameter:
        for key, value in (
            ("source", "erofsgen"),
            ("lowerdir", parameter(lower)),
            ("upperdir", parameter(upper)),
            ("workdir", parameter(work)),
            # as users of a plain directory expect: directories can be renamed, one device number throughout
            ("redirect_dir", "on"),
            ("xino", "auto"),
            # an upper directory may be used with the next version of its image: keep no reference into this one
            ("index", "off"),
            ("metacopy", "off"),
        ):
            linux.fsconfig_string(context, key, value)
        if volatile:
            linux.fsconfig_flag(context, "volatile")
        linux.fsconfig_create(context)
        return linux.fsmount(context, 0)


@contextmanager
def _context(fstype: str, what: Path) -> Iterator[int]:
    """An fsopen(2) context; an OSError inside becomes the user's line, with the kernel's words where it had any."""
    try:
        context = linux.fsopen(fstype)
    except OSError as error:
        if error.errno == errno.ENODEV:
            raise UnsupportedError(
                f"this kernel has no {fstype} file system",
                hint=f"modprobe {fstype}, or use a kernel with CONFIG_{_OPTION[fstype]}",
            ) from error
        raise _refused(fstype, what, error, []) from error
    try:
        yield context
    except OSError as error:
        raise _refused(fstype, what, error, linux.fscontext_log(context)) from error
    finally:
        os.close(context)


_OPTION: Final = {"erofs": "EROFS_FS", "overlay": "OVERLAY_FS", "fuse": "FUSE_FS"}


def _refused(fstype: str, what: Path, error: OSError, log: list[str]) -> ErofsgenError:
    words = "; ".join(line[2:] for line in log) or os.strerror(error.errno or 0)
    message = f"{what}: {fstype}: {words}"
    match error.errno:
        case errno.EPERM | errno.EACCES:
            return UnsupportedError(f"mounting {fstype} is not permitted", hint="run as root (CAP_SYS_ADMIN)")
        case errno.ENOSYS:
            return UnsupportedError("this kernel has no fsopen(2)", hint="use Linux 5.15 or newer")
        case errno.EINVAL | errno.EOPNOTSUPP | errno.ENOTBLK:
            return UnsupportedError(message, hint="see `dmesg` for the kernel's reasons")
        case errno.EBADMSG | errno.EIO | errno.EUCLEAN:
            return FormatError(message, hint="see `dmesg` for the kernel's reasons")
        case errno.EBUSY | errno.EEXIST:
            return BusyError(message)
        case _:
            return StorageError(message, hint="see `dmesg` for the kernel's reasons")


@contextmanager
def _paths() -> Iterator[Parameter]:
    """A function from paths to parameters of a context; what it opens stays open meanwhile."""
    with ExitStack() as stack:
        yield Parameter(stack)


class Parameter:
    """A path as it can stand in a parameter: unchanged, or through a descriptor where it is long or has characters
    that mean something there."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._directories: dict[Path, int] = {}

    def __call__(self, path: Path) -> str:
        if not _SPECIAL & set(str(path)) and len(os.fsencode(path)) <= linux.FSCONFIG_STRING_LIMIT:
            return str(path)
        if path.is_dir():
            return f"/proc/self/fd/{self._open(path)}"
        # one descriptor for all files of a directory: there may be more devices than descriptors
        return f"/proc/self/fd/{self._open(path.parent)}/{path.name}"

    def _open(self, directory: Path) -> int:
        descriptor = self._directories.get(directory)
        if descriptor is None:
            descriptor = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            self._stack.callback(os.close, descriptor)
            self._directories[directory] = descriptor
        return descriptor


def _attach_loop(path: Path) -> int:
    """A descriptor of a read-only loop device over ``path``, which frees itself when its last user closes it."""
    flags = linux.LO_FLAGS_AUTOCLEAR | linux.LO_FLAGS_READ_ONLY
    backing = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for _ in range(_LOOP_ATTEMPTS):
            loop = os.open(f"/dev/loop{linux.loop_get_free()}", os.O_RDONLY | os.O_CLOEXEC)
            try:
                try:
                    # direct: or every page would be cached twice, under the loop device and above it
                    direct = flags | linux.LO_FLAGS_DIRECT_IO
                    linux.loop_configure(loop, backing, direct, block_size=_BLOCK, name=str(path))
                except OSError as error:
                    if error.errno != errno.EINVAL:
                        raise
                    linux.loop_configure(loop, backing, flags, block_size=_BLOCK, name=str(path))
            except OSError as error:
                os.close(loop)
                if error.errno != errno.EBUSY:
                    raise
            else:
                return loop
    except FileNotFoundError as error:
        raise UnsupportedError(
            f"{error.filename}: no such loop device", hint="modprobe loop, or mount on a kernel >= 6.12 without loop"
        ) from error
    finally:
        os.close(backing)
    raise BusyError("no free loop device", hint="see `losetup --list`")


def _loop_path(loop: int) -> str:
    return os.readlink(f"/proc/self/fd/{loop}")
