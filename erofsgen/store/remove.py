"""Images out of a store: their names, and what lay beside those that have no name left."""

from __future__ import annotations

from collections.abc import Sequence

from erofsgen.oci.reference import known_name
from erofsgen.store import profiles
from erofsgen.store.base import Store
from erofsgen.store.inspect import tags


def remove(store: Store, images: Sequence[str]) -> list[str]:
    """Drop the names ``images``, or all that mean one of these digests; the names that went.

    Blobs stay until garbage is collected. Raises NotFoundError (no such image: nothing has changed), UnsupportedError,
    RemoteError, StorageError.
    """
    references = store.references()
    names = list(
        dict.fromkeys(tag for image in images for tag in tags(store, known_name(image, references), references))
    )
    for name in names:
        store.untag(name)
    left = {manifest.digest for name, manifest in references.items() if name not in names}
    for digest in dict.fromkeys(references[name].digest for name in names):
        if digest not in left:
            profiles.forget(store, digest)
    return names
