"""The Linux calls that Python's standard library lacks: thin wrappers, ``OSError`` on failure, no policy.

Constants are those of the kernel's headers, named as there. System call numbers above 424 are the same on every
architecture but alpha.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import signal
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Final, NoReturn

AT_EMPTY_PATH: Final = 0x1000  # linux/fcntl.h
FALLOC_FL_KEEP_SIZE: Final = 1  # linux/falloc.h
FALLOC_FL_PUNCH_HOLE: Final = 2  # linux/falloc.h
FAN_ALLOW: Final = 1  # linux/fanotify.h
FAN_CLASS_PRE_CONTENT: Final = 0x8  # linux/fanotify.h
FAN_CLOEXEC: Final = 0x1  # linux/fanotify.h
FAN_DENY: Final = 2  # linux/fanotify.h
FAN_MARK_ADD: Final = 0x1  # linux/fanotify.h
FAN_MARK_REMOVE: Final = 0x2  # linux/fanotify.h
FAN_NONBLOCK: Final = 0x2  # linux/fanotify.h
FAN_PRE_ACCESS: Final = 0x100000  # linux/fanotify.h
FAN_UNLIMITED_MARKS: Final = 0x20  # linux/fanotify.h
FAN_UNLIMITED_QUEUE: Final = 0x10  # linux/fanotify.h
F_SETSIG: Final = 10  # asm-generic/fcntl.h
FICLONE: Final = 0x40049409  # linux/fs.h
FSCONFIG_CMD_CREATE: Final = 6  # linux/mount.h
FSCONFIG_SET_FLAG: Final = 0  # linux/mount.h
FSCONFIG_SET_STRING: Final = 1  # linux/mount.h
FSMOUNT_CLOEXEC: Final = 1  # linux/mount.h
FSOPEN_CLOEXEC: Final = 1  # linux/mount.h
LOOP_CONFIGURE: Final = 0x4C0A  # linux/loop.h
LOOP_CTL_GET_FREE: Final = 0x4C82  # linux/loop.h
LO_FLAGS_AUTOCLEAR: Final = 4  # linux/loop.h
LO_FLAGS_DIRECT_IO: Final = 16  # linux/loop.h
LO_FLAGS_READ_ONLY: Final = 1  # linux/loop.h
MNT_DETACH: Final = 2  # linux/fs.h
MOUNT_ATTR_NODEV: Final = 4  # linux/mount.h
MOUNT_ATTR_NOEXEC: Final = 8  # linux/mount.h
MOUNT_ATTR_NOSUID: Final = 2  # linux/mount.h
MOUNT_ATTR_RDONLY: Final = 1  # linux/mount.h
MOVE_MOUNT_F_EMPTY_PATH: Final = 0x4  # linux/mount.h
MOVE_MOUNT_T_EMPTY_PATH: Final = 0x40  # linux/mount.h
NR_CACHESTAT: Final = 451  # asm-generic/unistd.h
NR_FSCONFIG: Final = 431  # asm-generic/unistd.h
NR_FSMOUNT: Final = 432  # asm-generic/unistd.h
NR_FSOPEN: Final = 430  # asm-generic/unistd.h
NR_MOUNT_SETATTR: Final = 442  # asm-generic/unistd.h
NR_MOVE_MOUNT: Final = 429  # asm-generic/unistd.h
NR_OPENAT2: Final = 437  # asm-generic/unistd.h
PR_SET_CHILD_SUBREAPER: Final = 36  # linux/prctl.h
RESOLVE_IN_ROOT: Final = 0x10  # linux/openat2.h
RESOLVE_NO_MAGICLINKS: Final = 0x2  # linux/openat2.h
UMOUNT_NOFOLLOW: Final = 8  # linux/fs.h
IOPRIO_CLASS_IDLE: Final = 3  # linux/ioprio.h
IOPRIO_CLASS_SHIFT: Final = 13
IOPRIO_WHO_PROCESS: Final = 1
_NR_IOPRIO_SET: Final = {"x86_64": 251, "aarch64": 30, "riscv64": 30}

MOUNT_ATTRIBUTES: Final = {"nosuid": MOUNT_ATTR_NOSUID, "nodev": MOUNT_ATTR_NODEV, "noexec": MOUNT_ATTR_NOEXEC}
"""By the names that mount(8) and mountinfo have for them."""
_CACHESTAT_RANGE: Final = struct.Struct("=QQ")  # struct cachestat_range: off, len
_CACHESTAT: Final = struct.Struct("=5Q")  # struct cachestat: nr_cache first
FSCONFIG_STRING_LIMIT: Final = 255
"""Bytes a string parameter may have: fs/fsopen.c copies 256 with the NUL."""

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.umount2.argtypes = (ctypes.c_char_p, ctypes.c_int)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_libc.fanotify_init.argtypes = (ctypes.c_uint, ctypes.c_uint)
_libc.fanotify_mark.argtypes = (ctypes.c_int, ctypes.c_uint, ctypes.c_uint64, ctypes.c_int, ctypes.c_char_p)


class _LoopInfo64(ctypes.Structure):
    """struct loop_info64."""

    _fields_ = (
        ("lo_device", ctypes.c_uint64),
        ("lo_inode", ctypes.c_uint64),
        ("lo_rdevice", ctypes.c_uint64),
        ("lo_offset", ctypes.c_uint64),
        ("lo_sizelimit", ctypes.c_uint64),
        ("lo_number", ctypes.c_uint32),
        ("lo_encrypt_type", ctypes.c_uint32),
        ("lo_encrypt_key_size", ctypes.c_uint32),
        ("lo_flags", ctypes.c_uint32),
        ("lo_file_name", ctypes.c_char * 64),
        ("lo_crypt_name", ctypes.c_char * 64),
        ("lo_encrypt_key", ctypes.c_char * 32),
        ("lo_init", ctypes.c_uint64 * 2),
    )


class _LoopConfig(ctypes.Structure):
    """struct loop_config."""

    _fields_ = (
        ("fd", ctypes.c_uint32),
        ("block_size", ctypes.c_uint32),
        ("info", _LoopInfo64),
        ("__reserved", ctypes.c_uint64 * 8),
    )


assert ctypes.sizeof(_LoopInfo64) == 232
assert ctypes.sizeof(_LoopConfig) == 304


def fsopen(fstype: str) -> int:
    """A file system context for ``fstype``. ENODEV: the kernel does not know it. Linux 5.2."""
    return _call(fstype, NR_FSOPEN, fstype.encode(), FSOPEN_CLOEXEC)


def fsconfig_flag(context: int, key: str) -> None:
    """Set a parameter without a value."""
    _call(key, NR_FSCONFIG, context, FSCONFIG_SET_FLAG, key.encode(), None, 0)


def fsconfig_string(context: int, key: str, value: str) -> None:
    """Set a parameter. Nothing in ``value`` is special; EINVAL where it exceeds :data:`FSCONFIG_STRING_LIMIT`."""
    _call(f"{key}={value}", NR_FSCONFIG, context, FSCONFIG_SET_STRING, key.encode(), os.fsencode(value), 0)


def fsconfig_create(context: int) -> None:
    """Create the superblock, or find the one that the parameters name."""
    _call(None, NR_FSCONFIG, context, FSCONFIG_CMD_CREATE, None, None, 0)


def fscontext_log(context: int) -> list[str]:
    """What the kernel said about the context since the last call, oldest first, e.g. ``e overlay: ...``."""
    messages = []
    while True:
        try:
            messages.append(os.read(context, 8192).decode(errors="replace").strip())
        except OSError:  # ENODATA: no more messages
            return messages


def fsmount(context: int, attributes: int) -> int:
    """The context's superblock as a mount that is attached nowhere yet; it goes with the descriptor."""
    return _call(None, NR_FSMOUNT, context, FSMOUNT_CLOEXEC, attributes)


