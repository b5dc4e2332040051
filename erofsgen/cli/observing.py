"""Options of whoever starts a daemon: how it writes its log, and where it serves metrics."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from erofsgen.errors import BusyError
from erofsgen.host import logs
from erofsgen.host.metrics.address import VARIABLE, Address

F = TypeVar("F", bound=Callable[..., Any])


def observing_options(function: F) -> F:
    """``--log-format`` is told by the environment alone; ``--metrics`` comes as ``metrics`` and is for :func:`told`."""
    for option in (
        click.option(
            "--metrics", metavar="ADDRESS", envvar=VARIABLE,
            help="Serve Prometheus metrics at unix:PATH, HOST:PORT, or PORT of the loopback. Environment: "
            f"{VARIABLE}.",
        ),
        click.option(
            "--log-format", type=click.Choice(logs.FORMATS), metavar="text|json", expose_value=False,
            callback=_log_format, help=f"How the log is written. Environment: {logs.VARIABLE}.",
        ),
    ):  # fmt: skip
        function = option(function)
    return function


def told(metrics: str | None, root: Path, *, insist: bool = False) -> None:
    """Have the daemon of ``root`` that is about to be started serve metrics where the user says.

    That it cannot is for its log, and no reason for mounts to go without a daemon. Raises UsageError (no address), and
    BusyError with ``insist`` where a daemon runs that does not serve them there.
    """
    from erofsgen.host.daemon.client import Client

    if metrics is None:
        return
    address = str(Address.parse(metrics))
    client = Client.connect(root) if insist else None
    if client is not None:
        with client:
            if client.worker("status").get("metrics") != address:
                raise BusyError(
                    f"{root}: the daemon that runs serves no metrics at {address}",
                    hint="stop it first, or leave --metrics away",
                )
    os.environ[VARIABLE] = address


def _log_format(ctx: click.Context, parameter: click.Parameter, value: str | None) -> None:  # noqa: ARG001  (click's)
    if value is not None:
        os.environ[logs.VARIABLE] = value
