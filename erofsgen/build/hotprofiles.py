"""Profiles and hot packs: which profiles decide, what they touch, and where their rows are afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from erofsgen.build.hotset import Touched
from erofsgen.build.imagechunks import UNKNOWN, ImageChunks, Integers
from erofsgen.errors import NotFoundError
from erofsgen.pack.format import CHUNK
from erofsgen.profile import exchange
from erofsgen.profile.profile import MAGIC, ROW, Profile, decode, merge, ordered


def read(data: bytes, what: str) -> list[Profile]:
    """The profiles in a file: an encoded one, or what ``erofsgen profile export`` wrote. Raises FormatError."""
    return [decode(data, what)] if data.startswith(MAGIC) else exchange.parse(data, what)


def select(
    known: Iterable[Profile], given: Sequence[Profile], commands: Sequence[str]
) -> tuple[list[Profile], list[Profile]]:
    """The profiles that decide what is hot, and the others of the image, which go along.

    Those that decide are ``given`` or, without such, the recorded ones of ``known``; where ``commands`` are named, only
    theirs, and guessed ones, too. Raises NotFoundError (one of ``commands`` has none).
    """
    known = by_command(known)
    candidates = by_command(given) if given else known
    there = {profile.command for profile in candidates}
    for command in commands:
        if command not in there:
            raise NotFoundError(f"no profile of {command!r}", hint="`erofsgen profile ls` lists them")
    if commands:
        deciding = [profile for profile in candidates if profile.command in commands]
    else:
        deciding = [profile for profile in candidates if given or profile.recorded]
    decided = {profile.command for profile in deciding}
    return deciding, [profile for profile in known if profile.command not in decided]


def by_command(profiles: Iterable[Profile]) -> list[Profile]:
    """One profile of each command, in the order of their names."""
    commands: dict[str, list[Profile]] = {}
    for profile in profiles:
        commands.setdefault(profile.command, []).append(profile)
    merged = (merge(commands[command]) for command in sorted(commands))
    return [profile for profile in merged if profile is not None]


def touched(profile: Profile, numbers: Integers, chunks: ImageChunks, threshold: float) -> Touched:
    """What a profile's command touches of an image. ``numbers``: by row, the chunks' numbers there. Chunks of which the
    profile is less sure than ``threshold`` are left out."""
    known = numbers != UNKNOWN
    keys, rows = _unique(chunks.same[numbers[known]], profile.rows[known])
    sure = replace(profile, rows=rows).confidence() >= threshold
    return Touched(keys[sure], rows["first"][sure].astype(np.float64))


def _unique(keys: Integers, rows: npt.NDArray[np.void]) -> tuple[Integers, npt.NDArray[np.void]]:
    """The first row of each key, in the order of rows, and its key; each seen as often as any of its key's."""
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    seen = np.zeros(len(first), np.float32)
    np.maximum.at(seen, inverse, rows["seen"])
    joined = rows[first]
    joined["seen"] = seen
    order = np.argsort(first)
    return keys[first][order], joined[order]


def moved(
    profile: Profile,
    chunks: ImageChunks,
    places: npt.NDArray[np.void],
    digests: npt.NDArray[np.void],
    packs: Sequence[str],
    hot: str | None,
) -> Profile:
    """A profile with its rows at new places; rows that name no chunk of the image are dropped.

    ``places`` and ``digests`` are by number of chunk, the former with device slots that count ``packs``, SHA-256 in
    hex, of which ``hot`` is the hot pack. A digest that is known goes into the row.
    """
    numbers = chunks.numbers(profile)
    known = numbers != UNKNOWN
    numbers, rows = numbers[known], profile.rows[known]
    places = places[numbers]
    rows["length"] = chunks.lengths[numbers]
    prefixes = np.frombuffer(digests[numbers].tobytes(), ROW["digest"])[:: CHUNK["digest"].itemsize // 8]
    is_known = prefixes != np.zeros(1, prefixes.dtype)
    rows["digest"][is_known] = prefixes[is_known]
    used = {packs[slot - 1] for slot in np.unique(places["device"]).tolist()}
    # the hot pack's rows come first among those of one moment: so the order stays what it was
    order = [pack for pack in dict.fromkeys([hot, *profile.packs, *packs]) if pack is not None and pack in used]
    renumbered = np.zeros(len(packs) + 1, np.uint16)
    renumbered[[packs.index(pack) + 1 for pack in order]] = np.arange(len(order))
    rows["pack"] = renumbered[places["device"]]
    rows["block"] = places["block"]
    keys = places["device"].astype(np.int64) << 32 | places["block"]
    return replace(profile, packs=order, rows=ordered(_unique(keys, rows)[1]))
