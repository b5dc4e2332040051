"""Paths inside an image, resolved as the kernel would in a mount of it with the image's root as ``/``."""

from __future__ import annotations

import stat
from typing import Final

from erofsgen.erofs.node import Node
from erofsgen.erofs.reader import Index
from erofsgen.errors import NotFoundError

SYMLINK_LIMIT: Final = 40
"""Symbolic links followed in one path, the kernel's MAXSYMLINKS (include/linux/namei.h)."""


def resolve(index: Index, path: bytes, *, follow: bool = True) -> tuple[bytes, Node]:
    """The file that ``path`` leads to and its path without links; a last symbolic link is followed with ``follow``.

    Absolute and relative paths both start at the root and ``..`` never leaves it.
    Raises NotFoundError (no such file, a component is no directory, too many links).
    """
    parents: list[tuple[bytes, Node]] = [(b"", index.root)]
    waiting = _components(path)
    links = 0
    while waiting:
        name = waiting.pop()
        directory, node = parents[-1]
        if not stat.S_ISDIR(node.mode):
            raise _missing(path, "not a directory", directory)
        if name == b".":
            continue
        if name == b"..":
            if len(parents) > 1:
                parents.pop()
            continue
        child = node.child(name)
        here = directory + b"/" + name if directory else name
        if child is None:
            raise _missing(path, "no such file or directory", here)
        if stat.S_ISLNK(child.mode) and (follow or waiting):
            links += 1
            if links > SYMLINK_LIMIT:
                raise _missing(path, "too many levels of symbolic links", here)
            target = child.readlink()
            waiting += _components(target)
            if target.startswith(b"/"):
                del parents[1:]
            continue
        parents.append((here, child))
    return parents[-1]


def _components(path: bytes) -> list[bytes]:
    """Last first. A trailing slash asks for a directory."""
    parts = [part for part in path.split(b"/") if part]
    if parts and path.endswith(b"/"):
        parts.append(b".")
    return parts[::-1]


def _missing(path: bytes, what: str, where: bytes) -> NotFoundError:
    shown = path.decode("utf-8", "surrogateescape")
    place = "" if where == path.strip(b"/") else f" (at /{where.decode('utf-8', 'surrogateescape')})"
    return NotFoundError(f"{shown}: {what}{place}", hint="see `erofsgen ls IMAGE`")
