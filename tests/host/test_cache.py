from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing

import pytest
from handmade import CHUNK, chunks_of, contents

from erofsgen.errors import IntegrityError, NotFoundError, RemoteError, StorageError
from erofsgen.host import linux
from erofsgen.host.cache import presence
from erofsgen.host.cache.cache import HostCache
from erofsgen.host.cache.evict import evict
from erofsgen.host.pull import complete
from erofsgen.store.directory import DirectoryStore
from erofsgen.store.image import open_pack


def device_bytes(image, slot):
    pack = image.packs[slot - 1]
    return open_pack(image.store, pack).read(0, pack.device_size)


def check_complete(image, index, devices):
    assert index.read_bytes() == image.index_bytes()
    assert [path.name for path in devices] == [f"{pack.hex}.data" for pack in image.packs]
    for slot, path in enumerate(devices, 1):
        assert path.read_bytes() == device_bytes(image, slot)


def leftovers(root):
    return [str(path) for path in root.rglob("*.part")]


def check_marked(cache, image):
    """Compares all frames that count with the store's bytes. Returns them as (slot, frame)."""
    marked = set()
    for slot, pack in enumerate(image.packs, 1):
        right = device_bytes(image, slot)
        with closing(cache.open_pack(pack)) as file:
            assert os.stat(file.files.data).st_size == pack.device_size
            for frame in range(len(file.toc)):
                if file.ready(frame, frame):
                    start, size = int(file.toc.device_offsets[frame]), int(file.toc.device_sizes[frame])
                    assert os.pread(file.descriptor, size, start) == right[start : start + size], (slot, frame)
                    marked.add((slot, frame))
    return marked


def all_frames(image):
    return {
        (slot, frame)
        for slot, pack in enumerate(image.packs, 1)
        for frame in range(len(open_pack(image.store, pack).toc))
    }


@pytest.fixture
def reads(monkeypatch, sample):
    """What is read of packs' frames from now on, as (slot, frame); a read may have several."""
    found = []
    tables = {pack.digest: (pack, open_pack(sample.image.store, pack).toc) for pack in sample.image.packs}
    read = DirectoryStore.read_into

    def recording(self, digest, offset, buffer):
        length = len(buffer)
        if digest in tables and offset < tables[digest][0].toc.offset:
            pack, toc = tables[digest]
            starts = toc.offsets.tolist()[: len(toc)]
            found.extend((pack.slot, frame) for frame, at in enumerate(starts) if offset <= at < offset + length)
        read(self, digest, offset, buffer)

    monkeypatch.setattr(DirectoryStore, "read_into", recording)
    return found


def reboot(monkeypatch):
    """Let this process believe in another boot."""
    monkeypatch.setattr(linux, "boot_id", lambda: "another boot")
    monkeypatch.setattr(presence, "boot_id", lambda: b"another boot".ljust(16))


class CountingProgress:
    """Adds up what tasks report."""

    def __init__(self):
        self.totals = []
        self.done = 0

    def task(self, label, total=None):
        self.totals.append(total)
        return self

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        pass

    def advance(self, amount):
        self.done += amount


def test_materialise(sample, tmp_path):
    cache = HostCache(tmp_path / "root")
    progress = CountingProgress()
    index, devices = cache.materialise(sample.image, progress)
    check_complete(sample.image, index, devices)
    assert leftovers(cache.root) == []
    everything = [len(sample.image.packs), sum(pack.device_size for pack in sample.image.packs)]
    assert progress.totals == everything
    assert progress.done == sum(everything)
    assert all(path.stat().st_mode & 0o077 == 0 for path in (cache.root, index, *devices))


def test_frames_used_in_the_same_instant_are_evicted(sample, tmp_path):
    cache = HostCache(tmp_path / "root")
    _, devices = cache.materialise(sample.image)
    total = sum(pack.device_size for pack in sample.image.packs)
    assert evict(cache.layout.data_files(), 2 * total) >= total
    assert not any(any(path.read_bytes()) for path in devices)
    check_complete(sample.image, *cache.materialise(sample.image))


