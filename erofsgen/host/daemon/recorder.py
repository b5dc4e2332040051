"""What mounts touch: counters for the user, and the first touches of each for its profile.

::

    plane ── touched, answered ──► supervisor's Recorder ── at its end ──► ROOT/recordings/<mount>.touches ──► worker

A file is one line of JSON, then the columns of :data:`COLUMNS`, each whole, in this machine's byte order: it is written
at once under another name, and taken in by the worker of the same host. What a supervisor had not written when it died
is lost: the mount's next run says the same.

A reader is told apart from others of the same pack by its root directory, which is the mount's, for a container. Where
that says nothing, a touch counts for all mounts that have the pack. Standard library only.
"""

from __future__ import annotations

import json
import os
import time
from array import array
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

DIRECTORY: Final = "recordings"
SUFFIX: Final = ".touches"

COLUMNS: Final = (("at", "I"), ("waited", "I"), ("pack", "H"), ("offset", "Q"), ("length", "I"), ("process", "H"))
"""Milliseconds from the mount, microseconds that the reader waited (0: it was there), number of the pack, device bytes
``[offset, offset + length)``, number of the process; as :mod:`array` types."""

ROWS: Final = 1 << 16
"""Touches of one recording at most."""
SECONDS: Final = 300.0
"""How long one recording lasts at most: a start is over by then."""
_RECORDINGS: Final = 64
"""Recordings at a time; more mounts are counted only."""
_COUNTERS: Final = ("touches", "touched_bytes", "misses", "missed_bytes", "waited")
_IMAGES: Final = 1000
"""Names of images whose mounts that are gone are counted; those of more images count together, without a name."""
_KNOWN: Final = 4096
"""Processes whose root directory is remembered."""
_BLOCK_BITS: Final = 12
_MOST: Final = (1 << 32) - 1


class Begun(NamedTuple):
    """A touch whose reader waits."""

    at: float
    rows: Sequence[tuple[Watch, int]]


class Watch:
    """One mount that is watched: its counters, and its recording while that lasts.

    ``facts`` are for whoever takes the recording in. ``packs``: SHA-256 in the order of device slots. ``active``: the
    user wants it recorded, so that complete packs have to be watched, too.
    """

    def __init__(
        self, mount: str, packs: Sequence[str], facts: dict[str, Any], *, active: bool, recording: bool
    ) -> None:
        self.mount = mount
        self.packs = packs
        self.facts = facts
        self.active = active
        self.recording = recording
        self.device: int | None = None
        self.began = time.monotonic()
        self.started = time.time()
        self.touches = self.touched_bytes = self.misses = self.missed_bytes = 0
        self.waited = 0.0
        self._columns = {name: array(kind) for name, kind in COLUMNS}
        self._seen: set[int] = set()
        self._processes: dict[int, int] = {}
        self._names: list[tuple[int, str]] = []
        self._unobserved: set[str] = set()

    def touch(self, number: int, offset: int, length: int, pid: int, *, missed: bool) -> int:
        """A range of pack ``number`` is read; the row that it has in the recording, -1: none."""
        self.touches += 1
        self.touched_bytes += length
        if missed:
            self.misses += 1
            self.missed_bytes += length
        if not self.recording:
            return -1
        key = number << 40 | offset >> _BLOCK_BITS
        if key in self._seen or len(self._seen) >= ROWS:
            return -1
        self._seen.add(key)
        process = self._processes.get(pid)
        if process is None:
            process = self._processes[pid] = min(len(self._names), (1 << 16) - 1)
            if process == len(self._names):
                self._names.append((pid, name_of(pid)))
        columns = self._columns
        columns["at"].append(int(1000 * (time.monotonic() - self.began)))
        columns["waited"].append(0)
        columns["pack"].append(number)
        columns["offset"].append(offset)
        columns["length"].append(min(length, _MOST))
        columns["process"].append(process)
        return len(columns["at"]) - 1

    def came(self, row: int, seconds: float) -> None:
        """What ``row`` waited for is there, or failed."""
        self.waited += seconds
        if row >= 0 and self.recording:
            self._columns["waited"][row] = max(1, min(int(1e6 * seconds), _MOST))

    def cannot_see(self, pack: str) -> None:
        """From now on reads of a pack are not told."""
        self._unobserved.add(pack)

    def finish(self, directory: Path, *, complete: bool) -> bool:
        """End the recording, and leave it below ``directory`` for the worker. False: there is nothing to tell."""
        if not self.recording:
            return False
        self.recording = False
        found = len(self._columns["at"])
        header = {
            **self.facts,
            "mount": self.mount,
            "packs": list(self.packs),
            "began": self.began,
            "started": self.started,
            "active": self.active,
            "complete": complete and found < ROWS,
            "processes": self._names,
            "unobserved": sorted(self._unobserved),
            "rows": found,
        }
        data = [json.dumps(header).encode(), b"\n", *(column.tobytes() for column in self._columns.values())]
        self._seen.clear()
        self._columns = {name: array(kind) for name, kind in COLUMNS}
        if not found and not self.active:
            return False
        with suppress(OSError):  # a profile is a hint; a full disk is told by what has to be written
            directory.mkdir(mode=0o700, exist_ok=True)
            part = directory / f"{self.mount}.part"
            part.write_bytes(b"".join(data))
            part.rename(directory / f"{self.mount}{SUFFIX}")
            return True
        return False

    def status(self) -> dict[str, Any]:
        """For ``status``."""
        return {
            "target": self.facts.get("target", ""),
            "image": self.facts.get("name", ""),
            "command": self.facts.get("command", ""),
            "touches": self.touches,
            "touched_bytes": self.touched_bytes,
            "misses": self.misses,
            "missed_bytes": self.missed_bytes,
            "waited": self.waited,
            "recording": self.recording,
        }


