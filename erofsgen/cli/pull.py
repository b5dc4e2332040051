"""``erofsgen pull``: an image into the host cache."""

from __future__ import annotations

import click

from erofsgen.cli.shared import Settings, cache_options, image_argument, verb


@verb(json=True)
@image_argument()
@click.option("--all", "everything", is_flag=True, help="All data, too.")
@cache_options
def command(settings: Settings, image: str, everything: bool) -> None:
    """Put what mounting an image needs into the host cache.

    That is its index and its packs' tables of contents; it can be mounted without the store then.
    """
    from erofsgen.cli import output
    from erofsgen.errors import NotFoundError
    from erofsgen.host.cache.cache import CachedImage
    from erofsgen.host.pull import complete, find

    cache = settings.cache()
    found = find(cache, settings.store, image)
    if isinstance(found, CachedImage):
        raise NotFoundError(f"no store at {settings.store}", hint="the image is in the cache already")
    with settings.progress() as progress:
        cached = cache.add(found, progress)
        if everything:
            complete(cache, cached, found, progress)
    if settings.json:
        output.document({"digest": cached.digest, "packs": len(cached.packs), "complete": cache.is_complete(cached)})
