"""What is about to run in a mount: which profile that has, and how it is to be prefetched."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, get_args

Mode = Literal["auto", "none", "heuristics", "profile"]
"""``auto``: by the command's profile, where there is one, else by heuristics."""

MODES: Final[tuple[Mode, ...]] = get_args(Mode)

RECORD: Final = "EROFSGEN_RECORD"
"""In the environment: ``TOKEN`` or ``TOKEN:NAME``, of who wants this start recorded."""

_LIMIT: Final = 64 << 10
"""Bytes of the environment that heuristics are told of at most."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """``command`` names the profile. ``argv``, ``environment`` and ``cwd``: of the process, for heuristics; nothing
    where it is not known. ``token``: of who wants it recorded whatever it costs; empty: nobody."""

    command: str = ""
    mode: Mode = "auto"
    argv: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    cwd: str = "/"
    token: str = ""

    def message(self, image: str) -> dict[str, Any] | None:
        """What the worker is told, for the image with this manifest's digest; None: nothing is to be prefetched."""
        if self.mode == "none":
            return None
        environment = dict(self.environment)
        while sum(map(len, environment.values())) > _LIMIT:
            del environment[max(environment, key=lambda name: len(environment[name]))]
        return {
            "image": image,
            "command": self.command,
            "mode": self.mode,
            "argv": list(self.argv) if sum(map(len, self.argv)) <= _LIMIT else [],
            "environment": environment,
            "cwd": self.cwd,
        }


def wanted_recording() -> tuple[str, str | None]:
    """The token of who wants this process's starts recorded, and the profile's name, if any; empty: nobody."""
    token, _, name = os.environ.get(RECORD, "").partition(":")
    return token, name or None
