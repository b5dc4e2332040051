from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from handmade import CHUNK, chunks_of, contents

from erofsgen.errors import IntegrityError, NotFoundError, RemoteError, StorageError
from erofsgen.host import linux
from erofsgen.host.cache.cache import HostCache
from erofsgen.host.cache.evict import evict
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
    assert progress.totals == [progress.done] == [sum(pack.device_size for pack in sample.image.packs)]
    assert all(path.stat().st_mode & 0o077 == 0 for path in (cache.root, index, *devices))


def test_frames_used_in_the_same_instant_are_evicted(sample, tmp_path):
    cache = HostCache(tmp_path / "root")
    _, devices = cache.materialise(sample.image)
    total = sum(pack.device_size for pack in sample.image.packs)
    assert evict(cache.layout.data_files(), 2 * total) == total
    assert not any(any(path.read_bytes()) for path in devices)
    check_complete(sample.image, *cache.materialise(sample.image))


def test_what_is_there_is_not_read_again(sample, tmp_path, monkeypatch):
    cache = HostCache(tmp_path / "root")
    first = cache.materialise(sample.image)
    monkeypatch.setattr(DirectoryStore, "read", lambda *arguments: pytest.fail("the store was read"))
    assert cache.materialise(sample.image) == first


def test_packs_are_shared_by_images(maker, tmp_path):
    ours, shared, theirs = contents(2, 3 * CHUNK, 5 * CHUNK, 2 * CHUNK)
    packs = [maker.pack(chunks_of(content)) for content in (ours, shared, theirs)]
    one = maker.image("one", {"a": ours, "b": shared}, packs[:2])
    two = maker.image("two", {"b": shared, "c": theirs}, packs[1:])
    cache = HostCache(tmp_path / "root")
    check_complete(one, *cache.materialise(one))
    inode = cache.pack_path(packs[1].hex).stat().st_ino
    progress = CountingProgress()
    check_complete(two, *cache.materialise(two, progress))
    assert cache.pack_path(packs[1].hex).stat().st_ino == inode
    assert progress.done == two.packs[1].device_size
    assert len(list((cache.root / "packs").iterdir())) == 3


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
    damage(sample.image.store, pack.digest, int(toc.offsets[1]) + int(toc.sizes[1]) // 2)
    cache = HostCache(tmp_path / "root")
    with pytest.raises(IntegrityError, match=f"pack {pack.digest}: frame 1"):
        (cache.materialise_flat if flat else cache.materialise)(sample.image)
    assert leftovers(cache.root) == []
    assert not cache.pack_path(pack.hex).exists()
    assert not list((cache.root / "images").glob("*.flat"))


def test_a_damaged_index_is_refused(sample, tmp_path):
    damage(sample.image.store, sample.image.index_descriptor.digest, 100)
    cache = HostCache(tmp_path / "root")
    with pytest.raises(IntegrityError):
        cache.materialise(sample.image)
    assert [path for path in cache.root.rglob("*") if path.is_file()] == []


def test_a_missing_pack(sample, tmp_path):
    sample.image.store.delete(sample.image.packs[1].digest)
    cache = HostCache(tmp_path / "root")
    with pytest.raises(NotFoundError):
        cache.materialise(sample.image)
    assert leftovers(cache.root) == []


def test_a_crashed_fill_is_taken_over(sample, tmp_path, monkeypatch):
    cache = HostCache(tmp_path / "root")
    pack = sample.image.packs[0]
    good = device_bytes(sample.image, 1)
    toc = open_pack(sample.image.store, pack).toc
    second = int(toc.device_offsets[1])
    part = cache.pack_path(pack.hex).with_name(f"{pack.hex}.data.part")
    part.write_bytes(good[:second] + b"torn" + bytes(len(good) - second - 4))
    read = DirectoryStore.read
    ranges = []

    def recording(self, digest, offset, length):
        if digest == pack.digest:
            ranges.append((offset, length))
        return read(self, digest, offset, length)

    monkeypatch.setattr(DirectoryStore, "read", recording)
    check_complete(sample.image, *cache.materialise(sample.image))
    frames = [(offset, length) for offset, length in ranges if offset < pack.toc.offset]
    assert frames[0] == (int(toc.offsets[1]), int(toc.sizes[1])), "the frame that was right is not read again"


BOOT = "user.erofsgen.boot"


def test_another_boot_trusts_digests_only(sample, tmp_path, monkeypatch):
    """What was not synced may have been lost with the power, and a file may have its size but not its bytes."""
    cache = HostCache(tmp_path / "root")
    index, devices = cache.materialise(sample.image)
    boots = {os.getxattr(path, BOOT).decode() for path in (index, *devices)}
    assert boots == {linux.boot_id()}
    toc = open_pack(sample.image.store, sample.image.packs[0]).toc
    lost = int(toc.device_offsets[1])
    with devices[0].open("r+b") as file:
        file.seek(lost)
        file.write(bytes(int(toc.device_sizes[1])))
    devices[1].unlink()
    index.write_bytes(bytes(index.stat().st_size))
    monkeypatch.setattr(linux, "boot_id", lambda: "another boot")
    read = DirectoryStore.read
    fetched = []

    def recording(self, digest, offset, length):
        fetched.append((digest, offset))
        return read(self, digest, offset, length)

    monkeypatch.setattr(DirectoryStore, "read", recording)
    check = cache.materialise(sample.image)
    data = [(digest, offset) for digest, offset in fetched if digest == sample.image.packs[0].digest]
    assert (sample.image.packs[0].digest, 0) not in data, "the first frame was right"
    assert (sample.image.packs[0].digest, int(toc.offsets[1])) in data
    check_complete(sample.image, *check)
    assert leftovers(cache.root) == []
    # what another boot left has been synced and counts always, what was fetched now counts in this boot
    marked = {path.name: BOOT in os.listxattr(path) for path in (index, *devices)}
    assert marked == {index.name: False, devices[0].name: False, devices[1].name: True, devices[2].name: False}


def test_another_boot_without_the_store(sample, tmp_path, monkeypatch):
    """Bytes that cannot be checked right now are not thrown away."""
    cache = HostCache(tmp_path / "root")
    _, devices = cache.materialise(sample.image)
    kept = devices[0].stat().st_ino

    def unreachable(self, digest, offset, length):
        raise RemoteError("unreachable")

    with monkeypatch.context() as patch:
        patch.setattr(linux, "boot_id", lambda: "another boot")
        patch.setattr(DirectoryStore, "read", unreachable)
        with pytest.raises(RemoteError):
            cache.materialise(sample.image)
    monkeypatch.setattr(linux, "boot_id", lambda: "another boot")
    check_complete(sample.image, *cache.materialise(sample.image))
    assert devices[0].stat().st_ino == kept
    assert leftovers(cache.root) == []


def test_flat_images_of_another_boot(sample, tmp_path, monkeypatch):
    cache = HostCache(tmp_path / "root")
    flat = cache.materialise_flat(sample.image)
    right = flat.read_bytes()
    flat.write_bytes(right[: len(right) // 2])
    monkeypatch.setattr(linux, "boot_id", lambda: "another boot")
    assert cache.materialise_flat(sample.image).read_bytes() == right


def test_old_files_are_settled(sample, tmp_path, monkeypatch):
    cache = HostCache(tmp_path / "root")
    index, devices = cache.materialise(sample.image)
    for path in (index, *devices[:2]):
        os.utime(path, (time.time() - 100, time.time() - 100))
    cache.materialise(sample.image)
    assert [BOOT in os.listxattr(path) for path in (index, *devices)] == [False, False, False, True]
    monkeypatch.setattr(linux, "boot_id", lambda: "another boot")
    progress = CountingProgress()
    check_complete(sample.image, *cache.materialise(sample.image, progress))
    assert progress.done == sample.image.packs[2].device_size


def test_a_file_that_cannot_be_settled_goes(sample, tmp_path, monkeypatch):
    cache = HostCache(tmp_path / "root")
    _, devices = cache.materialise(sample.image)
    os.utime(devices[1], (0, 0))

    def fail(descriptor):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fail)
        with pytest.raises(StorageError, match="Input/output error"):
            cache.materialise(sample.image)
    assert [path.exists() for path in devices] == [True, False, True]
    check_complete(sample.image, *cache.materialise(sample.image))


def test_without_extended_attributes(sample, tmp_path, monkeypatch):
    """Then a file is on the disk before it has its name."""
    synced = []

    def unsupported(*arguments):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    def sync(descriptor):
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        assert name.endswith(".part")
        synced.append(name)

    monkeypatch.setattr(os, "setxattr", unsupported)
    monkeypatch.setattr(os, "getxattr", unsupported)
    monkeypatch.setattr(os, "fdatasync", sync)
    cache = HostCache(tmp_path / "root")
    check_complete(sample.image, *cache.materialise(sample.image))
    assert len(synced) == 4
    monkeypatch.setattr(linux, "boot_id", lambda: "another boot")
    monkeypatch.setattr(DirectoryStore, "read", lambda *arguments: pytest.fail("the store was read"))
    cache.materialise(sample.image)


def test_two_processes_after_another_boot(sample, store_dir, tmp_path):
    root = tmp_path / "root"
    _, devices = HostCache(root).materialise(sample.image)
    for path in devices:
        os.setxattr(path, BOOT, b"another boot")
        with path.open("r+b") as file:
            file.write(b"damage")
    children = [in_child(MATERIALISE, root, store_dir, 0.05) for _ in range(3)]
    for child in children:
        child.communicate(timeout=60)
    assert [child.returncode for child in children] == [0, 0, 0]
    check_complete(sample.image, *HostCache(root).materialise(sample.image))
    assert leftovers(root) == []


def in_child(code, *arguments):
    """A Python process that has the given program to run; ``sys.argv[1:]`` are the arguments."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )


MATERIALISE = """
import sys, threading, time
from pathlib import Path
from erofsgen.host.cache.cache import HostCache
from erofsgen.host.cache.evict import evict
from erofsgen.store.directory import DirectoryStore
from erofsgen.store.image import Image

root, store, delay = sys.argv[1:]
read = DirectoryStore.read
frames = 0

def slow(self, digest, offset, length):
    global frames
    if length > 4096:
        frames += 1
        print(frames, flush=True)
        time.sleep(float(delay))
    return read(self, digest, offset, length)

DirectoryStore.read = slow
image = Image.open(DirectoryStore(store, create=False), "sample")
HostCache(Path(root), threads=1).materialise(image)
"""


def test_kill_in_the_middle(sample, store_dir, tmp_path, monkeypatch):
    """SIGKILL with the first pack half-way; what comes next finishes the work."""
    monkeypatch.setattr("erofsgen.host.cache.cache._BATCH", CHUNK)
    code = MATERIALISE.replace("frames = 0", "import erofsgen.host.cache.cache as c; c._BATCH = 65536; frames = 0")
    root = tmp_path / "root"
    with in_child(code, root, store_dir, 0.3) as child:
        for line in child.stdout:
            if int(line) >= 3:  # the index and a frame are done, another is being read
                break
        os.killpg(child.pid, signal.SIGKILL)
    assert leftovers(root), "it was killed too late"
    assert not all(HostCache(root).pack_path(pack.hex).exists() for pack in sample.image.packs)
    check_complete(sample.image, *HostCache(root).materialise(sample.image))
    assert leftovers(root) == []


def test_two_processes_fill_a_pack_once(sample, store_dir, tmp_path):
    root = tmp_path / "root"
    children = [in_child(MATERIALISE, root, store_dir, 0.05) for _ in range(2)]
    reads = [child.communicate(timeout=60)[0].split() for child in children]
    assert [child.returncode for child in children] == [0, 0]
    batches = len(sample.image.packs)  # each is smaller than one batch
    assert sum(map(len, reads)) <= batches + 2, "both may read the index, only one a pack"
    check_complete(sample.image, *HostCache(root).materialise(sample.image))


@pytest.mark.mount
def test_full_disk(sample, maker, make_file_system):
    small = make_file_system("ext4", 4)
    (content,) = contents(3, 12 << 20)
    pack = maker.pack(chunks_of(content))
    image = maker.image("large", {"file": content}, [pack])
    cache = HostCache(small / "root")
    free = os.statvfs(small).f_bavail
    for materialise in (cache.materialise, cache.materialise_flat):
        with pytest.raises(StorageError, match="No space left on device") as caught:
            materialise(image)
        assert "--root" in caught.value.hint
        assert leftovers(cache.root) == []
        assert os.statvfs(small).f_bavail > free - 64, "nothing half-made is left"


@pytest.mark.mount
def test_read_only_root(sample, make_file_system):
    place = make_file_system("ext4", 4)
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    with pytest.raises(StorageError, match="Read-only file system"):
        HostCache(place / "root")


def test_flat_image_needs_no_packs(sample, tmp_path):
    cache = HostCache(tmp_path / "root")
    flat = cache.materialise_flat(sample.image)
    assert list((cache.root / "packs").iterdir()) == []
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
    read = DirectoryStore.read

    def recording(self, digest, offset, length):
        assert digest != raw.digest or offset >= raw.toc.offset, "the pack's data was read through the store"
        return read(self, digest, offset, length)

    monkeypatch.setattr(DirectoryStore, "read", recording)
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
    assert leftovers(cache.root) == []
    assert not check.exists()
