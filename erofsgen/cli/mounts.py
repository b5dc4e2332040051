"""``erofsgen mounts``: what is mounted on this host."""

from __future__ import annotations

from erofsgen.cli.shared import Settings, verb


@verb(json=True)
def command(settings: Settings) -> None:
    """List this host's mounts."""
    from erofsgen.cli import output
    from erofsgen.host.mount.mounts import mounts

    found = mounts(settings.root)
    if settings.json:
        output.document(found)
        return
    output.table(
        ["TARGET", "IMAGE", "DIGEST", "ACCESS"],
        [
            (
                output.printable(str(mount.target)),
                output.printable(mount.image),
                mount.digest.removeprefix("sha256:")[:12],
                "rw" if mount.rw else "ro",
            )
            for mount in found
        ],
    )
