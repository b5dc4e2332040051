"""Which image an fsid means."""

from __future__ import annotations

import json
import re
from typing import Final

from erofsgen.errors import NotFoundError
from erofsgen.host.cache.files import Layout

_DIGEST: Final = re.compile(r"(?:sha256:)?([0-9a-f]{64})(?:\.[0-9]+)?")
"""A manifest's, with a number behind it for one more mount of the same image: an fsid can be mounted once in a domain
(fs/erofs/fscache.c)."""


def index_named(layout: Layout, fsid: str) -> str:
    """The digest of the manifest of the image that ``fsid`` means, which the cache has.

    The digest, or a name under which the image was pulled, if that means the same in all stores it was pulled from.
    Raises NotFoundError.
    """
    found = _DIGEST.fullmatch(fsid)
    digests = {f"sha256:{found[1]}"} if found else _pulled(layout, fsid)
    there = [digest for digest in digests if (layout.images / f"{digest.removeprefix('sha256:')}.erofs").exists()]
    if len(there) > 1:
        raise NotFoundError(f"{fsid}: several images, of several stores", hint="use the digest of one as fsid")
    if not there:
        raise NotFoundError(f"{fsid}: no image of the cache {layout.root}", hint="run `erofsgen pull`")
    return there[0]


def _pulled(layout: Layout, name: str) -> set[str]:
    try:
        stores: dict[str, dict[str, str]] = json.loads((layout.root / "names.json").read_bytes())
    except (OSError, ValueError):
        return set()
    return {names[name] for names in stores.values() if name in names}
