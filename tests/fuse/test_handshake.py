"""FUSE_INIT between a kernel and a libfuse, both played by the test."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections.abc import Callable, Iterator

import pytest

from erofsgen.errors import UnsupportedError, UsageError
from fusefallback.handshake import shake_hands
from fusefallback.tuning import Tuning

IN_HEADER = struct.Struct("=IIQQIIII")
INIT_IN = struct.Struct("=IIIIIIIIIIIIIIII")  # of 7.36 and later: flags2 and 11 unused words follow the flags
OUT_HEADER = struct.Struct("=IiQ")
INIT_OUT = struct.Struct("=IIIIHHIIHH")
REST = bytes(64 - INIT_OUT.size)
"""map_alignment is the last of INIT_OUT; flags2 and what is unused make the structure 64 bytes."""
UNIQUE = 0x1122334455667788
PARALLEL_DIROPS, MAX_PAGES, CACHE_SYMLINKS, ASYNC_READ, ATOMIC_O_TRUNC = 1 << 18, 1 << 22, 1 << 23, 1, 1 << 3
EVERYTHING = 0x73FFFFFB


def init_request(flags: int = EVERYTHING, opcode: int = 26) -> bytes:
    body = INIT_IN.pack(7, 43, 131072, flags, *[0] * 12)
    return IN_HEADER.pack(IN_HEADER.size + len(body), opcode, UNIQUE, 0, 0, 0, 0, 0) + body


def init_reply(flags: int = ASYNC_READ, unique: int = UNIQUE, error: int = 0) -> bytes:
    body = INIT_OUT.pack(7, 38, 131072, flags, 12, 9, 1 << 20, 1, 256, 0) + REST
    return OUT_HEADER.pack(OUT_HEADER.size + len(body), error, unique) + body


class Kernel:
    """One end of a pair is the device; the test is at the other."""

    def __init__(self) -> None:
        self.ours, device = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.device = device.detach()
        self.ours.settimeout(5)
        self.asked = b""

    def answering(self, reply: bytes) -> Callable[[int], None]:
        def libfuse(descriptor: int) -> None:
            self.asked = os.read(descriptor, 1 << 16)
            os.write(descriptor, reply)

        return libfuse


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    made = Kernel()
    yield made
    made.ours.close()
    if made.device >= 0:
        os.close(made.device)


def test_limits_are_raised_and_the_rest_is_left_alone(kernel: Kernel) -> None:
    kernel.ours.send(init_request())
    tuning = Tuning(max_read=1 << 20, background=100)
    descriptor = shake_hands(kernel.device, tuning, kernel.answering(init_reply()))
    kernel.device = -1
    assert kernel.asked == init_request(), "libfuse gets what the kernel sent"
    reply = kernel.ours.recv(1 << 16)
    length, error, unique = OUT_HEADER.unpack_from(reply)
    assert (length, error, unique) == (len(reply), 0, UNIQUE)
    major, minor, read_ahead, flags, background, congestion, max_write, granularity, pages, alignment = (
        INIT_OUT.unpack_from(reply, OUT_HEADER.size)
    )
    assert (major, minor, max_write, granularity, alignment) == (7, 38, 1 << 20, 1, 0)
    assert read_ahead >= 32 << 20
    assert (background, congestion) == (100, 100)
    assert pages == (1 << 20) // os.sysconf("SC_PAGE_SIZE")
    assert flags == ASYNC_READ | PARALLEL_DIROPS | MAX_PAGES | CACHE_SYMLINKS
    assert reply[OUT_HEADER.size + INIT_OUT.size :] == REST
    # from now on it is the device
    os.write(descriptor, b"a reply")
    assert kernel.ours.recv(100) == b"a reply"
    kernel.ours.send(b"a request")
    assert os.read(descriptor, 100) == b"a request"
    with pytest.raises(BlockingIOError):
        os.read(descriptor, 100)
    assert fcntl.fcntl(descriptor, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    os.close(descriptor)


def test_nothing_is_asked_that_the_kernel_does_not_offer(kernel: Kernel) -> None:
    kernel.ours.send(init_request(ASYNC_READ | ATOMIC_O_TRUNC))
    os.close(shake_hands(kernel.device, Tuning(), kernel.answering(init_reply())))
    kernel.device = -1
    flags = INIT_OUT.unpack_from(kernel.ours.recv(1 << 16), OUT_HEADER.size)[3]
    assert flags == ASYNC_READ


def test_no_more_pages_than_the_field_holds(kernel: Kernel) -> None:
    kernel.ours.send(init_request())
    os.close(shake_hands(kernel.device, Tuning(max_read=1 << 40), kernel.answering(init_reply())))
    kernel.device = -1
    assert INIT_OUT.unpack_from(kernel.ours.recv(1 << 16), OUT_HEADER.size)[8] == 0xFFFF


@pytest.mark.parametrize(
    "reply",
    [init_reply(error=-71), init_reply(unique=5), OUT_HEADER.pack(OUT_HEADER.size, 0, UNIQUE), b"\1" * 5],
    ids=["error", "another request's", "too short", "garbage"],
)
def test_a_libfuse_that_does_not_agree(kernel: Kernel, reply: bytes) -> None:
    kernel.ours.send(init_request())
    with pytest.raises(UnsupportedError):
        shake_hands(kernel.device, Tuning(), kernel.answering(reply))


@pytest.mark.parametrize(
    "request_",
    [init_request(opcode=1), b"garbage", IN_HEADER.pack(40, 26, UNIQUE, 0, 0, 0, 0, 0)],
    ids=["another request", "garbage", "no body"],
)
def test_a_kernel_that_says_something_else(kernel: Kernel, request_: bytes) -> None:
    kernel.ours.send(request_)
    with pytest.raises(UnsupportedError):
        shake_hands(kernel.device, Tuning(), kernel.answering(init_reply()))


def test_a_mount_that_is_gone(kernel: Kernel) -> None:
    kernel.ours.close()
    with pytest.raises(UnsupportedError):  # of the real one reading says ENODEV
        shake_hands(kernel.device, Tuning(), kernel.answering(init_reply()))


# --- settings --------------------------------------------------------------------------------------------------------


def test_settings() -> None:
    assert Tuning.of("") == Tuning()
    assert Tuning.of("max_read=1M,reply=copied,direct=off,background=7") == Tuning(
        max_read=1 << 20, reply="copied", direct=False, background=7
    )
    assert Tuning.of("mapped=2G,,max_read=4K") == Tuning(mapped=2 << 30, max_read=4096)


@pytest.mark.parametrize(
    "text", ["x=1", "max_read", "max_read=", "max_read=1T", "direct=1", "reply=no", "count=1", "_replace=1"]
)
def test_settings_that_there_are_not(text: str) -> None:
    with pytest.raises(UsageError, match="no setting"):
        Tuning.of(text)
