"""Requests that were read from the kernel and not answered yet, in memory that outlives the supervisor.

::

    0          header: magic, version, number of slots, highest key ever used + 1
    64         slot of key 0: state, offset, length, pack's SHA-256
    128        slot of key 1 …

The kernel tells requests apart by a small number, the *key* (for fanotify: the event's file descriptor), so a request's
key is its slot. A slot is filled before its state is set and its state is cleared when the answer was written: a
supervisor that finds a filled slot has to see to that request. The memory is a memfd, handed on to whoever comes next.

The supervisor in charge is the only writer. No locks.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from struct import Struct
from typing import Final, NamedTuple

_HEADER: Final = Struct("<8sIII")
_MAGIC: Final = b"EGJOURNL"
_VERSION: Final = 1
_SLOT: Final = Struct("<QQQ32s")
_SLOT_SIZE: Final = 64
_SIZE_OF_HEADER: Final = 64
_HIGHEST: Final = Struct("<I")
_HIGHEST_AT: Final = 16
_FILLED: Final = 1
_STATE: Final = Struct("<Q")

assert _SLOT.size <= _SLOT_SIZE


class Entry(NamedTuple):
    """A request not answered: ``[offset, offset + length)`` of the pack with this SHA-256 in hex."""

    key: int
    pack: str
    offset: int
    length: int


class Journal:
    """The journal in the memfd ``descriptor``. Raises ValueError where it is none of this version."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._map = mmap.mmap(descriptor, os.fstat(descriptor).st_size)
        magic, version, slots, highest = _HEADER.unpack_from(self._map)
        self.slots: int = slots
        self._highest: int = highest
        if (magic, version) != (_MAGIC, _VERSION):
            raise ValueError("not a journal of this version")

    @classmethod
    def create(cls, slots: int) -> Journal:
        """An empty journal for keys below ``slots``. Memory is used up to the highest key used."""
        descriptor = os.memfd_create("erofsgen-journal", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, _SIZE_OF_HEADER + slots * _SLOT_SIZE)
        os.pwrite(descriptor, _HEADER.pack(_MAGIC, _VERSION, slots, 0), 0)
        return cls(descriptor)

    def fileno(self) -> int:
        """The memfd, to be handed on."""
        return self._descriptor

    @property
    def highest(self) -> int:
        """All keys that were ever seen are below this."""
        return self._highest

    def saw(self, key: int) -> None:
        """A request with this key was read, whatever becomes of it."""
        if key >= self._highest:
            self._highest = key + 1
            _HIGHEST.pack_into(self._map, _HIGHEST_AT, self._highest)

    def add(self, key: int, pack: str, offset: int, length: int) -> None:
        """A request waits for an answer. Raises IndexError for a key that has no slot."""
        if not 0 <= key < self.slots:
            raise IndexError(f"no slot for key {key}")
        at = _SIZE_OF_HEADER + key * _SLOT_SIZE
        _SLOT.pack_into(self._map, at, 0, offset, length, bytes.fromhex(pack))
        _STATE.pack_into(self._map, at, _FILLED)

    def remove(self, key: int) -> None:
        """The request was answered."""
        if 0 <= key < self.slots:
            _STATE.pack_into(self._map, _SIZE_OF_HEADER + key * _SLOT_SIZE, 0)

    def entries(self) -> Iterator[Entry]:
        """The requests that were not answered."""
        for key in range(min(self._highest, self.slots)):
            state, offset, length, pack = _SLOT.unpack_from(self._map, _SIZE_OF_HEADER + key * _SLOT_SIZE)
            if state == _FILLED:
                yield Entry(key, pack.hex(), offset, length)

    def close(self) -> None:
        """Let go of the memory; others may hold it."""
        self._map.close()
        os.close(self._descriptor)
