"""``erofsgen profile export``: profiles as JSON."""

from __future__ import annotations

from pathlib import Path

import click

from erofsgen.cli.shared import Settings, image_argument, verb


@verb(name="export")
@image_argument()
@click.option("--command", "wanted", metavar="NAME", help="Only the profile of this command.")
@click.option("--output", "-o", "file", type=click.Path(path_type=Path), metavar="FILE", help="Write to FILE.")
def command(settings: Settings, image: str, wanted: str | None, file: Path | None) -> None:
    """Write an image's profiles as JSON.

    What this host has recorded is merged with what the store has. `erofsgen profile import` reads it, for any build of
    the image.
    """
    from erofsgen.cli import output
    from erofsgen.files import replace_file
    from erofsgen.host.profiles import HostProfiles
    from erofsgen.host.profilework import export
    from erofsgen.host.pull import find
    from erofsgen.profile.exchange import text

    cache = settings.cache()
    lines = text(export(cache, HostProfiles(settings.root), find(cache, settings.store, image), wanted))
    if file is None:
        for line in lines:
            output.line(line)
    else:
        replace_file(file, "".join(f"{line}\n" for line in lines).encode())
