"""``erofsgen gc``: free what no image needs."""

from __future__ import annotations

import click

from erofsgen.cli.shared import Settings, verb


@verb(json=True)
@click.option("--dry-run", "-n", is_flag=True, help="Only say what would be deleted.")
@click.option("--wait", type=float, metavar="SECONDS", default=0.0, help="Wait so long for builds that run.")
def command(settings: Settings, dry_run: bool, wait: float) -> None:
    """Delete what no image of the store needs.

    Blobs that no name reaches, layer records that need them, and what crashes left.
    """
    from erofsgen.build.gc import collect
    from erofsgen.cli import output

    store = settings.open_store(change=True)
    with settings.progress() as progress:
        result = collect(store, dry_run=dry_run, wait=wait, progress=progress)
    if settings.json:
        output.document(result)
        return
    done = "would delete" if dry_run else "deleted"
    output.line(
        f"{done} {output.counted(result.blobs, 'blob')}, {output.size(result.bytes)}; "
        f"kept {output.counted(result.kept_blobs, 'blob')}, {output.size(result.kept_bytes)}"
    )
