"""The picture of a start: what was read when, for how long its reader waited, and where it came from.

What is drawn is decided here, once for all renderers: rows of marks over a time axis from the mount on, curves of bytes
touched and brought, and the facts that stand above. :mod:`erofsgen.profile.html` and :mod:`erofsgen.profile.png` draw
it. Without a run there is what a profile expects.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from erofsgen import text
from erofsgen.profile.chunks import BLOCK, Chunks
from erofsgen.profile.profile import RECORDED, Profile
from erofsgen.profile.rows import fold
from erofsgen.profile.touches import Totals, by_file, names, origin_name, origins, parts, totals
from erofsgen.profile.trace import BROUGHT, HERE, UNKNOWN, Trace

MARK: Final = np.dtype([
    ("at", "<f8"), ("waited", "<f8"), ("length", "<i8"), ("kind", "u1"),
])  # fmt: skip
"""A touch in a row: milliseconds from the mount, milliseconds the reader waited (0: it was there), bytes of the row's
files, number of the kind in :attr:`Waterfall.kinds`."""

_HERE: Final = "#8a94a0"
_UNKNOWN: Final = "#b07d2b"
_SOURCES: Final = ("#1f6fb4", "#d1495b", "#7d4fc4", "#0f8a8a", "#a0522d", "#c2188f")
_PREFETCHED: Final = ("#2e8b3d", "#7a9a01", "#0b7a5b", "#5a7d3a")
_GUESSED: Final = ("#d9822b", "#7d4fc4", "#0f8a8a", "#c2188f", "#a0522d", "#d1495b", "#7a9a01")
_BANDS: Final = (0.25, 0.5, 0.75)
_SCALE: Final = 1 << 30


class Kind(NamedTuple):
    """Where bytes came from, or why a profile names them. Colours as ``#rrggbb``: ``colour`` of what was waited for,
    ``light`` of what was there."""

    name: str
    colour: str
    light: str


class Curve(NamedTuple):
    """Bytes over time: ``total`` bytes after each of the moments ``at``, in milliseconds, which ascend."""

    at: npt.NDArray[np.float64]
    total: npt.NDArray[np.int64]


class Table(NamedTuple):
    """Numbers that stand beside the picture. The first column has words, the others numbers, all to be printed."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Row:
    """A file, or a directory that stands for ``files`` of its files. ``marks``: an array of :data:`MARK` by time."""

    path: bytes
    files: int
    marks: npt.NDArray[np.void]

    @property
    def name(self) -> str:
        """The path, safe to print."""
        return text.printable(self.path)

    @property
    def first(self) -> float:
        """Milliseconds to the first touch."""
        return float(self.marks["at"][0])

    @property
    def size(self) -> int:
        """Bytes touched."""
        return int(self.marks["length"].sum())

    @property
    def waited(self) -> float:
        """Milliseconds that readers waited."""
        return float(self.marks["waited"].sum())


@dataclass(frozen=True)
class Waterfall:
    """A picture. ``rows`` are in the order of their first marks. ``arrivals``: an array of
    :data:`~erofsgen.profile.trace.BROUGHT` by time. ``facts`` are pairs of words and values, ``tables`` say more,
    ``summary`` is short: a few lines."""

    title: str
    run: bool
    """Whether it is of a run, whose readers may have waited, and not of what a profile expects."""
    kinds: Sequence[Kind]
    rows: Sequence[Row]
    touched: Curve
    brought: Curve
    arrivals: npt.NDArray[np.void]
    facts: Sequence[tuple[str, str]]
    tables: Sequence[Table]
    summary: Sequence[str]

    @cached_property
    def last(self) -> float:
        """Milliseconds to the end of the last touch, 1 at least."""
        ends = [float((row.marks["at"] + row.marks["waited"]).max()) for row in self.rows]
        return float(max([1.0, *ends, *self.touched.at[-1:].tolist()]))

    @property
    def end(self) -> float:
        """Milliseconds to the end of all that happened."""
        return float(max([self.last, *self.brought.at[-1:].tolist()]))


def of_trace(trace: Trace, chunks: Chunks | None, *, title: str, limit: int) -> Waterfall:
    """The picture of a run, in at most ``limit`` rows. Without ``chunks`` a row is a pack."""
    numbers, found_origins = origins(trace)
    found = by_file(parts(trace, chunks))
    marks = np.zeros(len(found), MARK)
    touch = found["touch"]
    marks["at"], marks["waited"] = trace.touches["at"][touch], found["waited"] / 1000
    marks["length"], marks["kind"] = found["length"], numbers[touch]
    sums = totals(trace)
    return Waterfall(
        title=title,
        run=True,
        kinds=_kinds(trace, found_origins),
        rows=_rows(names(trace.packs, chunks), found["file"], marks, limit),
        touched=_curve(trace.touches),
        brought=_curve(trace.brought),
        arrivals=trace.brought[np.argsort(trace.brought["at"], kind="stable")],
        facts=[("command", text.quoted(trace.command)), *run_facts(trace, sums)],
        tables=_tables(sums),
        summary=_summary(sums),
    )


