"""``erofsgen daemon``: the supervisor of lazy mounts, in the foreground."""

from __future__ import annotations

import os
import sys

import click

from erofsgen.cli.shared import Settings, Size, cache_options, verb
from erofsgen.errors import NotFoundError


@verb()
@click.option(
    "--plane",
    type=click.Choice(["fanotify"]),
    metavar="PLANE",
    default="fanotify",
    show_default=True,
    help="How misses are noticed.",
)
@click.option(
    "--deadline",
    type=click.FloatRange(min=0.1),
    metavar="SECONDS",
    default=30.0,
    show_default=True,
    help="Seconds that a read may wait.",
)
@click.option(
    "--read-ahead", type=Size(), metavar="SIZE", default="32M", show_default=True, help="Brought ahead of large reads."
)
@click.option(
    "--memory", type=Size(), metavar="SIZE", default="40M", show_default=True, help="Bytes in flight at a time."
)
@click.option(
    "--threads", type=click.IntRange(min=1), metavar="N", default=8, show_default=True, help="Threads that fetch."
)
@click.option(
    "--complete-at",
    type=click.IntRange(0, 101),
    metavar="PERCENT",
    default=75,
    show_default=True,
    help="Complete a pack in the background when so many per cent are here; 101: never.",
)
@click.option(
    "--scrub",
    type=Size(),
    metavar="SIZE",
    default="0",
    show_default=True,
    help="Bytes a second of the cache to verify and repair in the background; 0: none.",
)
@click.option("--stop", is_flag=True, help="End the daemon that runs.")
@click.option("--force", is_flag=True, help="With --stop: although images are mounted; what is missing gives EIO.")
@cache_options
def command(
    settings: Settings,
    plane: str,
    deadline: float,
    read_ahead: int,
    memory: int,
    threads: int,
    complete_at: int,
    scrub: int,
    stop: bool,
    force: bool,
) -> None:
    """Bring the data that lazy mounts read.

    `erofsgen mount` starts one in the background where none runs; a service manager runs this in the foreground.
    """
    if stop:
        _stop(settings, force)
        return
    settings.cache()
    worker = ["--threads", threads, "--memory", memory, "--complete-at", complete_at / 100, "--scrub", scrub]
    arguments = ["--root", settings.root, "--plane", plane, "--deadline", deadline, "--read-ahead", read_ahead]
    os.execv(  # noqa: S606  (the program goes on as the supervisor, without what this one has imported)
        sys.executable,
        [
            sys.executable,
            "-m",
            "erofsgen.host.daemon.supervisor",
            *map(str, arguments),
            *(f"--worker={option}" for option in worker),
        ],
    )


def _stop(settings: Settings, force: bool) -> None:
    from erofsgen.host.daemon.client import Client

    client = Client.connect(settings.root)
    if client is None:
        raise NotFoundError(f"{settings.root}: no daemon is running")
    with client:
        client.stop(force=force)
