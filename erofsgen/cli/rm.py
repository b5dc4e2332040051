"""``erofsgen rm``: drop images' names."""

from __future__ import annotations

from erofsgen.cli.shared import Settings, image_argument, known_name, verb


@verb(json=True)
@image_argument("images", nargs=-1, required=True)
def command(settings: Settings, images: tuple[str, ...]) -> None:
    """Remove images from the store.

    Only names go; `erofsgen gc` frees the space that no other image needs. A digest removes all its names.
    """
    from erofsgen.cli import output
    from erofsgen.store.inspect import tags

    store = settings.open_store(change=True)
    names = list(dict.fromkeys(tag for image in images for tag in tags(store, known_name(store, image))))
    for name in names:
        store.untag(name)
    if settings.json:
        output.document({"removed": names})
