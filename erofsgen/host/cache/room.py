"""The cache's byte limit: nothing is written before there is room for it.

``ROOT/ledger`` holds the bytes in use, and the boot in which they were counted, under an open-file-description lock;
every process adds to it before it writes, and takes away after it has given back. So the death of a process leaves the
number too high, never too low; in another boot it is counted anew. So it is by whoever holds ``lock.fill`` when it
begins, when nobody else writes frames.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from struct import Struct
from typing import Final

from erofsgen.errors import StorageError
from erofsgen.host.cache.files import Layout
from erofsgen.host.cache.presence import boot_id, locked

_COUNT: Final = Struct("<16sQ")  # boot id, bytes in use
FRAME_COST: Final = 4096
"""Bytes that a frame takes besides its own: the file system notes where they are (ext4: a block of the extent tree)."""

_HYSTERESIS: Final = 64
"""One of so many parts of the limit is freed beyond what is needed, so that not every frame evicts one."""


class Room:
    """Room in the cache of ``layout``; without a limit there always is. ``evict(bytes)`` frees some, or less.

    Safe for threads and processes.
    """

    def __init__(self, layout: Layout, evict: Callable[[int], int]) -> None:
        self._layout = layout
        self._evict = evict
        self._lock = threading.Lock()
        self._evicting = threading.Lock()
        self._boot = boot_id()
        self._descriptor = os.open(layout.root / "ledger", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    @property
    def limit(self) -> int | None:
        """Bytes that the cache may take."""
        return self._layout.config.max_bytes

    def count(self) -> int:
        """Count what is in use. Only for who holds ``lock.fill``, before it writes."""
        with self._ledger():
            used = self._layout.allocated()
            self._write(used)
            return used

    def reserve(self, size: int) -> None:
        """Take ``size`` bytes, after evicting what is needed. Raises StorageError where that is not possible."""
        limit = self.limit
        if limit is None:
            return
        if self._take(size, limit):
            return
        with self._evicting:
            if not self._take(size, limit):
                self._evict(size + limit // _HYSTERESIS)
                if not self._take(size, limit):
                    raise StorageError(
                        f"{self._layout.root}: the cache is full: its {limit} bytes are in use by mounts or pinned",
                        hint="unmount or unpin images, or raise the limit with --max-bytes",
                    )

    def make(self, size: int) -> bool:
        """Free ``size`` bytes, or less, because the disk is full. False: nothing could be."""
        with self._evicting:
            return self._evict(size) > 0

    def give_back(self, size: int) -> None:
        """``size`` bytes are free again."""
        if self.limit is not None:
            with self._ledger():
                self._write(max(0, self._read() - size))

    def used(self) -> int:
        """Bytes in use: as kept in the ledger where there is a limit, else counted. Raises StorageError."""
        if self.limit is None:
            return self._layout.allocated()
        with self._ledger():
            return self._read()

    def close(self) -> None:
        """Let go of the ledger."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _take(self, size: int, limit: int) -> bool:
        with self._ledger():
            used = self._read()
            if used + size > limit:
                return False
            self._write(used + size)
            return True

    def _read(self) -> int:
        data = os.pread(self._descriptor, _COUNT.size, 0)
        if len(data) == _COUNT.size:
            boot, used = _COUNT.unpack(data)
            if boot == self._boot:
                return int(used)
        return self._layout.allocated()

    def _write(self, used: int) -> None:
        try:
            os.pwrite(self._descriptor, _COUNT.pack(self._boot, used), 0)
        except OSError as error:
            raise StorageError(f"{self._layout.root / 'ledger'}: {error.strerror}") from error

    @contextmanager
    def _ledger(self) -> Iterator[None]:
        with self._lock, locked(self._descriptor):
            yield
