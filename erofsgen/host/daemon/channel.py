"""Messages between supervisor and worker: one JSON object each, with descriptors beside it, over a SEQPACKET pair."""

from __future__ import annotations

import json
import os
import socket
from collections import deque
from typing import Any, Final

LIMIT: Final = 192 << 10
"""Bytes of a message; the socket's buffer must take one."""

_DESCRIPTORS: Final = 4

Message = dict[str, Any]


class Channel:
    """One end. The supervisor's does not block: what the other end cannot take yet waits in order."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._waiting: deque[tuple[bytes, int | None]] = deque()

    def __len__(self) -> int:
        """Messages that were kept."""
        return len(self._waiting)

    def __bool__(self) -> bool:
        return True

    def fileno(self) -> int:
        """To wait on."""
        return self._socket.fileno()

    def send(self, message: Message, descriptor: int | None = None) -> None:
        """Send, or keep for :meth:`flush`, with a duplicate of ``descriptor``. Raises OSError when nobody is there."""
        data = json.dumps(message).encode()
        if not self._waiting:
            try:
                self._send(data, descriptor)
                return
            except BlockingIOError:
                pass
        self._waiting.append((data, None if descriptor is None else os.dup(descriptor)))

    def flush(self) -> bool:
        """Send what was kept. False: the other end is still full."""
        while self._waiting:
            data, descriptor = self._waiting[0]
            try:
                self._send(data, descriptor)
            except BlockingIOError:
                return False
            self._waiting.popleft()
            if descriptor is not None:
                os.close(descriptor)
        return True

    def receive(self) -> tuple[Message, list[int]] | None:
        """The next message and its descriptors; None at the end.

        Raises BlockingIOError where it does not block, ValueError and RecursionError (no JSON).
        """
        try:
            data, descriptors, _, _ = socket.recv_fds(self._socket, LIMIT, _DESCRIPTORS, socket.MSG_CMSG_CLOEXEC)
        except ConnectionError:
            return None
        try:
            return (json.loads(data), descriptors) if data else None
        except (RecursionError, ValueError):
            for descriptor in descriptors:
                os.close(descriptor)
            raise

    def close(self) -> None:
        """Close it and forget what was not sent."""
        for _, descriptor in self._waiting:
            if descriptor is not None:
                os.close(descriptor)
        self._waiting.clear()
        self._socket.close()

    def _send(self, data: bytes, descriptor: int | None) -> None:
        socket.send_fds(self._socket, [data], [] if descriptor is None else [descriptor])


def pair() -> tuple[Channel, socket.socket]:
    """The supervisor's end, and the socket to give to the worker."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * LIMIT)
    ours.setblocking(False)
    return Channel(ours), theirs
