"""``erofsgen explain``: where a file of an image is, and who shares it."""

from __future__ import annotations

import os
import stat
import time
from typing import TYPE_CHECKING

import click

from erofsgen.cli.shared import Settings, image_argument, verb

if TYPE_CHECKING:
    from erofsgen.host.explain.facts import Content, Explanation, Pack, Sharer, Source

_ROWS = 24
"""Chunks and frames that are listed without ``--all``."""


@verb(json=True)
@image_argument()
@click.argument("path")
@click.option("--all", "everything", is_flag=True, help=f"List all chunks and frames, not only {_ROWS}.")
@click.option("--no-remote", is_flag=True, help="Ask no server, only this host and directories.")
@click.option(
    "--timeout", type=click.FloatRange(min=0.1), metavar="SECONDS", default=5.0, show_default=True,
    help="What tiers and stores have to answer in.",
)  # fmt: skip
def command(settings: Settings, image: str, path: str, everything: bool, no_remote: bool, timeout: float) -> None:
    """Tell where a file of an image is: chunks, frames, packs.

    Says for every chunk in which frame of which pack it is, whether this host has that, in the host cache, in the
    kernel's fscache or in the page cache, which tiers and stores have the pack, and which other images use the same
    chunks. Symbolic links are followed inside the image. Of a directory all files below it are taken together. An image
    of the host cache needs no store.
    """
    from erofsgen.cli import output
    from erofsgen.host.explain.explain import explain

    found = explain(settings.root, settings.store, image, os.fsencode(path), remote=not no_remote, timeout=timeout)
    if settings.json:
        output.document(found)
        return
    output.facts(_facts(found))
    if found.chunks:
        _chunks(found, everything=everything)
    if found.chunks and found.frames:
        _frames(found, everything=everything)
    if found.packs:
        _packs(found.packs)
        _sources(found.sources, len(found.packs))
    for problem in found.problems:
        output.line(f"not known: {output.one_line(problem)}")


