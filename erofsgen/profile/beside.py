"""Profiles beside their image in a store; :mod:`erofsgen.store.profiles` says how they lie there.

``load`` asks once where there is nothing, and once more for the manifest and once for each command where there is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Final

from erofsgen.errors import FormatError, NotFoundError
from erofsgen.profile.profile import Profile, decode
from erofsgen.store import profiles as kept
from erofsgen.store.base import Descriptor, Store

_THREADS: Final = 4
_LIMIT: Final = kept.LIMIT
"""Bytes of all profiles' rows: what is small when it is fetched may be large when it is unpacked."""


def load(store: Store, digest: str) -> list[Profile]:
    """The profiles beside the image with the manifest digest ``digest``, the one that was changed last first.

    Raises FormatError and IntegrityError (damaged), NotFoundError (a blob is missing), RemoteError, StorageError.
    """
    found = kept.find(store, digest)
    return [] if found is None else read(store, digest, found)


def read(store: Store, digest: str, found: kept.Beside) -> list[Profile]:
    """As :func:`load`, where it is known already what is there."""
    if len(found.layers) > 1:
        with ThreadPoolExecutor(_THREADS, "profiles") as pool:
            encoded = list(pool.map(lambda layer: kept.read(store, layer), found.layers))
    else:
        encoded = [kept.read(store, layer) for layer in found.layers]
    profiles: list[Profile] = []
    room = _LIMIT
    for layer, data in zip(found.layers, encoded, strict=True):
        profile = decode(data, f"profile {layer.digest}")
        room -= profile.rows.nbytes
        if profile.command != kept.command_of(layer) or room < 0:
            raise FormatError(f"profiles of {digest}: one is of another command, or they are too large")
        profiles.append(profile)
    return profiles


def save(store: Store, image: Descriptor, profiles: Sequence[Profile]) -> None:
    """Let these lie beside the image whose manifest ``image`` describes, instead of what does; none: drop that.

    Of more than 32 the last ones are left out. Raises FormatError (too large), UnsupportedError (a store that cannot be
    written to), RemoteError, StorageError.
    """
    with store.building():
        write(store, image, profiles)


def write(store: Store, image: Descriptor, profiles: Iterable[Profile]) -> None:
    """As :func:`save`, within :meth:`Store.building`."""
    kept.write(store, image, [kept.put(store, profile.command, profile.runs, profile.encode()) for profile in profiles])


def add(store: Store, image: Descriptor, profile: Profile) -> Profile:
    """Merge ``profile`` into the one of its command beside the image; returns what lies there now.

    Raises as :func:`save`. Of two who do so at the same time, the one who reads first may be lost.
    """
    return add_all(store, image, [profile])[0]


def add_all(store: Store, image: Descriptor, profiles: Sequence[Profile]) -> list[Profile]:
    """Merge ``profiles``, each of another command, into those beside the image; returns all that lie there now.

    Those that changed come first. What is damaged there is replaced. Raises as :func:`save`.
    """
    if not profiles:
        return load(store, image.digest)
    there: list[Profile] = []
    with suppress(FormatError, NotFoundError):
        there = load(store, image.digest)
    known = {profile.command: profile for profile in there}
    changed = [merged(known.pop(profile.command, None), profile) for profile in profiles]
    result = [*changed, *known.values()][: kept.COUNT]
    save(store, image, result)
    return result


def merged(older: Profile | None, profile: Profile) -> Profile:
    """Both as one; ``profile`` alone where they cannot be of the same image, since the older one is damaged then."""
    if older is None:
        return profile
    try:
        return older.merged(profile)
    except FormatError:
        return profile
