"""What makes servers fast, and how to do without: docs/decisions.md has what each is worth.

``EROFSGEN_FUSE=max_read=1M,reply=copied`` in the environment of ``erofsgen mount`` changes some, for measurements and
for kernels that like others better.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from erofsgen.errors import UsageError
from erofsgen.host.mount.fuse import VARIABLE

_SWITCH: Final = {"on": True, "off": False}
_UNITS: Final = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


class Tuning(NamedTuple):
    """The settings, by the names that the environment has for them."""

    max_read: int = 4 << 20
    """Bytes of a read that are asked for; the kernel allows ``fs.fuse.max_pages_limit``, 1 MiB by default."""
    background: int = 256
    """Reads ahead of somebody that may wait here."""
    reply: str = "mapped"
    """``mapped``: with memory of the data file itself; ``copied``: with a copy of it."""
    mapped: int = 64 << 20
    """Bytes of data files that may count as a server's memory: mapped pages do, though the page cache has them anyway.
    """
    direct: bool = True
    """Packs below EROFS are cached by EROFS alone, and not by FUSE as well."""

    @classmethod
    def of(cls, text: str) -> Tuning:
        """The settings that ``text`` names, and the others as they are. Raises UsageError."""
        tuning = cls()
        for setting in filter(None, text.split(",")):
            name, _, value = setting.partition("=")
            try:
                tuning = tuning._replace(**{name: _parsed(value, getattr(tuning, name))})
            except (AttributeError, ValueError):
                known = ", ".join(cls._fields)
                raise UsageError(f"{VARIABLE}: {setting!r} is no setting", hint=f"there are {known}") from None
        return tuning


def _parsed(value: str, default: object) -> Any:  # noqa: ANN401  (of the default's type)
    if isinstance(default, bool):
        if value not in _SWITCH:
            raise ValueError(value)
        return _SWITCH[value]
    if isinstance(default, int):
        unit = value[-1:] if value[-1:] in _UNITS else ""
        return int(value.removesuffix(unit)) * _UNITS[unit]
    if value not in ("mapped", "copied"):
        raise ValueError(value)
    return value