def _facts(found: Explanation) -> list[tuple[str, str]]:
    from erofsgen.cli import output

    inode, content = found.inode, found.content
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(inode.mtime // 1_000_000_000))
    size, links = output.size(inode.size), output.counted(inode.nlink, "link")
    of = f", chunks of {output.size(inode.chunk_size)}" if inode.chunk_size else ""
    rows = [
        (
            "image",
            f"{output.printable(found.image)}, {found.digest}{'' if found.cached else ', not in the host cache'}",
        ),
        ("path", "/" + output.printable(inode.path)),
        (
            "inode",
            f"{inode.nid}: {stat.filemode(inode.mode)} {inode.uid}:{inode.gid}, {size}, {links}, {when}{of}",
        ),
        ("data", _data(found)),
    ]
    if content.mapped:
        rows += [("here", _here(found)), *_shared(found)]
    return [*rows, *(("mounted", _mounted(mount.target, mount.plane, mount.page_cache)) for mount in found.mounts)]


def _data(found: Explanation) -> str:
    from erofsgen.cli import output

    content, kind = found.content, found.inode.kind
    if kind not in ("regular file", "directory"):
        return f"none: a {kind}"
    files = f"{output.counted(content.files, 'file')} below, " if kind == "directory" else ""
    parts = [
        f"{output.size(size)} {where}"
        for size, where in ((content.inline, "in the index"), (content.holes, "holes"))
        if size
    ]
    if content.mapped:
        chunks, frames = output.counted(content.chunks, "chunk"), output.counted(content.frames, "frame")
        packs = output.counted(len(found.packs), "pack")
        parts.insert(0, f"{output.size(content.mapped)} in {chunks} of {frames} in {packs}")
    return f"{files}{output.size(content.bytes)}" + (f": {', '.join(parts)}" if parts else "")


def _here(found: Explanation) -> str:
    from erofsgen.cli import output

    content, frames = found.content, found.frames
    states = [
        f"{output.counted(number, 'frame')} {state}"
        for state in ("durable", "present", "suspect", "absent")
        if (number := sum(frame.host_cache == state for frame in frames))
    ]
    kernels = [frame for frame in frames if frame.fscache is not None]
    if kernels:
        here = sum(frame.fscache in ("present", "durable") for frame in kernels)
        states.append(f"in fscache {here} of {output.counted(len(kernels), 'frame')}")
    return f"{output.size(content.here)} of {output.size(content.mapped)}" + (
        f": {', '.join(states)}" if states else ""
    )


def _shared(found: Explanation) -> list[tuple[str, str]]:
    from erofsgen.cli import output

    rows = [("shared", _sharer(sharer, found.content)) for sharer in found.shared]
    if found.also:
        names = ", ".join("/" + output.printable(name) for name in found.also[:3])
        more = f" and {found.also_files - 3} more" if found.also_files > 3 else ""
        rows.append(("also", f"in {names}{more} of this image"))
    return rows or [("shared", "with no other image")]


def _sharer(sharer: Sharer, content: Content) -> str:
    from erofsgen.cli import output

    name = " ".join(map(output.printable, sharer.names)) or sharer.digest.removeprefix("sha256:")[:12]
    mounts = f", mounted on {' '.join(map(output.printable, sharer.mounts))}" if sharer.mounts else ""
    chunks = f"{sharer.chunks:,} of {output.counted(content.chunks, 'chunk')}"
    return f"{chunks} with {name} ({', '.join(sharer.known)}){mounts}"


def _mounted(target: str, plane: str, page_cache: int | None) -> str:
    from erofsgen.cli import output

    pages = "" if page_cache is None else f", {output.size(page_cache)} of it in the page cache there"
    return f"on {output.printable(target)}, plane {plane}{pages}"


def _chunks(found: Explanation, *, everything: bool) -> None:
    from erofsgen.cli import output

    shown = found.chunks if everything else found.chunks[:_ROWS]
    rows = []
    for chunk in shown:
        row = [str(chunk.offset), output.size(chunk.length)]
        if chunk.slot is None:
            rows.append([*row, "hole", "-", "-", "-", "-", "-"])
            continue
        rows.append([
            *row,
            chunk.digest[:16] if chunk.digest else "-",
            str(chunk.slot),
            "-" if chunk.frame is None else str(chunk.frame),
            str(chunk.device_offset),
            "-" if chunk.page_cache is None else output.size(chunk.page_cache),
            str(1 + chunk.shared),
        ])  # fmt: skip
    output.line()
    output.table(
        ["OFFSET", "LENGTH", "CHUNK", "SLOT", "FRAME", "AT", "PAGE CACHE", "IMAGES"], rows, right=(0, 1, 3, 4, 5, 6, 7)
    )
    _more(len(found.chunks) - len(shown), "chunk")


def _frames(found: Explanation, *, everything: bool) -> None:
    from erofsgen.cli import output

    shown = found.frames if everything else found.frames[:_ROWS]
    output.line()
    output.table(
        ["SLOT", "FRAME", "DEVICE BYTES", "STORED", "RATIO", "HOST CACHE", "FSCACHE", "LAST USED"],
        [
            (
                str(frame.slot),
                str(frame.frame),
                f"{frame.device_offset}+{frame.device_size}",
                output.size(frame.stored),
                f"{frame.device_size / frame.stored:.2f}",
                frame.host_cache,
                frame.fscache or "-",
                "-" if frame.used is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(frame.used)),
            )
            for frame in shown
        ],
        right=(0, 1, 2, 3, 4),
    )
    _more(len(found.frames) - len(shown), "frame")


def _more(left: int, what: str) -> None:
    from erofsgen.cli import output

    if left:
        output.line(f"and {output.counted(left, what)} more: see --all")


def _packs(packs: list[Pack]) -> None:
    from erofsgen.cli import output

    output.line()
    output.table(
        ["SLOT", "PACK", "KIND", "STORED", "DEVICE", "USED", "FRAMES HERE", "IN"],
        [
            (
                str(pack.slot),
                _short(pack),
                pack.kind,
                output.size(pack.stored),
                output.size(pack.device_size),
                output.size(pack.bytes),
                "-" if pack.frames is None else f"{pack.here} of {pack.frames}",
                "-" if pack.data is None else output.printable(os.path.dirname(pack.data)),
            )
            for pack in packs
        ],
        right=(0, 3, 4, 5, 6),
    )


def _sources(sources: list[Source], packs: int) -> None:
    from erofsgen.cli import output

    output.line()
    output.table(
        ["SOURCE", "LEVEL", "PACKS", "ANSWERED IN", "STATE"],
        [
            (
                output.printable(source.name),
                str(source.level or "-"),
                f"{sum(source.packs.values())} of {packs}" if source.packs else "-",
                "-" if source.latency is None else f"{1000 * source.latency:.1f} ms",
                _state(source),
            )
            for source in sources
        ],
        right=(3,),
    )


def _state(source: Source) -> str:
    from erofsgen.cli import output

    if source.error is not None:
        return output.one_line(source.error)
    if not source.asked:
        return "not asked"
    return "passes on; what it keeps cannot be asked" if source.proxy else "ok"


def _short(pack: Pack) -> str:
    return pack.digest.removeprefix("sha256:")[:12]
