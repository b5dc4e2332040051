"""Which rows a picture has: one per file or, where there are too many, directories that stand for their lesser files.

What weighs most has a row of its own: the heaviest directory gives up its heaviest entry, again and again, until there
are as many rows as wanted. Packages come out as directories.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class Group(NamedTuple):
    """A row: a file's path, or a directory's, with a slash behind it, that stands for ``files`` files below it."""

    path: bytes
    files: int


def fold(paths: Sequence[bytes], weights: Sequence[int], limit: int) -> tuple[list[Group], npt.NDArray[np.int64]]:
    """At most ``limit`` (1 or more) rows for files at ``paths``, all different. Returns them in no order, and for each
    path the number of its row."""
    if len(paths) <= limit:
        return [Group(path, 1) for path in paths], np.arange(len(paths))
    root = _tree(paths, weights)
    shown: list[_Entry] = []
    folded = [(-root.weight, 0, _single(root))]
    made = 1
    while folded and len(shown) + len(folded) < limit:
        _, _, directory = heapq.heappop(folded)
        child = directory.split()
        # while one is left behind for the one that is taken out, there is a row more each time
        for entry in (child, directory):
            one = _single(entry)
            if one.below:
                heapq.heappush(folded, (-one.weight, made, one))
                made += 1
            else:
                shown.append(one)
    shown += [entry for _, _, entry in folded]
    groups: list[Group] = []
    of = np.zeros(len(paths), np.int64)
    for entry in shown:
        members = list(_members(entry))
        of[members] = len(groups)
        groups.append(Group(entry.path + b"/" if entry.below else entry.path, len(members)))
    return groups, of


class _Entry:
    """A directory or a file. ``below``: what a directory has, the lightest first; ``number``: a file's."""

    __slots__ = ("below", "number", "path", "weight")

    def __init__(self, path: bytes) -> None:
        self.path = path
        self.weight = 0
        self.number = -1
        self.below: list[_Entry] = []

    def split(self) -> _Entry:
        """Take the heaviest entry out."""
        child = self.below.pop()
        self.weight -= child.weight
        return child


def _tree(paths: Sequence[bytes], weights: Sequence[int]) -> _Entry:
    root = _Entry(b"")
    directories = {b"": root}
    for number, (path, weight) in enumerate(zip(paths, weights, strict=True)):
        file = _Entry(path)
        file.number, file.weight = number, weight
        entry = file
        above = path
        while above:
            above = above.rpartition(b"/")[0]
            known = directories.get(above)
            if known is not None:
                known.below.append(entry)
                break
            made = directories[above] = _Entry(above)
            made.below.append(entry)
            entry = made
    # a directory comes after those above it in order of their lengths
    for directory in sorted(directories.values(), key=lambda entry: len(entry.path), reverse=True):
        directory.weight = sum(entry.weight for entry in directory.below)
        directory.below.sort(key=lambda entry: entry.weight)
    return root


def _single(entry: _Entry) -> _Entry:
    """The deepest entry that has all of the files."""
    while len(entry.below) == 1:
        entry = entry.below[0]
    return entry


def _members(entry: _Entry) -> Iterator[int]:
    stack = [entry]
    while stack:
        entry = stack.pop()
        if entry.number >= 0:
            yield entry.number
        stack += entry.below
