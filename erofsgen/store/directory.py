"""A store in a directory: an OCI image layout, with a builder's own files beside it.

::

    STORE/
    ├── oci-layout                  {"imageLayoutVersion": "1.0.0"}
    ├── index.json                  references; replaced by rename, under lock.references
    ├── blobs/sha256/<hex>          immutable; appear by rename after fsync
    └── erofsgen/                   nothing here is part of an image
        ├── layers/<key>            layer records
        ├── dictionary/             chunk digests to packs (erofsgen.build.dictionary); can be rebuilt
        ├── downloads/              compressed layers on their way in
        ├── tmp/<random>            blobs being written; a crash leaves them, gc removes them
        ├── lock.build              shared: a build; exclusive: gc
        └── lock.references         exclusive: a change of index.json

Lock order: lock.build, then lock.references. A crash at any point leaves the old index.json or the new one, complete
blobs, and files in tmp/ that nothing names. Blobs that no reference reaches are garbage until a build names them.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgspec

from erofsgen.errors import BusyError, ErofsgenError, IntegrityError, NotFoundError, StorageError
from erofsgen.store import keys, layout
from erofsgen.store.base import BlobWriter, Descriptor, Store

_LAYOUT: Final = b'{"imageLayoutVersion":"1.0.0"}'
_WRITEBACK: Final = 16 << 20
"""Bytes after which the kernel is asked to start writing, so that the fsync at the end has little left to do."""


_POLL: Final = 0.2
"""Seconds between two tries for a lock that others share."""


class DirectoryStore(Store):
    """The store at ``path``; ``create`` makes the directory where it is missing."""

    def __init__(self, path: str | Path, *, create: bool = True) -> None:
        self.path = Path(path)
        self.url = str(path)
        self._blobs = self.path / "blobs" / "sha256"
        self.scratch = self._private = self.path / "erofsgen"
        self._records = self._private / "layers"
        with _storage(self.path):
            if create:
                self._initialise()
            elif not (self.path / "oci-layout").exists():
                raise NotFoundError(f"no store at {self.path}", hint="build an image first, or name another --store")

    def _initialise(self) -> None:
        for directory in (self._blobs, self._records, self._private / "tmp", self.downloads):
            directory.mkdir(parents=True, exist_ok=True)
        if not (self.path / "index.json").exists():
            with self._lock("lock.references", fcntl.LOCK_EX):
                if not (self.path / "index.json").exists():
                    self._replace(self.path / "index.json", msgspec.json.encode(layout.empty()))
        if not (self.path / "oci-layout").exists():
            self._replace(self.path / "oci-layout", _LAYOUT)

    def blob_path(self, digest: str) -> Path:
        """The file of a blob, whether it exists or not. Raises FormatError for what is no sha256 digest."""
        return self.path / keys.blob(digest)

    def size(self, digest: str) -> int | None:
        try:
            return os.stat(self.blob_path(digest)).st_size
        except FileNotFoundError:
            return None

    def read_into(self, digest: str, offset: int, buffer: memoryview) -> None:
        path = self.blob_path(digest)
        try:
            with path.open("rb", buffering=0) as blob:
                while buffer:
                    count = os.preadv(blob.fileno(), [buffer], offset)
                    if not count:
                        raise IntegrityError(
                            f"{path}: ends at byte {offset}, {len(buffer)} more expected", hint=_REBUILD
                        )
                    offset += count
                    buffer = buffer[count:]
        except FileNotFoundError:
            raise NotFoundError(f"{self.url}: no blob {digest}", hint=_REBUILD) from None
        except OSError as error:
            raise StorageError(f"{path}: {error.strerror}") from error

    def create(self, *, digest: str | None = None, size: int | None = None) -> BlobWriter:  # noqa: ARG002
        return _FileWriter(self._private / "tmp" / secrets.token_hex(8), self._blobs, digest)

    def blobs(self) -> Iterator[tuple[str, int]]:
        with _storage(self._blobs), os.scandir(self._blobs) as items:
            found = [(f"sha256:{item.name}", item.stat().st_size) for item in items]
        yield from found

    def delete(self, digest: str) -> None:
        with _storage(self._blobs):
            self.blob_path(digest).unlink(missing_ok=True)

    def references(self) -> dict[str, Descriptor]:
        return layout.images(self._read_index())

    def profiled(self) -> set[str]:
        return keys.images_profiled(layout.references(self._read_index()))

    def profiles(self, image: str) -> Descriptor | None:
        return layout.references(self._read_index()).get(keys.profiles(image))

    def tag(self, name: str, manifest: Descriptor) -> None:
        with self._changing_index() as index:
            layout.put(index, name, manifest)

    def untag(self, name: str) -> None:
        with self._changing_index() as index:
            if not layout.remove(index, name):
                raise NotFoundError(f"{self.url}: no image {name!r}", hint="see `erofsgen images`")

    def record(self, key: str) -> bytes | None:
        try:
            return (self._records / key).read_bytes()
        except FileNotFoundError:
            return None

    def put_record(self, key: str, data: bytes) -> None:
        with _storage(self._records):
            self._replace(self._records / key, data)

    def records(self) -> Iterator[str]:
        with _storage(self._records):
            yield from os.listdir(self._records)

    def delete_record(self, key: str) -> None:
        with _storage(self._records):
            (self._records / key).unlink(missing_ok=True)

    @contextmanager
    def building(self) -> Iterator[None]:
        with self._lock("lock.build", fcntl.LOCK_SH):
            yield

    @contextmanager
    def collecting(self, *, wait: float = 0.0) -> Iterator[None]:
        until = time.monotonic() + wait
        while True:
            try:
                with self._lock("lock.build", fcntl.LOCK_EX | fcntl.LOCK_NB):
                    for leftover in (self._private / "tmp").iterdir():
                        leftover.unlink()  # nobody is building: whoever wrote it is gone
                    yield
                    return
            except BlockingIOError:
                if time.monotonic() >= until:
                    hint = "try again when it has finished, or wait for it with --wait"
                    raise BusyError(f"{self.url}: a build is running", hint=hint) from None
                time.sleep(_POLL)

    def _read_index(self) -> layout.Index:
        path = self.path / keys.INDEX
        try:
            return layout.parse(path.read_bytes(), what=str(path))
        except FileNotFoundError:
            raise NotFoundError(f"no store at {self.path}", hint="build an image first") from None
        except OSError as error:
            raise StorageError(f"{path}: {error.strerror}") from error

    @contextmanager
    def _changing_index(self) -> Iterator[layout.Index]:
        with self._lock("lock.references", fcntl.LOCK_EX):
            index = self._read_index()
            yield index
            self._replace(self.path / "index.json", msgspec.json.encode(index))

    def _replace(self, path: Path, data: bytes) -> None:
        temporary = self._private / "tmp" / secrets.token_hex(8)
        with _storage(path):
            try:
                with temporary.open("xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                temporary.rename(path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
            _sync_directory(path.parent)

    @contextmanager
    def _lock(self, name: str, operation: int) -> Iterator[None]:
        with _storage(self._private / name):
            descriptor = os.open(self._private / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, operation)
            yield
        finally:
            os.close(descriptor)


_REBUILD: Final = "run `erofsgen check`, then build the image again"


class _FileWriter(BlobWriter):
    def __init__(self, temporary: Path, directory: Path, expected: str | None) -> None:
        self._expected = expected
        self._temporary = temporary
        self._directory = directory
        self._hash = hashlib.sha256()
        self._size = 0
        self._written_back = 0
        with _storage(temporary):
            self._fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)

    def write(self, data: bytes | bytearray | memoryview, /) -> None:
        self._hash.update(data)
        view = memoryview(data).cast("B")
        with _storage(self._directory):
            while view:
                written = os.write(self._fd, view)
                self._size += written
                view = view[written:]
            if self._size - self._written_back >= _WRITEBACK:
                # DONTNEED starts writing dirty pages and keeps those still dirty; see mm/fadvise.c
                os.posix_fadvise(self._fd, self._written_back, self._size - self._written_back, os.POSIX_FADV_DONTNEED)
                self._written_back = self._size

    def commit(self) -> tuple[str, int]:
        name = self._hash.hexdigest()
        if self._expected not in (None, f"sha256:{name}"):
            raise IntegrityError(f"blob sha256:{name} came instead of {self._expected}")
        with _storage(self._directory):
            os.fsync(self._fd)
            os.rename(self._temporary, self._directory / name)
            _sync_directory(self._directory)
        os.close(self._fd)
        self._fd = -1
        return f"sha256:{name}", self._size

    def __enter__(self) -> BlobWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self._temporary.unlink(missing_ok=True)


@contextmanager
def _storage(path: Path) -> Iterator[None]:
    """Turns an OSError about ``path`` into the user's line."""
    try:
        yield
    except ErofsgenError:
        raise
    except OSError as error:
        if error.errno == errno.EAGAIN:
            raise
        hint = None
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            hint = "free some space (`erofsgen gc`) and run the command again: finished layers are kept"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            hint = "choose another directory with --store"
        raise StorageError(f"{path}: {error.strerror}", hint=hint) from error


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
