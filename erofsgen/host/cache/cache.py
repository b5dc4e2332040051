"""The host cache: images and packs of one host, shared by every mount of a root, eager or lazy.

See :mod:`erofsgen.host.cache.files` for what lies where. An image is *added* (pulled) when its index, manifest and
config and its packs' tables of contents are here; that is all a lazy mount needs. Frames come later, one by one or all
together, and count as soon as they are marked (:mod:`erofsgen.host.cache.presence`).

Crash rules: indexes see :mod:`erofsgen.host.cache.part`. Manifests, configs and TOCs are compared with their digests
whenever they are used, so one that power took is fetched again. A pack's map is made before its data file; a data file
whose size is not its device's is a new one, and its map is cleared.

A mount that finds everything here must take milliseconds: what reads TOCs and fills is imported where it is used.

Locks: ``lock.fill``, then a pack's map (flock), then the map's own. Users of packs hold the map's flock shared.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec
from blake3 import blake3

from erofsgen.errors import BusyError, ErofsgenError, FormatError, IntegrityError, NotFoundError
from erofsgen.host.cache.evict import evict
from erofsgen.host.cache.files import Layout, PackFiles, replace_file
from erofsgen.host.cache.frames import frame_starts
from erofsgen.host.cache.objects import Objects
from erofsgen.host.cache.part import Part, settle, storage
from erofsgen.host.cache.presence import Presence
from erofsgen.host.cache.room import Room
from erofsgen.host.profiles import Refreshing
from erofsgen.oci.reference import known_name
from erofsgen.progress import SILENT, Progress
from erofsgen.store.base import Store
from erofsgen.store.image import Image, read_blob
from erofsgen.store.manifest import MANIFEST_LIMIT, Manifest, Pack, pack_from_descriptor
from erofsgen.store.open import open_store

if TYPE_CHECKING:
    from erofsgen.host.cache.objectfile import ObjectFile
    from erofsgen.host.cache.packfile import PackFile
    from erofsgen.pack.toc import Toc

Cull = Callable[[int | None, Collection[str] | None], int]
"""Frees so many bytes, None: all, but of the given packs and images, None: but of the pinned; returns how many."""

_FETCHERS: Final = 8
"""Tables of contents fetched at a time."""
_LOOK: Final = 0.1
"""Seconds between two looks at a fill's progress, and at a lock somebody holds."""
_PATIENCE: Final = 1.0
"""Seconds that profiles may take longer than the rest of an image."""


class CachedImage:
    """An image whose index and TOCs are in the cache. Raises NotFoundError, FormatError where it is not."""

    def __init__(self, cache: HostCache, digest: str, name: str, stores: Sequence[str]) -> None:
        self.cache = cache
        self.digest = digest
        self.name = name
        self.stores = list(stores)
        self.index = cache.image_path(digest, "erofs")
        path = cache.image_path(digest, "json")
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise NotFoundError(f"{name}: not in the cache", hint="run `erofsgen pull`") from None
        if hashlib.sha256(data).hexdigest() != digest.removeprefix("sha256:"):
            raise IntegrityError(f"{path}: differs from its digest", hint="run `erofsgen pull` again")
        try:
            layers = msgspec.json.decode(data, type=Manifest).layers[1:]
        except msgspec.MsgspecError as error:
            raise FormatError(f"{path}: {error}") from None
        self.packs = [pack_from_descriptor(layer, slot, of=name) for slot, layer in enumerate(layers, 1)]

    @cached_property
    def config(self) -> dict[str, Any]:
        """The source image's config. Raises IntegrityError, StorageError."""
        path = self.cache.image_path(self.digest, "config.json")
        with storage(path):
            data = path.read_bytes()
        try:
            return msgspec.json.decode(data, type=dict[str, Any])
        except msgspec.MsgspecError as error:
            raise FormatError(f"{path}: {error}", hint="run `erofsgen pull` again") from None

    @property
    def names(self) -> list[str]:
        """What stores call it, as far as the cache knows."""
        return self.cache.names_of(self.digest)

    def open(self) -> Image:
        """The image in its store. Raises NotFoundError, and what opening the store does."""
        for url in self.stores:
            return Image.open(open_store(url), self.digest)
        raise NotFoundError(f"{self.name}: no store is known that has it", hint="run `erofsgen pull`")

    def files(self) -> list[PackFiles]:
        """The packs' files, in the order of device slots. Raises NotFoundError."""
        return [self.cache.files(pack.hex) for pack in self.packs]

    def devices(self) -> list[Path]:
        """The packs' data files, in the order of device slots. Raises NotFoundError."""
        return [files.data for files in self.files()]

    @contextmanager
    def in_use(self) -> Iterator[list[Path]]:
        """Keep the packs as they are meanwhile: nothing is evicted. Yields :meth:`devices`."""
        with ExitStack() as held:
            for files in self.files():
                with storage(files.map):
                    descriptor = os.open(files.map, os.O_RDONLY | os.O_CLOEXEC)
                    held.callback(os.close, descriptor)
                    fcntl.flock(descriptor, fcntl.LOCK_SH)
            yield self.devices()


