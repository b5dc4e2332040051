"""What the benchmarks of lazy mounts stand on: hosts with a daemon, plain EROFS beside them, reads."""

from __future__ import annotations

import os
import select
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import numpy as np
import peers
import zstandard
from blake3 import blake3
from fill import SKEWED
from measure import run

from erofsgen.errors import ErofsgenError
from erofsgen.host import linux
from erofsgen.host.cache.cache import CachedImage, HostCache
from erofsgen.host.cache.evict import evict
from erofsgen.host.daemon.client import Client
from erofsgen.host.mount import superblock
from erofsgen.host.mount.mounts import mount, unmount
from erofsgen.host.mount.state import Plane
from erofsgen.host.pull import complete
from erofsgen.pack.toc import Toc
from erofsgen.store.base import Store
from erofsgen.store.directory import DirectoryStore
from erofsgen.store.image import Image

EROFSGEN = Path(sys.executable).with_name("erofsgen")
MIB = 1 << 20
NEVER_COMPLETE = ("--worker=--complete-at", "--worker=1.01")
"""Of a daemon: leave frames missing that nobody reads."""
FIRST, LARGE = "a-first", "b-large"
"""Files of :func:`make_data`: a frame that lies before all others, so that no read ahead reaches it, and the rest."""
_PATIENCE = 30.0


class EmptyHost:
    """A host cache of its own below ``place`` with nothing in it, and a daemon for ``plane`` with ``options``.

    Afterwards nothing of it is mounted, no process runs, no file is left unless ``keep`` is set.
    """

    def __init__(
        self, place: Path, options: Sequence[str] = (), *, plane: Plane = "fanotify", keep: bool = False
    ) -> None:
        self.root = place / "root"
        self.plane = plane
        self._place = place
        self._options = ["--plane", plane, *options]
        self._keep = keep
        self._pid = 0

    def __enter__(self) -> Self:
        try:
            self.call("hello")
            self.engine()  # the worker takes its time to import what it needs
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()
        if not self._keep:
            shutil.rmtree(self._place, ignore_errors=True)

    def stop(self) -> None:
        """End what runs and unmount what is mounted; the files stay."""
        stop(self.root, self._pid)
        self._pid = 0
        unmount_below(self._place)
        for pid in servers(self.root):  # what starts them waits a minute for more to do
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    def call(self, do: str) -> dict[str, Any]:
        """What the daemon replies, which is started where none runs."""
        with Client.start(self.root, self._options) as client:
            facts = client.call(do)
        self._pid = facts.get("pid", self._pid)
        return facts

    def engine(self) -> dict[str, Any]:
        """Counters of the fill engine."""
        with Client.start(self.root, self._options) as client:
            counters: dict[str, Any] = client.worker("status")["engine"]
        return counters


class Host(EmptyHost):
    """A host with what a lazy mount of one image of ``store`` needs, and a place to mount it."""

    def __init__(
        self,
        place: Path,
        store: Store,
        name: str,
        options: Sequence[str] = (),
        *,
        plane: Plane = "fanotify",
    ) -> None:
        super().__init__(place, options, plane=plane)
        self.target = place / "mnt"
        self.target.mkdir(parents=True)
        self.cache = HostCache(self.root)
        self.image: CachedImage = self.cache.add(Image.open(store, name))

    def complete(self) -> None:
        """Have all of the image in the cache."""
        complete(self.cache, self.image, None)

    def files(self) -> list[Path]:
        """What there is to read of the image locally: its index and its data files."""
        return [self.image.index, *self.image.devices()]

    def mount(self, target: Path | None = None, *, read_ahead: int | None = None) -> Path:
        """``read_ahead`` in KiB, None: what mount() does by default."""
        target = target or self.target
        asked = {} if read_ahead is None else {"read_ahead": read_ahead}
        mount(self.image, target, root=self.root, plane=self.plane, **asked)
        return target

    def unmount(self, target: Path | None = None) -> None:
        unmount(target or self.target, root=self.root)

    def wait_unmarked(self) -> None:
        """Until no pack is under a mark: all are complete, or nothing uses them."""
        until = time.monotonic() + _PATIENCE
        while self.call("status").get("marked_packs"):  # other planes have none
            if time.monotonic() > until:
                raise SystemExit("bench: packs keep their marks")
            time.sleep(0.02)

    def clear(self) -> None:
        """Give up all frames. Nothing may be mounted."""
        self.wait_unmarked()
        files = self.cache.layout.data_files()
        until = time.monotonic() + _PATIENCE
        while sum(os.stat(path).st_blocks * 512 for path in files) > MIB:  # holes take a block or two
            evict(files, 1 << 50)  # takes nothing while the worker has a pack open
            if time.monotonic() > until:
                raise SystemExit("bench: the cache could not be cleared")
            time.sleep(0.02)

    @contextmanager
    def mounted(self, *, read_ahead: int | None = None) -> Iterator[Path]:
        yield self.mount(read_ahead=read_ahead)
        self.unmount()


