"""The directory store: what is visible when, who waits for whom, and what other OCI tools make of it."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest
import zstandard
from blake3 import blake3

from erofsgen.errors import BusyError, FormatError, IntegrityError, NotFoundError, StorageError
from erofsgen.pack.writer import PackWriter
from erofsgen.store.base import Descriptor
from erofsgen.store.directory import DirectoryStore
from erofsgen.store.manifest import ARTIFACT_TYPE, INDEX_SIZE, INDEX_TYPE, MANIFEST_TYPE, Manifest, pack_descriptor


@pytest.fixture
def store(store_dir: Path) -> DirectoryStore:
    return DirectoryStore(store_dir)


def sha256(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def named(number: int) -> Descriptor:
    return Descriptor(MANIFEST_TYPE, sha256(b"%d" % number), number)


def python(code: str, *arguments: object, **options) -> subprocess.Popen:
    """A process of its own that runs ``code``, which finds its arguments in ``sys.argv``."""
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], **options)


def leftovers(store: DirectoryStore) -> list[str]:
    return os.listdir(store.path / "erofsgen" / "tmp")


# --- blobs -----------------------------------------------------------------------------------------------------------


def test_a_new_store_is_an_empty_oci_layout(store: DirectoryStore):
    assert json.loads((store.path / "oci-layout").read_bytes()) == {"imageLayoutVersion": "1.0.0"}
    assert json.loads((store.path / "index.json").read_bytes())["manifests"] == []
    assert list(store.blobs()) == []
    assert store.references() == {}


def test_there_must_be_a_store_to_open_one(store_dir: Path):
    with pytest.raises(NotFoundError, match="no store at"):
        DirectoryStore(store_dir, create=False)
    assert not store_dir.exists()


def test_opening_again_keeps_everything(store: DirectoryStore):
    digest, _ = store.put(b"content")
    store.tag("name", Descriptor(MANIFEST_TYPE, digest, 7))
    again = DirectoryStore(store.path)
    assert again.read(digest, 0, 7) == b"content"
    assert set(again.references()) == {"name"}


def test_a_blob_has_the_digest_of_what_was_written(store: DirectoryStore):
    pieces = [random.Random(1).randbytes(size) for size in (0, 1, 70_000, 3 << 20)]
    with store.create() as blob:
        for piece in pieces:
            blob.write(memoryview(piece))
        digest, size = blob.commit()
    data = b"".join(pieces)
    assert (digest, size) == (sha256(data), len(data))
    assert store.size(digest) == size
    assert store.read(digest, 0, size) == data
    assert store.read(digest, 69_999, 5) == data[69_999:70_004]
    assert list(store.blobs()) == [(digest, size)]
    assert (store.path / "blobs" / "sha256" / digest[7:]).read_bytes() == data


def test_writing_a_blob_twice_is_no_error(store: DirectoryStore):
    assert store.put(b"twice") == store.put(b"twice")
    assert list(store.blobs()) == [(sha256(b"twice"), 5)]
    assert leftovers(store) == []


def test_reading_what_is_not_there(store: DirectoryStore):
    digest, size = store.put(b"short")
    with pytest.raises(IntegrityError, match="ends at byte 5, 3 more expected"):
        store.read(digest, 2, size + 1)
    missing = sha256(b"never written")
    assert store.size(missing) is None
    with pytest.raises(NotFoundError, match=missing):
        store.read(missing, 0, 1)


@pytest.mark.parametrize(
    "digest", ["sha256:../../../etc/passwd", "sha256:", "sha512:" + "0" * 64, "sha256:" + "A" * 64, "0" * 64, ""]
)
def test_a_digest_is_never_a_path(store: DirectoryStore, digest: str):
    for use in (store.size, store.delete, lambda digest: store.read(digest, 0, 1)):
        with pytest.raises(FormatError, match="not a sha256 digest"):
            use(digest)


def test_deleting(store: DirectoryStore):
    digest, _ = store.put(b"gone")
    store.delete(digest)
    store.delete(digest)
    assert store.size(digest) is None


def test_an_abandoned_blob_leaves_nothing(store: DirectoryStore):
    with store.create() as blob:
        blob.write(b"half")
    with suppress(RuntimeError), store.create() as blob:
        blob.write(b"half")
        raise RuntimeError
    assert list(store.blobs()) == []
    assert leftovers(store) == []


# --- references ------------------------------------------------------------------------------------------------------


def test_a_name_means_the_last_manifest_it_was_given(store: DirectoryStore):
    for number in (1, 2):
        store.tag("a", named(number))
    store.tag("b", named(1))
    assert {name: manifest.size for name, manifest in store.references().items()} == {"a": 2, "b": 1}
    store.untag("a")
    assert set(store.references()) == {"b"}
    with pytest.raises(NotFoundError, match="no image 'a'"):
        store.untag("a")


def test_manifests_without_a_name_stay(store: DirectoryStore):
    """Other tools may keep manifests in a layout that only a digest names."""
    path = store.path / "index.json"
    nameless = {"mediaType": MANIFEST_TYPE, "digest": sha256(b"other"), "size": 5}
    path.write_text(json.dumps({"schemaVersion": 2, "manifests": [nameless]}))
    store.tag("a", named(1))
    store.untag("a")
    assert json.loads(path.read_bytes())["manifests"] == [nameless]


def test_damaged_references_are_a_clean_error(store: DirectoryStore):
    path = store.path / "index.json"
    for damage in (b"", b"{", b"[]", b'{"manifests": [{"digest": 5}]}'):
        path.write_bytes(damage)
        with pytest.raises(FormatError, match=r"index\.json"):
            store.references()
        with pytest.raises(FormatError):
            store.tag("a", named(1))
        assert path.read_bytes() == damage
    path.unlink()
    with pytest.raises(NotFoundError, match="no store at"):
        store.references()


TAGGER = """
import sys
from erofsgen.store.base import Descriptor
from erofsgen.store.directory import DirectoryStore
path, worker, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
store = DirectoryStore(path)
sys.stdin.read()
for number in range(count):
    store.tag(f"{worker}-{number}", Descriptor("application/test", "sha256:" + "0" * 64, number))
    if number % 3 == 0:
        store.untag(f"{worker}-{number}")
