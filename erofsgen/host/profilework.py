"""What users do with profiles: list, export, import, push and remove those of a host and those beside images."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal

import msgspec

from erofsgen.erofs.reader import Index
from erofsgen.errors import ErofsgenError, FormatError, NotFoundError, RemoteError, UnsupportedError
from erofsgen.host.cache.cache import CachedImage, HostCache
from erofsgen.host.profiles import HostProfiles
from erofsgen.profile import beside, exchange
from erofsgen.profile.carry import carry, places, with_digests
from erofsgen.profile.chunks import Chunks
from erofsgen.profile.profile import Profile
from erofsgen.store import profiles as kept
from erofsgen.store.base import Store
from erofsgen.store.image import Image
from erofsgen.store.open import open_store

Where = Literal["host", "store", "fetched"]


class ProfileFacts(msgspec.Struct, frozen=True):
    """A profile in numbers: of which image and command, how many runs stand behind it, how many chunks and bytes.

    ``where``: recorded on this host, beside the image in the store, or as the store was asked last. ``problem`` says
    why what lies in the store cannot be read; the numbers are 0 then.
    """

    image: str
    names: list[str]
    command: str
    runs: int
    chunks: int
    bytes: int
    where: Where
    problem: str | None = None


def list_all(profiles: HostProfiles, url: str) -> list[ProfileFacts]:
    """What there is of all images, here and in the store ``url`` as far as it can be asked."""
    names: defaultdict[str, list[str]] = defaultdict(list)
    profiled: set[str] = set()
    store: Store | None = None
    try:
        store = open_store(url)
        profiled = store.profiled()
        for name, manifest in sorted(store.references().items()):
            names[manifest.digest].append(name)
    except (RemoteError, NotFoundError, UnsupportedError):
        store = None
    return list(facts(profiles, store, sorted({*profiles.digests(), *profiled}), names))


def list_one(profiles: HostProfiles, image: Image | CachedImage) -> list[ProfileFacts]:
    """What there is of one image, here and in its store unless that could not be asked for it."""
    store = image.store if isinstance(image, Image) else None
    return list(facts(profiles, store, [image.digest], {image.digest: [image.name]}))


def facts(
    profiles: HostProfiles, store: Store | None, digests: Sequence[str], names: Mapping[str, list[str]]
) -> Iterator[ProfileFacts]:
    """What there is of each of these images. ``store``: who is asked, None: nobody; what was fetched is told then."""

    def told(digest: str, where: Where, found: Sequence[Profile]) -> Iterator[ProfileFacts]:
        for one in found:
            called = list(names.get(digest, ()))
            yield ProfileFacts(digest, called, one.command, one.runs, len(one.rows), one.size, where)

    for digest in digests:
        yield from told(digest, "host", profiles.recorded(digest))
        if store is None:
            yield from told(digest, "fetched", profiles.fetched(digest))
            continue
        try:
            yield from told(digest, "store", beside.load(store, digest))
        except (FormatError, NotFoundError) as error:
            yield ProfileFacts(digest, list(names.get(digest, ())), "", 0, 0, 0, "store", str(error))


def gather(profiles: HostProfiles, image: Image | CachedImage) -> list[Profile]:
    """All that is known of an image: what is recorded here merged with what its store has, or had when asked last."""
    if isinstance(image, CachedImage):
        return profiles.all(image.digest)
    with suppress(ErofsgenError):
        profiles.refresh(image.store, image.digest)
    return [with_digests(image.store, image, profile) for profile in profiles.all(image.digest)]


def export(
    cache: HostCache, profiles: HostProfiles, image: Image | CachedImage, command: str | None = None
) -> dict[str, Any]:
    """An image's profiles, or that of one command, as :mod:`erofsgen.profile.exchange` has them.

    Raises NotFoundError (there is none), and what reading the image raises.
    """
    chosen = [profile for profile in gather(profiles, image) if command in (None, profile.command)]
    if not chosen:
        raise none(image.name, command)
    return exchange.document(image.digest, chosen, _paths(cache, image))


def take_in(
    profiles: HostProfiles, image: Image, data: bytes, what: str, *, to: Literal["host", "store"]
) -> list[Profile]:
    """Merge exported profiles, of this or another build of ``image``, into those beside it or into this host's; returns
    what they are of this image.

    Raises FormatError (``data`` is none), NotFoundError (nothing in them is in the image), the store's errors.
    """
    known = places(image)
    carried = [carry(profile, known) for profile in exchange.parse(data, what)]
    carried = [profile for profile in carried if len(profile.rows)]
    if not carried:
        raise NotFoundError(
            f"{what}: nothing in it is in {image.name}", hint="profiles without digests fit their own image only"
        )
    if to == "host":
        for profile in carried:
            profiles.add(image.digest, profile)
    else:
        there = beside.add_all(image.store, image.descriptor, carried)
        _fetched(profiles, image, there)
    return carried


def push(profiles: HostProfiles, image: Image) -> list[Profile]:
    """Merge what this host has recorded of ``image`` into what lies beside it in its store; what was recorded.

    Digests are filled in, so that the profiles can be carried to other builds. What was recorded counts as fetched
    then. Raises NotFoundError (nothing was), UnsupportedError, RemoteError, StorageError.
    """
    taken = profiles.recorded(image.digest)
    if not taken:
        raise none(image.name, hint="record one with `erofsgen profile record`")
    complete = [with_digests(image.store, image, profile) for profile in taken]
    there = beside.add_all(image.store, image.descriptor, complete)
    profiles.pushed(image.digest, taken, there, manifest=_mark(image))
    return taken


def remove(
    profiles: HostProfiles, image: Image | CachedImage, command: str | None, *, host: bool, store: bool
) -> list[str]:
    """Forget an image's profiles, or that of one command, on this host, in the store, or both; the commands.

    Raises NotFoundError (there is none), UnsupportedError (the store cannot be written to), RemoteError, StorageError.
    """
    gone: list[str] = []
    if store and isinstance(image, Image):
        with suppress(NotFoundError):
            gone += _remove_beside(image, command)
        with suppress(ErofsgenError):
            profiles.refresh(image.store, image.digest)
    if host:
        gone += [one.command for one in profiles.all(image.digest) if command in (None, one.command)]
        profiles.remove(image.digest, command)
    if not gone:
        raise none(image.name, command)
    return list(dict.fromkeys(gone))


def none(name: str, command: str | None = None, *, hint: str = "see `erofsgen profile ls`") -> NotFoundError:
    """There is no profile of an image, or none of the command."""
    return NotFoundError(f"{name}: no profile" + ("" if command is None else f" of {command!r}"), hint=hint)


def _remove_beside(image: Image, command: str | None) -> list[str]:
    found = kept.find(image.store, image.digest)
    if found is None:
        return []
    staying = [layer for layer in found.layers if command not in (None, kept.command_of(layer))]
    if len(staying) < len(found.layers):
        with image.store.building():
            kept.write(image.store, image.descriptor, staying)
    left = {kept.command_of(layer) for layer in staying}
    return [name for name in map(kept.command_of, found.layers) if name not in left]


def _fetched(profiles: HostProfiles, image: Image, there: Sequence[Profile]) -> None:
    """A host that has the image learns what lies beside it now."""
    if image.digest in profiles.digests():
        profiles.keep(image.digest, there, manifest=_mark(image))


def _mark(image: Image) -> str:
    with suppress(ErofsgenError):
        current = image.store.profiles(image.digest)
        return "" if current is None else current.digest
    return ""


def _paths(cache: HostCache, image: Image | CachedImage) -> exchange.Paths | None:
    """By the index that is in the cache, or in the store; None where neither can be read."""
    packs = [pack.hex for pack in image.packs]
    try:
        path = cache.image_path(image.digest, "erofs")
        index = Index(path.read_bytes()) if path.exists() or isinstance(image, CachedImage) else image.index
        return exchange.Paths(Chunks(index), packs)
    except (OSError, ErofsgenError):
        return None
