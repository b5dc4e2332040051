"""A layer blob as a stream of plain tar bytes: hashed, decompressed and checked in the background.

::

    blob ─► [sha256, size] ─► decompress ─►│queue│─► [sha256 = diff_id] ─►│queue│─► read(), skip()
            └────── thread "inflate" ─────┘         └─ thread "diff-id" ─┘           the caller

Both threads spend their time in C with the GIL released. Queues are short, so memory stays at a few blocks whatever the
layer's size, and a decompression bomb costs time only. The end of the stream is delivered after every digest and length
has been checked: who has read to the end has read what the manifest named.
"""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Callable
from typing import Any, BinaryIO, Final

import numpy as np

from erofsgen.errors import ErofsgenError, FormatError, IntegrityError, StorageError, UnsupportedError
from erofsgen.oci.decompress import MAGIC_SIZE, READ_SIZE, decompressor

BLOCK_SIZE: Final = 2 << 20
"""Bytes per block of plain tar; the largest piece that can be handed out without a copy."""

QUEUE_BLOCKS: Final = 2
"""Blocks that wait between two threads."""

_EMPTY: Final = memoryview(b"")


def open_stream(
    raw: BinaryIO, *, media_type: str, digest: str | None, size: int | None, diff_id: str | None, what: str
) -> BlockStream:
    """Start to read a layer blob.

    ``digest`` and ``size`` name the blob as stored, ``diff_id`` the plain tar; None leaves that check out. ``what``
    names the layer in errors. The stream owns ``raw`` and closes it.

    Raises UnsupportedError: an encrypted layer, or a digest algorithm other than sha256.
    """
    if "+encrypted" in media_type:
        raise UnsupportedError(
            f"{what} is encrypted ({media_type})",
            hint="decrypt the image first, e.g. with skopeo copy --decryption-key",
        )
    for name in (digest, diff_id):
        if name is not None and not name.startswith("sha256:"):
            raise UnsupportedError(f"{what} has a digest that is not sha256: {name}")
    return BlockStream(raw, digest=digest, size=size, diff_id=diff_id, what=what)


