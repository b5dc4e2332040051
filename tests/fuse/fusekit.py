"""A host whose images FUSE servers serve, and complete descriptions of what its mounts show."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from handmade import ImageMaker, chunks_of, erofs_mounts_below
from lazykit import Host, eventually, processes

from erofsgen.erofs.reader import Index
from erofsgen.erofs.tree import BLOCK, CHUNK_DTYPE, Inode
from erofsgen.host import linux
from erofsgen.host.cache.cache import HostCache
from erofsgen.host.mount.mounts import mounts, unmount
from erofsgen.host.mount.state import How, MountInfo, Plane
from erofsgen.store.directory import DirectoryStore

SMALL = 1 << 20
"""Bytes of a file that are read all; of larger ones pieces are."""


class Variant(NamedTuple):
    """A plane, and how its mounts are made where there is a choice."""

    plane: Plane
    via: How | None


VARIANTS = {
    "fuse": Variant("fuse", None),
    "blockfuse": Variant("blockfuse", None),
    "loop": Variant("blockfuse", "loop"),
}

ONLY_FUSE = pytest.mark.parametrize("variant", ["fuse"], indirect=True, scope="session")


class Site:
    """Below ``place``: store, root, mounts, and a daemon that completes no packs by itself and reads nothing ahead.

    ``options``: of the daemon.
    """

    def __init__(self, place: Path, variant: Variant, **options: float) -> None:
        self.place = place
        self.variant = variant
        self.store = place / "store"
        self.maker = ImageMaker(DirectoryStore(self.store))
        self.host = Host(place / "root", variant.plane, **{"read_ahead": 0, **options})
        self.info: MountInfo
        """Of the mount made last."""

    @property
    def cache(self) -> HostCache:
        return HostCache(self.host.root)

    def start(self) -> None:
        self.host.start("--worker=--complete-at", "--worker=2")

    def mount(self, image: Any, name: str = "mnt", **more: Any) -> Path:
        """Mounted below ``place``, after starting the daemon where none runs."""
        if not self.daemon():
            self.start()
        target = self.place / name
        self.info = self.host.mount(image, target, via=self.variant.via, **more)
        return target

    def unmount(self, target: Path, *, force: bool = False) -> None:
        unmount(target, root=self.host.root, force=force)

    def daemon(self) -> list[int]:
        """The daemon's processes."""
        return [pid for pid in processes(self.host.root) if not _is_fuse(pid)]

    def servers(self) -> list[int]:
        """The processes that answer for mounts."""
        return servers(self.host.root)

    def starters(self) -> list[int]:
        """What servers are forked from."""
        return _starters(self.host.root)

    def clean(self) -> None:
        """Unmount everything; the servers end."""
        for info in mounts(self.host.root):
            unmount(Path(info.target), root=self.host.root, force=True)
        eventually(lambda: self.servers() == [])

    def end(self) -> None:
        try:
            self.host.end()
        finally:
            while left := erofs_mounts_below(self.place):
                linux.umount(left[-1].target, linux.MNT_DETACH)
            eventually(lambda: processes(self.host.root) == [])