def move_mount(mount: int, target: int) -> None:
    """Attach the mount behind one descriptor to the directory behind the other (``O_PATH`` will do)."""
    flags = MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH
    _call(None, NR_MOVE_MOUNT, mount, b"", target, b"", flags)


def mount_setattr(mount: int, attributes: int) -> None:
    """Add ``MOUNT_ATTR_*`` to the mount whose root is behind a descriptor (``O_PATH`` will do). Linux 5.12."""
    change = struct.pack("=QQQQ", attributes, 0, 0, 0)
    _call(None, NR_MOUNT_SETATTR, mount, b"", AT_EMPTY_PATH, change, len(change))


def open_in_root(root: int, path: str, flags: int) -> int:
    """openat2(2): open ``path`` as if the directory behind ``root`` were ``/``, symbolic links and ``..`` included.

    Nothing outside is reached, however hostile the tree. Linux 5.6.
    """
    how = struct.pack("=QQQ", flags | os.O_CLOEXEC, 0, RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS)
    while True:
        try:
            return _call(path, NR_OPENAT2, root, os.fsencode(path), how, len(how))
        except BlockingIOError:  # EAGAIN: something was renamed meanwhile, and the kernel could not be sure
            continue


def set_child_subreaper(on: bool) -> None:
    """Whether orphans among this process's descendants become its children, which it can wait for."""
    if _libc.prctl(PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(on), *[ctypes.c_ulong(0)] * 3) < 0:
        _raise(None)


