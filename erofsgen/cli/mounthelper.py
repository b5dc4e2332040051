"""``mount.erofsgen``: what mount(8) calls for ``mount -t erofsgen IMAGE DIR -o …`` and for lines of /etc/fstab.

::

    mount.erofsgen IMAGE DIR [-sfnv] [-o OPTION,…] [-t TYPE]

``mount.fuse.erofsgen`` is the same for the type ``fuse.erofsgen``: the plane is fuse where none is named.

mount(8) puts ``rw`` in front of the options unless it was told ``ro``: whether somebody wrote ``rw`` cannot be seen. So
the helper does as it is told, and a mount is read-only where ``ro`` is written or no access is named at all.
"""

from __future__ import annotations

import getopt
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NoReturn

from erofsgen.cli.output import one_line
from erofsgen.cli.shared import Settings
from erofsgen.errors import ErofsgenError, UnsupportedError, UsageError
from erofsgen.host import linux
from erofsgen.host.daemon.planes import LAZY

USAGE: Final = 1
SYSTEM: Final = 2
INTERNAL: Final = 4
INTERRUPTED: Final = 8
FAILED: Final = 32
"""Exit codes of mount(8)."""

FUSE: Final = "mount.fuse.erofsgen"

_POSITIVE: Final = {"suid": "nosuid", "dev": "nodev", "exec": "noexec"}
_IGNORED: Final = re.compile(
    r"defaults|(no)?auto|nofail|_netdev|(no)?(user|group|owner|users)|user=.*|comment=.*|[xX]-.*|loud|silent"
    r"|a?sync|dirsync|(no)?(relatime|atime|diratime|strictatime|lazytime|iversion|mand)"
)
"""What is for mount(8) and its callers, or says nothing about a file system that keeps no access times."""

_USAGE_HINT: Final = "mount.erofsgen IMAGE DIR [-o store=DIR,root=DIR,ro|rw,upper=DIR,eager,plane=NAME,allow_other,…]"


@dataclass
class Request:
    """A command line, understood."""

    image: str
    target: Path
    settings: Settings
    rw: bool = False
    upper: Path | None = None
    plane: str = "auto"
    allow_other: bool = False
    attributes: set[str] = field(default_factory=set)
    fake: bool = False
    verbose: bool = False


def main() -> NoReturn:
    """Entry point of ``mount.erofsgen``."""
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGHUP, _interrupt)
    plane = "fuse" if Path(sys.argv[0]).name == FUSE else "auto"
    sys.exit(run(sys.argv[1:], plane))


def run(arguments: Sequence[str], plane: str = "auto") -> int:
    """Run one command line; returns mount(8)'s exit code. ``plane``: where none is named."""
    try:
        request = parse(arguments, plane)
        if not request.fake:
            _mount(request)
    except UsageError as error:
        return _say(error, USAGE)
    except ErofsgenError as error:
        return _say(error, FAILED)
    except (OSError, MemoryError) as error:
        return _say(error, SYSTEM)
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:  # noqa: BLE001  (the one place that reports)
        return _say(error, INTERNAL)
    if request.verbose:
        print(f"{request.image} mounted on {request.target}")  # noqa: T201
    return 0


def parse(arguments: Sequence[str], plane: str = "auto") -> Request:
    """Understand a command line, for ``plane`` unless it names one.

    Raises UsageError; unknown options are let through with ``-s``.
    """
    try:
        flags, names = getopt.gnu_getopt(list(arguments), "sfnvo:t:N:")
    except getopt.GetoptError as error:
        raise UsageError(f"{error.msg}", hint=_USAGE_HINT) from None
    if len(names) != 2:
        raise UsageError("an image and a directory are wanted", hint=_USAGE_HINT)
    given = {flag for flag, _ in flags}
    if "-N" in given:
        raise UsageError("-N is not supported", hint="use nsenter(1)")
    request = Request(names[0], Path(names[1]), Settings(), plane=plane, fake="-f" in given, verbose="-v" in given)
    access: str | None = None
    for flag, value in flags:
        if flag != "-o":
            continue
        for option in split(value):
            name, equals, argument = option.partition("=")
            match name:
                case "ro" | "rw" if not equals:
                    access = name
                case "eager" if not equals:
                    request.plane = "eager"
                case "allow_other" if not equals:
                    request.allow_other = True
                case "plane" if argument:
                    request.plane = argument
                case "store" if argument:
                    request.settings.store = argument
                case "root" if argument:
                    request.settings.root = Path(argument)
                case "upper" if argument:
                    request.upper = Path(argument)
                case _ if option in linux.MOUNT_ATTRIBUTES:
                    request.attributes.add(option)
                case _ if option in _POSITIVE:
                    request.attributes.discard(_POSITIVE[option])
                case _ if not _IGNORED.fullmatch(option) and "-s" not in given:
                    raise UsageError(f"unknown mount option {option!r}", hint=_USAGE_HINT)
    if request.upper is not None and access == "ro":
        raise UsageError("ro and upper=DIR contradict each other")
    request.rw = access == "rw" or request.upper is not None
    return request


def split(options: str) -> Iterator[str]:
    """Options as libmount separates them: a comma in double quotes or behind a backslash belongs to a value."""
    for option in re.findall(r'(?:\\,|"[^"]*"?|[^,"])+', options):
        yield re.sub(r'\\,|"', lambda match: "," if match[0] == "\\," else "", option)


def _mount(request: Request) -> None:
    finding = request.settings.finding(request.image)
    from erofsgen.host.mount.mounts import mount

    if request.plane not in ("auto", "eager", *LAZY):
        raise UnsupportedError(f"no plane {request.plane}", hint=f"use one of auto, {', '.join(LAZY)}, eager")
    mount(
        finding.image(request.settings.cache()),
        request.target,
        root=request.settings.root,
        plane=request.settings.plane(request.plane),
        rw=request.rw,
        upper=request.upper,
        allow_other=request.allow_other,
        attributes=sum(linux.MOUNT_ATTRIBUTES[name] for name in request.attributes),
    )


def _say(error: BaseException, code: int) -> int:
    text = str(error)
    if isinstance(error, OSError):
        text = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
    elif code == INTERNAL:
        text = f"internal error: {type(error).__name__}: {error}"
    sys.stderr.write(f"mount.erofsgen: {one_line(text or 'out of memory')}\n")
    if isinstance(error, ErofsgenError) and error.hint:
        sys.stderr.write(f"hint: {one_line(error.hint)}\n")
    return code


def _interrupt(number: int, frame: object) -> NoReturn:  # noqa: ARG001  (a signal handler's arguments)
    raise KeyboardInterrupt
