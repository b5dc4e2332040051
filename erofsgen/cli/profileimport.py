"""``erofsgen profile import``: profiles that were exported, for an image."""

from __future__ import annotations

from typing import BinaryIO, Literal

import click

from erofsgen.cli.shared import Settings, image_argument, verb


@verb(json=True, name="import")
@image_argument()
@click.argument("file", type=click.File("rb"))
@click.option(
    "--to",
    type=click.Choice(["store", "host"]),
    metavar="PLACE",
    default="store",
    help="store: beside the image, for all its hosts; host: here only.",
)
def command(settings: Settings, image: str, file: BinaryIO, to: Literal["host", "store"]) -> None:
    """Merge profiles that were exported into those of an image.

    FILE, or - for standard input, is what `erofsgen profile export` wrote, of this image or another build of it: chunks
    are found by their digests, and those that are not in the image are left out.
    """
    from erofsgen.cli import output
    from erofsgen.host.profiles import HostProfiles
    from erofsgen.host.profilework import take_in
    from erofsgen.profile.exchange import LIMIT
    from erofsgen.store.image import Image

    found = Image.open(settings.open_store(change=to == "store"), image)
    taken = take_in(HostProfiles(settings.root), found, file.read(LIMIT + 1), file.name, to=to)
    if settings.json:
        output.document([{"command": one.command, "runs": one.runs, "chunks": len(one.rows)} for one in taken])
        return
    for one in taken:
        output.line(f"{output.quoted(one.command)}: {output.counted(len(one.rows), 'chunk')}")