class BlockStream:
    """Plain bytes of one layer, read once and in order, by one thread.

    ``buffer[pos:end]`` is what remains of the current block; a parser may take from it directly and advance ``pos``.
    ``base`` is the offset of ``buffer[0]`` in the plain tar.
    Every block is fresh memory, never written again: views of it may be kept. A context manager; leaving it stops the
    threads and closes the blob.
    """

    def __init__(self, raw: BinaryIO, *, digest: str | None, size: int | None, diff_id: str | None, what: str) -> None:
        self.what = what
        self.buffer = _EMPTY
        self.pos = 0
        self.end = 0
        self.base = 0
        self._ended = False
        self._closed = False
        self._error: BaseException | None = None
        self._stop = threading.Event()
        self._blob = _Blob(raw, digest, size, what)
        self._digest = digest
        self._diff_id = diff_id
        self._hashed_already = False
        self._blocks = self._spawn("inflate", self._inflate, None)
        if diff_id is not None:
            self._blocks = self._spawn("diff-id", self._check_diff_id, self._blocks)

    def read(self, size: int) -> memoryview:
        """The next ``size`` bytes, fewer only at the end. No copy is made inside a block.

        Raises FormatError (damaged compression), IntegrityError (wrong digest or length), and what the source raises.
        """
        start = self.pos
        if self.end - start >= size:
            self.pos = start + size
            return self.buffer[start : start + size]
        pieces: list[memoryview] = []
        missing = size
        while missing:
            if self.pos == self.end and not self._advance():
                break
            step = min(missing, self.end - self.pos)
            pieces.append(self.buffer[self.pos : self.pos + step])
            self.pos += step
            missing -= step
        if len(pieces) == 1:
            return pieces[0]
        return memoryview(b"".join(pieces))

    def skip(self, size: int) -> int:
        """Pass over ``size`` bytes and return how many there were: fewer only at the end. Raises as :meth:`read`."""
        missing = size
        while missing:
            if self.pos == self.end and not self._advance():
                break
            step = min(missing, self.end - self.pos)
            self.pos += step
            missing -= step
        return size - missing

    def tell(self) -> int:
        """Offset in the plain tar of the next byte to be read."""
        return self.base + self.pos

    def finish(self) -> None:
        """Read to the end, so that every check has been made. Raises as :meth:`read`."""
        self.pos = self.end
        while self._advance():
            self.pos = self.end

    def close(self) -> None:
        """Stop the threads and close the blob. Checks that were not reached are not made."""
        if self._closed:
            return
        self._closed = True
        self._stop.set()
        while not self._ended:  # a thread may wait for room in its queue
            self._ended = self._blocks.get() is None
        self.buffer, self.pos, self.end = _EMPTY, 0, 0
        self._blob.close()

    def __enter__(self) -> BlockStream:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _advance(self) -> bool:
        """Make the next block current. False at the end. The error that ended a thread is raised here."""
        if self._ended:
            if self._error is not None:
                raise self._error
            if self._closed:
                raise ValueError("read from a closed stream")
            return False
        block = self._blocks.get()
        self.base += self.end
        self.pos = 0
        if block is None:
            self._ended = True
            self.buffer, self.end = _EMPTY, 0
            if self._error is not None:
                raise self._error
            return False
        self.buffer, self.end = block, len(block)
        return True

    def _spawn(self, name: str, work: Callable[..., None], upstream: _Queue | None) -> _Queue:
        blocks: _Queue = queue.Queue(QUEUE_BLOCKS)
        arguments = (blocks,) if upstream is None else (upstream, blocks)
        threading.Thread(target=work, args=arguments, name=f"{name} {self.what}", daemon=True).start()
        return blocks

    def _inflate(self, out: _Queue) -> None:
        try:
            blob = self._blob
            start = decompressor(blob.peek(MAGIC_SIZE))
            reader = blob if start is None else start(blob)
            self._hashed_already = start is None and self._digest == self._diff_id
            while not self._stop.is_set():
                # numpy leaves the memory uninitialised: clearing 2 MiB only to overwrite it is measurable
                block = np.empty(BLOCK_SIZE, np.uint8).data
                filled = 0
                while filled < BLOCK_SIZE and (count := reader.readinto(block[filled:] if filled else block)):
                    filled += count
                if filled:
                    out.put(block[:filled].toreadonly())
                if filled < BLOCK_SIZE:
                    blob.check()
                    break
        except BaseException as error:  # noqa: BLE001  # raised again where the stream is read
            self._error = self._blame(error)
        finally:
            out.put(None)

    def _blame(self, error: BaseException) -> BaseException:
        """Say which layer it was, and look at the digest first: a damaged download explains damaged compression."""
        if type(error) is FormatError:
            try:
                while self._blob.read(READ_SIZE) and not self._stop.is_set():
                    pass
                self._blob.check()
            except (ErofsgenError, OSError) as cause:
                return cause
            return FormatError(f"{self.what}: {error}", hint=error.hint)
        if isinstance(error, OSError):
            return StorageError(f"{self.what}: {error.strerror or error}")
        return error

    def _check_diff_id(self, blocks: _Queue, out: _Queue) -> None:
        hasher = hashlib.sha256()
        while (block := blocks.get()) is not None:
            if not self._hashed_already:
                hasher.update(block)
            out.put(block)
        found = f"sha256:{hasher.hexdigest()}"
        reached_end = self._error is None and not self._stop.is_set()
        if reached_end and not self._hashed_already and found != self._diff_id:
            self._error = IntegrityError(f"{self.what}: uncompressed digest is {found}, expected {self._diff_id}")
        out.put(None)


_Queue = queue.Queue[memoryview | None]


class _Blob:
    """The blob as stored: counts and hashes what is read from it."""

    def __init__(self, raw: BinaryIO, digest: str | None, size: int | None, what: str) -> None:
        self._raw = raw
        self._what = what
        self._digest = digest
        self._size = size
        self._hasher = hashlib.sha256()
        self._count = 0
        self._head = b""
        self._readinto: Any = getattr(raw, "readinto", None)

    def peek(self, size: int) -> bytes:
        """The first ``size`` bytes, fewer if there are no more; they will be read again."""
        while len(self._head) < size and (data := self._raw.read(size - len(self._head))):
            self._head += data
        return self._head

    def read(self, size: int = READ_SIZE) -> bytes:
        if size < 0:
            size = READ_SIZE
        data = self._head[:size] or self._raw.read(size)
        self._head = self._head[size:]
        self._account(data)
        return data

    def readinto(self, buffer: memoryview) -> int:
        if self._head or self._readinto is None:
            data = self.read(len(buffer))
            buffer[: len(data)] = data
            return len(data)
        count: int = self._readinto(buffer)
        self._account(buffer[:count])
        return count

    def _account(self, data: bytes | memoryview) -> None:
        self._count += len(data)
        if self._size is not None and self._count > self._size:
            raise IntegrityError(f"{self._what}: blob is longer than the expected {self._size:,} bytes")
        if self._digest is not None:
            self._hasher.update(data)

    def check(self) -> None:
        """Raises IntegrityError unless everything read so far is the blob that was named."""
        if self._size is not None and self._count != self._size:
            raise IntegrityError(f"{self._what}: blob is {self._count:,} bytes long, expected {self._size:,}")
        found = f"sha256:{self._hasher.hexdigest()}"
        if self._digest is not None and found != self._digest:
            raise IntegrityError(f"{self._what}: blob digest is {found}, expected {self._digest}")

    def close(self) -> None:
        self._raw.close()
