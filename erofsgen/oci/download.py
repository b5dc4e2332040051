"""Blobs from the network to verified files: in parallel, resumed where they broke off.

On disk, in the downloads directory::

    <hex digest>.partial    what has arrived so far, from the blob's start. Locked (flock) by who is writing it
    <hex digest>            the whole blob, its digest and length verified

A partial file is trusted with nothing: its digest is computed over what is there before more is added. A whole file
is verified again before a later run uses it.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import BinaryIO, Final

import httpx

from erofsgen.errors import IntegrityError, RemoteError, StorageError
from erofsgen.oci.httpclient import HttpClient
from erofsgen.oci.manifest import Descriptor
from erofsgen.oci.patience import Patience, Transient
from erofsgen.oci.slice import open_slice
from erofsgen.progress import SILENT, Progress, Task

OpenBlob = Callable[[Descriptor, int], AbstractContextManager[httpx.Response]]
"""A blob's response from an offset on: 200, 206 or 416. Raises Transient or an ErofsgenError."""

_READ: Final = 1 << 20
_PROGRESS: Final = 1 << 20
"""Bytes that count as progress: patience starts anew after them."""
_LOCK_POLL: Final = 0.2
_CONTENT_RANGE: Final = re.compile(r"bytes ([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19}|\*)", re.ASCII)


class Downloads:
    """The blobs of one image. :meth:`start` and :meth:`open` are for one thread; the work is done by others."""

    def __init__(
        self, open_blob: OpenBlob, http: HttpClient, directory: Path | None, *, where: str, progress: Progress | None
    ) -> None:
        self._open_blob = open_blob
        self._http = http
        self._where = where
        self._progress = progress or SILENT
        self._private = directory is None
        with _storage(directory):
            if directory is None:
                directory = Path(tempfile.mkdtemp(prefix="erofsgen-"))
            directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._pool = ThreadPoolExecutor(http.policy.parallel, "download")
        self._blobs: dict[str, Future[BinaryIO]] = {}

    def start(self, blob: Descriptor) -> None:
        """Fetch a blob when a thread is free. Asking again costs nothing."""
        if blob.digest not in self._blobs:
            self._blobs[blob.digest] = self._pool.submit(self._fetch, blob)

    def open(self, blob: Descriptor) -> BinaryIO:
        """The verified blob, as soon as all of it is there.

        Raises NotFoundError, IntegrityError, RemoteError, StorageError.
        """
        self.start(blob)
        return open_slice(self._blobs[blob.digest].result().fileno(), 0, blob.size)

    def close(self, *, keep: bool = False) -> None:
        """Stop, and drop what was downloaded; with ``keep``, leave it in a named directory for a later run."""
        self._http.close()
        self._pool.shutdown(wait=True, cancel_futures=True)
        for digest, future in self._blobs.items():
            if not future.cancelled() and not future.exception():
                future.result().close()
                if not keep:
                    self._path(digest).unlink(missing_ok=True)
        self._blobs.clear()
        if self._private:
            shutil.rmtree(self._directory, ignore_errors=True)

    def _path(self, digest: str) -> Path:
        return self._directory / digest.partition(":")[2]

    def _fetch(self, blob: Descriptor) -> BinaryIO:
        """One blob, in a worker thread: the open, verified file."""
        path = self._path(blob.digest)
        label = f"layer {path.name[:12]}"
        with _storage(path), self._progress.task(label, blob.size) as task, self._locked(path) as file:
            if path.exists():
                whole = path.open("rb")
                if self._is_whole(whole, blob):
                    os.unlink(file.name)
                    task.advance(blob.size)
                    return whole
                whole.close()
                path.unlink()
            _Download(self, blob, file, task).run()
            os.rename(file.name, path)
            return path.open("rb")

    def _is_whole(self, file: io.BufferedReader, blob: Descriptor) -> bool:
        if os.fstat(file.fileno()).st_size != blob.size:
            return False
        algorithm, _, expected = blob.digest.partition(":")
        return hashlib.file_digest(file, algorithm).hexdigest() == expected

    @contextmanager
    def _locked(self, path: Path) -> Iterator[BinaryIO]:
        """The partial file, to be written by nobody else. Another process may rename or drop it while we wait."""
        partial = path.with_name(f"{path.name}.partial")
        while True:
            with open(partial, "r+b", opener=_create) as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    if self._http.stop.wait(_LOCK_POLL):
                        raise RemoteError(f"the download of {self._where} was given up") from None
                    continue
                if _is_at(partial, file):
                    yield file
                    return


