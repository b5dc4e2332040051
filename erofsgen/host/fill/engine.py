"""The fill engine: a range of a pack in, a future out; verified bytes land in the pack's :class:`Target`.

It knows nothing of planes, mounts or stores. Worker threads take work from the schedule (:mod:`.schedule`): they read
neighbouring frames in one ranged read from the first tier that has them, then open each frame (decompress, check length
and BLAKE3), and only then does the target see its bytes. zstd, BLAKE3, reading and writing let go of the GIL, so a few
threads keep all cores busy.

A bad frame, by itself, and a failed read, as a whole, go on to the next tier, in rounds (:mod:`.sources`). A read that
takes longer than ``patience`` while there is another tier is *overtaken*: its frames go on at once, another thread
takes the place of the stuck one, and whichever read brings a frame first has it.

One lock, over the schedule and the counters: not held while a source reads, a target writes, a future is settled or a
line is logged. The alarm's own lock may be taken under it.
"""

from __future__ import annotations

import heapq
import logging
import os
import threading
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Final, cast

from erofsgen.errors import (
    BusyError,
    ErofsgenError,
    FormatError,
    NotFoundError,
    RemoteError,
    StorageError,
    UsageError,
)
from erofsgen.host.fill.alarm import Alarm
from erofsgen.host.fill.counters import Counters, Stats
from erofsgen.host.fill.schedule import Frame, Priority, Read, Request, Schedule, State, Target
from erofsgen.host.fill.sources import Attempt, Source, StoreSource, Tiers, describe
from erofsgen.pack.reader import open_frame

__all__ = ["Engine", "Priority", "Source", "Stats", "StoreSource", "Target"]

_logger: Final = logging.getLogger(__name__)

_SLICE: Final = 256
"""Frames that a request adds at a time; in between others get the lock."""

_DONE: Final = Future[None]()
_DONE.set_result(None)

_Settled = list[tuple[Future[None], BaseException | None]]
"""Futures to settle when the lock is free."""


@dataclass(frozen=True, slots=True)
class _Bad:
    """A frame whose bytes are not what they should be."""

    error: FormatError


