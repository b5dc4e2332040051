"""Room for what is wanted now: frames that nobody can be reading are given up, the least recently used first.

A frame in use must not go. A reader that was let pass a moment ago may still be on its way to the page cache, and
nothing tells when it has arrived: it would find a hole, and a hole reads as zeros. So frames are taken only from packs
that no open file but ours refers to, which the kernel proves by granting a write lease (:func:`linux.lease`): no mount,
lazily detached or in another namespace, can have such a pack. While the lease is held nobody can open the file either.

Locks: a shared flock on the map by whoever is about to use a pack (a mount being made, the plane); the exclusive one
here. Then the lease, then the map's own.
"""

from __future__ import annotations

import fcntl
import os
from collections import defaultdict
from collections.abc import Collection, Iterable
from contextlib import suppress
from operator import itemgetter
from pathlib import Path

from erofsgen.errors import ErofsgenError
from erofsgen.host import linux
from erofsgen.host.cache.files import PackFiles
from erofsgen.host.cache.frames import frame_starts
from erofsgen.host.cache.presence import Presence
from erofsgen.host.cache.room import FRAME_COST


def evict(packs: Iterable[Path], wanted: int, *, keep: Collection[str] = ()) -> int:
    """Free ``wanted`` bytes from ``packs``, data files, if that is possible; returns how much was freed.

    ``keep``: SHA-256 of packs to pass over.
    """
    frames = sorted(
        (
            (used, files, frame, size)
            for data in packs
            if data.stem not in keep
            for files in [PackFiles(data)]
            for used, frame, size in _frames(files)
        ),
        key=itemgetter(0),
    )
    freed = 0
    refused: set[PackFiles] = set()
    while freed < wanted:
        batch: dict[PackFiles, list[int]] = defaultdict(list)
        expected = freed
        rest = []
        for item in frames:
            _, files, frame, size = item
            if files in refused:
                continue
            if expected < wanted:
                batch[files].append(frame)
                expected += size
            else:
                rest.append(item)
        if not batch:
            break
        frames = rest
        for files, chosen in batch.items():
            got = _take(files, chosen)
            freed += got
            if not got:
                refused.add(files)
    return freed


def _frames(files: PackFiles) -> list[tuple[int, int, int]]:
    """(last use, number, bytes) of the frames that take room."""
    try:
        starts = frame_starts(files.toc.read_bytes(), what=str(files.toc))
        with Presence.open(files.map, len(starts) - 1) as presence:
            uses = presence.last_uses()
            return [
                (uses[frame], frame, starts[frame + 1] - starts[frame] + FRAME_COST)
                for frame in range(len(starts) - 1)
                if presence.occupied(frame)
            ]
    except (ErofsgenError, OSError):
        return []


def _take(files: PackFiles, frames: list[int]) -> int:
    """Give frames of one pack up; 0 where the pack is in use."""
    starts = frame_starts(files.toc.read_bytes(), what=str(files.toc))
    with Presence.open(files.map, len(starts) - 1) as presence:
        try:
            fcntl.flock(presence.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            descriptor = os.open(files.data, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return 0
        try:
            with linux.lease(descriptor) as granted:
                if not granted or os.fstat(descriptor).st_size != starts[-1]:  # or power has damaged the TOC
                    return 0
                presence.mark_absent(frames)  # durable before the bytes go
                freed = 0
                for frame in frames:
                    size = starts[frame + 1] - starts[frame]
                    with suppress(OSError):
                        linux.punch_hole(descriptor, starts[frame], size)
                        freed += size + FRAME_COST
                return freed
        finally:
            os.close(descriptor)
