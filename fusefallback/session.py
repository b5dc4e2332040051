"""One FUSE session of pyfuse3: the process has no other.

pyfuse3 takes its tasks, locks and waiting from ``pyfuse3.trio``, which its own asyncio support replaces as well. Here
it is trio but for two things, each of which costs a turn of the event loop for every request: a lock that lets others
have a turn even when it is free, and a wait for a device that has something to read already.
"""

from __future__ import annotations

import errno
import logging
import select
import time
from collections import deque
from typing import Any, Final

import pyfuse3
import trio

from fusefallback.handshake import shake_hands
from fusefallback.tuning import Tuning

_logger: Final = logging.getLogger(__name__)

_TASKS: Final = 1024
"""Requests that are seen to at a time, each by a task; more than the kernel lets wait in the background."""
_SHARE: Final = 0.002
"""Seconds for which requests may follow one another before others have a turn: answers of the supervisor, threads."""


class Session:
    """Answers the mount that uses ``device`` with ``operations``.

    Made before anything is answered, and without threads: the process may still be forked. Raises what
    :func:`.shake_hands` does.
    """

    def __init__(self, operations: pyfuse3.Operations, device: int, tuning: Tuning) -> None:
        self._operations = operations
        descriptor = shake_hands(device, tuning, self._answer)
        module = vars(pyfuse3)
        module["_session_loop"] = _again_and_again
        if tuning.hasten:
            module["trio"] = _Hastened(descriptor)

    def _answer(self, descriptor: int) -> None:
        """Have libfuse answer INIT, from a socket."""
        pyfuse3.init(self._operations, f"/dev/fd/{descriptor}", set())
        trio.run(self._until_answered)

    async def _until_answered(self) -> None:
        settled = trio.Event()
        self._operations.init = settled.set  # type: ignore[method-assign]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pyfuse3.main)
            await settled.wait()  # the answer follows before anyone else gets a turn
            nursery.cancel_scope.cancel()

    async def run(self) -> None:
        """Until the mount is gone."""
        await pyfuse3.main(max_tasks=_TASKS)


_session_loop: Final = vars(pyfuse3)["_session_loop"]


async def _again_and_again(nursery: trio.Nursery, min_tasks: int, max_tasks: int, **more: Any) -> None:  # noqa: ANN401
    """pyfuse3's loop over requests, which ends the session when there is nothing to read after all.

    That happens: whoever made the request may have been killed. A device that blocks would be worse; then nothing else
    is answered before the next request comes.
    """
    while True:
        try:
            await _session_loop(nursery, min_tasks, max_tasks, **more)
        except OSError as error:
            if error.errno != errno.EAGAIN:
                raise
            _logger.debug("a request was taken back")
        else:
            return


class _Hastened:
    """What pyfuse3 knows as ``trio``, for a session that reads ``device``."""

    def __init__(self, device: int) -> None:
        self.Lock = _Lock
        self.lowlevel = _Lowlevel(device)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(trio, name)


class _Lowlevel:
    def __init__(self, device: int) -> None:
        self._poll = select.poll()
        self._poll.register(device, select.POLLIN)
        self._turn = 0.0

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(trio.lowlevel, name)

    async def wait_readable(self, device: int) -> None:
        now = time.monotonic()
        if now > self._turn:
            self._turn = now + _SHARE
            await trio.lowlevel.checkpoint()
        if not self._poll.poll(0):
            await trio.lowlevel.wait_readable(device)
            self._turn = time.monotonic() + _SHARE


class _Lock:
    """As trio.Lock, but to take a free one is no checkpoint."""

    def __init__(self) -> None:
        self._taken = False
        self._waiting: deque[trio.Event] = deque()

    async def __aenter__(self) -> None:
        if self._taken:
            turn = trio.Event()
            self._waiting.append(turn)
            try:
                await turn.wait()  # whoever sets it hands the lock over
            except BaseException:
                if turn.is_set():
                    self._hand_over()
                else:
                    self._waiting.remove(turn)
                raise
        self._taken = True

    async def __aexit__(self, *exc: object) -> None:
        self._hand_over()

    def _hand_over(self) -> None:
        if self._waiting:
            self._waiting.popleft().set()
        else:
            self._taken = False
