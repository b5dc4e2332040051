"""What building an image costs, against unpacking it and against mkfs.erofs, on one machine in one run.

The inputs are in the page cache before every run, earlier writes are on disk, the output directory is fresh, and the
order turns from round to round. ``mkfs.erofs`` gets the tree umoci unpacked, so it neither reads nor merges layers.

Makes the images on the first run (see :mod:`images`); ``--quick`` checks on a small one that everything works: its
figures say nothing. Needs root, since umoci restores owners and devices.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import images
from images import Image
from measure import REPOSITORY, Goal, Run, Series, machine, print_goals, print_series, read_through, run

EROFSGEN = Path(sys.executable).with_name("erofsgen")
MIB = 1 << 20
PARTS = ["build", "memory", "files"]


class Bench:
    """The runs made so far, by name, and how to make more."""

    def __init__(self, work: Path, options: argparse.Namespace) -> None:
        self.work = work
        self.options = options
        self.runs: dict[str, list[Run]] = defaultdict(list)
        self.mkfs = ""
        self.facts: dict[str, float] = {}

    def note(self, name: str, result: Run) -> Run:
        self.runs[name].append(result)
        print(f"bench: {name}: {result.seconds:.2f} s, {result.peak / MIB:.0f} MiB", file=sys.stderr, flush=True)
        return result

    @contextmanager
    def fresh(self, name: str) -> Iterator[Path]:
        """A path that does not exist yet; what is made there is removed again."""
        place = Path(tempfile.mkdtemp(dir=self.work)) / name
        try:
            yield place
        finally:
            shutil.rmtree(place.parent)

    def erofsgen(self, name: str, store: Path, image: Image) -> Run:
        settle(image.layout / "blobs")
        return self.note(name, run(EROFSGEN, "--store", store, "build", "--json", f"oci:{image.reference}"))

    def series(self) -> dict[str, Series]:
        return {name: Series(runs) for name, runs in self.runs.items()}

    # --- the measurements --------------------------------------------------------------------------------------------

    def full_and_rebuild(self, base: Image, changed: Image) -> None:
        """``erofsgen build`` into a fresh store, then of the same image with a small layer more."""
        with self.fresh("store") as store:
            self.facts = json.loads(self.erofsgen("build", store, base).output)
            self.erofsgen("rebuild", store, changed)

    def unpack_and_mkfs(self, base: Image) -> None:
        """``umoci unpack`` into a fresh directory, then ``mkfs.erofs`` of the tree."""
        with self.fresh("bundle") as bundle:
            settle(base.layout / "blobs")
            self.note("umoci unpack", run("umoci", "unpack", "--image", base.reference, bundle))
            settle(bundle)
            command = [self.mkfs, "--quiet", f"-zzstd,level={self.options.level}", f"--workers={self.options.workers}"]
            self.note("mkfs.erofs", run(*command, bundle.parent / "image.erofs", bundle / "rootfs"))

    def rounds(self, base: Image, changed: Image) -> None:
        parts: list[Callable[[], None]] = [
            lambda: self.full_and_rebuild(base, changed),
            lambda: self.unpack_and_mkfs(base),
        ]
        for number in range(self.options.rounds):
            for part in parts if number % 2 == 0 else reversed(parts):
                part()

    def once(self, name: str, image: Image) -> None:
        """A build into a fresh store."""
        with self.fresh("store") as store:
            self.erofsgen(name, store, image)


def settle(*inputs: Path) -> None:
    """Inputs in the page cache, nothing left to write back."""
    os.sync()
    read_through(*inputs)


def fetch_mkfs() -> str:
    """The path of a mkfs.erofs with zstd and threads."""
    script = REPOSITORY / "packaging" / "fetch-erofs-utils"
    return subprocess.run([script], stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def measure(bench: Bench, parts: list[str], *, quick: bool) -> Iterator[Goal]:
    """Make the runs of these parts; yield their goals."""
    base = images.quick() if quick else images.service()

    if "build" in parts:
        bench.mkfs = fetch_mkfs()
        bench.rounds(base, images.quick_changed() if quick else images.changed())
        series = bench.series()
        full = series["build"].seconds
        yield Goal("build time / umoci unpack time", full / series["umoci unpack"].seconds, 0.3)
        yield Goal("build time / mkfs.erofs time", full / series["mkfs.erofs"].seconds, 0.5)
        yield Goal("rebuild time after a small top layer / build time", series["rebuild"].seconds / full, 0.1)
        yield Goal("index bytes per inode", bench.facts["index_size"] / bench.facts["inodes"], 100)

    if "memory" in parts:
        large = images.quick_large() if quick else images.large()
        if not bench.runs["build"]:
            bench.once("build", base)
        bench.once("build, large image", large)
        series = bench.series()
        peak, large_peak = series["build"].peak, series["build, large image"].peak
        factor = large.tar_size / base.tar_size
        yield Goal("peak memory of a build, MiB", max(peak, large_peak) / MIB, 400)
        yield Goal(f"peak memory of a {factor:.1f} x larger image / peak memory", large_peak / peak, 1.1)

    if "files" in parts:
        few, many = (2_000, 20_000) if quick else (100_000, 1_000_000)
        for count in (few, many):
            bench.once(f"build, {count:,} files", images.small_files(count))
        series = bench.series()
        ratio = series[f"build, {many:,} files"].seconds / series[f"build, {few:,} files"].seconds
        yield Goal(f"build time of {many:,} files / {few:,} files", ratio, 10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--part", action="append", choices=PARTS, help="only these parts; repeatable")
    parser.add_argument("--rounds", type=int, help="runs of every command in the build part (default 3)")
    parser.add_argument("--level", type=int, default=3, help="zstd level for mkfs.erofs (default 3)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="threads for mkfs.erofs (default: cores)")
    parser.add_argument("--work", type=Path, help="where stores and trees go (default .cache/bench)")
    parser.add_argument("--quick", action="store_true", help="small images, one round: does it all work?")
    parser.add_argument("--json", action="store_true", help="one JSON object per goal on standard output")
    options = parser.parse_args()
    options.rounds = options.rounds or (1 if options.quick else 3)
    if os.geteuid() != 0:
        sys.exit("bench: umoci restores owners and devices: run as root")

    work = options.work or REPOSITORY / ".cache" / "bench"
    work.mkdir(parents=True, exist_ok=True)
    print(f"bench: {machine()}", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=work, prefix="build-") as scratch:
        bench = Bench(Path(scratch), options)
        goals = list(measure(bench, options.part or PARTS, quick=options.quick))
    print_series("build", bench.series(), as_json=options.json)
    print_goals(goals, as_json=options.json)


if __name__ == "__main__":
    main()
