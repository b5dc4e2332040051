"""How long-running work says how far it is. The library calls; the command line draws."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Task(Protocol):
    """One running piece of work with a known or unknown total."""

    def advance(self, amount: int) -> None:
        """``amount`` more is done, in the unit of the task's total (bytes unless the label says otherwise)."""


class Progress(Protocol):
    """Where tasks are shown. Threads may call it at the same time."""

    def task(self, label: str, total: int | None = None) -> AbstractContextManager[Task]:
        """A context manager that shows ``label`` while it is open and yields the :class:`Task`."""


class _Silent:
    def advance(self, amount: int) -> None:
        pass

    @contextmanager
    def task(self, label: str, total: int | None = None) -> Iterator[Task]:  # noqa: ARG002  (the protocol's names)
        yield self


SILENT: Progress = _Silent()
"""Shows nothing."""
