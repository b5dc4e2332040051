"""Profiles on a host: what its runs touched, what stores said, and what becomes of both."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from handmade import ImageMaker, make_wide
from profilekit import facts, run_of

from erofsgen.errors import FormatError, NotFoundError, RemoteError, UnsupportedError
from erofsgen.host.cache.cache import HostCache
from erofsgen.host.cache.manage import clear, collect
from erofsgen.host.profiles import COUNT, HostProfiles
from erofsgen.host.profilework import push
from erofsgen.profile import beside
from erofsgen.profile.trace import TOUCH, Trace
from erofsgen.store.directory import DirectoryStore
from erofsgen.store.image import Image

ONE, OTHER = "sha256:" + "1" * 64, "sha256:" + "2" * 64


@pytest.fixture
def profiles(tmp_path: Path) -> HostProfiles:
    return HostProfiles(tmp_path / "host")


@pytest.fixture
def image(maker: ImageMaker) -> Image:
    return make_wide(maker).image


def a_trace(command: str = "app", started: float = 1.0) -> Trace:
    return Trace(ONE, command, "fuse", started, True, ["0" * 64], [(1, "x")], ["unknown"], np.zeros(2, TOUCH))


def test_runs_add_up(profiles: HostProfiles, image: Image):
    assert profiles.recorded(ONE) == profiles.fetched(ONE) == profiles.digests() == []
    assert profiles.find(ONE, "app") is None
    first = profiles.add(ONE, run_of(image, [0, 1]))
    assert first.runs == 1
    second = profiles.add(ONE, run_of(image, [1, 2]))
    assert second.runs == 2
    (found,) = HostProfiles(profiles.root.parent).recorded(ONE)
    assert facts(found) == facts(second)
    assert profiles.digests() == [ONE]
    assert profiles.recorded(OTHER) == []


def test_what_a_store_said_is_merged_in(profiles: HostProfiles, image: Image):
    profiles.add(ONE, run_of(image, [0]))
    profiles.keep(ONE, [run_of(image, [0, 1]), run_of(image, [5], command="other")])
    merged = profiles.find(ONE, "app")
    assert (merged.runs, merged.confidence().tolist()) == (2, [1.0, 0.5])
    assert profiles.find(ONE, "other").runs == 1
    assert profiles.find(ONE, "missing") is None
    assert {profile.command: profile.runs for profile in profiles.all(ONE)} == {"app": 2, "other": 1}
    assert len(profiles.recorded(ONE)) == 1
    profiles.keep(ONE, [run_of(image, [5], command="third")])
    assert [profile.command for profile in profiles.fetched(ONE)] == ["third"]
    assert profiles.find(ONE, "app").runs == 1
    profiles.keep(OTHER, [])
    assert profiles.digests() == [ONE]


def test_the_best_for_a_command(profiles: HostProfiles, image: Image):
    profiles.add(ONE, run_of(image, [0], command="serve --port 1"))
    profiles.keep(ONE, [run_of(image, [1], command="serve --port 2")])
    assert profiles.best(ONE, "serve --port 2").command == "serve --port 2"
    assert profiles.best(ONE, "serve --port 3") is not None
    assert profiles.best(ONE, "serve") is None


@pytest.mark.parametrize("command", ["x" * 300, "cat '\udcff'"])
def test_commands_that_nobody_could_keep(profiles: HostProfiles, image: Image, command: str):
    """Whoever gave one finds its profile by it all the same."""
    profiles.add(ONE, run_of(image, [0], command=command))
    assert profiles.add(ONE, run_of(image, [1], command=command)).runs == 2
    profiles.put_trace(a_trace(command))
    assert profiles.find(ONE, command).runs == profiles.best(ONE, command).runs == 2
    assert profiles.trace(ONE, command) is not None
    profiles.remove(ONE, command)
    assert profiles.all(ONE) == profiles.traces(ONE) == []


def test_commands_are_bounded(profiles: HostProfiles, image: Image):
    """The ones that ran last stay."""
    for number in range(COUNT + 3):
        profiles.add(ONE, run_of(image, [0], command=f"c{number}"))
        os.utime(max(profiles.root.glob("*/*.profile"), key=lambda path: path.stat().st_mtime_ns), (number, number))
        profiles.put_trace(a_trace(f"c{number}"))
    assert {profile.command for profile in profiles.recorded(ONE)} == {f"c{number}" for number in range(3, COUNT + 3)}
    assert len(profiles.traces(ONE)) == COUNT


def test_traces(profiles: HostProfiles):
    assert profiles.trace(ONE, "app") is None
    for started in (1.0, 2.0):
        profiles.put_trace(a_trace(started=started))
    profiles.put_trace(a_trace("other"))
    assert profiles.trace(ONE, "app").started == 2.0
    assert [trace.command for trace in profiles.traces(ONE)] == ["other", "app"]
    huge = np.frombuffer(np.random.default_rng(1).bytes(TOUCH.itemsize * 800_000), TOUCH)
    profiles.put_trace(Trace(ONE, "app", "fuse", 3.0, True, [], [], [], huge))
    assert profiles.trace(ONE, "app").started == 2.0


def test_forgetting(profiles: HostProfiles, image: Image):
    for command in ("app", "other"):
        profiles.add(ONE, run_of(image, [0], command=command))
        profiles.put_trace(a_trace(command))
    profiles.keep(ONE, [run_of(image, [0])])
    profiles.remove(ONE, "app")
    assert [profile.command for profile in profiles.all(ONE)] == ["other"]
    assert profiles.trace(ONE, "app") is None
    profiles.remove(ONE)
    profiles.remove(OTHER)
    assert profiles.digests() == []


def test_damage_counts_as_nothing(profiles: HostProfiles, image: Image):
    """As after a power failure."""
    profiles.add(ONE, run_of(image, [0]))
    profiles.put_trace(a_trace())
    for path in profiles.root.glob("*/*"):
        path.write_bytes(path.read_bytes()[:20])
    assert profiles.recorded(ONE) == []
    assert profiles.find(ONE, "app") is None
    assert profiles.trace(ONE, "app") is None
    assert profiles.add(ONE, run_of(image, [0])).runs == 1
    for digest in ("../../x", "sha256:x", ""):
        with pytest.raises(FormatError, match="not a sha256 digest"):
            profiles.add(digest, run_of(image, [0]))


def test_nobody_but_the_owner_reads_them(profiles: HostProfiles, image: Image):
    profiles.add(ONE, run_of(image, [0]))
    assert profiles.root.stat().st_mode & 0o777 == 0o700


def test_many_may_add_at_once(profiles: HostProfiles, image: Image):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: profiles.add(ONE, run_of(image, [number])), range(12)))
    (found,) = profiles.recorded(ONE)
    assert found.runs == len(found.rows) == 12


# --- with the store --------------------------------------------------------------------------------------------------


def test_pulling_brings_profiles(tmp_path: Path, image: Image):
    cache = HostCache(tmp_path / "host")
    cache.add(image)
    profiles = HostProfiles(cache.root)
    assert profiles.digests() == []
    clear(cache)
    beside.save(image.store, image.descriptor, [run_of(image, [3])])
    cache.add(image)
    assert [profile.runs for profile in profiles.fetched(image.digest)] == [1]
    asked: list[str] = []
    read = image.store.read_into
    image.store.read_into = lambda digest, *rest: (asked.append(digest), read(digest, *rest))
    profiles.refresh(image.store, image.digest)
    assert asked == [], "what is known is not read again"
    del image.store.read_into
    beside.add(image.store, image.descriptor, run_of(image, [4]))
    profiles.refresh(image.store, image.digest)
    assert [profile.runs for profile in profiles.fetched(image.digest)] == [2]
    beside.save(image.store, image.descriptor, [])
    profiles.refresh(image.store, image.digest)
    assert profiles.fetched(image.digest) == []


class Slow(DirectoryStore):
    """Far away: a round trip takes its time, and profiles may take more or fail."""

    latency = 0.0
    profiles_take = 0.0
    broken = False

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.trips: dict[str, list[int]] = {}

    def _trip(self) -> None:
        self.trips.setdefault(threading.current_thread().name.partition("_")[0], []).append(1)
        time.sleep(self.latency)

    def size(self, digest: str) -> int | None:
        self._trip()
        return super().size(digest)

    def read_into(self, digest: str, offset: int, buffer: memoryview) -> None:
        self._trip()
        super().read_into(digest, offset, buffer)

    def profiles(self, image: str):
        self._trip()
        time.sleep(self.profiles_take)
        if self.broken:
            raise RemoteError("no answer")
        return super().profiles(image)


def test_profiles_add_no_round_trips(tmp_path: Path, image: Image):
    """Config, manifest, tables of contents and profiles come while the index does."""
    beside.save(image.store, image.descriptor, [run_of(image, [3])])
    store = Slow(Path(image.store.url))
    opened = Image.open(store, "wide")
    store.trips.clear()
    HostCache(tmp_path / "host").add(opened)
    counts = {thread: len(trips) for thread, trips in store.trips.items()}
    assert counts["MainThread"] == 1, "the index"
    assert counts["profiles"] == 2, "their name and their manifest, which a small profile is in"
    assert counts["add"] == 2 + len(opened.packs), "manifest, config, tables of contents"


def test_profiles_are_not_waited_for(tmp_path: Path, image: Image, monkeypatch: pytest.MonkeyPatch):
    beside.save(image.store, image.descriptor, [run_of(image, [3])])
    store = Slow(Path(image.store.url))
    opened = Image.open(store, "wide")
    cache, profiles = HostCache(tmp_path / "host"), HostProfiles(tmp_path / "host")
    monkeypatch.setattr("erofsgen.host.cache.cache._PATIENCE", 0.1)
    store.profiles_take = 1.0
    began = time.monotonic()
    cache.add(opened)
    cache.add(opened)
    assert time.monotonic() - began < 0.9
    while not profiles.fetched(image.digest):
        assert time.monotonic() - began < 20
        time.sleep(0.05)
    store.profiles_take, store.broken = 0.0, True
    clear(cache)
    assert HostProfiles(cache.root).digests() == [image.digest]
    cache.add(opened)
    assert len(profiles.fetched(image.digest)) == 1, "what was known stays"


def test_pushing(profiles: HostProfiles, image: Image):
    """Digests are filled in; what was pushed counts once."""
    with pytest.raises(NotFoundError, match="no profile"):
        push(profiles, image)
    profiles.add(image.digest, run_of(image, [0, 1]))
    beside.save(image.store, image.descriptor, [run_of(image, [1, 2])])
    assert [profile.runs for profile in push(profiles, image)] == [1]
    (there,) = beside.load(image.store, image.digest)
    assert there.runs == 2
    assert [bool(any(row["digest"].tobytes())) for row in there.rows].count(True) == 2
    assert profiles.recorded(image.digest) == []
    assert profiles.find(image.digest, "app").encode() == there.encode()
    profiles.add(image.digest, run_of(image, [0]))
    assert profiles.find(image.digest, "app").runs == 3
    push(profiles, image)
    assert beside.load(image.store, image.digest)[0].runs == 3


def test_a_run_during_a_push_stays(profiles: HostProfiles, image: Image):
    taken = profiles.add(image.digest, run_of(image, [0]))
    profiles.add(image.digest, run_of(image, [1]))
    profiles.pushed(image.digest, [taken], [taken])
    assert [profile.runs for profile in profiles.recorded(image.digest)] == [2]


def test_a_push_that_fails_loses_nothing(profiles: HostProfiles, image: Image, monkeypatch: pytest.MonkeyPatch):
    profiles.add(image.digest, run_of(image, [0]))

    def fail(*_: object) -> None:
        raise UnsupportedError("read only")

    monkeypatch.setattr(image.store, "tag_profiles", fail)
    with pytest.raises(UnsupportedError):
        push(profiles, image)
    assert len(profiles.recorded(image.digest)) == 1


# --- with the cache --------------------------------------------------------------------------------------------------


def test_profiles_outlive_their_image_in_the_cache(tmp_path: Path, image: Image):
    """It may come back; for a month."""
    cache, profiles = HostCache(tmp_path / "host"), HostProfiles(tmp_path / "host")
    cache.add(image)
    profiles.add(image.digest, run_of(image, [0]))
    profiles.add(ONE, run_of(image, [0]))
    directory = profiles.root / ("1" * 64)
    clear(cache)
    assert set(profiles.digests()) == {ONE, image.digest}
    os.utime(directory, (1, 1))
    assert collect(cache, dry_run=True).leftovers == [str(directory)]
    assert len(profiles.digests()) == 2
    assert collect(cache).leftovers == [str(directory)]
    assert profiles.digests() == [image.digest]
    cache.add(image)
    os.utime(profiles.root / image.digest.removeprefix("sha256:"), (1, 1))
    assert collect(cache).leftovers == []
