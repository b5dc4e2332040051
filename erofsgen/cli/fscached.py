"""``erofsgen fscached``: the daemon of the kernel's own cache, in the foreground."""

from __future__ import annotations

from typing import Any

import click

from erofsgen.cli.daemon import daemon_options, serve
from erofsgen.cli.shared import Settings, verb

_PER_CENT = click.IntRange(0, 99)


@verb()
@click.option(
    "--brun",
    type=_PER_CENT,
    metavar="PERCENT",
    default=7,
    show_default=True,
    help="Free space of the disk at which culling ends.",
)
@click.option(
    "--bcull",
    type=_PER_CENT,
    metavar="PERCENT",
    default=5,
    show_default=True,
    help="Free space at which culling begins.",
)
@click.option(
    "--bstop", type=_PER_CENT, metavar="PERCENT", default=1, show_default=True,
    help="Free space below which nothing is written.",
)  # fmt: skip
@daemon_options
def command(settings: Settings, brun: int, bcull: int, bstop: int, **options: Any) -> None:  # noqa: ANN401
    """Fill the kernel's fscache with what mounts read.

    What `erofsgen daemon --plane fscache` does, with the limits of cachefiles. After `erofsgen pull NAME` the kernel
    mounts by itself: `mount -t erofs none DIR -o fsid=NAME,domain_id=erofsgen`. Needs Linux 5.19 to 7.1, built with
    CONFIG_CACHEFILES_ONDEMAND and CONFIG_EROFS_FS_ONDEMAND; one such daemon runs on a machine.
    """
    serve(settings, "fscache", {"brun": brun, "bcull": bcull, "bstop": bstop}, options)
