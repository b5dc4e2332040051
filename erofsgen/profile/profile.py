"""A profile: which chunks of an image a command touches, in the order of first touch, and how sure that is.

::

    magic "EGPROF1\\0" │ a zstd frame of the MessagePack array
                        [command, runs, packs, reasons, rows]

``rows`` are of :data:`ROW`, in order of ``first``. A row names a chunk by its place, so that a host needs nothing but
the profile and the packs' tables of contents, and by its digest, so that it finds its place in another build of the
image (:mod:`erofsgen.profile.carry`). All of it is a hint: a wrong row costs bytes, never right data.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Final

import msgspec
import numpy as np
import numpy.typing as npt
import zstandard

from erofsgen.errors import FormatError
from erofsgen.store.profiles import COMMAND_LIMIT

ROW: Final = np.dtype([
    ("pack", "<u2"), ("block", "<u4"), ("length", "<u4"), ("digest", "V8"), ("first", "<u4"), ("seen", "<f4"),
    ("reason", "u1"),
])  # fmt: skip
"""A chunk: number of its pack in :attr:`Profile.packs`, 4 KiB block in that pack's device, length in bytes; the first
8 bytes of its BLAKE3, zeros where they are not known; milliseconds from the mount to its first touch; the runs that
touched it, which older ones count in by parts; number of the reason in :attr:`Profile.reasons`."""

RECORDED: Final = "recorded"
"""The reason of rows that runs have touched; others are names of heuristics."""

RUNS: Final = 16
"""Runs that count: older ones fade, so that a profile follows what a command does today."""

MAGIC: Final = b"EGPROF1\0"
"""What an encoded profile begins with."""

LIMIT: Final = 64 << 20
"""Bytes of an encoded profile, and of its content, at most."""

_HEX: Final = re.compile("[0-9a-f]{64}")
_LEVEL: Final = 9
_FORGOTTEN: Final = 1 / 64
"""A row that fewer runs than this share have touched is dropped."""
_NO_DIGEST: Final = np.zeros(1, "V8")[0]
_PACKS: Final = 0xFFFF
"""Packs of an image at most, EROFS's limit of devices."""
_REASONS: Final = 0xFF
_WORD: Final = 200
"""Characters of a reason at most."""


class _Content(msgspec.Struct, array_like=True):
    command: Annotated[str, msgspec.Meta(max_length=COMMAND_LIMIT)]
    runs: Annotated[int, msgspec.Meta(ge=0, le=RUNS)]
    packs: Annotated[list[str], msgspec.Meta(max_length=_PACKS)]
    reasons: Annotated[list[Annotated[str, msgspec.Meta(max_length=_WORD)]], msgspec.Meta(max_length=_REASONS)]
    rows: bytes


