"""Where the host cache keeps what. Standard library only: the supervisor uses it.

::

    ROOT/                        mode 0700
    ├── cache.json               cache directories, byte limit, pinned images; replaced by rename
    ├── names.json               what a name in a store meant last, so that mounting works without the store
    ├── ledger                   bytes in use, see erofsgen.host.cache.room
    ├── lock.fill                exclusive: whoever puts frames into packs, takes them out or repairs them
    ├── images/<manifest>.erofs  an image's index; .json its manifest, .config.json its source's config, .flat for loop
    ├── packs/<sha256>.data      a pack's device bytes, sparse, of full size from the start; or in CACHEDIR/packs
              <sha256>.map       which of its frames are there, see erofsgen.host.cache.presence
              <sha256>.toc       its table of contents
    ├── fscache/                 what the kernel keeps for the fscache plane, see erofsgen.host.cache.objects
    └── profiles/                what its images' commands touch first, see erofsgen.host.profiles
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Final

from erofsgen.errors import FormatError, StorageError
from erofsgen.files import replace_file as replace_file

_CONFIG: Final = "cache.json"


@dataclass(frozen=True)
class CacheConfig:
    """What an administrator has decided. ``directories``: where packs go; none: below the root. Limit in bytes."""

    directories: list[str] = field(default_factory=list)
    max_bytes: int | None = None
    pinned: list[str] = field(default_factory=list)
    """Manifest digests."""


@dataclass(frozen=True, order=True)
class PackFiles:
    """A pack's three files."""

    data: Path

    @property
    def hex(self) -> str:
        """SHA-256 of the pack."""
        return self.data.stem

    @property
    def map(self) -> Path:
        """The presence map."""
        return self.data.with_suffix(".map")

    @property
    def toc(self) -> Path:
        """The table of contents."""
        return self.data.with_suffix(".toc")


class Layout:
    """The cache below ``root``. Raises FormatError for a damaged configuration, StorageError."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config = self._read()

    @property
    def images(self) -> Path:
        """Where indexes and manifests are."""
        return self.root / "images"

    def image_path(self, digest: str, suffix: str) -> Path:
        """A file of the image whose manifest has this digest."""
        return self.images / f"{digest.removeprefix('sha256:')}.{suffix}"

    @property
    def directories(self) -> list[Path]:
        """Where packs are: one directory for each disk."""
        return [Path(place) / "packs" for place in self.config.directories] or [self.root / "packs"]

    @property
    def fscache(self) -> Path:
        """Where the kernel's own cache is."""
        return self.directories[0].parent / "fscache"

    def reload(self) -> None:
        """Learn what other processes have decided meanwhile."""
        self.config = self._read()

    def configure(self, *, directories: Sequence[Path] | None = None, max_bytes: int | None = None) -> None:
        """Record what is given. Directories are added to those there are: packs stay where they are."""
        self.reload()
        config = self.config
        if directories:
            known = config.directories or ([str(self.root)] if any((self.root / "packs").glob("*.data")) else [])
            new = [os.path.realpath(directory) for directory in directories]
            config = replace(config, directories=list(dict.fromkeys([*known, *new])))
        if max_bytes is not None:
            config = replace(config, max_bytes=max_bytes or None)
        self.write(config)

    def pin(self, digest: str, *, on: bool) -> None:
        """Keep what an image needs, or no longer."""
        self.reload()
        others = [pinned for pinned in self.config.pinned if pinned != digest]
        self.write(replace(self.config, pinned=[*others, digest] if on else others))

    def write(self, config: CacheConfig) -> None:
        """Let ``config`` hold from now on."""
        if config == self.config:
            return
        replace_file(self.root / _CONFIG, json.dumps(asdict(config), indent=2).encode())
        self.config = config

    def find(self, pack: str) -> PackFiles | None:
        """Where the pack with this SHA-256 is."""
        for directory in self.directories:
            data = directory / f"{pack}.data"
            if data.exists():
                return PackFiles(data)
        return None

    def place(self, pack: str, device_size: int, assigned: dict[Path, int]) -> PackFiles:
        """Where a new pack goes: the directory with the smallest share of its disk taken.

        ``assigned`` has the device bytes in each directory (:meth:`assigned`) and is kept up to date. Packs in the
        order of device slots so alternate between equal disks, and a large file is read from all of them.
        """

        def share(directory: Path) -> float:
            disk = os.statvfs(directory)
            return (assigned[directory] + device_size) / max(1, disk.f_blocks * disk.f_frsize)

        try:
            directory = min(self.directories, key=share)
        except OSError as error:
            raise StorageError(f"{error.filename}: {error.strerror}", hint="is the cache directory mounted?") from error
        assigned[directory] += device_size
        return PackFiles(directory / f"{pack}.data")

    def assigned(self) -> dict[Path, int]:
        """Device bytes of the packs in each directory."""
        return {
            directory: sum(item.stat().st_size for item in _scan(directory) if item.name.endswith(".data"))
            for directory in self.directories
        }

    def data_files(self) -> list[Path]:
        """The data files of all packs."""
        return [
            Path(item.path)
            for directory in self.directories
            for item in _scan(directory)
            if item.name.endswith(".data")
        ]

    def allocated(self) -> int:
        """Bytes that the cache takes on its disks."""
        places = (*self.directories, self.images, *self.fscache.glob("cache/*/*"))
        return sum(item.stat().st_blocks * 512 for directory in places for item in _scan(directory))

    def _read(self) -> CacheConfig:
        path = self.root / _CONFIG
        try:
            return CacheConfig(**json.loads(path.read_bytes()))
        except FileNotFoundError:
            return CacheConfig()
        except OSError as error:
            raise StorageError(f"{path}: {error.strerror}") from error
        except (TypeError, ValueError) as error:
            raise FormatError(f"{path}: {error}", hint="remove it, then name the cache directories again") from None


def _scan(directory: Path) -> Iterator[os.DirEntry[str]]:
    """A directory's entries that still exist; none where it is missing."""
    try:
        with os.scandir(directory) as items:
            for item in items:
                try:
                    item.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                yield item
    except FileNotFoundError:
        return
