"""What is to be explained: a file or all files below a directory, and the places of their chunks."""

from __future__ import annotations

import stat
from collections import defaultdict
from collections.abc import Iterator
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from erofsgen.erofs.node import Node
from erofsgen.host.explain.facts import Inode, Kind
from erofsgen.pack.format import BLOCK

_KINDS: Final[dict[int, Kind]] = {
    stat.S_IFREG: "regular file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symbolic link",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
}


class Piece(NamedTuple):
    """A chunk of a file, or a hole: ``length`` bytes at ``offset`` of it, at ``start`` of the device in ``slot``."""

    offset: int
    length: int
    slot: int | None
    start: int


class Subject:
    """What is at ``path``, which is ``node``; or, of a directory, all files below it, hard links once.

    ``pieces``: a file's, in order; none of a directory. ``runs``: (start, length) of everything in each slot,
    neighbouring chunks as one. ``nids``: the files' inodes.
    """

    def __init__(self, path: bytes, node: Node) -> None:
        self.inode = _inode(path, node)
        self.nids: set[int] = set()
        self.bytes = self.inline = self.holes = 0
        self.pieces: list[Piece] = []
        self.runs: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
        self._chunks: defaultdict[int, list[int]] = defaultdict(list)
        if stat.S_ISDIR(node.mode):
            for below in _files(node):
                self._add(below, detail=False)
        elif stat.S_ISREG(node.mode):
            self._add(node, detail=True)

    @property
    def files(self) -> int:
        """How many files there are."""
        return len(self.nids)

    @property
    def chunks(self) -> dict[int, npt.NDArray[np.int64]]:
        """For each slot the blocks at which chunks begin, each once, in order."""
        return {slot: np.unique(np.array(blocks, np.int64)) for slot, blocks in self._chunks.items()}

    def _add(self, node: Node, *, detail: bool) -> None:
        if node.nid in self.nids:
            return
        self.nids.add(node.nid)
        self.bytes += node.size
        self.inline += len(node.inline() or b"")
        for offset, length, slot, start in node.extents():
            if not slot:  # none of our indexes has file data of several blocks
                self.holes += length
                if detail:
                    self.pieces.append(Piece(offset, length, None, 0))
                continue
            self.runs[slot].append((start, length))
            chunk = node.chunk_size or length
            self._chunks[slot] += range(start // BLOCK, -(-(start + length) // BLOCK), max(1, chunk // BLOCK))
            if detail:
                self.pieces += [
                    Piece(offset + done, min(chunk, length - done), slot, start + done)
                    for done in range(0, length, chunk)
                ]


def _files(directory: Node) -> Iterator[Node]:
    """All regular files below a directory; a hard-linked one as often as it has names."""
    seen = {directory.nid}
    below = [directory]
    while below:
        for _, child in below.pop().children():
            if stat.S_ISREG(child.mode):
                yield child
            elif stat.S_ISDIR(child.mode) and child.nid not in seen:
                seen.add(child.nid)
                below.append(child)


def _inode(path: bytes, node: Node) -> Inode:
    return Inode(
        path=path,
        kind=_KINDS.get(stat.S_IFMT(node.mode), "other"),
        nid=node.nid,
        mode=node.mode,
        uid=node.uid,
        gid=node.gid,
        nlink=node.nlink,
        size=node.size,
        mtime=node.mtime,
        chunk_size=node.chunk_size if stat.S_ISREG(node.mode) else None,
    )