def test_what_is_there_is_not_read_again(sample, tmp_path, monkeypatch):
    cache = HostCache(tmp_path / "root")
    first = cache.materialise(sample.image)
    monkeypatch.setattr(DirectoryStore, "read_into", lambda *arguments: pytest.fail("the store was read"))
    assert cache.materialise(sample.image) == first


def test_packs_are_shared_by_images(maker, tmp_path):
    ours, shared, theirs = contents(2, 3 * CHUNK, 5 * CHUNK, 2 * CHUNK)
    packs = [maker.pack(chunks_of(content)) for content in (ours, shared, theirs)]
    one = maker.image("one", {"a": ours, "b": shared}, packs[:2])
    two = maker.image("two", {"b": shared, "c": theirs}, packs[1:])
    cache = HostCache(tmp_path / "root")
    check_complete(one, *cache.materialise(one))
    inode = cache.files(packs[1].hex).data.stat().st_ino
    progress = CountingProgress()
    check_complete(two, *cache.materialise(two, progress))
    assert cache.files(packs[1].hex).data.stat().st_ino == inode
    assert progress.totals == [1, two.packs[1].device_size]
    assert len(cache.layout.data_files()) == 3


def damage(store, digest, offset):
    path = store.blob_path(digest)
    with path.open("r+b") as blob:
        blob.seek(offset)
        byte = blob.read(1)
        blob.seek(offset)
        blob.write(bytes([byte[0] ^ 0x10]))


