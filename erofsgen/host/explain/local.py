"""What this host has of a pack: presence maps, the kernel's own cache, the page cache."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Final

from erofsgen.errors import ErofsgenError
from erofsgen.host import linux
from erofsgen.host.cache import presence
from erofsgen.host.cache.cache import HostCache
from erofsgen.host.cache.objects import Objects
from erofsgen.host.cache.presence import Presence
from erofsgen.host.explain.facts import Frame, Mounted, State
from erofsgen.host.mount.state import MountInfo
from erofsgen.pack.toc import Toc

_PAGE: Final = os.sysconf("SC_PAGESIZE")
_STATES: Final[dict[presence.State, State]] = {
    presence.State.ABSENT: "absent",
    presence.State.WRITTEN: "present",
    presence.State.DURABLE: "durable",
    presence.State.SUSPECT: "suspect",
}
_WITHOUT: Final = ("fuse", "blockfuse")
"""Planes whose mounts are not looked into: to open a file there is a request to a process, which may not answer."""


class Local:
    """What ``cache`` has; nothing where there is none."""

    def __init__(self, cache: HostCache | None) -> None:
        self._cache = cache
        self._objects = None if cache is None else Objects(cache.layout)

    def data(self, pack: str) -> Path | None:
        """The data file of the pack with this SHA-256."""
        files = None if self._cache is None else self._cache.layout.find(pack)
        return None if files is None else files.data

    def objects(self, pack: str) -> list[str]:
        """What the kernel's own cache calls the pack, ``VOLUME/COOKIE``."""
        keys = [] if self._objects is None else self._objects.keys_of(pack)
        return ["/".join(key) for key in keys]

    def frames(self, pack: str, slot: int, toc: Toc, wanted: dict[int, int]) -> list[Frame]:
        """The frames ``wanted``, each with how many bytes of it. Raises StorageError."""
        data = self.data(pack)
        keys = [] if self._objects is None else self._objects.keys_of(pack)
        found = []
        with ExitStack() as opened:
            here = None
            if data is not None:
                here = opened.enter_context(Presence.open(data.with_suffix(".map"), len(toc)))
            uses = here.last_uses() if here is not None else []
            objects = []
            for key in keys:
                assert self._objects is not None
                objects.append(opened.enter_context(Presence.open(self._objects.map(key), len(toc))))
            for frame, size in sorted(wanted.items()):
                found.append(
                    Frame(
                        slot=slot,
                        frame=frame,
                        device_offset=int(toc.device_offsets[frame]),
                        device_size=int(toc.device_sizes[frame]),
                        offset=int(toc.offsets[frame]),
                        stored=int(toc.sizes[frame]),
                        digest=toc.digest(frame).hex(),
                        bytes=size,
                        host_cache="absent" if here is None else _STATES[here.state(frame)],
                        used=60 * uses[frame] or None if here is not None else None,
                        fscache=_best([_STATES[map_.state(frame)] for map_ in objects]),
                    )
                )
        return found

    def cached_pages(self, pack: str, ranges: Sequence[tuple[int, int]]) -> list[int | None]:
        """Bytes of the page cache that a pack's data file has of each range (start, length); None: the kernel does
        not tell, or there is no such file."""
        data = self.data(pack)
        return [None] * len(ranges) if data is None else _pages(data, ranges)


def _best(states: Iterable[State]) -> State | None:
    """Of objects in several domains the one that has most."""
    order: tuple[State, ...] = ("durable", "present", "suspect", "absent")
    return min(states, key=order.index, default=None)


def _pages(path: Path, ranges: Sequence[tuple[int, int]]) -> list[int | None]:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return [None] * len(ranges)
    try:
        return [_pages_of(descriptor, start, length) for start, length in ranges]
    finally:
        os.close(descriptor)


def _pages_of(descriptor: int, start: int, length: int) -> int | None:
    first = start // _PAGE * _PAGE
    try:
        return min(length, _PAGE * linux.pages_cached(descriptor, first, start + length - first))
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
            return None
        raise


def mounted(mount: MountInfo, path: bytes, size: int) -> Mounted:
    """A mount of the image, and what it has of its file ``path`` in the page cache."""
    pages = None
    if mount.plane not in _WITHOUT and not mount.rw and size:  # an overlay has no pages of its own
        with suppress(OSError, ErofsgenError):
            root = os.open(mount.target, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                if linux.mount_id(root) == mount.mount_id:
                    descriptor = linux.open_in_root(root, os.fsdecode(path), os.O_RDONLY | os.O_NOFOLLOW)
                    try:
                        pages = _pages_of(descriptor, 0, size)
                    finally:
                        os.close(descriptor)
            finally:
                os.close(root)
    return Mounted(target=mount.target, plane=mount.plane, page_cache=pages)
