"""``erofsgen ls``: a directory of an image."""

from __future__ import annotations

import os
import stat
import time
from typing import TYPE_CHECKING

import click

from erofsgen.cli.shared import Settings, image_argument, verb

if TYPE_CHECKING:
    from erofsgen.store.listing import Row


@verb(json=True)
@image_argument()
@click.argument("path", default="/")
@click.option(
    "-l", "long", is_flag=True, help="Mode, links, owner, group, size, time and name, as `ls -ln` prints them."
)
@click.option("-R", "--recursive", is_flag=True, help="Directories below, too.")
def command(settings: Settings, image: str, path: str, long: bool, recursive: bool) -> None:
    """List a directory of an image.

    Names come in byte order, hidden ones included; PATH is the root by default. Times are local time; owners are
    numbers, as the host's names mean nothing to an image.
    """
    from erofsgen.cli import output
    from erofsgen.store.listing import rows
    from erofsgen.store.paths import resolve

    index = settings.open_image(image).index
    # as coreutils: a link that is named is followed unless the long format would hide that it is one
    start, node = resolve(index, os.fsencode(path), follow=not long)
    directories = rows(start, node, recursive=recursive)
    if settings.json:
        output.document([row for _, listing in directories for row in listing])
        return
    heading = recursive and stat.S_ISDIR(node.mode)
    for number, (directory, listing) in enumerate(directories):
        if heading:
            output.line(("\n" if number else "") + output.printable(b"/" + directory) + ":")
        if long:
            _long(listing)
        else:
            for row in listing:
                output.line(output.printable(row.name))


def _long(listing: list[Row]) -> None:
    """Columns as wide as their widest value, as coreutils does it."""
    from erofsgen.cli import output

    columns = [
        (stat.filemode(row.mode), str(row.nlink), str(row.uid), str(row.gid), _size(row), _time(row.mtime), _name(row))
        for row in listing
    ]
    widths = [max((len(line[column]) for line in columns), default=0) for column in range(5)]
    for mode, nlink, uid, gid, size, when, name in columns:
        output.line(
            f"{mode} {nlink:>{widths[1]}} {uid:>{widths[2]}} {gid:>{widths[3]}} {size:>{widths[4]}} {when} {name}"
        )


def _size(row: Row) -> str:
    if stat.S_ISCHR(row.mode) or stat.S_ISBLK(row.mode):
        return f"{os.major(row.rdev)}, {os.minor(row.rdev)}"
    return str(row.size)


def _time(mtime: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(mtime // 1_000_000_000))


def _name(row: Row) -> str:
    from erofsgen.cli import output

    name = output.printable(row.name)
    return name if row.target is None else f"{name} -> {output.printable(row.target)}"