def of_profile(profile: Profile, chunks: Chunks | None, *, title: str, limit: int) -> Waterfall:
    """The picture of what a command is expected to touch: order, reasons, and how sure that is. No waits, no sources.

    Shades say the confidence: the darker the surer.
    """
    rows = profile.rows
    band = np.digitize(profile.confidence(), _BANDS)
    pairs = rows["reason"].astype(np.int64) * (len(_BANDS) + 1) + band
    used, numbers = np.unique(pairs, return_inverse=True)
    kinds = [_reason(profile, *divmod(int(pair), len(_BANDS) + 1)) for pair in used]
    marks = np.zeros(len(rows), MARK)
    marks["at"], marks["length"], marks["kind"] = rows["first"], rows["length"], numbers
    return Waterfall(
        title=title,
        run=False,
        kinds=kinds,
        rows=_rows(names(profile.packs, chunks), files_of(profile, chunks), marks, limit),
        touched=_curve(rows, "first"),
        brought=Curve(np.zeros(0), np.zeros(0, np.int64)),
        arrivals=np.zeros(0, BROUGHT),
        facts=profile_facts(profile),
        tables=(),
        summary=[", ".join(f"{word} {value}" for word, value in profile_facts(profile)[1:])],
    )


def arrivals(
    waterfall: Waterfall, end: float, bins: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], int]:
    """Prefetched bytes in each of ``bins`` equal parts of the time up to ``end`` (milliseconds): those that were used,
    those that were not, and the most of both together."""
    rows = waterfall.arrivals[waterfall.arrivals["at"] <= end]
    unseen = rows["judged"] & ~rows["used"]
    place = np.minimum((rows["at"] * (bins / end)).astype(np.int64), bins - 1)
    used, unused = (
        np.bincount(place[which], rows["length"][which], bins).astype(np.float64) for which in (~unseen, unseen)
    )
    return used, unused, max(int((used + unused).max()), 1)


def files_of(profile: Profile, chunks: Chunks | None) -> npt.NDArray[np.int64]:
    """For each row of a profile the number of its file in ``chunks``; behind those, of its pack, if it is nobody's."""
    known = len(chunks.paths) if chunks else 0
    files = known + profile.rows["pack"].astype(np.int64)
    number = chunks_of(profile, chunks)
    if chunks:
        files[number >= 0] = chunks.table["file"][number[number >= 0]]
    return files


def chunks_of(profile: Profile, chunks: Chunks | None) -> npt.NDArray[np.int64]:
    """For each row of a profile the number of its chunk in ``chunks``, -1 where there is none."""
    rows = profile.rows
    result = np.full(len(rows), -1)
    if chunks and len(rows):
        devices = chunks.slots(list(profile.packs))[rows["pack"]]
        first, stop = chunks.spans(devices, rows["block"].astype(np.int64) * BLOCK, rows["length"])
        result[stop > first] = first[stop > first]
    return result


def profile_facts(profile: Profile) -> list[tuple[str, str]]:
    """What there is to say of a profile as a whole."""
    sure = profile.confidence()
    certain = int(profile.rows["length"][sure > _BANDS[-1]].sum(dtype=np.int64))
    return [
        ("command", text.quoted(profile.command)),
        ("runs", f"{profile.runs:,}" if profile.recorded else "none, all of it is guessed"),
        ("chunks", f"{len(profile.rows):,}, {text.size(profile.size)}"),
        ("touched by most runs", f"{text.size(certain)} ({text.share(certain, profile.size)})"),
    ]


def run_facts(trace: Trace, sums: Totals) -> list[tuple[str, str]]:
    """What there is to say of a run as a whole."""
    try:
        started = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(trace.started))
    except (OverflowError, ValueError, OSError):
        started = "at no time"
    return [
        ("mounted", f"{started}, plane {text.printable(trace.plane)}"),
        ("recorded", "to its end" if trace.complete else "in part: it went on, or there was more than is kept"),
        ("reads", f"{sums.touches:,} of what was not read before, {text.size(sums.touched)}"),
        ("waited for", f"{sums.misses:,}, {text.size(sums.missed)}; {sums.waited:.3f} s"),
        ("prefetched", f"{text.size(sums.prefetched)}; {text.counted(sums.prefetched_touches, 'read')} met it"),
        ("of it not used", f"{text.size(sums.unused)} ({text.share(sums.unused, sums.prefetched)})"),
    ]


