"""An index without devices: the same files, for an image that lies in one piece.

A flat image is the rewritten index and behind it every device's bytes, in slot order. Its chunk indexes name the
primary device and blocks of the flat image, and there is no device table. Kernels from 5.15 on read that. The index as
it is, with device slots that say where in one piece they are mapped, takes a kernel of 6.4.

Structures: fs/erofs/erofs_fs.h. Only what says where chunk indexes are is looked at, and only as far as that needs.
"""

from __future__ import annotations

from struct import Struct, error, unpack_from
from typing import Final, NamedTuple

import crc32c
import numpy as np
import numpy.typing as npt

from erofsgen.erofs.tree import BLOCK
from erofsgen.errors import FormatError, UnsupportedError


class Flat(NamedTuple):
    """``index``: rewritten, whole blocks. ``starts``: block where each device begins, in slot order.
    ``blocks``: size of the flat image."""

    index: bytes
    starts: tuple[int, ...]
    blocks: int


_SUPER: Final = 1024
_CHECKSUM, _COMPAT, _ROOT_NID, _BLOCKS, _META, _INCOMPAT, _EXTRA_DEVICES, _SLOT_OFFSET = (
    _SUPER + field for field in (4, 8, 14, 36, 40, 80, 86, 88)
)
_SB_CHKSUM: Final = 1
_CHUNKED_FILE: Final = 4
_DEVICE_TABLE: Final = 8
_SLOT_SIZE: Final = 128
_SLOT_BLOCKS: Final = 64

_FLAT_PLAIN, _FLAT_INLINE, _CHUNK_BASED = 0, 2, 4  # datalayout
_CHUNK_BITS: Final = 0x1F
_INDEXES: Final = 0x20  # and no other flag: 8-byte chunk indexes with 32-bit blocks

_INODE: Final = Struct("<HHHHI4xI")  # i_format, i_xattr_icount, i_mode, ., i_size (low), ., i_u
_DIRENT: Final = np.dtype([("nid", "<u8"), ("nameoff", "<u2"), ("type", "u1"), ("reserved", "u1")])
_REGULAR, _DIRECTORY = 1, 2  # file_type
_CHUNK_INDEX: Final = np.dtype([("advise", "<u2"), ("device", "<u2"), ("block", "<u4")])
_HOLE: Final = 0xFFFF_FFFF

assert _DIRENT.itemsize == 12
assert _CHUNK_INDEX.itemsize == 8


def flatten(index: bytes) -> Flat:
    """Rewrite an index for the flat image.

    Raises FormatError (not an index), UnsupportedError (an EROFS image that this program does not write, or one that
    has more than 2^32 blocks in one piece).
    """
    try:
        return _flatten(index)
    except (error, IndexError, ValueError) as problem:
        raise FormatError(f"index: damaged: {problem}") from None


