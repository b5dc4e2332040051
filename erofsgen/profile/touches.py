"""What a trace's touches were about: which files and chunks, whether prefetch had brought them, and sums of it all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from erofsgen.profile.chunks import BLOCK, Chunks
from erofsgen.profile.trace import HERE, Trace

PART: Final = np.dtype([
    ("touch", "<u4"), ("file", "<u4"), ("chunk", "<i8"), ("length", "<i8"), ("waited", "<u4"),
])  # fmt: skip
"""What a touch has of a chunk: number of the touch, of the file, of the chunk (-1: of none that is known), bytes. The
touch's wait, in microseconds, is that of the part with the most bytes; others came along and have 0."""

_OFFSET_BITS: Final = 47
"""Of a key that orders places: packs are smaller by far."""


class Source(msgspec.Struct, frozen=True):
    """What came from one source: ``misses`` of its ``touches`` had to wait, ``waited`` seconds all together."""

    name: str
    touches: int
    misses: int
    bytes: int
    waited: float


class Reason(msgspec.Struct, frozen=True):
    """What was prefetched for one reason; how much of it was touched, and was not, as far as that is known."""

    name: str
    frames: int
    bytes: int
    used_frames: int
    used_bytes: int
    unused_bytes: int


class Totals(msgspec.Struct, frozen=True):
    """A run in numbers. ``misses``: touches whose reader waited; ``waited``: seconds, of all readers together;
    ``touched``, ``missed``, ``prefetched`` and ``unused``, what was prefetched and not touched, in bytes.
    ``prefetched_touches`` found what prefetch had brought, or was just bringing."""

    touches: int
    misses: int
    waited: float
    touched: int
    missed: int
    prefetched_touches: int
    prefetched: int
    unused: int
    sources: list[Source]
    reasons: list[Reason]


def names(packs: Sequence[str], chunks: Chunks | None) -> list[bytes]:
    """What files are called by their numbers: those of ``chunks``, then one for each pack, for what is no file's."""
    return [*(chunks.paths if chunks else ()), *(b"pack " + pack[:12].encode() for pack in packs)]


def parts(trace: Trace, chunks: Chunks | None) -> npt.NDArray[np.void]:
    """An array of :data:`PART` in the order of touches. A touch of nothing that ``chunks`` knows is its pack's."""
    touches = trace.touches
    devices = np.zeros(len(touches), np.int64)
    known = len(chunks.paths) if chunks else 0
    if chunks and len(touches):
        devices = chunks.slots(trace.packs)[touches["pack"]]
        found, of = chunks.touched_many(devices, touches["offset"], touches["length"])
        chunk = chunks.table[found]
        begin = chunk["block"].astype(np.int64) * BLOCK
        # nothing of a device lies beyond 2^44 bytes
        start = np.minimum(touches["offset"][of], 1 << _OFFSET_BITS).astype(np.int64)
        end = np.minimum(start + touches["length"][of], begin + chunk["length"])
        result = np.zeros(len(found), PART)
        result["touch"], result["file"], result["chunk"] = of, chunk["file"], found
        result["length"] = end - np.maximum(start, begin)
        result = result[result["length"] > 0]
    else:
        result = np.zeros(0, PART)
    others = np.setdiff1d(np.arange(len(touches)), result["touch"])
    rest = np.zeros(len(others), PART)
    rest["touch"], rest["file"] = others, known + touches["pack"][others].astype(np.int64)
    rest["chunk"], rest["length"] = -1, touches["length"][others]
    result = np.concatenate((result, rest))
    result = result[np.argsort(result["touch"], kind="stable")]
    _give_waits(result, touches["waited"])
    return result


def by_file(found: npt.NDArray[np.void]) -> npt.NDArray[np.void]:
    """:func:`parts` with one for each file that a touch touched; ``chunk`` is the first of them."""
    if not len(found):
        return found
    found = found[np.lexsort((found["chunk"], found["file"], found["touch"]))]
    touch, file = found["touch"], found["file"]
    starts = np.flatnonzero(np.concatenate(([True], (touch[1:] != touch[:-1]) | (file[1:] != file[:-1]))))
    result = found[starts]
    for field in ("length", "waited"):
        result[field] = np.add.reduceat(found[field], starts)
    return result


