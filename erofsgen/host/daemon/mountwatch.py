"""What the supervisor knows of its mounts: what they touch, and what the worker prefetches for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from erofsgen.host import linux
from erofsgen.host.daemon.channel import Message
from erofsgen.host.daemon.mounted import device_number, lazy_mounts, packs_of
from erofsgen.host.daemon.recorder import Recorder


class MountWatch:
    """The lazy mounts of ``root``, made through the plane called ``plane``. ``tell`` speaks to the worker.

    A worker that dies is told again what it is to prefetch; recordings wait for the next in their directory.
    """

    def __init__(self, root: Path, plane: str, tell: Callable[[Message], None]) -> None:
        self.recorder = Recorder(root)
        self._root = root
        self._plane = plane
        self._tell = tell
        self._prefetching: dict[str, Message] = {}

    def inherit(self) -> None:
        """Count on for the mounts of an earlier supervisor."""
        for mount in lazy_mounts(self._root):
            facts = {"target": mount["target"], "name": mount["image"], "image": mount["digest"]}
            self.recorder.begin(mount["id"], packs_of(self._root, mount["digest"]), facts, record=False)
            self.recorder.mounted(mount["id"], device_number(mount["device"]))

    def begin(self, mount: str, packs: list[Path], command: dict[str, Any]) -> None:
        """A mount is about to be made that ``command`` wants armed."""
        record = command.get("record", "none")
        facts = {**command.get("facts", {}), "plane": self._plane}
        active = record == "active"
        self.recorder.begin(mount, [path.stem for path in packs], facts, active=active, record=record != "none")

    def made(self, mount: str, command: dict[str, Any]) -> None:
        """It was made, as ``command`` says."""
        device = command.get("device")
        self.recorder.mounted(mount, None if device is None else device_number(device))
        prefetch = command.get("prefetch")
        if prefetch is not None:
            self._prefetching[mount] = {"do": "prefetch", "mount": mount, **prefetch}
            self._tell(self._prefetching[mount])

    def gone(self, mount: str) -> None:
        """It was not made after all, or is there no more."""
        if self._prefetching.pop(mount, None) is not None:
            self._tell({"do": "no prefetch", "mount": mount})
        if self.recorder.end(mount):
            self._tell({"do": "recorded"})

    def prefetched(self, mount: str) -> None:
        """The worker is through with a mount."""
        self._prefetching.pop(mount, None)

    def worker_started(self) -> None:
        """There is another worker."""
        for message in self._prefetching.values():
            self._tell(message)

    def sweep(self) -> None:
        """Now and then: see what was unmounted without a word, and end recordings whose time is up."""
        if not len(self.recorder):
            return
        devices = {device_number(point.device) for point in linux.mount_points()}
        for mount in self.recorder.gone(devices):
            self.gone(mount)
        if self.recorder.expire():
            self._tell({"do": "recorded"})

    def status(self) -> dict[str, Any]:
        """For ``status``."""
        return {
            "mounts": self.recorder.status(),
            "unmounted": self.recorder.unmounted(),
            "recordings": self.recorder.recordings,
        }
