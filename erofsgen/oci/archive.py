"""Images in tar archives: ``oci-archive:FILE[:TAG]`` and ``docker-archive:FILE[:REF]``.

``docker save`` writes ``manifest.json``, a list of images::

    [{"Config": "<hex>.json", "RepoTags": ["python:3.11-slim"], "Layers": ["<id>/layer.tar", …]}]      up to Docker 24
    [{"Config": "blobs/sha256/<hex>", …, "Layers": ["blobs/sha256/<hex>", …]}]                        since Docker 25

Layers are plain tars as a rule, some of them symlinks to others; podman and skopeo write the first form, too.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, Final, Self

import msgspec

from erofsgen.errors import ErofsgenError, FormatError, NotFoundError, UnsupportedError, UsageError
from erofsgen.oci.layout import LayoutImage, read_file
from erofsgen.oci.manifest import DOCUMENT_LIMIT, OCI_LAYER, check, decode, diff_ids
from erofsgen.oci.members import Archive
from erofsgen.oci.platforms import Platform
from erofsgen.oci.reference import Reference, ref_name
from erofsgen.oci.source import Layer, Subject
from erofsgen.oci.spool import layer_type, open_plain
from erofsgen.progress import SILENT, Progress

_BLOB_NAME: Final = re.compile(r"(?:blobs/sha256/)?([0-9a-f]{64})(?:\.json|\.tar)?")
"""Members that are named by their SHA-256."""


class _Entry(msgspec.Struct, rename="pascal"):
    config: str
    repo_tags: tuple[str, ...] | None = None
    layers: tuple[str, ...] | None = None


class _Config(msgspec.Struct):
    architecture: str = ""
    os: str = ""
    variant: str | None = None


class DockerArchiveImage:
    """One image of a ``docker save`` archive. ``reference`` is one of its tags, or ``@N``, or None for the only image.

    Raises NotFoundError (no such image, a missing member), UsageError (several images, none chosen), FormatError,
    IntegrityError, UnsupportedError.
    """

    subject: Subject | None = None
    """An archive of this kind has no manifest of the image specifications."""

    def __init__(self, archive: Archive, reference: str | None, *, name: str, platform: str | None = None) -> None:
        self._archive = archive
        if "manifest.json" not in archive:
            raise _no_manifest(archive)
        what = f"manifest.json of {archive.name}"
        images = decode(read_file(archive, "manifest.json", DOCUMENT_LIMIT), tuple[_Entry, ...], what)
        entry, tag = _choose(images, reference, archive.name)
        self.name = ref_name(str(tag)) if tag else name
        self.config = self._read_config(entry.config, platform)
        self._paths = entry.layers or ()
        ids = diff_ids(self.config, len(self._paths), f"config of {archive.name}")
        self.layers: tuple[Layer, ...] = tuple(map(self._layer, self._paths, ids))

    def fetch(self, indices: Iterable[int]) -> None:
        """Nothing to do: the blobs are here."""

    def open_layer(self, index: int) -> BinaryIO:
        """The member that holds the layer."""
        return self._archive.open(self._paths[index])[0]

    def close(self) -> None:
        """Close the archive; layers that were opened stay open."""
        self._archive.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _read_config(self, path: str, platform: str | None) -> bytes:
        where = self._archive.name
        config = read_file(self._archive, path, DOCUMENT_LIMIT)
        if match := _BLOB_NAME.fullmatch(path):
            check(config, f"sha256:{match[1]}", len(config), f"config {match[1]} of {where}")
        fields = decode(config, _Config, f"config of {where}")
        if platform and fields.os and fields.architecture:
            built_for = Platform.of(fields.os, fields.architecture, fields.variant or "")
            if built_for not in Platform.parse(platform).runnable():
                raise NotFoundError(f"{where} is not for {platform}", hint=f"it is for {str(built_for)[:80]!a} only")
        return config

    def _layer(self, path: str, diff_id: str | None) -> Layer:
        """A layer's facts. The digest of a plain tar is its diff_id; any other is named by its digest, or hashed."""
        file, size = self._archive.open(path)
        with file:
            media_type = layer_type(file)
            if match := _BLOB_NAME.fullmatch(path):
                digest = f"sha256:{match[1]}"
            elif diff_id and media_type == OCI_LAYER:
                digest = diff_id
            else:
                digest = f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
        return Layer(digest, size, media_type, diff_id)


def open_oci_archive(
    path: Path,
    tag: str | None,
    *,
    name: str,
    platform: str | None = None,
    downloads: Path | None = None,
    progress: Progress = SILENT,
) -> LayoutImage:
    """Open ``oci-archive:``. What is compressed is unpacked into ``downloads`` first.

    Raises as :class:`LayoutImage`.
    """
    archive = Archive(open_plain(path, downloads, progress), str(path))
    try:
        if "index.json" not in archive:
            hint = f"try docker-archive:{path}" if "manifest.json" in archive else None
            raise FormatError(f"{path} is no OCI archive: it has no index.json", hint=hint)
        return LayoutImage(archive, tag, name=name, platform=platform)
    except ErofsgenError:
        archive.close()
        raise


def open_docker_archive(
    path: Path,
    reference: str | None,
    *,
    name: str,
    platform: str | None = None,
    downloads: Path | None = None,
    progress: Progress = SILENT,
) -> DockerArchiveImage:
    """Open ``docker-archive:``. What is compressed is unpacked into ``downloads`` first.

    Raises as :class:`DockerArchiveImage`.
    """
    archive = Archive(open_plain(path, downloads, progress), str(path))
    try:
        return DockerArchiveImage(archive, reference, name=name, platform=platform)
    except ErofsgenError:
        archive.close()
        raise


def _choose(images: tuple[_Entry, ...], reference: str | None, where: str) -> tuple[_Entry, Reference | None]:
    """The image that is meant, and the tag to call it by."""
    tags = [[Reference.parse(tag) for tag in entry.repo_tags or ()] for entry in images]
    listing = ", ".join(f":{tag}" for entry in tags for tag in entry) or f":@0 to :@{len(images) - 1}"
    if reference is None:
        if len(images) == 1:
            return images[0], tags[0][0] if tags[0] else None
        if not images:
            raise NotFoundError(f"{where} holds no image")
        raise UsageError(f"{where} holds several images", hint=f"add one of these to its name: {listing}")
    if re.fullmatch(r"@[0-9]{1,6}", reference, re.ASCII):
        number = int(reference[1:])
        if number < len(images):
            return images[number], tags[number][0] if tags[number] else None
    else:
        wanted = Reference.parse(reference)
        for entry, names in zip(images, tags, strict=True):
            if wanted in names:
                return entry, wanted
    raise NotFoundError(f"{where} has no image {reference!a}", hint=f"there are: {listing}" if images else None)


def _no_manifest(archive: Archive) -> ErofsgenError:
    if "index.json" in archive:
        return FormatError(f"{archive.name} is no docker archive", hint=f"try oci-archive:{archive.name}")
    if "repositories" in archive:
        return UnsupportedError(f"{archive.name} was saved by a Docker older than 1.10", hint="save the image again")
    return FormatError(f"{archive.name} is no docker archive: it has no manifest.json")
