"""Errors a user can meet. One class per exit code; the command line prints them as one line.

::

    ErofsgenError            1   anything below, unspecified
    ├── UsageError           2   the command line or a reference is malformed
    ├── NotFoundError        3   no such image, tag, path or blob
    ├── FormatError          4   bytes are not what their format says: tar, index, pack, manifest
    │   └── IntegrityError   5   bytes are not what their digest or length says
    ├── RemoteError          6   a registry or store refused or could not be reached
    ├── StorageError         7   the local disk refused: full, read-only, permission
    ├── UnsupportedError     8   understood, but not possible here: kernel, media type, feature
    └── BusyError            9   somebody else holds what is needed: a lock, a mount

A message says what is wrong and where; ``hint`` says what to do. Neither ends in a full stop.
"""

from __future__ import annotations

import errno
import os
from typing import Final, NamedTuple

_FULL: Final = (errno.ENOSPC, errno.EDQUOT)


class ErofsgenError(Exception):
    """Base of every error raised on purpose. ``str(error)`` is the user's line, without the hint."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(ErofsgenError):
    """The command line or an image reference is malformed."""

    exit_code = 2


class NotFoundError(ErofsgenError):
    """An image, tag, path or blob does not exist."""

    exit_code = 3


class FormatError(ErofsgenError):
    """Bytes do not follow the format they claim: tar, index, pack, manifest."""

    exit_code = 4


class IntegrityError(FormatError):
    """Bytes differ from their digest or length."""

    exit_code = 5


class RemoteError(ErofsgenError):
    """A registry or a remote store refused, failed or could not be reached.

    ``retry_after``: seconds after which it wants to be asked again, if it said so.
    """

    exit_code = 6
    retry_after: float | None = None


class StorageError(ErofsgenError):
    """The local file system refused: full, read-only, permission denied."""

    exit_code = 7


class UnsupportedError(ErofsgenError):
    """Well-formed, but this program, kernel or machine cannot do it."""

    exit_code = 8


class BusyError(ErofsgenError):
    """Something needed is in use: a lock, a mount point."""

    exit_code = 9


class Explanation(NamedTuple):
    """What an exception means to the user: one line, what to do, the exit code."""

    message: str
    hint: str | None
    exit_code: int


def explain(error: BaseException) -> Explanation:
    """Says what went wrong, whether somebody raised it on purpose or not."""
    if isinstance(error, ErofsgenError):
        return Explanation(str(error), error.hint, error.exit_code)
    if isinstance(error, OSError):
        where = error.filename
        if isinstance(where, bytes):
            where = os.fsdecode(where)
        text = error.strerror or str(error) or type(error).__name__
        code = RemoteError.exit_code if isinstance(error, (ConnectionError, TimeoutError)) else StorageError.exit_code
        hint = "free some space and run the command again" if error.errno in _FULL else None
        return Explanation(f"{where}: {text}" if where else text, hint, code)
    if isinstance(error, MemoryError):
        return Explanation("out of memory", "close other programs, or use fewer --threads", ErofsgenError.exit_code)
    return Explanation(
        f"internal error: {type(error).__name__}: {error}",
        "run the command again with --debug and report what it prints",
        ErofsgenError.exit_code,
    )
