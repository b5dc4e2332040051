"""Paths of an image, looked up many times: by a program in it, so that symbolic links lead nowhere else."""

from __future__ import annotations

import stat
from typing import Final, NamedTuple

from erofsgen.erofs.node import Node
from erofsgen.erofs.reader import Index
from erofsgen.errors import ErofsgenError
from erofsgen.store.paths import resolve

_ODD: Final = (b"", b".", b"..")
_DEPTH: Final = 100
"""Directories on the way to one that is looked up step by step; deeper ones are found all the same."""


class File(NamedTuple):
    """A regular file: its path from the image's root, without links and leading slash, and its inode."""

    path: bytes
    node: Node


class Directory(NamedTuple):
    """A directory: its path as :attr:`File.path`, and the inode number of each name in it."""

    path: bytes
    names: dict[bytes, int]


class Tree:
    """Looks up what it has looked up before without walking. Damaged places of the index hold no files."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._directories: dict[bytes, Directory | None] = {}
        self._files: dict[bytes, File | None] = {}

    def directory(self, path: bytes) -> Directory | None:
        """The directory that ``path`` leads to, None if none."""
        path = path.strip(b"/")
        try:
            return self._directories[path]
        except KeyError:
            found = self._directories[path] = self._find_directory(path)
            return found

    def _find_directory(self, path: bytes) -> Directory | None:
        try:
            if not path:
                return self._listed(b"", self._index.root)
            above, _, name = path.rpartition(b"/")
            directory = self.directory(above) if name not in _ODD and path.count(b"/") < _DEPTH else None
            nid = directory.names.get(name) if directory else None
            if directory is not None:
                if nid is None:
                    return None
                real, node = join(directory.path, name), self._index.node(nid)
                if stat.S_ISDIR(node.mode) and real == path:
                    return self._listed(path, node)
                if not stat.S_ISLNK(node.mode) and not stat.S_ISDIR(node.mode):
                    return None
            real, node = resolve(self._index, path)
            if not stat.S_ISDIR(node.mode):
                return None
            return self._listed(path, node) if real == path else self.directory(real)
        except ErofsgenError:
            return None

    def _listed(self, path: bytes, node: Node) -> Directory:
        return Directory(path, {name: nid for name, nid, _ in node.listdir()})

    def file(self, path: bytes) -> File | None:
        """The regular file that ``path`` leads to, None if none."""
        path = path.strip(b"/")
        try:
            return self._files[path]
        except KeyError:
            found = self._files[path] = self._find_file(path)
            return found

    def _find_file(self, path: bytes) -> File | None:
        above, _, name = path.rpartition(b"/")
        directory = self.directory(above)
        nid = directory.names.get(name) if directory else None
        if directory is None or nid is None:
            return None
        try:
            real, node = join(directory.path, name), self._index.node(nid)
            if stat.S_ISLNK(node.mode):
                real, node = resolve(self._index, real)
        except ErofsgenError:
            return None
        return File(real, node) if stat.S_ISREG(node.mode) else None

    def names(self, path: bytes) -> list[bytes]:
        """The names in a directory, in their order; none if it is none."""
        directory = self.directory(path)
        return list(directory.names) if directory else []


def join(*parts: bytes) -> bytes:
    """A path; an absolute part discards those before it, as in ``os.path.join``. No leading slash."""
    path = b""
    for part in parts:
        path = part if part.startswith(b"/") or not path else path.rstrip(b"/") + b"/" + part
    return path.strip(b"/")
