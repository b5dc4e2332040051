"""What was learnt of an image's earlier builds, for the new one.

A profile is a hint: whatever goes wrong here is logged, and the build goes on without.
"""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Final

from erofsgen.errors import ErofsgenError, FormatError, NotFoundError
from erofsgen.profile import beside
from erofsgen.profile.carry import Places, carry
from erofsgen.store import profiles as kept
from erofsgen.store.base import Descriptor, Store
from erofsgen.store.image import Image

_LOOKED_AT: Final = 16
"""Images whose age is asked at most: those that were listed last."""

_THREADS: Final = 8

_logger: Final = logging.getLogger(__name__)


def earlier(store: Store, name: str) -> Descriptor | None:
    """The image whose profiles the next one called ``name`` gets: what ``name`` means until then, or else the newest of
    the same repository, as the images' configs say. None where no run was recorded of any of them."""
    try:
        profiled = store.profiled()
        if not profiled:
            return None
        meant = store.reference(name)
        if meant is not None and meant.digest in profiled and _recorded(store, meant):
            return meant
        repository = store.repository(name)
        found = {
            manifest.digest: (other, manifest)
            for other, manifest in store.references().items()
            if manifest.digest in profiled and store.repository(other) == repository
        }
        latest = list(found.values())[: -_LOOKED_AT - 1 : -1]
        with ThreadPoolExecutor(_THREADS, "earlier") as pool:
            recorded = pool.map(lambda item: _recorded(store, item[1]), latest)
            latest = [item for item, is_recorded in zip(latest, recorded, strict=True) if is_recorded]
            if len(latest) < 2:
                return latest[0][1] if latest else None
            ages = list(pool.map(lambda item: _created(store, *item), latest))
        return latest[ages.index(max(ages))][1]
    except ErofsgenError as error:
        _logger.warning("%s: no profiles are taken over from earlier builds: %s", name, error)
        return None


def inherit(store: Store, before: Descriptor | None, image: Descriptor, places: Places) -> int:
    """Lay the recorded profiles of ``before`` beside ``image``, whose chunks are at ``places``; returns how many.

    What lies there already stays: the same image was built before, and its own runs say more. Within
    :meth:`Store.building`, after the image has its name.
    """
    if before is None or before.digest == image.digest:
        return 0
    try:
        own = beside.load(store, image.digest)
        known = {profile.command for profile in own}
        carried = [
            carry(profile, places)
            for profile in beside.load(store, before.digest)
            if profile.recorded and profile.command not in known
        ]
        carried = [profile for profile in carried if len(profile.rows)]
        if carried:
            beside.write(store, image, [*own, *carried])
        return len(carried)
    except ErofsgenError as error:
        _logger.warning("%s: no profiles are taken over from %s: %s", image.digest, before.digest, error)
        return 0


def _recorded(store: Store, manifest: Descriptor) -> bool:
    """Whether any profile beside an image is more than a guess."""
    try:
        found = kept.find(store, manifest.digest)
    except (FormatError, NotFoundError):  # damaged
        return False
    return found is not None and any(kept.runs_of(layer) for layer in found.layers)


def _created(store: Store, name: str, manifest: Descriptor) -> float:
    """When an image was made, in seconds since 1970, 0 where it does not say so."""
    try:
        moment = datetime.fromisoformat(str(Image(store, name, manifest).config.get("created", "")))
    except (FormatError, NotFoundError, ValueError):
        return 0.0
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
