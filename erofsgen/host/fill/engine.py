"""The fill engine: a range of a pack in, a future out; verified bytes land in the pack's :class:`Target`.

It knows nothing of planes, mounts or stores. Worker threads take work from the schedule (:mod:`.schedule`): they read
neighbouring frames in one ranged read from the first tier that has them, then open each frame (decompress, check length
and BLAKE3), and only then does the target see its bytes. zstd, BLAKE3, reading and writing let go of the GIL, so a few
threads keep all cores busy.

A bad frame, by itself, and a failed read, as a whole, go on to the next source, in rounds (:mod:`.tiers`). A demand
that takes longer than 95 of 100 is *hedged*: a thread that has nothing else to do asks for the same frames a second
time. A read that takes longer than its source's ``timeout`` while there is another source has failed and is
*overtaken*: its frames go on at once, and another thread takes the place of the stuck one. Either way whichever read
brings a frame first has it, and a frame is given up only when no read is on its way for it any more.

One lock, over the schedule and the counters: not held while a source reads, a target writes, a future is settled or a
line is logged. The alarm's own lock may be taken under it.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from typing import Final, NamedTuple

import numpy as np

from erofsgen.errors import BusyError, NotFoundError, UsageError
from erofsgen.host.fill.alarm import Alarm
from erofsgen.host.fill.counters import Counters, Stats
from erofsgen.host.fill.course import Course
from erofsgen.host.fill.opening import Bad, as_ours, put
from erofsgen.host.fill.prober import Prober
from erofsgen.host.fill.requests import Requests, Settled, settle
from erofsgen.host.fill.schedule import Schedule
from erofsgen.host.fill.sources import Source, StoreSource, describe
from erofsgen.host.fill.tiers import Tiers
from erofsgen.host.fill.work import Frame, Priority, Read, Request, State, Target

__all__ = ["Engine", "Priority", "Source", "Stats", "StoreSource", "Target"]

_logger: Final = logging.getLogger(__name__)

_SLICE: Final = 256
"""Frames that a request adds at a time; in between others get the lock."""

_DONE: Final = Future[None]()
_DONE.set_result(None)


Brought = Callable[[Target, int, str, Priority], None]
"""Told, in the engine's threads, of each frame that a target took: its number, the source's name, how urgent it was."""


class Gap(NamedTuple):
    """A pack that a source lacks, and another brought frames of."""

    lacking: Source
    pack: str
    brought_by: Source


class Engine:
    """Fills targets from ``sources``, nearest first, with ``threads`` threads and ``memory`` bytes in flight.

    Every source is asked ``1 + retries`` times for what it fails to bring, with growing pauses from ``backoff`` seconds
    on; after ``patience`` seconds, unless it says otherwise, the next is asked as well. ``read_size``: bytes of a pack
    read at once at most, but for a larger frame. ``cores``: frames of the background opened at a time. ``brought`` is
    called for each frame. Safe for threads, not for fork.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        threads: int = 8,
        memory: int = 128 << 20,
        retries: int = 2,
        backoff: float = 0.1,
        patience: float = 10.0,
        read_size: int = 8 << 20,
        cores: int | None = None,
        brought: Brought | None = None,
    ) -> None:
        self._brought = brought
        self._tiers = Tiers(sources, retries=retries, backoff=backoff)
        cores = cores or len(os.sched_getaffinity(0))
        self._schedule = Schedule(self._tiers, threads=threads, memory=memory, read_size=read_size, cores=cores)
        self._threads = threads
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._idle = 0  # workers that wait for work
        self._opened = threading.Condition(self._lock)
        self._forgetting = 0  # callers of forget() that wait for a frame to be opened
        self._closed = False
        self._counters = Counters()
        self._requests = Requests(self._counters)
        self._course = Course(self._tiers, self._schedule, self._requests, self._counters, patience)
        self._late = 0  # reads that were overtaken, and have not come back
        self._alarm = Alarm(self._ring, "fill-alarm")
        self._prober = Prober(self._tiers, self._lock)
        self._workers: set[threading.Thread] = set()
        with self._lock:
            for _ in range(threads):
                self._start_worker()

    def request(
        self,
        target: Target,
        offset: int,
        length: int,
        *,
        priority: Priority = Priority.DEMAND,
        deadline: float | None = None,
    ) -> Future[None]:
        """Get device bytes ``[offset, offset + length)`` into ``target``; what lies outside the device is left out.

        The future is done when all their frames were written. It has an ErofsgenError when one could not be got or
        written, or not by ``deadline``, a time of ``time.monotonic`` (what was begun goes on). It cannot be cancelled.
        Its callbacks run in the engine's threads and must not wait for the engine.
        """
        try:
            if offset < 0 or length < 0:
                raise UsageError(f"pack {target.name}: bytes {offset}+{length} are no range")
            toc = target.toc
            frames = toc.frames(offset, min(length, toc.device_size - offset))
            if not frames or target.ready(frames[0], frames[-1]):
                return _DONE
            what = f"pack {target.name}: bytes {offset}+{length}"
            deadline = float("inf") if deadline is None else deadline
            request = Request(what, priority, time.monotonic(), deadline)
        except Exception as error:  # noqa: BLE001 - a target may raise anything
            failed = Future[None]()
            failed.set_exception(as_ours(error, "the target failed"))
            return failed
        settled: Settled = []
        for start in range(frames.start, frames.stop, _SLICE):
            part = range(start, min(start + _SLICE, frames.stop))
            with self._lock:
                if request.done:
                    break
                try:
                    self._add(target, part, request)
                except Exception as error:  # noqa: BLE001 - a target may raise anything
                    self._requests.finish(request, as_ours(error, f"{request.what}: the target failed"), settled)
                    break
                if part.stop == frames.stop:
                    self._requests.arrived(request, settled)
        self._alarm.at(deadline)
        settle(settled)
        return request.future

    def add_source(self, source: Source, packs: Collection[str] | None = None) -> None:
        """One more source, for these packs or for all; where its name is known, that one is asked for them as well."""
        with self._lock:
            self._tiers.add(source, packs)

    def source(self, name: str) -> Source:
        """One of its sources."""
        with self._lock:
            return next(source for source in self._tiers.sources if source.name == name)

    def open_sources(self) -> None:
        """Have sources be ready that are opened when they are read first. What fails is told by reads."""
        with self._lock:
            sources = list(self._tiers.sources)
        for source in sources:
            source.ready()

    def gaps(self) -> list[Gap]:
        """Packs that sources were found to lack and others to have since this was last asked; each once for ever."""
        with self._lock:
            sources = self._tiers.sources
            return [Gap(sources[gap.source], gap.pack, sources[gap.brought_by]) for gap in self._tiers.gaps()]

    def fed(self, source: Source, pack: str) -> None:
        """A source has a pack now that it lacked."""
        with self._lock:
            self._tiers.closed_gap(self._tiers.sources.index(source), pack)

    def forget(self, target: Target) -> None:
        """Fail what is asked of ``target``, and return when nothing will call its ``write_frame`` any more.

        Before a target's descriptor is closed, this must have returned. Others may use the target's name again.
        """
        settled: Settled = []
        with self._lock:
            states = set(State) - {State.OPENING}
            for frame in self._schedule.frames(*states, target=target):
                self._course.conclude(frame, BusyError(f"pack {target.name}: no longer in use"), settled)
            self._forgetting += 1
            while self._schedule.frames(State.OPENING, target=target):
                self._opened.wait()
            self._forgetting -= 1
            self._work.notify()
        settle(settled)

    def close(self, timeout: float = 30.0) -> None:
        """Fail what has not been begun, finish what has, end all threads.

        What a source or a target holds for longer than ``timeout`` seconds fails too, and the thread ends when it is
        let go. Later requests fail, unless their range is there.
        """
        settled: Settled = []
        with self._lock:
            self._closed = True
            self._course.close()
            for frame in self._schedule.frames(State.QUEUED, State.WAITING):
                self._course.conclude(frame, _closed(), settled)
            self._work.notify_all()
            workers = self._workers - {threading.current_thread()}
        settle(settled)
        until = time.monotonic() + timeout
        for worker in workers:
            worker.join(max(0.0, until - time.monotonic()))
        settled = []
        with self._lock:
            for frame in self._schedule.frames(*State):
                for request in frame.waiters:
                    self._requests.finish(request, _closed(), settled)
        settle(settled)
        self._alarm.stop()
        for source in self._tiers.sources:
            source.close()
        self._prober.stop()

    def waiting(self, priority: Priority) -> int:
        """Frames of this priority that are not on their way yet."""
        return self._schedule.lengths[priority]

    def stats(self) -> Stats:
        """What the engine has done and is doing."""
        with self._lock:
            return self._counters.stats(self._schedule, self._tiers, threads=len(self._workers))

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # Workers: these run without the lock ...

    def _run(self) -> None:
        while (work := self._take()) is not None:
            if isinstance(work, Frame):
                self._open(work)
            elif not self._read(work):
                break
            del work  # it holds on to bytes
        with self._lock:
            self._workers.discard(threading.current_thread())

    def _take(self) -> Read | Frame | None:
        with self._lock:
            while (work := self._schedule.take()) is None:
                if self._closed:
                    return None
                self._idle += 1
                self._work.wait()
                self._idle -= 1
            if isinstance(work, Read):
                self._alarm.at(self._course.begin(work))
            # Whoever takes work wakes the next if there is more, so nobody has to know how much came free
            if self._idle and self._schedule.runnable():
                self._work.notify()
            return work

    def _read(self, read: Read) -> bool:
        """Carry out a read. False: another thread has taken this one's place."""
        source = self._tiers.sources[read.source]
        settled: Settled = []
        data: memoryview | None = None
        error: BaseException | None = None
        try:
            data = np.empty(read.length, np.uint8).data  # a bytearray would be cleared first
            source.read_into(f"sha256:{read.target.name}", read.offset, data)
        except BaseException as reason:  # noqa: BLE001 - a source may raise anything; the thread must live on
            error = reason
        with self._lock:
            self._late -= read.late
            if data is not None and error is None:
                self._course.brought(read, data)
            elif error is not None:
                self._course.failed(read, error, settled)
                self._set_clocks()
            data = None  # before another thread accounts for it as gone
            stay = len(self._workers) - self._late <= self._threads
            if not stay:
                self._work.notify()
        if error is not None:
            self._log(read, error)
        settle(settled)
        return stay

    def _open(self, frame: Frame) -> None:
        """Check a frame's bytes and hand them to the target."""
        read = frame.read
        assert read is not None
        settled: Settled = []
        result = put(frame)
        if self._brought is not None and isinstance(result, int):
            self._brought(frame.target, frame.index, self._tiers.sources[read.source].name, frame.priority)
        with self._lock:
            self._course.opened(frame, read, result, settled)
            if isinstance(result, Bad):
                self._set_clocks()
            if self._forgetting:
                self._opened.notify_all()
        if isinstance(result, Bad):
            self._log(read, result.error, frame.index)
        settle(settled)

    def _ring(self, now: float) -> float:
        """See to all that is due. Returns when something is next."""
        settled: Settled = []
        with self._lock:
            overtaken, due = self._course.look(now, settled, idle=self._idle > 0)
            for _ in overtaken:
                self._late += 1
                if self._late <= self._threads and not self._closed:
                    self._start_worker()
            if overtaken:
                self._set_clocks()
            due = min(due, self._requests.expire(now, settled))
            if self._idle and self._schedule.runnable():
                self._work.notify()
        for read, slow in overtaken:
            self._log(read, slow)
        settle(settled)
        return due

    def _log(self, read: Read, error: BaseException, frame: int | None = None) -> None:
        """Name the source that did not bring right bytes. That a tier lacks a blob is nothing to warn of."""
        level = logging.DEBUG if isinstance(error, NotFoundError) else logging.WARNING
        what = "" if str(error).startswith("pack ") else f"pack {read.target.name}: "
        source, pack = self._tiers.sources[read.source].name, read.target.name
        _logger.log(
            level, "%s: %s%s", source, what, describe(error),
            extra={"source": source, "pack": pack, "frame": frame, "error": type(error).__name__},
        )  # fmt: skip

    # ... and these with it

    def _set_clocks(self) -> None:
        """Something failed: its frames may have to wait, and its source to rest."""
        self._alarm.at(self._course.due())
        self._prober.look()

    def _start_worker(self) -> None:
        worker = threading.Thread(target=self._run, name=f"fill-{len(self._workers)}", daemon=True)
        self._workers.add(worker)
        worker.start()

    def _add(self, target: Target, frames: range, request: Request) -> None:
        if self._closed:
            raise _closed()
        if not self._tiers.chain(target.name):
            raise NotFoundError(f"pack {target.name}: no store is known that has it")
        self._requests.begin(request)
        schedule = self._schedule
        missing = target.missing(frames)  # under the lock: what is not on its way now is either there or to be added
        for index in missing:
            frame = schedule.find(target, index)
            if frame is None:
                frame = schedule.add(target, index, request.priority)
            else:
                self._counters.single_flight_hits += 1
                schedule.promote(frame, request.priority)
            frame.waiters.append(request)
        request.pending += len(missing)
        if missing and self._idle:
            self._work.notify()


def _closed() -> BusyError:
    return BusyError("the fill engine is closed")
