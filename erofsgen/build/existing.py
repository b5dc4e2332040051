"""Whether an image has been built already. Looks at manifests and sizes only."""

from __future__ import annotations

from erofsgen.build.options import BuildOptions
from erofsgen.errors import FormatError, NotFoundError
from erofsgen.oci.source import SourceImage
from erofsgen.store.base import Store
from erofsgen.store.image import Image
from erofsgen.store.manifest import OPTIONS


def existing(source: SourceImage, store: Store, name: str, options: BuildOptions) -> str | None:
    """The manifest digest of the image ``name`` that ``source`` was built into with such options, None where it must
    be built: there is none, it was another source, a blob is missing, or the source has no manifest to know it by.

    Raises StorageError, RemoteError.
    """
    if source.subject is None:
        return None
    try:
        found = store.reference(name)
        if found is None:
            return None
        manifest = Image(store, name, found).manifest
    except (FormatError, NotFoundError):
        return None  # damaged, or not ours
    if manifest.subject is None or manifest.subject.digest != source.subject.digest:
        return None
    if manifest.annotations.get(OPTIONS) != options.fingerprint:
        return None
    blobs = [manifest.config, *manifest.layers]
    return found.digest if all(store.size(blob.digest) == blob.size for blob in blobs) else None
