"""``erofsgen extract``: an image's files, out of the image."""

from __future__ import annotations

import os
import sys

import click

from erofsgen.cli.shared import Settings, image_argument, verb
from erofsgen.errors import UsageError


@verb(json=True)
@image_argument()
@click.argument("dest", required=False, type=click.Path())
@click.option(
    "--tar", "archive", type=click.Path(allow_dash=True), metavar="FILE", help="Write a PAX tar; - is standard output."
)
def command(settings: Settings, image: str, dest: str | None, archive: str | None) -> None:
    """Unpack an image into directory DEST, or into a tar.

    DEST must be missing or empty. Root gets everything the image holds: owners, modes, times, extended attributes, hard
    links, devices, and holes as holes; others get what they may make, their own files without devices.
    """
    from erofsgen.cli import output
    from erofsgen.store import extract
    from erofsgen.store.tar import write_archive

    if (dest is None) == (archive is None):
        raise UsageError("name either a directory or --tar FILE", hint="see `erofsgen extract --help`")
    opened = settings.open_image(image)
    with settings.progress() as progress:
        if dest is not None:
            result = extract.extract(opened, dest, progress=progress)
        elif archive == "-":
            if sys.stdout.isatty():
                raise UsageError("will not write a tar to a terminal", hint="redirect standard output")
            if settings.json:
                raise UsageError("--json and --tar - both want standard output", hint="name a file")
            result = write_archive(opened, sys.stdout.buffer, progress=progress)
        else:
            assert archive is not None
            with extract.new_file(archive) as out:
                result = write_archive(opened, out, progress=progress)
    if settings.json:
        output.document(result)
        return
    for note in result.notes:
        click.echo(f"erofsgen: {output.one_line(note)}", err=True)
    if archive != "-":
        where = output.printable(os.fsencode(dest or archive or ""))
        output.line(f"{where}: {result.entries:,} entries, {output.size(result.bytes)} of file data")