@pytest.mark.parametrize("slot", [1, 2, 3])
@pytest.mark.parametrize("flat", [False, True])
def test_a_damaged_frame_is_refused(sample, tmp_path, slot, flat):
    pack = sample.image.packs[slot - 1]
    toc = open_pack(sample.image.store, pack).toc
    cache = HostCache(tmp_path / "root")
    everything = all_frames(sample.image)
    damage(sample.image.store, pack.digest, int(toc.offsets[1]) + int(toc.sizes[1]) // 2)
    with pytest.raises(IntegrityError, match=rf"pack (sha256:)?{pack.hex}: frame 1"):
        (cache.materialise_flat if flat else cache.materialise)(sample.image)
    assert leftovers(cache.root) == []
    assert not list((cache.root / "images").glob("*.flat"))
    damage(sample.image.store, pack.digest, int(toc.offsets[1]) + int(toc.sizes[1]) // 2)
    if not flat:
        assert check_marked(cache, sample.image) == everything - {(slot, 1)}
    check_complete(sample.image, *cache.materialise(sample.image))


def test_a_damaged_index_is_refused(sample, tmp_path):
    damage(sample.image.store, sample.image.index_descriptor.digest, 100)
    cache = HostCache(tmp_path / "root")
    with pytest.raises(IntegrityError):
        cache.materialise(sample.image)
    assert [path.name for path in cache.root.rglob("*") if path.is_file()] == ["ledger"]


def test_a_missing_pack(sample, tmp_path):
    sample.image.store.delete(sample.image.packs[1].digest)
    cache = HostCache(tmp_path / "root")
    with pytest.raises(NotFoundError):
        cache.materialise(sample.image)
    assert leftovers(cache.root) == []


def test_a_pack_that_goes_missing(sample, tmp_path):
    """Mounting needs the store no more then, but bringing frames does."""
    cache = HostCache(tmp_path / "root")
    cached = cache.add(sample.image)
    right = device_bytes(sample.image, 1)
    sample.image.store.delete(sample.image.packs[1].digest)
    with pytest.raises(NotFoundError), cache.filling():
        cache.fill(cached, lambda: sample.image.store)
    assert not cache.is_complete(cached)
    assert cached.devices()[0].read_bytes() == right


def test_a_crashed_fill_is_taken_over(sample, tmp_path, reads):
    """What is marked counts; bytes without a mark do not, whatever they are."""
    cache = HostCache(tmp_path / "root")
    cache.add(sample.image)
    with closing(cache.open_pack(sample.image.packs[0])) as file:
        good = device_bytes(sample.image, 1)
        second = int(file.toc.device_offsets[1])
        file.write_frame(0, good[:second])
        os.pwrite(file.descriptor, b"torn", second)
    reads.clear()
    check = cache.materialise(sample.image)
    assert set(reads) == all_frames(sample.image) - {(1, 0)}, "the frame that was right is not read again"
    check_complete(sample.image, *check)


BOOT = "user.erofsgen.boot"


def test_another_boot_trusts_digests_only(sample, tmp_path, monkeypatch, reads):
    """What was not synced may have been lost with the power, and a file may have its size but not its bytes."""
    cache = HostCache(tmp_path / "root")
    index, devices = cache.materialise(sample.image)
    assert os.getxattr(index, BOOT).decode() == linux.boot_id()
    toc = open_pack(sample.image.store, sample.image.packs[0]).toc
    with devices[0].open("r+b") as file:
        file.seek(int(toc.device_offsets[1]))
        file.write(bytes(int(toc.device_sizes[1])))
    devices[1].unlink()
    index.write_bytes(bytes(index.stat().st_size))
    reboot(monkeypatch)
    reads.clear()
    check = cache.materialise(sample.image)
    assert sorted(reads) == [(1, 1), (2, 0), (2, 1)], "what is right is not read again"
    check_complete(sample.image, *check)
    assert leftovers(cache.root) == []
    assert BOOT not in os.listxattr(index), "what another boot left has been synced and counts always"


def test_another_boot_without_the_store(sample, tmp_path, monkeypatch):
    """Frames count again after a comparison with their digests; bytes that are wrong are all that is missing."""
    cache = HostCache(tmp_path / "root")
    index, devices = cache.materialise(sample.image)
    everything = all_frames(sample.image)
    os.removexattr(index, BOOT)

    def unreachable(self, digest, offset, buffer):
        raise RemoteError("unreachable")

    reboot(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(DirectoryStore, "read_into", unreachable)
        assert not cache.is_complete(cache.image(sample.image.digest, ""))
        cache.materialise(sample.image)
    check_complete(sample.image, index, devices)
    monkeypatch.setattr(presence, "boot_id", lambda: b"a third one".ljust(16))
    with devices[0].open("r+b") as file:
        file.write(b"damage")
    with monkeypatch.context() as patch:
        patch.setattr(DirectoryStore, "read_into", unreachable)
        with pytest.raises(RemoteError):
            cache.materialise(sample.image)
    assert check_marked(cache, sample.image) == everything - {(1, 0)}
    check_complete(sample.image, *cache.materialise(sample.image))


def test_flat_images_of_another_boot(sample, tmp_path, monkeypatch):
    cache = HostCache(tmp_path / "root")
    flat = cache.materialise_flat(sample.image)
    right = flat.read_bytes()
    flat.write_bytes(right[: len(right) // 2])
    reboot(monkeypatch)
    assert cache.materialise_flat(sample.image).read_bytes() == right


def test_old_files_are_settled(sample, tmp_path, monkeypatch):
    cache = HostCache(tmp_path / "root")
    index, _ = cache.materialise(sample.image)
    inode = index.stat().st_ino
    os.utime(index, (time.time() - 100, time.time() - 100))
    cache.materialise(sample.image)
    assert BOOT not in os.listxattr(index)
    reboot(monkeypatch)
    check_complete(sample.image, *cache.materialise(sample.image))
    assert index.stat().st_ino == inode


def test_a_file_that_cannot_be_settled_goes(sample, tmp_path, monkeypatch):
    cache = HostCache(tmp_path / "root")
    index, devices = cache.materialise(sample.image)
    os.utime(index, (0, 0))

    def fail(descriptor):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fail)
        with pytest.raises(StorageError, match="Input/output error"):
            cache.materialise(sample.image)
    assert not index.exists()
    assert all(path.exists() for path in devices)
    check_complete(sample.image, *cache.materialise(sample.image))


def test_without_extended_attributes(sample, tmp_path, monkeypatch):
    """Then an index is on the disk before it has its name."""
    synced = []

    def unsupported(*arguments):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "setxattr", unsupported)
    monkeypatch.setattr(os, "getxattr", unsupported)
    monkeypatch.setattr(os, "fdatasync", lambda fd: synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))))
    cache = HostCache(tmp_path / "root")
    index, devices = cache.materialise(sample.image)
    check_complete(sample.image, index, devices)
    assert [name for name in synced if name.endswith(".part")] == [f"{index.name}.part"]
    reboot(monkeypatch)
    monkeypatch.setattr(DirectoryStore, "read_into", lambda *arguments: pytest.fail("the store was read"))
    cache.materialise(sample.image)


