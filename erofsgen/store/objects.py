"""Stores whose place holds objects, as S3 does: what to do with them, whoever keeps them.

Every blob, reference, layer record and lock is one object, see :mod:`.keys`. Objects appear whole or not at all, and a
listing shows whatever was written before it: nothing else is asked of the service, no conditional writes in particular.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO, Final, NamedTuple

import msgspec

from erofsgen.errors import NotFoundError, UsageError
from erofsgen.store import keys
from erofsgen.store.base import DESCRIPTOR_LIMIT, BlobWriter, Descriptor, Speed, Store
from erofsgen.store.documents import EMBEDDED, Documents
from erofsgen.store.locks import Locks, Times
from erofsgen.store.spool import Spool

_RECORD_LIMIT: Final = 1 << 30
_THREADS: Final = 8


class Object(NamedTuple):
    """One object: its size in bytes, and when the server says it was written, in seconds since 1970."""

    key: str
    size: int
    modified: float


class Objects(ABC):
    """Objects of one place; keys are relative to it. Thread-safe. All raise RemoteError, and NotFoundError where the
    place itself does not exist."""

    speed: Speed | None = None
    key_limit: int
    """Bytes that a key may have at most."""

    @abstractmethod
    def get(self, key: str, limit: int) -> bytes | None:
        """A small object, None where there is none. Raises RemoteError for more than ``limit`` bytes, too."""

    @abstractmethod
    def read_into(self, key: str, offset: int, buffer: memoryview, what: str) -> None:
        """Fill ``buffer``. Raises NotFoundError (no such object), IntegrityError (it is shorter), naming ``what``."""

    @abstractmethod
    def size(self, key: str) -> int | None:
        """Bytes of an object, None where there is none."""

    @abstractmethod
    def put(self, key: str, data: bytes) -> None:
        """Write a small object, replacing another."""

    @abstractmethod
    def put_file(self, key: str, file: IO[bytes], size: int) -> None:
        """Write an object with the ``size`` bytes of ``file``; whole or not at all."""

    @abstractmethod
    def list(self, prefix: str) -> Iterable[Object]:
        """All objects whose keys begin with ``prefix``."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Delete an object; no error where there is none."""

    @abstractmethod
    def sweep(self, prefix: str) -> None:
        """Drop what writers that crashed have left of objects whose keys begin with ``prefix``. Nobody may be writing
        any."""

    def doubt(self) -> None:  # noqa: B027  (most learn nothing)
        """As :meth:`.base.Store.doubt`."""

    @abstractmethod
    def close(self) -> None:
        """Let go of connections."""


class ObjectStore(Store):
    """The store that ``objects`` make up. ``scratch`` is for what is on its way there."""

    def __init__(self, url: str, objects: Objects, scratch: Path, *, times: Times | None = None) -> None:
        self.url = url
        self.scratch = scratch
        self._objects = objects
        self._documents = Documents()
        self._locks = Locks(objects, url, times or Times())

    @property
    def speed(self) -> Speed | None:  # type: ignore[override]
        return self._objects.speed

    def size(self, digest: str) -> int | None:
        return self._objects.size(keys.blob(digest))

    def read_into(self, digest: str, offset: int, buffer: memoryview) -> None:
        if not self._documents.read_into(digest, offset, buffer):
            self._objects.read_into(keys.blob(digest), offset, buffer, f"blob {digest}")

    def create(self, *, digest: str | None = None, size: int | None = None) -> BlobWriter:
        return Spool(self.scratch / "tmp", digest, size, self._upload)

    def blobs(self) -> Iterator[tuple[str, int]]:
        for found in self._objects.list(keys.BLOBS):
            yield f"sha256:{found.key.removeprefix(keys.BLOBS)}", found.size

    def delete(self, digest: str) -> None:
        self._locks.check()
        self._objects.delete(keys.blob(digest))

    def references(self) -> dict[str, Descriptor]:
        names = keys.images(self._names(""))
        nowhere = Documents()
        with ThreadPoolExecutor(_THREADS, "references") as pool:
            meant = list(pool.map(lambda name: self._meaning(name, nowhere), names))
        return {name: manifest for name, manifest in zip(names, meant, strict=True) if manifest is not None}

    def reference(self, name: str) -> Descriptor | None:
        return None if keys.profiled(name) else self._meaning(name, self._documents)

    def profiled(self) -> set[str]:
        return keys.images_profiled(self._names("sha256-"))

    def profiles(self, image: str) -> Descriptor | None:
        return self._meaning(keys.profiles(image), self._documents)

    def _names(self, begin: str) -> list[str]:
        """All names, or those that begin so."""
        return [keys.name(found.key) for found in self._objects.list(keys.REFERENCES + begin)]

    def _meaning(self, name: str, documents: Documents) -> Descriptor | None:
        key = keys.reference(name)
        data = self._objects.get(key, DESCRIPTOR_LIMIT)
        return None if data is None else documents.parse(data, f"{self.url}: {key}")

    def check_name(self, name: str) -> None:
        super().check_name(name)
        if len(keys.reference(name)) > self._objects.key_limit:
            raise UsageError(f"{self.url}: the name is too long: {name[:40]}…", hint="choose a shorter one")

    def tag(self, name: str, manifest: Descriptor) -> None:
        self._locks.check()
        if len(manifest.data or b"") > EMBEDDED:
            manifest = msgspec.structs.replace(manifest, data=None)
        self._objects.put(keys.reference(name), msgspec.json.encode(manifest))

    def untag(self, name: str) -> None:
        key = keys.reference(name)
        if self._objects.size(key) is None:
            raise NotFoundError(f"{self.url}: no image {name!r}", hint="see `erofsgen images`")
        self._objects.delete(key)

    def record(self, key: str) -> bytes | None:
        return self._objects.get(keys.RECORDS + key, _RECORD_LIMIT)

    def put_record(self, key: str, data: bytes) -> None:
        self._objects.put(keys.RECORDS + key, data)

    def records(self) -> Iterator[str]:
        for found in self._objects.list(keys.RECORDS):
            yield found.key.removeprefix(keys.RECORDS)

    def delete_record(self, key: str) -> None:
        self._locks.check()
        self._objects.delete(keys.RECORDS + key)

    def building(self) -> AbstractContextManager[None]:
        return self._locks.building()

    @contextmanager
    def collecting(self, *, wait: float = 0.0) -> Iterator[None]:
        with self._locks.collecting(wait):
            self._objects.sweep(keys.BLOBS)  # nobody is building: whoever began those is gone
            yield

    def doubt(self) -> None:
        self._objects.doubt()

    def close(self) -> None:
        self._objects.close()

    def _upload(self, digest: str, size: int, spool: Spool) -> None:
        if self.size(digest) != size:
            self._objects.put_file(keys.blob(digest), spool.file, size)