class Engine:
    """Fills targets from ``sources``, nearest first, with ``threads`` threads and ``memory`` bytes in flight.

    Every source is asked ``1 + retries`` times for what it fails to bring, with growing pauses from ``backoff`` seconds
    on; after ``patience`` seconds the next is asked as well. ``read_size``: bytes of a pack read at once at most, but
    for a larger frame. ``cores``: frames of the background opened at a time. Safe for threads, not for fork.
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
    ) -> None:
        self._tiers = Tiers(sources, retries=retries, backoff=backoff)
        cores = cores or len(os.sched_getaffinity(0))
        self._schedule = Schedule(self._tiers, threads=threads, memory=memory, read_size=read_size, cores=cores)
        self._patience = patience
        self._threads = threads
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._idle = 0  # workers that wait for work
        self._opened = threading.Condition(self._lock)
        self._forgetting = 0  # callers of forget() that wait for a frame to be opened
        self._closed = False
        self._counters = Counters()
        self._timed: set[Request] = set()
        self._reads: set[Read] = set()  # those that may be overtaken
        self._late = 0  # reads that were, and have not come back
        self._delayed: list[tuple[float, int, list[Frame]]] = []  # a heap: when, tie-breaker, what
        self._alarm = Alarm(self._ring, "fill-alarm")
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
            failed.set_exception(_as_ours(error, "the target failed"))
            return failed
        settled: _Settled = []
        for start in range(frames.start, frames.stop, _SLICE):
            part = range(start, min(start + _SLICE, frames.stop))
            with self._lock:
                if request.done:
                    break
                try:
                    self._add(target, part, request)
                except Exception as error:  # noqa: BLE001 - a target may raise anything
                    self._finish(request, _as_ours(error, f"{request.what}: the target failed"), settled)
                    break
                if part.stop == frames.stop:
                    self._arrived(request, settled)
        self._alarm.at(deadline)
        _settle(settled)
        return request.future

    def add_source(self, source: Source) -> None:
        """One more source, the farthest; a name that is among them changes nothing."""
        with self._lock:
            if source.name not in [known.name for known in self._tiers.sources]:
                self._tiers.add(source)

    def forget(self, target: Target) -> None:
        """Fail what is asked of ``target``, and return when nothing will call its ``write_frame`` any more.

        Before a target's descriptor is closed, this must have returned. Others may use the target's name again.
        """
        settled: _Settled = []
        with self._lock:
            states = set(State) - {State.OPENING}
            for frame in self._schedule.frames(*states, target=target):
                self._conclude(frame, BusyError(f"pack {target.name}: no longer in use"), settled)
            self._forgetting += 1
            while self._schedule.frames(State.OPENING, target=target):
                self._opened.wait()
            self._forgetting -= 1
            self._work.notify()
        _settle(settled)

    def close(self, timeout: float = 30.0) -> None:
        """Fail what has not been begun, finish what has, end all threads.

        What a source or a target holds for longer than ``timeout`` seconds fails too, and the thread ends when it is
        let go. Later requests fail, unless their range is there.
        """
        settled: _Settled = []
        with self._lock:
            self._closed = True
            self._delayed.clear()
            for frame in self._schedule.frames(State.QUEUED, State.WAITING):
                self._conclude(frame, _closed(), settled)
            self._work.notify_all()
            workers = self._workers - {threading.current_thread()}
        _settle(settled)
        until = time.monotonic() + timeout
        for worker in workers:
            worker.join(max(0.0, until - time.monotonic()))
        settled = []
        with self._lock:
            for frame in self._schedule.frames(*State):
                for request in frame.waiters:
                    self._finish(request, _closed(), settled)
        _settle(settled)
        self._alarm.stop()

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
            if isinstance(work, Read) and len(work.attempt.order) > 1:
                work.expires = time.monotonic() + self._patience
                self._reads.add(work)
                self._alarm.at(work.expires)
            # Whoever takes work wakes the next if there is more, so nobody has to know how much came free
            if self._idle and self._schedule.runnable():
                self._work.notify()
            return work

    def _read(self, read: Read) -> bool:
        """Carry out a read. False: another thread has taken this one's place."""
        source = self._tiers.sources[read.source]
        settled: _Settled = []
        data: memoryview | None = None
        error: BaseException | None = None
        try:
            data = memoryview(bytearray(read.length))
            source.read_into(f"sha256:{read.target.name}", read.offset, data)
        except BaseException as reason:  # noqa: BLE001 - a source may raise anything; the thread must live on
            error = reason
        with self._lock:
            self._reads.discard(read)
            self._late -= read.late
            if data is not None and error is None:
                self._tiers.brought(read.source, read.length)
                self._counters.read_done(read.length, len(read.frames))
                self._schedule.deliver(read, data)
            elif error is not None:
                if not read.late:
                    self._tiers.failed(read.source, error, read.target.name)
                self._go_on(self._schedule.failed(read), read.attempt, error, settled)
            data = None  # before another thread accounts for it as gone
            stay = len(self._workers) - self._late <= self._threads
            if not stay:
                self._work.notify()
        if error is not None:
            self._log(read, error)
        _settle(settled)
        return stay

    def _open(self, frame: Frame) -> None:
        """Check a frame's bytes and hand them to the target."""
        read = frame.read
        assert read is not None
        settled: _Settled = []
        result: int | _Bad | ErofsgenError
        try:
            result = _put(frame)
        except BaseException as error:  # noqa: BLE001 - a target may raise anything; the thread must live on
            result = _as_ours(error, f"pack {frame.target.name}: frame {frame.index} was not written")
        with self._lock:
            self._schedule.opened(frame)
            if isinstance(result, _Bad):
                self._tiers.bad(read.source)
                self._go_on([frame], read.attempt, result.error, settled)
            else:
                self._tiers.succeeded(read.source)
                if isinstance(result, int):
                    self._counters.frame_done(result)
                self._conclude(frame, None if isinstance(result, int) else result, settled)
            if self._forgetting:
                self._opened.notify_all()
        if isinstance(result, _Bad):
            self._log(read, result.error)
        _settle(settled)

    def _ring(self, now: float) -> float:
        """See to all that is due. Returns when something is next."""
        settled: _Settled = []
        slow = TimeoutError(f"no answer in {self._patience:g} s")
        with self._lock:
            while self._delayed and self._delayed[0][0] <= now:
                self._schedule.requeue(heapq.heappop(self._delayed)[2])
            overtaken = [read for read in self._reads if read.expires <= now]
            for read in overtaken:
                self._overtake(read, slow, settled)
            for request in [request for request in self._timed if request.deadline <= now]:
                self._counters.expired_requests += 1
                self._finish(request, RemoteError(f"{request.what} did not arrive in time"), settled)
            if self._idle and self._schedule.runnable():
                self._work.notify()
            times = [read.expires for read in self._reads]
            times += [request.deadline for request in self._timed]
            times += [self._delayed[0][0]] if self._delayed else []
            due = min(times, default=float("inf"))
        for read in overtaken:
            self._log(read, slow)
        _settle(settled)
        return due

    def _log(self, read: Read, error: BaseException) -> None:
        """Name the source that did not bring right bytes. That a tier lacks a blob is nothing to warn of."""
        level = logging.DEBUG if isinstance(error, NotFoundError) else logging.WARNING
        what = "" if str(error).startswith("pack ") else f"pack {read.target.name}: "
        _logger.log(level, "%s: %s%s", self._tiers.sources[read.source].name, what, describe(error))

    # ... and these with it

    def _start_worker(self) -> None:
        worker = threading.Thread(target=self._run, name=f"fill-{len(self._workers)}", daemon=True)
        self._workers.add(worker)
        worker.start()

    def _add(self, target: Target, frames: range, request: Request) -> None:
        if self._closed:
            raise _closed()
        if not self._tiers.sources:
            raise NotFoundError(f"pack {target.name}: no store is known that has it")
        if request.deadline < float("inf"):
            self._timed.add(request)
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

    def _go_on(self, frames: list[Frame], attempt: Attempt, error: BaseException, settled: _Settled) -> None:
        """Frames whose read or bytes failed go on to the next attempt, or are given up."""
        following = None if self._closed else self._tiers.after(attempt, error)
        wanted = []
        for frame in frames:
            if following is None:
                what = f"pack {frame.target.name}: frame {frame.index}"
                self._conclude(frame, self._tiers.error(attempt, error, what=what), settled)
            elif frame.wanted:
                wanted.append(frame)
                self._schedule.wait(frame, following[0])
            else:
                self._schedule.remove(frame)
        if following is None or not wanted:
            return
        self._counters.retries += 1
        if following[1]:
            when = time.monotonic() + following[1]
            heapq.heappush(self._delayed, (when, self._counters.retries, wanted))
            self._alarm.at(when)
        else:
            self._schedule.requeue(wanted)

    def _overtake(self, read: Read, error: TimeoutError, settled: _Settled) -> None:
        self._reads.discard(read)
        self._tiers.failed(read.source, error, read.target.name)
        self._counters.overtaken_reads += 1
        self._late += 1
        self._go_on(self._schedule.overtake(read), read.attempt, error, settled)
        if self._late <= self._threads and not self._closed:
            self._start_worker()

    def _conclude(self, frame: Frame, error: BaseException | None, settled: _Settled) -> None:
        """A frame is there, or given up."""
        self._schedule.remove(frame)
        for request in frame.waiters:
            if error is None:
                self._arrived(request, settled)
            else:
                self._finish(request, error, settled)

    def _arrived(self, request: Request, settled: _Settled) -> None:
        request.pending -= 1
        if not request.pending:
            self._finish(request, None, settled)

    def _finish(self, request: Request, error: BaseException | None, settled: _Settled) -> None:
        if request.done:
            return
        request.done = True
        self._timed.discard(request)
        settled.append((request.future, error))
        if error is not None:
            self._counters.failed_requests += 1
        elif request.priority is Priority.DEMAND:
            self._counters.demand_done(time.monotonic() - request.started)


def _put(frame: Frame) -> int | _Bad:
    """Verified bytes to the target: how many. A function of its own, so that no frame of a traceback has them."""
    target = frame.target
    stored = cast(bytes, frame.stored)  # a view serves as well, and spares a copy
    try:
        data = open_frame(stored, target.toc, frame.index, what=f"pack {target.name}")
    except FormatError as error:
        return _Bad(error)
    target.write_frame(frame.index, data)
    return len(data)


def _settle(settled: _Settled) -> None:
    for future, error in settled:
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)


def _closed() -> BusyError:
    return BusyError("the fill engine is closed")


def _as_ours(error: BaseException, what: str) -> ErofsgenError:
    """What a target raised, as an error of ours. Without the locals of its traceback, which hold a frame's bytes."""
    traceback.clear_frames(error.__traceback__)
    if isinstance(error, ErofsgenError):
        return error
    ours = StorageError(f"{what}: {describe(error)}")
    ours.__cause__ = error
    return ours
