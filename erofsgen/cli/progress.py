"""Draws progress on standard error: bars on a terminal, a line per task elsewhere.

Work calls ``advance`` once per file, from several threads, so the tasks only count; the drawing thread of rich, or a
clock, picks the count up.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, TextIO

from erofsgen.cli.output import one_line, size
from erofsgen.progress import SILENT, Progress, Task

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

_DRAW_INTERVAL: Final = 0.2
_LINE_INTERVAL: Final = 10.0
"""Seconds between two looks at a task's count: bars, lines."""


@contextmanager
def reporter(stream: TextIO | None, *, quiet: bool) -> Iterator[Progress]:
    """A :class:`Progress` that draws on ``stream`` until the context is left."""
    if quiet or stream is None:
        yield SILENT
    elif stream.isatty():
        bars = _Bars(stream)
        try:
            yield bars
        finally:
            bars.close()
    else:
        yield _Lines(stream)


class _Counter:
    """A task: counts, and calls ``show`` every ``interval`` seconds."""

    def __init__(self, interval: float) -> None:
        self._lock = threading.Lock()
        self._interval = interval
        self._next = time.monotonic() + interval
        self.done = 0

    def advance(self, amount: int) -> None:
        with self._lock:
            self.done += amount
            now = time.monotonic()
            due = now >= self._next
            if due:
                self._next = now + self._interval
        if due:
            self.show()

    def show(self) -> None:
        raise NotImplementedError


class _Lines:
    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    @contextmanager
    def task(self, label: str, total: int | None = None) -> Iterator[Task]:
        _write(self._stream, label)
        yield _LineTask(self._stream, label, total)


class _LineTask(_Counter):
    def __init__(self, stream: TextIO, label: str, total: int | None) -> None:
        super().__init__(_LINE_INTERVAL)
        self._stream = stream
        self._label = label
        self._total = total

    def show(self) -> None:
        done = f"{100 * self.done // self._total} %" if self._total else size(self.done)
        _write(self._stream, f"{self._label}: {done}")


def _write(stream: TextIO, text: str) -> None:
    try:
        stream.write(f"erofsgen: {one_line(text)}\n")
        stream.flush()
    except OSError:
        pass  # progress nobody can see is no reason to stop


class _Bars:
    """Bars appear when the first task opens, which is when rich is imported, and go when the work is done."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        self._rich: RichProgress | None = None

    @contextmanager
    def task(self, label: str, total: int | None = None) -> Iterator[Task]:
        rich = self._start()
        identity = rich.add_task(one_line(label), total=total, amount="")
        try:
            yield _Bar(rich, identity, total)
        finally:
            rich.remove_task(identity)

    def _start(self) -> RichProgress:
        with self._lock:
            if self._rich is None:
                from rich.console import Console
                from rich.progress import BarColumn, TextColumn
                from rich.progress import Progress as RichProgress

                self._rich = RichProgress(
                    TextColumn("{task.description}", markup=False),
                    BarColumn(bar_width=24),
                    TextColumn("{task.fields[amount]}", markup=False),
                    console=Console(file=self._stream),
                    refresh_per_second=1 / _DRAW_INTERVAL,
                    transient=True,
                    redirect_stdout=False,
                    redirect_stderr=False,
                )
                self._rich.start()
            return self._rich

    def close(self) -> None:
        """Take the bars away."""
        if self._rich is not None:
            self._rich.stop()


class _Bar(_Counter):
    def __init__(self, rich: RichProgress, identity: TaskID, total: int | None) -> None:
        super().__init__(_DRAW_INTERVAL)
        self._rich = rich
        self._identity = identity
        self._of = f" of {size(total)}" if total else ""
        self._started = time.monotonic()

    def show(self) -> None:
        rate = size(int(self.done / max(time.monotonic() - self._started, 0.001)))
        self._rich.update(self._identity, completed=self.done, amount=f"{size(self.done)}{self._of}, {rate}/s")
