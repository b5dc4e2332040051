"""What a container image looks like to the builder, wherever it came from.

Implementations: :mod:`erofsgen.oci.layout` (``oci:``), :mod:`erofsgen.oci.archive` (``oci-archive:``,
``docker-archive:``), :mod:`erofsgen.oci.registry` (``docker://``), :mod:`erofsgen.oci.rootfs` (``dir:``),
:mod:`erofsgen.oci.tarball` (``tar:``); :func:`erofsgen.oci.open_image` picks one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import BinaryIO, Protocol


@dataclass(frozen=True)
class Layer:
    """One layer of the source image, bottom first.

    ``digest`` and ``size`` name the blob as stored (``sha256:…``, bytes); ``diff_id`` is the digest of the
    uncompressed tar where the image's config gives one, else None. ``media_type`` tells the compression.
    """

    digest: str
    size: int
    media_type: str
    diff_id: str | None = None


@dataclass(frozen=True)
class Subject:
    """The descriptor of the source image's manifest, where it has one."""

    digest: str
    size: int
    media_type: str


class SourceImage(Protocol):
    """An opened image: facts at once, bytes on demand. A context manager; closing drops temporary files."""

    @property
    def name(self) -> str:
        """Canonical name, the default tag, e.g. ``docker.io/library/python:3.11-slim``."""

    @property
    def subject(self) -> Subject | None:
        """The source manifest, None for ``dir:`` and ``tar:``."""

    @property
    def config(self) -> bytes:
        """The image config, verbatim (or a minimal one made for ``dir:`` and ``tar:``). Digest already checked."""

    @property
    def layers(self) -> tuple[Layer, ...]: ...

    def fetch(self, indices: Iterable[int]) -> None:
        """Say which layers will be opened: a remote source starts to download them in parallel. Returns at once."""

    def open_layer(self, index: int) -> BinaryIO:
        """The layer's blob as stored (not decompressed), from its start. Blocks until its bytes can be read.

        The caller verifies digest and length while it reads, and closes it.
        """

    def __enter__(self) -> SourceImage: ...

    def __exit__(self, *exc: object) -> None: ...
