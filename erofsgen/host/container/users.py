"""Who a container's process is: names and numbers looked up in the image's own /etc/passwd and /etc/group.

The rules are those of runc's and podman's: a user without a group gets the group of its passwd entry and, as
supplementary groups, all groups that list its name; a user with a group gets that group only. A number needs no entry.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from erofsgen.errors import NotFoundError
from erofsgen.host.container.rootfs import Rootfs

_ID_LIMIT: Final = 1 << 31


@dataclass(frozen=True)
class User:
    """A process's credentials. ``home`` is ``/`` where no entry says otherwise."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()
    home: str = "/"


def find_user(rootfs: Rootfs, spec: str) -> User:
    """``USER[:GROUP]``, names or numbers; nothing is root. Raises NotFoundError (a name without an entry),
    FormatError, StorageError."""
    who, colon, group = spec.partition(":")
    who = who or "0"
    name, uid, gid, home = None, _number(who), 0, "/"
    entries = [entry for entry in _passwd(rootfs) if who == entry[0]] or [
        entry for entry in _passwd(rootfs) if uid == entry[1]
    ]
    if entries:
        name, uid, gid, home = entries[0]
    if uid is None:
        raise NotFoundError(f"no user {who!r} in the image's /etc/passwd", hint="name a user by number, or with --user")
    if not colon or not group:
        members = {number for _, number, listed in _groups(rootfs) if name is not None and name in listed}
        return User(uid, gid, tuple(sorted(members - {gid})), home)
    numbers = [number for known, number, _ in _groups(rootfs) if known == group]
    chosen = numbers[0] if numbers else _number(group)
    if chosen is None:
        raise NotFoundError(f"no group {group!r} in the image's /etc/group", hint="name a group by number")
    return User(uid, chosen, (), home)


def _passwd(rootfs: Rootfs) -> Iterator[tuple[str, int, int, str]]:
    for fields in _entries(rootfs, "/etc/passwd"):
        if len(fields) >= 6:
            uid, gid = _number(fields[2]), _number(fields[3])
            if uid is not None and gid is not None:
                yield fields[0], uid, gid, fields[5] or "/"


def _groups(rootfs: Rootfs) -> Iterator[tuple[str, int, list[str]]]:
    for fields in _entries(rootfs, "/etc/group"):
        number = _number(fields[2]) if len(fields) >= 3 else None
        if number is not None:
            yield fields[0], number, fields[3].split(",") if len(fields) > 3 else []


def _entries(rootfs: Rootfs, path: str) -> Iterator[list[str]]:
    data = rootfs.read(path) or b""
    for line in data.decode("utf-8", "replace").split("\n"):
        if line.strip() and not line.startswith("#"):
            yield [field.strip() for field in line.split(":")]


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 11 and int(text) < _ID_LIMIT else None
