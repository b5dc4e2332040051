"""Room for inodes and blocks: which bytes of an image are taken."""

from __future__ import annotations

from typing import Final

from erofsgen.erofs.format import BLOCK_SIZE, ISLOT_SIZE

_SLOTS: Final = BLOCK_SIZE // ISLOT_SIZE
_LARGE: Final = _SLOTS // 4
"""Records from this many slots on are put where they fit best; smaller ones go on where the last one ended."""


class Space:
    """Hands out blocks, and 32-byte slots inside blocks, from ``start`` (bytes, a multiple of the slot size) on.

    A record that fits one block lies in one block: kernels before 6.12 refuse symbolic links whose target is in
    another block than their inode (erofs_fill_symlink). What a record leaves of its block is kept in mind for later
    ones, so hardly anything is lost, and records that follow each other stay close together.
    """

    def __init__(self, start: int) -> None:
        self._next = -(-start // BLOCK_SIZE)
        """First block that nobody has."""
        self._at = start // ISLOT_SIZE
        self._free = -self._at % _SLOTS
        """Slots left of the block that is being filled, from slot ``_at`` on."""
        self._rests: list[list[int]] = [[] for _ in range(_SLOTS)]
        """By number of free slots at a block's end: where they begin."""
        self._lengths = 0
        """Bit n is set where ``_rests[n]`` has something."""

    @property
    def blocks(self) -> int:
        """Blocks of the image so far."""
        return self._next

    def take_blocks(self, count: int) -> int:
        """The first of ``count`` consecutive blocks."""
        first = self._next
        self._next += count
        return first

    def take(self, size: int) -> int:
        """The offset of a record of ``size`` bytes."""
        slots = (size + ISLOT_SIZE - 1) // ISLOT_SIZE
        if slots <= self._free:
            at = self._at
            self._at += slots
            self._free -= slots
        elif slots >= _LARGE:
            at = self._take_elsewhere(slots)
        else:
            self._keep(self._at, self._free)
            self._at, self._free = self._largest(slots)
            at = self._at
            self._at += slots
            self._free -= slots
        return at * ISLOT_SIZE

    def _take_elsewhere(self, slots: int) -> int:
        """Without leaving the block that is being filled: small records still fit there."""
        fitting = self._lengths >> slots << slots
        if fitting and slots < _SLOTS:
            free = (fitting & -fitting).bit_length() - 1
            at = self._pop(free)
        else:
            free = -slots % _SLOTS + slots
            at = self.take_blocks(free // _SLOTS) * _SLOTS
        self._keep(at + slots, free - slots)
        return at

    def _largest(self, slots: int) -> tuple[int, int]:
        free = self._lengths.bit_length() - 1
        if free >= slots:
            return self._pop(free), free
        return self.take_blocks(1) * _SLOTS, _SLOTS

    def _pop(self, free: int) -> int:
        rests = self._rests[free]
        at = rests.pop()
        if not rests:
            self._lengths ^= 1 << free
        return at

    def _keep(self, at: int, free: int) -> None:
        if free:
            self._rests[free].append(at)
            self._lengths |= 1 << free
