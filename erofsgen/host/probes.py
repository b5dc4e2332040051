"""What this kernel and a directory's file system can do, found by doing it where that leaves nothing behind.

Each probe takes a directory, whose file system is meant, and returns a :class:`Finding`; none raises for what a
machine lacks. Scratch files have no name, mounts are attached nowhere. The directory need not exist: its nearest
ancestor stands for it.
"""

from __future__ import annotations

import errno
import fcntl
import gzip
import importlib
import os
import resource
import select
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO, Final, Literal

import msgspec

from erofsgen.errors import ErofsgenError
from erofsgen.host import linux

Result = Literal["ok", "missing", "unknown"]

_BLOCK: Final = 4096
_PATIENCE: Final = 5.0
"""Seconds that an event may take; it takes microseconds."""

_EVENT: Final = struct.Struct("=IBBHQii")  # linux/fanotify.h, struct fanotify_event_metadata
_RESPONSE: Final = struct.Struct("=iI")  # struct fanotify_response
_CACHEFILES: Final = "/dev/cachefiles"
_CAP_SYS_ADMIN: Final = 21  # linux/capability.h
_DESCRIPTORS: Final = 4096
_ROOT: Final = "run as root, in the initial user namespace, with CAP_SYS_ADMIN"
_OPT_IN: Final = "put the host cache (--root) on ext4, xfs or btrfs"


class Finding(msgspec.Struct, frozen=True):
    """What a check found. ``advice``: what to do, for what is not ``ok``."""

    check: str
    result: Result
    detail: str
    advice: str | None = None

    @property
    def ok(self) -> bool:
        return self.result == "ok"


def privilege(directory: Path) -> Finding:  # noqa: ARG001  (a probe's argument)
    """Root's rights to mount and to watch."""
    status = Path("/proc/self/status").read_text()
    (effective,) = [int(line.split()[1], 16) for line in status.splitlines() if line.startswith("CapEff:")]
    if not effective >> _CAP_SYS_ADMIN & 1:
        return Finding("privilege", "missing", "no CAP_SYS_ADMIN", _ROOT)
    with suppress(FileNotFoundError):  # a kernel without user namespaces
        if Path("/proc/self/uid_map").read_text().split() != ["0", "0", "4294967295"]:
            return Finding("privilege", "missing", "in a user namespace", _ROOT)
    return Finding("privilege", "ok", "CAP_SYS_ADMIN")


def erofs(directory: Path) -> Finding:  # noqa: ARG001
    """The kernel has EROFS."""
    from erofsgen.host.mount import superblock

    try:
        superblock.require()
    except ErofsgenError as error:
        return Finding("EROFS", "missing", str(error), error.hint)
    return Finding("EROFS", "ok", "fsopen(2) knows it")


def file_backed(directory: Path) -> Finding:
    """EROFS takes files of this file system as its devices: Linux 6.12, nothing stacked."""
    name = "EROFS over files"
    from erofsgen.host.mount import superblock

    try:
        with _scratch(directory) as file:
            os.pwrite(file.fileno(), _tiny_index(), 0)
            if superblock.can_back_by_file(Path(f"/proc/self/fd/{file.fileno()}")):
                return Finding(name, "ok", "a tiny index was mounted")
    except (ErofsgenError, OSError) as error:
        return Finding(name, "missing", str(error), getattr(error, "hint", None))
    return Finding(name, "missing", "the kernel wants a block device", "use Linux 6.12 or newer, and no overlayfs")


def fanotify(directory: Path) -> Finding:
    """A read of a file here waits for us, and we can refuse it: Linux 6.14, ext4, xfs or btrfs."""
    name = "fanotify pre-content"
    flags = linux.FAN_CLASS_PRE_CONTENT | linux.FAN_UNLIMITED_QUEUE | linux.FAN_UNLIMITED_MARKS
    try:
        group = linux.fanotify_init(flags | linux.FAN_CLOEXEC | linux.FAN_NONBLOCK, os.O_RDONLY)
    except OSError as error:
        if error.errno == errno.EPERM:
            return Finding(name, "missing", "fanotify_init(2) is not permitted", _ROOT)
        return Finding(name, "missing", f"fanotify_init(2): {error.strerror}", "use Linux 6.14 or newer")
    reader = None
    try:
        with _scratch(directory) as file:
            linux.fanotify_mark(group, linux.FAN_MARK_ADD, linux.FAN_PRE_ACCESS, file.fileno())
            # events come for files opened behind the mark
            watched = os.open(f"/proc/self/fd/{file.fileno()}", os.O_RDONLY | os.O_CLOEXEC)
            reader = _Reader(watched)
            problem = _refuse_one(group)
    except OSError as error:
        match error.errno:
            case errno.EOPNOTSUPP:
                return Finding(name, "missing", f"the file system of {directory} does not opt in", _OPT_IN)
            case errno.EINVAL:
                return Finding(name, "missing", "the kernel has no FAN_PRE_ACCESS", "use Linux 6.14 or newer")
            case _:
                return Finding(name, "missing", str(error))
    finally:
        os.close(group)  # lets a read go on that still waits
        if reader is not None:
            reader.join()
    if problem is not None:
        return Finding(name, "missing", problem, "report this, with the kernel's version")
    if reader.outcome != errno.EIO:
        return Finding(name, "missing", "a refused read was not EIO", "use a kernel with FAN_DENY_ERRNO, Linux 6.14")
    return Finding(name, "ok", "a read was noticed, and refused with EIO")


