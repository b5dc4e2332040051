"""Paths inside an image: bytes, relative to its root, cleaned lexically and bounded by what Linux can name."""

from __future__ import annotations

from typing import Final

from erofsgen.errors import FormatError

NAME_MAX: Final = 255
"""Longest name of one directory entry, in bytes (linux/limits.h)."""
PATH_MAX: Final = 4095
"""Longest path or symlink target, in bytes, without its NUL (linux/limits.h)."""


def clean(path: bytes) -> bytes:
    """``path`` without ``.``, ``..``, empty parts and outer slashes; ``..`` stops at the root, which is ``b""``.

    Raises FormatError for a path that no Linux file system can hold.
    """
    parts: list[bytes] = []
    for part in path.split(b"/"):
        if part == b"..":
            if parts:
                parts.pop()
        elif part and part != b".":
            parts.append(part)
    cleaned = b"/".join(parts)
    if b"\0" in cleaned:
        raise FormatError("its name has a NUL byte in it")
    if len(cleaned) > PATH_MAX:
        raise FormatError(f"its path is {len(cleaned):,} bytes long, more than {PATH_MAX:,}")
    if any(len(part) > NAME_MAX for part in parts):
        raise FormatError(f"a part of its path is longer than {NAME_MAX} bytes")
    return cleaned


def show(path: bytes) -> str:
    """``path`` for a message: one line, printable, and short enough to read."""
    text = path.decode("utf-8", "backslashreplace")
    if not text.isprintable():
        text = text.encode("unicode_escape").decode("ascii")
    if len(text) > 200:
        text = f"{text[:120]}…{text[-60:]}"
    return text or "/"
