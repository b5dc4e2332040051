"""``erofsgen rm``: drop images' names."""

from __future__ import annotations

from erofsgen.cli.shared import Settings, image_argument, verb


@verb(json=True)
@image_argument("images", nargs=-1, required=True)
def command(settings: Settings, images: tuple[str, ...]) -> None:
    """Remove images from the store.

    Only names go, and with an image's last name its profiles'; `erofsgen gc` frees the space that no other image needs.
    A digest removes all its names.
    """
    from erofsgen.cli import output
    from erofsgen.store.remove import remove

    names = remove(settings.open_store(change=True), images)
    if settings.json:
        output.document({"removed": names})
