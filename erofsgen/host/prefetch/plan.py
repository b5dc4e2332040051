"""From a profile to the frames to bring, in the order in which a start will want them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np

from erofsgen.pack.toc import Toc
from erofsgen.profile.profile import Profile

HOT_PACK: Final = "hot pack"
"""The reason of what every command of an optimized image touches."""


class Step(NamedTuple):
    """A frame to bring: of the pack with the SHA-256 ``pack``, for ``reason``; ``size`` in device bytes."""

    pack: str
    frame: int
    size: int
    reason: str


class Run(NamedTuple):
    """Neighbouring frames ``first`` to ``last``, both included, of one pack."""

    pack: str
    first: int
    last: int


def plan(profile: Profile, tocs: Mapping[str, Toc], *, confidence: float) -> list[Step]:
    """The frames of a profile's chunks, each once, in the order of first touch.

    ``tocs``: of the image's packs, by SHA-256. Left out: packs that are none of these, chunks that lie outside of their
    pack, and chunks that fewer than the share ``confidence`` of the runs have touched.
    """
    rows = profile.rows[profile.confidence() >= confidence]
    frames = np.full(len(rows), -1, np.int64)
    for number, pack in enumerate(profile.packs):
        toc = tocs.get(pack)
        if toc is None or not len(toc):
            continue
        of_pack = rows["pack"] == number
        offsets = rows["block"][of_pack].astype(np.int64) << 12
        found = np.searchsorted(toc.device_offsets, offsets, side="right") - 1
        frames[of_pack] = np.where(offsets < toc.device_size, found, -1)
    keys = rows["pack"].astype(np.int64) << 32 | frames
    _, first = np.unique(keys[frames >= 0], return_index=True)
    chosen = np.flatnonzero(frames >= 0)[np.sort(first)]
    return [
        Step(pack, frame, int(tocs[pack].device_sizes[frame]), profile.reasons[reason])
        for pack, frame, reason in zip(
            (profile.packs[number] for number in rows["pack"][chosen].tolist()),
            frames[chosen].tolist(),
            rows["reason"][chosen].tolist(),
            strict=True,
        )
    ]


def plan_hot(pack: str, toc: Toc, size: int) -> list[Step]:
    """The first ``size`` device bytes of a hot pack, for a command that no profile is known of."""
    return [Step(pack, frame, int(toc.device_sizes[frame]), HOT_PACK) for frame in toc.frames(0, size)]


def runs(steps: Sequence[Step]) -> Iterator[Run]:
    """Steps that are neighbours as one, so that they come in one read; the order is that of each one's first step."""
    by_place = sorted(range(len(steps)), key=lambda number: steps[number][:2])
    found: list[tuple[int, Run]] = []
    for number in by_place:
        step = steps[number]
        if found:
            earliest, run = found[-1]
            if run.pack == step.pack and run.last + 1 == step.frame:
                found[-1] = min(earliest, number), run._replace(last=step.frame)
                continue
        found.append((number, Run(step.pack, step.frame, step.frame)))
    for _, run in sorted(found):
        yield run