class Recorder:
    """The mounts of one daemon, below ``root``. All in the supervisor's thread."""

    def __init__(self, root: Path) -> None:
        self._directory = root / DIRECTORY
        self._watches: dict[str, Watch] = {}
        self._by_pack: dict[str, list[tuple[Watch, int]]] = {}
        self._waiting: dict[int, Begun] = {}
        self._unmounted: dict[str, dict[str, float]] = {}  # by the name of the image
        self._roots: dict[int, int | None] = {}  # of processes: the device number of their root directory

    def __len__(self) -> int:
        return len(self._watches)

    @property
    def recordings(self) -> int:
        """How many go on."""
        return sum(watch.recording for watch in self._watches.values())

    def begin(
        self, mount: str, packs: Iterable[str], facts: dict[str, Any], *, active: bool = False, record: bool = True
    ) -> None:
        """A mount is about to be made."""
        recording = record and (active or self.recordings < _RECORDINGS)
        watch = Watch(mount, list(packs), facts, active=active, recording=recording)
        self.end(mount)
        self._watches[mount] = watch
        for number, pack in enumerate(watch.packs):
            self._by_pack.setdefault(pack, []).append((watch, number))

    def mounted(self, mount: str, device: int | None) -> None:
        """It was made; ``device``: the number of what its readers have as root directory, as stat(2) has it."""
        watch = self._watches.get(mount)
        if watch is not None:
            watch.device = device

    def end(self, mount: str) -> bool:
        """It is gone. True: its recording is there for the worker."""
        watch = self._watches.pop(mount, None)
        if watch is None:
            return False
        for pack in set(watch.packs):
            left = [entry for entry in self._by_pack[pack] if entry[0] is not watch]
            if left:
                self._by_pack[pack] = left
            else:
                del self._by_pack[pack]
        self._count(watch)
        return watch.finish(self._directory, complete=True)

    def end_all(self) -> None:
        """The daemon ends."""
        for mount in list(self._watches):
            self.end(mount)

    def expire(self) -> bool:
        """End recordings whose time is up, but not their mounts' counters. True: one is there for the worker."""
        now = time.monotonic()
        due = [watch for watch in self._watches.values() if watch.recording and now - watch.began > SECONDS]
        finished = [watch.finish(self._directory, complete=False) for watch in due]
        return any(finished)

    def gone(self, devices: set[int]) -> list[str]:
        """The mounts that were made and are none of ``devices``, the numbers of what is mounted now."""
        return [watch.mount for watch in self._watches.values() if watch.device and watch.device not in devices]

    def wants(self, pack: str) -> bool:
        """Whether reads of a pack are to be told although all of it is there."""
        return any(watch.active and watch.recording for watch, _ in self._by_pack.get(pack, ()))

    def cannot_see(self, pack: str) -> None:
        """From now on reads of a pack are not told."""
        for watch, _ in self._by_pack.get(pack, ()):
            watch.cannot_see(pack)

    def touched(
        self, pack: str, offset: int, length: int, pid: int, key: int | None = None, mount: str | None = None
    ) -> None:
        """Somebody reads a range; ``key``: of the request, where it has to be brought. ``mount``: where it is known."""
        watches = self._by_pack.get(pack)
        if watches is None:
            return
        if len(watches) > 1:
            watches = self._of(watches, pid, mount)
        rows = [(watch, watch.touch(number, offset, length, pid, missed=key is not None)) for watch, number in watches]
        if key is not None:
            self._waiting[key] = Begun(time.monotonic(), rows)

    def answered(self, key: int) -> None:
        """A request that was touched has its answer."""
        begun = self._waiting.pop(key, None)
        if begun is not None:
            seconds = time.monotonic() - begun.at
            for watch, row in begun.rows:
                watch.came(row, seconds)

    def status(self) -> dict[str, Any]:
        """The mounts by their ids, for ``status``."""
        return {watch.mount: watch.status() for watch in self._watches.values()}

    def unmounted(self) -> dict[str, dict[str, float]]:
        """The counters of mounts that are gone, added up by the names of their images, for ``status``."""
        return self._unmounted

    def _count(self, watch: Watch) -> None:
        if watch.touches:
            name = str(watch.facts.get("name", ""))
            if name not in self._unmounted and len(self._unmounted) >= _IMAGES:
                name = ""
            total = self._unmounted.setdefault(name, dict.fromkeys(_COUNTERS, 0))
            for counter in _COUNTERS:
                total[counter] += getattr(watch, counter)

    def _of(self, watches: list[tuple[Watch, int]], pid: int, mount: str | None) -> list[tuple[Watch, int]]:
        if mount is not None:
            return [entry for entry in watches if entry[0].mount == mount]
        if pid not in self._roots:
            if len(self._roots) >= _KNOWN:
                self._roots.clear()
            self._roots[pid] = _root_device(pid)
        root = self._roots[pid]
        return [entry for entry in watches if entry[0].device == root] or watches


def name_of(pid: int) -> str:
    """A process's name, nothing where it has gone or is not known."""
    try:
        with open(f"/proc/{pid}/comm") as file:
            return file.read().rstrip("\n")
    except OSError:
        return ""


def _root_device(pid: int) -> int | None:
    try:
        return os.stat(f"/proc/{pid}/root").st_dev
    except OSError:
        return None
