"""Runs jobs in processes on this machine.

Every worker has a pipe of its own: jobs go in; bytes done (numbers) and outcomes come out. A worker that dies, whoever
killed it, takes only its own job along and is replaced; a queue that several workers share could stay locked by a dead
one. Workers are started afresh, not forked: threads and open databases of this process stay out of them.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import connection, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Final, NamedTuple, NoReturn, Self

from erofsgen.build.job import MEMORY_HINT, Failure, Job, Outcome, build_one
from erofsgen.errors import ErofsgenError
from erofsgen.progress import Task

_TELL_INTERVAL: Final = 0.2
"""Seconds between two numbers that a worker sends."""
_GRACE: Final = 10.0
"""Seconds a worker has to drop its temporary files when it is told to end."""


class _Worker(NamedTuple):
    process: SpawnProcess
    pipe: Connection


class _Running(NamedTuple):
    worker: _Worker
    job: Job
    task: Task


class ProcessPool:
    """An :class:`~erofsgen.build.batch.Executor` that starts a process per job that runs at the same time."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._idle: list[_Worker] = []
        self._running: dict[Connection, _Running] = {}

    @property
    def cores(self) -> int:
        return len(os.sched_getaffinity(0))

    def submit(self, job: Job, task: Task) -> None:
        worker = self._worker()
        with suppress(OSError):  # it is gone: wait() will find out
            worker.pipe.send(job)
        self._running[worker.pipe] = _Running(worker, job, task)

    def wait(self, timeout: float | None) -> list[tuple[Job, Outcome]]:
        ended = []
        for pipe in connection.wait(list(self._running), timeout):
            assert isinstance(pipe, Connection)
            worker, job, task = self._running[pipe]
            try:
                message: int | Outcome = pipe.recv()
            except (EOFError, OSError):
                message = Outcome(job.image, job.name, "failed", error=_died(worker.process))
                pipe.close()
            else:
                if isinstance(message, int):
                    task.advance(message)
                    continue
                self._idle.append(worker)
            del self._running[pipe]
            ended.append((job, message))
        return ended

    def _worker(self) -> _Worker:
        while self._idle:
            worker = self._idle.pop()
            if worker.process.is_alive():
                return worker
            worker.pipe.close()
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_work, args=(theirs,), daemon=True)
        # Ctrl-C reaches every process of a terminal; what it means to workers is for this one to say.
        resource_tracker.ensure_running()  # starting it would unblock the signal again
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        return _Worker(process, ours)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        workers = [*self._idle, *(running.worker for running in self._running.values())]
        for worker in workers:
            worker.process.terminate()
        deadline = time.monotonic() + _GRACE
        for worker in workers:
            worker.process.join(max(deadline - time.monotonic(), 0))
            worker.process.kill()
            worker.process.join()
            worker.pipe.close()


def _died(process: SpawnProcess) -> Failure:
    process.join()
    code = process.exitcode or 0
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return Failure(f"the worker process died: {how}", MEMORY_HINT, ErofsgenError.exit_code, may_pass=True)


# --- in the worker ---------------------------------------------------------------------------------------------------


def _work(pipe: Connection) -> None:
    signal.signal(signal.SIGTERM, _end)
    teller = _Teller(pipe)
    with suppress(EOFError, OSError):  # nobody is there any more
        while True:
            teller.send(build_one(pipe.recv(), teller))


def _end(number: int, frame: object) -> NoReturn:  # noqa: ARG001  (a signal handler's arguments)
    raise SystemExit(128 + number)


class _Teller:
    """Progress that sends how many bytes are done. It is its own task: what they are done for is not told apart."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._lock = threading.Lock()
        self._done = 0
        self._next = 0.0

    @contextmanager
    def task(self, label: str, total: int | None = None) -> Iterator[Task]:  # noqa: ARG002  (the protocol's names)
        yield self

    def advance(self, amount: int) -> None:
        with self._lock:
            self._done += amount
            if time.monotonic() < self._next:
                return
            self._pipe.send(self._done)
            self._done = 0
            self._next = time.monotonic() + _TELL_INTERVAL

    def send(self, outcome: Outcome) -> None:
        """Tell what became of the job."""
        with self._lock:
            self._pipe.send(outcome)
            self._done = 0
