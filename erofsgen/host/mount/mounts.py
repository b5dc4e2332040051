"""Mounts of images, eager and lazy.

Eager: all of an image is local and verified before it is mounted, and nothing runs afterwards. Lazy: its index and
tables of contents are local, its packs are under a daemon's plane before the kernel opens them, and what is read is
brought then. With the planes blockfuse and fuse that is a server process of the mount's own.

A read-only mount is the kernel's EROFS on the target. A read-write one is overlayfs on the target with that EROFS
below it, which is attached nowhere else: one umount ends both. See :mod:`erofsgen.host.mount.state` for what is kept.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Collection, Sequence
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Final, cast

from erofsgen.errors import BusyError, ErofsgenError, NotFoundError, StorageError, UnsupportedError, UsageError
from erofsgen.host import linux
from erofsgen.host.cache.cache import CachedImage, HostCache
from erofsgen.host.cache.objects import DOMAIN
from erofsgen.host.cache.part import settle, storage
from erofsgen.host.config import load
from erofsgen.host.daemon.client import Client
from erofsgen.host.daemon.mounted import take_away
from erofsgen.host.mount import superblock
from erofsgen.host.mount.fuse import FLAT, Served, require, start_server
from erofsgen.host.mount.holders import holders
from erofsgen.host.mount.overlay import Upper
from erofsgen.host.mount.state import How, MountInfo, MountStates, Plane, namespace
from erofsgen.host.prefetch.start import Start
from erofsgen.host.pull import complete
from erofsgen.progress import SILENT, Progress
from erofsgen.store.image import Image

_FSID: Final = 20
"""Digits of a digest in an fsid: the kernel tells mounts apart in sysfs by 36 characters of domain and fsid, and with
two that are alike there the second fails (super_set_sysfs_name_generic(), fs/super.c)."""
_BY_HAND: Final = 64
"""Numbers to try that somebody may have used who does not tell us."""

READ_AHEAD: Final = 512
"""KiB that EROFS reads ahead of a sequential reader of a lazy mount, by measurement: see docs/decisions.md."""
FUSE_READ_AHEAD: Final = 1024
"""KiB that FUSE reads ahead, by measurement, too."""


def mount(
    image: Image | CachedImage,
    target: Path,
    *,
    root: Path,
    plane: Plane = "eager",
    rw: bool = False,
    upper: Path | None = None,
    read_ahead: int | None = None,
    allow_other: bool = False,
    attributes: int = 0,
    start: Start | None = None,
    progress: Progress = SILENT,
    via: How | None = None,
) -> MountInfo:
    """Mount ``image`` on the directory ``target``; host cache and state are below ``root``.

    ``image`` of the cache needs no store, if the cache has what ``plane`` needs. A lazy ``plane`` starts a daemon where
    none runs; the kernel then reads ``read_ahead`` KiB ahead, by default what is best for the plane.
    ``rw`` puts an overlay on top, whose changes are thrown away with the mount. ``upper``, made where it is missing,
    keeps them, and implies ``rw``. ``allow_other``: with the plane fuse, a mount of a plain user's is for
    everybody, as root's always are. ``start``: what is to run in a lazy mount. ``attributes``: ``MOUNT_ATTR_*``
    beyond read-only. ``via`` is for tests: by default files back the mount where the kernel can do that, else a
    loop device does.

    Raises NotFoundError and UsageError (``target`` or ``upper`` cannot be used as such), BusyError (a mount of ours is
    there, ``upper`` is in use), UnsupportedError (not root, a kernel without EROFS or without the plane), and what
    :meth:`HostCache.add` and :func:`erofsgen.host.pull.complete` raise. Nothing is mounted then.
    """
    target = _target(target)
    if upper is not None:
        rw, upper = True, Path(os.path.realpath(upper))
    as_user = plane == "fuse" and not superblock.may_mount("fuse")
    if as_user and rw:
        raise UnsupportedError("only root can mount read-write", hint="leave --rw and --upper away")
    if plane != "fuse":
        superblock.require()
    if plane in ("fuse", "blockfuse"):
        require()
    states = MountStates(root)
    if states.hides(target):
        raise UsageError(f"{target}: in the way of the host cache {states.root}", hint="mount somewhere else")
    with states.locked() as mounted:
        _refuse(mounted, target, upper)
    cache = HostCache(states.root)
    cached = image if isinstance(image, CachedImage) else cache.add(image, progress)
    if via is None:
        via = _how(plane, cached.index)
    index = cached.index
    if plane == "eager" and via == "loop":
        cache.materialise_flat(image, progress)
        index = cache.image_path(cached.digest, "flat")
    elif plane == "eager":
        complete(cache, cached, image if isinstance(image, Image) else None, progress)
    identity = os.urandom(8).hex()
    with ExitStack() as undo, ExitStack() as held:
        devices = [] if index != cached.index else held.enter_context(cached.in_use())
        if plane != "eager":
            client = held.enter_context(Client.start(states.root, ["--plane", plane]))
            start = start or Start()
            facts = {"target": str(target), "name": cached.name, "image": cached.digest}
            facts |= {"command": start.command, "token": start.token}
            client.call(
                "arm",
                mount=identity,
                plane=plane,
                packs=[os.fspath(path) for path in devices],
                record="active" if start.token else "passive" if load().prefetch.record else "none",
                facts=facts,
            )
        served: Served | None = None
        if plane in ("fuse", "blockfuse"):
            at = target if as_user else None
            serve = partial(start_server, states.root, plane, identity, cached.digest, flat=via == "loop")
            options = ["allow_other"] if allow_other or not as_user else []
            options += ["noexec"] if as_user and attributes & linux.MOUNT_ATTR_NOEXEC else []
            served = held.enter_context(Served(cached.name, serve, options, at=at))
            served.read_ahead(read_ahead or FUSE_READ_AHEAD)
            if as_user:
                undo.callback(_take_away, str(target))
        mounted = held.enter_context(states.locked())
        _refuse(mounted, target, upper)
        fsid = None
        if via == "fscache":
            taken = {info.fsid for info in mounted}
            top, fsid = _mount_fscache(cached.digest, taken, read_ahead or READ_AHEAD)
        else:
            top = _mount_here(via, index, devices, served, None if plane == "eager" else read_ahead or READ_AHEAD)
        held.callback(os.close, top)
        changes = None
        if rw:
            with states.private(identity) as private:
                undo.callback(states.throw_away, identity)
                changes = Upper(upper or states.throwaway(identity), keep=upper is not None)
                undo.callback(changes.undo)
                top = changes.overlay(top, private)
            held.callback(os.close, top)
        device = os.fstat(top).st_dev
        info = MountInfo(
            id=identity,
            target=str(target),
            image=cached.name,
            digest=cached.digest,
            plane=plane,
            how=via,
            rw=rw,
            upper=str(changes.data) if changes else None,
            work=str(changes.work) if changes else None,
            keep=upper is not None,
            index=str(index),
            devices=[str(path) for path in devices] if via == "file-backed" else [],
            fsid=fsid,
            server=served.server if served else None,
            mounted_at=datetime.now(UTC).isoformat(timespec="seconds"),
            mount_id=linux.mount_id(top),
            device=f"{os.major(device)}:{os.minor(device)}",
            namespace=namespace(),
            boot_id=linux.boot_id(),
        )
        undo.callback(states.forget, info)
        undo.callback(_detach, info)
        states.write(info)
        if not as_user:
            with storage(target):
                linux.mount_setattr(top, attributes)
                place = os.open(target, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
                held.callback(os.close, place)
                linux.move_mount(top, place)
        undo.pop_all()
        if start is not None and plane != "eager":
            with suppress(ErofsgenError):  # that the connection ends says the same
                client.call("made", mount=identity, device=info.device, prefetch=start.message(cached.digest))
    return info


def choose(plane: str, root: Path) -> tuple[Plane, list[str]]:
    """The plane that the user's word means, and why it is none that ``auto`` prefers, a line for each of these.

    ``auto``: that of the daemon that runs, or the lazy one that works first. Raises UnsupportedError where none works.
    """
    if plane != "auto":
        return cast(Plane, plane), []
    client = Client.connect(root)
    if client is not None:
        with client:
            return cast(Plane, client.call("hello")["plane"]), []
    return first_that_works(root)


def first_that_works(root: Path) -> tuple[Plane, list[str]]:
    """The lazy plane that ``auto`` means where no daemon runs, and why not others, as :func:`choose`."""
    from erofsgen.host.daemon.planes import LAZY
    from erofsgen.host.doctor import plane_works

    reasons: list[str] = []
    for lazy in LAZY:
        finding = plane_works(root, lazy)
        if finding.ok:
            return cast(Plane, lazy), reasons
        reasons.append(f"{lazy}: {finding.detail}")
    raise UnsupportedError(
        f"no image can be mounted lazily here: {'; '.join(reasons)}", hint="see `erofsgen doctor`; mount with --eager"
    )


def _how(plane: Plane, index: Path) -> How:
    if plane in ("fscache", "fuse"):
        return plane
    return "file-backed" if plane == "fanotify" or superblock.can_back_by_file(index) else "loop"


def _mount_here(via: How, index: Path, devices: Sequence[Path], served: Served | None, read_ahead: int | None) -> int:
    """A detached mount: the server's own, or EROFS over files of the host cache, or of the server's mount."""
    if served is not None and via == "fuse":
        return os.dup(served.top)
    if via == "loop":
        return superblock.mount_loop(index if served is None else served.path(FLAT))
    files = devices if served is None else [served.path(path.stem) for path in devices]
    return superblock.mount_files(index, files, read_ahead=read_ahead)


def _mount_fscache(digest: str, taken: Collection[str | None], read_ahead: int) -> tuple[int, str]:
    """A mount of an image, and its fsid: the lowest number that is free, so that what the kernel has is used again."""
    name = digest.removeprefix("sha256:")[:_FSID]
    for number in range(len(taken) + _BY_HAND):
        fsid = f"{name}.{number}"
        if fsid not in taken:
            with suppress(BusyError):  # somebody has mounted it by hand
                return superblock.mount_fscache(fsid, DOMAIN, read_ahead=read_ahead), fsid
    raise BusyError(f"{name}.0 to {name}.{number}: the kernel has these fsids already", hint="see `mount -t erofs`")


def unmount(target: Path, *, root: Path, force: bool = False) -> MountInfo:
    """Unmount what :func:`mount` mounted on ``target``, and throw away its changes unless they were to be kept.

    ``force`` takes it out of the file tree although it is in use; processes inside go on with what they have open,
    but changes to be thrown away are thrown away at once.

    Raises NotFoundError (no mount of ours), BusyError (in use, or covered by another mount), StorageError.
    """
    path = os.path.realpath(target)
    states = MountStates(root)
    if not states.exist():
        raise _not_mounted(target, states.root)
    with states.locked() as mounted:
        here = [info for info in mounted if info.target == path]
        if not here:
            raise _not_mounted(target, states.root)
        info = here[-1]
        if info.namespace != namespace():
            raise UnsupportedError(
                f"{path}: mounted in another mount namespace", hint="run `erofsgen umount` there, see nsenter(1)"
            )
        _uncovered(info)
        try:
            take_away(path, lazy=force)
        except OSError as error:
            if error.errno == errno.EBUSY:
                by = holders(path, info.mount_id)
                raise BusyError(
                    f"{path}: in use" + (f" by {by}" if by else ""), hint="end that, or use --force"
                ) from error
            if error.errno == errno.EPERM:
                raise UnsupportedError(f"{path}: unmounting is not permitted", hint="run as root") from error
            raise StorageError(f"{path}: {error.strerror}") from error
        states.forget(info)
    if info.plane != "eager":
        with suppress(ErofsgenError):  # it looks by itself, only later
            client = Client.connect(states.root)
            if client is not None:
                with client:
                    client.call("unmounted", mount=info.id)
    with suppress(StorageError):  # a file that cannot be synced is removed from the cache: no matter of this mount
        settle([Path(info.index)])
    return info


def mounts(root: Path) -> list[MountInfo]:
    """The mounts of ``root`` that still exist, oldest first."""
    states = MountStates(root)
    if not states.exist():
        return []
    with states.locked() as mounted:
        return sorted(mounted, key=lambda info: (info.mounted_at, info.target))


def _target(target: Path) -> Path:
    path = Path(os.path.realpath(target))
    if not path.exists():
        raise NotFoundError(f"{target}: no such directory", hint="create it first")
    if not path.is_dir():
        raise UsageError(f"{target}: not a directory")
    return path


def _refuse(mounted: Sequence[MountInfo], target: Path, upper: Path | None) -> None:
    here = namespace()
    for info in mounted:
        if info.target == str(target) and info.namespace == here:
            raise BusyError(f"{target}: {info.image} is mounted there", hint=f"`erofsgen umount {target}` first")
        if upper is not None and info.upper == str(upper):
            raise BusyError(
                f"{upper}: the upper directory of {info.target}", hint="every mount needs an upper directory of its own"
            )


def _uncovered(info: MountInfo) -> None:
    """Raises BusyError where unmounting the path would unmount something else."""
    with storage(Path(info.target)):
        descriptor = os.open(info.target, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if linux.mount_id(descriptor) != info.mount_id:
            raise BusyError(f"{info.target}: covered by another mount", hint=f"`umount {info.target}` first")
    finally:
        os.close(descriptor)


def _detach(info: MountInfo) -> None:
    """Take a mount away that may have been attached: an interrupt can come right behind that."""
    with suppress(OSError, ErofsgenError):
        _uncovered(info)
        take_away(info.target, lazy=True)


def _take_away(target: str) -> None:
    with suppress(OSError):
        take_away(target, lazy=True)


def _not_mounted(target: Path, root: Path) -> NotFoundError:
    return NotFoundError(f"{target}: nothing of {root} is mounted there", hint="see `erofsgen mounts`")
