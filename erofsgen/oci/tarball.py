"""Root file systems without an image around them: ``tar:FILE``, one layer, and ``dir:ROOTFS``, none.

Both get a minimal config. Neither has a manifest.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, Final, Self

from erofsgen.errors import FormatError, IntegrityError, NotFoundError, UsageError
from erofsgen.oci.manifest import OCI_LAYER, minimal_config
from erofsgen.oci.slice import open_slice
from erofsgen.oci.source import Layer, Subject
from erofsgen.oci.spool import layer_type, open_plain
from erofsgen.progress import SILENT, Progress

_BLOCK: Final = 1 << 20


class TarImage:
    """A root file system in a tar, compressed or not. Its digest is the file's.

    A pipe is stored in ``downloads`` first. Raises NotFoundError, StorageError, FormatError (empty).
    """

    subject: Subject | None = None

    def __init__(
        self,
        path: Path,
        *,
        name: str,
        platform: str | None = None,
        downloads: Path | None = None,
        progress: Progress = SILENT,
    ) -> None:
        self.name = name
        self._path = path
        self._file = open_plain(path, downloads, progress, unpack=False)
        try:
            size = os.fstat(self._file.fileno()).st_size
            if not size:
                raise FormatError(f"{path} is empty", hint="an empty tar archive has 1,024 zero bytes")
            media_type = layer_type(self._file)
            digest = hashlib.sha256()
            with progress.task(f"hash {path.name}", size) as task:
                while block := self._file.read(_BLOCK):
                    digest.update(block)
                    task.advance(len(block))
        except BaseException:
            self._file.close()
            raise
        named = f"sha256:{digest.hexdigest()}"
        diff_id = named if media_type == OCI_LAYER else None
        self.layers: tuple[Layer, ...] = (Layer(named, size, media_type, diff_id),)
        self.config = minimal_config(platform, [diff_id] if diff_id else [])

    def fetch(self, indices: Iterable[int]) -> None:
        """Nothing to do: the layer is here."""

    def open_layer(self, index: int) -> BinaryIO:
        """The file as it is. Raises IntegrityError (it was truncated since)."""
        size = self.layers[index].size
        if os.fstat(self._file.fileno()).st_size < size:
            raise IntegrityError(f"{self._path} was truncated while it was read")
        return open_slice(self._file.fileno(), 0, size)

    def close(self) -> None:
        """Close the file; a layer that was opened stays open."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class RootfsImage:
    """An unpacked root file system: no layers, ``rootfs`` is to be walked.

    Raises NotFoundError, UsageError (not a directory, or an image copied by skopeo).
    """

    subject: Subject | None = None
    layers: tuple[Layer, ...] = ()

    def __init__(self, rootfs: Path, *, name: str, platform: str | None = None) -> None:
        if not rootfs.is_dir():
            if not rootfs.exists():
                raise NotFoundError(f"{rootfs} does not exist")
            raise UsageError(f"{rootfs} is not a directory", hint=f"for an archive of files, write tar:{rootfs}")
        if (rootfs / "version").is_file() and (rootfs / "manifest.json").is_file():
            raise UsageError(
                f"{rootfs} is an image that skopeo copied to dir:, not a root file system",
                hint=f"`skopeo copy dir:{rootfs} oci:…` makes a layout of it",
            )
        self.name = name
        self.rootfs = rootfs
        self.config = minimal_config(platform)

    def fetch(self, indices: Iterable[int]) -> None:
        """Nothing to do: there are no layers."""

    def open_layer(self, index: int) -> BinaryIO:
        """Raises IndexError: there are no layers."""
        raise IndexError(index)

    def close(self) -> None:
        """Nothing is held open."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