def stop(root: Path, pid: int) -> None:
    """End the daemon of ``root``, whose supervisor is our child ``pid``."""
    with suppress(ErofsgenError):
        client = Client.connect(root)
        if client is not None:
            with client:
                client.call("stop", force=True)
    with suppress(ChildProcessError, ProcessLookupError):
        if pid:
            with open(os.pidfd_open(pid)) as ended:
                if not select.select([ended], [], [], _PATIENCE)[0]:
                    os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def servers(root: Path) -> list[int]:
    """The processes that answer for FUSE mounts of ``root``, and the one that starts them."""
    found = []
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        with suppress(OSError):  # it may have gone
            arguments = Path("/proc", pid, "cmdline").read_bytes().split(b"\0")
            if b"fusefallback.server" in arguments and b"--root=" + os.fsencode(root) in arguments:
                found.append(int(pid))
    return found


def unmount_below(place: Path) -> None:
    """Detach whatever is mounted there."""
    for point in reversed(linux.mount_points()):
        if Path(os.fsdecode(point.target)).is_relative_to(place):
            subprocess.run(["umount", "--lazy", point.target], check=False)


class Plain:
    """The same bytes without us: index and data files of a cache of their own, complete before they are mounted."""

    def __init__(self, place: Path, store: DirectoryStore, name: str) -> None:
        self._place = place
        self._servers = ExitStack()
        self.index, self.devices = HostCache(place / "root").materialise(Image.open(store, name))

    def __enter__(self) -> Plain:
        return self

    def __exit__(self, *exc: object) -> None:
        self._servers.close()
        unmount_below(self._place)
        shutil.rmtree(self._place, ignore_errors=True)

    def files(self) -> list[Path]:
        return [self.index, *self.devices]

    def mount(self, name: str, *, read_ahead: int | None = None) -> Path:
        """File-backed EROFS by the kernel; ``read_ahead`` KiB, None: its default of 128."""
        target = self._place / name
        target.mkdir()
        top = superblock.mount_files(self.index, self.devices, read_ahead=read_ahead)
        place = os.open(target, os.O_PATH | os.O_DIRECTORY)
        linux.move_mount(top, place)
        os.close(place)
        os.close(top)
        return target

    def erofsfuse(self, name: str = "fuse", *options: str) -> Path | None:
        """The same by erofsfuse, where that can be had."""
        program = peers.erofsfuse()
        if program is None:
            return None
        devices = [f"--device={path}" for path in self.devices]
        command = [program, "-f", *options, *devices, self.index, self._place / name]
        return self._servers.enter_context(peers.served(command, self._place / name))