def _flatten(index: bytes) -> Flat:
    data = bytearray(index) + bytes(-len(index) % BLOCK)
    (incompat,) = unpack_from("<I", data, _INCOMPAT)
    if incompat & ~(_CHUNKED_FILE | _DEVICE_TABLE):
        raise UnsupportedError(f"index: feature bits {incompat:#x} cannot be laid flat")
    extra, first_slot = unpack_from("<HH", data, _EXTRA_DEVICES)
    sizes = [
        unpack_from("<I", data, (first_slot + slot) * _SLOT_SIZE + _SLOT_BLOCKS)[0]
        for slot in range(extra if incompat & _DEVICE_TABLE else 0)
    ]
    starts = np.cumsum([len(data) // BLOCK, *sizes], dtype=np.int64)
    if starts[-1] >= _HOLE:
        raise UnsupportedError(f"index: {starts[-1]} blocks do not fit one piece")
    places = _chunk_indexes(data)
    table = np.frombuffer(data, _CHUNK_INDEX)
    chunks = table[places]
    real = places[chunks["block"] != _HOLE]
    device = table["device"][real].astype(np.int64)
    if device.size and device.max() > len(sizes):
        raise FormatError(f"index: a chunk is on device {device.max()} of {len(sizes)}")
    # device 0 is the index itself, whose blocks stay where they are
    moved = np.concatenate([[0], starts[:-1]])
    table["block"][real] += moved[device].astype(np.uint32)
    table["device"][real] = 0
    del chunks, table
    _put(data, "<I", _INCOMPAT, incompat & ~_DEVICE_TABLE)
    _put(data, "<HH", _EXTRA_DEVICES, 0, 0)
    _put(data, "<I", _BLOCKS, int(starts[-1]))
    (compat,) = unpack_from("<I", data, _COMPAT)
    if compat & _SB_CHKSUM:
        _put(data, "<I", _CHECKSUM, 0)
        # the kernel's crc32c has no final inversion
        _put(data, "<I", _CHECKSUM, crc32c.crc32c(bytes(data[_SUPER:BLOCK])) ^ 0xFFFF_FFFF)
    return Flat(bytes(data), tuple(starts[:-1].tolist()), int(starts[-1]))


def _chunk_indexes(data: bytearray) -> npt.NDArray[np.int64]:
    """Where chunk indexes are, counted in their size of 8 bytes."""
    (root,) = unpack_from("<H", data, _ROOT_NID)
    (meta,) = unpack_from("<I", data, _META)
    regular = []
    seen = {root}
    pending = [root]
    while pending:
        for block in _directory_blocks(data, meta * BLOCK + 32 * pending.pop()):
            count = unpack_from("<H", block, 8)[0] // _DIRENT.itemsize
            entries = np.frombuffer(block, _DIRENT, count)
            regular.append(entries["nid"][entries["type"] == _REGULAR])
            found = set(entries["nid"][entries["type"] == _DIRECTORY].tolist()) - seen
            seen |= found
            pending.extend(found)
    at = np.unique(np.concatenate([np.zeros(0, np.uint64), *regular])).astype(np.int64) * 32 + meta * BLOCK
    words, quads = np.frombuffer(data, "<u2"), np.frombuffer(data, "<u4")
    at = at[words[at // 2] >> 1 & 7 == _CHUNK_BASED]
    extended = (words[at // 2] & 1).astype(bool)
    count = words[at // 2 + 1].astype(np.int64)
    size = quads[at // 4 + 2].astype(np.int64)
    size[extended] |= quads[at[extended] // 4 + 3].astype(np.int64) << 32
    union = quads[at // 4 + 4].astype(np.int64)
    if (union & ~_CHUNK_BITS != _INDEXES).any():
        raise UnsupportedError("index: a file's chunk format cannot be laid flat")
    start = at + np.where(extended, 64, 32) + np.where(count, 12 + 4 * (count - 1), 0)
    bits = 12 + (union & _CHUNK_BITS)
    lengths = (size + (np.int64(1) << bits) - 1) >> bits
    if lengths.size and lengths.sum() * _CHUNK_INDEX.itemsize > len(data):
        raise FormatError("index: more chunks than it has room for")
    ends = np.cumsum(lengths)
    return np.repeat((start + 7) // 8 - (ends - lengths), lengths) + np.arange(ends[-1] if len(ends) else 0)


def _directory_blocks(data: bytearray, at: int) -> list[bytes]:
    layout, count, _, _, size, start = _INODE.unpack_from(data, at)
    extended, layout = layout & 1, layout >> 1 & 7
    if layout not in (_FLAT_PLAIN, _FLAT_INLINE):
        raise FormatError(f"index: a directory of layout {layout}")
    whole = size // BLOCK * BLOCK if layout == _FLAT_INLINE else size
    content = bytes(data[start * BLOCK : start * BLOCK + whole])
    if whole < size:
        tail = at + (64 if extended else 32) + (12 + 4 * (count - 1) if count else 0)
        content += bytes(data[tail : tail + size - whole])
    if len(content) != size:
        raise FormatError("index: a directory ends outside it")
    return [content[offset : offset + BLOCK] for offset in range(0, size, BLOCK)]


def _put(data: bytearray, layout: str, offset: int, *values: int) -> None:
    Struct(layout).pack_into(data, offset, *values)