def test_two_processes_after_another_boot(sample, store_dir, tmp_path):
    root = tmp_path / "root"
    _, devices = HostCache(root).materialise(sample.image)
    for path in devices:
        with path.with_suffix(".map").open("r+b") as file:
            file.seek(16)
            file.write(b"another boot".ljust(16))
        with path.open("r+b") as file:
            file.write(b"damage")
    children = [in_child(MATERIALISE, root, store_dir, 0.05) for _ in range(3)]
    reads = [line for child in children for line in child.communicate(timeout=60)[0].splitlines()]
    assert [child.returncode for child in children] == [0, 0, 0]
    assert len(reads) == len(set(reads)) == len(devices), "only the damaged frames, once"
    check_complete(sample.image, *HostCache(root).materialise(sample.image))
    assert leftovers(root) == []


def in_child(code, *arguments):
    """A Python process that has the given program to run; ``sys.argv[1:]`` are the arguments."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )


MATERIALISE = """
import functools, sys, time
from pathlib import Path
from erofsgen.host.cache import cache, filling
from erofsgen.store.directory import DirectoryStore
from erofsgen.store.image import Image

root, store, delay = sys.argv[1:]
image = Image.open(DirectoryStore(store, create=False), "sample")
tables = {pack.digest: pack.toc.offset for pack in image.packs}
read = DirectoryStore.read_into

def slow(self, digest, offset, buffer):
    if offset < tables.get(digest, 0):
        print(digest, offset, flush=True)
        time.sleep(float(delay))
    return read(self, digest, offset, buffer)