"""


def test_processes_that_tag_at_once_lose_nothing(store: DirectoryStore):
    workers = [python(TAGGER, store.path, worker, 20, stdin=subprocess.PIPE) for worker in "abcd"]
    for worker in workers:
        assert worker.stdin
        worker.stdin.close()  # all begin now
    assert [worker.wait(60) for worker in workers] == [0] * 4
    assert set(store.references()) == {f"{worker}-{number}" for worker in "abcd" for number in range(20) if number % 3}


# --- records ---------------------------------------------------------------------------------------------------------


def test_layer_records(store: DirectoryStore):
    assert store.record("key") is None
    store.put_record("key", b"one")
    store.put_record("key", b"two")
    assert store.record("key") == b"two"
    assert list(store.records()) == ["key"]
    store.delete_record("key")
    store.delete_record("key")
    assert list(store.records()) == []


# --- crashes ---------------------------------------------------------------------------------------------------------

CRASHER = """
import os, signal, sys
from erofsgen.store.base import Descriptor
from erofsgen.store.directory import DirectoryStore
path, action, point, after = sys.argv[1:5]
store = DirectoryStore(path)

def crash(original):
    def call(*arguments, **options):
        if not int(after):
            os.kill(os.getpid(), signal.SIGKILL)
        original(*arguments, **options)
        os.kill(os.getpid(), signal.SIGKILL)
    return call

if point == "middle":
    with store.create() as blob:
        blob.write(b"x" * 100_000)
        os.kill(os.getpid(), signal.SIGKILL)
if point == "rename":
    os.rename = os.replace = crash(os.rename)
