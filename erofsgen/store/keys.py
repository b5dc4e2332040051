"""What lies where in a store: the keys that every kind shares, relative to the store's place.

::

    oci-layout                          directories: what makes it an OCI image layout
    index.json                          directories: the references, all in one file
    blobs/sha256/<hex>                  blobs
    erofsgen/references/<quoted name>   object stores: a reference each, the manifest's descriptor as JSON
    erofsgen/layers/<key>               layer records
    erofsgen/locks/<kind>-<random>      object stores: who builds or collects garbage, see :mod:`.locks`
"""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import quote, unquote

from erofsgen.errors import FormatError

INDEX: Final = "index.json"
BLOBS: Final = "blobs/sha256/"
REFERENCES: Final = "erofsgen/references/"
RECORDS: Final = "erofsgen/layers/"
LOCKS: Final = "erofsgen/locks/"

_DIGEST: Final = re.compile(r"sha256:([0-9a-f]{64})")


def blob(digest: str) -> str:
    """The key of a blob. Raises FormatError for what is no sha256 digest."""
    match = _DIGEST.fullmatch(digest)
    if not match:
        raise FormatError(f"not a sha256 digest: {digest!r}")
    return BLOBS + match[1]


def reference(name: str) -> str:
    """The key of a reference."""
    return REFERENCES + quote(name, safe="")


def name(key: str) -> str:
    """The name of the reference with this key."""
    return unquote(key.removeprefix(REFERENCES))
