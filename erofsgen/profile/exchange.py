"""Profiles as JSON, for people and other programs.

::

    {"version": 1, "image": "sha256:…", "profiles": [
        {"command": "python app.py", "runs": 3, "chunks": [
            {"pack": "<SHA-256>", "offset": 8192, "length": 5000, "digest": "<16 hex digits>", "first_ms": 40,
             "confidence": 0.67, "reason": "recorded", "path": "usr/lib/x.so"}]}]}

Chunks are in the order of their first touch. ``offset`` counts bytes of the pack's device, ``first_ms`` milliseconds
from the mount; ``confidence`` is the share of runs that touched the chunk. ``digest``, the first 8 bytes of the chunk's
BLAKE3, is null where it is not known; ``path``, the first file that has the chunk, is there where somebody looked, and
is not read back. A byte of a path that is no UTF-8 is a lone surrogate U+DC80 to U+DCFF.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, Final

import msgspec
import numpy as np

from erofsgen.errors import FormatError
from erofsgen.profile.chunks import BLOCK, Chunks
from erofsgen.profile.naming import short
from erofsgen.profile.profile import ROW, RUNS, Profile, ordered
from erofsgen.store.profiles import COMMAND_LIMIT, COUNT

VERSION: Final = 1
LIMIT: Final = 512 << 20
"""Bytes of a document at most."""

_UNSIGNED: Final = msgspec.Meta(ge=0, le=0xFFFFFFFF)


class _Chunk(msgspec.Struct):
    pack: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    offset: Annotated[int, msgspec.Meta(ge=0, le=0xFFFFFFFF * BLOCK, multiple_of=BLOCK)]
    length: Annotated[int, msgspec.Meta(gt=0, le=0xFFFFFFFF)]
    first_ms: Annotated[int, _UNSIGNED]
    confidence: Annotated[float, msgspec.Meta(ge=0, le=1)]
    reason: Annotated[str, msgspec.Meta(max_length=200)]
    digest: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{16}$")] | None = None


class _Profile(msgspec.Struct):
    command: Annotated[str, msgspec.Meta(max_length=COMMAND_LIMIT)]
    runs: Annotated[int, msgspec.Meta(ge=0, le=RUNS)]
    chunks: list[_Chunk]


class _Document(msgspec.Struct):
    version: int
    image: str
    profiles: Annotated[list[_Profile], msgspec.Meta(max_length=COUNT)]


def document(image: str, profiles: Iterable[Profile], paths: Paths | None = None) -> dict[str, Any]:
    """Profiles of the image with the manifest digest ``image`` as a document; with ``paths``, those of its files."""
    return {
        "version": VERSION,
        "image": image,
        "profiles": [
            {"command": profile.command, "runs": profile.runs, "chunks": _rows(profile, paths)} for profile in profiles
        ],
    }


def text(exported: dict[str, Any]) -> Iterator[str]:
    """A document as lines of JSON, a chunk each: for people, and for line-wise tools to compare."""
    yield f'{{"version": {exported["version"]}, "image": {json.dumps(exported["image"])}, "profiles": ['
    for number, profile in enumerate(exported["profiles"]):
        yield f'{"" if number == 0 else ","}{{"command": {json.dumps(profile["command"])}, "runs": {profile["runs"]},'
        yield '"chunks": ['
        last = len(profile["chunks"]) - 1
        for row, chunk in enumerate(profile["chunks"]):
            yield json.dumps(chunk) + ("," if row < last else "")
        yield "]}"
    yield "]}"


def parse(data: bytes, what: str) -> list[Profile]:
    """The profiles of a document. Raises FormatError naming ``what``."""
    if len(data) > LIMIT:
        raise FormatError(f"{what}: {len(data)} bytes, at most {LIMIT} are sensible")
    try:
        read = msgspec.convert(json.loads(data), _Document)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise FormatError(f"{what}: no profiles: {error}") from None
    if read.version != VERSION:
        raise FormatError(f"{what}: profiles of version {read.version}, this program knows {VERSION}")
    if len({profile.command for profile in read.profiles}) != len(read.profiles):
        raise FormatError(f"{what}: two profiles of the same command")
    return [_profile(profile, what) for profile in read.profiles]


class Paths:
    """The files of an image's chunks. ``chunks`` are those of its index, whose device slots are ``packs``."""

    def __init__(self, chunks: Chunks, packs: Sequence[str]) -> None:
        self._chunks = chunks
        self._slots = {pack: slot for slot, pack in enumerate(packs, 1)}
        table = chunks.table
        self._keys = table["device"].astype(np.int64) << 32 | table["block"]

    def of(self, profile: Profile) -> list[bytes | None]:
        """For each row the first file that has the chunk, None where none has."""
        if not len(self._keys):
            return [None] * len(profile.rows)
        slots = np.array([self._slots.get(pack, 0) for pack in profile.packs] or [0], np.int64)
        wanted = slots[profile.rows["pack"]] << 32 | profile.rows["block"]
        at = np.minimum(np.searchsorted(self._keys, wanted), len(self._keys) - 1)
        files = np.where(self._keys[at] == wanted, self._chunks.table["file"][at].astype(np.int64), -1)
        paths = self._chunks.paths
        return [paths[file] if file >= 0 else None for file in files.tolist()]


def _rows(profile: Profile, paths: Paths | None) -> list[dict[str, Any]]:
    rows = profile.rows
    columns = zip(
        rows["pack"].tolist(),
        (rows["block"].astype(np.int64) * BLOCK).tolist(),
        rows["length"].tolist(),
        rows["first"].tolist(),
        profile.confidence().tolist(),
        rows["reason"].tolist(),
        (digest.tobytes() for digest in rows["digest"]),
        paths.of(profile) if paths else [None] * len(rows),
        strict=True,
    )
    return [
        {
            "pack": profile.packs[pack],
            "offset": offset,
            "length": length,
            "digest": digest.hex() if any(digest) else None,
            "first_ms": first,
            "confidence": round(confidence, 4),
            "reason": profile.reasons[reason],
            **({} if path is None else {"path": path.decode("utf-8", "surrogateescape")}),
        }
        for pack, offset, length, first, confidence, reason, digest, path in columns
    ]


def _profile(read: _Profile, what: str) -> Profile:
    packs = list(dict.fromkeys(chunk.pack for chunk in read.chunks))
    reasons = list(dict.fromkeys(chunk.reason for chunk in read.chunks))
    if len(packs) > 0xFFFF or len(reasons) > 0xFF:
        raise FormatError(f"{what}: {len(packs)} packs, {len(reasons)} reasons")
    pack_numbers = {pack: number for number, pack in enumerate(packs)}
    reason_numbers = {reason: number for number, reason in enumerate(reasons)}
    rows = np.zeros(len(read.chunks), ROW)
    rows["pack"] = [pack_numbers[chunk.pack] for chunk in read.chunks]
    rows["block"] = [chunk.offset // BLOCK for chunk in read.chunks]
    rows["length"] = [chunk.length for chunk in read.chunks]
    rows["first"] = [chunk.first_ms for chunk in read.chunks]
    rows["seen"] = [chunk.confidence * read.runs for chunk in read.chunks]
    rows["reason"] = [reason_numbers[chunk.reason] for chunk in read.chunks]
    digests = b"".join(bytes.fromhex(chunk.digest or "00" * 8) for chunk in read.chunks)
    rows["digest"] = np.frombuffer(digests, "V8")
    return Profile(short(read.command), read.runs, packs, reasons, ordered(rows))
