"""Profiles for tests: any that there can be, and ones of an image's chunks."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
from hypothesis import strategies as st

from erofsgen.profile.chunks import Chunks
from erofsgen.profile.profile import RECORDED, ROW, RUNS, Profile, ordered
from erofsgen.store.image import Image

PACKS = [f"{number:064x}" for number in range(1, 6)]


def profile_of(rows: Sequence[tuple], *, command: str = "app", runs: int = 1, packs: Sequence[str] = PACKS) -> Profile:
    """Rows of (pack, block, length, digest, first, seen)."""
    table = np.zeros(len(rows), ROW)
    for number, (pack, block, length, digest, first, seen) in enumerate(rows):
        table[number] = (pack, block, length, digest, first, seen, 0)
    return Profile(command, runs, list(packs), [RECORDED], ordered(table))


def run_of(image: Image, numbers: Sequence[int] | None = None, *, command: str = "app") -> Profile:
    """One run that touched these chunks of an image in this order, by default all; without digests, as hosts record."""
    table = Chunks(image.index).table
    numbers = range(len(table)) if numbers is None else numbers
    rows = [
        (int(table["device"][number]) - 1, int(table["block"][number]), int(table["length"][number]), bytes(8), at, 1)
        for at, number in enumerate(numbers)
    ]
    return profile_of(rows, command=command, packs=[pack.hex for pack in image.packs])


def facts(profile: Profile) -> dict[tuple[str, int], tuple]:
    """What a profile says of each place, whatever the order of its packs: length, first, seen, digest."""
    return {
        (profile.packs[row["pack"]], int(row["block"])): (
            int(row["length"]), int(row["first"]), float(row["seen"]), row["digest"].tobytes()
        )
        for row in profile.rows
    }  # fmt: skip


def profiles(most: int = RUNS, *, least: int = 1, reasons: int = 1) -> st.SearchStrategy[Profile]:
    """Profiles of the command ``app``, of ``least`` to ``most`` runs: each place once; a place has the same length in
    all of them, and the same digest in all that have any."""

    def make(count: int, seed: int, size: int) -> Profile:
        dice = random.Random(seed)
        packs = dice.sample(PACKS, dice.randint(1, len(PACKS)))
        places = dice.sample([(pack, block) for pack in range(len(packs)) for block in range(20)], min(size, 20))
        table = np.zeros(len(places), ROW)
        for number, (pack, block) in enumerate(places):
            content = int(packs[pack], 16) * 1000 + block
            table[number] = (
                pack,
                block,
                content % 5000 + 1,
                dice.choice([bytes(8), content.to_bytes(8)]),
                dice.choice([0, dice.randrange(1000), 0xFFFFFFFF]),
                dice.choice([0, count, dice.uniform(0, count)]),
                dice.randrange(reasons),
            )
        return Profile("app", count, packs, [RECORDED, "libraries", "imports"][:reasons], ordered(table))

    return st.builds(make, st.integers(least, most), st.integers(0, 1 << 32), st.integers(0, 20))
