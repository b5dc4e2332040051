"""``erofsgen profile push``: what this host has recorded, to the store."""

from __future__ import annotations

from erofsgen.cli.shared import Settings, image_argument, verb


@verb(json=True, name="push")
@image_argument()
def command(settings: Settings, image: str) -> None:
    """Merge what this host has recorded of an image into the store's.

    Other hosts get it when they pull or mount the image. A run that another host pushes at the same moment may be lost.
    """
    from erofsgen.cli import output
    from erofsgen.host.profiles import HostProfiles
    from erofsgen.host.profilework import push
    from erofsgen.store.image import Image

    found = Image.open(settings.open_store(change=True), image)
    pushed = push(HostProfiles(settings.root), found)
    if settings.json:
        output.document([{"command": one.command, "runs": one.runs, "chunks": len(one.rows)} for one in pushed])
        return
    for one in pushed:
        output.line(f"{output.quoted(one.command)}: {output.counted(one.runs, 'run')}")
