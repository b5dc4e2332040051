"""Garbage collection of a store: whatever no named image reaches is deleted. Profiles stay as long as their image."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Set
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import msgspec

from erofsgen.build.dictionary import Dictionary
from erofsgen.build.record import record_packs
from erofsgen.errors import FormatError, NotFoundError
from erofsgen.progress import SILENT, Progress
from erofsgen.store import profiles
from erofsgen.store.base import Store
from erofsgen.store.image import Image

_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")
"""Files with other names are not ours to delete; `check` tells about them."""

_THREADS: Final = 8
"""Requests at a time: stores are far away."""


class GcResult(msgspec.Struct, frozen=True):
    """What was deleted, or would be in a dry run. ``bytes`` counts the blobs' stored sizes, ``profiles`` the images
    that are gone beside which profiles lay."""

    blobs: int
    bytes: int
    layer_records: int
    kept_blobs: int
    kept_bytes: int
    dry_run: bool
    profiles: int = 0


def collect(store: Store, *, dry_run: bool = False, wait: float = 0.0, progress: Progress = SILENT) -> GcResult:
    """Delete blobs that no reference reaches, layer records that need a deleted pack, and dictionary entries of both.

    Builds that run are waited for, ``wait`` seconds at most. Raises BusyError (they go on), and FormatError or
    IntegrityError for an image whose manifest cannot be read:
    then nothing is deleted, because what that image needs is unknown.
    """
    with (
        store.collecting(wait=wait),
        progress.task("collecting garbage"),
        ThreadPoolExecutor(_THREADS, "gc") as pool,
    ):
        reached = _reached(store, pool)
        blobs = {digest: size for digest, size in store.blobs() if _DIGEST.fullmatch(digest)}
        lonely = _profiles(store, pool, reached, blobs.keys())
        garbage = blobs.keys() - reached
        records = list(store.records())
        found = pool.map(lambda key: _stale(store, key, garbage), records)
        stale = [key for key, is_stale in zip(records, found, strict=True) if is_stale]
        if not dry_run:
            deque(pool.map(lambda image: profiles.forget(store, image), lonely), 0)
            # first: a record that outlived its packs would be found useless later, one by one
            deque(pool.map(store.delete_record, stale), 0)
            deque(pool.map(store.delete, garbage), 0)
            dictionary = Dictionary(store.dictionary, store, blobs.keys() - garbage)
            try:
                dictionary.prune()
            finally:
                dictionary.close()
        freed = sum(blobs[digest] for digest in garbage)
        return GcResult(
            blobs=len(garbage),
            bytes=freed,
            layer_records=len(stale),
            kept_blobs=len(blobs) - len(garbage),
            kept_bytes=sum(blobs.values()) - freed,
            dry_run=dry_run,
            profiles=len(lonely),
        )


def _reached(store: Store, pool: ThreadPoolExecutor) -> set[str]:
    reached = set()
    for image in pool.map(lambda item: Image(store, *item), store.references().items()):
        reached.add(image.digest)
        reached.add(image.manifest.config.digest)
        reached.update(layer.digest for layer in image.manifest.layers)
    return reached


def _profiles(store: Store, pool: ThreadPoolExecutor, reached: set[str], blobs: Set[str]) -> list[str]:
    """Adds to ``reached`` what lies beside the images in it; beside which others something lies. That goes with them,
    and what is damaged or lacks one of the store's ``blobs`` goes, too: it is a hint."""
    profiled = sorted(store.profiled())
    lonely = [image for image in profiled if image not in reached]
    staying = [image for image in profiled if image in reached]

    def beside(image: str) -> set[str] | None:
        try:
            found = profiles.find(store, image)
            return set(profiles.blobs(found)) if found else set()
        except (FormatError, NotFoundError):
            return None

    for image, found in zip(staying, pool.map(beside, staying), strict=True):
        if found is None or not found <= blobs:
            lonely.append(image)
        else:
            reached |= found
    return lonely


def _stale(store: Store, key: str, gone: Set[str]) -> bool:
    packs = record_packs(store, key)
    return packs is None or any(pack.digest in gone for pack in packs)
