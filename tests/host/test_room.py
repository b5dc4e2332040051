"""The cache's room: its limit, what goes first, what must not go, and several directories."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from contextlib import closing

import pytest
from fillkit import WAIT
from handmade import CHUNK, chunks_of, contents
from hypothesis import given
from hypothesis import strategies as st

from erofsgen.errors import StorageError
from erofsgen.host import linux
from erofsgen.host.cache import presence
from erofsgen.host.cache.cache import HostCache
from erofsgen.host.cache.files import Layout
from erofsgen.host.cache.room import FRAME_COST, Room
from erofsgen.host.mount.superblock import mount_files
from erofsgen.store.image import open_pack

FRAME = 4 * CHUNK
META = 1 << 20
"""Enough for indexes, maps and tables of contents."""


@pytest.fixture
def images(maker):
    """Makes images ``image-0`` … of one pack each with so many whole frames."""

    def make(*frames):
        made = []
        for number, count in enumerate(frames):
            (content,) = contents(number, count * FRAME)
            made.append(maker.image(f"image-{number}", {"file": content}, [maker.pack(chunks_of(content))]))
        return made

    return make


def present(cache, image):
    """Frames that count, of an image with one pack."""
    with closing(cache.open_pack(image.packs[0])) as file:
        return [frame for frame in range(len(file.toc)) if file.ready(frame, frame)]


def bring(cache, image, frames):
    pack = image.packs[0]
    data = open_pack(image.store, pack).read(0, pack.device_size)
    with closing(cache.open_pack(pack)) as file:
        for frame in frames:
            start, size = int(file.toc.device_offsets[frame]), int(file.toc.device_sizes[frame])
            file.write_frame(frame, data[start : start + size])


def use(monkeypatch, cache, image, frame, minute):
    """Let a frame have been used in the given minute."""
    with closing(cache.open_pack(image.packs[0])) as file, monkeypatch.context() as patch:
        patch.setattr(presence.time, "time", lambda: minute * 60.0)
        file.presence.touch(frame, frame)


def test_the_limit_is_never_exceeded(images, tmp_path):
    """Four threads bring four times of what fits, and throw out what the others have brought."""
    made = images(*[8] * 8)
    limit = META + 16 * (FRAME + FRAME_COST)
    cache = HostCache(tmp_path / "root", max_bytes=limit)
    for image in made:
        cache.add(image)
    cache.room.count()
    errors, most, brought, ended = [], [0], [], threading.Event()

    def fill(first):
        for turn in range(16):
            image, frames = made[(first + turn) % len(made)], range(4 * (turn % 2), 4 * (turn % 2) + 4)
            try:
                bring(cache, image, frames)
                brought.append(image)
            except Exception as error:  # whatever it is, it is the test's
                errors.append(error)

    def blocks():
        places = (cache.layout.images, *cache.layout.directories)
        return [(path, path.stat().st_blocks) for place in places for path in sorted(place.iterdir())]

    def sample():
        before = blocks()
        while not ended.is_set():
            now = blocks()
            if now == before:  # files are looked at one after the other: only then they were so all at one time
                most[0] = max(most[0], sum(count * 512 for _, count in now))
            before = now

    threads = [threading.Thread(target=fill, args=(2 * number,)) for number in range(4)]
    sampler = threading.Thread(target=sample)
    sampler.start()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    ended.set()
    sampler.join(WAIT)
    # frames are taken only from packs that nobody has open just then, so now and again there may be no room
    assert all("the cache is full" in str(error) for error in errors), errors
    assert len(brought) > 8, "that is twice what fits"
    assert 8 * FRAME < most[0] <= limit
    assert cache.layout.allocated() <= limit
    for image in made:
        check(cache, image)


def check(cache, image):
    """All frames that count are right."""
    right = open_pack(image.store, image.packs[0]).read(0, image.packs[0].device_size)
    data = cache.files(image.packs[0].hex).data.read_bytes()
    for frame in present(cache, image):
        assert data[frame * FRAME : (frame + 1) * FRAME] == right[frame * FRAME : (frame + 1) * FRAME]


def test_images_one_after_the_other(images, tmp_path):
    """Each is brought as a whole by throwing others out."""
    made = images(8, 8, 8)
    cache = HostCache(tmp_path / "root", max_bytes=META + 10 * FRAME)
    for image in made:
        _, devices = cache.materialise(image)
        assert devices[0].read_bytes() == open_pack(image.store, image.packs[0]).read(0, image.packs[0].device_size)
        assert cache.layout.allocated() <= META + 10 * FRAME
    assert len(present(cache, made[0])) < 8
    assert len(present(cache, made[2])) == 8


def test_the_least_recently_used_go_first(images, tmp_path, monkeypatch):
    """Frame by frame, whichever pack they are of."""
    one, two, three = images(4, 4, 4)
    cache = HostCache(tmp_path / "root", max_bytes=64 * FRAME)
    for image in (one, two, three):
        cache.add(image)
    bring(cache, one, range(4))
    bring(cache, two, range(4))
    for minute, (image, frame) in enumerate(
        [(two, 3), (one, 0), (two, 1), (one, 2), (one, 1), (two, 0), (two, 2), (one, 3)], 1000
    ):
        use(monkeypatch, cache, image, frame, minute)
    assert cache.evict(3 * (FRAME + FRAME_COST)) == 3 * (FRAME + FRAME_COST)
    assert present(cache, one) == [1, 2, 3]
    assert present(cache, two) == [0, 2]
    assert cache.evict(1) == FRAME + FRAME_COST
    assert present(cache, one) == [1, 3]


def test_eviction_gives_room_back(images, tmp_path):
    (image,) = images(4)
    cache = HostCache(tmp_path / "root", max_bytes=64 * FRAME)
    cache.add(image)
    bring(cache, image, range(4))
    before = cache.layout.allocated()
    cache.evict(2 * FRAME)
    assert before - cache.layout.allocated() == 2 * FRAME


def test_a_full_cache_says_so(images, tmp_path):
    """What somebody has open does not go."""
    one, two = images(8, 8)
    cache = HostCache(tmp_path / "root", max_bytes=META + 9 * FRAME)
    _, devices = cache.materialise(one)
    cached = cache.add(two)
    with devices[0].open("rb"), pytest.raises(StorageError, match="the cache is full") as caught, cache.filling():
        cache.fill(cached, lambda: two.store)
    assert "--max-bytes" in caught.value.hint
    assert len(present(cache, one)) == 8
    cache.materialise(two)
    assert len(present(cache, two)) == 8


def test_pinned_images_stay(images, tmp_path):
    one, two = images(8, 8)
    cache = HostCache(tmp_path / "root", max_bytes=META + 9 * FRAME)
    cache.materialise(one)
    config = cache.layout.config
    cache.layout.write(type(config)(config.directories, config.max_bytes, [one.digest]))
    with pytest.raises(StorageError, match="the cache is full"):
        cache.materialise(two)
    assert len(present(cache, one)) == 8
    cache.layout.write(config)
    cache.materialise(two)


@pytest.mark.mount
def test_what_a_mount_has_open_stays(images, root, tmp_path):
    """Even when it was detached, as long as a file of it is open."""
    one, two = images(8, 8)
    cache = HostCache(root, max_bytes=META + 9 * FRAME)
    index, devices = cache.materialise(one)
    place = tmp_path / "mnt"
    place.mkdir()
    attach(mount_files(index, devices), place)
    with (place / "file").open("rb") as file:
        with pytest.raises(StorageError, match="the cache is full"):
            cache.materialise(two)
        linux.umount(place, linux.MNT_DETACH)
        with pytest.raises(StorageError, match="the cache is full"):
            cache.materialise(two)
        assert file.read() == devices[0].read_bytes()
        assert len(present(cache, one)) == 8
    until = time.monotonic() + WAIT  # the kernel takes the superblock down when it likes
    while True:
        try:
            cache.materialise(two)
            break
        except StorageError:
            assert time.monotonic() < until
            time.sleep(0.01)
    assert len(present(cache, one)) < 8


def attach(mounted, place):
    """Attach a detached mount."""
    target = os.open(place, os.O_PATH | os.O_CLOEXEC)
    try:
        linux.move_mount(mounted, target)
    finally:
        os.close(target)
        os.close(mounted)


@pytest.mark.mount
def test_two_disks_take_turns(maker, root, make_file_system):
    places = [make_file_system("ext4", 24), make_file_system("ext4", 25)]
    made = [maker.pack(chunks_of(content)) for content in contents(5, *[8 * CHUNK] * 6)]
    files = dict(zip("abcdef", contents(5, *[8 * CHUNK] * 6), strict=True))
    image = maker.image("wide", dict(files), made)
    cache = HostCache(root, directories=places)
    _, devices = cache.materialise(image)
    assert [device.is_relative_to(places[0]) for device in devices] in ([True, False] * 3, [False, True] * 3)
    for slot, device in enumerate(devices):
        assert device.read_bytes() == open_pack(image.store, image.packs[slot]).read(0, image.packs[slot].device_size)
    assert HostCache(root).image(image.digest, "").devices() == devices, "the directories were recorded"


@given(st.lists(st.tuples(st.sampled_from("abr"), st.integers(0, 60)), max_size=40), st.integers(50, 200))
def test_the_ledger(tmp_path_factory, steps, limit):
    """Two openings of one ledger against a model: never beyond the limit, refused only where evicting did not help."""
    layout = Layout(tmp_path_factory.mktemp("ledger"))
    layout.configure(max_bytes=limit)
    used = unused = 0  # bytes reserved, and those of them that may be evicted

    def evict(wanted):
        nonlocal used, unused
        taken = min(wanted, unused)
        unused -= taken
        used -= taken
        rooms["b"].give_back(taken)
        return taken

    rooms = {name: Room(layout, evict) for name in "ab"}
    with contextlib.ExitStack() as opened:
        for room in rooms.values():
            opened.callback(room.close)
        rooms["a"].count()
        for who, size in steps:
            if who == "r":
                unused = min(used, unused + size)
                continue
            fits = used - unused + size <= limit
            if fits:
                rooms[who].reserve(size)
                used += size
            else:
                with pytest.raises(StorageError, match="the cache is full"):
                    rooms[who].reserve(size)
            assert used <= limit
            assert int.from_bytes((layout.root / "ledger").read_bytes()[16:], "little") == used


def test_what_is_used_is_known_with_and_without_a_limit(images, tmp_path):
    """Counted where there is no limit, as the ledger has it where there is one."""
    (image,) = images(3)
    cache = HostCache(tmp_path / "root")
    cache.add(image)
    before = cache.room.used()
    bring(cache, image, [0, 1])
    assert cache.room.used() >= before + 2 * FRAME
    limited = HostCache(tmp_path / "root", max_bytes=1 << 30)
    with limited.filling():
        assert limited.room.used() == limited.layout.allocated()
    limited.room.reserve(12345)
    assert limited.room.used() == limited.layout.allocated() + 12345
