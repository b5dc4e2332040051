"""A tree as tables: inodes numbered in the order in which they are laid out, directories cut into blocks.

The order keeps what is used together close together: a directory's entries are followed by the inodes they name,
and only then come the subdirectories' entries, depth first.
"""

from __future__ import annotations

import os
import stat
from bisect import bisect_right
from itertools import accumulate, pairwise
from typing import Final

from erofsgen.erofs.format import BLOCK_SIZE, DIRENT, NAME_MAX, PATH_LIMIT
from erofsgen.erofs.tree import Inode, walk
from erofsgen.errors import FormatError, UnsupportedError


class TreeTable:
    """The tables. Inode numbers are positions in ``inodes``; the root is 0.

    ``names`` and ``targets`` hold every directory entry of the image, "." and ".." included: a name and the number of
    the inode it names. A directory's entries are consecutive and in byte order.

    Raises FormatError (a name no directory can hold, a directory in two places), UnsupportedError (a name or a path
    that is too long).
    """

    def __init__(self, root: Inode) -> None:
        if not root.is_dir:
            raise FormatError("the root is not a directory")
        self.root = root
        self.inodes: list[Inode] = [root]
        self.nlink: list[int] = [2]
        self.names: list[bytes] = []
        self.targets: list[int] = []
        self.directories: list[int] = []
        """Inode numbers of the directories, in the order of their entries."""
        self.blocks: list[int] = [0]
        """For each directory the number of its first block of entries; and the number of blocks."""
        self.ends: list[int] = [0]
        """0, then for each block the number of the entry behind its last one."""
        self.used: list[int] = []
        """For each block its bytes in use, not counting what is left of it behind the last name."""
        self._number(root)

    def _number(self, root: Inode) -> None:
        inodes, nlink, targets = self.inodes, self.nlink, self.targets
        numbers = {id(root): 0}
        stack = [(0, 0, 0)]
        while stack:
            number, parent, path = stack.pop()
            if path > PATH_LIMIT:
                raise UnsupportedError(
                    f"{self.path(inodes[number])}: a path of {path} bytes, {PATH_LIMIT} is the limit"
                )
            children = inodes[number].children or {}
            names = [*children, b".", b".."]
            names.sort()
            size = self._check_names(children, names)
            subdirectories = []
            for name in names:
                child = children.get(name)
                if child is None:
                    targets.append(number if name == b"." else parent)
                    continue
                known = numbers.setdefault(id(child), len(inodes))
                targets.append(known)
                if known == len(inodes):
                    inodes.append(child)
                    if child.mode & _S_IFMT == stat.S_IFDIR:
                        nlink.append(2)
                        nlink[number] += 1
                        subdirectories.append((known, number, path + (path > 0) + len(name)))
                    else:
                        nlink.append(1)
                elif child.is_dir:
                    raise FormatError(f"{self.path(child)}: a directory in two places")
                else:
                    nlink[known] += 1
            self.names += names
            self.directories.append(number)
            if size <= BLOCK_SIZE:
                self.ends.append(len(targets))
                self.used.append(size)
            else:
                self._cut(names, len(targets) - len(names))
            self.blocks.append(len(self.used))
            subdirectories.reverse()
            stack += subdirectories

    def _check_names(self, children: dict[bytes, Inode], names: list[bytes]) -> int:
        """Bytes that these entries take without padding."""
        joined = b"/".join(names)
        if len(max(names, key=len)) > NAME_MAX:
            name, child = next(item for item in children.items() if len(item[0]) > NAME_MAX)
            raise UnsupportedError(f"{self.path(child)}: a name of {len(name)} bytes, {NAME_MAX} is the limit")
        if joined.count(b"/") != len(names) - 1 or b"\0" in joined or not _RESERVED.isdisjoint(children):
            name, child = next(
                (name, child) for name, child in children.items() if name in _RESERVED or b"/" in name or b"\0" in name
            )
            raise FormatError(f"{self.path(child)}: {name!r} cannot be a file name")
        return len(joined) + 1 + len(names) * (DIRENT.size - 1)

    def _cut(self, names: list[bytes], first: int) -> None:
        """Fill blocks with entries in order. ``first`` is the number of the first of them."""
        ends = list(accumulate([DIRENT.size + len(name) for name in names]))
        start = base = 0
        while start < len(names):
            start = bisect_right(ends, base + BLOCK_SIZE, lo=start)
            self.ends.append(first + start)
            self.used.append(ends[start - 1] - base)
            base = ends[start - 1]

    def directory_sizes(self) -> list[int]:
        """i_size of each directory."""
        spans = pairwise(self.blocks)
        return [(stop - start - 1) * BLOCK_SIZE + self.used[stop - 1] for start, stop in spans]

    def path(self, inode: Inode) -> str:
        """The first path of an inode, as messages show it."""
        seen: set[int] = set()
        for path, other in walk(self.root):
            if other is inode:
                return shown(path)
            if other.children is not None and id(other) in seen:
                break  # the tree is none; walking on might not end
            seen.add(id(other))
        return "a file"


def shown(path: bytes) -> str:
    """A path for a message: from the root, and shortened in the middle if it is very long."""
    text = "/" + os.fsdecode(path)
    return text if len(text) <= 2 * _SHOWN else f"{text[:_SHOWN]}...{text[-_SHOWN:]}"


_SHOWN: Final = 200
_S_IFMT: Final = stat.S_IFMT(0xFFFF)
_RESERVED: Final = frozenset({b"", b".", b".."})
