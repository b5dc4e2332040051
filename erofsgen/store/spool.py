"""A blob in a nameless local file until it is whole, for stores that are written to by uploads."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from erofsgen.errors import IntegrityError, StorageError
from erofsgen.store.base import BlobWriter

_PIECE: Final = 1 << 20


class Spool(BlobWriter):
    """A blob in ``directory``; once it is whole, ``publish(digest, size, spool)`` writes it where it belongs.

    ``digest`` and ``size`` are what was announced.
    """

    def __init__(
        self, directory: Path, digest: str | None, size: int | None, publish: Callable[[str, int, Spool], None]
    ) -> None:
        self._directory = directory
        self._announced = digest, size
        self._publish = publish
        self._hash = hashlib.sha256()
        self._size = 0
        with self._spooling():
            directory.mkdir(parents=True, exist_ok=True)
            self.file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115  (closed when it has been published)

    def write(self, data: bytes | bytearray | memoryview, /) -> None:
        self._hash.update(data)
        with self._spooling():
            self.file.write(data)
        self._size += memoryview(data).nbytes

    def commit(self) -> tuple[str, int]:
        digest, size = self._announced
        found = f"sha256:{self._hash.hexdigest()}"
        if digest not in (None, found):
            raise IntegrityError(f"blob {found} came instead of {digest}")
        if size not in (None, self._size):
            raise IntegrityError(f"blob {found} is {self._size} bytes, {size} expected")
        with self._spooling():
            self.file.seek(0)  # and write what is buffered
        self._publish(found, self._size, self)
        self.file.close()
        return found, self._size

    def pieces(self) -> Iterator[bytes]:
        """The blob, each time from its start."""
        with self._spooling():
            self.file.seek(0)
            while piece := self.file.read(_PIECE):
                yield piece

    def __enter__(self) -> BlobWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        with self._spooling():
            self.file.close()

    @contextmanager
    def _spooling(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            hint = "free some space there, or set XDG_CACHE_HOME to another directory"
            raise StorageError(f"{self._directory}: {error.strerror}", hint=hint) from error