def _refuse_one(group: int) -> str | None:
    """Answer the next event with EIO; returns what went wrong."""
    if not select.select([group], [], [], _PATIENCE)[0]:
        return "a read was not noticed"
    _, version, _, _, mask, descriptor, _ = _EVENT.unpack_from(os.read(group, _BLOCK))
    try:
        if version != 3 or not mask & linux.FAN_PRE_ACCESS:
            return f"an event of version {version} with mask {mask:#x}"
        os.write(group, _RESPONSE.pack(descriptor, linux.FAN_DENY | errno.EIO << 24))
    finally:
        if descriptor >= 0:
            os.close(descriptor)
    return None


class _Reader(threading.Thread):
    """Reads a file's first block, closes it, and keeps the errno; 0 for success."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(daemon=True)
        self._descriptor = descriptor
        self.outcome: int | None = 0
        self.start()

    def run(self) -> None:
        try:
            os.pread(self._descriptor, _BLOCK, 0)
        except OSError as error:
            self.outcome = error.errno
        finally:
            os.close(self._descriptor)


def reflink(directory: Path) -> Finding:
    """Files that share extents."""

    def clone(file: IO[bytes]) -> None:
        with _scratch(directory) as other:
            linux.clone_file(file.fileno(), other.fileno())

    return _attempt(directory, "reflink", "raw packs are copied; xfs and btrfs share them with a store", clone)


def lease(directory: Path) -> Finding:
    """Leases, which tell whether a file is in use."""

    def take(file: IO[bytes]) -> None:
        fcntl.fcntl(file.fileno(), fcntl.F_SETLEASE, fcntl.F_WRLCK)
        fcntl.fcntl(file.fileno(), fcntl.F_SETLEASE, fcntl.F_UNLCK)

    return _attempt(directory, "leases", "what mounts use cannot be told from what they do not; use a local disk", take)


def xattr(directory: Path) -> Finding:
    """Extended attributes of files, in which the host cache notes the boot."""

    def note(file: IO[bytes]) -> None:
        os.setxattr(file.fileno(), "user.erofsgen.probe", b"1")

    return _attempt(directory, "user.* xattrs", "cached files are synced before they are used", note)


def overlay(directory: Path) -> Finding:
    """overlayfs with its upper directory here."""
    from erofsgen.host.mount import superblock

    try:
        with tempfile.TemporaryDirectory(dir=_existing(directory), prefix=".erofsgen-probe-") as scratch:
            lower, upper, work = (Path(scratch, name) for name in ("lower", "upper", "work"))
            for place in (lower, upper, work):
                place.mkdir()
            os.close(superblock.mount_overlay(lower, upper, work, volatile=True))
    except (ErofsgenError, OSError) as error:
        advice = getattr(error, "hint", None) or "for --rw and run: modprobe overlay, or another --root"
        return Finding("overlayfs", "missing", str(error), advice)
    return Finding("overlayfs", "ok", "mounted with its upper directory here")


def loop(directory: Path) -> Finding:  # noqa: ARG001
    """Loop devices, for kernels without file-backed mounts."""
    try:
        os.close(os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return Finding("loop devices", "missing", str(error.strerror), "modprobe loop; not needed since Linux 6.12")
    return Finding("loop devices", "ok", "/dev/loop-control")


def descriptors(directory: Path) -> Finding:  # noqa: ARG001
    """How many files a process may open: a pack and an event take one each."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard != resource.RLIM_INFINITY and hard < _DESCRIPTORS:
        return Finding("RLIMIT_NOFILE", "missing", f"{hard}", "ulimit -Hn 65536, or LimitNOFILE= in the unit")
    return Finding("RLIMIT_NOFILE", "ok", "unlimited" if hard == resource.RLIM_INFINITY else f"{hard}")


