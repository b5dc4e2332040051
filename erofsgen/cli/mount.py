"""``erofsgen mount``: an image as a directory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from erofsgen.cli.shared import Settings, Size, cache_options, image_argument, plane_options, start_options, verb

if TYPE_CHECKING:
    from erofsgen.host.prefetch.start import Mode


@verb(json=True)
@image_argument()
@click.argument("target", metavar="DIR", type=click.Path(path_type=Path))
@plane_options
@start_options
@click.option("--rw", is_flag=True, help="Writable: an overlay whose changes go to an upper directory.")
@click.option("--upper", type=click.Path(path_type=Path), metavar="DIR", help="Where the changes go; implies --rw.")
@click.option("--read-ahead", type=Size(), metavar="SIZE", help="What the kernel reads ahead; by default what is best.")
@cache_options
def command(
    settings: Settings,
    image: str,
    target: Path,
    eager: bool,
    plane: str,
    prefetch: Mode | None,
    profile: str | None,
    rw: bool,
    upper: Path | None,
    read_ahead: int | None,
) -> None:
    """Mount an image on DIR.

    Its files are there at once, their data arrives as it is read: a daemon, started where none runs, brings it. With
    --eager all data is brought first, and no daemon is needed.
    """
    finding = settings.finding(image)
    from erofsgen.cli import output
    from erofsgen.host.mount.mounts import mount
    from erofsgen.host.prefetch.start import Start, wanted_recording

    token, recorded_as = wanted_recording()
    mode = prefetch or ("none" if token else "auto")
    start = Start(command=profile or recorded_as or "", mode=mode, token=token)
    with settings.progress() as progress:
        info = mount(
            finding.image(settings.cache(), progress),
            target,
            root=settings.root,
            plane="eager" if eager else settings.plane(plane),
            rw=rw or upper is not None,
            upper=upper,
            read_ahead=None if read_ahead is None else read_ahead >> 10,
            start=start,
            progress=progress,
        )
    if settings.json:
        output.document(info)
