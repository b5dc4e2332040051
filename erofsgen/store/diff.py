"""What differs between two images.

Content is compared by what is known about it before any of it is read: files that map the same bytes of the same pack
are equal; files cut alike are as equal as their chunks' digests, by the packs' chunk dictionaries; only what is cut
differently is read. Dictionaries are taken at their word here: ``erofsgen check`` is what verifies them.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from functools import cached_property
from typing import Any, Final, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from erofsgen.erofs.node import Extent, Node
from erofsgen.erofs.tree import BLOCK
from erofsgen.pack.toc import read_dictionary
from erofsgen.progress import SILENT, Progress, Task
from erofsgen.store.image import Image

_PIECE: Final = 1 << 20


class Change(msgspec.Struct, frozen=True):
    """One path that differs. ``attributes`` maps the name of what changed to (old, new); ``content`` is about the
    bytes of regular files. Added and removed paths have neither."""

    kind: Literal["added", "removed", "changed"]
    path: bytes
    attributes: dict[str, tuple[Any, Any]] = {}
    content: bool = False


def diff(old: Image, new: Image, *, progress: Progress = SILENT) -> list[Change]:
    """Every path that differs, in byte order of the directories walked; what is below a path that one side lacks is
    listed, too. Raises what reading the images raises."""
    with progress.task(f"comparing {old.name} and {new.name}") as task:
        return list(_Diff(old, new, task).changes())


class _Diff:
    def __init__(self, old: Image, new: Image, task: Task) -> None:
        self._contents = _Contents(old, new, task)
        self._old = old
        self._new = new
        self._names: tuple[dict[int, list[bytes]], dict[int, list[bytes]]] = (_names(old), _names(new))

    def changes(self) -> Iterator[Change]:
        stack: list[tuple[bytes, Node | None, Node | None]] = [(b"", self._old.index.root, self._new.index.root)]
        while stack:
            path, old, new = stack.pop()
            if old is None:
                yield Change("added", path)
            elif new is None:
                yield Change("removed", path)
            else:
                change = self._change(path, old, new)
                if change is not None:
                    yield change
            stack.extend(reversed(list(_children(path, old, new))))

    def _change(self, path: bytes, old: Node, new: Node) -> Change | None:
        attributes = dict(_attributes(old, new))
        links = self._links(0, path, old), self._links(1, path, new)
        if links[0] != links[1]:
            attributes["links"] = links
        both_regular = stat.S_ISREG(old.mode) and stat.S_ISREG(new.mode)
        content = both_regular and (old.size != new.size or not self._contents.equal(old, new))
        return Change("changed", path, attributes, content) if attributes or content else None

    def _links(self, side: int, path: bytes, node: Node) -> list[bytes]:
        """The other names of a file."""
        return [name for name in self._names[side].get(node.nid, ()) if name != path]


def _names(image: Image) -> dict[int, list[bytes]]:
    """The paths of every file that has several."""
    names: dict[int, list[bytes]] = {}
    for path, node in image.index.walk():
        if node.nlink > 1 and not stat.S_ISDIR(node.mode):
            names.setdefault(node.nid, []).append(path)
    return names


def _children(path: bytes, old: Node | None, new: Node | None) -> Iterator[tuple[bytes, Node | None, Node | None]]:
    before = dict(old.children()) if old is not None and stat.S_ISDIR(old.mode) else {}
    after = dict(new.children()) if new is not None and stat.S_ISDIR(new.mode) else {}
    prefix = path + b"/" if path else b""
    for name in sorted(before.keys() | after.keys()):
        yield prefix + name, before.get(name), after.get(name)


def _attributes(old: Node, new: Node) -> Iterator[tuple[str, tuple[Any, Any]]]:
    kind = stat.S_IFMT(old.mode)
    same_kind = kind == stat.S_IFMT(new.mode)
    if not same_kind:
        yield "type", (old.mode, new.mode)
    if stat.S_IMODE(old.mode) != stat.S_IMODE(new.mode):
        yield "mode", (stat.S_IMODE(old.mode), stat.S_IMODE(new.mode))
    for name in ("uid", "gid", "mtime"):
        before, after = getattr(old, name), getattr(new, name)
        if before != after:
            yield name, (before, after)
    if same_kind and kind == stat.S_IFREG and old.size != new.size:
        yield "size", (old.size, new.size)
    if same_kind and kind in (stat.S_IFCHR, stat.S_IFBLK) and old.rdev != new.rdev:
        yield "device", (old.rdev, new.rdev)
    if same_kind and kind == stat.S_IFLNK and old.readlink() != new.readlink():
        yield "target", (old.readlink(), new.readlink())
    xattrs = dict(old.xattrs()), dict(new.xattrs())
    if xattrs[0] != xattrs[1]:
        yield "xattrs", xattrs


class _Contents:
    """Compares files of equal size, and remembers pairs of files it has compared: hard links come again."""

    def __init__(self, old: Image, new: Image, task: Task) -> None:
        self._sides = (_Side(old), _Side(new))
        self._task = task
        self._known: dict[tuple[int, int], bool] = {}

    def equal(self, old: Node, new: Node) -> bool:
        pair = (old.nid, new.nid)
        known = self._known.get(pair)
        if known is None:
            known = self._known[pair] = self._compare(old, new)
        return known

    def _compare(self, old: Node, new: Node) -> bool:
        before, after = self._sides
        inline = old.inline(), new.inline()
        if all(inline):
            return inline[0] == inline[1]
        if not any(inline):
            extents = list(old.extents()), list(new.extents())
            if before.places(extents[0]) == after.places(extents[1]):
                return True
            cuts = before.cut(extents[0]), after.cut(extents[1])
            if cuts[0] is not None and cuts[0] == cuts[1]:
                return True
            if cuts[0] is not None and cuts[1] is not None and _differ(cuts[0], cuts[1]):
                return False
        return self._read_both(old, new)

    def _read_both(self, old: Node, new: Node) -> bool:
        first, second = (
            _rechunk(side.image.read(node, piece=_PIECE)) for side, node in zip(self._sides, (old, new), strict=True)
        )
        for a, b in zip(first, second, strict=True):
            self._task.advance(len(a))
            if a != b:
                return False
        return True


Cut = list[tuple[int, bytes | None]]
"""A file as (length, BLAKE3) per chunk; None for a hole."""


def _differ(old: Cut, new: Cut) -> bool:
    """Whether two cuts prove that contents differ: alike in lengths, and some chunk has another digest."""
    return [length for length, _ in old] == [length for length, _ in new] and any(
        a is not None and b is not None and a != b for (_, a), (_, b) in zip(old, new, strict=True)
    )


class _Side:
    """One image and the chunk dictionaries of its packs."""

    def __init__(self, image: Image) -> None:
        self.image = image
        self._dictionaries: dict[int, _Chunks] = {}

    def places(self, extents: list[Extent]) -> list[tuple[int, int, str | None, int]]:
        """Extents with packs instead of device slots: comparable between images. Neighbours are joined."""
        packs = self.image.packs
        joined: list[tuple[int, int, str | None, int]] = []
        for offset, length, device, start in extents:
            pack = None if device is None else packs[device - 1].digest
            start = 0 if device is None else start
            if joined:
                at, before, last, where = joined[-1]
                if last == pack and at + before == offset and (pack is None or where + before == start):
                    joined[-1] = (at, before + length, pack, where)
                    continue
            joined.append((offset, length, pack, start))
        return joined

    def cut(self, extents: list[Extent]) -> Cut | None:
        """The file's chunks; None where extents are not made of whole chunks."""
        cut: Cut = []
        for _, length, device, start in extents:
            if device is None:
                cut.append((length, None))
                continue
            chunks = self._chunks(device).cover(start, length)
            if chunks is None:
                return None
            cut += chunks
        return cut

    def _chunks(self, device: int) -> _Chunks:
        if device not in self._dictionaries:
            self._dictionaries[device] = _Chunks(self.image, device)
        return self._dictionaries[device]


