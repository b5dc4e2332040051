"""What a command is called whose profile is kept, and which profile is taken for a command."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final

from blake3 import blake3

from erofsgen.store.profiles import COMMAND_LIMIT

if TYPE_CHECKING:  # whoever starts a container only needs the name
    from erofsgen.profile.profile import Profile

_MARK: Final = 8
"""Hex digits that keep commands apart which look alike after they were cut."""

_NUMBER: Final = re.compile(r"(--?[A-Za-z][A-Za-z0-9-]*=)?[+-]?\d+(\.\d+)?", re.ASCII)


def command_name(argv: Sequence[str]) -> str:
    """The command ``argv`` as a line for a shell, made short as by :func:`short`; "" for none."""
    return short(shlex.join(argv))


def short(command: str) -> str:
    """``command``, a line or the word its user gave it, where it has at most 200 characters.

    A longer one is cut and ends in ``~`` and eight hexadecimal digits of the whole one's BLAKE3, so that different
    commands stay different. So does one with bytes that are no UTF-8, which are shown as ``\\xNN``.
    """
    raw = command.encode("utf-8", "surrogateescape")
    shown = raw.decode("utf-8", "backslashreplace")
    if shown == command and len(shown) <= COMMAND_LIMIT:
        return shown
    return f"{shown[: COMMAND_LIMIT - _MARK - 1]}~{blake3(raw).hexdigest()[:_MARK]}"


def key(command: str) -> str:
    """What can be the name of a file for ``command``: 32 hexadecimal digits of its BLAKE3."""
    return blake3(command.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def best(profiles: Iterable[Profile], command: str) -> Profile | None:
    """The profile for ``command``: its own, else that of a command that differs in plain numbers only; None of none.
    What was recorded of the latter comes before what is only guessed of its own.

    Numbers are whole words, or all that stands behind ``--option=``: ports, seeds, numbers of workers, ranks. They say
    how much a program does and where, hardly ever which files it reads first. Nothing else is taken for the same: the
    same program with another script or another model reads other files, and a prefetch of gigabytes nobody wants is
    worse than none. Of several that differ so, the one with the most runs is taken.
    """
    found = list(profiles)
    exact = next((profile for profile in found if profile.command == command), None)
    if exact is not None and exact.recorded:
        return exact
    wanted = _without_numbers(command)
    alike = [
        profile
        for profile in found
        if profile.recorded and profile.command and _without_numbers(profile.command) == wanted
    ]
    return max(alike, key=lambda profile: profile.runs, default=exact)


def _without_numbers(command: str) -> tuple[str, ...]:
    """The words of a command, numbers as 0. One that is no line for a shell, since it was cut, stays as it is."""
    try:
        words = shlex.split(command)
    except ValueError:
        return (command,)
    return tuple(f"{match[1] or ''}0" if (match := _NUMBER.fullmatch(word)) else word for word in words)
