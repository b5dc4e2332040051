"""What well-known packages load beyond what their import statements say, as traces of real imports show it.

A row names a module; what it says happens when that module is imported. Everything is optional: what an image does not
have is passed over, so one row serves many versions.
"""

from __future__ import annotations

from typing import Final, NamedTuple


class Stack(NamedTuple):
    """``imports``: modules that are imported by name or by compiled code; ``files``: what is read, as patterns relative
    to the module's directory; ``libraries``: what is loaded with dlopen(3), likewise; ``without``: full names of modules
    that import statements name but no import runs."""

    imports: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    libraries: tuple[str, ...] = ()
    without: frozenset[str] = frozenset()


_NONE: Final = Stack()

STACKS: Final[dict[str, Stack]] = {
}


def known(name: str) -> Stack:
    """The row of a module, an empty one for most."""
    return STACKS.get(name, _NONE)
