"""What goes to standard output: lines, tables, JSON. Names and sizes for them are made in :mod:`erofsgen.text`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence

import click

from erofsgen.text import counted, json_name, one_line, printable, quoted, share, size

__all__ = [
    "counted", "document", "facts", "json_name", "line", "one_line", "printable", "quoted", "share", "size", "table",
]  # fmt: skip


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