class _Download:
    """One blob on its way into its partial file."""

    def __init__(self, downloads: Downloads, blob: Descriptor, file: BinaryIO, task: Task) -> None:
        self._open_blob = downloads._open_blob
        self._http = downloads._http
        self._blob = blob
        self._file = file
        self._task = task
        self._what = f"blob {blob.digest} of {downloads._where}"
        self._have = 0
        self._hash = hashlib.new(blob.digest.partition(":")[0])

    def run(self) -> None:
        """Raises IntegrityError once the partial file has been dropped, and what a request raises."""
        try:
            resumed = self._take_over()
            while True:
                resumed = self._receive_all() or resumed
                self._file.flush()
                if self._hash.hexdigest() == self._blob.digest.partition(":")[2]:
                    return
                if not resumed:
                    raise IntegrityError(f"{self._what} does not have its digest: the content was changed or damaged")
                resumed = False  # pieces of two attempts do not fit: once more, in one piece
                self._restart()
        except IntegrityError:
            os.unlink(self._file.name)
            raise

    def _take_over(self) -> bool:
        """Continue what an earlier run left behind."""
        if os.fstat(self._file.fileno()).st_size > self._blob.size:
            self._restart()
        while piece := self._file.read(min(_READ, self._blob.size - self._have)):
            self._hash.update(piece)
            self._advance(len(piece))
        return self._have > 0

    def _receive_all(self) -> bool:
        """Requests until the blob's size is reached. Whether there was more than one."""
        patience = Patience(self._http.policy, self._http.stop)
        resumed = False
        while self._have < self._blob.size:
            start = self._have
            try:
                with self._open_blob(self._blob, start) as response:
                    self._receive(response)
            except Transient as failure:
                if self._have >= start + _PROGRESS:
                    patience.progressed()
                patience.pause(failure)
                resumed = self._have > 0
        return resumed

    def _receive(self, response: httpx.Response) -> None:
        """One response's body into the file. Raises Transient where the rest must be asked for."""
        if not self._starts_here(response):
            self._restart()
            if response.status_code != 200:
                raise Transient(RemoteError(f"the ranges of {self._what} are wrong"))
        expected = self._blob.size - self._have
        announced = response.headers.get("Content-Length", "")
        if announced.isdigit() and int(announced) != expected:
            raise self._wrong_size("longer" if int(announced) > expected else "shorter")
        for piece in self._http.pieces(response):
            if self._have + len(piece) > self._blob.size:
                raise self._wrong_size("longer")
            self._file.write(piece)
            self._hash.update(piece)
            self._advance(len(piece))
        if self._have < self._blob.size:
            if announced or "Transfer-Encoding" in response.headers:
                raise self._wrong_size("shorter")
            # HTTP/1.0 marks the end by closing: a broken connection looks the same
            raise Transient(RemoteError(f"{self._what} ended early"))

    def _starts_here(self, response: httpx.Response) -> bool:
        """Whether the body continues the file. A server may ignore Range, or answer with another one."""
        if response.status_code == 200:
            return self._have == 0
        match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if response.status_code != 206 or not match:
            return False
        return int(match[1]) == self._have and match[3] in ("*", str(self._blob.size))

    def _restart(self) -> None:
        self._task.advance(-self._have)
        self._have = 0
        self._hash = hashlib.new(self._blob.digest.partition(":")[0])
        self._file.seek(0)
        self._file.truncate()

    def _advance(self, count: int) -> None:
        self._have += count
        self._task.advance(count)

    def _wrong_size(self, how: str) -> IntegrityError:
        return IntegrityError(f"{self._what} is {how} than the {self._blob.size} bytes its manifest says")


def _create(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW, 0o600)


def _is_at(path: Path, file: BinaryIO) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


@contextmanager
def _storage(path: Path | None) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = error.filename or path or tempfile.gettempdir()
        raise StorageError(
            f"cannot write download {where}: {error.strerror}", hint="free space, or use another directory"
        ) from error
