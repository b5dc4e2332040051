"""From what the user calls a store to the store."""

from __future__ import annotations

import os

from erofsgen.errors import UnsupportedError
from erofsgen.store.directory import DirectoryStore


def absolute(url: str) -> str:
    """A store's name that means the same in every working directory."""
    return url if "://" in url else os.path.abspath(url)


def open_store(url: str, *, create: bool = False) -> DirectoryStore:
    """The store at ``url``. Raises NotFoundError where there is none and ``create`` is not set, StorageError."""
    scheme, separator, _ = url.partition("://")
    if separator:
        raise UnsupportedError(f"{url}: {scheme} stores are not in this version", hint="name a directory")
    return DirectoryStore(url, create=create)
