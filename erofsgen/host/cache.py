"""The host cache: indexes and packs as the kernel wants them, shared by every image and mount of a root.

::

    ROOT/                          mode 0700
    ├── packs/<sha256>.data        a pack's device bytes, complete; shared by all images that name the pack
    ├── packs/<sha256>.data.part   being filled, under flock
    ├── images/<manifest>.erofs    an image's index
    ├── images/<manifest>.flat     index and device bytes in one file (erofsgen.erofs.flatten), where loop needs it
    ├── mnt/, upper/, mounts/      see erofsgen.host.mounts
    └── lock.mounts

Nothing is written to a file before its digest was checked, and a file gets its name only when all of it is durable
(fdatasync, then rename): a name is a promise that holds after a power failure. What a crash leaves is a ``.part``,
and the next to fill it takes over the frames whose digests are right.

Locks: the ``.part`` file itself, exclusive, by whoever fills it; others wait, then find the work done. A process
waits for a lock only while the ``.part`` files it holds are past their last wait, so no two wait for each other.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from blake3 import blake3

from erofsgen.erofs.flatten import flatten
from erofsgen.erofs.tree import BLOCK
from erofsgen.errors import StorageError
from erofsgen.host import linux
from erofsgen.pack.reader import open_frame
from erofsgen.pack.toc import Toc
from erofsgen.progress import SILENT, Progress, Task
from erofsgen.store.base import Store
from erofsgen.store.directory import DirectoryStore
from erofsgen.store.image import Image, open_pack

_BATCH: Final = 4 << 20
"""Device bytes that a thread reads, checks and writes at a time; a larger frame is a batch of its own."""

_READERS: Final = 2
"""Threads per core: one may wait for the store or the disk while another decompresses."""

_COMMITS: Final = 2
"""Packs that may wait for the disk while the next is filled."""


class HostCache:
    """The cache below ``root``, which is made where it is missing. ``threads`` fill a pack together.

    Memory is bounded by ``threads`` times 4 MiB stored and one frame of device bytes. Several threads and processes
    may use one cache. Raises StorageError where the directory cannot be used.
    """

    def __init__(self, root: Path, *, threads: int | None = None) -> None:
        self.root = root.absolute()
        self._threads = threads or min(16, _READERS * len(os.sched_getaffinity(0)))
        with storage(self.root):
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            for name in ("images", "packs"):
                (self.root / name).mkdir(mode=0o700, exist_ok=True)

    def pack_path(self, digest_hex: str) -> Path:
        """The data file of a pack, whether it exists or not."""
        return self.root / "packs" / f"{digest_hex}.data"

    def index(self, image: Image) -> Path:
        """The image's index as a file. Raises FormatError, IntegrityError, StorageError and the store's errors."""
        path = self._image_path(image, "erofs")
        part = _Part.open(path)
        if part is not None:
            with part:
                part.write(_index_bytes(image), 0)
                part.commit()
        return path

    def materialise(self, image: Image, progress: Progress = SILENT) -> tuple[Path, list[Path]]:
        """Make all of the image local: its index, and its packs' data files in device-slot order.

        Raises IntegrityError and FormatError (the store's bytes are damaged), StorageError (the disk is full …), and
        what reading the store raises. Packs complete by then stay; nothing half-made does.
        """
        index = self.index(image)
        missing = {pack.hex: pack for pack in image.packs if not self.pack_path(pack.hex).exists()}
        commits: list[Future[None]] = []
        with (
            progress.task("packs", sum(pack.device_size for pack in missing.values())) as task,
            ThreadPoolExecutor(self._threads, "fill") as fill,
            ThreadPoolExecutor(_COMMITS, "commit") as commit,
        ):
            for pack in missing.values():
                part = _Part.open(self.pack_path(pack.hex))
                if part is None:  # another process has done it
                    task.advance(pack.device_size)
                    continue
                try:
                    resume = part.found or (pack.raw and part.share_extents(image.store, pack.digest))
                    part.resize(pack.device_size)
                    toc = open_pack(image.store, pack).toc
                    _Filler(image.store, pack.digest, toc, part, 0, task, resume=resume).run(fill)
                except BaseException:
                    part.drop()
                    raise
                commits.append(commit.submit(part.commit))
            for done in commits:
                done.result()
        return index, [self.pack_path(pack.hex) for pack in image.packs]

    def materialise_flat(self, image: Image, progress: Progress = SILENT) -> Path:
        """Make all of the image local in one file. Raises as :meth:`materialise` does."""
        path = self._image_path(image, "flat")
        part = _Part.open(path)
        if part is None:
            return path
        with (
            part,
            progress.task("packs", sum(pack.device_size for pack in image.packs)) as task,
            ThreadPoolExecutor(self._threads, "fill") as fill,
        ):
            flat = flatten(_index_bytes(image))
            part.resize(flat.blocks * BLOCK)
            part.write(flat.index, 0)
            for pack, block in zip(image.packs, flat.starts, strict=True):
                toc = open_pack(image.store, pack).toc
                _Filler(image.store, pack.digest, toc, part, block * BLOCK, task, resume=part.found).run(fill)
            part.commit()
        return path

    def _image_path(self, image: Image, suffix: str) -> Path:
        return self.root / "images" / f"{image.digest.removeprefix('sha256:')}.{suffix}"


class _Part:
    """A file being made, locked. It is ``path`` after :meth:`commit` and gone when left without.

    ``found``: a crash left it, and some of its frames may be right.
    """

    def __init__(self, path: Path, part: Path, descriptor: int) -> None:
        self.path = path
        self.descriptor = descriptor
        self.found = os.fstat(descriptor).st_size > 0
        self._part = part

    @classmethod
    def open(cls, path: Path) -> _Part | None:
        """Begin to make ``path``, after whoever else is at it. None: it exists."""
        part = path.with_name(path.name + ".part")
        while True:
            if path.exists():
                return None
            with storage(part):
                descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX)
                    # while this process waited, the file may have been committed or dropped
                    if _is(part, descriptor):
                        return cls(path, part, descriptor)
                except BaseException:
                    os.close(descriptor)
                    raise
                os.close(descriptor)

    def resize(self, size: int) -> None:
        with storage(self._part):
            os.ftruncate(self.descriptor, size)

    def write(self, data: bytes, offset: int) -> None:
        view = memoryview(data)
        with storage(self._part):
            while view:
                written = os.pwrite(self.descriptor, view, offset)
                offset += written
                view = view[written:]

    def read(self, offset: int, length: int) -> bytes:
        """What is there; less than ``length`` at the end."""
        with storage(self._part):
            return os.pread(self.descriptor, length, offset)

    def share_extents(self, store: Store, digest: str) -> bool:
        """Take a blob's bytes by reference, unverified, where the file system can."""
        if not isinstance(store, DirectoryStore):
            return False
        try:
            source = os.open(store.blob_path(digest), os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False  # reading it says what is wrong
        try:
            linux.clone_file(source, self.descriptor)
        except OSError:
            return False
        finally:
            os.close(source)
        return True

    def commit(self) -> None:
        """Make the file durable, then visible."""
        try:
            with storage(self._part):
                os.fdatasync(self.descriptor)
                os.rename(self._part, self.path)
        except BaseException:
            self.drop()
            raise
        self._close()

    def drop(self) -> None:
        """Remove the file, unless it was committed or dropped."""
        if self.descriptor >= 0:
            with suppress(OSError):
                os.unlink(self._part)
            self._close()

    def _close(self) -> None:
        os.close(self.descriptor)
        self.descriptor = -1

    def __enter__(self) -> _Part:
        return self

    def __exit__(self, *exc: object) -> None:
        self.drop()


class _Filler:
    """Puts a pack's device bytes, every frame checked, into ``part`` at ``offset``.

    ``resume``: look first whether a frame is there already.
    """

    def __init__(
        self, store: Store, digest: str, toc: Toc, part: _Part, offset: int, task: Task, *, resume: bool
    ) -> None:
        self._store = store
        self._digest = digest
        self._toc = toc
        self._part = part
        self._offset = offset
        self._task = task
        self._resume = resume

    def run(self, pool: ThreadPoolExecutor) -> None:
        """Fill, with all threads of ``pool``. The first error is raised when no thread is at work any more."""
        futures = [pool.submit(self._fill, first, end) for first, end in _batches(self._toc)]
        try:
            for future in futures:
                future.result()
        finally:
            for future in futures:
                future.cancel()
            wait(futures)

    def _fill(self, first: int, end: int) -> None:
        toc = self._toc
        length = int(toc.device_sizes[first:end].sum())
        while self._resume and first < end and self._is_right(first):
            first += 1
        if first < end:
            start = int(toc.offsets[first])
            stored = self._store.read(self._digest, start, int(toc.offsets[end - 1] + toc.sizes[end - 1]) - start)
            for frame in range(first, end):
                at = int(toc.offsets[frame]) - start
                piece = stored[at : at + int(toc.sizes[frame])]
                data = open_frame(piece, toc, frame, what=f"pack {self._digest}")
                self._part.write(data, self._offset + int(toc.device_offsets[frame]))
        self._task.advance(length)

    def _is_right(self, frame: int) -> bool:
        toc = self._toc
        offset = self._offset + int(toc.device_offsets[frame])
        return blake3(self._part.read(offset, int(toc.device_sizes[frame]))).digest() == toc.digest(frame)


def _batches(toc: Toc) -> Iterator[tuple[int, int]]:
    """Neighbouring frames, ``[first, end)``, of about ``_BATCH`` device bytes."""
    first = size = 0
    for frame, device_size in enumerate(toc.device_sizes.tolist()):
        if size and size + device_size > _BATCH:
            yield first, frame
            first, size = frame, 0
        size += device_size
    if size:
        yield first, len(toc)


def _index_bytes(image: Image) -> bytes:
    _ = image.index  # checks that its devices are the manifest's packs
    return image.index_bytes()


def _is(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


@contextmanager
def storage(path: Path) -> Iterator[None]:
    """Turns an OSError about ``path`` into the user's line."""
    try:
        yield
    except OSError as error:
        hint = None
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            hint = "free some space, or choose another directory with --root"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            hint = "run as root, or choose another directory with --root"
        raise StorageError(f"{path}: {error.strerror}", hint=hint) from error
