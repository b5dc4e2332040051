"""All of an image in one file, for kernels that cannot mount files: index and device bytes behind one loop device."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from blake3 import blake3

from erofsgen.erofs.flatten import flatten
from erofsgen.erofs.tree import BLOCK
from erofsgen.host.cache.part import Part, settle
from erofsgen.host.cache.room import Room
from erofsgen.pack.reader import open_frame
from erofsgen.pack.toc import Toc
from erofsgen.progress import SILENT, Progress, Task
from erofsgen.store.base import Store
from erofsgen.store.image import Image, open_pack

_BATCH: Final = 4 << 20
"""Device bytes that a thread reads, checks and writes at a time; a larger frame is a batch of its own."""

_READERS: Final = 2
"""Threads per core: one may wait for the store or the disk while another decompresses."""


def write_flat(
    open_image: Callable[[], Image],
    path: Path,
    progress: Progress = SILENT,
    *,
    room: Room | None = None,
    threads: int | None = None,
) -> None:
    """Put all of an image into ``path``, unless it is there: only then is the image opened. It takes ``room``.

    Frames a crash left are used again if they are right.

    Raises IntegrityError and FormatError (the store's bytes are damaged), StorageError (the disk is full …), and what
    reading the store raises.
    """
    part = Part.open(path)
    if part is None:
        settle([path])
        return
    threads = threads or min(16, _READERS * len(os.sched_getaffinity(0)))
    with part, ExitStack() as undo:
        image = open_image()
        task = undo.enter_context(progress.task("packs", sum(pack.device_size for pack in image.packs)))
        fill = undo.enter_context(ThreadPoolExecutor(threads, "fill"))
        _ = image.index  # checks that its devices are the manifest's packs
        flat = flatten(image.index_bytes())
        if room is not None:
            room.reserve(flat.blocks * BLOCK)
        part.resize(flat.blocks * BLOCK)
        part.write(flat.index, 0)
        for pack, block in zip(image.packs, flat.starts, strict=True):
            toc = open_pack(image.store, pack).toc
            _Filler(image.store, pack.digest, toc, part, block * BLOCK, task, resume=part.found).run(fill)
        part.commit()


class _Filler:
    """Puts a pack's device bytes, every frame checked, into ``part`` at ``offset``.

    ``resume``: look first whether a frame is there already.
    """

    def __init__(
        self, store: Store, digest: str, toc: Toc, part: Part, offset: int, task: Task, *, resume: bool
    ) -> None:
        self._store = store
        self._digest = digest
        self._toc = toc
        self._part = part
        self._offset = offset
        self._task = task
        self._resume = resume

    def run(self, pool: ThreadPoolExecutor) -> None:
        """Fill, with all threads of ``pool``. The first error is raised when no thread is at work any more."""
        futures = [pool.submit(self._fill, first, end) for first, end in _batches(self._toc)]
        try:
            for future in futures:
                future.result()
        finally:
            for future in futures:
                future.cancel()
            wait(futures)

    def _fill(self, first: int, end: int) -> None:
        toc = self._toc
        length = int(toc.device_sizes[first:end].sum())
        while self._resume and first < end and self._is_right(first):
            first += 1
        if first < end:
            start = int(toc.offsets[first])
            stored = self._store.read(self._digest, start, int(toc.offsets[end - 1] + toc.sizes[end - 1]) - start)
            for frame in range(first, end):
                at = int(toc.offsets[frame]) - start
                piece = stored[at : at + int(toc.sizes[frame])]
                data = open_frame(piece, toc, frame, what=f"pack {self._digest}")
                self._part.write(data, self._offset + int(toc.device_offsets[frame]))
        self._task.advance(length)

    def _is_right(self, frame: int) -> bool:
        toc = self._toc
        offset = self._offset + int(toc.device_offsets[frame])
        return blake3(self._part.read(offset, int(toc.device_sizes[frame]))).digest() == toc.digest(frame)


def _batches(toc: Toc) -> Iterator[tuple[int, int]]:
    """Neighbouring frames, ``[first, end)``, of about ``_BATCH`` device bytes."""
    first = size = 0
    for frame, device_size in enumerate(toc.device_sizes.tolist()):
        if size and size + device_size > _BATCH:
            yield first, frame
            first, size = frame, 0
        size += device_size
    if size:
        yield first, len(toc)
