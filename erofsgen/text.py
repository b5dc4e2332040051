"""Names, sizes and counts as people read them, and names as JSON has them.

Names in an image are bytes. For people they are decoded as UTF-8; whatever is not printable (control characters, bytes
that are no UTF-8) is written as ``\\xNN`` per byte and a backslash as ``\\\\``, so that a name can neither drive the
terminal nor be mistaken for another. In JSON they are strings of their UTF-8; a byte that is no UTF-8 is the lone
surrogate U+DC80 to U+DCFF it becomes by Python's ``surrogateescape``, written as ``"\\udcNN"``.
"""

from __future__ import annotations

import os
from typing import Final

_UNITS: Final = ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def printable(name: bytes | str) -> str:
    """A name for people: one line, nothing in it that a terminal would obey."""
    text = os.fsencode(name).decode("utf-8", "surrogateescape") if isinstance(name, str) else _decode(name)
    if text.isprintable() and "\\" not in text:
        return text
    return "".join(map(_escaped, text))


def one_line(message: str) -> str:
    """A message for people, which may quote names: like :func:`printable`, but backslashes stay."""
    return "".join(c if c.isprintable() else " " if c == "\n" else _escaped(c) for c in message)


def quoted(command: str) -> str:
    """A profile's command for people; that of plain mounts, which is none, as ``""``."""
    return one_line(command) or '""'


def _decode(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _escaped(character: str) -> str:
    if character == "\\":
        return "\\\\"
    if character.isprintable():
        return character
    return "".join(f"\\x{byte:02x}" for byte in character.encode("utf-8", "surrogateescape"))


def json_name(name: bytes) -> str:
    """A name for JSON; ``json_name(name).encode("utf-8", "surrogateescape") == name``."""
    return _decode(name)


def size(count: int) -> str:
    """Bytes for people, in binary units: ``512 B``, ``1.5 MiB``."""
    if abs(count) < 1024:
        return f"{count} B"
    amount = float(count)
    for unit in _UNITS:
        amount /= 1024
        if abs(amount) < 1023.95 or unit == _UNITS[-1]:
            break
    return f"{amount:.1f} {unit}"


def counted(number: int, one: str, many: str | None = None) -> str:
    """``1 blob``, ``2 blobs``, ``3 indexes``."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def share(part: int, whole: int) -> str:
    """``part`` of ``whole`` in per cent."""
    return f"{100 * part / whole:.1f} %" if whole else "-"
