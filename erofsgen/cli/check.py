"""``erofsgen check``: is everything in the store what it should be?"""

from __future__ import annotations

import click

from erofsgen.cli.shared import Settings, image_argument, known_name, verb
from erofsgen.errors import IntegrityError


@verb(json=True)
@image_argument("images", nargs=-1)
@click.option(
    "--threads", type=click.IntRange(1, 1024), metavar="N", help="Packs checked at once; default: one per core."
)
def command(settings: Settings, images: tuple[str, ...], threads: int | None) -> int:
    """Check every structure, digest and reference.

    Of IMAGES, or of the whole store with all its blobs. Reads manifests, indexes and packs completely: every frame is
    decompressed and compared with its digest, every chunk with the chunk dictionary's. Exits with 5 if anything is
    wrong, and names what and where.
    """
    from erofsgen.cli import output
    from erofsgen.store.check import check

    store = settings.open_store()
    with settings.progress() as progress:
        names = [known_name(store, image) for image in images] or None
        report = check(store, names, threads=threads, progress=progress)
    if settings.json:
        output.document(report)
    else:
        for problem in report.problems:
            output.line(output.one_line(problem.line()))
        counts = f"{output.counted(report.images, 'image')}, {output.counted(report.packs, 'pack')}"
        found = output.counted(len(report.problems), "problem") if report.problems else "no problems"
        output.line(f"{counts}, {output.size(report.bytes)} read: {found}")
        if report.unreferenced:
            loose = sum(report.unreferenced.values())
            blobs = output.counted(len(report.unreferenced), "blob")
            output.line(f"{blobs} of {output.size(loose)} in no image; see `erofsgen gc`")
    return IntegrityError.exit_code if report.problems else 0
