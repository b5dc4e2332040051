"""One FUSE session of pyfuse3: the process has no other."""

from __future__ import annotations

import errno
import logging
from typing import Any, Final

import pyfuse3
import trio

from fusefallback.handshake import shake_hands
from fusefallback.tuning import Tuning

_logger: Final = logging.getLogger(__name__)

_TASKS: Final = 1024
"""Requests that are seen to at a time, each by a task; more than the kernel lets wait in the background."""


class Session:
    """Answers the mount that uses ``device`` with ``operations``.

    Made before anything is answered, and without threads: the process may still be forked. Raises what
    :func:`.shake_hands` does.
    """

    def __init__(self, operations: pyfuse3.Operations, device: int, tuning: Tuning) -> None:
        self._operations = operations
        shake_hands(device, tuning, self._answer)
        vars(pyfuse3)["_session_loop"] = _again_and_again

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
