"""``erofsgen mounts``: what is mounted on this host."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from erofsgen.cli.shared import Settings, verb

if TYPE_CHECKING:
    from erofsgen.host.mount.state import MountInfo


@verb(json=True)
@click.option("--repair", is_flag=True, help="Mount again what a FUSE server that has died was for.")
def command(settings: Settings, repair: bool) -> int:
    """List this host's mounts.

    With the planes fuse and blockfuse every mount has a server process. When it dies, reads fail; --repair detaches
    such mounts and mounts the same images there again.
    """
    from erofsgen.cli import output
    from erofsgen.host.mount.mounts import mounts

    failed = _repair(settings) if repair else 0
    found = mounts(settings.root)
    if settings.json:
        output.document(found)
        return failed
    output.table(
        ["TARGET", "IMAGE", "DIGEST", "ACCESS", "PLANE"],
        [
            (
                output.printable(str(mount.target)),
                output.printable(mount.image),
                mount.digest.removeprefix("sha256:")[:12],
                "rw" if mount.rw else "ro",
                _plane(mount),
            )
            for mount in found
        ],
    )
    return failed


def _plane(mount: MountInfo) -> str:
    from erofsgen.host.mount.repair import is_dead

    return f"{mount.plane}, dead" if is_dead(mount) else mount.plane


def _repair(settings: Settings) -> int:
    """Returns the exit code: of the last mount that could not be repaired."""
    from erofsgen.cli import output
    from erofsgen.host.mount.repair import repair

    code = 0
    for mount, error in repair(settings.root):
        if error is not None:
            code = error.exit_code
            click.echo(f"erofsgen: error: {output.one_line(f'{mount.target}: not repaired: {error}')}", err=True)
        elif not settings.quiet:
            click.echo(f"repaired {output.printable(mount.target)}", err=True)
    return code
