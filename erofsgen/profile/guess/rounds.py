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
    def __init__(self, pieces: list[Piece]) -> None:
        self.pieces = pieces

    def __await__(self) -> Generator[_Fetch, list[bytes | None], list[bytes | None]]:
        return (yield self)


Task = Coroutine[Any, Any, None]


class Rounds:
    """``limit``: bytes that are read in all; what is wanted beyond them could not be had. One caller."""

    def __init__(self, read: Read, *, limit: int) -> None:
        self._read = read
        self._left = limit
        self._ready: deque[tuple[Task, list[bytes | None]]] = deque()
        self._waiting: deque[tuple[Task, list[Piece]]] = deque()
        self._tasks = 0

    def start(self, task: Task) -> None:
        """Have a task run by :meth:`run`. Errors raised on purpose end it silently: its file is not what it claims."""
        self._tasks += 1
        if self._tasks > TASKS:
            task.close()
        else:
            self._ready.append((task, []))

    async def fetch(self, node: Node, offset: int = 0, length: int | None = None) -> bytes | None:
        """Bytes of a regular file, fewer where it ends before; None where they could not be had."""
        return (await self.fetch_all(node, [(offset, node.size if length is None else length)]))[0]

    async def fetch_all(self, node: Node, ranges: Sequence[tuple[int, int]]) -> list[bytes | None]:
        """:meth:`fetch` for several (offset, length) of one file, in one round."""
        inline = node.inline()
        pieces: list[Piece] = []
        found: list[bytes | None] = []
        missing: list[int] = []
        for number, (offset, length) in enumerate(ranges):
            length = max(min(length, node.size - offset), 0)
            if not length or inline is not None:
                found.append((inline or b"")[offset : offset + length])
                continue
            found.append(None)
            if offset >= 0 and length <= self._left:
                self._left -= length
                pieces.append(Piece(node, offset, length))
                missing.append(number)
        for number, data in zip(missing, await _Fetch(pieces) if pieces else [], strict=True):
            found[number] = data
        return found

    def run(self) -> None:
        """Run all tasks to their ends. Raises what ``read`` raises."""
        while self._ready or self._waiting:
            while self._ready:
                self._step(*self._ready.popleft())
            self._round()

    def _step(self, task: Task, value: list[bytes | None]) -> None:
        try:
            fetch = task.send(value or None)
        except (StopIteration, ErofsgenError):
            return
        self._waiting.append((task, fetch.pieces))

    def _round(self) -> None:
        batch: list[tuple[Task, list[Piece]]] = []
        size = 0
        while self._waiting and (not batch or size + _size(self._waiting[0][1]) <= BATCH):
            batch.append(self._waiting.popleft())
            size += _size(batch[-1][1])
        if batch:
            found = iter(self._read([piece for _, pieces in batch for piece in pieces]))
            self._ready.extend((task, [next(found) for _ in pieces]) for task, pieces in batch)


def _size(pieces: Sequence[Piece]) -> int:
    return sum(piece.length for piece in pieces)
