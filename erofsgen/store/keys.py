"""What lies where in a store: the keys that every kind shares, relative to the store's place.

::

    oci-layout                          directories: what makes it an OCI image layout
    index.json                          directories: the references, all in one file
    blobs/sha256/<hex>                  blobs
    erofsgen/references/<quoted name>   object stores: a reference each, the manifest's descriptor as JSON
    erofsgen/layers/<key>               layer records
    erofsgen/locks/<kind>-<random>      object stores: who builds or collects garbage, see :mod:`.locks`

The name ``sha256-<hex>.profile`` is reserved: it means what lies beside the image whose manifest has that digest, see
:mod:`.profiles`. A registry takes it for a tag, as it does cosign's ``sha256-<hex>.sig``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final
from urllib.parse import quote, unquote

from erofsgen.errors import FormatError

INDEX: Final = "index.json"
BLOBS: Final = "blobs/sha256/"
REFERENCES: Final = "erofsgen/references/"
RECORDS: Final = "erofsgen/layers/"
LOCKS: Final = "erofsgen/locks/"

_DIGEST: Final = re.compile(r"sha256:([0-9a-f]{64})")
_PROFILES: Final = re.compile(r"sha256-([0-9a-f]{64})\.profile")


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


def profiles(image: str) -> str:
    """The reserved name of what lies beside the image with this manifest digest. Raises FormatError as :func:`blob`."""
    return f"sha256-{blob(image).removeprefix(BLOBS)}.profile"


def profiled(name: str) -> str | None:
    """The manifest digest of the image beside which the thing called ``name`` lies; None for what is no such name."""
    match = _PROFILES.fullmatch(name)
    return f"sha256:{match[1]}" if match else None


def images(names: Iterable[str]) -> list[str]:
    """Those of ``names`` that are not reserved."""
    return [name for name in names if profiled(name) is None]


def images_profiled(names: Iterable[str]) -> set[str]:
    """The digests of the images that the reserved ones of ``names`` are about."""
    return {image for name in names if (image := profiled(name)) is not None}
