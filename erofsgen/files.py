"""Files that other processes see whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from erofsgen.errors import StorageError


def replace_file(path: Path, data: bytes) -> None:
    """Let ``path`` hold ``data``, all of it or as before. Raises StorageError."""
    temporary = path.with_name(f".{path.name}.{os.urandom(6).hex()}.part")
    try:
        try:
            temporary.write_bytes(data)
            temporary.rename(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}") from error
