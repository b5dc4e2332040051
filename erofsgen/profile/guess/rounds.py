"""Many tasks that read files, run in rounds: all that they wait for is read at once.

A task is a coroutine that awaits :meth:`Rounds.fetch`. Over a slow link a round costs one round trip, so the time is
that of the longest chain of dependent reads, not of their sum. There are no threads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Coroutine, Generator, Sequence
from typing import Any, Final, NamedTuple

from erofsgen.erofs.node import Node
from erofsgen.errors import ErofsgenError


class Piece(NamedTuple):
    """``length`` bytes of a regular file at ``offset``, all of them within it."""

    node: Node
    offset: int
    length: int


Read = Callable[[Sequence[Piece]], Sequence[bytes | None]]
"""Gives the bytes of each piece, None where they could not be had."""

BATCH: Final = 32 << 20
"""Bytes asked for in one call, roughly: what is in memory at once."""

TASKS: Final = 100_000
"""Tasks at most: more than any start reads files."""


class _Fetch:
    def __init__(self, piece: Piece) -> None:
        self.piece = piece

    def __await__(self) -> Generator[_Fetch, bytes | None, bytes | None]:
        return (yield self)


Task = Coroutine[Any, Any, None]


class Rounds:
    """``limit``: bytes that are read in all; what is wanted beyond them could not be had. One caller."""

    def __init__(self, read: Read, *, limit: int) -> None:
        self._read = read
        self._left = limit
        self._ready: deque[tuple[Task, bytes | None]] = deque()
        self._waiting: deque[tuple[Task, Piece]] = deque()
        self._tasks = 0
        self.count = 0
        """Calls of ``read`` so far."""

    def start(self, task: Task) -> None:
        """Have a task run by :meth:`run`. Errors raised on purpose end it silently: its file is not what it claims."""
        self._tasks += 1
        if self._tasks > TASKS:
            task.close()
        else:
            self._ready.append((task, None))

    async def fetch(self, node: Node, offset: int = 0, length: int | None = None) -> bytes | None:
        """Bytes of a regular file, fewer where it ends before; None where they could not be had."""
        length = max(min(node.size - offset, node.size if length is None else length), 0)
        if not length:
            return b""
        inline = node.inline()
        if inline is not None:
            return inline[offset : offset + length]
        if length > self._left:
            return None
        self._left -= length
        return await _Fetch(Piece(node, offset, length))

    def run(self) -> None:
        """Run all tasks to their ends. Raises what ``read`` raises."""
        while self._ready or self._waiting:
            while self._ready:
                self._step(*self._ready.popleft())
            self._round()

    def _step(self, task: Task, value: bytes | None) -> None:
        try:
            fetch = task.send(value)
        except (StopIteration, ErofsgenError):
            return
        self._waiting.append((task, fetch.piece))

    def _round(self) -> None:
        batch: list[tuple[Task, Piece]] = []
        size = 0
        while self._waiting and (not batch or size + self._waiting[0][1].length <= BATCH):
            batch.append(self._waiting.popleft())
            size += batch[-1][1].length
        if batch:
            self.count += 1
            found = self._read([piece for _, piece in batch])
            self._ready.extend((task, data) for (task, _), data in zip(batch, found, strict=True))
