"""The last resort against holes: a data file is cut off, so that EROFS gets EIO where it would read zeros.

EROFS asks its backing file for bytes behind the end and fails the read (7.0, and stable kernels from 6.12.117; measured
on 6.18), whatever mount, process or namespace it is for. What is in EROFS's own page cache stays readable, and right.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from erofsgen.errors import ErofsgenError
from erofsgen.host import linux
from erofsgen.host.cache.frames import frame_starts
from erofsgen.host.cache.presence import Presence


def cut_off(data: Path, *, but_served: bool = False) -> bool:
    """Cut a pack's data file off if it has holes and somebody has it open; says whether that was so.

    ``but_served``: not where a FUSE server has it open, which reads no hole. EROFS does not have that file open, too:
    whatever it had open lost its name when the server's first daemon started.

    Its name goes as well: what is fetched later goes to a new file, never to one that an old mount has open, which
    would read that file's new holes. The map goes first, so that a crash in between leaves nothing that is counted on.
    """
    try:
        descriptor = os.open(data, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        if _is_safe(data, but_served=but_served) or linux.sole_user(descriptor):
            return False
        data.with_suffix(".map").unlink(missing_ok=True)
        os.ftruncate(descriptor, 0)
        data.unlink(missing_ok=True)
        return True
    finally:
        os.close(descriptor)


def _is_safe(data: Path, *, but_served: bool) -> bool:
    with suppress(ErofsgenError, OSError):
        starts = frame_starts(data.with_suffix(".toc").read_bytes(), what=str(data))
        with Presence.open(data.with_suffix(".map"), len(starts) - 1) as presence:
            return os.stat(data).st_size == starts[-1] and (presence.complete or (but_served and presence.obeyed))
    return False
