"""Images from one store to another: what is missing there, several blobs at a time, the name last.

What lies beside an image comes along, see :func:`erofsgen.store.profiles.copy`.

A copy that stops half-way leaves whole blobs that no reference reaches; the next one finds them and goes on. The blobs
of the destination are kept from its garbage collection meanwhile.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Final, Protocol

import msgspec

from erofsgen.errors import ErofsgenError, IntegrityError
from erofsgen.progress import SILENT, Progress, Task
from erofsgen.store import profiles
from erofsgen.store.base import Store
from erofsgen.store.image import Image

_PIECE: Final = 4 << 20
"""Bytes read at a time; one more piece of each blob is on its way while one is written."""

_logger: Final = logging.getLogger(__name__)


class CopyResult(msgspec.Struct, frozen=True):
    """What a copy did. ``blobs`` and ``bytes`` were copied, ``kept_blobs`` and ``kept_bytes`` were there before;
    ``profiles`` that lie beside the image are counted apart."""

    name: str
    digest: str
    blobs: int
    bytes: int
    kept_blobs: int
    kept_bytes: int
    seconds: float
    profiles: int = 0


def copy_image(
    image: Image, destination: Store, name: str | None = None, *, jobs: int = 8, progress: Progress = SILENT
) -> CopyResult:
    """Copy ``image`` into ``destination`` under ``name`` (by default what the destination makes of its own name).

    ``jobs`` blobs are on their way at a time. Raises NotFoundError or IntegrityError (the source lacks a blob, or has
    another one in its place), RemoteError, StorageError; no name has changed then.
    """
    started = time.monotonic()
    name = destination.called(image.name) if name is None else name
    destination.check_name(name)
    wanted = {blob.digest: blob.size for blob in (image.manifest.config, *image.manifest.layers)}
    with ExitStack() as stack:
        stack.enter_context(destination.building())
        pool = stack.enter_context(_Pool(jobs, "copy"))
        readers = stack.enter_context(_Pool(2 * jobs, "read"))
        sizes = pool.map(destination.size, wanted)
        missing = {digest: size for (digest, size), there in zip(wanted.items(), sizes, strict=True) if there != size}
        task = stack.enter_context(progress.task(f"copy {name}", sum(missing.values())))
        copies = [
            pool.submit(_copy_blob, image.store, destination, digest, size, readers, task)
            for digest, size in missing.items()
        ]
        for copied in copies:
            copied.result()
        # The names' chain of trust begins here: last, and from the bytes that were checked
        _copy_blob(image.store, destination, image.digest, image.manifest_size, readers, task)
        destination.tag(name, image.descriptor)
        copied_profiles = _copy_profiles(image, destination)
    copied_bytes = sum(missing.values())
    return CopyResult(
        name=name,
        digest=image.digest,
        blobs=len(missing),
        bytes=copied_bytes,
        kept_blobs=len(wanted) - len(missing),
        kept_bytes=sum(wanted.values()) - copied_bytes,
        seconds=time.monotonic() - started,
        profiles=copied_profiles,
    )


def _copy_profiles(image: Image, destination: Store) -> int:
    """A hint that does not get there is no reason to fail: the image is there."""
    try:
        return len(profiles.copy(image.store, destination, image.descriptor))
    except ErofsgenError as error:
        _logger.warning("%s: the image's profiles were not copied: %s", image.name, error)
        return 0


class Readable(Protocol):
    """Where blobs can be read, as :class:`Store` says."""

    def read_into(self, digest: str, offset: int, buffer: memoryview, /) -> None: ...

    def doubt(self) -> None: ...


def copy_blob(source: Readable, destination: Store, digest: str, size: int) -> None:
    """One blob, checked on its way. Raises as :func:`copy_image` does."""
    with _Pool(2, "read") as readers, SILENT.task("") as task:
        _copy_blob(source, destination, digest, size, readers, task)


def _copy_blob(
    source: Readable, destination: Store, digest: str, size: int, readers: ThreadPoolExecutor, task: Task
) -> None:
    for last in (False, True):
        done = 0
        try:
            with destination.create(digest=digest, size=size) as blob:
                for piece in _pieces(source, digest, size, readers):
                    blob.write(piece)
                    done += len(piece)
                    task.advance(len(piece))
                blob.commit()
                return
        except IntegrityError:  # damaged on its way, or where it comes from
            task.advance(-done)
            if last:
                raise
            source.doubt()


def _pieces(source: Readable, digest: str, size: int, readers: ThreadPoolExecutor) -> Iterator[memoryview]:
    """A blob in order; the next piece is being read while one is used."""

    def read(offset: int) -> memoryview:
        buffer = memoryview(bytearray(min(_PIECE, size - offset)))
        source.read_into(digest, offset, buffer)
        return buffer

    ahead: list[Future[memoryview]] = []
    for offset in range(0, size, _PIECE):
        ahead.append(readers.submit(read, offset))
        if len(ahead) > 1:
            yield ahead.pop(0).result()
    for piece in ahead:
        yield piece.result()


class _Pool(ThreadPoolExecutor):
    """Threads that, when something fails, do not begin what is still queued."""

    def __init__(self, threads: int, name: str) -> None:
        super().__init__(threads, name)

    def __exit__(self, *exc: object) -> None:
        self.shutdown(wait=True, cancel_futures=True)
