"""``erofsgen cache``: what the host cache holds, and how it becomes less."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import click

from erofsgen.cli.shared import Settings, image_argument, shared_options, verb
from erofsgen.errors import IntegrityError

if TYPE_CHECKING:
    from collections.abc import Callable

    from erofsgen.host.cache.cache import HostCache
    from erofsgen.host.cache.manage import Removed
    from erofsgen.progress import Progress

T = TypeVar("T")


@click.group(no_args_is_help=True)
def command() -> None:
    """Look at the host cache and look after it."""


command.params.extend(shared_options(json=True))


@verb(json=True, name="du")
def du(settings: Settings) -> None:
    """Say what images and packs take on the disk.

    An image's sizes are those of its packs, which it may share with others. Packs are listed with `--json`.
    """
    from erofsgen.cli import output
    from erofsgen.host.cache.manage import usage

    found = usage(settings.cache())
    if settings.json:
        output.document(found)
        return
    output.table(
        ["IMAGE", "NAMES", "PACKS", "DEVICE", "PRESENT", "ON DISK", "STATE"],
        [
            (
                image.digest.removeprefix("sha256:")[:12],
                output.printable(" ".join(image.names)),
                str(len(image.packs)),
                output.size(image.device),
                output.size(image.present),
                output.size(image.allocated),
                " ".join(word for word, true in (("pinned", image.pinned), ("in use", image.in_use)) if true),
            )
            for image in found.images
        ],
    )
    limit = "no limit" if found.limit is None else f"the limit is {output.size(found.limit)}"
    kernels = f", {output.size(found.fscache)} of it in the kernel's fscache" if found.fscache else ""
    packs = output.counted(len(found.packs), "pack")
    output.line(f"{packs}, {output.size(found.allocated)} on disk{kernels}; {limit}")


@verb(json=True, name="gc")
@click.option("--images", is_flag=True, help="Forget images that are neither in use nor pinned, too.")
@click.option("--dry-run", "-n", is_flag=True, help="Only say what would be removed.")
def gc(settings: Settings, images: bool, dry_run: bool) -> None:
    """Remove what no image of the cache needs.

    Packs that no image names, what crashes left more than a day ago, and the least recently used data beyond the limit.
    """
    from erofsgen.host.cache.manage import Removed, collect

    cache = settings.cache()
    with settings.progress() as progress:
        removed = _carry_out(
            cache,
            "gc",
            {"images": images, "dry_run": dry_run},
            Removed,
            lambda: collect(cache, images=images, dry_run=dry_run),
            progress,
        )
    _say(settings, removed, "would remove" if dry_run else "removed")


@verb(json=True, name="clear")
def clear(settings: Settings) -> None:
    """Remove everything that is not in use, pinned images included."""
    from erofsgen.host.cache.manage import Removed
    from erofsgen.host.cache.manage import clear as clear_cache

    cache = settings.cache()
    with settings.progress() as progress:
        removed = _carry_out(cache, "clear", {}, Removed, lambda: clear_cache(cache), progress)
    _say(settings, removed, "removed")


@verb(name="pin")
@image_argument()
def pin(settings: Settings, image: str) -> None:
    """Keep an image's data, whatever the limit says."""
    _pin(settings, image, on=True)


@verb(name="unpin")
@image_argument()
def unpin(settings: Settings, image: str) -> None:
    """Let an image's data go again when room is needed."""
    _pin(settings, image, on=False)


@verb(json=True, name="verify")
@click.option("--no-repair", is_flag=True, help="Only say what is bad.")
def verify(settings: Settings, no_repair: bool) -> int:
    """Compare all data of the cache with its digests.

    What is bad is fetched again and replaced in place. Exits with 5 if something bad could not be repaired.
    """
    from erofsgen.cli import output
    from erofsgen.host.cache.manage import verify_here
    from erofsgen.host.cache.verify import Report

    cache = settings.cache()
    with settings.progress() as progress:
        report = _carry_out(
            cache,
            "verify",
            {"repair": not no_repair},
            Report,
            lambda: verify_here(cache, repair=not no_repair, progress=progress),
            progress,
        )
    if settings.json:
        output.document(report)
    else:
        for bad in report.bad:
            frame = "" if bad.frame is None else f" frame {bad.frame}:"
            reason = f" ({bad.error})" if bad.error else ""
            output.line(output.one_line(f"pack {bad.pack}:{frame} {bad.outcome}{reason}"))
        found = output.counted(len(report.bad), "bad frame") if report.bad else "nothing bad"
        read = f"{output.counted(report.packs, 'pack')}, {output.counted(report.frames, 'frame')}"
        output.line(f"{read}, {output.size(report.bytes)} read: {found}")
    return 0 if report.repaired else IntegrityError.exit_code


for subcommand in (du, gc, pin, unpin, verify, clear):
    command.add_command(subcommand)


def _carry_out(
    cache: HostCache, do: str, arguments: dict[str, Any], kind: type[T], here: Callable[[], T], progress: Progress
) -> T:
    """Have a running daemon do something, or do it here."""
    import msgspec

    from erofsgen.host.pull import carry_out

    done = carry_out(cache, do, arguments, here, progress)
    return msgspec.convert(done, kind) if isinstance(done, dict) else done


def _pin(settings: Settings, image: str, *, on: bool) -> None:
    from erofsgen.store.open import absolute

    cache = settings.cache()
    cache.layout.pin(cache.image(image, absolute(settings.store)).digest, on=on)


def _say(settings: Settings, removed: Removed, done: str) -> None:
    from erofsgen.cli import output

    if settings.json:
        output.document(removed)
        return
    what = f"{output.counted(len(removed.images), 'image')}, {output.counted(len(removed.packs), 'pack')}"
    rest = output.counted(len(removed.leftovers), "leftover")
    output.line(f"{done} {what}, {rest}: {output.size(removed.bytes)}")
