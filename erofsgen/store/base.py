"""The store interface: content-addressed blobs, named references to manifests, and layer records."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager

import msgspec


class Descriptor(
    msgspec.Struct, frozen=True, rename={"media_type": "mediaType", "artifact_type": "artifactType"}, omit_defaults=True
):
    """An OCI content descriptor. ``digest`` is ``sha256:…``, ``size`` bytes."""

    media_type: str
    digest: str
    size: int
    annotations: dict[str, str] = {}
    artifact_type: str | None = None


class BlobWriter(ABC):
    """A blob being written. Invisible until :meth:`commit`; leaving the ``with`` block without it drops the blob."""

    @abstractmethod
    def write(self, data: bytes | bytearray | memoryview, /) -> None:
        """Append ``data``. Raises StorageError or RemoteError."""

    @abstractmethod
    def commit(self) -> tuple[str, int]:
        """Make the blob durable, then visible under its digest. Returns (``sha256:…``, size in bytes)."""

    @abstractmethod
    def __enter__(self) -> BlobWriter: ...

    @abstractmethod
    def __exit__(self, *exc: object) -> None: ...


class Store(ABC):
    """Where indexes, packs, configs and manifests live. Methods may be called by several threads at once.

    Blobs are immutable and named by SHA-256; writing one that exists is no error. References map names to manifests.
    Layer records are small files a builder keeps to save work; losing one costs time, never data.
    """

    url: str
    """How the user names this store, for messages."""

    @abstractmethod
    def size(self, digest: str) -> int | None:
        """Bytes of a blob, None where there is no such blob."""

    @abstractmethod
    def read(self, digest: str, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes at ``offset``.

        Raises NotFoundError (no such blob), IntegrityError (the blob is shorter), StorageError or RemoteError.
        """

    @abstractmethod
    def create(self) -> BlobWriter:
        """Begin to write a blob."""

    @abstractmethod
    def blobs(self) -> Iterator[tuple[str, int]]:
        """(digest, size in bytes) of every blob."""

    @abstractmethod
    def delete(self, digest: str) -> None:
        """Delete a blob; no error where there is none. For ``gc`` only, which holds the exclusive lock."""

    @abstractmethod
    def references(self) -> dict[str, Descriptor]:
        """Every name with its manifest's descriptor."""

    @abstractmethod
    def tag(self, name: str, manifest: Descriptor) -> None:
        """Let ``name`` mean ``manifest``, replacing what it meant."""

    @abstractmethod
    def untag(self, name: str) -> None:
        """Drop a name. Raises NotFoundError."""

    @abstractmethod
    def record(self, key: str) -> bytes | None:
        """The layer record kept under ``key``, None where there is none."""

    @abstractmethod
    def put_record(self, key: str, data: bytes) -> None:
        """Keep a layer record, replacing an older one."""

    @abstractmethod
    def records(self) -> Iterator[str]:
        """The keys of all layer records."""

    @abstractmethod
    def delete_record(self, key: str) -> None:
        """Drop a layer record; no error where there is none."""

    @abstractmethod
    def building(self) -> AbstractContextManager[None]:
        """Held while blobs are written that no reference reaches yet. Any number of holders; keeps ``gc`` away."""

    @abstractmethod
    def collecting(self) -> AbstractContextManager[None]:
        """Held while blobs are deleted. One holder, no builders. Raises BusyError."""

    def put(self, data: bytes) -> tuple[str, int]:
        """Write a blob at once. Returns (digest, size)."""
        with self.create() as blob:
            blob.write(data)
            return blob.commit()
