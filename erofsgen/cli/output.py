"""What goes to standard output: tables, sizes, names made safe for a terminal, JSON.

Names in an image are bytes. For people they are decoded as UTF-8; whatever is not printable (control characters, bytes
that are no UTF-8) is written as ``\\xNN`` per byte and a backslash as ``\\\\``, so that a name can neither drive the
terminal nor be mistaken for another. In JSON they are strings of their UTF-8; a byte that is no UTF-8 is the lone
surrogate U+DC80 to U+DCFF it becomes by Python's ``surrogateescape``, written as ``"\\udcNN"``.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Final

import click

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


def line(text: str = "") -> None:
    """Print one line."""
    click.echo(text)


def document(value: object) -> None:
    """Print ``value`` as the JSON document of a ``--json`` run; msgspec structs and bytes names are understood."""
    click.echo(json.dumps(_plain(value), indent=2))


def _plain(value: object) -> object:
    """``value`` of what JSON has; structs become objects, bytes names."""
    if isinstance(value, bytes):
        return json_name(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    fields = getattr(value, "__struct_fields__", None)  # a msgspec struct
    return value if fields is None else {field: _plain(getattr(value, field)) for field in fields}


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[int] = ()) -> None:
    """Print a table; ``right`` are the numbers of right-aligned columns. Pipes get whole lines, however long."""
    from rich.console import Console
    from rich.table import Table

    terminal = sys.stdout.isatty()
    drawn = Table(box=None, pad_edge=False, header_style="bold" if terminal else "", padding=(0, 2, 0, 0))
    for number, heading in enumerate(headings):
        drawn.add_column(heading, justify="right" if number in right else "left", overflow="fold", no_wrap=not terminal)
    for row in rows:
        drawn.add_row(*row)
    console = Console(markup=False, highlight=False, emoji=False, width=None if terminal else 1 << 16)
    if terminal:
        console.print(drawn)
        return
    with console.capture() as captured:
        console.print(drawn)
    for text in captured.get().splitlines():
        click.echo(text.rstrip())


def facts(pairs: Iterable[tuple[str, str]]) -> None:
    """Print ``name  value`` lines, values aligned."""
    pairs = list(pairs)
    width = max((len(name) for name, _ in pairs), default=0)
    for name, value in pairs:
        click.echo(f"{name:<{width}}  {value}".rstrip())
