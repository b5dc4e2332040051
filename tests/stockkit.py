"""An image's index and devices as tools of others make and take them."""

from __future__ import annotations

import subprocess
from pathlib import Path

from erofsgen.store.directory import DirectoryStore
from erofsgen.store.image import Image


def devices_by_zstd(store: DirectoryStore, image: Image, directory: Path) -> list[Path]:
    """Every pack as a device file: zstd packs through stock zstd, raw ones as they are."""
    paths = []
    for pack in image.packs:
        path = directory / pack.hex
        with path.open("wb") as out:
            if pack.raw:
                out.write(store.blob_path(pack.digest).read_bytes())
                out.truncate(pack.device_size)
            else:
                subprocess.run(["zstd", "-dcq", store.blob_path(pack.digest)], stdout=out, check=True)
        assert path.stat().st_size == pack.device_size
        paths.append(path)
    return paths


def index_by_zstd(store: DirectoryStore, image: Image, directory: Path) -> Path:
    """The index, by stock zstd."""
    path = directory / "index.erofs"
    with path.open("wb") as out:
        subprocess.run(["zstd", "-dcq", store.blob_path(image.index_descriptor.digest)], stdout=out, check=True)
    return path
