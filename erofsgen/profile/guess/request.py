"""What an import statement asks for."""

from __future__ import annotations

from typing import NamedTuple


class Request(NamedTuple):
    """``import name`` (no ``names``) or ``from name import names``; ``level`` leading dots; ``name`` may then be empty.

    A star is the name ``*``.
    """

    level: int
    name: str
    names: tuple[str, ...]


class Code(NamedTuple):
    """What a module does when it is imported, in order, and the strings in it where they were asked for."""

    requests: list[Request]
    texts: list[str]
