"""Filling the host cache: all of a pack or an image, in one go, through a fill engine."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Final

from erofsgen.host import linux
from erofsgen.host.cache.cache import CachedImage, HostCache
from erofsgen.host.cache.packfile import PackFile
from erofsgen.host.cache.room import FRAME_COST
from erofsgen.host.config import load
from erofsgen.host.fill.chain import chain
from erofsgen.host.fill.engine import Engine, Priority, StoreSource
from erofsgen.progress import SILENT, Progress
from erofsgen.store.base import Store
from erofsgen.store.directory import DirectoryStore
from erofsgen.store.manifest import Pack

_LOOK: Final = 0.01
"""Seconds between two looks at a fill's progress."""


def fill(cache: HostCache, image: CachedImage, open_store: Callable[[], Store], progress: Progress = SILENT) -> None:
    """Bring all frames of an image, in this process, within :meth:`HostCache.filling`.

    The store is opened only if anything is missing from it: after a reboot all may be here. Raises IntegrityError and
    FormatError (the store's bytes are damaged), StorageError, the store's errors.
    """
    with ExitStack() as opened:
        packs = [(pack, cache.open_pack(pack)) for pack in image.packs]
        for _, file in packs:
            opened.callback(file.close)
            file.recover(file.presence.suspects())
        if all(file.presence.complete for _, file in packs):
            return
        store = open_store()
        # A store that can fail has its own retries; here a failure is the user's to see at once
        engine = opened.enter_context(Engine([*chain(load(), store.url)[:-1], StoreSource(store)], retries=0))
        for pack, file in packs:
            take_over(cache, pack, file, store)
        fill_packs(engine, [file for _, file in packs], progress)


def take_over(cache: HostCache, pack: Pack, file: PackFile, store: Store | None) -> None:
    """Let count what is here already: frames of another boot, and blobs that the file system can share."""
    file.recover(file.presence.suspects())
    if pack.raw and isinstance(store, DirectoryStore) and not file.presence.count():
        _share(cache, pack, file, store)


def _share(cache: HostCache, pack: Pack, file: PackFile, store: DirectoryStore) -> None:
    """Take a raw pack's bytes by reference where the file system can, and let those count that are right."""
    try:
        source = os.open(store.blob_path(pack.digest), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return  # reading it says what is wrong
    try:
        cache.room.reserve(pack.device_size + FRAME_COST * len(file.toc))
        linux.clone_file(source, file.descriptor)
        os.ftruncate(file.descriptor, pack.device_size)
    except OSError:
        cache.room.give_back(pack.device_size + FRAME_COST * len(file.toc))
        return
    finally:
        os.close(source)
    for frame in range(len(file.toc)):
        if file.is_right(frame):
            file.presence.mark_written(frame)


def fill_packs(engine: Engine, packs: Sequence[PackFile], progress: Progress) -> None:
    """Bring all that is missing of ``packs``. The first error is raised when all have come to an end."""
    missing = {file: file.missing(range(len(file.toc))) for file in packs}
    total = sum(int(file.toc.device_sizes[frames].sum()) for file, frames in missing.items() if frames)
    if not total:
        return
    with progress.task("packs", total) as task:
        before = done = engine.stats()["bytes_written"]
        futures = [
            engine.request(file, 0, file.toc.device_size, priority=Priority.PREFETCH)
            for file, frames in missing.items()
            if frames
        ]
        while not all(future.done() for future in futures):
            time.sleep(_LOOK)
            now = min(engine.stats()["bytes_written"], before + total)
            task.advance(now - done)
            done = now
        for future in futures:
            future.result()
        task.advance(before + total - done)
