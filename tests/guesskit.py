"""Small images for the heuristics, made of nothing but an index: contents come from a dictionary."""

from __future__ import annotations

import stat
from collections.abc import Sequence

import numpy as np

from erofsgen.erofs.reader import Index
from erofsgen.erofs.tree import BLOCK, CHUNK_DTYPE, Device, Inode
from erofsgen.erofs.writer import write_index
from erofsgen.profile.guess.command import Command
from erofsgen.profile.guess.guess import Guess, guess
from erofsgen.profile.guess.rounds import Piece

CHUNK = 64 << 10
MTIME = 1_700_000_000
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "HOME": "/root"}


class World:
    """An image of ``files``: bytes, or a string for a symbolic link. Everything may be executed."""

    def __init__(self, files: dict[str, bytes | str]) -> None:
        self.contents: dict[int, bytes] = {}
        self.rounds: list[list[Piece]] = []
        root = Inode(stat.S_IFDIR | 0o755, children={})
        places = [(0, 0)]
        for path, content in files.items():
            *above, leaf = path.encode().split(b"/")
            directory = root
            for name in above:
                directory = directory.children.setdefault(name, Inode(stat.S_IFDIR | 0o755, children={}))
            directory.children[leaf] = inode(content, places)
        table = np.zeros(len(places), CHUNK_DTYPE)
        table["device"], table["block"] = np.array(places).T
        blocks = places[-1][1] + CHUNK // BLOCK
        self.index = Index(bytes(write_index(root, table, [Device("ab" * 32, blocks)], chunk_size=CHUNK)))
        for path, content in files.items():
            if isinstance(content, bytes):
                self.contents[self.index.lookup(path.encode()).nid] = content

    def read(self, pieces: Sequence[Piece]) -> list[bytes | None]:
        self.rounds.append(list(pieces))
        for node, offset, length in pieces:
            assert 0 <= offset < offset + length <= node.size
        return [self.contents[node.nid][offset : offset + length] for node, offset, length in pieces]

    def guess(self, *argv: str, cwd: str = "/", budget: int = 1 << 30, **environment: str) -> list[Guess]:
        command = Command(argv, {**ENVIRONMENT, **environment}, cwd)
        return guess(self.index, self.read, command, budget=budget)

    def paths(self, *argv: str, cwd: str = "/", **environment: str) -> list[str]:
        """The paths that are guessed, in order."""
        return list(dict.fromkeys(each.path.decode() for each in self.guess(*argv, cwd=cwd, **environment)))


def inode(content: bytes | str, places: list[tuple[int, int]]) -> Inode:
    if isinstance(content, str):
        return Inode(stat.S_IFLNK | 0o777, data=content.encode())
    made = Inode(stat.S_IFREG | 0o755, size=len(content), mtime=MTIME * 10**9)
    if len(content) <= 64:
        made.data = content
        return made
    numbers = []
    for _ in range(0, len(content), CHUNK):
        numbers.append(len(places))
        places.append((1, places[-1][1] + CHUNK // BLOCK))
    made.chunks = tuple(numbers)
    return made
