"""The lazy mounts that a daemon has to care for when it ends. Standard library only."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

from erofsgen.host import linux


def lazy_mounts(root: Path) -> list[dict[str, Any]]:
    """The states of this boot's mounts that need a daemon, see :mod:`erofsgen.host.mount.state`."""
    found = []
    boot = linux.boot_id()
    for path in (root / "mounts").glob("*.json"):
        with suppress(OSError, ValueError):
            state = json.loads(path.read_bytes())
            if state["plane"] != "eager" and state["boot_id"] == boot:
                found.append(state)
    targets = {point.id: point for point in linux.mount_points()}
    here = os.stat("/proc/self/ns/mnt").st_ino
    return [
        state
        for state in found
        if state["namespace"] != here
        or ((point := targets.get(state["mount_id"])) is not None and point.device == state["device"])
    ]


def device_number(device: str) -> int:
    """``major:minor``, as mountinfo has it, as stat(2) does."""
    major, _, minor = device.partition(":")
    return os.makedev(int(major), int(minor))


def packs_of(root: Path, digest: str) -> list[str]:
    """The SHA-256 of an image's packs, in the order of device slots; none where its manifest is not here."""
    try:
        layers = json.loads((root / "images" / f"{digest.removeprefix('sha256:')}.json").read_bytes())["layers"]
        return [str(layer["digest"]).removeprefix("sha256:") for layer in layers[1:]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def detach(mount: dict[str, Any]) -> None:
    """Take one out of the file tree, wherever it is by now."""
    for point in linux.mount_points():
        if point.id == mount["mount_id"] and point.device == mount["device"]:
            with suppress(OSError):
                take_away(point.target, lazy=True)


def take_away(target: str, *, lazy: bool) -> None:
    """Unmount what is on ``target``; ``lazy``: also while it is in use. Raises OSError.

    A plain user's FUSE mount is for fusermount3, which tells why not only in words: EBUSY stands for all of them.
    """
    try:
        linux.umount(target, linux.UMOUNT_NOFOLLOW | (linux.MNT_DETACH if lazy else 0))
    except PermissionError:
        command = ["fusermount3", "-u", *(["-z"] if lazy else []), "--", target]
        try:
            ended = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
        except FileNotFoundError:
            ended = None
        if ended is None or b"not permitted" in ended.stderr:
            raise
        if ended.returncode:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), target) from None
