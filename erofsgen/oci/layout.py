"""OCI image layouts: ``oci:DIR[:TAG]``, and what an ``oci-archive:`` holds (OCI image layout specification 1.1)."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, Final, Protocol, Self

import msgspec

from erofsgen.errors import FormatError, IntegrityError, NotFoundError, StorageError, UnsupportedError, UsageError
from erofsgen.oci.manifest import DOCUMENT_LIMIT, FOREIGN_TYPES, Descriptor, decode, resolve
from erofsgen.oci.source import Layer, Subject

REF_NAMES: Final = ("org.opencontainers.image.ref.name", "io.containerd.image.name")
"""Annotations that name an entry of ``index.json``; containerd's and Docker's holds the full name."""


class Files(Protocol):
    """Where a layout's files are: a directory or an archive. ``name`` is for messages."""

    name: str

    def open(self, path: str) -> tuple[BinaryIO, int]:
        """A file's data and its size in bytes. Raises NotFoundError, FormatError, StorageError."""

    def close(self) -> None: ...


class Directory:
    """A layout's files in a directory."""

    def __init__(self, root: Path) -> None:
        self.name = str(root)
        self._root = root

    def open(self, path: str) -> tuple[BinaryIO, int]:
        """A regular file below the root."""
        place = self._root / path
        try:
            file = open(place, "rb", opener=_open_at_once)  # noqa: SIM115  (the caller closes it)
        except (FileNotFoundError, NotADirectoryError):
            raise NotFoundError(f"{place} does not exist") from None
        except OSError as error:
            raise StorageError(f"cannot read {place}: {error.strerror}") from error
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            file.close()
            raise FormatError(f"{place} is not a regular file")
        return file, status.st_size

    def close(self) -> None:
        """Nothing is held open."""


class _Layout(msgspec.Struct, rename="camel"):
    image_layout_version: str


class _Index(msgspec.Struct):
    manifests: tuple[Descriptor, ...] | None = None


class LayoutImage:
    """One image of a layout. ``tag`` chooses it by its name in ``index.json``.

    Raises NotFoundError (no layout, no such tag or platform, a missing blob), UsageError (several images, no tag),
    FormatError, IntegrityError, UnsupportedError.
    """

    def __init__(self, files: Files, tag: str | None, *, name: str, platform: str | None = None) -> None:
        self.name = name
        self._files = files
        where = f"{files.name}:{tag}" if tag else files.name
        version = decode(read_file(files, "oci-layout", DOCUMENT_LIMIT), _Layout, f"oci-layout of {files.name}")
        if version.image_layout_version.partition(".")[0] != "1":
            raise UnsupportedError(f"{files.name} is a layout of version {version.image_layout_version[:40]!a}")
        index = decode(read_file(files, "index.json", DOCUMENT_LIMIT), _Index, f"index.json of {files.name}")
        roots = _roots(index.manifests or (), tag, files.name)
        resolved = resolve(roots, lambda blob: read_file(files, _path(blob.digest), blob.size), platform, where)
        self.subject: Subject | None = resolved.subject
        self.config = resolved.config
        self.layers: tuple[Layer, ...] = resolved.layers
        self._blobs = resolved.blobs

    def fetch(self, indices: Iterable[int]) -> None:
        """Nothing to do: the blobs are here."""

    def open_layer(self, index: int) -> BinaryIO:
        """The blob. Raises NotFoundError (missing), IntegrityError (another length)."""
        blob = self._blobs[index]
        try:
            file, size = self._files.open(_path(blob.digest))
        except NotFoundError as error:
            if blob.media_type in FOREIGN_TYPES:
                error.hint = "a foreign layer, left out when the image was copied: read the image from its registry"
            raise
        if size != blob.size:
            file.close()
            raise IntegrityError(f"blob {blob.digest} of {self._files.name} has {size} bytes instead of {blob.size}")
        return file

    def close(self) -> None:
        """Close the archive, if it is one."""
        self._files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def open_layout(root: Path, tag: str | None, *, name: str, platform: str | None = None) -> LayoutImage:
    """Open ``oci:``. Raises as :class:`LayoutImage`."""
    if not (root / "oci-layout").exists() or not (root / "index.json").exists():
        what = "is not an OCI image layout" if root.is_dir() else "does not exist"
        raise NotFoundError(f"{root} {what}", hint="an OCI image layout is a directory with index.json and blobs/")
    return LayoutImage(Directory(root), tag, name=name, platform=platform)


def _open_at_once(path: str, flags: int) -> int:
    """Without waiting, should it be a pipe."""
    return os.open(path, flags | os.O_NONBLOCK)


def read_file(files: Files, path: str, limit: int) -> bytes:
    """A small file. Raises FormatError (longer than ``limit`` bytes) and what opening it raises."""
    file, size = files.open(path)
    with file:
        if size > limit:
            raise FormatError(f"{path} of {files.name} has {size} bytes, more than the {limit} expected")
        return file.read(limit)


def _path(digest: str) -> str:
    algorithm, _, value = digest.partition(":")
    return f"blobs/{algorithm}/{value}"


def _names(blob: Descriptor) -> set[str]:
    return {blob.annotations[key] for key in REF_NAMES if key in blob.annotations} if blob.annotations else set()


def _roots(entries: tuple[Descriptor, ...], tag: str | None, where: str) -> tuple[Descriptor, ...]:
    """The entries that may be the image: one, or one image for several platforms."""
    if tag:
        chosen = tuple(blob for blob in entries if tag in _names(blob))
    elif len({frozenset(_names(blob)) for blob in entries}) <= 1:
        chosen = entries
    else:
        raise UsageError(f"{where} holds several images", hint=f"add one of these to its name: {_listing(entries)}")
    if not chosen:
        hint = f"there are: {_listing(entries)}" if entries else None
        raise NotFoundError(f"{where} has no image {tag!a}" if tag else f"{where} holds no image", hint=hint)
    return chosen


def _listing(entries: tuple[Descriptor, ...]) -> str:
    found = sorted({name[:80] for blob in entries for name in _names(blob)})
    return ascii(", ".join(f":{name}" for name in found[:20]))[1:-1] + (", …" if len(found) > 20 else "")
