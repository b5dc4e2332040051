"""What processes and the kernel hold in memory, once or all the time while something runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hostkit import drop_caches


def proportional(pid: int) -> tuple[int, int]:
    """(proportional, resident) bytes of a process; shared pages count in parts in the first."""
    sizes = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, _, rest = line.partition(":")
        sizes[name] = int(rest.split()[0]) << 10
    return sizes["Pss"], sizes["Rss"]


def kernel_memory() -> dict[str, int]:
    """MemAvailable and Slab in bytes, after all that can be given back was."""
    drop_caches()
    time.sleep(0.5)
    lines = Path("/proc/meminfo").read_text().splitlines()
    sizes = {line.partition(":")[0]: int(line.split()[1]) << 10 for line in lines}
    return {name: sizes[name] for name in ("MemAvailable", "Slab")}


class Resident(NamedTuple):
    """Bytes of a process: resident now, at most since :func:`forget_peak`, and of those of now the anonymous ones."""

    now: int
    peak: int
    anonymous: int


def resident(pid: int) -> Resident:
    sizes = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return Resident(*(int(sizes[name].split()[0]) << 10 for name in ("VmRSS", "VmHWM", "RssAnon")))


def forget_peak(pid: int) -> None:
    Path(f"/proc/{pid}/clear_refs").write_text("5")


class MemorySampler(threading.Thread):
    """Bytes of a daemon every ``interval`` seconds: ``totals`` proportional of all its processes, ``worker`` resident.

    Of ``servers``, processes beside it: ``servers`` proportional of all, ``anonymous`` those of the one that has most.
    """

    def __init__(self, status: dict[str, Any], servers: Sequence[int] = (), *, interval: float = 0.1) -> None:
        super().__init__(daemon=True)
        self._pids = [status[name] for name in ("pid", "standby", "worker") if status[name]]
        self._worker = status["worker"]
        self._others = servers
        self._interval = interval
        self._ended = threading.Event()
        self.totals: list[int] = []
        self.worker: list[int] = []
        self.servers: list[int] = []
        self.anonymous: list[int] = []

    def run(self) -> None:
        while not self._ended.wait(self._interval):
            sizes = {pid: proportional(pid) for pid in self._pids}
            self.totals.append(sum(pss for pss, _ in sizes.values()))
            self.worker.append(sizes[self._worker][1])
            self.servers.append(sum(proportional(pid)[0] for pid in self._others))
            self.anonymous.append(max((resident(pid).anonymous for pid in self._others), default=0))

    def __enter__(self) -> MemorySampler:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        self.join()
