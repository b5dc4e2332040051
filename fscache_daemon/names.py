"""Which image an fsid means."""

from __future__ import annotations

import json
import re
from typing import Final

from erofsgen.errors import NotFoundError, UnsupportedError
from erofsgen.host.cache.files import Layout

_HOLES: Final = "org.erofsgen.index.holes"  # erofsgen.store.manifest, without importing all that it needs
_AT_END: Final = "end"
_DIGEST: Final = re.compile(r"(?:sha256:)?([0-9a-f]{12,64})(?:\.[0-9]+)?")
"""A manifest's, or its beginning, and a number to tell one mount of an image from another: an fsid can be mounted once
in a domain (fs/erofs/fscache.c)."""


def index_named(layout: Layout, fsid: str) -> str:
    """The digest of the manifest of the image that ``fsid`` means, which the cache has.

    The digest, or a name under which the image was pulled, if that means the same in all stores it was pulled from.
    Raises NotFoundError; UnsupportedError for an image that fscache cannot serve.
    """
    found = _DIGEST.fullmatch(fsid)
    there = {path.stem for path in layout.images.glob(f"{found[1]}*.erofs")} if found else _pulled(layout, fsid)
    if len(there) > 1:
        raise NotFoundError(f"{fsid}: several images", hint="use the digest of one as fsid")
    for name in there:
        if _holes_at_end(layout, name):
            return f"sha256:{name}"
        raise UnsupportedError(
            f"{fsid}: over fscache the kernel misreads files with holes before data, which this image may have",
            hint="build it anew, with this version",
        )
    raise NotFoundError(f"{fsid}: no image of the cache {layout.root}", hint="run `erofsgen pull`")


def _holes_at_end(layout: Layout, name: str) -> bool:
    """Whether the manifest says that files have holes at their ends only; see docs/format.md."""
    try:
        manifest = json.loads(layout.image_path(name, "json").read_bytes())
        return bool(manifest["layers"][0]["annotations"][_HOLES] == _AT_END)
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _pulled(layout: Layout, name: str) -> set[str]:
    try:
        stores: dict[str, dict[str, str]] = json.loads((layout.root / "names.json").read_bytes())
    except (OSError, ValueError):
        return set()
    from erofsgen.oci.reference import known_name

    found = {names[known] for names in stores.values() if (known := known_name(name, names)) in names}
    digests = {digest.removeprefix("sha256:") for digest in found}
    return {digest for digest in digests if layout.image_path(digest, "erofs").exists()}
