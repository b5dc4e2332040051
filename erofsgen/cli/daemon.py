"""``erofsgen daemon``: the supervisor of lazy mounts, in the foreground."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

from erofsgen.cli.observing import observing_options, told
from erofsgen.cli.shared import Settings, Size, cache_options, verb
from erofsgen.errors import NotFoundError
from erofsgen.host.daemon.planes import LAZY

F = TypeVar("F", bound=Callable[..., Any])


def daemon_options(function: F) -> F:
    """The options of every daemon."""
    for option in reversed((
        click.option(
            "--deadline", type=click.FloatRange(min=0.1), metavar="SECONDS", default=30.0, show_default=True,
            help="Seconds that a read may wait.",
        ),
        click.option(
            "--read-ahead", type=Size(), metavar="SIZE", default="64M", show_default=True,
            help="Brought ahead of large reads.",
        ),
        click.option(
            "--memory", type=Size(), metavar="SIZE", default="48M", show_default=True,
            help="Bytes in flight at a time.",
        ),
        click.option(
            "--threads", type=click.IntRange(min=1), metavar="N", default=48, show_default=True,
            help="Threads that fetch.",
        ),
        click.option(
            "--complete-at", type=click.IntRange(0, 101), metavar="PERCENT", default=75, show_default=True,
            help="Complete a pack in the background when so many per cent are here; 101: never.",
        ),
        click.option(
            "--scrub", type=Size(), metavar="SIZE", default="0", show_default=True,
            help="Bytes a second of the cache to verify and repair in the background; 0: none.",
        ),
        click.option("--stop", is_flag=True, help="End the daemon that runs."),
        click.option(
            "--force", is_flag=True,
            help="With --stop: although images are mounted; what is missing gives EIO.",
        ),
        observing_options,
        cache_options,
    )):  # fmt: skip
        function = option(function)
    return function


def serve(settings: Settings, plane: str, plane_options: Mapping[str, object], options: Mapping[str, Any]) -> None:
    """Become the supervisor, or, with ``--stop``, end the one that runs. ``options``: of :func:`daemon_options`."""
    if options["stop"]:
        _stop(settings, options["force"])
        return
    from erofsgen.host.config import load

    load()  # what is wrong with it is for the user to see, not for the worker's log
    settings.cache()
    told(options["metrics"], settings.root)
    worker = {name: options[name] for name in ("threads", "memory", "scrub")}
    worker["complete-at"] = options["complete_at"] / 100
    arguments = {"root": settings.root, "plane": plane}
    arguments |= {"deadline": options["deadline"], "read-ahead": options["read_ahead"]}
    os.execv(  # noqa: S606  (the program goes on as the supervisor, without what this one has imported)
        sys.executable,
        [
            sys.executable,
            "-m",
            "erofsgen.host.daemon",
            *(word for name, value in arguments.items() for word in (f"--{name}", str(value))),
            *(f"--worker=--{name}={value}" for name, value in worker.items()),
            *(f"--plane-option={name}={value}" for name, value in plane_options.items()),
        ],
    )


@verb()
@click.option(
    "--plane", type=click.Choice(["auto", *LAZY]), metavar="PLANE", default="auto", show_default=True,
    help="How misses are noticed; auto takes the first that works here.",
)  # fmt: skip
@daemon_options
def command(settings: Settings, plane: str, **options: Any) -> None:  # noqa: ANN401
    """Bring the data that lazy mounts read.

    `erofsgen mount` starts one in the background where none runs; a service manager runs this in the foreground.
    """
    if plane == "auto" and not options["stop"]:
        from erofsgen.host.daemon.systemd import kept_names

        # after a crash the service manager still holds the plane's device, where none could be tried
        plane = next((lazy for lazy in LAZY if lazy in kept_names()), None) or settings.plane(plane)
    serve(settings, plane, {}, options)


def _stop(settings: Settings, force: bool) -> None:
    from erofsgen.host.daemon.client import Client

    client = Client.connect(settings.root)
    if client is None:
        raise NotFoundError(f"{settings.root}: no daemon is running")
    with client:
        client.stop(force=force)
