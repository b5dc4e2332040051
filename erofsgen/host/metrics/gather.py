"""What metrics are made of: the worker's own status, the supervisor's, the cache's size, what processes take."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from erofsgen import __version__
from erofsgen.errors import ErofsgenError
from erofsgen.host.cache.cache import HostCache
from erofsgen.host.daemon import control
from erofsgen.host.daemon.client import Client
from erofsgen.host.daemon.mounted import lazy_mounts

_FRESH: Final = 1.0
"""Seconds for which the supervisor is not asked again."""
_MEASURED: Final = 10.0
"""The same for the cache's size: where it has no limit, nobody keeps count, and all of its files are looked at."""
_PATIENCE: Final = 2.0
"""Seconds that the supervisor has to answer."""
_LABELS: Final = 100
OTHER: Final = "other"

_TICKS: Final = os.sysconf("SC_CLK_TCK")
_PAGE: Final = os.sysconf("SC_PAGESIZE")


@dataclass(frozen=True)
class Facts:
    """All there is to tell now. ``engine`` and ``prefetch`` are of the worker's status, ``supervisor`` is the other's,
    empty where it does not answer. ``label``: the label that an image has. ``mounts``: their number by plane."""

    engine: Mapping[str, Any]
    prefetch: Mapping[str, Any]
    supervisor: Mapping[str, Any]
    mounts: Mapping[str, int]
    cache: Mapping[str, int | None]
    processes: Mapping[str, Mapping[str, float]]
    label: Callable[[str], str]
    version: str = __version__


@dataclass
class _Kept:
    """A value that is good for a while."""

    find: Callable[[], dict[str, Any]]
    seconds: float
    until: float = 0.0
    value: dict[str, Any] = field(default_factory=dict)

    def get(self) -> dict[str, Any]:
        if time.monotonic() >= self.until:
            self.value = self.find()
            self.until = time.monotonic() + self.seconds
        return self.value


class Gatherer:
    """Gathers the facts of ``cache`` and its daemon; ``status`` is the worker's. Safe for threads."""

    def __init__(self, cache: HostCache, status: Callable[[], Mapping[str, Any]]) -> None:
        self._cache = cache
        self._status = status
        self._lock = threading.Lock()
        self._supervisor = _Kept(lambda: supervisor(cache.root), _FRESH)
        self._size = _Kept(self._measure, _MEASURED)
        self._known: set[str] = set()  # images that have a label of their own

    def gather(self) -> Facts:
        """What there is to tell now."""
        with self._lock:
            of_worker, of_supervisor = self._status(), self._supervisor.get()
            numbers = {name: int(of_supervisor.get(key) or 0) for name, key in _PROCESSES}
            numbers["worker"] = os.getpid()
            return Facts(
                engine=of_worker["engine"],
                prefetch=of_worker.get("prefetch") or {},
                supervisor=of_supervisor,
                mounts=Counter(str(mount["plane"]) for mount in lazy_mounts(self._cache.root)),
                cache=self._size.get(),
                processes={name: found for name, pid in numbers.items() if pid and (found := process(pid))},
                label=self._label,
            )

    def _label(self, image: str) -> str:
        """The label of an image, in which those share one that came late, or have no name."""
        if image not in self._known:
            if not image or len(self._known) >= _LABELS:
                return OTHER
            self._known.add(image)
        return image

    def _measure(self) -> dict[str, Any]:
        layout = self._cache.layout
        with suppress(ErofsgenError, OSError):
            layout.reload()
            return {
                "used": self._cache.room.used(),
                "limit": layout.config.max_bytes,
                "images": len(self._cache.digests()),
                "packs": len(layout.data_files()),
            }
        return {}


_PROCESSES: Final = (("supervisor", "pid"), ("standby", "standby"))
"""Processes that the supervisor knows, by the names of their numbers in its status."""


def supervisor(root: Path) -> dict[str, Any]:
    """The status of the supervisor of ``root``; nothing where it does not answer in time."""
    with suppress(ErofsgenError):
        connection = control.connect(root)
        if connection is not None:
            connection.settimeout(_PATIENCE)
            with Client(connection) as client:
                return client.call("status")
    return {}


def process(pid: int) -> dict[str, float] | None:
    """What a process takes: bytes of ``memory``, seconds of ``cpu``, open ``descriptors``, when it ``started``."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()  # proc_pid_stat(5): from field 3 on
        return {
            "memory": int(fields[21]) * _PAGE,
            "cpu": (int(fields[11]) + int(fields[12])) / _TICKS,
            "descriptors": len(os.listdir(f"/proc/{pid}/fd")),
            "started": _boot_time() + int(fields[19]) / _TICKS,
        }
    except OSError:
        return None


def _boot_time() -> float:
    with open("/proc/stat") as file:
        for line in file:
            if line.startswith("btime "):
                return float(line[6:])
    raise OSError("/proc/stat: no btime")
