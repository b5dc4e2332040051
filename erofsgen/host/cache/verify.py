"""Are the frames that count still what their digests say? Disks forget, and what is mounted is not verified again.

Every frame is read from the disk, not from what the page cache has of it, by few threads of idle I/O priority. A bad
one is fetched again and overwritten in place: a reader gets its old bytes or its new ones, never a hole. One that
cannot be fetched counts no more, so that a lazy mount asks for it again; only where a complete pack is in use does it
stay, because nobody asks for frames of such a pack.
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from typing import Final, Literal

import msgspec

from erofsgen.errors import ErofsgenError
from erofsgen.host import linux
from erofsgen.host.cache.packfile import PackFile
from erofsgen.host.fill.engine import Engine, Priority
from erofsgen.progress import SILENT, Progress, Task
from erofsgen.store.manifest import Pack

_THREADS: Final = 2
"""Frames in memory at a time."""

Outcome = Literal["repaired", "absent", "bad"]


class BadFrame(msgspec.Struct, frozen=True):
    """A frame that was not what it should be; ``frame`` is None where the pack could not even be opened."""

    pack: str
    frame: int | None
    outcome: Outcome
    error: str | None = None


class Report(msgspec.Struct):
    """What was found, in numbers; sizes in bytes."""

    packs: int = 0
    frames: int = 0
    bytes: int = 0
    bad: list[BadFrame] = msgspec.field(default_factory=list)

    @property
    def repaired(self) -> bool:
        """Whether all that was bad is right again."""
        return all(bad.outcome == "repaired" for bad in self.bad)


def verify(
    packs: Sequence[Pack],
    open_pack: Callable[[Pack], AbstractContextManager[PackFile]],
    engine: Engine | None,
    progress: Progress = SILENT,
) -> Report:
    """Compare all frames of ``packs`` that count with their digests, and repair them from what ``engine`` reads.

    Packs are opened by ``open_pack``, one at a time. Without an engine nothing is changed. For who may write to packs.
    """
    report = Report()
    with (
        progress.task("verify", sum(pack.device_size for pack in packs)) as task,
        ThreadPoolExecutor(_THREADS, "verify", initializer=linux.idle_io) as pool,
    ):
        for pack in packs:
            try:
                with open_pack(pack) as file:
                    _verify_pack(file, engine, report, pool, task)
            except ErofsgenError as error:
                report.bad.append(BadFrame(pack.hex, None, "bad", str(error)))
            report.packs += 1
    return report


def _verify_pack(file: PackFile, engine: Engine | None, report: Report, pool: ThreadPoolExecutor, task: Task) -> None:
    complete = file.presence.complete
    frames = iter(range(len(file.toc)))
    lock = threading.Lock()  # over the iterator and the report
    bad: list[int] = []

    def look() -> None:
        while True:
            with lock:
                frame = next(frames, None)
            if frame is None:
                return
            size = int(file.toc.device_sizes[frame])
            if file.ready(frame, frame):
                right = _is_right(file, frame, size)
                with lock:
                    report.frames += 1
                    report.bytes += size
                    if not right:
                        bad.append(frame)
            task.advance(size)

    for future in [pool.submit(look) for _ in range(_THREADS)]:
        future.result()
    for frame in sorted(bad):
        report.bad.append(_treat(file, frame, engine, complete=complete))


def _is_right(file: PackFile, frame: int, size: int) -> bool:
    start = int(file.toc.device_offsets[frame])
    with suppress(OSError):  # then the page cache's bytes are compared
        os.posix_fadvise(file.descriptor, start, size, os.POSIX_FADV_DONTNEED)
    right = file.is_right(frame)
    with suppress(OSError):
        os.posix_fadvise(file.descriptor, start, size, os.POSIX_FADV_DONTNEED)
    return right


def _treat(file: PackFile, frame: int, engine: Engine | None, *, complete: bool) -> BadFrame:
    if engine is None:
        return BadFrame(file.name, frame, "bad")
    target = _Repair(file, [frame])
    try:
        start, size = int(file.toc.device_offsets[frame]), int(file.toc.device_sizes[frame])
        engine.request(target, start, size, priority=Priority.SCRUB).result()
        return BadFrame(file.name, frame, "repaired")
    except ErofsgenError as error:
        outcome: Outcome = "absent" if _give_up(file, frame, complete=complete) else "bad"
        return BadFrame(file.name, frame, outcome, str(error))
    finally:
        engine.forget(target)


def _give_up(file: PackFile, frame: int, *, complete: bool) -> bool:
    """Let a frame count no more. Its room is given back where nobody can be reading it."""
    try:
        fcntl.flock(file.presence.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        alone = False
    else:
        try:
            with linux.lease(file.descriptor) as alone:
                if alone:
                    file.evict([frame])
        finally:
            fcntl.flock(file.presence.fileno(), fcntl.LOCK_UN)
    if not alone and not complete:
        file.presence.mark_absent(frame)
    return alone or not complete


class _Repair:
    """A pack as a target that lacks its ``bad`` frames, and overwrites them."""

    def __init__(self, file: PackFile, bad: Collection[int]) -> None:
        self.name = file.name
        self.toc = file.toc
        self._file = file
        self._bad = set(bad)

    def ready(self, first: int, last: int) -> bool:
        return not self._bad.intersection(range(first, last + 1))

    def missing(self, frames: range) -> list[int]:
        return [frame for frame in frames if frame in self._bad]

    def write_frame(self, frame: int, data: bytes) -> None:
        self._file.overwrite(frame, data)
        self._bad.discard(frame)