elif point == "fsync":
    os.fsync = crash(os.fsync)
if action == "blob":
    store.put(b"x" * 100_000)
else:
    store.tag("new", Descriptor("application/test", "sha256:" + "0" * 64, 1))
"""


@pytest.mark.parametrize(
    ("action", "point", "after", "visible"),
    [
        ("blob", "middle", 0, False),
        ("blob", "fsync", 0, False),
        ("blob", "fsync", 1, False),
        ("blob", "rename", 0, False),
        ("blob", "rename", 1, True),
        ("tag", "fsync", 0, False),
        ("tag", "fsync", 1, False),
        ("tag", "rename", 0, False),
        ("tag", "rename", 1, True),
    ],
)
def test_a_killed_writer_leaves_all_or_nothing(
    store: DirectoryStore, action: str, point: str, after: int, visible: bool
):
    store.tag("old", named(1))
    before = (store.path / "index.json").read_bytes()
    assert python(CRASHER, store.path, action, point, after).wait(60) == -signal.SIGKILL

    again = DirectoryStore(store.path, create=False)
    whole = b"x" * 100_000
    if action == "blob":
        assert list(again.blobs()) == ([(sha256(whole), len(whole))] if visible else [])
        assert (store.path / "index.json").read_bytes() == before
    else:
        assert set(again.references()) == ({"old", "new"} if visible else {"old"})
    assert bool(leftovers(again)) != visible
    again.tag("next", named(2))  # no lock outlives its process
    with again.collecting():
        assert leftovers(again) == []


# --- locks -----------------------------------------------------------------------------------------------------------

HOLDER = """
import sys
from erofsgen.store.directory import DirectoryStore
store = DirectoryStore(sys.argv[1])
with getattr(store, sys.argv[2])():
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def hold(store: DirectoryStore) -> Iterator[Callable[[str], subprocess.Popen]]:
    """Lets another process hold a lock of the store until its standard input is closed."""
    holders = []

    def start(lock: str) -> subprocess.Popen:
        holder = python(HOLDER, store.path, lock, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        holders.append(holder)
        assert holder.stdout
        assert holder.stdout.readline() == b"held\n"
        return holder

    yield start
    for holder in holders:
        holder.communicate(timeout=60)


def test_builders_share_and_keep_the_collector_away(store: DirectoryStore, hold):
    builder = hold("building")
    with store.building():
        pass
    blob = store.create()
    with pytest.raises(BusyError, match="a build is running"), store.collecting():
        pytest.fail("collected during a build")
    blob.write(b"still here")
    assert blob.commit()[1] == 10
    builder.communicate(timeout=60)
    with store.collecting():
        pass


def test_builders_wait_for_the_collector(store: DirectoryStore, hold):
    collector = hold("collecting")
    entered = threading.Event()

    def build() -> None:
        with store.building():
            entered.set()

    thread = threading.Thread(target=build)
    thread.start()
    assert not entered.wait(0.2)
    collector.communicate(timeout=60)
    assert entered.wait(60)
    thread.join()


# --- disks -----------------------------------------------------------------------------------------------------------


@pytest.mark.mount
def test_a_full_disk_changes_nothing(small_disk: Path):
    store = DirectoryStore(small_disk / "store")
    kept, size = store.put(random.Random(1).randbytes(600_000))
    store.tag("kept", Descriptor(MANIFEST_TYPE, kept, size))
    with pytest.raises(StorageError, match="No space left on device") as caught:
        store.put(bytes(600_000))
    assert caught.value.hint
    assert "\n" not in str(caught.value)
    assert leftovers(store) == []
    assert list(store.blobs()) == [(kept, size)]

    free = os.statvfs(small_disk)
    (small_disk / "ballast").write_bytes(bytes(free.f_bavail * free.f_bsize))
    before = (store.path / "index.json").read_bytes()
    with pytest.raises(StorageError, match="No space left on device"):
        store.tag("new", named(1))
    with pytest.raises(StorageError, match="No space left on device"):
        store.put_record("key", bytes(5000))
    assert (store.path / "index.json").read_bytes() == before
    assert store.record("key") is None
    assert leftovers(store) == []
    (small_disk / "ballast").unlink()
    store.tag("new", named(1))
    assert set(store.references()) == {"kept", "new"}


@pytest.mark.mount
def test_a_read_only_disk_can_be_read(small_disk: Path):
    store = DirectoryStore(small_disk / "store")
    digest, size = store.put(b"content")
    store.tag("name", Descriptor(MANIFEST_TYPE, digest, size))
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    store = DirectoryStore(small_disk / "store", create=False)
    assert store.read(store.references()["name"].digest, 0, size) == b"content"
    with pytest.raises(StorageError, match="Read-only file system") as caught:
        store.put(b"more")
    assert caught.value.hint == "choose another directory with --store"
    with pytest.raises(StorageError, match="Read-only file system"):
        store.tag("more", named(1))


# --- other tools -----------------------------------------------------------------------------------------------------


@pytest.fixture
def tagged(store: DirectoryStore) -> tuple[DirectoryStore, Manifest, str]:
    """A store with one image, ``example.org/app:1``, of an index and two packs."""
    packs = []
    for raw in (False, True):
        data = random.Random(raw).randbytes(8192)
        with store.create() as blob:
            writer = PackWriter(blob, raw=raw)
            digest = blake3(data).digest()
            writer.add_frame(data if raw else zstandard.compress(data), len(data), digest)
            toc = writer.finish([(digest, 0, len(data))])
            packs.append(pack_descriptor(*blob.commit(), raw=raw, device_size=len(data), toc=toc))
    index = bytes(8192)
    config = json.dumps({"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": []}}).encode()
    manifest = Manifest(
        schema_version=2,
        media_type=MANIFEST_TYPE,
        artifact_type=ARTIFACT_TYPE,
        config=Descriptor("application/vnd.oci.image.config.v1+json", *store.put(config)),
        layers=[Descriptor(INDEX_TYPE, *store.put(zstandard.compress(index)), {INDEX_SIZE: str(len(index))}), *packs],
    )
    encoded = msgspec.json.encode(manifest)
    digest, size = store.put(encoded)
    store.tag("example.org/app:1", Descriptor(MANIFEST_TYPE, digest, size, artifact_type=ARTIFACT_TYPE))
    return store, manifest, digest


