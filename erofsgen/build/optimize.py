"""Rewrites what starts of an image touch into a *hot pack*, in the order of first touch.

::

    profiles ─► hot set ─► read the chunks, pack by pack ─► spool ─► hot pack ─┐
    index ────► tree, chunks ─────────────────────────────── new places ──────┴─► new index ─► manifest ─► name

So a start reads one range of one pack from its beginning. All else stays in the packs where it was, which the image
shares as before; whatever the hot pack holds, they hold, too. Optimizing an image again begins with what it was
before: chunks that are hot no more go back to their places in the other packs, and the old hot pack is a pack of the
image no more. It stays, as an ordinary pack, only while it has a chunk that no other pack of the image has: once a
pack's chunks were all hot, the image could do without the pack. The same image and profiles give the same bytes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from erofsgen.build.assemble import put_index
from erofsgen.build.cycles import no_cycle_collection
from erofsgen.build.hotpack import LIMIT, write_hot_pack
from erofsgen.build.hotprofiles import by_command, moved, touched
from erofsgen.build.hotset import HotSet, choose, large_files
from erofsgen.build.imagechunks import UNKNOWN, ImageChunks, Integers
from erofsgen.build.options import BuildOptions
from erofsgen.erofs.tree import BLOCK, HOLE, Device
from erofsgen.errors import FormatError, NotFoundError, UsageError
from erofsgen.profile import beside
from erofsgen.profile.profile import Profile
from erofsgen.progress import SILENT, Progress
from erofsgen.store.base import Descriptor, Store
from erofsgen.store.image import Image
from erofsgen.store.manifest import DEVICE_SIZE, HOT, INDEX_SIZE, MANIFEST_TYPE

MAX_BYTES: Final = 256 << 20
"""Device bytes of a hot pack, unless told otherwise: what fits memory on any host and comes in seconds."""

THRESHOLD: Final = 0.5
"""The share of runs from which on a chunk is hot, unless told otherwise: most starts want it."""


class OptimizeResult(msgspec.Struct, frozen=True):
    """What optimizing did. Sizes in bytes, time in seconds.

    ``digest``       of the new manifest
    ``commands``     whose profiles decided
    ``hot_pack``     digest of the hot pack, None where no chunk was hot
    ``hot_chunks``, ``hot_bytes``  what is in it; ``shared_bytes`` of it all commands touch
    ``stored_bytes``  the hot pack as it lies in the store
    ``whole_files``, ``whole_bytes``  large files that are read whole and stay where they are
    ``skipped_bytes``  hot, but beyond the limit
    ``unknown_rows``  of the profiles, that name no chunk of the image
    ``profiles``     that lie beside the new image, with rows at the chunks' new places
    ``packs``        devices of the image, the hot pack among them
    ``reused_packs``  those that are the very packs the image had
    """

    name: str
    digest: str
    commands: list[str]
    hot_pack: str | None
    hot_chunks: int
    hot_bytes: int
    shared_bytes: int
    stored_bytes: int
    whole_files: int
    whole_bytes: int
    skipped_bytes: int
    unknown_rows: int
    profiles: int
    packs: int
    reused_packs: int
    seconds: float


class Optimized(NamedTuple):
    """``moved``: the profiles that lie beside the new image now, those that decided first."""

    result: OptimizeResult
    manifest: Descriptor
    moved: list[Profile]


def optimize(
    image: Image,
    profiles: Sequence[Profile],
    *,
    others: Sequence[Profile] = (),
    name: str | None = None,
    options: BuildOptions | None = None,
    max_bytes: int = MAX_BYTES,
    threshold: float = THRESHOLD,
    progress: Progress = SILENT,
) -> Optimized:
    """Write the hot pack of ``profiles`` and an image with it, and name that ``name`` (``image``'s name by default).

    ``others`` are profiles of the image, of other commands, that do not decide. They and those that do are laid beside
    the new image, with rows at the chunks' new places. ``options`` say how the hot pack is
    compressed, no more. ``max_bytes`` of its device are not exceeded, what is touched last is left out. Chunks of which
    profiles are less sure than ``threshold`` are not hot.

    Raises NotFoundError (no profiles, or such that name no chunk of the image), UsageError (limits out of range),
    IntegrityError and FormatError (the image is damaged), UnsupportedError, StorageError, RemoteError. The store's
    references are unchanged then, unless it was the profiles that could not be laid beside the image.
    """
    started = time.monotonic()
    options = options or BuildOptions()
    if not BLOCK <= max_bytes <= LIMIT:
        raise UsageError(f"a hot pack of at most {max_bytes} bytes", hint=f"{BLOCK} bytes to 2 GiB are possible")
    if not 0 <= threshold <= 1:
        raise UsageError(f"a threshold of {threshold:.0%} is not one from 0 to 100 %")
    if not profiles:
        raise NotFoundError(f"{image.name}: no profile", hint="run `erofsgen profile record` first")
    name = name or image.name
    store = image.store
    store.check_name(name)
    deciding = by_command(profiles)
    with store.building(), no_cycle_collection():
        with progress.task("tables"):
            chunks = ImageChunks(image)
        found = [chunks.numbers(profile) for profile in deciding]
        unknown = sum(int((numbers == UNKNOWN).sum()) for numbers in found)
        if unknown == sum(map(len, found)):
            hint = "run `erofsgen profile record` again"
            raise NotFoundError(f"{image.name}: its profiles name no chunk of it", hint=hint)
        touches = [touched(*pair, chunks, threshold) for pair in zip(deciding, found, strict=True)]
        hot = choose(touches, chunks.lengths, large_files(chunks.tree.root, chunks.same), max_bytes)
        laid = _lay(image, chunks, hot, options, progress)
        manifest = _write_image(image, chunks, laid, options, progress)
        packs = [_hex(pack) for pack in laid.packs.values()]
        hot_pack = _hex(laid.hot) if laid.hot else None
        profiles = [
            moved(profile, chunks, laid.places, laid.digests, packs, hot_pack) for profile in [*deciding, *others]
        ]
        store.tag(name, manifest)
        _lay_beside(store, manifest, profiles)
    old = {pack.digest for pack in image.packs}
    return Optimized(
        OptimizeResult(
            name=name,
            digest=manifest.digest,
            commands=[profile.command for profile in deciding],
            hot_pack=laid.hot.digest if laid.hot else None,
            hot_chunks=len(hot.order),
            hot_bytes=int(chunks.lengths[hot.order].sum()),
            shared_bytes=int(chunks.lengths[hot.order[: hot.shared]].sum()),
            stored_bytes=laid.hot.size if laid.hot else 0,
            whole_files=hot.whole,
            whole_bytes=hot.whole_bytes,
            skipped_bytes=hot.skipped_bytes,
            unknown_rows=unknown,
            profiles=len(profiles),
            packs=len(laid.packs),
            reused_packs=len(old & laid.packs.keys()),
            seconds=time.monotonic() - started,
        ),
        manifest,
        profiles,
    )


# --- from chunks to an image -----------------------------------------------------------------------------------------


@dataclass
class _Laid:
    """Where chunks are going to lie. ``packs`` are descriptors by digest in the order of device slots, ``hot`` the hot
    pack's, None where there is none; ``places`` and ``digests`` are by number of chunk."""

    packs: dict[str, Descriptor]
    hot: Descriptor | None
    places: npt.NDArray[np.void]
    digests: npt.NDArray[np.void]


def _lay(image: Image, chunks: ImageChunks, hot: HotSet, options: BuildOptions, progress: Progress) -> _Laid:
    """Write the hot pack, and find a place for every chunk."""
    leads = np.zeros(len(chunks), np.bool_)
    leads[hot.order] = True
    moves = leads[chunks.same]
    stays = ~moves
    stays[HOLE] = False
    back = stays & ((chunks.home_device != chunks.device) | (chunks.home_block != chunks.block))
    _check(chunks, np.flatnonzero(moves & ~leads | back), progress)
    _check(chunks, np.flatnonzero(back), progress, home=True)

    laid = _Laid({}, None, chunks.tree.places.copy(), chunks.digests.copy())
    slots = np.zeros(len(image.packs) + 1, np.uint16)
    for slot in np.unique(chunks.home_device[stays]).tolist():
        pack = image.manifest.layers[slot]
        annotations = {key: value for key, value in pack.annotations.items() if key != HOT}
        laid.packs[pack.digest] = msgspec.structs.replace(pack, annotations=annotations)
        slots[slot] = len(laid.packs)
    laid.places["device"] = slots[chunks.home_device]
    laid.places["block"] = chunks.home_block
    if len(hot.order):
        new = write_hot_pack(image.store, chunks, hot.order, options, progress)
        blocks = new.chunks["block"]
        first = int(blocks[hot.shared]) * BLOCK if hot.shared < len(blocks) else new.descriptor.annotations[DEVICE_SIZE]
        annotations = {**new.descriptor.annotations, HOT: str(first)}
        laid.hot = laid.packs[new.descriptor.digest] = msgspec.structs.replace(new.descriptor, annotations=annotations)
        places = np.zeros(len(chunks), np.uint32)
        places[hot.order] = blocks
        laid.places["device"][moves] = list(laid.packs).index(laid.hot.digest) + 1
        laid.places["block"][moves] = places[chunks.same[moves]]
        laid.digests[hot.order] = new.chunks["digest"]
        laid.digests[moves] = laid.digests[chunks.same[moves]]
    return laid


def _check(chunks: ImageChunks, numbers: Integers, progress: Progress, *, home: bool = False) -> None:
    """Read chunks only to see that they are what their packs' dictionaries say."""
    if len(numbers):
        with progress.task("check chunks", int(chunks.lengths[numbers].sum())) as task:
            chunks.read(numbers, lambda *_: None, task, home=home)


def _write_image(
    image: Image, chunks: ImageChunks, laid: _Laid, options: BuildOptions, progress: Progress
) -> Descriptor:
    """Store index and manifest; returns the manifest's descriptor, not yet named."""
    devices = [Device(_hex(pack), int(pack.annotations[DEVICE_SIZE]) // BLOCK) for pack in laid.packs.values()]
    with progress.task("index"):
        annotations = {key: value for key, value in image.index_descriptor.annotations.items() if key != INDEX_SIZE}
        index = put_index(image.store, chunks.tree.write(laid.places, devices), options, annotations)
    manifest = msgspec.structs.replace(image.manifest, layers=[index, *laid.packs.values()])
    digest, size = image.store.put(msgspec.json.encode(manifest))
    return Descriptor(MANIFEST_TYPE, digest, size, artifact_type=manifest.artifact_type)


def _lay_beside(store: Store, manifest: Descriptor, profiles: Sequence[Profile]) -> None:
    """The profiles, beside the image; those of other commands stay, if the same image was there before."""
    commands = {profile.command for profile in profiles}
    there: list[Profile] = []
    with suppress(FormatError, NotFoundError):
        there = beside.load(store, manifest.digest)
    beside.write(store, manifest, [*profiles, *(profile for profile in there if profile.command not in commands)])


def _hex(pack: Descriptor) -> str:
    return pack.digest.removeprefix("sha256:")
