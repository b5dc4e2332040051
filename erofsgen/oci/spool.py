"""Archives as plain, seekable files: what is compressed or comes through a pipe is unpacked to disk first."""

from __future__ import annotations

import io
import os
import stat
import tempfile
from pathlib import Path
from typing import Final

from erofsgen.errors import FormatError, NotFoundError, StorageError
from erofsgen.oci.decompress import MAGIC_SIZE, decompressor
from erofsgen.oci.manifest import OCI_LAYER
from erofsgen.progress import Progress

_BLOCK: Final = 1 << 20


def open_file(path: Path) -> io.BufferedReader:
    """Open an archive, which may be a pipe.

    Raises NotFoundError, StorageError (unreadable, or a directory).
    """
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise NotFoundError(f"{path} does not exist") from None
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from error


def layer_type(file: io.BufferedReader) -> str:
    """The media type of a layer that was found without one, by its first bytes; nothing of ``file`` is consumed.

    xz and bzip2 have no registered type. They are named in the same way: who reads layers looks at the bytes, too.
    """
    magic = file.peek(MAGIC_SIZE)[:MAGIC_SIZE]
    names = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ\0": "xz", b"BZh": "bzip2"}
    return next((f"{OCI_LAYER}+{name}" for start, name in names.items() if magic.startswith(start)), OCI_LAYER)


def open_plain(path: Path, directory: Path | None, progress: Progress, *, unpack: bool = True) -> io.BufferedReader:
    """The uncompressed content of ``path``, seekable; what had to be unpacked is a nameless file in ``directory``.

    With ``unpack`` false, only a pipe is stored, as it is. Raises NotFoundError, StorageError, FormatError (the
    compression is damaged).
    """
    source = open_file(path)
    try:
        status = os.fstat(source.fileno())
        regular = stat.S_ISREG(status.st_mode)
        magic = source.peek(MAGIC_SIZE)[:MAGIC_SIZE]
        start = decompressor(magic) if unpack else None
        if start is None and regular:
            return source
        with source, progress.task(f"unpack {path.name}", status.st_size if regular else None) as task:
            if directory is not None:
                directory.mkdir(parents=True, exist_ok=True)
            reader = source if start is None else start(source)
            block = memoryview(bytearray(_BLOCK))
            read = 0
            with tempfile.TemporaryFile(dir=directory, prefix="erofsgen-") as spool:
                while count := reader.readinto(block):
                    spool.write(block[:count])
                    done = source.tell() if regular else read + count
                    task.advance(done - read)
                    read = done
                spool.seek(0)
                return open(os.dup(spool.fileno()), "rb")
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from error
    except OSError as error:
        hint = "free space, or set TMPDIR to another directory"
        raise StorageError(f"cannot unpack {path}: {error.strerror}", hint=hint) from error