def _summary(sums: Totals) -> list[str]:
    waited = f"{sums.misses:,} of them, {text.size(sums.missed)}, were waited for, {sums.waited:.3f} s in all"
    lines = [f"{text.counted(sums.touches, 'read')} of {text.size(sums.touched)}; {waited}"]
    if sums.prefetched:
        reasons = ", ".join(
            f"{text.printable(one.name)} {text.size(one.bytes)} ({text.share(one.unused_bytes, one.bytes)})"
            for one in sums.reasons
        )
        waste = text.share(sums.unused, sums.prefetched)
        lines.append(f"{text.size(sums.prefetched)} prefetched, {waste} of it not used: {reasons}")
    return lines


def _tables(sums: Totals) -> list[Table]:
    sources = [
        (text.printable(one.name), f"{one.touches:,}", f"{one.misses:,}", text.size(one.bytes), f"{one.waited:.3f} s")
        for one in sums.sources
    ]
    reasons = [
        (
            text.printable(one.name), f"{one.frames:,}", text.size(one.bytes), f"{one.used_frames:,}",
            text.size(one.used_bytes), text.share(one.unused_bytes, one.bytes),
        )
        for one in sums.reasons
    ]  # fmt: skip
    tables = [
        Table(("FROM", "READS", "WAITED FOR", "BYTES", "WAITED"), sources),
        Table(("PREFETCHED FOR", "FRAMES", "BYTES", "USED", "BYTES USED", "WASTE"), reasons),
    ]
    return [table for table in tables if table.rows]


def _reason(profile: Profile, number: int, band: int) -> Kind:
    name = profile.reasons[number]
    others = [reason for reason in profile.reasons if reason != RECORDED]
    colour = _SOURCES[0] if name == RECORDED else _GUESSED[others.index(name) % len(_GUESSED)]
    colour = _mixed(colour, 0.25 * (len(_BANDS) - band))
    if not profile.recorded:
        return Kind(name, colour, colour)
    bounds = (0, *_BANDS, 1)
    return Kind(f"{name}, by {100 * bounds[band]:.0f} to {100 * bounds[band + 1]:.0f} % of runs", colour, colour)


def _kinds(trace: Trace, found: Sequence[tuple[str, bool]]) -> list[Kind]:
    """Colours: one for each source, and a green where it was prefetched."""
    remote = [source for source in trace.sources if source not in (HERE, UNKNOWN)]
    kinds = []
    for source, was_prefetched in found:
        place = remote.index(source) if source in remote else 0
        if was_prefetched:
            colour = _PREFETCHED[place % len(_PREFETCHED)]
        elif source in remote:
            colour = _SOURCES[place % len(_SOURCES)]
        else:
            colour = _HERE if source == HERE else _UNKNOWN
        kinds.append(Kind(origin_name(source, was_prefetched), colour, _mixed(colour, 0.5)))
    return kinds


def _mixed(colour: str, white: float) -> str:
    parts = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return "#" + "".join(f"{round(part + (255 - part) * white):02x}" for part in parts)


def _rows(paths: Sequence[bytes], files: npt.NDArray[np.integer], marks: npt.NDArray[np.void], limit: int) -> list[Row]:
    """Marks by file, folded into at most ``limit`` rows: those stay that waited for much or read much."""
    if not len(marks):
        return []
    there, number = np.unique(files, return_inverse=True)
    weights = np.ones(len(there))
    for field in ("waited", "length"):
        sums = np.bincount(number, marks[field], len(there))
        weights += sums * (_SCALE / max(float(sums.sum()), 1e-9))
    groups, of = fold([paths[file] for file in there.tolist()], weights.astype(np.int64).tolist(), limit)
    row = of[number]
    order = np.lexsort((marks["at"], row))
    starts = np.searchsorted(row[order], np.arange(len(groups) + 1))
    found = [
        Row(group.path, group.files, marks[order[start:stop]])
        for group, start, stop in zip(groups, starts[:-1].tolist(), starts[1:].tolist(), strict=True)
    ]
    first = {id(one): int(order[start]) for one, start in zip(found, starts[:-1].tolist(), strict=True)}
    return sorted(found, key=lambda one: (one.first, first[id(one)]))


def _curve(rows: npt.NDArray[np.void], field: str = "at") -> Curve:
    order = np.argsort(rows[field], kind="stable")
    total = np.cumsum(rows["length"][order], dtype=np.int64)
    at = rows[field][order].astype(np.float64)
    last = np.concatenate((at[1:] != at[:-1], [True])) if len(at) else np.zeros(0, np.bool_)
    return Curve(at[last], total[last])
