"""A container's terminal, passed through to the one this process has, or to its standard input and output."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import socket
import struct
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Final, Self

from erofsgen.errors import UnsupportedError

_PIECE: Final = 64 << 10
_PATIENCE: Final = 10.0
"""Seconds that a runtime which created a terminal has to hand it over."""


class Terminal:
    """The receiving end of a runtime's ``--console-socket``, then the terminal's master side."""

    def __init__(self, path: Path) -> None:
        self.socket_path = path.name
        """For a runtime whose working directory is the socket's: a socket's path has at most 107 bytes."""
        self._master = -1
        self._listener = socket.socket(socket.AF_UNIX)
        directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._listener.bind(f"/proc/self/fd/{directory}/{path.name}")
        finally:
            os.close(directory)
        self._listener.listen(1)
        self._listener.settimeout(_PATIENCE)

    def accept(self) -> None:
        """Take the terminal from the runtime, which has connected already. Raises UnsupportedError."""
        try:
            connection, _ = self._listener.accept()
            with connection:
                _, descriptors, _, _ = socket.recv_fds(connection, 4096, 1)
                self._master = descriptors[0]
        except (TimeoutError, IndexError):
            raise UnsupportedError("the OCI runtime handed over no terminal") from None
        os.set_blocking(self._master, False)
        self._resize()

    def relay(self, process: int, *, interactive: bool) -> None:
        """Copy both ways until the process behind a pidfd has ended and all it wrote is through."""
        raw = interactive and os.isatty(0)
        with _raw() if raw else _as_it_is(), self._following_size():
            self._copy(process, interactive=interactive)

    def _copy(self, process: int, *, interactive: bool) -> None:
        poll = select.poll()
        poll.register(process, select.POLLIN)
        poll.register(self._master, select.POLLIN)
        pending = b""
        listening = interactive
        while True:
            # input is read when the last piece has been taken: a program that does not read must not stop its output
            poll.register(self._master, select.POLLIN | (select.POLLOUT if pending else 0))
            if listening and not pending:
                poll.register(0, select.POLLIN)
            elif interactive:
                with suppress(KeyError):
                    poll.unregister(0)
            ready = dict(poll.poll())
            if ready.get(self._master, 0) & (select.POLLIN | select.POLLHUP) and not self._put_out():
                poll.unregister(self._master)
                select.select([process], [], [])
                return
            if process in ready:
                while self._put_out():
                    pass
                return
            if ready.get(self._master, 0) & select.POLLOUT:
                with suppress(BlockingIOError):
                    pending = pending[os.write(self._master, pending) :]
            if 0 in ready:
                pending = os.read(0, _PIECE)
                if not pending:
                    listening = False
                    pending = b"\x04"  # what a terminal makes an end of file of

    def _put_out(self) -> bool:
        """Copy what there is to standard output; False at the end, or where there is nothing."""
        try:
            data = os.read(self._master, _PIECE)
        except OSError:  # EIO: nobody has the other side any more; EAGAIN
            return False
        while data:
            data = data[os.write(1, data) :]
        return True

    @contextmanager
    def _following_size(self) -> Iterator[None]:
        def resize(number: int, frame: FrameType | None) -> None:  # noqa: ARG001  (a signal handler's arguments)
            self._resize()

        before = signal.signal(signal.SIGWINCH, resize)
        try:
            yield
        finally:
            signal.signal(signal.SIGWINCH, before)

    def _resize(self) -> None:
        """Give it the size of ours; the kernel tells the programs in it."""
        for own in (0, 1, 2):
            with suppress(OSError):  # not a terminal
                size = fcntl.ioctl(own, termios.TIOCGWINSZ, struct.pack("HHHH", 0, 0, 0, 0))
                fcntl.ioctl(self._master, termios.TIOCSWINSZ, size)
                return

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.close()
        if self._master >= 0:
            os.close(self._master)


@contextmanager
def _raw() -> Iterator[None]:
    """Our terminal passes every key on, Ctrl-C as well."""
    before = termios.tcgetattr(0)
    tty.setraw(0)
    try:
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)


@contextmanager
def _as_it_is() -> Iterator[None]:
    yield
