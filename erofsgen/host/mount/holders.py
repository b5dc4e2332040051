"""Who keeps a mount busy, as far as /proc tells."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress

from erofsgen.host import linux

_NAMED = 3


def holders(target: str, mount_id: int) -> str:
    """Mounts below ``target`` and processes in it, as words for a message; empty where none is found."""
    names = [point.target for point in linux.mount_points() if point.parent == mount_id]
    if not names:
        names = list(_processes(target))
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _processes(target: str) -> Iterator[str]:
    for number in sorted((name for name in os.listdir("/proc") if name.isdigit()), key=int):
        directory = f"/proc/{number}"
        with suppress(OSError):  # it has ended, or is not ours to look at
            if any(_inside(link, target) for link in _links(directory)):
                with open(f"{directory}/comm") as comm:
                    yield f"{comm.read().strip()} (pid {number})"


def _links(directory: str) -> Iterator[str]:
    """What a process uses: its directories, its open files, and the files it has mapped."""
    for name in ("cwd", "root"):
        yield os.readlink(f"{directory}/{name}")
    for name in os.listdir(f"{directory}/fd"):
        with suppress(FileNotFoundError):
            yield os.readlink(f"{directory}/fd/{name}")
    with open(f"{directory}/maps", errors="surrogateescape") as maps:
        for line in maps:
            yield line.rstrip("\n").partition("/")[1] + line.rstrip("\n").partition("/")[2]


def _inside(path: str, target: str) -> bool:
    return path == target or path.startswith(target + "/")
