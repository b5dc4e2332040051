"""``erofsgen optimize``: what starts touch, in one pack, in the order of first touch."""

from __future__ import annotations

from typing import BinaryIO

import click

from erofsgen.cli.shared import Settings, Size, image_argument, verb


@verb(json=True)
@image_argument()
@click.option("--as", "name", metavar="NAME", help="Name of the result; the image's own name by default.")
@click.option("--command", "commands", multiple=True, metavar="NAME", help="Only for this command; may be repeated.")
@click.option("--max-bytes", type=Size(), metavar="SIZE", default=256 << 20, help="Of the hot pack; default: 256M.")
@click.option(
    "--threshold",
    type=click.FloatRange(0, 100),
    metavar="PERCENT",
    default=50.0,
    help="Of a command's runs that have to touch a chunk; default: 50.",
)
@click.option(
    "--profile",
    "files",
    multiple=True,
    type=click.File("rb"),
    metavar="FILE",
    help="By profiles that were exported, instead of those that are known; may be repeated.",
)
def command(
    settings: Settings,
    image: str,
    name: str | None,
    commands: tuple[str, ...],
    max_bytes: int,
    threshold: float,
    files: tuple[BinaryIO, ...],
) -> None:
    """Rewrite what starts of an image touch into a hot pack.

    The hot pack has these chunks in the order of first touch, so that a start is one streamed range. All else stays in
    the packs where it is. Which chunks they are is taken from the recorded profiles beside the image and on this host,
    of all commands unless some are named. Optimize again when the profiles have changed: that begins anew.
    """
    from erofsgen.build import hotprofiles
    from erofsgen.build.optimize import optimize
    from erofsgen.cli import output
    from erofsgen.host.profiles import HostProfiles
    from erofsgen.profile import beside
    from erofsgen.profile.exchange import LIMIT
    from erofsgen.store.image import Image

    store = settings.open_store(change=True)
    found = Image.open(store, image)
    known = [*HostProfiles(settings.root).recorded(found.digest), *beside.load(store, found.digest)]
    given = [profile for file in files for profile in hotprofiles.read(file.read(LIMIT + 1), file.name)]
    deciding, others = hotprofiles.select(known, given, commands)
    with settings.progress() as progress:
        optimized = optimize(
            found, deciding, others=others, name=name, max_bytes=max_bytes, threshold=threshold / 100, progress=progress
        )
    result = optimized.result
    if settings.json:
        output.document(result)
        return
    size = output.size
    hot = f"{output.counted(result.hot_chunks, 'chunk')}, {size(result.hot_bytes)}"
    whole = f"{output.counted(result.whole_files, 'large file')} read whole, {size(result.whole_bytes)}"
    output.facts(
        [
            ("image", output.printable(result.name)),
            ("digest", result.digest),
            ("commands", ", ".join(map(output.quoted, result.commands))),
            ("hot pack", result.hot_pack or "none"),
            ("hot", f"{hot}; {size(result.stored_bytes)} stored"),
            ("left", f"{whole}; {size(result.skipped_bytes)} beyond the limit"),
            ("packs", f"{result.packs}, {result.reused_packs} as they were"),
            ("time", f"{result.seconds:.2f} s"),
        ]
    )
