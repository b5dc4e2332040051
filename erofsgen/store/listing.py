"""Directory listings of an image, as rows of plain facts."""

from __future__ import annotations

import stat
from collections.abc import Iterator

import msgspec

from erofsgen.erofs.node import Node


class Row(msgspec.Struct, frozen=True):
    """One file. ``path`` is from the image's root, without a leading slash; ``target`` is a symbolic link's, else
    None; ``mtime`` counts nanoseconds."""

    path: bytes
    name: bytes
    mode: int
    nlink: int
    uid: int
    gid: int
    size: int
    rdev: int
    mtime: int
    target: bytes | None


def rows(path: bytes, node: Node, *, recursive: bool = False) -> Iterator[tuple[bytes, list[Row]]]:
    """(directory, its rows) for ``node``, and for all directories below with ``recursive``; a file is its own row."""
    if not stat.S_ISDIR(node.mode):
        yield path.rpartition(b"/")[0], [_row(path, path.rpartition(b"/")[2], node)]
        return
    stack = [(path, node)]
    while stack:
        directory, node = stack.pop()
        prefix = directory + b"/" if directory else b""
        children = [(prefix + name, name, child) for name, child in node.children()]
        yield directory, [_row(*child) for child in children]
        if recursive:
            stack.extend((path, child) for path, _, child in reversed(children) if stat.S_ISDIR(child.mode))


def _row(path: bytes, name: bytes, node: Node) -> Row:
    target = node.readlink() if stat.S_ISLNK(node.mode) else None
    return Row(
        path=path,
        name=name,
        mode=node.mode,
        nlink=node.nlink,
        uid=node.uid,
        gid=node.gid,
        size=node.size,
        rdev=node.rdev,
        mtime=node.mtime,
        target=target,
    )
