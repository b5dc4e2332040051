"""The host cache: indexes and packs as the kernel wants them, shared by every image and mount of a root.

::

    ROOT/                          mode 0700
    ├── packs/<sha256>.data        a pack's device bytes, complete; shared by all images that name the pack
    ├── packs/<sha256>.data.part   being filled, under flock
    ├── images/<manifest>.erofs    an image's index
    ├── images/<manifest>.flat     index and device bytes in one file (erofsgen.erofs.flatten), where loop needs it
    ├── mnt/, upper/, mounts/      see erofsgen.host.mount.mounts
    └── lock.mounts

Nothing is written to a file before its digest was checked, and a file gets its name when all of it is written, not
when all of it is on the disk: on a slow disk that would be most of a mount's time. Until it is, the file carries the id
of the boot that wrote it (``user.erofsgen.boot``), and counts in that boot only: the page cache has its bytes. In any
later boot it is a ``.part`` again, like those that a crash leaves, and frames count as present where their digests say
so. The mark goes once the file is synced, a minute later at the earliest, when that costs nothing, by whoever mounts
or unmounts then. A file system without extended attributes has files synced before they get their names.

Locks: the ``.part`` file itself, exclusive, by whoever fills it; others wait, then find the work done. A process holds
one at a time.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
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

_BOOT: Final = "user.erofsgen.boot"
"""Extended attribute of a file that may not be on the disk yet: id of the boot that wrote it."""

_SETTLED: Final = 60
"""Seconds after which the kernel has written a file by itself: dirty_expire_centisecs, and then some."""


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
        missing = {pack.hex: pack for pack in image.packs if not _counts(self.pack_path(pack.hex))}
        with (
            progress.task("packs", sum(pack.device_size for pack in missing.values())) as task,
            ThreadPoolExecutor(self._threads, "fill") as fill,
        ):
            for pack in missing.values():
                part = _Part.open(self.pack_path(pack.hex))
                if part is None:  # another process has done it
                    task.advance(pack.device_size)
                    continue
                with part:
                    resume = part.found or (pack.raw and part.share_extents(image.store, pack.digest))
                    part.resize(pack.device_size)
                    toc = open_pack(image.store, pack).toc
                    _Filler(image.store, pack.digest, toc, part, 0, task, resume=resume).run(fill)
                    part.commit()
        devices = [self.pack_path(pack.hex) for pack in image.packs]
        settle([index, *devices])
        return index, devices

    def materialise_flat(self, image: Image, progress: Progress = SILENT) -> Path:
        """Make all of the image local in one file. Raises as :meth:`materialise` does."""
        path = self._image_path(image, "flat")
        part = _Part.open(path)
        if part is None:
            settle([path])
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


def settle(paths: Iterable[Path]) -> None:
    """Sync files that have been written long enough ago for that to cost nothing; they count in every boot then.

    A file that cannot be synced does not hold what it should: it is removed.
    """
    for path in paths:
        with storage(path), suppress(FileNotFoundError):  # another process found it bad
            if _boot_of(path) is None or time.time() - os.stat(path).st_mtime < _SETTLED:
                continue
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fdatasync(descriptor)
            except OSError:
                os.unlink(path)
                raise
            finally:
                os.close(descriptor)
            with suppress(OSError):  # another process was first
                os.removexattr(path, _BOOT)


def _counts(path: Path) -> bool:
    """Whether a file is there and its bytes are known to be right."""
    with storage(path):
        try:
            os.stat(path)
            return _boot_of(path) in (None, linux.boot_id())
        except FileNotFoundError:
            return False


def _boot_of(path: Path) -> str | None:
    try:
        return os.getxattr(path, _BOOT).decode()
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.EOPNOTSUPP):
            return None
        raise


class _Part:
    """A file being made, locked. It is ``path`` after :meth:`commit`, and gone when left without.

    ``found``: a crash or another boot left it, and some of its frames may be right. Left without commit it stays.
    """

    def __init__(self, path: Path, part: Path, descriptor: int, *, suspect: bool) -> None:
        self.path = path
        self.descriptor = descriptor
        self.found = os.fstat(descriptor).st_size > 0
        self._part = part
        self._suspect = suspect

    @classmethod
    def open(cls, path: Path) -> _Part | None:
        """Begin to make ``path``, after whoever else is at it. None: it is there."""
        part = path.with_name(path.name + ".part")
        while not _counts(path):
            with storage(part), ExitStack() as undo:
                descriptor = _open_locked(part)
                undo.callback(os.close, descriptor)
                # while this process waited, the file may have been committed or dropped
                if not _is(part, descriptor):
                    continue
                if _counts(path):
                    os.unlink(part)
                    continue
                if path.exists():
                    # another boot's: that becomes the file being made, locked before it is where others look for one
                    return cls(path, part, _take_over(path, part), suspect=True)
                undo.pop_all()
                return cls(path, part, descriptor, suspect=False)
        return None

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
        """Give the file its name."""
        with storage(self._part):
            if self._suspect:
                os.fdatasync(self.descriptor)
                os.removexattr(self.descriptor, _BOOT)
            elif not _mark(self.descriptor):
                os.fdatasync(self.descriptor)
            os.rename(self._part, self.path)
        self._close()

    def drop(self) -> None:
        """Give up, unless the file was committed."""
        if self.descriptor >= 0:
            if not self.found:
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


def _mark(descriptor: int) -> bool:
    """Let a file count in this boot only. False where the file system cannot keep that."""
    try:
        os.setxattr(descriptor, _BOOT, linux.boot_id().encode())
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        return False
    return True


def _open_locked(path: Path) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _take_over(path: Path, part: Path) -> int:
    descriptor = _open_locked(path)
    try:
        os.rename(path, part)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


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
