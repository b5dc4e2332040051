"""Writes a hot pack: chunks of an image in the order of first touch.

They are read as they lie, frame by frame, and written as they are touched. In between a nameless file has them: in the
order of touch, frames would be read again and again. Everything goes into one zstd pack, what does not compress, too,
so that a start is one range.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Self

import numpy as np
from blake3 import blake3

from erofsgen.build.imagechunks import ImageChunks, Integers
from erofsgen.build.options import BuildOptions
from erofsgen.build.packer import FRAME_SIZE, NewPack, Packer
from erofsgen.erofs.tree import BLOCK
from erofsgen.errors import StorageError
from erofsgen.progress import Progress
from erofsgen.store.base import Store

LIMIT: Final = 1 << 31
"""Device bytes of a hot pack at most: it is one pack."""


def write_hot_pack(
    store: Store, chunks: ImageChunks, order: Integers, options: BuildOptions, progress: Progress
) -> NewPack:
    """Write the chunks of the numbers ``order`` into one zstd pack, in that order; returns it.

    Raises IntegrityError and FormatError (the image is damaged), StorageError, RemoteError.
    """
    chunk_size = chunks.tree.chunk_size or BLOCK
    ends = np.cumsum(chunks.lengths[order])
    starts = np.zeros(len(chunks), np.int64)
    starts[order] = ends - chunks.lengths[order]
    total = int(ends[-1])
    with (
        _Spool(store.scratch) as spool,
        Packer(
            store,
            level=options.compression_level,
            threads=options.worker_threads,
            pack_size=LIMIT,
            frame_size=max(chunk_size, FRAME_SIZE),
        ) as packer,
    ):
        with progress.task("read hot chunks", total) as task:
            chunks.read(order, lambda number, chunk: spool.put(int(starts[number]), chunk), task)
        with progress.task("write hot pack", total) as task:
            for number in order.tolist():
                chunk = spool.get(int(starts[number]), int(chunks.lengths[number]))
                # who extracts knows zeros by the digest of their frame
                alone = len(chunk) == chunk_size and not chunk[0] and chunk.count(0) == chunk_size
                packer.add(chunk, blake3(chunk).digest(), raw=False, alone=alone)
                task.advance(len(chunk))
        (pack,) = packer.flush()
    return pack


class _Spool:
    """A nameless file in ``directory``. Threads may share it. Raises StorageError."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def put(self, offset: int, data: bytes) -> None:
        with self._storage():
            done = 0
            while done < len(data):
                done += os.pwrite(self._file.fileno(), data[done:], offset + done)

    def get(self, offset: int, length: int) -> bytes:
        with self._storage():
            return os.pread(self._file.fileno(), length, offset)

    def __enter__(self) -> Self:
        with self._storage():
            self._directory.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=self._directory)
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()

    @contextmanager
    def _storage(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            hint = "free some space there, or set XDG_CACHE_HOME to another directory"
            raise StorageError(f"{self._directory}: {error.strerror}", hint=hint) from error
