"""``erofsgen diff``: what changed between two images."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

import click

from erofsgen.cli.shared import Settings, image_argument, verb

if TYPE_CHECKING:
    from erofsgen.store.diff import Change


@verb(json=True)
@image_argument("a")
@image_argument("b")
@click.option("--exit-code", is_flag=True, help="Exit with 1 if the images differ.")
def command(settings: Settings, a: str, b: str, exit_code: bool) -> int:
    """List what differs between two images.

    \b
    + PATH                 only in B
    - PATH                 only in A
    ~ PATH (attributes)    in both: type, mode, owner, mtime, size, device, target, xattrs, links, content
    """
    from erofsgen.cli import output
    from erofsgen.store.diff import diff
    from erofsgen.store.image import Image

    store = settings.open_store()
    with settings.progress() as progress:
        changes = diff(*(Image.open(store, name) for name in (a, b)), progress=progress)
    if settings.json:
        output.document(changes)
    else:
        for change in changes:
            output.line(_line(change))
    return 1 if exit_code and changes else 0


_SIGNS = {"added": "+", "removed": "-", "changed": "~"}


def _line(change: Change) -> str:
    from erofsgen.cli import output

    line = f"{_SIGNS[change.kind]} {output.printable(b'/' + change.path)}"
    details = [_detail(name, old, new) for name, (old, new) in change.attributes.items()]
    if change.content:
        details.append("content")
    return f"{line} ({', '.join(details)})" if details else line


def _detail(name: str, old: object, new: object) -> str:
    return f"{name} {_value(name, old)} → {_value(name, new)}"


def _value(name: str, value: object) -> str:
    from erofsgen.cli import output

    match value:
        case int() if name == "type":
            return stat.filemode(value)[0]
        case int() if name == "mode":
            return f"{value:04o}"
        case int() if name == "mtime":
            seconds, nanoseconds = divmod(value, 1_000_000_000)
            return f"{seconds}.{nanoseconds:09}" if nanoseconds else str(seconds)
        case int() if name == "device":
            return f"{os.major(value)}:{os.minor(value)}"
        case bytes():
            return output.printable(value)
        case dict():
            return "{" + ", ".join(f"{output.printable(key)}={text.hex()}" for key, text in value.items()) + "}"
        case list():
            return "[" + ", ".join(output.printable(path) for path in value) + "]"
        case _:
            return str(value)
