"""A host under one plane: its root, its store, its mounts and its daemon, on a disk of the guest."""

from __future__ import annotations

import os
import random
import subprocess
from pathlib import Path

from handmade import ImageMaker, erofs_mounts_below
from lazykit import Host, eventually, processes

from erofsgen.host import linux
from erofsgen.host.daemon.planes import LAZY
from erofsgen.host.mount.mounts import unmount
from erofsgen.store.directory import DirectoryStore

PLANES = (*LAZY, "eager")


class Site:
    """Below ``place``. ``options``: of the daemon, which completes no packs by itself and reads nothing ahead.

    A read may wait for long: without KVM a worker takes seconds to start, and many on a busy machine.
    """

    running = None

    def __init__(self, place, plane, **options):
        self.place = place
        self.plane = plane
        self.store = place / "store"
        self.maker = ImageMaker(DirectoryStore(self.store))
        self.mounted = []
        self.host = Host(place / "root", plane, **{"read_ahead": 0, "deadline": 120, **options})
        self.started = False

    def start(self, *more):
        """Start the daemon; of plane fscache after ending any other site's: a machine has one /dev/cachefiles."""
        if self.plane != "eager":
            if self.plane == "fscache":
                if Site.running is not None and Site.running is not self:
                    Site.running.end()
                Site.running = self
            self.host.start("--worker=--complete-at", "--worker=2", *more)
            self.started = True

    def mount(self, image, name="mnt", **more):
        if not self.started:
            self.start()
        target = self.place / name
        self.host.mount(image, target, **more)
        self.mounted.append(target)
        return target

    def unmount(self, target, **options):
        unmount(target, root=self.host.root, **options)
        self.mounted.remove(target)

    def frames(self):
        """How many frames the worker has brought."""
        return 0 if self.plane == "eager" else self.host.engine()["frames"]

    def idle(self):
        """Whether the kernel has let everything go."""
        status = self.host.status()
        return not any(status.get(fact, 0) for fact in ("open_objects", "marked_packs", "servers"))

    def end(self):
        try:
            if self.plane != "eager":
                self.started = False
                self.host.end()
                eventually(lambda: processes(self.host.root) == [])
        finally:
            for point in erofs_mounts_below(self.place):
                linux.umount(point.target, linux.MNT_DETACH)


def drop_caches():
    """Let nothing be in the page cache."""
    subprocess.run(["sync"], check=True)
    Path("/proc/sys/vm/drop_caches").write_text("3")


def read(path, offset, length):
    """Up to ``length`` bytes, however many reads it takes. Raises what a read fails with."""
    pieces = []
    with open(path, "rb", buffering=0) as file:
        while length and (piece := os.pread(file.fileno(), length, offset)):
            pieces.append(piece)
            offset, length = offset + len(piece), length - len(piece)
    return b"".join(pieces)


def check_reads(top, files, seed, count=20):
    """Read ``count`` ranges at random; all must be right."""
    chance = random.Random(seed)
    for _ in range(count):
        name = chance.choice(list(files))
        content = files[name]
        offset = chance.randrange(len(content))
        length = chance.choice([1, 511, 4096, 70_000, 600_000])
        found, right = read(top / name, offset, length), content[offset : offset + length]
        if found != right:
            wrong = next((at for at, pair in enumerate(zip(found, right, strict=False)) if len(set(pair)) > 1), None)
            zeros = found.count(0)
            raise AssertionError(f"{name}: {offset}+{length}: {len(found)} bytes, {zeros} zeros, wrong from {wrong} on")
