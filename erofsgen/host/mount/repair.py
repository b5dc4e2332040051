"""Mounts whose FUSE server has died, made anew: nobody can take a server's place."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from erofsgen.errors import ErofsgenError
from erofsgen.host import linux
from erofsgen.host.cache.cache import HostCache
from erofsgen.host.mount.fuse import Server
from erofsgen.host.mount.mounts import mount, mounts, unmount
from erofsgen.host.mount.state import MountInfo, namespace


class Repaired(NamedTuple):
    """A mount that was dead, and what kept it from being mounted again, if something did."""

    mount: MountInfo
    error: ErofsgenError | None


def is_dead(info: MountInfo) -> bool:
    """Whether the server of a mount has died: reads of it fail."""
    return info.server is not None and not Server(*info.server).lives


def repair(root: Path) -> Iterator[Repaired]:
    """Detach every dead mount of this mount namespace and mount the same image there again.

    Who has files of the old one open keeps getting errors. Changes that were to be thrown away with the mount are.
    """
    for info in mounts(root):
        if is_dead(info) and info.namespace == namespace():
            error = None
            try:
                _renew(info, root)
            except ErofsgenError as reason:
                error = reason
            yield Repaired(info, error)


def _renew(info: MountInfo, root: Path) -> None:
    options: set[str] = set()
    allow_other = False
    for point in linux.mount_points():
        if point.id == info.mount_id:
            options = set(point.options.split(","))
            allow_other = "allow_other" in point.super_options.split(",")
    unmount(Path(info.target), root=root, force=True)
    mount(
        HostCache(root).open_image(info.digest, info.image),
        Path(info.target),
        root=root,
        plane=info.plane,
        rw=info.rw,
        upper=Path(info.upper) if info.keep and info.upper else None,
        allow_other=allow_other,
        attributes=sum(linux.MOUNT_ATTRIBUTES[option] for option in options & linux.MOUNT_ATTRIBUTES.keys()),
    )
