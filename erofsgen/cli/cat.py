"""``erofsgen cat``: a file's bytes."""

from __future__ import annotations

import os
import sys

import click

from erofsgen.cli.shared import Settings, image_argument, verb
from erofsgen.errors import UsageError


@verb()
@image_argument()
@click.argument("path")
def command(settings: Settings, image: str, path: str) -> None:
    """Write a file of an image to standard output.

    Symbolic links are followed inside the image.
    """
    import stat

    from erofsgen.store.paths import resolve

    opened = settings.open_image(image)
    _, node = resolve(opened.index, os.fsencode(path))
    if not stat.S_ISREG(node.mode):
        raise UsageError(f"{path}: not a regular file", hint="see `erofsgen ls IMAGE PATH -l`")
    for piece in opened.read(node):
        sys.stdout.buffer.write(piece)
