"""Layers to one tree: OCI image specification, "Image Layer Filesystem Changeset", applied bottom first.

Where the specification is silent, this does what an unpack by containerd or umoci onto a disk leaves behind:

- A whiteout or opaque marker hides what the layers below have, wherever in its own layer it stands.
- A directory over a directory takes the new attributes and keeps its children; anything else replaces what was there.
- Symlinks among an entry's parents are followed inside the image, as the kernel would under ``chroot``; ``..`` stops at
  the root. A dangling one is followed to where its target is then made.
- Parents that no entry made are directories of root with mode 0755 and time 0.
- A hard link shares its target's inode, for all of its names, and its header's attributes are applied to it. The target
  is what the path names at that point of the layer, or else what the layers below had there.
- An entry below something that is no directory: if that came from a lower layer, a directory takes its place, as in an
  overlayfs mount; within one layer it is a contradiction and refused.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from erofsgen.erofs.tree import Inode
from erofsgen.errors import FormatError
from erofsgen.oci.layer import LINK, OPAQUE, WHITEOUT, Entry
from erofsgen.oci.names import show
from erofsgen.oci.xattrs import suited

MAX_LINKS: Final = 255
"""Most symlinks followed for one path, as in containerd."""
MAX_DEPTH: Final = 2048
"""Most directories above a file: what a path of 4095 bytes can name. Symlinks could build deeper trees for free."""

Children = dict[bytes, Inode]
Look = Callable[[bytes, Children, bytes], Inode | None]


class Merger:
    """One tree, made of layers applied in turn. The entries' inodes become the tree's and are changed in place."""

    def __init__(self) -> None:
        self._root = _directory()

    @property
    def root(self) -> Inode:
        """The tree so far."""
        return self._root

    def apply(self, entries: Iterable[Entry], *, what: str = "layer") -> None:
        """Put one more layer on top. ``what`` names it in errors.

        Raises FormatError, naming the entry: a link without target or to a directory, symlink loops, trees too deep,
        a file as parent. The tree is then unusable.
        """
        layer = entries if isinstance(entries, Sequence) else list(entries)
        _Layer(self, layer, what).apply()


class _Layer:
    """The state that lasts while one layer is applied."""

    def __init__(self, merger: Merger, entries: Sequence[Entry], what: str) -> None:
        self._merger = merger
        self._entries = entries
        self._what = what
        root = merger.root.children
        assert root is not None
        self._top: Children = root
        self._own: set[int] | None = None
        # what markers removed, by the directory it was in; the directory is held so that its id stays its own
        self._hidden: dict[int, tuple[Children, Children]] = {}

    def apply(self) -> None:
        markers = [entry for entry in self._entries if entry.op in (WHITEOUT, OPAQUE)]
        if markers:
            self._hide(markers)
        # lexical path to directory; true until a directory or a symlink goes away
        directories: dict[bytes, Children] = {b"": self._top}
        for entry in self._entries:
            inode = entry.inode
            if inode is None:
                continue
            path = entry.path
            parent, _, name = path.rpartition(b"/")
            children = directories.get(parent)
            if children is None:
                children = directories[parent] = self._make_parent(parent, path)
            if entry.op == LINK:
                inode = self._link(entry, inode)
            if not name:
                self._set_root(inode)
                continue
            old = children.get(name)
            if stat.S_ISDIR(inode.mode):
                if old is not None and old.children is not None:
                    inode.children = old.children
                else:
                    if old is not None and stat.S_ISLNK(old.mode):
                        directories = {b"": self._top}
                    inode.children = {}
                    directories[path] = inode.children
            elif old is not None and (old.children is not None or stat.S_ISLNK(old.mode)):
                directories = {b"": self._top}
            children[name] = inode

    def _set_root(self, inode: Inode) -> None:
        if not stat.S_ISDIR(inode.mode):
            raise FormatError(f"{self._what}: an entry replaces the root directory by something else")
        inode.children = self._top
        self._merger._root = inode

    def _hide(self, markers: list[Entry]) -> None:
        """Remove from the tree, which is still that of the layers below, what this layer's markers hide.

        A marker's parents are those of its own layer: where the layer itself replaces or hides a symlink of the layers
        below, nothing behind that symlink is meant.
        """
        put = {entry.path: entry.inode for entry in self._entries if entry.inode is not None}
        whiteouts = {entry.path for entry in markers if entry.op == WHITEOUT}
        opaque = {entry.path for entry in markers if entry.op == OPAQUE}

        def look(above: bytes, children: Children, name: bytes) -> Inode | None:
            path = above + b"/" + name if above else name
            lower = children.get(name)
            own = put.get(path)
            if own is None:
                return None if path in whiteouts or above in opaque else lower
            if not stat.S_ISDIR(own.mode):
                return own
            return lower if lower is not None and lower.children is not None else None

        found: dict[bytes, Children] = {}
        for marker in markers:
            parent, _, name = (marker.path, b"", b"") if marker.op == OPAQUE else marker.path.rpartition(b"/")
            children = found.get(parent)
            if children is None:
                children, missing = self._walk(parent, marker.path, look)
                found[parent] = children = {} if missing else children
            if marker.op == OPAQUE:
                self._hidden.setdefault(id(children), (children, {}))[1].update(children)
                children.clear()
            elif name in children:
                self._hidden.setdefault(id(children), (children, {}))[1][name] = children.pop(name)

    def _make_parent(self, path: bytes, entry: bytes) -> Children:
        """The directory ``path``, symlinks followed, made if need be, for ``entry``."""

        def look(above: bytes, children: Children, name: bytes) -> Inode | None:
            child = children.get(name)
            if child is not None and child.children is None and not stat.S_ISLNK(child.mode) and self._is_own(child):
                where = show(above + b"/" + name if above else name)
                raise FormatError(f"{self._what}: {show(entry)} lies below {where}, which is not a directory")
            return child

        children, missing = self._walk(path, entry, look)
        for name in missing:
            made = children[name] = _directory()
            assert made.children is not None
            children = made.children
        return children

    def _walk(self, path: bytes, entry: bytes, look: Look) -> tuple[Children, list[bytes]]:
        """Follow ``path`` as deep as there are directories: the last one, and the names below it that are missing.

        ``look`` finds a name in a directory; what it gives and is neither directory nor symlink counts as missing.
        """
        trail: list[tuple[bytes, Children]] = [(b"", self._top)]
        missing: list[bytes] = []
        pending = path.split(b"/")[::-1]
        hops = 0
        while pending:
            name = pending.pop()
            if name == b"..":
                if missing:
                    missing.pop()
                elif len(trail) > 1:
                    trail.pop()
                continue
            if not name or name == b".":
                continue
            above, children = trail[-1]
            child = None if missing else look(above, children, name)
            if child is None:
                missing.append(name)
            elif child.children is not None:
                trail.append((above + b"/" + name if above else name, child.children))
            elif stat.S_ISLNK(child.mode):
                hops += 1
                if hops > MAX_LINKS:
                    raise FormatError(f"{self._what}: {show(entry)} lies behind a loop or over {MAX_LINKS} symlinks")
                if child.data.startswith(b"/"):
                    del trail[1:]
                pending += child.data.split(b"/")[::-1]
            else:
                missing.append(name)
        if len(trail) + len(missing) > MAX_DEPTH:
            raise FormatError(f"{self._what}: {show(entry)} is over {MAX_DEPTH} directories deep")
        return trail[-1][1], missing

    def _is_own(self, inode: Inode) -> bool:
        """Whether this layer has brought ``inode``."""
        if self._own is None:
            self._own = {id(entry.inode) for entry in self._entries}
        return id(inode) in self._own

    def _link(self, entry: Entry, header: Inode) -> Inode:
        """The inode a hard link is to, with the attributes of the link's header."""
        inode = self._find(entry, lower=False) or self._find(entry, lower=True)
        names = f"{show(entry.path)} is a hard link to {show(entry.target)}"
        if inode is None:
            raise FormatError(f"{self._what}: {names}, which does not exist")
        if stat.S_ISDIR(inode.mode):
            raise FormatError(f"{self._what}: {names}, which is a directory")
        if not stat.S_ISLNK(inode.mode):
            inode.mode = stat.S_IFMT(inode.mode) | stat.S_IMODE(header.mode)
        inode.uid, inode.gid, inode.mtime = header.uid, header.gid, header.mtime
        if header.xattrs:
            added = suited(header.xattrs, inode.mode)
            inode.xattrs = tuple(sorted((dict(inode.xattrs) | dict(added)).items()))
        return inode

    def _find(self, entry: Entry, *, lower: bool) -> Inode | None:
        """What a hard link's target names now, or with ``lower`` what it named before this layer's markers."""

        def look(_above: bytes, children: Children, name: bytes) -> Inode | None:
            if lower and id(children) in self._hidden and name in self._hidden[id(children)][1]:
                return self._hidden[id(children)][1][name]
            return children.get(name)

        parent, _, name = entry.target.rpartition(b"/")
        children, missing = self._walk(parent, entry.path, look)
        if missing:
            return None
        return look(parent, children, name) if name else self._merger.root


def _directory() -> Inode:
    return Inode(stat.S_IFDIR | 0o755, children={})
