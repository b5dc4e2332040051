"""Brings a plan's frames through the fill engine, ahead of whoever reads.

Frames are asked for in their order, a *window* of bytes at a time, which doubles as bytes arrive: the first come soon,
and later reads are large. All are of the priority PREFETCH, so a demand never waits for one (see
:mod:`erofsgen.host.fill.schedule`); a demand for a frame that is on its way takes it along.

It ends when all have arrived, when its budget is spent, or when it is told to. What was asked for by then still comes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Final, Literal

from erofsgen.host.fill.engine import Engine
from erofsgen.host.fill.work import Priority, Target
from erofsgen.host.prefetch.plan import Run, Step, runs

_FIRST_WINDOW: Final = 8 << 20
_LARGEST_WINDOW: Final = 64 << 20

State = Literal["running", "done", "spent", "stopped"]


@dataclass(frozen=True)
class Budget:
    """What one start may have prefetched: device bytes, seconds from the mount, bytes a second; 0: no limit."""

    size: int = 0
    seconds: float = 0.0
    bandwidth: int = 0


class Replay:
    """The plan ``steps`` of the mount ``mount``. ``target`` gives a pack by its SHA-256. :meth:`run` does it."""

    def __init__(
        self, engine: Engine, mount: str, steps: Sequence[Step], target: Callable[[str], Target], budget: Budget
    ) -> None:
        self.mount = mount
        self.steps = list(steps)
        self.state: State = "running"
        self.asked: list[Step] = []
        """Those that were not there and were asked for, in order."""
        self.bytes = 0
        """Device bytes asked for."""
        self._engine = engine
        self._target = target
        self._budget = budget
        self._began = time.monotonic()
        self._changed = threading.Condition()
        self._outstanding = 0
        self._window = _FIRST_WINDOW
        self._arrived = 0  # bytes since the window grew

    @property
    def of(self) -> int:
        """Device bytes of the whole plan."""
        return sum(step.size for step in self.steps)

    def stop(self) -> None:
        """Ask for nothing more. From any thread."""
        with self._changed:
            if self.state == "running":
                self.state = "stopped"
            self._changed.notify_all()

    def run(self) -> None:
        """Until all that is asked for has arrived, or failed: errors are the readers' to meet."""
        waiting = [step for step in self.steps if not self._target(step.pack).ready(step.frame, step.frame)]
        at = 0
        while at < len(waiting) and self._may_go_on():
            batch = self._batch(waiting, at)
            at += len(batch)
            self.asked += batch
            sizes = {step[:2]: step.size for step in batch}
            for run in runs(batch):
                self._ask(run, sum(sizes[run.pack, frame] for frame in range(run.first, run.last + 1)))
        with self._changed:
            while self._outstanding and self.state != "stopped":
                self._changed.wait()
            if self.state == "running":
                self.state = "done"

    def _may_go_on(self) -> bool:
        """Wait until there is room in the window. False: to be stopped, or spent."""
        with self._changed:
            while self.state == "running":
                late = self._left()
                if late is not None and late <= 0:
                    self.state = "spent"
                elif self._outstanding > self._window // 2:
                    self._changed.wait(late)
                else:
                    pause = self._pause()
                    if pause <= 0:
                        return True
                    self._changed.wait(pause if late is None else min(pause, late))
            return False

    def _left(self) -> float | None:
        seconds = self._budget.seconds
        return self._began + seconds - time.monotonic() if seconds else None

    def _pause(self) -> float:
        """Seconds until the bandwidth allows for more."""
        if not self._budget.bandwidth:
            return 0.0
        return self._began + self.bytes / self._budget.bandwidth - time.monotonic()

    def _batch(self, steps: Sequence[Step], at: int) -> list[Step]:
        """The next steps that fit the window and the budget; one at least, but for the budget."""
        room = self._window - self._outstanding
        if self._budget.bandwidth:
            room = min(room, max(self._budget.bandwidth // 4, 1))
        batch: list[Step] = []
        for step in steps[at:]:
            if batch and step.size > room:
                break
            if self._budget.size and self.bytes + step.size > self._budget.size:
                self.state = "spent"
                break
            batch.append(step)
            room -= step.size
            self.bytes += step.size
        return batch

    def _ask(self, run: Run, size: int) -> None:
        target = self._target(run.pack)
        toc = target.toc
        start = int(toc.device_offsets[run.first])
        end = int(toc.device_offsets[run.last]) + int(toc.device_sizes[run.last])
        with self._changed:
            self._outstanding += size
        future = self._engine.request(target, start, end - start, priority=Priority.PREFETCH)
        future.add_done_callback(lambda ended: self._came(ended, size))

    def _came(self, ended: Future[None], size: int) -> None:
        with self._changed:
            self._outstanding -= size
            if ended.exception() is None:
                self._arrived += size
                if self._arrived >= self._window < _LARGEST_WINDOW:
                    self._window = min(2 * self._window, _LARGEST_WINDOW)
                    self._arrived = 0
            self._changed.notify_all()