def fanotify_limits(directory: Path) -> Finding:  # noqa: ARG001
    """The sysctls; queue and marks of our group are unlimited, the number of groups is not."""
    try:
        groups, marks = (
            int(Path("/proc/sys/fs/fanotify", name).read_text()) for name in ("max_user_groups", "max_user_marks")
        )
    except OSError as error:
        return Finding("fanotify limits", "missing", str(error), "use a kernel with CONFIG_FANOTIFY")
    detail = f"{groups} groups, {marks} marks"
    if groups < 8:
        return Finding("fanotify limits", "missing", detail, "sysctl fs.fanotify.max_user_groups=128")
    return Finding("fanotify limits", "ok", detail)


def fscache(directory: Path) -> Finding:
    """cachefiles in on-demand mode with its cache here, and EROFS over it: Linux 5.19 to 7.1."""
    name = "fscache on demand"
    advice = "use Linux 5.19 to 7.1 with CONFIG_CACHEFILES_ONDEMAND and CONFIG_EROFS_FS_ONDEMAND"
    lacking = _lacks_fsid()
    if lacking:
        return Finding(name, "missing", lacking, advice)
    if not os.path.exists(_CACHEFILES):
        option = "CONFIG_CACHEFILES_ONDEMAND"
        off = kernel_config() and not kernel_config().get(option)
        return Finding(
            name, "missing", f"no {_CACHEFILES}{f', {option} is not set' if off else ''}",
            advice if off else f"modprobe cachefiles; {advice}",
        )  # fmt: skip
    try:
        with tempfile.TemporaryDirectory(dir=_existing(directory), prefix=".erofsgen-probe-") as scratch:
            device = os.open(_CACHEFILES, os.O_RDWR | os.O_CLOEXEC)
            try:
                os.write(device, b"dir " + os.fsencode(scratch))
                os.write(device, b"bind ondemand")
            finally:
                os.close(device)  # the kernel lets go of the directory
    except OSError as error:
        match error.errno:
            case errno.EBUSY:
                return _whose_device(name, directory)
            case errno.EINVAL:
                return Finding(name, "missing", "cachefiles has no on-demand mode", advice)
            case errno.EOPNOTSUPP | errno.EROFS:
                return Finding(name, "missing", f"the file system of {directory} is unfit: {error.strerror}", _OPT_IN)
            case errno.EPERM | errno.EACCES:
                return Finding(name, "missing", f"{_CACHEFILES}: {error.strerror}", _ROOT)
            case _:
                return Finding(name, "missing", f"a cache in {directory}: {error.strerror}", "see `dmesg`")
    return Finding(name, "ok", "a cache was bound, and given up")


def _lacks_fsid() -> str | None:
    """Why EROFS cannot be mounted from fscache, if so."""
    try:
        context = linux.fsopen("erofs")
    except OSError as error:
        return f"EROFS: {error.strerror}"
    try:
        linux.fsconfig_string(context, "fsid", "probe")
        said = linux.fscontext_log(context)
    except OSError:
        return "EROFS has no option fsid"
    finally:
        os.close(context)
    # a kernel built without it takes the option, and says so only in words
    return "CONFIG_EROFS_FS_ONDEMAND is not set" if any("not support" in line for line in said) else None


def _whose_device(name: str, root: Path) -> Finding:
    """The device is open: by the daemon of this root, or by another."""
    from erofsgen.host.daemon.client import Client

    with suppress(ErofsgenError, OSError):
        client = Client.connect(root)
        if client is not None:
            with client:
                if client.call("hello")["plane"] == "fscache":
                    return Finding(name, "ok", "the daemon of this root has the device")
    return Finding(
        name,
        "missing",
        f"another daemon has {_CACHEFILES}",
        "stop it: cachefilesd, or the daemon of another root",
    )


def fuse(directory: Path) -> Finding:  # noqa: ARG001
    """FUSE, its helper and its Python binding."""
    from erofsgen.host.mount.fuse import INSTALL

    advice = f"modprobe fuse; {INSTALL}"
    absent = []
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        absent.append("/dev/fuse")
    if os.geteuid() and shutil.which("fusermount3") is None:
        absent.append("fusermount3")
    try:
        importlib.import_module("pyfuse3")
    except ImportError:
        absent.append("pyfuse3")
    if absent:
        return Finding("FUSE", "missing", f"no {', '.join(absent)}", advice)
    return Finding("FUSE", "ok", f"/dev/fuse, pyfuse3{', fusermount3' if os.geteuid() else ''}")


