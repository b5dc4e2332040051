"""``erofsgen profile show``: what a command touches first, in order, and how its last run went."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from erofsgen.cli.shared import Settings, image_argument, verb

if TYPE_CHECKING:
    from erofsgen.profile.listing import ChunkLine, FileLine, Met


@verb(json=True, name="show")
@image_argument()
@click.option("--command", "wanted", metavar="NAME", help="The profile of this command, if there are several.")
@click.option("--all", "every", is_flag=True, help="A line for each chunk, not for each file.")
@click.option("--html", type=click.Path(path_type=Path), metavar="FILE", help="Draw a page to zoom and filter in.")
@click.option("--png", type=click.Path(path_type=Path), metavar="FILE", help="Draw a picture (extra `plot`).")
def command(
    settings: Settings, image: str, wanted: str | None, every: bool, html: Path | None, png: Path | None
) -> None:
    """Show what a command touches, in order, and why.

    FIRST is the time from the mount to the first touch, in milliseconds; SURE the share of runs that touched it. Where
    this host remembers the last run, WAITED says how long that waited, in milliseconds, and FROM where the bytes came
    from; the pictures are of that run, otherwise of what the profile expects. With a picture, the list is left out
    unless --all asks for it.
    """
    from erofsgen.cli import output
    from erofsgen.files import replace_file
    from erofsgen.host.profiles import HostProfiles
    from erofsgen.host.profileshow import look
    from erofsgen.host.pull import find
    from erofsgen.profile.listing import chunk_lines, file_lines

    cache = settings.cache()
    seen = look(cache, HostProfiles(settings.root), find(cache, settings.store, image), wanted)
    if html is not None:
        from erofsgen.profile.html import LIMIT, page

        replace_file(html, page(seen.picture(LIMIT)).encode())
    if png is not None:
        from erofsgen.profile.png import ROWS, write_png

        write_png([seen.picture(ROWS)], png)
    about = (seen.profile, seen.chunks, seen.trace)
    if settings.json:
        chunks = {"chunks": chunk_lines(*about)} if every else {}
        output.document({**seen.document(), "files": file_lines(*about), **chunks})
        return
    output.facts((word, output.one_line(value)) for word, value in seen.facts())
    ran = seen.trace is not None
    if every:
        output.line()
        _chunks(chunk_lines(*about), ran=ran)
    elif html is None and png is None:
        output.line()
        _files(file_lines(*about), ran=ran)


def _files(lines: Sequence[FileLine], *, ran: bool) -> None:
    from erofsgen.cli import output

    output.table(
        ["#", "FIRST", "FILE", "CHUNKS", "BYTES", "OF", "SURE", "WHY", *(["WAITED", "FROM"] if ran else [])],
        [
            (
                f"{line.order:,}", f"{line.first:,}", output.printable(line.path), f"{line.chunks:,}",
                output.size(line.bytes), "-" if line.size is None else output.size(line.size), _sure(line.confidence),
                output.one_line(", ".join(line.reasons)), *(_met(line.last) if ran else ()),
            )
            for line in lines
        ],
        right=(0, 1, 3, 4, 5, 6, 8),
    )  # fmt: skip


def _chunks(lines: Sequence[ChunkLine], *, ran: bool) -> None:
    from erofsgen.cli import output

    output.table(
        ["#", "FIRST", "FILE", "OFFSET", "BYTES", "PACK", "AT", "SURE", "WHY", *(["WAITED", "FROM"] if ran else [])],
        [
            (
                f"{line.order:,}", f"{line.first:,}", output.printable(line.path),
                "-" if line.offset is None else f"{line.offset:,}", f"{line.length:,}", line.pack[:12],
                f"{line.device_offset:,}", _sure(line.confidence), output.one_line(line.reason),
                *(_met(line.last) if ran else ()),
            )
            for line in lines
        ],
        right=(0, 1, 3, 4, 6, 7, 9),
    )  # fmt: skip


def _sure(confidence: float) -> str:
    return f"{100 * confidence:.0f} %"


def _met(last: Met | None) -> tuple[str, str]:
    from erofsgen.cli import output

    if last is None:
        return "-", "not touched"
    return f"{1000 * last.waited:,.1f}" if last.waited else "0", output.one_line(", ".join(last.sources))