@dataclass(frozen=True)
class Profile:
    """What ``command`` touches. ``runs`` is 0 where nothing was recorded and all is guessed. ``packs`` are SHA-256 in
    hex. ``rows``: an array of :data:`ROW` in order of ``first``."""

    command: str
    runs: int
    packs: Sequence[str]
    reasons: Sequence[str]
    rows: npt.NDArray[np.void]

    @property
    def recorded(self) -> bool:
        """Whether any run stands behind it."""
        return self.runs > 0

    @property
    def size(self) -> int:
        """Bytes of all its chunks."""
        return int(self.rows["length"].sum(dtype=np.int64))

    def confidence(self) -> npt.NDArray[np.float64]:
        """For each row the share of runs that touched it; 1 for guesses."""
        if not self.runs:
            return np.ones(len(self.rows))
        return np.asarray(np.minimum(self.rows["seen"] / self.runs, 1.0))

    def encode(self) -> bytes:
        """The profile's bytes: the same for the same content."""
        content = _Content(self.command, self.runs, list(self.packs), list(self.reasons), self.rows.tobytes())
        return MAGIC + zstandard.ZstdCompressor(_LEVEL).compress(msgspec.msgpack.encode(content))

    def merged(self, other: Profile) -> Profile:
        """This and ``other`` as one, of the same image and command. Runs beyond :data:`RUNS` fade.

        Raises FormatError where they cannot be of the same image: together they name too many packs.
        """
        packs = list(dict.fromkeys([*self.packs, *other.packs]))
        reasons = list(dict.fromkeys([*self.reasons, *other.reasons]))
        if len(packs) > _PACKS or len(reasons) > _REASONS:
            raise FormatError(f"profiles of {self.command!r} name {len(packs)} packs, {len(reasons)} reasons")
        rows = np.concatenate([_renumbered(profile, packs, reasons) for profile in (self, other)])
        weights = rows["seen"].astype(np.float64)
        order = np.lexsort((rows["block"], rows["pack"]))
        rows, weights = rows[order], weights[order]
        places = rows[["pack", "block"]]
        starts = np.flatnonzero(np.concatenate(([True], places[1:] != places[:-1]))) if len(rows) else np.zeros(0, int)
        joined = rows[starts].copy()
        if len(rows):
            heavy = np.maximum(weights, 1e-9)
            first = np.add.reduceat(rows["first"] * heavy, starts) / np.add.reduceat(heavy, starts)
            joined["first"] = np.rint(first)
            seen = np.add.reduceat(weights, starts)
            runs = self.runs + other.runs
            if runs > RUNS:
                seen = seen * RUNS / runs
            joined["seen"] = np.minimum(seen, min(max(runs, 1), RUNS))
            known = np.maximum.reduceat(rows["digest"] != _NO_DIGEST, starts)
            last = np.concatenate((starts[1:], [len(rows)])) - 1
            use_last = known & (joined["digest"] == _NO_DIGEST)
            joined["digest"][use_last] = rows["digest"][last][use_last]
            recorded = reasons.index(RECORDED) if RECORDED in reasons else None
            if recorded is not None:
                joined["reason"][np.maximum.reduceat(rows["reason"] == recorded, starts)] = recorded
                if runs:
                    joined = joined[joined["seen"] > _FORGOTTEN * min(runs, RUNS)]
        runs = min(self.runs + other.runs, RUNS)
        return Profile(self.command, runs, packs, reasons, ordered(joined))


def ordered(rows: npt.NDArray[np.void]) -> npt.NDArray[np.void]:
    """Rows in the order of first touch, neighbours of one moment by their place."""
    return rows[np.lexsort((rows["block"], rows["pack"], rows["first"]))]


def decode(data: bytes, what: str) -> Profile:
    """The profile that ``data`` is. Raises FormatError naming ``what``."""
    if not data.startswith(MAGIC) or len(data) > LIMIT:
        raise FormatError(f"{what}: not a profile of this version")
    frame = data[len(MAGIC) :]
    try:
        if not 0 <= zstandard.get_frame_parameters(frame).content_size <= LIMIT:
            raise FormatError(f"{what}: a profile of an unknown or too large size")
        content = msgspec.msgpack.decode(zstandard.ZstdDecompressor().decompress(frame), type=_Content)
        rows = np.frombuffer(content.rows, ROW)
    except (zstandard.ZstdError, msgspec.MsgspecError, ValueError) as error:
        raise FormatError(f"{what}: a damaged profile: {error}") from None
    if not all(_HEX.fullmatch(pack) for pack in content.packs) or len(set(content.packs)) != len(content.packs):
        raise FormatError(f"{what}: a damaged profile: its packs")
    if len(rows) and (
        int(rows["pack"].max()) >= len(content.packs)
        or int(rows["reason"].max()) >= len(content.reasons)
        or not rows["length"].all()
        or not ((rows["seen"] >= 0) & (rows["seen"] <= RUNS)).all()
    ):
        raise FormatError(f"{what}: a damaged profile: a chunk of no pack, without reason, bytes or sense")
    return Profile(content.command, content.runs, content.packs, content.reasons, ordered(rows))


def merge(profiles: Iterable[Profile]) -> Profile | None:
    """All of them as one, None of none."""
    result: Profile | None = None
    for profile in profiles:
        result = profile if result is None else result.merged(profile)
    return result


def _renumbered(profile: Profile, packs: Sequence[str], reasons: Sequence[str]) -> npt.NDArray[np.void]:
    rows = profile.rows.copy()
    if len(rows):
        rows["pack"] = np.array([packs.index(pack) for pack in profile.packs], np.uint16)[rows["pack"]]
        rows["reason"] = np.array([reasons.index(reason) for reason in profile.reasons], np.uint8)[rows["reason"]]
    return rows
