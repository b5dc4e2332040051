"""Heuristics on a host: what they read of an image comes through the fill engine, as its readers' data does."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import wait
from typing import Final, NamedTuple

from erofsgen.erofs.reader import Index
from erofsgen.host.cache.cache import CachedImage
from erofsgen.host.cache.packfile import PackFile
from erofsgen.host.fill.engine import Engine
from erofsgen.host.fill.work import Priority
from erofsgen.profile.chunks import Chunks
from erofsgen.profile.guess.command import Command
from erofsgen.profile.guess.guess import guess, guessed_profile
from erofsgen.profile.guess.rounds import Piece
from erofsgen.profile.profile import Profile

_PATIENCE: Final = 30.0
"""Seconds that one round of reads may take: after that the start has read the files itself."""


class _Part(NamedTuple):
    """Bytes of a device that a piece is made of; no device: zeros."""

    file: PackFile | None
    start: int
    length: int


class Reader:
    """Reads pieces of files of an image whose packs are ``files``, in the order of device slots."""

    def __init__(self, engine: Engine, files: Sequence[PackFile]) -> None:
        self._engine = engine
        self._files = files

    def __call__(self, pieces: Sequence[Piece]) -> list[bytes | None]:
        parts = [list(self._parts(piece)) for piece in pieces]
        until = time.monotonic() + _PATIENCE
        wait([
            self._engine.request(file, start, length, priority=Priority.READ_AROUND, deadline=until)
            for of_piece in parts
            for file, start, length in of_piece
            if file is not None
        ])  # fmt: skip
        return [self._bytes(of_piece) for of_piece in parts]

    def _parts(self, piece: Piece) -> Iterator[_Part]:
        end = piece.offset + piece.length
        for offset, length, device, start in piece.node.extents():
            first, last = max(offset, piece.offset), min(offset + length, end)
            if first < last:
                file = self._files[device - 1] if device else None
                yield _Part(file, start + first - offset, last - first)

    def _bytes(self, parts: Sequence[_Part]) -> bytes | None:
        """What is here; None where anything could not be brought."""
        found = []
        for file, start, length in parts:
            if file is None:
                found.append(bytes(length))
                continue
            frames = file.frames(start, length)
            if not file.ready(frames[0], frames[-1]):
                return None
            found.append(os.pread(file.descriptor, length, start))
            if len(found[-1]) != length:
                return None
        return b"".join(found)


def guess_profile(image: CachedImage, command: Command, name: str, reader: Reader, *, budget: int) -> Profile:
    """What heuristics expect ``command`` to read of ``image``, at most ``budget`` bytes; ``name`` is the profile's."""
    index = Index(image.index.read_bytes())
    guesses = guess(index, reader, command, budget=budget)
    return guessed_profile(guesses, Chunks(index), [pack.hex for pack in image.packs], name)
