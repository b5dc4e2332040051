"""The command that a container starts with."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""Where programs are looked for in an image that does not say."""


@dataclass(frozen=True)
class Command:
    """``argv`` with the program first, its environment, and the directory it starts in."""

    argv: tuple[str, ...]
    env: Mapping[str, str]
    cwd: str

    @classmethod
    def of(cls, config: Mapping[str, Any], argv: Sequence[str] | None = None) -> Command:
        """What an image with the OCI config ``config`` runs: ``argv``, or its own Entrypoint and Cmd.

        What is not as the specification has it counts as absent.
        """
        wanted = config.get("config")
        wanted = wanted if isinstance(wanted, Mapping) else {}
        own = [*_strings(wanted.get("Entrypoint")), *_strings(wanted.get("Cmd"))]
        environment = {"PATH": PATH, "HOME": "/root"}
        for setting in _strings(wanted.get("Env")):
            name, _, value = setting.partition("=")
            environment[name] = value
        directory = wanted.get("WorkingDir")
        cwd = directory if isinstance(directory, str) and directory.startswith("/") else "/"
        return cls(tuple(own if argv is None else argv), environment, posixpath.normpath(cwd))


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, list):
        yield from (item for item in value if isinstance(item, str))