class HostCache:
    """The cache below ``root``, made where it is missing. ``threads`` is for whatever it does by itself.

    ``directories`` and ``max_bytes`` are recorded for all who use the cache from now on; a limit of 0 is none.
    Threads and processes may share one. Raises StorageError where the directory cannot be used.
    """

    def __init__(
        self,
        root: Path,
        *,
        directories: Sequence[Path] = (),
        max_bytes: int | None = None,
        threads: int | None = None,
    ) -> None:
        self.root = root.absolute()
        self._threads = threads
        with storage(self.root):
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.layout = Layout(self.root)
            if directories or max_bytes is not None:
                self.layout.configure(directories=directories, max_bytes=max_bytes)
            for directory in (self.layout.images, *self.layout.directories):
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.room = Room(self.layout, self.evict)
        self.cull: Cull = self._remove_objects
        """Frees what the kernel keeps for the fscache plane; while a daemon runs, only that can have it done."""

    # --- images ------------------------------------------------------------------------------------------------------

    def add(self, image: Image, progress: Progress = SILENT, *, patience: float | None = None) -> CachedImage:
        """Bring everything of an image here but its packs' frames, and what lies beside it in its store.

        All of it is fetched at the same time. Profiles are a hint: an image that is here is not kept waiting for them,
        any other at most a second longer than for the rest; either for ``patience`` seconds where that is given.

        Raises IntegrityError and FormatError (the store's bytes are damaged), StorageError, the store's errors.
        """
        profiles = Refreshing(self.root, image)
        config = image.manifest.config
        documents = [
            (self.image_path(image.digest, "json"), image.digest, image.manifest_size),
            (self.image_path(image.digest, "config.json"), config.digest, config.size),
        ]
        lacking = [(path, digest, size) for path, digest, size in documents if not _is_document(path, digest)]
        missing = [pack for pack in image.packs if not self._has_toc(pack)]
        assigned = self.layout.assigned() if missing else {}
        places = [self._place(pack, assigned) for pack in missing]
        # All at once: over a slow link the time is that of the slowest, not of their sum
        with (
            progress.task("tables of contents", len(missing)) if missing else nullcontext() as task,
            ThreadPoolExecutor(_FETCHERS, "add") as pool,  # which has no threads until it has work
        ):
            read = [
                pool.submit(read_blob, image.store, digest, size, limit=MANIFEST_LIMIT) for _, digest, size in lacking
            ]
            tocs = [pool.submit(_read_toc, image.store, pack) for pack in missing]
            new = self._write_index(image) or bool(lacking)  # before anything else becomes visible
            for (path, _, size), data in zip(lacking, [future.result() for future in read], strict=True):
                self.room.reserve(size)
                replace_file(path, data)
            for files, toc in zip(places, tocs, strict=True):
                self._put_toc(files, toc.result())
                if task is not None:
                    task.advance(1)
        self._remember(image)
        for pack in image.packs:
            self._prepare(pack)
        if patience is None and (new or missing):  # otherwise there is nothing that this would have been beside of
            patience = _PATIENCE
        profiles.wait(patience or 0.0)
        return CachedImage(self, image.digest, image.name, [image.store.url])

    def image(self, name: str, store: str) -> CachedImage:
        """The image called ``name`` when ``store`` was asked last, or whose digest is ``name``, without the store.

        Raises NotFoundError.
        """
        names = self._names().get(store, {})
        digest = names.get(known_name(name, names))
        if digest is None:
            wanted = name.removeprefix("sha256:")
            found = [digest for digest in self.digests() if len(wanted) >= 8 and digest[7:].startswith(wanted)]
            if len(found) != 1:
                raise NotFoundError(f"{self.root}: no image {name!r} of {store}", hint="run `erofsgen pull`")
            digest = found[0]
        return self.open_image(digest, name)

    def images(self) -> list[CachedImage]:
        """All images of the cache that are whole."""
        found = []
        for digest in self.digests():
            with suppress(ErofsgenError):
                found.append(self.open_image(digest, digest))
        return found

    def image_path(self, digest: str, suffix: str) -> Path:
        """A file of an image."""
        return self.layout.image_path(digest, suffix)

    def open_image(self, digest: str, name: str | None = None) -> CachedImage:
        """The image with this digest, called ``name`` in messages. Raises NotFoundError, FormatError."""
        stores = [store for store, names in self._names().items() if digest in names.values()]
        return CachedImage(self, digest, name or digest, stores)

    def digests(self) -> list[str]:
        """The manifests' digests of all images, whole or not."""
        suffix = ".json"
        return [
            f"sha256:{path.name.removesuffix(suffix)}"
            for path in self.layout.images.glob(f"*{suffix}")
            if len(path.name) == 64 + len(suffix)
        ]

    def names_of(self, digest: str) -> list[str]:
        """What stores call an image, as far as the cache knows."""
        return sorted({name for names in self._names().values() for name, known in names.items() if known == digest})

    def _names(self) -> dict[str, dict[str, str]]:
        try:
            names: dict[str, dict[str, str]] = json.loads((self.root / "names.json").read_bytes())
        except (OSError, ValueError):
            return {}  # it only spares asking the store
        return names

    def _remember(self, image: Image) -> None:
        names = self._names()
        mine = names.setdefault(image.store.url, {})
        if mine.get(image.name) != image.digest:
            mine[image.name] = image.digest
            replace_file(self.root / "names.json", json.dumps(names, indent=1).encode())

    def _write_index(self, image: Image) -> bool:
        """Whether it had to be fetched."""
        path = self.image_path(image.digest, "erofs")
        part = Part.open(path)
        if part is None:
            return False
        with part:
            data = image.index.buffer  # its devices were compared with the manifest's packs
            self.room.reserve(len(data))
            part.write(data, 0)
            part.commit()
        return True

    # --- packs -------------------------------------------------------------------------------------------------------

    def files(self, pack: str) -> PackFiles:
        """The files of the pack with this SHA-256. Raises NotFoundError."""
        files = self.layout.find(pack)
        if files is None:
            raise NotFoundError(f"{self.root}: no pack {pack}", hint="run `erofsgen pull` again")
        return files

    def toc(self, pack: Pack) -> Toc:
        """A pack's table of contents. Raises NotFoundError, IntegrityError, StorageError."""
        return self._toc(pack, self.files(pack.hex))

    def open_object(self, pack: Pack, map: Path, descriptor: int) -> ObjectFile:  # noqa: A002  (its word)
        """A pack's object in the kernel's own cache, see :class:`ObjectFile`. Raises as :meth:`open_pack` does."""
        from erofsgen.host.cache.objectfile import ObjectFile

        files = self.files(pack.hex)
        return ObjectFile(files, self._toc(pack, files), self.room, map=map, descriptor=descriptor)

    def open_pack(self, pack: Pack, descriptor: int | None = None) -> PackFile:
        """A pack of an image, see :class:`PackFile`. Raises NotFoundError, IntegrityError, StorageError."""
        from erofsgen.host.cache.packfile import PackFile

        files = self.files(pack.hex)
        return PackFile(files, self._toc(pack, files), self.room, descriptor=descriptor)

    def _toc(self, pack: Pack, files: PackFiles) -> Toc:
        from erofsgen.pack.toc import Toc

        with storage(files.toc):
            return Toc(files.toc.read_bytes(), pack.toc, what=f"pack {pack.hex}")

    def _has_toc(self, pack: Pack) -> bool:
        files = self.layout.find(pack.hex)
        try:
            if files is not None:
                return blake3(files.toc.read_bytes()).hexdigest() == pack.toc.digest
        except FileNotFoundError:
            pass
        return False

    def _place(self, pack: Pack, assigned: dict[Path, int]) -> PackFiles:
        return self.layout.find(pack.hex) or self.layout.place(pack.hex, pack.device_size, assigned)

    def _put_toc(self, files: PackFiles, data: bytes) -> None:
        self.room.reserve(len(data))
        replace_file(files.toc, data)
        with storage(files.data):
            descriptor = os.open(files.data, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            os.close(descriptor)

    def _prepare(self, pack: Pack) -> None:
        """A data file of full size and its map."""
        files = self.files(pack.hex)
        with storage(files.data):
            if os.stat(files.data).st_size == pack.device_size and files.map.exists():
                return
            with Presence.open(files.map, pack_frames(files)) as presence:
                fcntl.flock(presence.fileno(), fcntl.LOCK_EX)
                if os.stat(files.data).st_size != pack.device_size:
                    presence.clear()
                    os.truncate(files.data, pack.device_size)

    def evict(self, wanted: int) -> int:
        """Free ``wanted`` bytes, or less, of what is neither pinned nor in use. Returns how many."""
        self.layout.reload()  # another process may have pinned something
        pinned = set(self.layout.config.pinned)
        keep = {pack.hex for image in self.images() if image.digest in pinned for pack in image.packs}
        freed = evict(self.layout.data_files(), wanted, keep=keep)
        self.room.give_back(freed)
        return freed if freed >= wanted else freed + self.cull(wanted - freed, None)

    def _remove_objects(self, wanted: int | None, keep: Collection[str] | None) -> int:
        objects = Objects(self.layout)
        freed = objects.remove(objects.pinned() if keep is None else keep, wanted)
        self.room.give_back(freed)
        return freed

    # --- all of an image ---------------------------------------------------------------------------------------------

    @contextmanager
    def filling(self) -> Iterator[None]:
        """Be the one that fills packs. Waits for other commands; raises BusyError where a daemon does it."""
        with storage(self.root / "lock.fill"):
            descriptor = os.open(self.root / "lock.fill", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if (self.root / "control.sock").exists():
                        raise BusyError(f"{self.root}: a daemon fills this cache") from None
                    time.sleep(_LOOK)
            if self.room.limit is not None:
                self.room.count()
            yield
        finally:
            os.close(descriptor)

    def fill(self, image: CachedImage, open_store: Callable[[], Store], progress: Progress = SILENT) -> None:
        """Bring all frames of an image, in this process, within :meth:`filling`. The store is opened if it is needed.

        Raises IntegrityError and FormatError (the store's bytes are damaged), StorageError, the store's errors.
        """
        from erofsgen.host.cache.filling import fill

        fill(self, image, open_store, progress)

    def materialise(self, image: Image, progress: Progress = SILENT) -> tuple[Path, list[Path]]:
        """Make all of an image local: its index, and its packs' data files in device-slot order. As :meth:`fill`."""
        cached = self.add(image, progress)
        if not self.is_complete(cached):
            with self.filling():
                self.fill(cached, lambda: image.store, progress)
        settle([cached.index])
        return cached.index, cached.devices()

    def materialise_flat(self, image: Image | CachedImage, progress: Progress = SILENT) -> Path:
        """Make all of an image local in one file. The store is needed unless it is. Raises as :meth:`fill` does."""
        from erofsgen.host.cache.flat import write_flat

        path = self.image_path(image.digest, "flat")

        def opened() -> Image:
            return image if isinstance(image, Image) else image.open()

        write_flat(opened, path, progress, room=self.room, threads=self._threads)
        return path

    def is_complete(self, image: CachedImage) -> bool:
        """Whether all frames of an image are here."""
        for files in image.files():
            with Presence.open(files.map, pack_frames(files)) as presence:
                if not presence.complete:
                    return False
        return True


def _read_toc(store: Store, pack: Pack) -> bytes:
    data = store.read(pack.digest, pack.toc.offset, pack.toc.size)
    _check_toc(data, pack)
    return data


def _is_document(path: Path, digest: str) -> bool:
    """Whether a manifest or config is there."""
    with storage(path):
        return path.exists() and f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}" == digest


def pack_frames(files: PackFiles) -> int:
    """How many frames a pack has, by its TOC. Raises StorageError, FormatError."""
    with storage(files.toc):
        return len(frame_starts(files.toc.read_bytes(), what=str(files.toc))) - 1


def _check_toc(data: bytes, pack: Pack) -> None:
    from erofsgen.pack.toc import Toc

    what = f"pack {pack.digest}"
    toc = Toc(data, pack.toc, what=what)
    if toc.raw != pack.raw or toc.device_size != pack.device_size:
        raise FormatError(f"{what}: its table of contents contradicts the manifest")