def _give_waits(result: npt.NDArray[np.void], waited: npt.NDArray[np.uint32]) -> None:
    order = np.lexsort((np.arange(len(result)), -result["length"], result["touch"]))
    touch = result["touch"][order]
    most = order[np.concatenate(([True], touch[1:] != touch[:-1]))] if len(order) else order
    result["waited"][most] = waited[result["touch"][most]]


def prefetched(trace: Trace) -> npt.NDArray[np.bool_]:
    """For each touch whether prefetch had brought the frame it begins in, or did while the reader waited."""
    touches, brought = trace.touches, trace.brought
    if not len(brought) or not len(touches):
        return np.zeros(len(touches), np.bool_)
    keys = _places(brought)
    order = np.lexsort((brought["at"], keys))
    # of a frame that came twice, the first time counts
    first = order[np.unique(keys[order], return_index=True)[1]]
    wanted = _places(touches)
    near = first[np.maximum(np.searchsorted(keys[first], wanted, side="right") - 1, 0)]
    inside = (keys[near] <= wanted) & (wanted < keys[near] + brought["length"][near])
    seen = touches["at"].astype(np.float64) + touches["waited"] / 1000 + 1  # arrivals are in whole milliseconds
    here = np.array([source == HERE for source in trace.sources], np.bool_)[touches["source"]]
    return np.asarray(inside & (brought["at"][near] <= seen) & ~here)


def origins(trace: Trace) -> tuple[npt.NDArray[np.int64], list[tuple[str, bool]]]:
    """Where bytes came from: for each touch the number of a (source, whether it was prefetched), and those."""
    pairs = trace.touches["source"].astype(np.int64) * 2 + prefetched(trace)
    used, numbers = np.unique(pairs, return_inverse=True)
    return numbers, [(trace.sources[pair // 2], bool(pair % 2)) for pair in used.tolist()]


def origin_name(source: str, was_prefetched: bool) -> str:
    """One of :func:`origins` in words."""
    return f"prefetched from {source}" if was_prefetched else source


def _places(rows: npt.NDArray[np.void]) -> npt.NDArray[np.int64]:
    offset = np.minimum(rows["offset"], (1 << _OFFSET_BITS) - 1).astype(np.int64)
    return np.asarray(rows["pack"].astype(np.int64) << _OFFSET_BITS | offset)


def totals(trace: Trace) -> Totals:
    """The trace in numbers."""
    touches, brought = trace.touches, trace.brought
    waits = touches["waited"] > 0
    return Totals(
        touches=len(touches),
        misses=int(waits.sum()),
        waited=_seconds(touches),
        touched=_bytes(touches),
        missed=_bytes(touches[waits]),
        prefetched_touches=int(prefetched(trace).sum()),
        prefetched=_bytes(brought),
        unused=_bytes(brought[_unused(brought)]),
        sources=[
            Source(name, len(rows), int((rows["waited"] > 0).sum()), _bytes(rows), _seconds(rows))
            for name, rows in _by(trace.sources, touches, "source")
        ],
        reasons=[
            Reason(
                name,
                len(rows),
                _bytes(rows),
                int(rows["used"].sum()),
                _bytes(rows[rows["used"]]),
                _bytes(rows[_unused(rows)]),
            )
            for name, rows in _by(trace.reasons, brought, "reason")
        ],
    )


def _unused(brought: npt.NDArray[np.void]) -> npt.NDArray[np.bool_]:
    """Which frames nobody touched, as far as that could be seen."""
    return np.asarray(brought["judged"] & ~brought["used"])


def _by(words: Sequence[str], rows: npt.NDArray[np.void], field: str) -> list[tuple[str, npt.NDArray[np.void]]]:
    """The rows of each word that has any."""
    chosen = [(word, rows[rows[field] == number]) for number, word in enumerate(words)]
    return [(word, some) for word, some in chosen if len(some)]


def _bytes(rows: npt.NDArray[np.void]) -> int:
    return int(rows["length"].sum(dtype=np.int64))


def _seconds(touches: npt.NDArray[np.void]) -> float:
    return int(touches["waited"].sum(dtype=np.int64)) / 1_000_000
