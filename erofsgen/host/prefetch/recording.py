"""A recording, as the supervisor left it (:mod:`erofsgen.host.daemon.recorder`), into a trace and a profile's run."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from erofsgen.errors import FormatError
from erofsgen.host.daemon.recorder import COLUMNS, ROWS
from erofsgen.host.prefetch.arrivals import Arrivals
from erofsgen.pack.toc import Toc
from erofsgen.profile.chunks import Chunks
from erofsgen.profile.profile import RECORDED, ROW, Profile, ordered
from erofsgen.profile.trace import BROUGHT, HERE, TOUCH, UNKNOWN, Trace

WHOLE_SIZE: Final = 16 << 20
WHOLE_SHARE: Final = 0.9
"""A file of this size of which this share is touched is read whole: all of it is streamed, in its own order."""

_LIMIT: Final = 64 << 20


class Header(msgspec.Struct):
    """What is known of a recording besides its touches. ``began``: of ``time.monotonic``; ``started``: since 1970.

    ``unobserved``: packs whose reads were not all told.
    """

    mount: str
    packs: list[str]
    began: float
    started: float
    complete: bool
    active: bool
    processes: list[tuple[int, str]]
    unobserved: list[str]
    rows: int
    image: str = ""
    command: str = ""
    plane: str = ""
    token: str = ""


@dataclass(frozen=True)
class Recording:
    """A recording: ``touches`` are of :data:`erofsgen.profile.trace.TOUCH`, with no sources yet."""

    header: Header
    touches: npt.NDArray[np.void]


def read(path: Path) -> Recording:
    """The recording in a file. Raises FormatError, OSError."""
    data = path.read_bytes()
    line, newline, rest = data.partition(b"\n")
    try:
        header = msgspec.json.decode(line, type=Header)
    except msgspec.MsgspecError as error:
        raise FormatError(f"{path}: {error}") from None
    sizes = [array(kind).itemsize for _, kind in COLUMNS]
    if not newline or not 0 <= header.rows <= ROWS or len(rest) != header.rows * sum(sizes) or len(data) > _LIMIT:
        raise FormatError(f"{path}: {len(rest)} bytes of touches, {header.rows} touches expected")
    touches = np.zeros(header.rows, TOUCH)
    at = 0
    for (name, kind), size in zip(COLUMNS, sizes, strict=True):
        column = array(kind)
        column.frombytes(rest[at : at + header.rows * size])
        touches[name] = np.frombuffer(column, np.dtype(kind))
        at += header.rows * size
    if header.rows and (
        int(touches["pack"].max()) >= len(header.packs) or int(touches["process"].max()) >= len(header.processes)
    ):
        raise FormatError(f"{path}: a touch of no pack or process")
    return Recording(header, touches)


def trace_of(
    recording: Recording,
    tocs: Mapping[str, Toc],
    arrivals: Arrivals,
    asked: Mapping[tuple[str, int], str],
) -> Trace:
    """The trace of a recording. ``asked``: the frames that were prefetched for the mount, with their reasons."""
    header, touches = recording.header, recording.touches.copy()
    sources = [HERE, UNKNOWN]
    touched: set[tuple[str, int]] = set()
    numbers = touches["pack"].tolist()
    offsets, lengths, waits = touches["offset"].tolist(), touches["length"].tolist(), touches["waited"].tolist()
    found = np.zeros(len(touches), np.uint8)
    for row, (number, offset, length, waited) in enumerate(zip(numbers, offsets, lengths, waits, strict=True)):
        pack = header.packs[number]
        toc = tocs.get(pack)
        if toc is None or offset >= toc.device_size:
            continue
        frames = toc.frames(offset, min(max(length, 1), toc.device_size - offset))
        touched.update((pack, frame) for frame in frames)
        arrival = arrivals.get((pack, frames[0]))
        if arrival is None:
            found[row] = 1 if waited else 0
        elif arrival.at >= header.began:
            found[row] = _number(sources, arrival.source)
    touches["source"] = found
    reasons: list[str] = []
    brought = []
    for (pack, frame), reason in asked.items():
        arrival, toc = arrivals.get((pack, frame)), tocs.get(pack)
        if arrival is not None and toc is not None and pack in header.packs and frame < len(toc):
            brought.append((
                max(0, int(1000 * (arrival.at - header.began))),
                header.packs.index(pack),
                frame,
                int(toc.device_offsets[frame]),
                int(toc.device_sizes[frame]),
                _number(sources, arrival.source),
                _number(reasons, reason),
                (pack, frame) in touched,
                False,
            ))  # fmt: skip
    rows = np.array(brought, BROUGHT)
    hidden = [header.packs.index(pack) for pack in header.unobserved if pack in header.packs]
    rows["judged"] = ~(np.isin(rows["pack"], hidden) | (header.plane == "fscache"))
    return Trace(
        image=header.image,
        command=header.command,
        plane=header.plane,
        started=header.started,
        complete=header.complete,
        packs=header.packs,
        processes=header.processes,
        sources=sources,
        touches=touches,
        reasons=reasons,
        brought=rows[np.argsort(rows["at"], kind="stable")],
    )


def run_of(recording: Recording, chunks: Chunks, before: Profile | None) -> Profile:
    """The profile of this one run, of an image with ``chunks``. ``before``: what is known of the command.

    Chunks of packs that could not be observed all the time count as touched as often as they were ``before``, so that
    what nobody could see does not speak against them.
    """
    header, touches = recording.header, recording.touches
    touches = touches[touches["length"] > 0]
    numbers, of = chunks.touched_many(touches["pack"].astype(np.int64) + 1, touches["offset"], touches["length"])
    first = np.full(len(chunks.table), np.iinfo(np.uint32).max, np.uint32)
    np.minimum.at(first, numbers, touches["at"][of])
    _stream_whole_files(chunks, first)
    seen = np.flatnonzero(first < np.iinfo(np.uint32).max)
    rows = np.zeros(len(seen), ROW)
    rows["pack"] = chunks.table["device"][seen] - 1
    rows["block"] = chunks.table["block"][seen]
    rows["length"] = chunks.table["length"][seen]
    rows["first"] = first[seen]
    rows["seen"] = 1
    run = Profile(header.command, 1, header.packs, [RECORDED], ordered(rows))
    return run if before is None or not before.recorded else _with_unobserved(run, header, before)


def _stream_whole_files(chunks: Chunks, first: npt.NDArray[np.uint32]) -> None:
    """Let files that are read whole be touched in full, and in their own order."""
    never = np.iinfo(np.uint32).max
    sizes = np.array(chunks.sizes, np.int64)
    large = np.flatnonzero(sizes >= WHOLE_SIZE)
    for file in large.tolist():
        of_file = np.flatnonzero(chunks.table["file"] == file)
        lengths = chunks.table["length"][of_file].astype(np.int64)
        times = first[of_file]
        touched = times < never
        if lengths[touched].sum() >= WHOLE_SHARE * lengths.sum() > 0:
            order = np.argsort(chunks.table["offset"][of_file], kind="stable")
            known = np.sort(times[touched])
            spread = np.concatenate((known, np.full(len(times) - len(known), known[-1], np.uint32)))
            first[of_file[order]] = spread


def _with_unobserved(run: Profile, header: Header, before: Profile) -> Profile:
    hidden = {before.packs.index(pack) for pack in header.unobserved if pack in before.packs}
    if header.plane == "fscache":  # whose kernel tells of nothing that is there
        hidden = set(range(len(before.packs)))
    rows = before.rows[np.isin(before.rows["pack"], list(hidden))].copy()
    known = {(run.packs[row["pack"]], int(row["block"])) for row in run.rows}
    keep = [
        (pack, int(block)) not in known
        for pack, block in zip((before.packs[number] for number in rows["pack"]), rows["block"], strict=True)
    ]
    rows = rows[np.array(keep, bool)]
    if not len(rows):
        return run
    rows["seen"] = np.minimum(rows["seen"] / before.runs, 1)
    return replace(Profile(run.command, 0, before.packs, before.reasons, ordered(rows)).merged(run), runs=1)


def _number(names: list[str], name: str) -> int:
    if name not in names:
        names.append(name)
    return names.index(name)
