"""What the cache holds and for whom, and how it becomes less. Profiles outlive their image: it may come back.

An image or a pack is *in use* while somebody has its file open (:func:`erofsgen.host.linux.lease`), a mount for
instance, or its map locked because a mount is being made. Nothing in use is removed. An image's manifest is written
before its packs: whoever lists packs first and images then takes no pack of an image that is just being pulled for one
that nobody needs.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Final

import msgspec

from erofsgen.errors import ErofsgenError
from erofsgen.host import linux
from erofsgen.host.cache.cache import CachedImage, HostCache
from erofsgen.host.cache.files import PackFiles
from erofsgen.host.cache.frames import frame_starts
from erofsgen.host.cache.objects import Objects
from erofsgen.host.cache.presence import Presence
from erofsgen.host.cache.verify import Report, verify
from erofsgen.host.config import load
from erofsgen.host.fill.chain import add_chains
from erofsgen.host.fill.engine import Engine
from erofsgen.host.profiles import HostProfiles, drop_lonely
from erofsgen.progress import SILENT, Progress
from erofsgen.store.manifest import Pack

_OLD: Final = 24 * 3600
"""Seconds after which nobody is at a file any more that was to be renamed."""
_UNUSED: Final = 30 * 86400.0
"""Seconds for which the profiles of an image are kept that is no longer in the cache."""


class PackUse(msgspec.Struct, frozen=True, kw_only=True):
    """A pack, in bytes. ``images``: how many name it."""

    pack: str
    device: int
    present: int
    allocated: int
    images: int
    pinned: bool
    in_use: bool


class ImageUse(msgspec.Struct, frozen=True, kw_only=True):
    """An image, in bytes: its packs, which it may share with others. ``index`` is its own."""

    digest: str
    names: list[str]
    index: int
    device: int
    present: int
    allocated: int
    packs: list[str]
    pinned: bool
    in_use: bool


class Usage(msgspec.Struct, frozen=True):
    """What the cache takes, and its limit, in bytes. ``fscache``: what the kernel's own cache takes of it."""

    allocated: int
    limit: int | None
    images: list[ImageUse]
    packs: list[PackUse]
    fscache: int = 0


class Removed(msgspec.Struct):
    """What went: images and packs by digest, files a crash left; bytes in all, and those of evicted frames."""

    images: list[str] = msgspec.field(default_factory=list)
    packs: list[str] = msgspec.field(default_factory=list)
    leftovers: list[str] = msgspec.field(default_factory=list)
    bytes: int = 0
    evicted: int = 0


def usage(cache: HostCache) -> Usage:
    """What the cache holds. Raises StorageError."""
    cache.layout.reload()
    pinned = set(cache.layout.config.pinned)
    images = cache.images()
    named = Counter(pack.hex for image in images for pack in packs_of([image]))
    kept = {pack.hex for image in images if image.digest in pinned for pack in image.packs}
    packs: dict[str, PackUse] = {}
    for data in sorted(cache.layout.data_files()):
        files = PackFiles(data)
        with suppress(FileNotFoundError):
            found = os.stat(data)
            packs[files.hex] = PackUse(
                pack=files.hex,
                device=found.st_size,
                present=_present(files),
                allocated=found.st_blocks * 512,
                images=named[files.hex],
                pinned=files.hex in kept,
                in_use=not _idle(data),
            )
    found_images = []
    for image in images:
        mine = [packs[pack.hex] for pack in packs_of([image]) if pack.hex in packs]
        found_images.append(
            ImageUse(
                digest=image.digest,
                names=image.names,
                index=_size(image.index),
                device=sum(pack.device for pack in mine),
                present=sum(pack.present for pack in mine),
                allocated=sum(pack.allocated for pack in mine),
                packs=[pack.pack for pack in mine],
                pinned=image.digest in pinned,
                in_use=not _idle(image.index),
            )
        )
    return Usage(
        cache.layout.allocated(),
        cache.layout.config.max_bytes,
        found_images,
        list(packs.values()),
        sum(stored.size for stored in Objects(cache.layout).all()),
    )


def collect(cache: HostCache, *, images: bool = False, dry_run: bool = False) -> Removed:
    """Remove packs that no image names, what crashes left a day ago, and frames beyond the limit.

    ``images``: images that are neither in use nor pinned go first. Within :meth:`HostCache.filling`.
    """
    cache.layout.reload()
    return _remove(cache, set(cache.layout.config.pinned) if images else None, dry_run=dry_run)


def clear(cache: HostCache) -> Removed:
    """Remove everything that is not in use, pinned or not. Within :meth:`HostCache.filling`."""
    return _remove(cache, set(), dry_run=False)