def page_sharing(directory: Path) -> Finding:  # noqa: ARG001
    """Equal files of all images in memory once: Linux 7.0."""
    name = "page-cache sharing"
    advice = "images mount without it; Linux 7.0 with CONFIG_EROFS_FS_PAGE_CACHE_SHARE"
    try:
        context = linux.fsopen("erofs")
    except OSError as error:
        return Finding(name, "unknown", str(error.strerror), _ROOT)
    try:
        linux.fsconfig_flag(context, "inode_share")
    except OSError:
        return Finding(name, "missing", "EROFS has no option inode_share", advice)
    finally:
        os.close(context)
    config = kernel_config()
    if config and not config.get("CONFIG_EROFS_FS_PAGE_CACHE_SHARE"):
        return Finding(name, "missing", "CONFIG_EROFS_FS_PAGE_CACHE_SHARE not set", advice)
    return Finding(name, "ok" if config else "unknown", "EROFS has the option inode_share")


def runtimes(directory: Path) -> Finding:  # noqa: ARG001
    """OCI runtimes that answer."""
    found = []
    for name in ("runc", "crun"):
        if path := shutil.which(name):
            with suppress(OSError, subprocess.SubprocessError):
                answer = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=True)
                found.append(answer.stdout.partition("\n")[0].replace(" version", ""))
    if not found:
        return Finding("OCI runtimes", "missing", "neither runc nor crun", "for run: apt-get install runc, or crun")
    return Finding("OCI runtimes", "ok", ", ".join(found))


def cgroups(directory: Path) -> Finding:  # noqa: ARG001
    """The cgroup hierarchy that a runtime finds."""
    kinds = {point.target: point.fstype for point in linux.mount_points() if point.fstype in ("cgroup", "cgroup2")}
    if not kinds:
        return Finding("cgroups", "missing", "none mounted", "for run: mount -t cgroup2 none /sys/fs/cgroup")
    if kinds.get("/sys/fs/cgroup") == "cgroup2":
        return Finding("cgroups", "ok", "version 2")
    return Finding("cgroups", "ok", "hybrid, which crun refuses" if "cgroup2" in kinds.values() else "version 1")


def mount_helper(directory: Path) -> Finding:  # noqa: ARG001
    """Whether ``mount -t erofsgen`` finds its helper."""
    helper = "/sbin/mount.erofsgen"
    if os.access(helper, os.X_OK):
        return Finding("mount helper", "ok", helper)
    found = Path(sys.executable).with_name("mount.erofsgen")
    return Finding("mount helper", "missing", f"no {helper}", f"for mount -t erofsgen: ln -s {found} {helper}")


@cache
def kernel_config() -> dict[str, str]:
    """The options that are set in the running kernel's configuration; empty where it cannot be read."""
    for place in ("/proc/config.gz", f"/boot/config-{os.uname().release}"):
        with suppress(OSError):
            data = Path(place).read_bytes()
            text = (gzip.decompress(data) if place.endswith(".gz") else data).decode("utf-8", "replace")
            return dict(line.split("=", 1) for line in text.splitlines() if line.startswith("CONFIG_") and "=" in line)
    return {}


def _attempt(directory: Path, name: str, advice: str, do: Callable[[IO[bytes]], None]) -> Finding:
    """Do something with a scratch file of one block; an OSError says that it is missing."""
    try:
        with _scratch(directory) as file:
            try:
                do(file)
            except OSError as error:
                return Finding(name, "missing", str(error.strerror), advice)
    except OSError as error:
        return Finding(name, "unknown", str(error), "name a --root that can be written")
    return Finding(name, "ok", "tried")


@contextmanager
def _scratch(directory: Path) -> Iterator[IO[bytes]]:
    """A nameless file of one block."""
    with tempfile.TemporaryFile(dir=_existing(directory)) as file:
        file.write(bytes(_BLOCK))
        file.flush()
        yield file


def _existing(directory: Path) -> Path:
    """The directory, or its nearest ancestor that there is."""
    path = Path(os.path.realpath(directory))
    return next(place for place in (path, *path.parents) if place.is_dir())


@cache
def _tiny_index() -> bytes:
    import stat

    import numpy as np

    from erofsgen.erofs.tree import CHUNK_DTYPE, Inode
    from erofsgen.erofs.writer import write_index

    return bytes(write_index(Inode(stat.S_IFDIR | 0o755, children={}), np.zeros(1, CHUNK_DTYPE), []))