def umount(target: str | os.PathLike[str], flags: int = 0) -> None:
    """umount2(2)."""
    path = os.fspath(target)
    if _libc.umount2(os.fsencode(path), flags) < 0:
        _raise(path)


def fanotify_init(flags: int, event_flags: int) -> int:
    """A notification group; events' descriptors are opened with ``event_flags``. EINVAL: a flag the kernel lacks."""
    group: int = _libc.fanotify_init(flags, event_flags)
    if group < 0:
        _raise(None)
    return group


def fanotify_mark(group: int, flags: int, mask: int, descriptor: int) -> None:
    """Add or remove a mark on the inode behind ``descriptor``, which must not be ``O_PATH``.

    EINVAL: the kernel lacks an event of ``mask``; EOPNOTSUPP: the file system does. ENOENT: no such mark to remove.
    """
    if _libc.fanotify_mark(group, flags, mask, descriptor, None) < 0:
        _raise(None)


def pages_cached(descriptor: int, offset: int, length: int) -> int:
    """How many pages of a file's range are in the page cache, some of them perhaps on their way there (cachestat(2)).

    Linux 6.5; raises OSError with ENOSYS before that.
    """
    wanted = _CACHESTAT_RANGE.pack(offset, length)
    found = ctypes.create_string_buffer(_CACHESTAT.size)
    _call(None, NR_CACHESTAT, descriptor, wanted, ctypes.addressof(found), 0)
    cached: int = _CACHESTAT.unpack(found)[0]
    return cached


def punch_hole(descriptor: int, offset: int, length: int) -> None:
    """Give a range's space back; it reads as zeros afterwards."""
    if _libc.fallocate(descriptor, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length) < 0:
        _raise(None)


@contextmanager
def lease(descriptor: int) -> Iterator[bool]:
    """A write lease on a file: True where no other open file refers to it, in any process, mount or the kernel itself.

    While it is held whoever opens the file waits (fs/locks.c, check_conflicting_open; fcntl(2), F_SETLEASE). Duplicates
    of ``descriptor`` do not count. False where the file system has no leases.
    """
    try:
        fcntl.fcntl(descriptor, F_SETSIG, signal.SIGURG)  # who waits is announced by a signal; this one is ignored
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except OSError:
        yield False
        return
    try:
        yield True
    finally:
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)


def sole_user(descriptor: int) -> bool:
    """Whether a :func:`lease` would be granted; true of the moment only."""
    with lease(descriptor) as granted:
        return granted


def idle_io() -> None:
    """Let the calling thread's I/O wait for everybody else's, where the I/O scheduler knows priorities."""
    number = _NR_IOPRIO_SET.get(os.uname().machine)
    if number is not None:
        with suppress(OSError):
            _call(None, number, IOPRIO_WHO_PROCESS, 0, IOPRIO_CLASS_IDLE << IOPRIO_CLASS_SHIFT)


