"""Small blobs that came along with what names them: whoever reads one next needs no further round trip.

A registry answers with the manifest where a tag is asked for. In an object store the descriptor that is a reference has
the manifest in its ``data``, as the OCI image specification allows (*Content Descriptors*, Embedded Content).
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from typing import Final

import msgspec

from erofsgen.store.base import Descriptor, parse_descriptor

EMBEDDED: Final = 64 << 10
"""Bytes of a document that travels along at most."""

_KEPT: Final = 16


class Documents:
    """Those of one store. Each is handed out once: the store is asked afterwards, and may not have it. Thread-safe."""

    def __init__(self) -> None:
        self._data: OrderedDict[str, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def keep(self, digest: str, data: bytes) -> None:
        """Have a document at hand; one that is not what its digest says is none."""
        if f"sha256:{hashlib.sha256(data).hexdigest()}" != digest:
            return
        with self._lock:
            self._data[digest] = data
            if len(self._data) > _KEPT:
                self._data.popitem(last=False)

    def parse(self, data: bytes, what: str) -> Descriptor:
        """A descriptor that stands alone, whose content is kept. Raises FormatError naming ``what``."""
        found = parse_descriptor(data, what)
        if found.data is None:
            return found
        self.keep(found.digest, found.data)
        return msgspec.structs.replace(found, data=None)

    def read_into(self, digest: str, offset: int, buffer: memoryview) -> bool:
        """Whether a document was at hand that has bytes at ``offset`` for all of ``buffer``, which they are in now."""
        with self._lock:
            data = self._data.pop(digest, b"")
        if offset + len(buffer) > len(data):
            return False
        buffer[:] = data[offset : offset + len(buffer)]
        return True