def verify_here(cache: HostCache, *, repair: bool, progress: Progress = SILENT) -> Report:
    """Verify all packs in this process, see :func:`verify`. Within :meth:`HostCache.filling`."""
    images = cache.images()

    def check(engine: Engine | None) -> Report:
        return verify(packs_of(images), lambda pack: closing(cache.open_pack(pack)), engine, progress)

    if not repair:
        return check(None)
    config = load()
    with Engine([], retries=0) as engine:
        for image in images:
            add_chains(engine, config, image.stores, [pack.hex for pack in image.packs])
        return check(engine)


def packs_of(images: Iterable[CachedImage]) -> list[Pack]:
    """All their packs, each once."""
    return list({pack.hex: pack for image in images for pack in image.packs}.values())


def _remove(cache: HostCache, keep: set[str] | None, *, dry_run: bool) -> Removed:
    """``keep``: images other than these go, None: all stay."""
    removed = Removed()

    def remove(paths: Iterable[Path]) -> None:
        for path in paths:
            size = _size(path)
            if not dry_run:
                with suppress(FileNotFoundError):
                    path.unlink()
                cache.room.give_back(size)
            removed.bytes += size

    packs = [PackFiles(data) for data in sorted(cache.layout.data_files())]
    staying = cache.images()
    if keep is not None:
        gone = {digest for digest in _kept(cache) if digest not in keep and _forget(cache, digest, remove)}
        removed.images = sorted(gone)
        staying = [image for image in staying if image.digest not in gone]
    needed = {pack.hex for pack in packs_of(staying)}
    for files in packs:
        if files.hex not in needed:
            with _alone(files) as alone:
                if alone:
                    remove((files.data, files.map, files.toc))
                    removed.packs.append(files.hex)
    for path in _leftovers(cache):
        remove([path])
        removed.leftovers.append(str(path))
    lonely = drop_lonely(HostProfiles(cache.root), _kept(cache), time.time() - _UNUSED, dry_run=dry_run)
    removed.leftovers += map(str, lonely)
    if not dry_run:
        removed.bytes += cache.cull(None, needed | {image.digest for image in staying})
    limit = cache.room.limit
    if limit is not None:
        over = cache.layout.allocated() - (removed.bytes if dry_run else 0) - limit
        if over > 0:
            removed.evicted = over if dry_run else cache.evict(over)
            removed.bytes += removed.evicted
    return removed


def _kept(cache: HostCache) -> set[str]:
    """Digests of the images of which there is any file."""
    names = (path.name for path in cache.layout.images.iterdir() if path.suffix != ".part")
    return {f"sha256:{name.partition('.')[0]}" for name in names}


def _forget(cache: HostCache, digest: str, remove: Callable[[Iterable[Path]], None]) -> bool:
    """Remove an image's own files unless it is in use."""
    files = [cache.image_path(digest, suffix) for suffix in ("json", "config.json", "erofs", "flat")]
    if not all(_idle(path) for path in files if path.suffix != ".json"):
        return False
    with suppress(ErofsgenError):
        for pack in cache.open_image(digest).packs:
            found = cache.layout.find(pack.hex)
            if found is not None and not _idle_map(found.map):
                return False
    remove(path for path in files if path.exists())
    return True


def _leftovers(cache: HostCache) -> Iterator[Path]:
    """What was to be renamed, and parts of packs without a data file."""
    before = time.time() - _OLD
    for directory in (cache.root, cache.layout.images, *cache.layout.directories):
        if not directory.is_dir():
            continue
        for path in sorted(directory.iterdir()):
            loose = path.suffix in (".map", ".toc") and not path.with_suffix(".data").exists()
            with suppress(FileNotFoundError):
                if (path.suffix == ".part" or loose) and path.stat().st_mtime < before:
                    yield path


@contextmanager
def _alone(files: PackFiles) -> Iterator[bool]:
    """Whether nobody uses a pack; meanwhile nobody begins to."""
    with suppress(FileNotFoundError), open(files.data, "r+b") as data, open(files.map, "a+b") as marks:
        try:
            fcntl.flock(marks, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        with linux.lease(data.fileno()) as granted:
            yield granted
        return
    yield False


def _idle(path: Path) -> bool:
    """Whether nobody has a file open. One that is missing is idle."""
    try:
        with open(path, "r+b") as file:
            return linux.sole_user(file.fileno())
    except FileNotFoundError:
        return True


def _idle_map(path: Path) -> bool:
    """Whether no mount is being made of a pack."""
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return False


def _present(files: PackFiles) -> int:
    """Device bytes of the frames that count; 0 where that is not known."""
    with suppress(ErofsgenError, OSError):
        starts = frame_starts(files.toc.read_bytes(), what=str(files.toc))
        with Presence.open(files.map, len(starts) - 1) as presence:
            missing = presence.missing(range(len(starts) - 1))
            return starts[-1] - sum(starts[frame + 1] - starts[frame] for frame in missing)
    return 0


def _size(path: Path) -> int:
    try:
        return os.stat(path).st_blocks * 512
    except FileNotFoundError:
        return 0
