"""What the image's own command will read, guessed while all of the image is at hand: hosts then need not do it.

A profile is a hint: whatever goes wrong here is logged, and the build goes on without.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Final

from erofsgen.errors import ErofsgenError
from erofsgen.profile import beside
from erofsgen.profile.chunks import Chunks
from erofsgen.profile.guess.command import Command
from erofsgen.profile.guess.guess import guess, guessed_profile
from erofsgen.profile.guess.rounds import Piece
from erofsgen.profile.naming import command_name
from erofsgen.profile.profile import Profile
from erofsgen.store.base import Descriptor, Store
from erofsgen.store.image import Image

BUDGET: Final = 1 << 30
"""Bytes that are guessed at most."""

_logger: Final = logging.getLogger(__name__)


def lay_beside(store: Store, name: str, manifest: Descriptor) -> bool:
    """Lay what is guessed of the image's own command beside it, unless a profile of that is there. True: it was laid.

    Within :meth:`Store.building`.
    """
    try:
        image = Image(store, name, manifest)
        command = Command.of(image.config)
        there = beside.load(store, manifest.digest)
        if not command.argv or any(profile.command == command_name(command.argv) for profile in there):
            return False
        profile = guessed(image, command)
        if len(profile.rows):
            beside.write(store, manifest, [*there, profile])
        return bool(len(profile.rows))
    except ErofsgenError as error:
        _logger.warning("%s: nothing is guessed of what it will read: %s", name, error)
        return False


def guessed(image: Image, command: Command) -> Profile:
    """What heuristics expect ``command`` to read of ``image``. Raises what reading the image does."""
    guesses = guess(image.index, lambda pieces: _read(image, pieces), command, budget=BUDGET)
    return guessed_profile(guesses, Chunks(image.index), [pack.hex for pack in image.packs], command_name(command.argv))


def _read(image: Image, pieces: Sequence[Piece]) -> list[bytes | None]:
    """In the order of the packs, so that each frame is opened once."""
    parts = []
    for number, piece in enumerate(pieces):
        end = piece.offset + piece.length
        for offset, length, device, start in piece.node.extents():
            first, last = max(offset, piece.offset), min(offset + length, end)
            if first < last:
                parts.append((device or 0, start + first - offset, last - first, number, first))
    found: list[list[tuple[int, bytes]]] = [[] for _ in pieces]
    for device, start, length, number, offset in sorted(parts):
        data = image.pack_reader(device).read(start, length) if device else bytes(length)
        found[number].append((offset, data))
    return [b"".join(data for _, data in sorted(of_piece)) for of_piece in found]
