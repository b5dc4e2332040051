"""Extended attributes an image can carry, of all those that archives and directories hold."""

from __future__ import annotations

import stat
from typing import Final

from erofsgen.errors import FormatError

Xattrs = tuple[tuple[bytes, bytes], ...]
"""(full name, value) pairs sorted by name."""

VALUE_MAX: Final = 65535
"""Longest value in bytes that EROFS can hold; Linux's own limit is one more (XATTR_SIZE_MAX)."""
NAME_MAX: Final = 255
"""Longest full name in bytes (XATTR_NAME_MAX)."""


def storable(name: bytes) -> bool:
    """Whether Linux file systems store an attribute of this name, and it describes a file.

    Others are dropped, as containerd does: macOS archives carry ``com.apple.*``. ``trusted.overlay.*`` would be orders
    to overlayfs, not attributes.
    """
    namespace, _, rest = name.partition(b".")
    if namespace == b"system":
        return rest in (b"posix_acl_access", b"posix_acl_default")
    if namespace == b"trusted" and rest.startswith(b"overlay."):
        return False
    return bool(rest) and namespace in (b"user", b"security", b"trusted")


def collect(pairs: list[tuple[bytes, bytes]]) -> Xattrs:
    """The storable ones of ``pairs``, sorted. Raises FormatError for a name or value that is too long."""
    kept = [pair for pair in pairs if storable(pair[0])]
    for name, value in kept:
        if len(name) > NAME_MAX or len(value) > VALUE_MAX or b"\0" in name:
            raise FormatError(f"xattr {name[:80]!r} cannot be stored: {len(value):,} bytes")
    kept.sort()
    return tuple(kept)


def suited(xattrs: Xattrs, mode: int) -> Xattrs:
    """Those that Linux keeps for a file of this type: ``user.*`` is for regular files and directories only."""
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return xattrs
    return tuple(pair for pair in xattrs if not pair[0].startswith(b"user."))
