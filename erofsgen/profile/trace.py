"""A trace: one run's first touches, how long each reader waited, and where the bytes came from.

::

    magic "EGTRAC2\\0" │ a zstd frame of the MessagePack array of :class:`Trace`'s fields, arrays as bytes

It stays on the host that recorded it, and is what waterfalls are drawn from; profiles are merged from traces.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Final

import msgspec
import numpy as np
import numpy.typing as npt
import zstandard

from erofsgen.errors import FormatError

TOUCH: Final = np.dtype([
    ("at", "<u4"), ("waited", "<u4"), ("pack", "<u2"), ("offset", "<u8"), ("length", "<u4"), ("process", "<u2"),
    ("source", "u1"),
])  # fmt: skip
"""A range that was touched: milliseconds from the mount, microseconds the reader waited (0: it was there), number of
the pack in :attr:`Trace.packs`, device bytes ``[offset, offset + length)``, number of the process in
:attr:`Trace.processes`, number of the source in :attr:`Trace.sources`."""

BROUGHT: Final = np.dtype([
    ("at", "<u4"), ("pack", "<u2"), ("frame", "<u4"), ("offset", "<u8"), ("length", "<u4"), ("source", "u1"),
    ("reason", "u1"), ("used", "?"), ("judged", "?"),
])  # fmt: skip
"""A frame that was prefetched: milliseconds from the mount to its arrival, its pack, its number and device bytes there,
source, number of the reason in :attr:`Trace.reasons`, whether it was touched afterwards, and whether that is known."""

HERE: Final = "host cache"
"""The source of what was there before it was touched and not prefetched for this mount."""
UNKNOWN: Final = "unknown"
"""The source of what another worker brought, which has died."""

LIMIT: Final = 64 << 20

_MAGIC: Final = b"EGTRAC2\0"


_WORD: Final = msgspec.Meta(max_length=200)
_MANY: Final = msgspec.Meta(max_length=1 << 16)
_FEW: Final = msgspec.Meta(max_length=1 << 8)


class _Content(msgspec.Struct, array_like=True):
    image: Annotated[str, msgspec.Meta(pattern="^sha256:[0-9a-f]{64}$")]
    command: Annotated[str, _WORD]
    plane: Annotated[str, _WORD]
    started: float
    complete: bool
    packs: Annotated[list[Annotated[str, _WORD]], _MANY]
    processes: Annotated[list[tuple[int, Annotated[str, _WORD]]], _MANY]
    sources: Annotated[list[Annotated[str, msgspec.Meta(max_length=4096)]], _FEW]
    reasons: Annotated[list[Annotated[str, _WORD]], _FEW]
    touches: bytes
    brought: bytes


@dataclass(frozen=True)
class Trace:
    """A run of ``command`` from the image with the manifest digest ``image``, mounted at ``started`` (seconds since
    1970) through ``plane``. ``complete``: it was recorded to its end. ``processes``: (pid, name). ``touches``: an array
    of :data:`TOUCH` in order, ``brought``: of :data:`BROUGHT`."""

    image: str
    command: str
    plane: str
    started: float
    complete: bool
    packs: list[str]
    processes: list[tuple[int, str]]
    sources: list[str]
    touches: npt.NDArray[np.void]
    reasons: list[str] = field(default_factory=list)
    brought: npt.NDArray[np.void] = field(default_factory=lambda: np.zeros(0, BROUGHT))

    def encode(self) -> bytes:
        """The trace's bytes."""
        content = _Content(
            self.image, self.command, self.plane, self.started, self.complete, self.packs, self.processes,
            self.sources, self.reasons, self.touches.tobytes(), self.brought.tobytes(),
        )  # fmt: skip
        return _MAGIC + zstandard.ZstdCompressor(3).compress(msgspec.msgpack.encode(content))


def decode(data: bytes, what: str) -> Trace:
    """The trace that ``data`` is. Raises FormatError naming ``what``."""
    if not data.startswith(_MAGIC) or len(data) > LIMIT:
        raise FormatError(f"{what}: not a trace of this version")
    frame = data[len(_MAGIC) :]
    try:
        if not 0 <= zstandard.get_frame_parameters(frame).content_size <= LIMIT:
            raise FormatError(f"{what}: a trace of an unknown or too large size")
        content = msgspec.msgpack.decode(zstandard.ZstdDecompressor().decompress(frame), type=_Content)
        touches, brought = np.frombuffer(content.touches, TOUCH), np.frombuffer(content.brought, BROUGHT)
    except (zstandard.ZstdError, msgspec.MsgspecError, ValueError) as error:
        raise FormatError(f"{what}: a damaged trace: {error}") from None
    for rows, of in ((touches, "pack"), (brought, "pack"), (touches, "source"), (brought, "source")):
        if len(rows) and int(rows[of].max()) >= len(content.packs if of == "pack" else content.sources):
            raise FormatError(f"{what}: a damaged trace: a number of no {of}")
    if len(touches) and int(touches["process"].max()) >= len(content.processes):
        raise FormatError(f"{what}: a damaged trace: a number of no process")
    if len(brought) and int(brought["reason"].max()) >= len(content.reasons):
        raise FormatError(f"{what}: a damaged trace: a number of no reason")
    return Trace(
        content.image, content.command, content.plane, content.started, content.complete, content.packs,
        content.processes, content.sources, touches, content.reasons, brought,
    )  # fmt: skip
