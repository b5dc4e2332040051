"""``erofsgen profile``: what is known of what commands touch first.

Each sub-verb is a module of its own, ``erofsgen.cli.profile<sub-verb>``, which defines ``command``.
"""

from __future__ import annotations

import importlib
from typing import Final

import click

from erofsgen.cli.shared import shared_options

VERBS: Final = ("record", "ls", "show", "export", "import", "push", "rm")
"""In the order ``--help`` lists them."""


class Group(click.Group):
    """Imports a sub-verb's module when it is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  (click's signature)
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in VERBS:
            return None
        found = importlib.import_module(f"erofsgen.cli.profile{cmd_name}").command
        assert isinstance(found, click.Command)
        return found


command = Group(
    "profile",
    params=shared_options(json=True),
    help="Record, show and move profiles of what commands touch.",
    no_args_is_help=True,
)
