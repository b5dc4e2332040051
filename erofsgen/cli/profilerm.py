"""``erofsgen profile rm``: forget profiles."""

from __future__ import annotations

import click

from erofsgen.cli.shared import Settings, image_argument, verb


@verb(json=True, name="rm")
@image_argument()
@click.option("--command", "wanted", metavar="NAME", help="Only the profile of this command.")
@click.option(
    "--from",
    "place",
    type=click.Choice(["all", "host", "store"]),
    metavar="PLACE",
    default="all",
    help="host: what is kept here; store: what lies beside the image; by default both.",
)
def command(settings: Settings, image: str, wanted: str | None, place: str) -> None:
    """Forget an image's profiles.

    From the host, what the store has is fetched again when the image is mounted the next time.
    """
    from erofsgen.cli import output
    from erofsgen.host.profiles import HostProfiles
    from erofsgen.host.profilework import remove
    from erofsgen.host.pull import find
    from erofsgen.store.image import Image

    found = find(settings.cache(), settings.store, image)
    if place != "host" and isinstance(found, Image):
        found = Image.open(settings.open_store(change=True), found.name)
    gone = remove(HostProfiles(settings.root), found, wanted, host=place != "store", store=place != "host")
    if settings.json:
        output.document({"removed": gone})
        return
    for name in gone:
        output.line(output.quoted(name))
