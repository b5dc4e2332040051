"""What a service talks with systemd about: readiness, and descriptors kept for its next start (sd_notify(3),
sd_listen_fds(3), FileDescriptorStoreMax= in systemd.service(5))."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from typing import Final

_FIRST: Final = 3
"""SD_LISTEN_FDS_START."""


def notify(*lines: str, descriptor: int | None = None) -> bool:
    """Tell systemd ``lines`` such as ``READY=1``; False where it did not start us."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return False
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as out:
        out.connect("\0" + address[1:] if address.startswith("@") else address)
        socket.send_fds(out, ["\n".join(lines).encode()], [] if descriptor is None else [descriptor])
        return True
    return False


def keep(name: str, descriptor: int) -> None:
    """Have systemd hold a descriptor until the service is stopped for good. No hang-up may drop it: FDPOLL=0."""
    notify("FDSTORE=1", f"FDNAME={name}", "FDPOLL=0", descriptor=descriptor)


def drop(name: str) -> None:
    """Have systemd let go of what it holds."""
    notify("FDSTOREREMOVE=1", f"FDNAME={name}")


def kept_names() -> list[str]:
    """The names of the descriptors that systemd has for this process, which :func:`kept` takes."""
    mine = os.environ.get("LISTEN_PID") == str(os.getpid())
    return os.environ.get("LISTEN_FDNAMES", "").split(":") if mine else []


def kept() -> dict[str, int]:
    """The descriptors that systemd has held for us, by name. They are not inherited by children."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return {}
    names = os.environ.get("LISTEN_FDNAMES", "").split(":")
    found = {}
    for number in range(int(os.environ.get("LISTEN_FDS", "0"))):
        descriptor = _FIRST + number
        os.set_inheritable(descriptor, False)
        if number < len(names):
            found[names[number]] = descriptor
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(name, None)
    return found
