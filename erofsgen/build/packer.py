"""Lays chunks into new packs: groups them into frames, compresses frames in parallel, writes packs in order.

::

    add(chunk) ─► frame buffer ─► pool: zstd, BLAKE3 ─► sink: append, SHA-256 ─► commit: fsync, rename
    (caller)                      (threads)   └── queue of frames, in order, bounded ──┘   (one thread each)

A chunk's place is known when it is added, before any of its bytes are written, because places count device bytes.
Output depends on the chunks and their order only, never on threads. Memory is bounded by the queue: about
``3 x threads + 4`` frames. One caller; not thread-safe.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from queue import Queue
from typing import Final, NamedTuple

import numpy as np
import zstandard
from blake3 import blake3

from erofsgen.pack import format as fmt
from erofsgen.pack.writer import PackWriter
from erofsgen.store.base import BlobWriter, Descriptor, Store
from erofsgen.store.manifest import pack_descriptor

FRAME_SIZE: Final = 1 << 20
"""Device bytes of a full frame; a larger chunk size makes larger frames."""


class NewPack(NamedTuple):
    """A pack that has been written: its descriptor and its chunks (:data:`erofsgen.pack.format.CHUNK`)."""

    descriptor: Descriptor
    chunks: np.ndarray


@dataclass
class _Pack:
    """A pack under construction. ``blob`` and ``writer`` belong to the sink thread."""

    raw: bool
    blob: BlobWriter
    writer: PackWriter
    chunks: list[tuple[bytes, int, int]] = field(default_factory=list)
    device_size: int = 0
    done: Future[NewPack] = field(default_factory=Future)


class _Stream:
    """The open pack and the open frame of one kind (zstd or raw)."""

    def __init__(self) -> None:
        self.pack: _Pack | None = None
        self.number = 0
        self.buffer = bytearray()
        self.used = 0
        self.directory = b""


class Packer:
    """Writes packs into ``store``. Use as a context manager: leaving it on an error drops unfinished packs."""

    def __init__(self, store: Store, *, level: int, threads: int, pack_size: int, frame_size: int = FRAME_SIZE) -> None:
        self._store = store
        self._level = level
        self._pack_size = pack_size
        self._frame_size = frame_size
        self._streams = {False: _Stream(), True: _Stream()}
        self._packs: list[_Pack] = []
        self._local = threading.local()
        self._pool = ThreadPoolExecutor(threads, "compress")
        self._commits = ThreadPoolExecutor(1, "commit")
        self._queue: Queue[tuple[_Pack, Future[tuple[bytes, bytes]] | None, int] | None] = Queue(2 * threads + 4)
        self._error: BaseException | None = None
        self._sink = threading.Thread(target=self._drain, name="sink", daemon=True)
        self._sink.start()

    def __enter__(self) -> Packer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is not None:
            self._error = self._error or RuntimeError("aborted")
        self._queue.put(None)
        self._sink.join()
        self._pool.shutdown(cancel_futures=True)
        self._commits.shutdown()
        for pack in self._packs:
            pack.blob.__exit__(kind, None, None)

    def begin_file(self, directory: bytes) -> None:
        """Say which directory the next chunks' file is in: frames are cut between directories where they can be."""
        stream = self._streams[False]
        if directory != stream.directory:
            stream.directory = directory
            if stream.used * 4 >= self._frame_size * 3:
                self._close_frame(stream)

    def add(self, chunk: bytes | memoryview, digest: bytes, *, raw: bool, alone: bool = False) -> tuple[int, int]:
        """Append a chunk (BLAKE3 ``digest``) to a raw or a zstd pack; ``alone``: in a frame of its own.

        Returns its place: the pack's number, in the order of :meth:`flush`, and the 4 KiB block in its device.
        Raises StorageError or RemoteError, possibly for an earlier chunk.
        """
        length = len(chunk)
        padded = (length + fmt.BLOCK - 1) & -fmt.BLOCK
        stream = self._streams[raw]
        pack = stream.pack
        if pack is None or pack.device_size + padded > self._pack_size:
            pack = self._open_pack(stream, raw)
        elif alone or stream.used + padded > self._frame_size:
            self._close_frame(stream)
        block = pack.device_size // fmt.BLOCK
        pack.chunks.append((digest, block, length))
        pack.device_size += padded
        if length == padded and (alone or length >= self._frame_size):
            self._submit(pack, chunk, digest)
        else:
            if not stream.used:
                stream.buffer = bytearray(self._frame_size)
            stream.buffer[stream.used : stream.used + length] = chunk
            stream.used += padded
        return stream.number, block

    def flush(self) -> list[NewPack]:
        """Finish every pack, wait until all are durable and visible; numbering starts again at 0."""
        for stream in self._streams.values():
            self._close_pack(stream)
        wait([pack.done for pack in self._packs])
        if self._error is not None:
            raise self._error
        done = [pack.done.result() for pack in self._packs]
        self._packs = []
        return done

    def _open_pack(self, stream: _Stream, raw: bool) -> _Pack:
        self._close_pack(stream)
        blob = self._store.create()
        stream.pack = _Pack(raw, blob, PackWriter(blob, raw=raw))
        stream.number = len(self._packs)
        self._packs.append(stream.pack)
        return stream.pack

    def _close_pack(self, stream: _Stream) -> None:
        if stream.pack is not None:
            self._close_frame(stream)
            self._put((stream.pack, None, 0))
            stream.pack = None

    def _close_frame(self, stream: _Stream) -> None:
        if stream.used and stream.pack is not None:
            self._submit(stream.pack, memoryview(stream.buffer)[: stream.used], None)
            stream.buffer = bytearray()
            stream.used = 0

    def _submit(self, pack: _Pack, data: bytes | memoryview, digest: bytes | None) -> None:
        self._put((pack, self._pool.submit(self._seal, data, digest, pack.raw), len(data)))

    def _seal(self, data: bytes | memoryview, digest: bytes | None, raw: bool) -> tuple[bytes, bytes]:
        """A frame's stored bytes and the BLAKE3 of its device bytes, which a frame of one full chunk shares."""
        if digest is None:
            digest = blake3(data).digest()
        if raw:
            return data, digest  # type: ignore[return-value]  # any buffer will do for writing
        compressor = getattr(self._local, "compressor", None)
        if compressor is None:
            compressor = self._local.compressor = zstandard.ZstdCompressor(self._level)
        return compressor.compress(data), digest

    def _put(self, item: tuple[_Pack, Future[tuple[bytes, bytes]] | None, int]) -> None:
        if self._error is not None:
            raise self._error
        self._queue.put(item)

    def _drain(self) -> None:
        """The sink thread: append frames in order. After an error it only empties the queue."""
        while (item := self._queue.get()) is not None:
            pack, frame, size = item
            try:
                if self._error is not None:
                    raise self._error  # every pack's future must end, or flush would wait for it for ever
                if frame is None:
                    self._commits.submit(self._finish, pack)
                else:
                    stored, digest = frame.result()
                    pack.writer.add_frame(stored, size, digest)
            except BaseException as error:  # noqa: BLE001  (handed to the caller's thread)
                self._error = error
                if not pack.done.done():
                    pack.done.set_exception(error)

    def _finish(self, pack: _Pack) -> None:
        try:
            toc = pack.writer.finish(pack.chunks)
            digest, size = pack.blob.commit()
            descriptor = pack_descriptor(digest, size, raw=pack.raw, device_size=pack.device_size, toc=toc)
            pack.done.set_result(NewPack(descriptor, np.array(pack.chunks, fmt.CHUNK)))
        except BaseException as error:  # noqa: BLE001  (handed to the caller's thread)
            self._error = error
            if not pack.done.done():
                pack.done.set_exception(error)


def compressible(sample: bytes | memoryview, *, level: int = 1) -> bool:
    """Whether a chunk looks worth compressing: three 8 KiB pieces of it shrink by a tenth or more."""
    size = len(sample)
    if size <= 3 * _PIECE:
        probe: bytes | memoryview = sample
    else:
        middle = (size - _PIECE) // 2
        pieces: Sequence[bytes | memoryview] = (
            sample[:_PIECE],
            sample[middle : middle + _PIECE],
            sample[size - _PIECE :],
        )
        probe = b"".join(pieces)
    return len(zstandard.ZstdCompressor(level).compress(probe)) * 10 <= len(probe) * 9


_PIECE: Final = 8192