DirectoryStore.read_into = slow
filling.Engine = functools.partial(filling.Engine, threads=1, read_size=1)  # a frame at a time
cache.HostCache(Path(root)).materialise(image)
"""


def test_kill_in_the_middle(sample, store_dir, tmp_path, reads):
    """SIGKILL with some of the frames there; what comes next finishes the work and does none of it again."""
    root = tmp_path / "root"
    with in_child(MATERIALISE, root, store_dir, 0.1) as child:
        for number, _ in enumerate(child.stdout):
            if number == 3:  # three frames have been read, another is being
                break
        os.killpg(child.pid, signal.SIGKILL)
    cache = HostCache(root)
    marked = check_marked(cache, sample.image)
    assert len(marked) in (2, 3, 4), "it was killed too late, or writes late"
    reads.clear()
    check = cache.materialise(sample.image)
    assert set(reads) == all_frames(sample.image) - marked
    check_complete(sample.image, *check)
    assert leftovers(root) == []


def test_two_processes_fill_a_pack_once(sample, store_dir, tmp_path):
    root = tmp_path / "root"
    children = [in_child(MATERIALISE, root, store_dir, 0.05) for _ in range(2)]
    reads = [line for child in children for line in child.communicate(timeout=60)[0].splitlines()]
    assert [child.returncode for child in children] == [0, 0]
    assert len(reads) == len(set(reads)) == len(all_frames(sample.image))
    check_complete(sample.image, *HostCache(root).materialise(sample.image))


@pytest.mark.mount
def test_full_disk(maker, make_file_system):
    small = make_file_system("ext4", 4)
    (content,) = contents(3, 12 << 20)
    image = maker.image("large", {"file": content}, [maker.pack(chunks_of(content))])
    cache = HostCache(small / "root")
    free = os.statvfs(small).f_bavail
    with pytest.raises(StorageError, match="No space left on device") as caught:
        cache.materialise_flat(image)
    assert "free some space" in caught.value.hint
    assert os.statvfs(small).f_bavail > free - 64, "nothing half-made is left"
    with pytest.raises(StorageError, match="No space left on device") as caught:
        cache.materialise(image)
    assert "free some space" in caught.value.hint
    assert leftovers(cache.root) == []
    assert check_marked(cache, image), "what had room is kept"


@pytest.mark.mount
def test_read_only_root(sample, make_file_system):
    place = make_file_system("ext4", 4)
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    with pytest.raises(StorageError, match="Read-only file system"):
        HostCache(place / "root")


def test_flat_image_needs_no_packs(sample, tmp_path):
    cache = HostCache(tmp_path / "root")
    flat = cache.materialise_flat(sample.image)
    assert cache.layout.data_files() == []
    data = flat.read_bytes()
    for slot in range(1, 4):
        assert data.count(device_bytes(sample.image, slot)) == 1
    assert cache.materialise_flat(sample.image) == flat
    assert leftovers(cache.root) == []


@pytest.mark.mount
@pytest.mark.skipif(not shutil.which("mkfs.xfs"), reason="no mkfs.xfs")
def test_raw_packs_share_extents(maker_on, make_file_system, monkeypatch):
    """On a file system with reflinks a raw pack's bytes are verified in place, neither read as a blob nor copied."""
    place = make_file_system("xfs", 320)
    sample = maker_on(place / "store")
    store = sample.image.store
    raw = sample.image.packs[2]
    before = os.statvfs(place).f_bfree
    read = DirectoryStore.read_into

    def recording(self, digest, offset, buffer):
        assert digest != raw.digest or offset >= raw.toc.offset, "the pack's data was read through the store"
        read(self, digest, offset, buffer)

    monkeypatch.setattr(DirectoryStore, "read_into", recording)
    cache = HostCache(place / "root")
    index, devices = cache.materialise(sample.image)
    check = place / "root" / "packs" / f"{raw.hex}.data"
    assert check.stat().st_size == raw.device_size
    monkeypatch.undo()
    check_complete(sample.image, index, devices)
    used = (before - os.statvfs(place).f_bfree) * 4096
    zstd = sum(pack.device_size for pack in sample.image.packs[:2])
    assert used < zstd + raw.device_size // 2
    # damage shows: what was cloned is checked, then fetched
    check.unlink()
    damage(store, raw.digest, CHUNK)
    with pytest.raises(IntegrityError, match="frame 0"):
        cache.materialise(sample.image)
    damage(store, raw.digest, CHUNK)
    assert check_marked(cache, sample.image) == all_frames(sample.image) - {(3, 0)}


def test_after_a_reboot_a_complete_image_needs_no_store(tmp_path, maker_on):
    """Marks of another boot count once the bytes were compared, eager mounts included."""
    sample = maker_on(tmp_path / "store")
    cache = HostCache(tmp_path / "root")
    cache.materialise(sample.image)
    for path in (tmp_path / "root" / "packs").glob("*.map"):
        with path.open("r+b") as file:
            file.seek(16)
            file.write(b"another boot's !")
    (tmp_path / "store").rename(tmp_path / "away")
    cached = cache.image(sample.image.digest, "")
    assert not cache.is_complete(cached)
    complete(cache, cached, None)
    assert cache.is_complete(cached)


def test_a_flat_image_needs_its_store_once_and_room(tmp_path, maker_on):
    sample = maker_on(tmp_path / "store")
    size = sum(pack.device_size for pack in sample.image.packs)
    small = HostCache(tmp_path / "small", max_bytes=size // 2)
    with pytest.raises(StorageError, match="the cache is full"):
        small.materialise_flat(sample.image)
    assert not small.image_path(sample.image.digest, "flat").exists()
    cache = HostCache(tmp_path / "root")
    cached = cache.add(sample.image)
    flat = cache.materialise_flat(cached)
    (tmp_path / "store").rename(tmp_path / "away")
    assert cache.materialise_flat(cached) == flat
