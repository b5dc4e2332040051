"""Platforms of multi-platform images: ``os/architecture[/variant]``, normalised and matched as Docker does."""

from __future__ import annotations

import platform as host_platform
import re
from dataclasses import dataclass
from typing import Final

from erofsgen.errors import UsageError

_PART: Final = re.compile(r"[A-Za-z0-9_.-]+")
_SYSTEMS: Final = frozenset({"android", "darwin", "freebsd", "linux", "macos", "netbsd", "openbsd", "windows"})
_ARCHITECTURES: Final = {
    "x86_64": ("amd64", ""),
    "x86-64": ("amd64", ""),
    "aarch64": ("arm64", ""),
    "armhf": ("arm", "v7"),
    "armel": ("arm", "v6"),
    "i386": ("386", ""),
    "i486": ("386", ""),
    "i586": ("386", ""),
    "i686": ("386", ""),
    "loongarch64": ("loong64", ""),
}
_MACHINES: Final = re.compile(r"armv([5-8])")
_DEFAULT_VARIANTS: Final = {"amd64": "v1", "arm": "v7", "arm64": "v8"}
_OLDEST: Final = {"amd64": 1, "arm": 5, "arm64": 8}
"""What runs the newer variants of an architecture also runs the older ones, down to this."""


@dataclass(frozen=True, order=True)
class Platform:
    """One platform. ``variant`` is always spelt out where the architecture has a default one (``v8`` of arm64)."""

    os: str
    architecture: str
    variant: str = ""

    @classmethod
    def of(cls, os: str, architecture: str, variant: str = "") -> Platform:
        """Normalise what an image or a user says: ``aarch64`` is ``arm64``, ``macos`` is ``darwin``."""
        os, architecture, variant = os.lower(), architecture.lower(), variant.lower()
        architecture, implied = _ARCHITECTURES.get(architecture, (architecture, ""))
        variant = variant or implied or _DEFAULT_VARIANTS.get(architecture, "")
        if architecture in _OLDEST and variant.isdigit():
            variant = f"v{variant}"
        return cls("darwin" if os == "macos" else os, architecture, variant)

    @classmethod
    def parse(cls, text: str) -> Platform:
        """Read ``os``, ``architecture``, ``os/architecture`` or ``os/architecture/variant``.

        Raises UsageError (malformed).
        """
        parts = text.split("/")
        if len(parts) > 3 or not all(_PART.fullmatch(part) for part in parts):
            raise UsageError(f"platform {text!a} is malformed", hint="write os/architecture[/variant], as linux/arm64")
        if len(parts) > 1:
            return cls.of(*parts)
        here = cls.host()
        if text.lower() in _SYSTEMS:
            return cls.of(text, here.architecture, here.variant)
        return cls.of(here.os, text)

    @classmethod
    def host(cls) -> Platform:
        """This machine's: always Linux."""
        machine = host_platform.machine().lower()
        if match := _MACHINES.match(machine):
            return cls.of("linux", "arm", f"v{match[1]}")
        return cls.of("linux", machine)

    def __str__(self) -> str:
        default = _DEFAULT_VARIANTS.get(self.architecture) == self.variant and self.architecture != "arm"
        return "/".join(filter(None, (self.os, self.architecture, "" if default else self.variant)))

    def runnable(self) -> tuple[Platform, ...]:
        """What runs on this platform, best first: itself, then the older variants of its architecture."""
        number = self.variant[1:]
        if self.architecture not in _OLDEST or not number.isdigit():
            return (self,)
        variants = range(int(number), min(_OLDEST[self.architecture], int(number)) - 1, -1)
        return tuple(Platform(self.os, self.architecture, f"v{variant}") for variant in variants)
