"""An index as the tree it was written from, to be written again with its chunks in other places.

Written again with every chunk where it was, an index of this version is the same, byte for byte: whatever a writer
decides follows from the tree. So an index that was changed is what a build would have written, with nothing left of
what it was before; and the slots of more devices find their room, which behind the first 8 MiB of an index they could
not (``devt_slotoff`` has 16 bits).
"""

from __future__ import annotations

import stat
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from erofsgen.erofs.format import NULL_ADDR
from erofsgen.erofs.node import Node
from erofsgen.erofs.reader import Index
from erofsgen.erofs.tree import BLOCK, CHUNK_DTYPE, HOLE, Device, Inode
from erofsgen.erofs.writer import write_index
from erofsgen.errors import FormatError, UnsupportedError

_HOLES_MAX: Final = 1 << 26
"""Chunks of files that are one hole, all together: an index names them with a few bytes, a tree does not."""


@dataclass(frozen=True)
class ReadBack:
    """``root``: the tree, with chunk numbers that ``places`` explains, by :data:`~erofsgen.erofs.tree.CHUNK_DTYPE`.
    Every place comes once; number 0 is the hole. ``lengths``: bytes of each chunk. ``chunk_size`` in bytes, None where
    no file has chunks. ``fingerprints``: the files' content digests by ``id`` of their inode, None where the index has
    none."""

    root: Inode
    places: npt.NDArray[np.void]
    lengths: npt.NDArray[np.int64]
    chunk_size: int | None
    fingerprints: dict[int, bytes] | None

    def write(self, places: npt.NDArray[np.void], devices: list[Device]) -> bytes:
        """The index of the same files with chunks at ``places`` on ``devices``.

        Raises what :func:`erofsgen.erofs.writer.write_index` does.
        """
        known = self.fingerprints
        return bytes(
            write_index(
                self.root,
                places,
                devices,
                chunk_size=self.chunk_size or BLOCK,
                fingerprints=None if known is None else lambda inode: known[id(inode)],
            )
        )


def read_back(index: Index) -> ReadBack:
    """The tree of an index.

    Raises FormatError (a damaged index), UnsupportedError (an EROFS image that erofsgen does not write).
    """
    reading = _Reading(index)
    directories: dict[bytes, dict[bytes, Inode]] = {}
    root: Inode | None = None
    for path, node in index.walk():
        inode = reading.inode(node)
        if inode.children is not None:
            directories[path] = inode.children
        if root is None:
            root = inode
        else:
            parent, _, name = path.rpartition(b"/")
            directories[parent][name] = inode
    assert root is not None
    return reading.finish(root)


class _Reading:
    def __init__(self, index: Index) -> None:
        self._inodes: dict[int, Inode] = {}
        self._numbers: dict[int, int] = {}
        """Chunk numbers by device << 32 | block."""
        self._lengths = [0]
        self._hollow: list[Inode] = []
        self._chunk_size: int | None = None
        self._fingerprints: dict[int, bytes] | None = None if index.fingerprint_name is None else {}

    def inode(self, node: Node) -> Inode:
        inode = self._inodes.get(node.nid)
        if inode is not None:
            return inode
        mode = node.mode
        inode = Inode(mode, node.uid, node.gid, node.mtime, 0, node.rdev, b"", tuple(node.xattrs()))
        if stat.S_ISREG(mode):
            self._content(node, inode)
        elif stat.S_ISLNK(mode):
            inode.data = node.readlink()
        elif stat.S_ISDIR(mode):
            inode.children = {}
        self._inodes[node.nid] = inode
        return inode

    def _content(self, node: Node, inode: Inode) -> None:
        inode.size = node.size
        if not node.size:
            return
        if self._fingerprints is not None:
            fingerprint = node.fingerprint()
            if fingerprint is None:
                raise FormatError(f"index: inode {node.nid} has no fingerprint")
            self._fingerprints[id(inode)] = fingerprint
        data = node.inline()
        if data is not None:
            inode.data = data
        else:
            self._map(node, inode)

    def _map(self, node: Node, inode: Inode) -> None:
        extents = node.extents()
        size = node.chunk_size
        if all(extent.device is None for extent in extents):
            self._hollow.append(inode)  # its chunks are as large as they like
            return
        self._chunk_size = size if self._chunk_size is None else self._chunk_size
        if size is None or size != self._chunk_size:
            raise UnsupportedError(f"index: inode {node.nid} has chunks of {size} bytes, others of {self._chunk_size}")
        numbers, lengths = self._numbers, self._lengths
        chunks: list[int] = []
        for _, length, device, start in extents:
            if device is None:
                chunks += [HOLE] * -(-length // size)
                continue
            if not device:
                raise UnsupportedError(f"index: inode {node.nid} has data in the index itself")
            place = device << 32 | start // BLOCK
            while length > 0:
                number = numbers.setdefault(place, len(lengths))
                if number == len(lengths):
                    lengths.append(min(size, length))
                else:
                    lengths[number] = max(lengths[number], min(size, length))
                chunks.append(number)
                place += size // BLOCK
                length -= size
        inode.chunks = tuple(chunks)

    def finish(self, root: Inode) -> ReadBack:
        size = self._chunk_size or max((_whole(inode.size) for inode in self._hollow), default=None)
        left = _HOLES_MAX
        for inode in self._hollow:
            assert size is not None
            count = -(-inode.size // size)
            left -= count
            if left < 0:
                raise UnsupportedError(f"index: files that are holes of more than {_HOLES_MAX} chunks")
            inode.chunks = (HOLE,) * count
        places = np.zeros(len(self._lengths), CHUNK_DTYPE)
        keys = np.fromiter(self._numbers, np.int64, len(self._numbers))
        places["device"][1:] = keys >> 32
        places["block"][1:] = keys & NULL_ADDR
        return ReadBack(root, places, np.array(self._lengths, np.int64), size, self._fingerprints)


def _whole(size: int) -> int:
    """The smallest chunk size that holds ``size`` bytes."""
    return 1 << max((size - 1).bit_length(), BLOCK.bit_length() - 1)
