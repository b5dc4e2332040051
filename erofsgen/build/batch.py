"""Many images: keeps an executor busy, tries again what may pass, and goes on where one image cannot be built.

The state is in the store alone: whoever runs the same batch again goes on where it was interrupted, on this machine or
another.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Final, Protocol, Self

import msgspec

from erofsgen.build.job import Job, Outcome
from erofsgen.progress import SILENT, Progress, Task

PAUSE: Final = 1.0
"""Seconds before the second attempt at an image; doubled before each further one."""


class Executor(Protocol):
    """Where jobs run: it calls :func:`erofsgen.build.job.build_one`. For one thread.

    A context manager; leaving it ends whatever still runs.
    """

    @property
    def cores(self) -> int:
        """Processor cores that it may use."""

    def submit(self, job: Job, task: Task) -> None:
        """Start a job; ``task`` is told how far it is, if that is known."""

    def wait(self, timeout: float | None) -> list[tuple[Job, Outcome]]:
        """Jobs that have ended, whichever way. Waits at most ``timeout`` seconds, and may return early with none."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc: object) -> None: ...


def run_batch(
    jobs: Sequence[Job],
    executor: Executor,
    *,
    at_once: int,
    retries: int = 2,
    pause: float = PAUSE,
    fail_fast: bool = False,
    progress: Progress = SILENT,
) -> list[Outcome]:
    """Run ``jobs``, ``at_once`` of them at a time; their outcomes, in the same order.

    A failure that may pass is tried again ``retries`` times. With ``fail_fast``, nothing is started any more once an
    image has failed for good; jobs that were never started have no outcome.
    """
    outcomes: dict[str, Outcome] = {}
    attempts: Counter[str] = Counter()
    numbers = {job.name: number for number, job in enumerate(jobs, 1)}
    ready = deque(jobs)
    resting: list[tuple[float, Job]] = []
    stopping = False
    with ExitStack() as stack:
        running: dict[str, ExitStack] = {}
        while ready or resting or running:
            now = time.monotonic()
            ready.extend(job for due, job in resting if due <= now)
            resting = [(due, job) for due, job in resting if due > now]
            while ready and len(running) < at_once:
                job = ready.popleft()
                attempts[job.name] += 1
                shown = running[job.name] = stack.enter_context(ExitStack())
                label = f"{numbers[job.name]}/{len(jobs)} {job.image}"
                if attempts[job.name] > 1:
                    label += f", attempt {attempts[job.name]}"
                executor.submit(job, shown.enter_context(progress.task(label)))
            timeout = max(min(due for due, _ in resting) - time.monotonic(), 0) if resting else None
            if not running:
                time.sleep(timeout or 0)
                continue
            for job, outcome in executor.wait(timeout):
                running.pop(job.name).close()
                tried = attempts[job.name]
                outcomes[job.name] = msgspec.structs.replace(outcome, attempts=tried)
                if outcome.error is None:
                    continue
                if outcome.error.may_pass and tried <= retries and not stopping:
                    resting.append((time.monotonic() + pause * 2 ** (tried - 1), job))
                elif fail_fast:
                    stopping = True
                    ready.clear()
                    resting.clear()
    return [outcomes[job.name] for job in jobs if job.name in outcomes]