def tool(*command: object) -> bytes:
    return subprocess.run([*map(str, command)], stdout=subprocess.PIPE, check=True).stdout


@pytest.mark.skipif(not shutil.which("skopeo"), reason="skopeo is not installed")
def test_skopeo_reads_and_copies(tagged: tuple[DirectoryStore, Manifest, str], tmp_path: Path):
    store, manifest, digest = tagged
    source = f"oci:{store.path}:example.org/app:1"
    assert sha256(tool("skopeo", "inspect", "--raw", source)) == digest
    copied = tmp_path / "copied"
    tool("skopeo", "copy", "--quiet", source, f"dir:{copied}")
    assert sha256((copied / "manifest.json").read_bytes()) == digest
    for layer in [manifest.config, *manifest.layers]:
        assert sha256((copied / layer.digest[7:]).read_bytes()) == layer.digest
    another = tmp_path / "another"
    tool("skopeo", "copy", "--quiet", f"dir:{copied}", f"oci:{another}:back")
    assert DirectoryStore(another, create=False).references()["back"].digest == digest


@pytest.mark.skipif(not shutil.which("umoci"), reason="umoci is not installed")
def test_umoci_lists_the_names(tagged: tuple[DirectoryStore, Manifest, str]):
    store, _, _ = tagged
    store.tag("second", named(1))
    assert set(tool("umoci", "ls", "--layout", store.path).decode().split()) == {"example.org/app:1", "second"}
