"""``erofsgen mount``: an image as a directory, by the kernel's own EROFS."""

from __future__ import annotations

from pathlib import Path

import click

from erofsgen.cli.shared import Settings, image_argument, verb
from erofsgen.errors import UnsupportedError


@verb(json=True)
@image_argument()
@click.argument("target", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--eager", is_flag=True, help="Put all of the image's data on this host first.")
@click.option("--rw", is_flag=True, help="Writable: an overlay whose changes go to an upper directory.")
@click.option("--upper", type=click.Path(path_type=Path), metavar="DIR", help="Where the changes go; implies --rw.")
def command(settings: Settings, image: str, target: Path, eager: bool, rw: bool, upper: Path | None) -> None:
    """Mount an image on DIR."""
    if not eager:
        raise UnsupportedError("lazy mounts are not in this version", hint="mount with --eager")
    from erofsgen.cli import output
    from erofsgen.host.mount.mounts import mount

    opened = settings.open_image(image)
    with settings.progress() as progress:
        info = mount(opened, target, root=settings.root, rw=rw or upper is not None, upper=upper, progress=progress)
    if settings.json:
        output.document(info)
