"""A pack under a mark: which inode it is, and which mounts are being made of it."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from erofsgen.errors import StorageError
from erofsgen.host.daemon.lazypack import LazyPack


class MarkedPack(LazyPack):
    """The pack whose data file is ``data``; its map and TOC lie beside it. Raises StorageError, FormatError.

    ``descriptor`` writes to the data file without raising events, once an event has brought one. ``making``: mounts
    being made that will use it.
    """

    def __init__(self, data: Path, read_ahead: int) -> None:
        self.data = data
        self.making: set[str] = set()
        try:
            status = os.stat(data)
        except OSError as error:
            raise StorageError(f"{error.filename}: {error.strerror}", hint="run `erofsgen pull` again") from error
        self.inode = (status.st_dev, status.st_ino)
        super().__init__(data.stem, data.with_suffix(".toc"), data.with_suffix(".map"), read_ahead)
        if status.st_size != self.device_size:
            raise StorageError(f"{data}: {status.st_size} bytes, {self.device_size} expected")
        fcntl.flock(self.presence.fileno(), fcntl.LOCK_SH)  # so that nothing of it is evicted

    def close(self) -> None:
        """Let go of its files."""
        super().close()
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
