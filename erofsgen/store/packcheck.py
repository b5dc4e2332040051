"""Checks one pack completely, in one pass over its stored bytes."""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt
from blake3 import blake3

from erofsgen.errors import FormatError
from erofsgen.pack import format as fmt
from erofsgen.pack.reader import open_frame
from erofsgen.pack.toc import Toc, read_dictionary
from erofsgen.progress import Task
from erofsgen.store.base import Store
from erofsgen.store.manifest import Pack

_PIECE: Final = 4 << 20
_PROBLEMS: Final = 16
"""Damaged frames and chunks that are described one by one; the rest is counted."""


class PackReport(msgspec.Struct):
    """What was found in a pack: ``problems`` as lines without the pack's name, ``damaged`` device ranges as (offset,
    length) in bytes, and how much was checked."""

    problems: list[str] = []
    damaged: list[tuple[int, int]] = []
    frames: int = 0
    chunks: int = 0
    bytes: int = 0


def check_pack(store: Store, pack: Pack, task: Task) -> PackReport:
    """Check size, SHA-256, TOC, every frame and the chunk dictionary; ``task`` advances by stored bytes.

    Raises StorageError or RemoteError where the store itself fails.
    """
    report = PackReport()
    size = store.size(pack.digest)
    if size is None:
        report.problems.append("pack is missing")
        report.damaged.append((0, pack.device_size))
        return report
    if size != pack.size:
        report.problems.append(f"pack is {size} bytes, the manifest says {pack.size}")
    _PackCheck(store, pack, task, report).run(size)
    return report


class _PackCheck:
    def __init__(self, store: Store, pack: Pack, task: Task, report: PackReport) -> None:
        self._store = store
        self._pack = pack
        self._task = task
        self._report = report
        self._hash = hashlib.sha256()
        self._extra = 0

    def run(self, size: int) -> None:
        toc = self._toc(size)
        position = 0
        if toc is None:
            self._report.damaged.append((0, self._pack.device_size))
        else:
            chunks = self._dictionary(toc)
            starts = [] if chunks is None else (chunks["block"].astype(np.int64) * fmt.BLOCK).tolist()
            for frame in range(len(toc)):
                position += int(toc.sizes[frame])
                self._frame(toc, frame, chunks, starts, readable=position <= size)
        for start in range(min(position, size), size, _PIECE):
            self._take(start, min(_PIECE, size - start))
        if self._hash.hexdigest() != self._pack.hex:
            self._report.problems.append("pack differs from its digest")
        if self._extra:
            self._report.problems.append(f"and {self._extra} more damaged frames or chunks")

    def _take(self, offset: int, length: int) -> bytes:
        data = self._store.read(self._pack.digest, offset, length)
        self._hash.update(data)
        self._report.bytes += length
        self._task.advance(length)
        return data

    def _toc(self, size: int) -> Toc | None:
        where, pack = self._pack.toc, self._pack
        if where.offset + where.size > size:
            self._report.problems.append("table of contents is missing")
            return None
        try:
            toc = Toc(self._store.read(pack.digest, where.offset, where.size), where, what="pack")
        except FormatError as error:
            self._report.problems.append(str(error).removeprefix("pack: "))
            return None
        if (toc.raw, toc.device_size) != (pack.raw, pack.device_size):
            self._report.problems.append("table of contents contradicts the manifest")
            return None
        return toc

    def _dictionary(self, toc: Toc) -> npt.NDArray[np.void] | None:
        """The chunk dictionary, if it is usable: in device order, chunks apart from each other."""

        def read(offset: int, length: int) -> bytes:
            return self._store.read(self._pack.digest, offset, length)

        try:
            chunks = read_dictionary(read, toc, what="pack")
        except FormatError as error:
            self._report.problems.append(str(error).removeprefix("pack: "))
            return None
        starts = chunks["block"].astype(np.int64) * fmt.BLOCK
        if len(chunks) and (starts[1:] < starts[:-1] + chunks["length"][:-1]).any():
            self._report.problems.append("chunk dictionary is not in device order, or chunks overlap")
            return None
        return chunks

    def _frame(
        self, toc: Toc, frame: int, chunks: npt.NDArray[np.void] | None, starts: list[int], *, readable: bool
    ) -> None:
        report = self._report
        start, length = int(toc.device_offsets[frame]), int(toc.device_sizes[frame])
        report.frames += 1
        try:
            if not readable:
                raise FormatError(f"frame {frame} is missing")
            data = open_frame(self._take(int(toc.offsets[frame]), int(toc.sizes[frame])), toc, frame, what="pack")
        except FormatError as error:
            stored = f"stored bytes {int(toc.offsets[frame])}+{int(toc.sizes[frame])}"
            self._damage(f"{str(error).removeprefix('pack: ')} ({stored}, device bytes {start}+{length})")
            report.damaged.append((start, length))
            return
        if chunks is None:
            return
        first, last = bisect_left(starts, start), bisect_left(starts, start + length)
        for number in range(first, last):
            report.chunks += 1
            inside, size = starts[number] - start, int(chunks["length"][number])
            if inside + size > length:
                self._damage(f"chunk {number} of the dictionary crosses the end of frame {frame}")
                continue
            whole = not inside and size == length  # its digest has just been checked as the frame's
            digest = toc.digest(frame) if whole else blake3(memoryview(data)[inside : inside + size]).digest()
            if digest != chunks["digest"][number].tobytes():
                self._damage(f"chunk {number} differs from the chunk dictionary (device bytes {starts[number]}+{size})")

    def _damage(self, what: str) -> None:
        if len(self._report.problems) < _PROBLEMS:
            self._report.problems.append(what)
        else:
            self._extra += 1
