"""What a fanotify group of class PRE_CONTENT sends and takes (linux/fanotify.h, Linux 6.14). Bytes in, facts out.

::

    event      u32 event_len  u8 vers  u8 reserved  u16 metadata_len  u64 mask  s32 fd  s32 pid
    range      u8 type (6)  u8 pad  u16 len (24)  u32 pad  u64 offset  u64 count          follows the event
    response   s32 fd  u32 response
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from struct import Struct
from typing import Final, NamedTuple

from erofsgen.host import linux

_EVENT: Final = Struct("=IBBHQii")
_INFO: Final = Struct("=BBH")
_RANGE: Final = Struct("=BBHIQQ")
_RESPONSE: Final = Struct("=iI")
_VERSION: Final = 3
_INFO_TYPE_RANGE: Final = 6

assert _EVENT.size == 24
assert _RANGE.size == 24

BUFFER: Final = 48 * 128
"""Bytes for a read of the group: 128 events with their ranges."""


class Event(NamedTuple):
    """Somebody is about to read ``[offset, offset + length)``; ``pid`` is its process. A negative ``fd``: no answer."""

    fd: int
    pid: int
    offset: int
    length: int


def events(data: bytes) -> Iterator[Event]:
    """The events of one read of the group. Raises ValueError for another version's."""
    at = 0
    while at < len(data):
        length, version, _, header, _, fd, pid = _EVENT.unpack_from(data, at)
        if version != _VERSION or length < header:
            raise ValueError(f"fanotify event of version {version} and {length} bytes")
        offset, size = 0, 1 << 62  # an event without a range is about the whole file
        info = at + header
        while info < at + length:
            kind, _, step = _INFO.unpack_from(data, info)
            if kind == _INFO_TYPE_RANGE:
                _, _, _, _, offset, size = _RANGE.unpack_from(data, info)
            info += max(step, _INFO.size)
        yield Event(fd, pid, offset, size)
        at += length


def allow(fd: int) -> bytes:
    """The response that lets a reader go on."""
    return _RESPONSE.pack(fd, linux.FAN_ALLOW)


def deny(fd: int, error: int = errno.EIO) -> bytes:
    """The response that fails the read with ``error``: one of EIO, EPERM, EBUSY, ETXTBSY, EAGAIN, ENOSPC, EDQUOT."""
    return _RESPONSE.pack(fd, linux.FAN_DENY | error << 24)
