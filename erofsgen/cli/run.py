"""``erofsgen run``: a container from an image, in the foreground."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from erofsgen.cli.shared import Settings, image_argument, plane_options, start_options, verb
from erofsgen.errors import UsageError

if TYPE_CHECKING:
    from erofsgen.host.prefetch.start import Mode


@verb()
@image_argument()
@click.argument("cmd", nargs=-1, type=click.UNPROCESSED)
@click.option("-e", "--env", multiple=True, metavar="K[=V]", help="Set a variable, or pass this one's on. Repeatable.")
@click.option("-w", "--workdir", metavar="DIR", help="Working directory in the container; made where it is missing.")
@click.option(
    "-u", "--user", metavar="USER[:GROUP]", help="Names of the image's /etc/passwd and /etc/group, or numbers."
)
@click.option("-v", "--volume", multiple=True, metavar="SRC:DST[:ro]", help="Show SRC of this host as DST. Repeatable.")
@click.option("--entrypoint", metavar="PROGRAM", help="Instead of the image's Entrypoint and Cmd; or a JSON array.")
@click.option("--hostname", metavar="NAME", help="The container's host name. By default its --name.")
@click.option(
    "--network",
    type=click.Choice(["host", "none"]),
    default="host",
    metavar="host|none",
    help="This host's network, which is the default, or none but loopback.",
)
@click.option("--rw", is_flag=True, help="A writable root file system, which is the default.")
@click.option("--read-only", is_flag=True, help="A read-only root file system; /tmp, /var/tmp and /run are in memory.")
@click.option("--upper", type=click.Path(path_type=Path), metavar="DIR", help="Keep the container's changes in DIR.")
@click.option("--name", metavar="NAME", help="The container's id; random if not given.")
@click.option(
    "--runtime", default="auto", metavar="auto|runc|crun|PATH", help="OCI runtime; auto is the first that works here."
)
@plane_options
@start_options
@click.option("-t", "--tty", is_flag=True, help="Give the container a terminal.")
@click.option("-i", "--interactive", is_flag=True, help="Give it standard input; otherwise it reads nothing.")
@click.option("--rm", is_flag=True, help="Remove the container when it has ended. It is always so.")
def command(
    settings: Settings,
    image: str,
    cmd: tuple[str, ...],
    env: tuple[str, ...],
    workdir: str | None,
    user: str | None,
    volume: tuple[str, ...],
    entrypoint: str | None,
    hostname: str | None,
    network: str,
    rw: bool,
    read_only: bool,
    upper: Path | None,
    name: str | None,
    runtime: str,
    eager: bool,
    plane: str,
    prefetch: Mode | None,
    profile: str | None,
    tty: bool,
    interactive: bool,
    rm: bool,  # noqa: ARG001  (accepted, as podman's users type it)
) -> int:
    """Run a container from an image.

    Its files are there at once, their data arrives as it is read.
    Options stand before IMAGE; what follows it is the command, which replaces the image's Cmd. The container ends with
    its command and is removed; changes to its files are thrown away without --upper. Signals go to the container. The
    exit code is the command's, 128 + N where signal N ended it. No seccomp profile is applied.

    \b
    erofsgen run python
    erofsgen run -it -v .:/src -w /src python -- bash
    """
    if rw and read_only:
        raise UsageError("--rw and --read-only contradict each other")
    finding = settings.finding(image)
    from erofsgen.host.container.bundle import Options, Volume
    from erofsgen.host.container.run import run
    from erofsgen.host.prefetch.start import wanted_recording

    options = Options(
        command=cmd[1:] if cmd[:1] == ("--",) else cmd,
        entrypoint=None if entrypoint is None else _entrypoint(entrypoint),
        environment=_environment(env),
        workdir=workdir,
        user=user,
        volumes=[Volume.parse(text) for text in volume],
        hostname=hostname,
        network="none" if network == "none" else "host",
        read_only=read_only,
        terminal=tty,
    )
    token, recorded_as = wanted_recording()
    with settings.progress() as progress:
        found = finding.image(settings.cache(), progress)
    return run(
        found,
        options,
        root=settings.root,
        plane="eager" if eager else settings.plane(plane),
        name=name,
        upper=upper,
        runtime=runtime,
        interactive=interactive,
        prefetch=prefetch or ("none" if token else "auto"),
        profile=profile or recorded_as,
        token=token,
        progress=settings.progress(),
    )


command.allow_interspersed_args = False  # options behind IMAGE are the command's


def _environment(settings: tuple[str, ...]) -> dict[str, str]:
    """A variable without a value is passed on, if there is one."""
    environment = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not name:
            raise UsageError(f"variable {setting!r} has no name")
        if equals or name in os.environ:
            environment[name] = value if equals else os.environ[name]
    return environment


def _entrypoint(text: str) -> list[str]:
    if not text.startswith("["):
        return [text] if text else []
    try:
        words = json.loads(text)
        assert isinstance(words, list)
        assert all(isinstance(word, str) for word in words)
    except (ValueError, AssertionError):
        raise UsageError(f"entrypoint {text!r} is not a JSON array of strings") from None
    return words
