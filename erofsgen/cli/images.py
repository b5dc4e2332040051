"""``erofsgen images``: what is in the store."""

from __future__ import annotations

from erofsgen.cli.shared import Settings, verb


@verb(json=True)
def command(settings: Settings) -> None:
    """List the images of the store.

    SIZE is what the image's index and packs take, shared packs included; OWN counts packs no other image uses.
    """
    from erofsgen.cli import output
    from erofsgen.store.inspect import list_images

    images = list_images(settings.open_store())
    if settings.json:
        output.document(images)
        return
    rows = [
        (
            output.printable(image.name),
            image.digest.removeprefix("sha256:")[:12],
            str(image.packs),
            output.size(image.stored_bytes),
            output.size(image.own_bytes),
            output.one_line(image.problem or ""),
        )
        for image in images
    ]
    headings = ["IMAGE", "DIGEST", "PACKS", "SIZE", "OWN", "PROBLEM" if any(row[-1] for row in rows) else ""]
    output.table(headings, rows, right=(2, 3, 4))
