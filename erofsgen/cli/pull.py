"""``erofsgen pull``: an image into the host cache, or from another store into this one."""

from __future__ import annotations

from typing import Final

import click

from erofsgen.cli.shared import Settings, cache_options, copy_options, image_argument, verb
from erofsgen.errors import UsageError

_PATIENCE: Final = 30.0
"""Seconds that profiles may take: who pulls wants them as they are now."""


@verb(json=True)
@image_argument()
@click.option("--all", "everything", is_flag=True, help="All data, too.")
@click.option("--from", "source", metavar="STORE", help="Copy the image from STORE into the store instead.")
@copy_options
@cache_options
def command(settings: Settings, image: str, everything: bool, source: str | None, name: str | None, jobs: int) -> None:
    """Put what mounting an image needs into the host cache.

    That is its index, its packs' tables of contents and its profiles; it can be mounted without the store then. With
    --from, the image comes whole from another store into this one, and the cache is left alone.
    """
    if source is not None:
        from erofsgen.cli.copying import copy

        copy(settings, settings.open_store(source), settings.open_store(create=True), [image], name, jobs)
        return
    if name is not None:
        raise UsageError("--as is for copies between stores", hint="name one with --from")
    _into_cache(settings, image, everything)


def _into_cache(settings: Settings, image: str, everything: bool) -> None:
    from erofsgen.cli import output
    from erofsgen.errors import NotFoundError
    from erofsgen.host.cache.cache import CachedImage
    from erofsgen.host.pull import complete, find

    cache = settings.cache()
    found = find(cache, settings.store, image)
    if isinstance(found, CachedImage):
        raise NotFoundError(f"no store at {settings.store}", hint="the image is in the cache already")
    with settings.progress() as progress:
        cached = cache.add(found, progress, patience=_PATIENCE)
        if everything:
            complete(cache, cached, found, progress)
    if settings.json:
        output.document({"digest": cached.digest, "packs": len(cached.packs), "complete": cache.is_complete(cached)})
