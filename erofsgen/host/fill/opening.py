"""A frame's stored bytes become the target's: decompressed, verified, written."""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from typing import cast

from erofsgen.errors import ErofsgenError, FormatError, StorageError
from erofsgen.host.fill.sources import describe
from erofsgen.host.fill.work import Frame
from erofsgen.pack.reader import open_frame


@dataclass(frozen=True, slots=True)
class Bad:
    """A frame whose bytes are not what they should be."""

    error: FormatError


def put(frame: Frame) -> int | Bad | ErofsgenError:
    """Hand a frame's verified bytes to its target. Returns how many, or why not. Never raises."""
    try:
        return _put(frame)
    except BaseException as error:  # noqa: BLE001 - a target may raise anything; the thread must live on
        return as_ours(error, f"pack {frame.target.name}: frame {frame.index} was not written")


def as_ours(error: BaseException, what: str) -> ErofsgenError:
    """What a target raised, as an error of ours. Without the locals of its traceback, which hold a frame's bytes."""
    traceback.clear_frames(error.__traceback__)
    if isinstance(error, ErofsgenError):
        return error
    ours = StorageError(f"{what}: {describe(error)}")
    ours.__cause__ = error
    return ours


def _put(frame: Frame) -> int | Bad:
    # A function of its own, so that no frame of a traceback has the bytes
    target = frame.target
    stored = cast(bytes, frame.stored)  # a view serves as well, and spares a copy
    try:
        data = open_frame(stored, target.toc, frame.index, what=f"pack {target.name}")
    except FormatError as error:
        return Bad(error)
    target.write_frame(frame.index, data)
    return len(data)
