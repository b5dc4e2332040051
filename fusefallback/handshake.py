"""FUSE_INIT with what libfuse does not ask for: how large reads may be, and how many may wait (linux/fuse.h).

libfuse settles these with the kernel by itself, and pyfuse3 gives no say in it. So it is given a socket in place of
``/dev/fuse`` until that is settled::

    kernel ── INIT ──► read here ──► socket ──► libfuse
    kernel ◄── with our limits ◄── read here ◄── its answer

after which the socket's descriptor becomes the device's, and libfuse talks to the kernel.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable
from typing import Final

from erofsgen.errors import UnsupportedError
from fusefallback.tuning import Tuning

_IN_HEADER: Final = struct.Struct("=IIQQIIII")  # struct fuse_in_header
_INIT_IN: Final = struct.Struct("=IIII")  # struct fuse_init_in: major, minor, max_readahead, flags
_OUT_HEADER: Final = struct.Struct("=IiQ")  # struct fuse_out_header: len, error, unique
_INIT_OUT: Final = struct.Struct("=IIIIHHIIH")
"""struct fuse_init_out: major, minor, max_readahead, flags, max_background, congestion_threshold, max_write, time_gran,
max_pages."""
_INIT: Final = 26
_BUFFER: Final = 1 << 16

_PARALLEL_DIROPS: Final = 1 << 18
_MAX_PAGES: Final = 1 << 22
_CACHE_SYMLINKS: Final = 1 << 23
_MOST_PAGES: Final = 0xFFFF
_READ_AHEAD: Final = 1 << 30
"""Bytes; no limit. The kernel begins with 128 KiB, and root may raise that in sysfs up to this."""


def shake_hands(device: int, tuning: Tuning, answer: Callable[[int], None]) -> int:
    """Settle things with the kernel, whose mount uses ``device``. Returns libfuse's descriptor, the device's from now.

    ``answer``, called with that descriptor while it is a socket, must have libfuse read one request from it and reply.
    Raises UnsupportedError, OSError (the mount is gone).
    """
    request = os.read(device, _BUFFER)
    if len(request) < _IN_HEADER.size + _INIT_IN.size:
        raise UnsupportedError(f"the kernel's first request has {len(request)} bytes")
    _, opcode, unique, *_ = _IN_HEADER.unpack_from(request)
    if opcode != _INIT:
        raise UnsupportedError(f"the kernel's first request has opcode {opcode}")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        descriptor = theirs.detach()
        ours.send(request)
        answer(descriptor)
        reply = ours.recv(_BUFFER)
    _, error, replied = _OUT_HEADER.unpack_from(reply.ljust(_OUT_HEADER.size, b"\0"))
    if error or replied != unique or len(reply) < _OUT_HEADER.size + _INIT_OUT.size:
        raise UnsupportedError(f"libfuse and the kernel do not agree: {os.strerror(-error)}")
    os.write(device, _improved(request, reply, tuning))
    os.dup2(device, descriptor, inheritable=False)
    os.close(device)
    os.set_blocking(descriptor, False)
    return descriptor


def _improved(request: bytes, reply: bytes, tuning: Tuning) -> bytes:
    *_, offered = _INIT_IN.unpack_from(request, _IN_HEADER.size)
    major, minor, _, flags, _, _, max_write, granularity, _ = _INIT_OUT.unpack_from(reply, _OUT_HEADER.size)
    flags |= (_PARALLEL_DIROPS | _MAX_PAGES | _CACHE_SYMLINKS) & offered
    pages = min(_MOST_PAGES, tuning.max_read // os.sysconf("SC_PAGE_SIZE"))
    background = tuning.background
    improved = bytearray(reply)
    _INIT_OUT.pack_into(
        improved, _OUT_HEADER.size,
        major, minor, _READ_AHEAD, flags, background, background, max_write, granularity, pages,
    )  # fmt: skip
    return bytes(improved)
