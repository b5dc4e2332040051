"""``erofsgen fuse``: a FUSE mount in the foreground."""

from __future__ import annotations

import os
import select
import signal
import socket
from contextlib import suppress
from pathlib import Path

import click

from erofsgen.cli.observing import observing_options, told
from erofsgen.cli.shared import Settings, Size, cache_options, image_argument, verb
from erofsgen.errors import NotFoundError, StorageError


@verb()
@image_argument()
@click.argument("target", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--allow-other", is_flag=True, help="Not for this user alone; root's mounts are for all.")
@click.option("--read-ahead", type=Size(), metavar="SIZE", help="What the kernel reads ahead; by default what is best.")
@observing_options
@cache_options
def command(
    settings: Settings, image: str, target: Path, allow_other: bool, read_ahead: int | None, metrics: str | None
) -> None:
    """Serve an image on DIR over FUSE, until interrupted.

    Needs neither root nor EROFS. What `erofsgen mount --plane fuse` does in the background: SIGINT and SIGTERM unmount,
    and unmounting ends it.
    """
    from erofsgen.host.mount.fuse import Server
    from erofsgen.host.mount.mounts import mount, mounts, unmount
    from erofsgen.host.pull import find

    cache = settings.cache()
    told(metrics, settings.root, insist=True)
    found = find(cache, settings.store, image)
    with settings.progress() as progress:
        info = mount(
            found,
            target,
            root=settings.root,
            plane="fuse",
            allow_other=allow_other,
            read_ahead=None if read_ahead is None else read_ahead >> 10,
            progress=progress,
        )
    assert info.server is not None
    if _ended(Server(*info.server).pid):
        if any(other.id == info.id for other in mounts(settings.root)):
            unmount(Path(info.target), root=settings.root, force=True)
            raise StorageError(f"{target}: the FUSE server has died", hint=f"see {settings.root}/daemon.log")
    else:
        with suppress(NotFoundError):  # somebody was faster
            unmount(Path(info.target), root=settings.root, force=True)


def _ended(pid: int) -> bool:
    """Wait for a process; False: for a signal that ends this one."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    woken, wake = socket.socketpair()
    with woken, wake:
        wake.setblocking(False)
        before = signal.set_wakeup_fd(wake.fileno())
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda _number, _frame: None)
        try:
            ready, _, _ = select.select([process, woken.fileno()], [], [])
        finally:
            signal.set_wakeup_fd(before)
            os.close(process)
    return process in ready