class _Chunks:
    """A pack's chunk dictionary, searchable by place."""

    def __init__(self, image: Image, device: int) -> None:
        pack = image.packs[device - 1]
        self._image = image
        self._digest = pack.digest
        self._toc = image.pack_reader(device).toc

    @cached_property
    def _table(self) -> npt.NDArray[np.void]:
        store = self._image.store
        what = f"pack {self._digest}"
        table = read_dictionary(lambda offset, length: store.read(self._digest, offset, length), self._toc, what=what)
        return table[np.argsort(table["block"], kind="stable")]

    def cover(self, start: int, length: int) -> Cut | None:
        """The chunks that make up device bytes ``[start, start + length)``; None where they do not fit."""
        table = self._table
        first = int(np.searchsorted(table["block"], start // BLOCK))
        cut: Cut = []
        end = start + length
        for row in table[first:]:
            if start >= end:
                break
            size = int(row["length"])
            if int(row["block"]) * BLOCK != start or start + size > end:
                return None
            cut.append((size, row["digest"].tobytes()))
            start += size
        return cut if start == end else None


def _rechunk(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """The same bytes in pieces of exactly ``_PIECE``, the last one shorter."""
    buffer = bytearray()
    for piece in pieces:
        buffer += piece
        while len(buffer) >= _PIECE:
            yield bytes(buffer[:_PIECE])
            del buffer[:_PIECE]
    if buffer:
        yield bytes(buffer)