def make_data(place: Path, mebibytes: int, *, compressible: bool) -> None:
    """A root file system of one file of a frame and a large one; no chunk is like another."""
    place.mkdir(parents=True)
    numbers = np.random.default_rng(compressible)
    for name, count in ((FIRST, 1), (LARGE, mebibytes)):
        with open(place / name, "wb") as file:
            for _ in range(count):
                data = numbers.bytes(MIB)
                file.write(data.translate(SKEWED) if compressible else data)


def build(store: Store, source: str, name: str) -> None:
    run(EROFSGEN, "--store", store.url, "build", "--json", "--tag", name, source)


# --- measuring -------------------------------------------------------------------------------------------------------


def alternate(rounds: int, sides: dict[str, Callable[[], float]]) -> dict[str, list[float]]:
    """What every side measures, ``rounds`` times, one side after the other, the order turning from round to round."""
    values: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides) if number % 2 == 0 else reversed(sides):
            values[name].append(sides[name]())
    return values


def paired(above: Sequence[float], below: Sequence[float]) -> float:
    """The median of the rounds' ratios: two runs of a round had the same neighbours on the machine."""
    return statistics.median(one / other for one, other in zip(above, below, strict=True))


def drop_caches(what: int = 3) -> None:
    """1: data, 2: dentries and inodes, 3: both."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text(str(what))


def timed(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def sequential(path: Path) -> float:
    """MiB a second of a reader of 1 MiB at a time."""
    buffer = bytearray(MIB)
    size = 0
    begun = time.perf_counter()
    with open(path, "rb", buffering=0) as file:
        while got := file.readinto(buffer):
            size += got
    return size / MIB / (time.perf_counter() - begun)


def random_blocks(path: Path, offsets: Sequence[int]) -> float:
    """MiB a second of a reader of 4 KiB at each of ``offsets``."""
    buffers = [bytearray(4096)]
    with open(path, "rb", buffering=0) as file:
        descriptor, read = file.fileno(), os.preadv
        begun = time.perf_counter()
        for offset in offsets:
            read(descriptor, buffers, offset)
        return len(offsets) * 4096 / MIB / (time.perf_counter() - begun)


def walk(top: Path) -> int:
    """Directories listed, every entry's lstat(2) made; how many there were."""
    count = 0
    for directory, directories, files in os.walk(top):
        for name in (*directories, *files):
            os.lstat(f"{directory}/{name}")
            count += 1
    return count


def parts_alone(store: DirectoryStore, name: str, work: Path) -> dict[str, float]:
    """Seconds of each part of filling an image, in one thread, eight frames at a time, into a file in ``work``."""
    seconds: dict[str, float] = defaultdict(float)
    before = 0.0

    def lap(what: str = "") -> None:
        nonlocal before
        now = time.perf_counter()
        if what:
            seconds[what] += now - before
        before = now

    with tempfile.TemporaryFile(dir=work) as file:
        for pack in Image.open(store, name).packs:
            toc = Toc(store.read(pack.digest, pack.toc.offset, pack.toc.size), pack.toc, what=name)
            offsets, sizes, places = toc.offsets.tolist(), toc.sizes.tolist(), toc.device_offsets.tolist()
            for first in range(0, len(toc), 8):
                frames = range(first, min(first + 8, len(toc)))
                begin, end = offsets[first], offsets[frames[-1]] + sizes[frames[-1]]
                lap()
                data = store.read(pack.digest, begin, end - begin)
                lap("read")
                pieces = [memoryview(data)[offsets[frame] - begin :][: sizes[frame]] for frame in frames]
                lap()
                if not pack.raw:
                    pieces = [zstandard.ZstdDecompressor().decompress(piece) for piece in pieces]
                    lap("unzstd")
                digests = [blake3(piece).digest() for piece in pieces]
                lap("BLAKE3")
                if digests != [toc.digest(frame) for frame in frames]:
                    raise SystemExit("bench: wrong bytes")
                lap()
                for frame, piece in zip(frames, pieces, strict=True):
                    os.pwrite(file.fileno(), piece, places[frame])
                lap("write")
    return seconds
