"""What the kernel keeps in its own cache for the fscache plane, and what we know of it. Standard library only.

::

    DIR/fscache/                              DIR: the first cache directory, or the root
    ├── cache/I<volume>/@<xx>/D<cookie>       an object: the kernel's file; of full size, sparse
    ├── graveyard/                            the kernel's
    └── objects/<volume>/<cookie>.map         which frames of a pack the object has (erofsgen.host.cache.presence)
                         <cookie>.index       digest of the manifest whose index the object has; boot it was seen in

``volume`` is ``erofs,<domain or fsid>``, ``cookie`` a pack's SHA-256 or an fsid (fs/erofs/fscache.c); the number of the
fan-out directory is a hash (fs/cachefiles/namei.c), so an object is looked for in all of them.

The kernel links a new object into its directory when it is no longer used, not before: a crash of the machine loses
all that came since the mount. It takes whatever is no hole for what we have written. Written is only what was verified,
and ext4 and xfs show a direct write's bytes when they are on the disk, not before.

Crash rules. A record without an object, an object without a record, and one whose name we would not give: removed
before the kernel gets the directory. Frames that are not durable and of another boot: compared with their digests
before, and punched out where they differ (:mod:`fscache_daemon.recover`). Objects in use can have no name yet, so a
record is made when one is opened; whether what it says is true of *this* object is seen at the first read.

The daemon is the only writer while it runs; otherwise who holds ``lock.fill``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from operator import attrgetter
from pathlib import Path
from typing import Final, NamedTuple

from erofsgen.errors import StorageError
from erofsgen.host import linux
from erofsgen.host.cache.files import Layout, replace_file

DOMAIN: Final = "erofsgen"
"""The ``domain_id`` of our mounts, within which images share packs."""

_VOLUME: Final = "erofs,"
_FANOUT: Final = 256
_NAME: Final = re.compile(r"[A-Za-z0-9._:@+=,~-]{1,200}")
"""Keys that the kernel uses as file names unchanged (fs/cachefiles/key.c)."""
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")


class Key(NamedTuple):
    """What the kernel calls an object."""

    volume: str
    cookie: str


class Stored(NamedTuple):
    """An object that has a name. ``of``: a pack's SHA-256, or the digest of the manifest whose index it is."""

    key: Key
    file: Path
    of: str
    used: float
    size: int


