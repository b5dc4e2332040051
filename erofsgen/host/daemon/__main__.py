"""The daemon: becomes the supervisor of a root, anew or with what an earlier one has held.

``python -m erofsgen.host.daemon --root ROOT …``
"""

from __future__ import annotations

import argparse
import fcntl
import logging
import os
import resource
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from erofsgen.errors import BusyError, ErofsgenError, StorageError
from erofsgen.host import logs
from erofsgen.host.cache.cutoff import cut_off
from erofsgen.host.cache.files import Layout
from erofsgen.host.daemon import control, systemd
from erofsgen.host.daemon.journal import Journal
from erofsgen.host.daemon.planes import load
from erofsgen.host.daemon.supervisor import Supervisor

_logger: Final = logging.getLogger(__name__)

_DESCRIPTORS: Final = 1 << 20
"""Open files wanted: an event without a descriptor to spare is a read that fails."""
_HELD: Final = ("lock", "fill", "listen", "journal")
"""What a successor needs besides the plane's descriptor, which goes by the plane's name."""


def _lock(root: Path, name: str, *, wait: bool = False) -> int:
    try:
        descriptor = os.open(root / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StorageError(f"{root / name}: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(descriptor)
        raise BusyError(f"{root}: a daemon is running", hint="see `erofsgen status`") from None
    return descriptor


def _raise_limit() -> int:
    """Allow as many descriptors as may be; returns how many."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for wanted in (_DESCRIPTORS, hard):
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, max(wanted, hard)))
            return wanted
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def serve(options: argparse.Namespace, arguments: Sequence[str]) -> None:
    """Be the supervisor of ``options.root`` until told to stop. ``arguments`` start another like this."""
    root = Path(os.path.realpath(options.root))
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    make_plane = load(options.plane)
    slots = _raise_limit()
    held = dict(pair.split("=") for pair in options.inherit.split(",") if pair) if options.inherit else systemd.kept()
    holds = {name: int(number) for name, number in held.items()}
    for descriptor in holds.values():
        os.set_inheritable(descriptor, False)
    if "lock" not in holds:
        holds["lock"] = _lock(root, "lock.daemon")
    if "fill" not in holds:
        holds["fill"] = _lock(root, "lock.fill", wait=True)
    others = holds.keys() - {options.plane, *_HELD}
    if others:
        raise BusyError(
            f"{root}: still holds what plane {min(others)} needs", hint="stop the service, not only restart it"
        )
    fresh = options.plane not in holds
    settings = dict(setting.split("=", 1) for setting in options.plane_option)
    plane = make_plane(holds.get(options.plane), root=root, read_ahead=options.read_ahead, **settings)
    journal = None
    if plane.journalled:
        journal = Journal(holds["journal"]) if "journal" in holds else Journal.create(slots)
        holds["journal"] = journal.fileno()
    if plane.survives:
        holds[options.plane] = plane.fileno()
    if fresh:
        for path in Layout(root).data_files():
            if cut_off(path, but_served=plane.serves):
                _logger.error(
                    "%s: in use, incomplete, and no daemon was there: cut off, reads of it fail", path,
                    extra={"pack": path.stem},
                )  # fmt: skip
    listening = socket.socket(fileno=holds["listen"]) if "listen" in holds else control.listen(root)
    holds["listen"] = listening.fileno()
    if plane.survives:
        for name, descriptor in holds.items():
            systemd.keep(name, descriptor)
    if options.detach:
        if os.fork():
            os._exit(0)  # whoever waits for this knows that commands are taken
        os.setsid()
        os.dup2(2, 1)
        plane.moved()
    Supervisor(root, plane, journal, listening, holds, arguments, options).run()


def main() -> None:
    """``python -m erofsgen.host.daemon``; ``erofsgen daemon`` starts it."""
    parser = argparse.ArgumentParser(prog="erofsgen daemon")
    parser.add_argument("--root", required=True)
    parser.add_argument("--plane", default="fanotify")
    parser.add_argument("--deadline", type=float, default=30.0)
    parser.add_argument("--read-ahead", type=int, default=64 << 20)
    parser.add_argument("--plane-option", action="append", default=[])
    parser.add_argument("--inherit", default="")
    parser.add_argument("--detach", action="store_true")
    parser.add_argument("--worker", action="append", default=[])
    options = parser.parse_args()
    arguments = sys.argv[1:]
    if "--detach" in arguments:
        arguments.remove("--detach")
    if "--inherit" in arguments:
        at = arguments.index("--inherit")
        del arguments[at : at + 2]
    logs.set_up()
    try:
        serve(options, arguments)
    except ErofsgenError as error:
        sys.stderr.write(f"error: {error}\n" + (f"hint: {error.hint}\n" if error.hint else ""))
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
