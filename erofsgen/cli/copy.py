"""``erofsgen copy``: images from one store to another."""

from __future__ import annotations

import click

from erofsgen.cli.shared import Settings, copy_options, verb


@verb(json=True)
@click.argument("source", metavar="FROM")
@click.argument("destination", metavar="TO")
@click.argument("images", metavar="[IMAGE]...", nargs=-1)
@copy_options
def command(
    settings: Settings, source: str, destination: str, images: tuple[str, ...], name: str | None, jobs: int
) -> None:
    """Copy images from one store to another.

    FROM and TO are stores: a directory, s3://BUCKET/PREFIX, docker://HOST/REPOSITORY or, to copy from, https://HOST/PATH.
    Only what TO lacks is sent. Without IMAGE, all of them are copied.
    """
    from erofsgen.cli.copying import copy, destination_of

    origin = settings.open_store(source)
    names = images or tuple(sorted(origin.references()))
    url, tag = destination_of(destination)
    copy(settings, origin, settings.open_store(url, create=True), names, name or tag, jobs)