class Objects:
    """The objects of the cache ``layout``."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self.directory = layout.fscache
        self._cache = self.directory / "cache"
        self._records = self.directory / "objects"

    def create(self) -> None:
        """Have the directories. Raises OSError."""
        for directory in (self.directory, self._records):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def map(self, key: Key) -> Path:
        """The presence map of a pack's object."""
        return self._record(key, ".map")

    def index(self, key: Key) -> Path:
        """Where it is noted whose index an object has."""
        return self._record(key, ".index")

    def find(self, key: Key) -> Path | None:
        """The object's file, once it has a name."""
        volume = self._cache / f"I{key.volume}"
        for number in range(_FANOUT):
            path = volume / f"@{number:02x}" / f"D{key.cookie}"
            if path.exists():
                return path
        return None

    def keys_of(self, pack: str) -> list[Key]:
        """The objects of the pack with this SHA-256 that are known of, with or without a name: one in each domain."""
        return [Key(record.parent.name, pack) for record in sorted(self._records.glob(f"*/{pack}.map"))]

    def all(self) -> Iterator[Stored]:
        """All objects that have a name and a record, in no order."""
        for key, file in self._files():
            if key is not None:
                with suppress(OSError, ValueError):
                    yield self._stored(key, file)

    def cleaned(self) -> int:
        """Remove what a crash left. Only while the kernel has not got the directory. Returns bytes."""
        freed = 0
        shutil.rmtree(self.directory / "graveyard", ignore_errors=True)
        known = set()
        for key, file in self._files():
            if key is not None and (self._image(key) or self.map(key).exists()):
                known.add(key)
            else:
                freed += _remove(file)
        for path in self._records.glob("*/*"):
            if Key(path.parent.name, path.stem) not in known:
                path.unlink(missing_ok=True)
        return freed

    def claim(self, key: Key, digest: str) -> None:
        """Let an object be the index of the image ``digest``; what it may have of another's goes first.

        The kernel has it open by then, and does not know: a hole is all that it takes notice of. Raises StorageError.
        """
        if self._image(key) == digest:
            return
        record = self.index(key)
        file = self.find(key)
        try:
            if file is not None:
                with file.open("r+b") as object_:
                    size = os.fstat(object_.fileno()).st_size
                    if size:
                        linux.punch_hole(object_.fileno(), 0, size)
                        os.fsync(object_.fileno())
            record.parent.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise StorageError(f"{error.filename or file}: {error.strerror}") from error
        self.vouch(key, digest)

    def vouch(self, key: Key, digest: str) -> None:
        """Note whose index an object is, and that it was looked at in this boot. Raises StorageError."""
        replace_file(self.index(key), f"{digest}\n{linux.boot_id()}".encode())

    def vouched(self, key: Key) -> bool:
        """Whether an index's object was looked at in this boot."""
        with suppress(OSError):
            return self.index(key).read_text().partition("\n")[2] == linux.boot_id()
        return False

    def used(self, key: Key) -> None:
        """It was used until now."""
        for record in (self.map(key), self.index(key)):
            with suppress(OSError):
                os.utime(record)

    def forget(self, key: Key) -> None:
        """Drop what is known of an object that is gone."""
        for record in (self.map(key), self.index(key)):
            record.unlink(missing_ok=True)

    def remove(
        self, keep: Collection[str], wanted: int | None = None, take: Callable[[Stored], bool] | None = None
    ) -> int:
        """Remove objects until ``wanted`` bytes, None: all, are free, those first that were not used for longest.

        ``keep``: SHA-256 of packs and digests of manifests whose objects stay. ``take`` removes a file, or says False;
        None: it is unlinked, which is only for when no daemon runs. Returns bytes.
        """
        take = take or _unlinked
        freed = 0
        for stored in self.oldest(keep):
            if wanted is not None and freed >= wanted:
                break
            if take(stored):
                self.forget(stored.key)
                freed += stored.size
        return freed

    def oldest(self, keep: Collection[str]) -> list[Stored]:
        """All objects but of what is in ``keep``, those first that were not used for longest."""
        found = [stored for stored in self.all() if stored.of not in keep]
        return sorted(found, key=attrgetter("used"))

    def pinned(self) -> set[str]:
        """What is pinned: digests of images, and the SHA-256 of their packs."""
        self._layout.reload()
        kept = set(self._layout.config.pinned)
        for digest in tuple(kept):
            with suppress(OSError, ValueError, KeyError):
                manifest = json.loads(self._layout.image_path(digest, "json").read_bytes())
                kept |= {layer["digest"].removeprefix("sha256:") for layer in manifest["layers"][1:]}
        return kept

    def _record(self, key: Key, suffix: str) -> Path:
        return self._records / key.volume / f"{key.cookie}{suffix}"

    def _stored(self, key: Key, file: Path) -> Stored:
        image = self._image(key)
        record = self.index(key) if image else self.map(key)
        return Stored(key, file, image or key.cookie, record.stat().st_mtime, _size(file))

    def _image(self, key: Key) -> str:
        """The image whose index an object is, as far as that was noted; power can leave a note empty."""
        with suppress(OSError):
            digest = self.index(key).read_text().partition("\n")[0]
            if digest.startswith("sha256:"):
                return digest
        return ""

    def _files(self) -> Iterator[tuple[Key | None, Path]]:
        """The kernel's files; no key for names that are none of ours."""
        for file in self._cache.glob("*/*/*"):
            volume, cookie = file.parent.parent.name, file.name
            key = Key(volume[1:], cookie[1:])
            yield key if volume[:1] == "I" and cookie[:1] == "D" and is_ours(key) else None, file


def is_ours(key: Key) -> bool:
    """Whether we serve objects of such a name."""
    return all(map(_NAME.fullmatch, key)) and key.volume.startswith(_VOLUME)


def is_digest(cookie: str) -> bool:
    """Whether a name can be a SHA-256."""
    return _DIGEST.fullmatch(cookie) is not None


def _unlinked(stored: Stored) -> bool:
    with suppress(OSError):
        stored.file.unlink()
        return True
    return False


def _remove(file: Path) -> int:
    size = _size(file)
    with suppress(OSError):
        file.unlink()
        return size
    return 0


def _size(file: Path) -> int:
    try:
        return file.stat().st_blocks * 512
    except OSError:
        return 0
