"""``erofsgen umount``: the end of a mount."""

from __future__ import annotations

from pathlib import Path

import click

from erofsgen.cli.shared import Settings, verb


@verb()
@click.argument("target", metavar="DIR", type=click.Path(readable=False, path_type=Path))
@click.option("--force", is_flag=True, help="Detach it even while it is in use.")
def command(settings: Settings, target: Path, force: bool) -> None:
    """Unmount an image.

    DIR is where `erofsgen mount` put it.
    """
    from erofsgen.host.mount.mounts import unmount

    unmount(target, root=settings.root, force=force)