def chunked(content: bytes, mode: int = 0o644) -> tuple[Inode, np.ndarray, list[bytes]]:
    """A file in chunks on the first device, the table of these, and the chunks."""
    chunks = chunks_of(content)
    starts = np.cumsum([0, *(-(-len(chunk) // BLOCK) for chunk in chunks)])
    table = np.array([(0, 0), *((1, int(start)) for start in starts[:-1])], CHUNK_DTYPE)
    return Inode(stat.S_IFREG | mode, size=len(content), chunks=tuple(range(1, len(chunks) + 1))), table, chunks


def servers(root: Path) -> list[int]:
    """The processes that answer for mounts of a root."""
    starters = _starters(root)
    return [pid for pid in processes(root) if _is_fuse(pid) and pid not in starters]


def _starters(root: Path) -> list[int]:
    """Those that have the lock open."""
    lock = os.fspath(root / "lock.servers")
    return [pid for pid in processes(root) if _is_fuse(pid) and lock in _open_files(pid)]


def _is_fuse(pid: int) -> bool:
    try:
        return b"fusefallback.server" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False


def _open_files(pid: int) -> list[str]:
    found = []
    with suppress(OSError):
        for link in os.scandir(f"/proc/{pid}/fd"):
            with suppress(OSError):
                found.append(os.readlink(link.path))
    return found


def outcome(call: Callable[[], Any]) -> Any:
    """What a call returns, or the number of the error that it fails with."""
    try:
        return call()
    except OSError as error:
        return f"error {error.errno} {errno.errorcode.get(error.errno or 0)}"


class Seen(NamedTuple):
    """All that can be known about a file but its inode number; ``content``: None for what has none."""

    mode: int
    nlink: int
    uid: int
    gid: int
    rdev: int
    size: int
    mtime: int
    content: Any
    xattrs: Any


def tree_of(top: Path) -> tuple[dict[bytes, Seen], dict[bytes, int]]:
    """Every path below a mount, ``b""`` for its top: what is seen there, and the inode number."""
    found: dict[bytes, Seen] = {}
    numbers: dict[bytes, int] = {}

    def visit(path: bytes, at: bytes) -> None:
        status = os.lstat(at)
        numbers[path] = status.st_ino
        content: Any = None
        if stat.S_ISREG(status.st_mode):
            content = outcome(lambda: content_of(at, status.st_size))
        elif stat.S_ISLNK(status.st_mode):
            content = os.readlink(at)
        elif stat.S_ISDIR(status.st_mode):
            with os.scandir(at) as entries:
                content = [(entry.name, entry.is_dir(follow_symlinks=False), entry.is_symlink()) for entry in entries]
        is_dir = stat.S_ISDIR(status.st_mode)
        found[path] = Seen(
            status.st_mode, status.st_nlink, status.st_uid, status.st_gid, status.st_rdev,
            0 if is_dir else status.st_size, status.st_mtime_ns, content, outcome(lambda: xattrs_of(at)),
        )  # fmt: skip
        if is_dir:
            for name, *_ in content:
                visit(path + b"/" + name if path else name, at + b"/" + name)

    visit(b"", os.fsencode(top))
    return found, numbers


def content_of(path: bytes, size: int) -> list[bytes]:
    """All of a small file, pieces of a large one."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if size <= SMALL:
            return [os.pread(descriptor, SMALL + 1, 0)] if size else []
        places = [0, size // 3, (1 << 32) - 100, size - 70_000, size - 1, size, size + 5000]
        return [os.pread(descriptor, 66_000, place) for place in places]
    finally:
        os.close(descriptor)


def xattrs_of(path: bytes) -> list[tuple[bytes, Any]]:
    names = sorted(os.fsencode(name) for name in os.listxattr(path, follow_symlinks=False))
    return [(name, outcome(lambda name=name: os.getxattr(path, name, follow_symlinks=False))) for name in names]


def same_links(numbers: dict[bytes, int]) -> set[frozenset[bytes]]:
    """Which paths are one file."""
    links: dict[int, set[bytes]] = {}
    for path, number in numbers.items():
        links.setdefault(number, set()).add(path)
    return {frozenset(paths) for paths in links.values()}


def told_by_index(index: Index, read: Callable[[int, int, int], bytes]) -> dict[bytes, Seen]:
    """What :func:`tree_of` must find, by the index reader. ``read(device, start, length)``: bytes of devices."""
    found = {}
    for path, node in index.walk():
        content: Any = None
        if stat.S_ISREG(node.mode):
            content = _pieces(node, read)
        elif stat.S_ISLNK(node.mode):
            content = node.readlink()
        elif stat.S_ISDIR(node.mode):
            content = [(name, stat.S_ISDIR(child.mode), stat.S_ISLNK(child.mode)) for name, child in node.children()]
        found[path] = Seen(
            node.mode, node.nlink, node.uid, node.gid, node.rdev, 0 if stat.S_ISDIR(node.mode) else node.size,
            node.mtime, content, node.xattrs(),
        )  # fmt: skip
    return found


def _pieces(node: Any, read: Callable[[int, int, int], bytes]) -> list[bytes]:
    inline, extents = node.inline(), node.extents()

    def piece(offset: int, length: int) -> bytes:
        if inline is not None:
            return inline[offset : offset + length]
        data = b""
        end = min(offset + length, node.size)
        for at, size, device, start in extents:
            if at < end and at + size > offset:
                first, last = max(at, offset), min(at + size, end)
                data += bytes(last - first) if device is None else read(device, start + first - at, last - first)
        return data

    if node.size <= SMALL:
        return [piece(0, SMALL + 1)] if node.size else []
    size = node.size
    places = [0, size // 3, (1 << 32) - 100, size - 70_000, size - 1, size, size + 5000]
    return [piece(place, 66_000) for place in places]
