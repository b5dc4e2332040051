"""Runs a container from an image in the foreground, and leaves nothing behind.

::

    ROOT/
    ├── run/<id>/           a running container: its bundle and its runtime's state; root's only; flock'ed while it runs
    │   ├── rootfs/         where the image is mounted
    │   └── config.json …   see erofsgen.host.container.bundle and .runtime
    └── lock.run            exclusive while a directory appears in ``run``, or leftovers are removed from it

A directory in ``run`` that nobody holds a lock on belonged to a run that was killed. The next run ends its container,
unmounts and removes it. Locks are taken in the order ``lock.run``, a run's own, ``lock.mounts``. A mount is gone before
the directory around it is removed: an upper directory is the user's.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Final

from erofsgen.errors import BusyError, ErofsgenError, NotFoundError, UsageError
from erofsgen.host import linux
from erofsgen.host.cache.cache import CachedImage
from erofsgen.host.cache.part import storage
from erofsgen.host.container.bundle import Options, command_of, write_bundle
from erofsgen.host.container.runtime import Container, find_runtimes
from erofsgen.host.mount.mounts import mount, unmount
from erofsgen.host.mount.state import Plane
from erofsgen.host.prefetch.start import Mode, Start
from erofsgen.profile.naming import command_name
from erofsgen.progress import SILENT, Progress
from erofsgen.store.image import Image

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_ENDING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run(
    image: Image | CachedImage,
    options: Options,
    *,
    root: Path,
    plane: Plane = "eager",
    name: str | None = None,
    upper: Path | None = None,
    runtime: str = "auto",
    interactive: bool = False,
    prefetch: Mode = "auto",
    profile: str | None = None,
    token: str = "",
    progress: AbstractContextManager[Progress] | None = None,
) -> int:
    """Run a container until its command ends; returns its exit code, 128 + N where signal N ended it.

    ``plane``: how what is not on this host yet comes, see :func:`~erofsgen.host.mount.mounts.mount`.

    ``name`` is the container's id and by default its host name, random if not given. Changes are thrown away, or kept
    in ``upper``. ``prefetch``, ``token``: see :class:`~erofsgen.host.prefetch.start.Start`; ``profile`` is the name
    of the command's profile, by default the command itself. ``runtime``: ``auto`` is the first that can create the
    container; otherwise a name or a path. Must be called in the main thread: signals go to the container.

    Raises what :func:`~erofsgen.host.mount.mounts.mount` and :func:`~erofsgen.host.container.bundle.write_bundle`
    raise, UsageError and BusyError (``name``), NotFoundError (no such runtime), UnsupportedError (it cannot create the
    container). Nothing is mounted and no process left then.
    """
    if name is not None and not _NAME.fullmatch(name):
        raise UsageError(f"{name!r} is no name of a container", hint="use letters, digits, dot, dash and underscore")
    argv, environment, cwd = command_of(image.config, options)
    start = Start(
        command=profile or command_name(argv), mode=prefetch, argv=argv, environment=environment, cwd=cwd, token=token
    )
    runtimes = find_runtimes(runtime)
    root = Path(os.path.realpath(root))
    identity = name or secrets.token_hex(6)
    with _place(root, identity) as place:
        container = Container(place, identity)
        rootfs = place / "rootfs"
        try:
            with storage(place):
                rootfs.mkdir()
            with progress or nullcontext(SILENT) as shown:  # over when the container has the terminal
                mount(image, rootfs, root=root, plane=plane, rw=True, upper=upper, start=start, progress=shown)
            with storage(place):
                write_bundle(place, rootfs, image.config, options, identity=identity)
            return container.execute(runtimes, terminal=options.terminal, interactive=interactive)
        finally:
            with _undisturbed():
                _clear(root, container)


@contextmanager
def _place(root: Path, identity: str) -> Iterator[Path]:
    """A new directory in ``run``, locked. Raises BusyError where there is one already."""
    place = root / "run" / identity
    with storage(root):
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(root / "lock.run", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _sweep(root)
        try:
            with storage(place):
                place.mkdir(mode=0o700)
        except ErofsgenError as error:
            if isinstance(error.__cause__, FileExistsError):
                raise BusyError(f"a container {identity} is running", hint="choose another --name") from None
            raise
        own = _lock(place)
    finally:
        os.close(lock)
    try:
        yield place
    finally:
        if own is not None:
            os.close(own)


def _sweep(root: Path) -> None:
    """Remove what killed runs left. What cannot be removed now stays for another time."""
    for place in sorted((root / "run").iterdir()):
        own = _lock(place)
        if own is not None:
            try:
                with suppress(ErofsgenError, OSError):
                    _clear(root, Container(place, place.name))
            finally:
                os.close(own)


def _lock(place: Path) -> int | None:
    """The run's lock, or None where it is running. Closing the descriptor gives it back."""
    descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _clear(root: Path, container: Container) -> None:
    """End the container, unmount its root file system and remove its directory, as far as there are any."""
    container.delete()
    rootfs = container.place / "rootfs"
    with suppress(NotFoundError):
        unmount(rootfs, root=root, force=True)
    with storage(container.place):
        if os.path.ismount(rootfs):
            linux.umount(rootfs, linux.MNT_DETACH | linux.UMOUNT_NOFOLLOW)
        with suppress(FileNotFoundError):
            rootfs.rmdir()
        shutil.rmtree(container.place)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Signals that would end this process are lost meanwhile."""
    before = {number: signal.signal(number, lambda *_: None) for number in _ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
