"""What a build can be told. Everything has a default that suits container images."""

from __future__ import annotations

import os
from typing import Final

import msgspec
from blake3 import blake3

from erofsgen.erofs.tree import BLOCK
from erofsgen.errors import UsageError

INLINE_MAX: Final = 64
"""Files up to this many bytes live in the index: less than their own block of a pack would cost to fetch."""


class BuildOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Options of one build. Sizes are in bytes.

    ``chunk_size``         unit of deduplication, a power of two from 4 KiB to 16 MiB
    ``compression_level``  zstd's, 1 to 22, or negative for its fast levels
    ``threads``            compression threads; None is one per core. The output does not depend on it
    ``share_pages``        write the fingerprint xattr by which Linux >= 7.0 shares page cache between images
    ``dedup``              take chunks from packs the store has already
    ``reuse_layers``       take converted layers from layer records
    ``pack_size``          device bytes per pack at most
    ``max_devices``        packs per image at most
    ``guess``              guess what the image's own command will read, for hosts that have no profile of it
    """

    chunk_size: int = 1 << 20
    compression_level: int = 3
    threads: int | None = None
    share_pages: bool = False
    dedup: bool = True
    reuse_layers: bool = True
    pack_size: int = 256 << 20
    max_devices: int = 256
    guess: bool = True

    def __post_init__(self) -> None:
        if self.chunk_size & (self.chunk_size - 1) or not BLOCK <= self.chunk_size <= 16 << 20:
            raise UsageError(f"chunk size {self.chunk_size} is not a power of two from 4 KiB to 16 MiB")
        if not -100 <= self.compression_level <= 22 or self.compression_level == 0:
            raise UsageError(f"compression level {self.compression_level} is not a zstd level (1 to 22, or negative)")
        if self.threads is not None and not 1 <= self.threads <= 1024:
            raise UsageError(f"{self.threads} threads make no sense")
        if not 1 <= self.max_devices <= 65535:
            raise UsageError(f"an image has 1 to 65535 devices, not {self.max_devices}")
        if self.pack_size % BLOCK or not max(self.chunk_size, 1 << 20) <= self.pack_size <= 1 << 31:
            raise UsageError(f"pack size {self.pack_size} is not a multiple of {BLOCK} from 1 MiB to 2 GiB")

    @property
    def worker_threads(self) -> int:
        """How many compression threads to start."""
        return self.threads or len(os.sched_getaffinity(0))

    def layer_parameters(self) -> tuple[int | bool, ...]:
        """Every option that a converted layer depends on."""
        return (self.chunk_size, self.compression_level, self.pack_size, self.dedup, INLINE_MAX)

    @property
    def fingerprint(self) -> str:
        """16 hex digits of BLAKE3 over every option that an image depends on, which its manifest records."""
        parameters = (*self.layer_parameters(), self.share_pages, self.max_devices)
        return blake3(msgspec.msgpack.encode(parameters)).hexdigest(8)
