"""What a miss costs, plane by plane. No case of the table: the figures go into the share, for docs/benchmarks.md."""

from __future__ import annotations

import json
import os
import statistics
import time
from pathlib import Path

import pytest
from handmade import CHUNK, FRAME_CHUNKS, chunks_of, contents
from sites import Site, drop_caches

MIB = 1 << 20
SHARE = Path(os.environ.get("EROFSGEN_VM_SHARE", "/nonexistent"))


def timed(path, offset, length):
    with open(path, "rb", buffering=0) as file:
        started = time.perf_counter()
        data = os.pread(file.fileno(), length, offset)
        return time.perf_counter() - started, data


def test_what_a_miss_costs(lazy_plane, tmp_path):
    """Single reads of one page of frames that are missing, and a sequential read of all; the packs are raw, the store
    is in the page cache. Beside it the same reads of a plain file on the same disk, from the disk."""
    site = Site(tmp_path, lazy_plane)
    parts = contents(11, *[128 * CHUNK] * 4)
    packs = [site.maker.pack(chunks_of(part), raw=True) for part in parts]
    image = site.maker.image("image", {"random": parts[0], "sequential": b"".join(parts[1:])}, packs)
    plain = tmp_path / "plain"
    plain.write_bytes(b"".join(parts))
    try:
        site.start()
        mounted = site.mount(image)
        timed(mounted / "random", 0, 4096)  # the worker has started
        frame = FRAME_CHUNKS * CHUNK
        misses = []
        for number in range(1, 31):
            seconds, data = timed(mounted / "random", number * frame, 4096)
            assert data == parts[0][number * frame :][:4096]
            misses.append(seconds * 1000)
        whole = len(parts[1]) * 3
        cold = whole / MIB / timed(mounted / "sequential", 0, whole)[0]
        drop_caches()
        warm = whole / MIB / timed(mounted / "sequential", 0, whole)[0]
        drop_caches()
        disk = whole / MIB / timed(plain, 0, whole)[0]
    finally:
        site.end()
    figures = {
        "plane": lazy_plane,
        "kernel": os.uname().release,
        "miss_ms": statistics.median(misses),
        "miss_ms_quartiles": statistics.quantiles(misses, n=4)[::2],
        "fill_mib_s": cold,
        "cached_mib_s": warm,
        "plain_file_mib_s": disk,
    }
    (SHARE / f"speed-{lazy_plane}.json").write_text(json.dumps(figures))
    assert all(value > 0 for value in figures.values() if isinstance(value, float))


pytestmark = pytest.mark.timeout(600)
