"""The pack on disk: every structure of it, and nothing else.

::

    zstd pack                               raw pack
    ┌──────────────────────────────┐        ┌──────────────────────────────┐
    │ zstd frame 0                 │        │ device bytes of frame 0      │
    │ …                            │        │ …                            │
    │ zstd frame n-1               │        │ device bytes of frame n-1    │
    ├──────────────────────────────┤        ├──────────────────────────────┤
    │ skippable: chunk dictionary  │        │ skippable: chunk dictionary  │
    ├──────────────────────────────┤ ─┐     ├──────────────────────────────┤ ─┐
    │ skippable: frame digests     │  │ TOC │ skippable: frame digests     │  │ TOC
    │ skippable: seek table        │  │     │ skippable: seek table        │  │
    └──────────────────────────────┘ ─┘     └──────────────────────────────┘ ─┘

Integers are little-endian. Frame *i* holds device bytes ``[sum(decompressed[:i]), + decompressed[i])``, a multiple of
4096, and whole chunks only. The seek table is that of the zstd *seekable format* 0.1.0
(facebook/zstd, contrib/seekable_format/zstd_seekable_compression_format.md) and lists every frame before it, the two
skippable ones with a decompressed size of 0; in a raw pack compressed and decompressed sizes of data frames are equal.
So ``zstd -d`` of a zstd pack gives exactly the device's bytes.
"""

from __future__ import annotations

from struct import Struct
from typing import Final

import numpy as np

BLOCK: Final = 4096
"""Chunks start at multiples of this in the device address space; EROFS's block size."""

CHUNK_DICTIONARY_MAGIC: Final = 0x184D2A5B
FRAME_DIGESTS_MAGIC: Final = 0x184D2A5C
SEEK_TABLE_MAGIC: Final = 0x184D2A5E
SEEKABLE_MAGIC: Final = 0x8F92EAB1

SKIPPABLE_HEADER: Final = Struct("<II")  # magic, bytes of payload
DICTIONARY_HEADER: Final = Struct("<4sHHII")  # b"EGCD", version, 0, number of chunks, 0
DIGESTS_HEADER: Final = Struct("<4sHHIIQ")  # b"EGFD", version, flags, number of frames, 0, device size in bytes
SEEK_FOOTER: Final = Struct("<IBI")  # number of frames, descriptor, SEEKABLE_MAGIC

DICTIONARY_TAG: Final = b"EGCD"
DIGESTS_TAG: Final = b"EGFD"
VERSION: Final = 1
FLAG_RAW: Final = 1
"""In the frame digests' flags: device bytes are stored as they are."""

DIGEST_SIZE: Final = 32

CHUNK: Final = np.dtype([("digest", "V32"), ("block", "<u4"), ("length", "<u4")])
"""One chunk of the dictionary: BLAKE3 of its bytes, where it starts in 4 KiB blocks, its length in bytes unpadded."""

SEEK_ENTRY: Final = np.dtype([("compressed", "<u4"), ("decompressed", "<u4")])

assert CHUNK.itemsize == 40
assert SEEK_ENTRY.itemsize == 8
assert DICTIONARY_HEADER.size == 16
assert DIGESTS_HEADER.size == 24
assert SEEK_FOOTER.size == 9

MAX_DEVICE_SIZE: Final = 1 << 32
"""Device bytes a pack may hold at most: the seek table counts frames' sizes in 32 bits, readers allocate by them."""

MAX_FRAME_SIZE: Final = 1 << 26
"""Device bytes of one frame at most; a reader refuses larger ones before it allocates anything."""
