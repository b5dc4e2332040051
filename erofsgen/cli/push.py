"""``erofsgen push``: images of the store to another one."""

from __future__ import annotations

import click

from erofsgen.cli.shared import Settings, copy_options, image_argument, verb


@verb(json=True)
@image_argument("images", nargs=-1, required=True)
@click.argument("destination", metavar="TO")
@copy_options
def command(settings: Settings, images: tuple[str, ...], destination: str, name: str | None, jobs: int) -> None:
    """Copy images of the store to another one.

    TO is a store: a directory, s3://BUCKET/PREFIX or docker://HOST/REPOSITORY[:TAG]. Only what it lacks is sent.
    """
    from erofsgen.cli.copying import copy, destination_of

    url, tag = destination_of(destination)
    copy(settings, settings.open_store(), settings.open_store(url, create=True), images, name or tag, jobs)
