"""What a layer says, before it is merged with others: entries in tar order, and their bytes.

A layer reader (:mod:`erofsgen.oci.tar`, :mod:`erofsgen.oci.rootfs`) yields ``(Entry, FileData | None)`` pairs. The data
of an entry must be consumed before the next entry is asked for; what is left over is skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Protocol

import msgspec

from erofsgen.erofs.tree import Inode

PUT: Final = 0
"""The entry creates or replaces a file of any type: ``inode`` holds it."""
LINK: Final = 1
"""The entry is one more name for ``target``. ``inode`` holds the attributes its header carried."""
WHITEOUT: Final = 2
"""Hides ``path`` of the layers below."""
OPAQUE: Final = 3
"""Hides everything the layers below have in the directory ``path``."""


class Entry(msgspec.Struct, array_like=True, gc=False):
    """One tar entry. ``path`` and ``target`` are cleaned: relative, no ``.``, ``..`` or empty parts; root is ``b""``.

    ``target`` is the link's path inside the image (``LINK`` only; a symlink's target is in ``inode.data``).
    Paths are lexical: symlinks among their parents are resolved when layers are merged.
    """

    path: bytes
    op: int
    inode: Inode | None = None
    target: bytes = b""


class FileData(Protocol):
    """A regular file's bytes, readable once, in order."""

    @property
    def size(self) -> int:
        """Logical length in bytes, holes included."""

    def chunks(self, chunk_size: int) -> Iterator[memoryview | None]:
        """The file cut at ``chunk_size`` bytes, the last piece shorter; None is a piece that is one hole.

        A view may be kept: its memory is never written again.

        Raises FormatError (truncated, malformed), IntegrityError (the layer's digest or length is wrong).
        """


class LayerReader(Protocol):
    """Iterates over a layer's entries once."""

    def __iter__(self) -> Iterator[tuple[Entry, FileData | None]]: ...
