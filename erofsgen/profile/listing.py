"""A profile as a list: what is touched in which order, why it is thought so, and what the last run met there."""

from __future__ import annotations

from collections import Counter

import msgspec
import numpy as np
import numpy.typing as npt

from erofsgen.profile.chunks import BLOCK, Chunks
from erofsgen.profile.profile import Profile
from erofsgen.profile.touches import names, origin_name, origins, parts
from erofsgen.profile.trace import Trace
from erofsgen.profile.waterfall import chunks_of, files_of


class Met(msgspec.Struct, frozen=True):
    """What the last run met: seconds that readers ``waited``, and the ``sources`` of the bytes."""

    waited: float
    sources: list[str]


class ChunkLine(msgspec.Struct, frozen=True):
    """A chunk. ``first``: milliseconds from the mount to its first touch; ``offset``: of the file, None where it is no
    chunk of the image; ``pack`` (SHA-256 in hex) and ``device_offset``: where it lies; ``confidence``: share of runs.
    ``last``: None where the last run did not touch it."""

    order: int
    first: int
    path: bytes
    offset: int | None
    length: int
    pack: str
    device_offset: int
    confidence: float
    reason: str
    last: Met | None


class FileLine(msgspec.Struct, frozen=True):
    """A file, in the order of its first chunk. ``size`` is the file's, None where it is not known; ``bytes`` are those
    of its ``chunks`` in the profile. ``confidence`` is their mean, by bytes."""

    order: int
    first: int
    path: bytes
    size: int | None
    chunks: int
    bytes: int
    confidence: float
    reasons: list[str]
    last: Met | None


def chunk_lines(profile: Profile, chunks: Chunks | None, trace: Trace | None) -> list[ChunkLine]:
    """Each chunk of a profile, in the order of first touch."""
    paths, files = names(profile.packs, chunks), files_of(profile, chunks).tolist()
    numbers = chunks_of(profile, chunks).tolist()
    met = _met(chunks, trace)
    sure = profile.confidence().tolist()
    offsets = chunks.table["offset"] if chunks else np.zeros(0, np.int64)
    lines = []
    for order, (pack, block, length, _, first, _, reason) in enumerate(profile.rows.tolist()):
        number = numbers[order]
        lines.append(
            ChunkLine(
                order=order + 1,
                first=first,
                path=paths[files[order]],
                offset=int(offsets[number]) if number >= 0 else None,
                length=length,
                pack=profile.packs[pack],
                device_offset=block * BLOCK,
                confidence=sure[order],
                reason=profile.reasons[reason],
                last=met.get(number),
            )
        )
    return lines


def file_lines(profile: Profile, chunks: Chunks | None, trace: Trace | None) -> list[FileLine]:
    """Each file of a profile, in the order of its first chunk."""
    rows = profile.rows
    if not len(rows):
        return []
    paths, sure = names(profile.packs, chunks), profile.confidence()
    met = _met(chunks, trace)
    numbers = chunks_of(profile, chunks)
    there, first, of = np.unique(files_of(profile, chunks), return_index=True, return_inverse=True)
    order = np.argsort(of, kind="stable")
    ends = np.cumsum(np.bincount(of))
    lines = []
    for place, file in enumerate(np.argsort(first, kind="stable").tolist()):
        mine = order[ends[file - 1] if file else 0 : ends[file]]
        lengths = rows["length"][mine].astype(np.int64)
        number = int(there[file])
        lines.append(
            FileLine(
                order=place + 1,
                first=int(rows["first"][first[file]]),
                path=paths[number],
                size=chunks.sizes[number] if chunks and number < len(chunks.sizes) else None,
                chunks=len(mine),
                bytes=int(lengths.sum()),
                confidence=float((sure[mine] * lengths).sum() / lengths.sum()),
                reasons=_reasons(profile, rows["reason"][mine]),
                last=_together([met[chunk] for chunk in numbers[mine].tolist() if chunk in met]),
            )
        )
    return lines


def _reasons(profile: Profile, numbers: npt.NDArray[np.uint8]) -> list[str]:
    """The reasons, the one of most chunks first."""
    return [profile.reasons[number] for number, _ in Counter(numbers.tolist()).most_common()]


def _met(chunks: Chunks | None, trace: Trace | None) -> dict[int, Met]:
    """What the run met, by the number of the chunk."""
    if chunks is None or trace is None:
        return {}
    found: dict[int, Met] = {}
    numbers, kinds = origins(trace)
    words = [origin_name(*kind) for kind in kinds]
    for touch, _, chunk, _, waited in parts(trace, chunks).tolist():
        if chunk >= 0:
            here = Met(waited / 1_000_000, [words[numbers[touch]]])
            known = found.get(chunk)
            found[chunk] = here if known is None else _joined(known, here)
    return found


def _joined(one: Met, other: Met) -> Met:
    return Met(one.waited + other.waited, list(dict.fromkeys([*one.sources, *other.sources])))


def _together(some: list[Met]) -> Met | None:
    if not some:
        return None
    sources = Counter(source for one in some for source in one.sources)
    return Met(sum(one.waited for one in some), [source for source, _ in sources.most_common()])
