"""Messages of ``/dev/cachefiles`` in on-demand mode (include/uapi/linux/cachefiles.h, Linux 5.19 to 7.1).

::

    0   message id, opcode, length of all of it, object id      four u32, the machine's byte order
    16  OPEN:  length of the volume's key with its NUL, length of the cookie's key, descriptor, flags; both keys
        READ:  offset and length of a range of the object       two u64
        CLOSE: nothing

An OPEN is answered by a line with the object's size or a negative errno, a READ by an ioctl on the object's descriptor;
a CLOSE is not answered.
"""

from __future__ import annotations

from struct import Struct
from typing import Final, NamedTuple

BUFFER: Final = 4096
"""Bytes to read into; a message has at most 1024 (CACHEFILES_MSG_MAX_SIZE)."""
READ_COMPLETE: Final = 0x40049801
"""_IOW(0x98, 1, int); the argument is the message's id itself."""

_OPEN: Final = 0
_HEADER: Final = Struct("=IIII")
_KEYS: Final = Struct("=IIII")
_RANGE: Final = Struct("=QQ")


class Open(NamedTuple):
    """An object is about to be used; it is filled through ``descriptor``."""

    message: int
    object: int
    volume: str
    cookie: str
    descriptor: int


class Close(NamedTuple):
    """An object is no longer used."""

    object: int


class Read(NamedTuple):
    """Somebody waits for ``[offset, offset + length)`` of an object."""

    message: int
    object: int
    offset: int
    length: int


class Malformed(NamedTuple):
    """What is no message. ``message``: its id, if it is an OPEN to be refused, with its ``descriptor``, or -1."""

    why: str
    message: int | None = None
    descriptor: int = -1


Message = Open | Close | Read | Malformed


def parse(data: bytes) -> Message:
    """One message."""
    if len(data) < _HEADER.size:
        return Malformed(f"{len(data)} bytes are no message")
    message, opcode, length, number = _HEADER.unpack_from(data)
    body = data[_HEADER.size :]
    if length != len(data):
        what = f"{len(data)} bytes, of which the header says {length}"
        return _refused(message, body, what) if opcode == _OPEN else Malformed(what)
    match opcode:
        case 0:  # CACHEFILES_OP_OPEN
            return _open(message, number, body)
        case 1:  # CACHEFILES_OP_CLOSE
            return Close(number)
        case 2 if len(body) == _RANGE.size:
            return Read(message, number, *_RANGE.unpack(body))
        case 2:
            return Malformed(f"a READ of {len(data)} bytes")
    return Malformed(f"unknown opcode {opcode}")


def copen(message: int, size: int) -> bytes:
    """The answer to an OPEN: the object's ``size``, or an errno, negative."""
    return b"copen %d,%d" % (message, size)


def _open(message: int, number: int, body: bytes) -> Message:
    if len(body) < _KEYS.size:
        return Malformed(f"an OPEN of {len(body)} bytes", message)
    volume_size, cookie_size, descriptor, _ = _KEYS.unpack_from(body)
    keys = body[_KEYS.size :]
    volume, cookie = keys[:volume_size], keys[volume_size:]
    if len(cookie) != cookie_size or not cookie or volume[-1:] != b"\0":
        return _refused(message, body, "an OPEN whose keys are not as long as it says")
    try:
        return Open(message, number, volume[:-1].decode("ascii"), cookie.decode("ascii"), descriptor)
    except UnicodeDecodeError:
        return _refused(message, body, "an OPEN whose keys are no names")


def _refused(message: int, body: bytes, why: str) -> Malformed:
    descriptor = _KEYS.unpack_from(body)[2] if len(body) >= _KEYS.size else -1
    return Malformed(why, message, descriptor if descriptor < 1 << 31 else -1)