def clone_file(source: int, target: int) -> None:
    """Let ``target`` share all of ``source``'s extents. EOPNOTSUPP, EXDEV or EINVAL where that is not possible."""
    fcntl.ioctl(target, FICLONE, source)


def loop_get_free() -> int:
    """The number of an unused loop device, which may be in use by the time it is opened."""
    control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    try:
        return fcntl.ioctl(control, LOOP_CTL_GET_FREE)
    finally:
        os.close(control)


def loop_configure(loop: int, backing: int, flags: int, *, block_size: int, name: str) -> None:
    """Set up a loop device over a file; ``name`` is only shown. EBUSY: it is in use. Linux 5.8."""
    config = _LoopConfig(fd=backing, block_size=block_size)
    config.info.lo_flags = flags
    config.info.lo_file_name = os.fsencode(name)[:63]
    fcntl.ioctl(loop, LOOP_CONFIGURE, config)


def kernel_version() -> tuple[int, int]:
    """Major and minor version of the running kernel."""
    major, minor = re.findall(r"\d+", os.uname().release)[:2]
    return int(major), int(minor)


def boot_id() -> str:
    """Names the running boot."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()


def process_start(pid: int) -> int | None:
    """When a process started, in clock ticks since the boot; None where none runs. With its pid it names it."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            state, *fields = file.read().rpartition(b")")[2].split()  # proc(5): the name before may hold anything
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state in (b"Z", b"X") else int(fields[18])


def mount_id(descriptor: int) -> int:
    """The id of the mount that an open file or a detached mount is on, as in mountinfo. Reused after unmounting."""
    with open(f"/proc/self/fdinfo/{descriptor}") as file:
        for line in file:
            if line.startswith("mnt_id:"):
                return int(line[7:])
    raise OSError(f"/proc/self/fdinfo/{descriptor}: no mnt_id")


@dataclass(frozen=True)
class MountPoint:
    """One line of mountinfo (proc_pid_mountinfo(5)). ``device`` is ``major:minor``; paths are decoded."""

    id: int
    parent: int
    device: str
    root: str
    target: str
    options: str
    fstype: str
    source: str
    super_options: str


def mount_points() -> list[MountPoint]:
    """Every mount of this process's mount namespace below its root, in the order they cover each other."""
    with open("/proc/self/mountinfo", "rb") as file:
        return list(parse_mountinfo(file.read()))


def parse_mountinfo(data: bytes) -> Iterator[MountPoint]:
    """The lines of a mountinfo file. Raises ValueError for what is none."""
    for line in data.split(b"\n"):
        if line:
            # an empty source leaves two spaces, so fields are split at each one
            before, separator, after = line.partition(b" - ")
            if not separator:
                raise ValueError(f"not a mountinfo line: {line!r}")
            number, parent, device, root, target, options, *_ = before.split(b" ")
            fstype, source, super_options = after.split(b" ", 2)
            yield MountPoint(
                int(number),
                int(parent),
                device.decode(),
                _unescape(root),
                _unescape(target),
                _unescape(options),
                _unescape(fstype),
                _unescape(source),
                _unescape(super_options),
            )


def _unescape(field: bytes) -> str:
    return os.fsdecode(_OCTAL.sub(lambda match: bytes([int(match[1], 8)]), field))


_OCTAL: Final = re.compile(rb"\\([0-3][0-7]{2})")


def _call(what: str | None, number: int, *arguments: int | bytes | None) -> int:
    # variadic: every argument must be as wide as a register
    wide = [ctypes.c_char_p(a) if a is None or isinstance(a, bytes) else ctypes.c_long(a) for a in arguments]
    result: int = _libc.syscall(ctypes.c_long(number), *wide)
    if result < 0:
        _raise(what)
    return result


def _raise(what: str | None) -> NoReturn:
    number = ctypes.get_errno()
    raise OSError(number, os.strerror(number), what)
