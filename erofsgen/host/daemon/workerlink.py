"""The supervisor's side of its worker: starts it, tells it what to bring, starts another when it dies."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final

from erofsgen.host.daemon.channel import Channel, Message, pair
from erofsgen.host.daemon.loop import Loop
from erofsgen.host.daemon.planes import Introduction
from erofsgen.host.daemon.requests import Request, Requests

_logger: Final = logging.getLogger(__name__)

_MALLOC: Final = {
    "MALLOC_ARENA_MAX": "2",
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(64 << 20),
}
"""glibc's heap of a worker (mallopt(3)): buffers of frames and reads are used again, from two heaps. With its defaults
there are sixteen, which fragment to twice the memory, and large buffers are mapped anew, page fault by page fault."""
_FLUSH: Final = 0.005
_SHORT_LIFE: Final = 2.0
"""Seconds; a worker that dies sooner is replaced after a pause, which grows to the longest."""
_LONGEST_PAUSE: Final = 5.0


class WorkerLink:
    """A worker that is there again whenever it dies.

    ``command`` starts one; the number of its end of the channel is appended. ``introduction`` says how to write to a
    pack. ``received`` gets every message of the worker's; ``started`` is called when one was started, and told what
    waits. All in the loop's thread.
    """

    def __init__(
        self,
        loop: Loop,
        command: Sequence[str],
        requests: Requests,
        *,
        introduction: Callable[[str], Introduction | None],
        received: Callable[[Message], None],
        started: Callable[[], None] = lambda: None,
    ) -> None:
        self._loop = loop
        self._command = list(command)
        self._requests = requests
        self._introduction = introduction
        self._received = received
        self._told_of_start = started
        self._channel: Channel | None = None
        self._introduced: set[str] = set()  # packs this worker has the descriptor of
        self._clients: list[tuple[Message, int]] = []  # commands that wait for a worker
        self._pause = 0.0
        self._started = 0.0
        self._flushing = False
        self._stopping = False
        self.pid = 0
        self.restarts = -1

    def start(self) -> None:
        """Start a worker and hand it what waits."""
        if self._stopping or self.pid:
            return
        self._channel, theirs = pair()
        theirs.set_inheritable(True)
        # a session of its own: the terminal's signals are for the supervisor
        self.pid = os.posix_spawn(
            self._command[0],
            [*self._command, str(theirs.fileno())],
            {**os.environ, **_MALLOC},
            setsid=True,
            setsigmask=(),
            setsigdef=(signal.SIGTERM, signal.SIGINT, signal.SIGHUP),
        )
        theirs.close()
        self.restarts += 1
        self._started = time.monotonic()
        self._introduced.clear()
        self._loop.watch(self._channel.fileno(), self._readable)
        for request in self._requests:
            self.fill(request)
        clients, self._clients = self._clients, []
        for message, descriptor in clients:
            self.client(message, descriptor)
        self._told_of_start()

    def fill(self, request: Request) -> None:
        """Have the worker bring a range."""
        if self.introduce(request.pack):
            self._send({
                "do": "fill",
                "key": request.key,
                "serial": request.serial,
                "pack": request.pack,
                "offset": request.offset,
                "length": request.length,
                "deadline": request.deadline,
            })  # fmt: skip

    def ahead(self, pack: str, offset: int, length: int) -> None:
        """Have the worker bring a range that nobody waits for yet."""
        if self.introduce(pack):
            self._send({"do": "ahead", "pack": pack, "offset": offset, "length": length})

    def tell(self, message: Message) -> None:
        """Have the worker know something."""
        self._send(message)

    def client(self, message: Message, descriptor: int) -> None:
        """Have the worker answer a command; the connection ``descriptor`` is the worker's from now on."""
        if self._channel is None:
            self._clients.append((message, descriptor))
            return
        self._send({"do": "client", **message}, descriptor)
        os.close(descriptor)

    def forget(self, pack: str) -> None:
        """A pack is no longer used."""
        if pack in self._introduced:
            self._introduced.discard(pack)
            self._send({"do": "forget", "pack": pack})

    def died(self, pid: int, status: int) -> bool:
        """A child has ended. True: it was the worker, and there will be another."""
        if pid != self.pid:
            return False
        self.pid = 0
        self._hang_up()
        if not self._stopping:
            how = os.waitstatus_to_exitcode(status)
            lived = time.monotonic() - self._started
            self._pause = 0.0 if lived >= _SHORT_LIFE else min(_LONGEST_PAUSE, 2 * self._pause or 0.05)
            _logger.warning(
                "worker %d ended with %d after %.1f s; starting another", pid, how, lived,
                extra={"worker": pid, "exit_code": how, "lived": round(lived, 3)},
            )  # fmt: skip
            self._loop.after(self._pause, self.start)
        return True

    def kill(self) -> None:
        """End the worker for good, and wait until it is gone."""
        self._stopping = True
        self._hang_up()
        if self.pid:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = 0

    def introduce(self, pack: str) -> bool:
        """Have the worker know how to write to a pack. False: not through the plane."""
        if pack not in self._introduced:
            introduction = self._introduction(pack)
            if introduction is None:
                return False
            self._introduced.add(pack)
            self._send({"do": "pack", "pack": pack, **introduction.facts}, introduction.descriptor)
        return True

    def _send(self, message: Message, descriptor: int | None = None) -> None:
        if self._channel is None:
            return  # the next worker is told all that still waits
        try:
            self._channel.send(message, descriptor)
        except OSError:
            return  # it has died, and the next is told
        if not self._flushing:
            self._flush()

    def _flush(self) -> None:
        self._flushing = False
        if self._channel is not None:
            with suppress(OSError):
                if not self._channel.flush():
                    self._flushing = True
                    self._loop.after(_FLUSH, self._flush)

    def _readable(self) -> None:
        try:
            while self._channel is not None:
                received = self._channel.receive()
                if received is None:
                    self._hang_up()  # its end is told by SIGCHLD
                    return
                self._received(received[0])
        except BlockingIOError:
            pass

    def _hang_up(self) -> None:
        if self._channel is not None:
            self._loop.unwatch(self._channel.fileno())
            self._channel.close()
            self._channel = None


def worker_command(root: str, options: Sequence[str]) -> list[str]:
    """What starts a worker for ``root``."""
    return [sys.executable, "-m", "erofsgen.host.daemon.worker", "--root", root, *options]
