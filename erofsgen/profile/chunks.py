"""The chunks of an image as its index names them: whose they are, and which of them a range of a device touches.

The order is that of the devices, so that a range is found by bisection. A chunk that several files share is the first
file's that the index names.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from typing import Final

import numpy as np
import numpy.typing as npt

from erofsgen.erofs.node import Node
from erofsgen.erofs.reader import Index

BLOCK: Final = 4096

CHUNK: Final = np.dtype([
    ("device", "<u2"), ("block", "<u4"), ("length", "<u4"), ("file", "<u4"), ("offset", "<u8"),
])  # fmt: skip
"""A chunk: device slot (1..N), 4 KiB block there, length in bytes, number of its file, its offset in the file."""


class Chunks:
    """All chunks of ``index``. ``table``: an array of :data:`CHUNK` in order of device and block, each place once.

    ``paths`` are the files', from the image's root without a leading slash; ``sizes`` are theirs in bytes.
    """

    def __init__(self, index: Index) -> None:
        self.index = index
        self.paths: list[bytes] = []
        self.sizes: list[int] = []
        rows: list[tuple[int, int, int, int, int]] = []
        seen: set[int] = set()
        for path, node in walk(index):
            if node.nid in seen or not stat.S_ISREG(node.mode):
                continue
            seen.add(node.nid)
            number = len(self.paths)
            chunk = node.chunk_size or 0
            found = [
                (device, (start + done) // BLOCK, min(chunk, length - done), number, offset + done)
                for offset, length, device, start in node.extents()
                if device and chunk
                for done in range(0, length, chunk)
            ]
            if found:
                self.paths.append(path)
                self.sizes.append(node.size)
                rows += found
        table = np.array(rows, CHUNK)
        table = table[np.lexsort((table["file"], table["block"], table["device"]))]
        places = table[["device", "block"]]
        if len(table):
            table = table[np.concatenate(([True], places[1:] != places[:-1]))]
        self.table: npt.NDArray[np.void] = table
        self._keys = table["device"].astype(np.int64) << 32 | table["block"]

    def touched(self, device: int, offset: int, length: int) -> range:
        """Numbers of the chunks that device bytes ``[offset, offset + length)`` touch."""
        base = device << 32
        first = int(np.searchsorted(self._keys, base | offset // BLOCK, side="right")) - 1
        last = int(np.searchsorted(self._keys, base | (offset + length - 1) // BLOCK, side="right"))
        if first < 0 or not self._reaches(first, device, offset):
            first += 1
        return range(first, last)

    def _reaches(self, number: int, device: int, offset: int) -> bool:
        chunk = self.table[number]
        return bool(chunk["device"] == device and int(chunk["block"]) * BLOCK + int(chunk["length"]) > offset)


def walk(index: Index) -> Iterator[tuple[bytes, Node]]:
    """Every file of an index with its path, directories in the order of their names, depth first."""
    stack: list[tuple[bytes, Node]] = [(b"", index.root)]
    while stack:
        directory, node = stack.pop()
        below: list[tuple[bytes, Node]] = []
        for name, child in node.children():
            path = directory + b"/" + name if directory else name
            yield path, child
            if stat.S_ISDIR(child.mode):
                below.append((path, child))
        stack.extend(reversed(below))
