"""The store interface: content-addressed blobs, named references to manifests, and layer records."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from erofsgen.errors import FormatError, UsageError
from erofsgen.oci.reference import Reference
from erofsgen.store import keys


class Descriptor(
    msgspec.Struct, frozen=True, rename={"media_type": "mediaType", "artifact_type": "artifactType"}, omit_defaults=True
):
    """An OCI content descriptor. ``digest`` is ``sha256:…``, ``size`` bytes. ``data``: the content itself, where it is
    small and comes along; as little to be trusted as any other copy of it."""

    media_type: str
    digest: str
    size: int
    annotations: dict[str, str] = {}
    artifact_type: str | None = None
    data: bytes | None = None


DESCRIPTOR_LIMIT: Final = 1 << 20
"""Bytes of a descriptor that stands alone at most."""


def parse_descriptor(data: bytes, what: str) -> Descriptor:
    """A descriptor that stands alone, as object stores keep references. Raises FormatError naming ``what``."""
    try:
        return msgspec.json.decode(data, type=Descriptor)
    except msgspec.MsgspecError as error:
        raise FormatError(f"{what}: {error}") from None


class Speed(NamedTuple):
    """What one connection to a store does, measured: seconds to the first byte, bytes per second from then on."""

    latency: float
    bandwidth: float


class BlobWriter(ABC):
    """A blob being written. Invisible until :meth:`commit`; leaving the ``with`` block without it drops the blob."""

    @abstractmethod
    def write(self, data: bytes | bytearray | memoryview, /) -> None:
        """Append ``data``. Raises StorageError or RemoteError."""

    @abstractmethod
    def commit(self) -> tuple[str, int]:
        """Make the blob durable, then visible under its digest. Returns (``sha256:…``, size in bytes).

        Raises IntegrityError where it is not the blob that was announced, StorageError or RemoteError.
        """

    @abstractmethod
    def __enter__(self) -> BlobWriter: ...

    @abstractmethod
    def __exit__(self, *exc: object) -> None: ...


class Store(ABC):
    """Where indexes, packs, configs and manifests live. Methods may be called by several threads at once.

    Blobs are immutable and named by SHA-256; writing one that exists is no error. References map names to manifests.
    Layer records are small files a builder keeps to save work; losing one costs time, never data.

    What a kind of store cannot do (HTTP has no writes, a registry no list of blobs) raises UnsupportedError.
    """

    url: str
    """How the user names this store: in messages, and for :func:`erofsgen.store.open.open_store`. Has no secrets."""

    scratch: Path
    """A directory on this machine for what a builder knows of this store, made when it is needed."""

    speed: Speed | None = None
    """What one connection does, as far as it was measured. None for a local directory."""

    @property
    def downloads(self) -> Path:
        """Where compressed layers are kept until they are converted."""
        return self.scratch / "downloads"

    @property
    def dictionary(self) -> Path:
        """Where this store's chunk dictionary lives."""
        return self.scratch / "dictionary"

    @abstractmethod
    def size(self, digest: str) -> int | None:
        """Bytes of a blob, None where there is no such blob."""

    @abstractmethod
    def read_into(self, digest: str, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` (bytes, writable) with the blob's bytes at ``offset``.

        Raises NotFoundError (no such blob), IntegrityError (the blob is shorter), StorageError or RemoteError; what is
        in the buffer then is undefined.
        """

    @abstractmethod
    def create(self, *, digest: str | None = None, size: int | None = None) -> BlobWriter:
        """Begin to write a blob, whose ``digest`` and ``size`` are announced where they are known beforehand."""

    @abstractmethod
    def blobs(self) -> Iterator[tuple[str, int]]:
        """(digest, size in bytes) of every blob."""

    @abstractmethod
    def delete(self, digest: str) -> None:
        """Delete a blob; no error where there is none. For ``gc`` only, which holds the exclusive lock."""

    @abstractmethod
    def references(self) -> dict[str, Descriptor]:
        """Every image's name with its manifest's descriptor; no reserved names."""

    def reference(self, name: str) -> Descriptor | None:
        """The manifest of the image that ``name`` means, None where it means none."""
        return self.references().get(name)

    def called(self, name: str) -> str:
        """What an image is called here, unless its user says so, that is called ``name`` in another store."""
        return name

    def check_name(self, name: str) -> None:
        """Raises UsageError where no image can be called ``name`` here: before the work, not when it is done."""
        if keys.profiled(name) is not None:
            raise UsageError(f"{name}: the name is reserved for the profiles of an image", hint="choose another one")

    def repository(self, name: str) -> str:
        """What the images have in common that are versions of the one called ``name``: its name without its tag."""
        try:
            reference = Reference.parse(name)
        except UsageError:
            return name
        return f"{reference.registry}/{reference.repository}"

    @abstractmethod
    def tag(self, name: str, manifest: Descriptor) -> None:
        """Let ``name`` mean ``manifest``, replacing what it meant."""

    @abstractmethod
    def untag(self, name: str) -> None:
        """Drop a name. Raises NotFoundError."""

    @abstractmethod
    def profiled(self) -> set[str]:
        """The manifest digests of the images beside which there are profiles, whether the images are there or not."""

    @abstractmethod
    def profiles(self, image: str) -> Descriptor | None:
        """The manifest of the profiles beside the image with the manifest digest ``image``, None where there are none.

        One request where there are none. See :mod:`.profiles`.
        """

    def tag_profiles(self, image: str, manifest: Descriptor) -> None:
        """Let ``manifest`` be that of the profiles beside ``image``, replacing another."""
        self.tag(keys.profiles(image), manifest)

    def untag_profiles(self, image: str) -> None:
        """Drop the profiles beside ``image``. Raises NotFoundError."""
        self.untag(keys.profiles(image))

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
    def collecting(self, *, wait: float = 0.0) -> AbstractContextManager[None]:
        """Held while blobs are deleted. One holder, no builders: those that come wait for it to end.

        Raises BusyError (builders that were there have not ended after ``wait`` seconds).
        """

    def doubt(self) -> None:  # noqa: B027  (most learn nothing)
        """Bytes were not what their digest says: forget what was learnt of where to read them."""

    def close(self) -> None:  # noqa: B027  (most have nothing to close)
        """Let go of connections."""

    def read(self, digest: str, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes at ``offset``. Raises as :meth:`read_into` does."""
        buffer = bytearray(length)
        self.read_into(digest, offset, memoryview(buffer))
        return bytes(buffer)

    def put(self, data: bytes) -> tuple[str, int]:
        """Write a blob at once. Returns (digest, size)."""
        with self.create() as blob:
            blob.write(data)
            return blob.commit()


def scratch(url: str) -> Path:
    """Where a builder's own files about the remote store ``url`` are kept on this machine; not made here."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "erofsgen" / "stores" / hashlib.sha256(url.encode()).hexdigest()[:32]
