"""Which chunks of an image go to its hot pack, and in what order. Pure: numbers in, numbers out.

Chunks that more commands touch come first, then those of the same commands stand together, each in the order of first
touch. So every command's start is one range at the pack's beginning and a few more behind it, and with one command it
is the whole pack.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from erofsgen.erofs.tree import BLOCK, HOLE, Inode, walk

Integers = npt.NDArray[np.int64]

WHOLE_SIZE: Final = 16 << 20
WHOLE_SHARE: Final = 0.9
"""A file of this many bytes at least, of which a command touches this share, is read whole: weights. It is one range
where it is already."""


class Touched(NamedTuple):
    """What one command touches: ``numbers`` of chunks, each once, in the order of first touch, and ``first``, the
    milliseconds from the mount to it."""

    numbers: Integers
    first: npt.NDArray[np.float64]


@dataclass(frozen=True)
class HotSet:
    """``order``: the chunks in the order of the hot pack, of which the first ``shared`` are every command's. ``whole``
    and ``whole_bytes``: files that are read whole and stay where they are. ``skipped_bytes``: of chunks that did not
    fit. Bytes are those of chunks, each counted once."""

    order: Integers
    shared: int
    whole: int
    whole_bytes: int
    skipped_bytes: int


def choose(touched: Sequence[Touched], lengths: Integers, files: Sequence[Integers], max_bytes: int) -> HotSet:
    """Choose from what commands touch. ``lengths`` are bytes by number of chunk; ``files`` the distinct chunks of each
    large file, see :func:`large_files`; ``max_bytes`` of the hot pack's device are not exceeded."""
    count = len(lengths)
    first = np.full((len(touched), count), np.nan)
    rank = np.zeros((len(touched), count), np.int64)
    for row, command in enumerate(touched):
        first[row, command.numbers] = command.first
        rank[row, command.numbers] = np.arange(len(command.numbers))
    touches = ~np.isnan(first)
    whole = [chunks for chunks in files if touches[:, chunks].mean(axis=1).max(initial=0) >= WHOLE_SHARE]
    stays = np.zeros(count, np.bool_)
    for chunks in whole:
        stays[chunks] = True
    hot = np.flatnonzero(touches.any(axis=0) & ~stays)

    if not len(hot):
        return HotSet(hot, 0, len(whole), int(lengths[stays].sum()), 0)

    commands = touches[:, hot].sum(axis=0)
    when = np.nansum(first[:, hot], axis=0) / commands
    _, sets = np.unique(~touches[:, hot], axis=1, return_inverse=True)  # of commands, the first one's first
    sets = sets.reshape(-1)
    tie = rank[:, hot][touches[:, hot].argmax(axis=0), np.arange(len(hot))]
    by_worth = np.lexsort((tie, sets, when, -commands))
    padded = (lengths[hot[by_worth]] + BLOCK - 1) & -BLOCK
    order = by_worth[: int(np.searchsorted(np.cumsum(padded), max_bytes, side="right"))]
    order = order[np.lexsort((tie[order], when[order], sets[order], -commands[order]))]
    return HotSet(
        order=hot[order],
        shared=int((commands[order] == len(touched)).sum()),
        whole=len(whole),
        whole_bytes=int(lengths[stays].sum()),
        skipped_bytes=int(lengths[hot].sum() - lengths[hot[order]].sum()),
    )


def large_files(root: Inode, same: Integers) -> list[Integers]:
    """The distinct chunks of every file that may be one to be left alone. ``same``: as
    :class:`~erofsgen.build.imagechunks.ImageChunks` has it."""
    files: dict[int, Integers] = {}
    for _, inode in walk(root):
        if inode.size >= WHOLE_SIZE and inode.chunks and id(inode) not in files:
            chunks = np.unique(same[np.array(inode.chunks, np.int64)])
            files[id(inode)] = chunks[chunks != HOLE]
    return [chunks for chunks in files.values() if len(chunks)]
