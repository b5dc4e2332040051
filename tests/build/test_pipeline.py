"""Building through the public door: determinism, deduplication, reuse, locality, gc and bad input."""

from __future__ import annotations

import gzip
import multiprocessing
import os
import random
import signal
import subprocess
import time

import pytest

from erofsgen.build.gc import collect
from erofsgen.build.options import BuildOptions
from erofsgen.build.pipeline import build_image
from erofsgen.errors import BusyError, ErofsgenError, IntegrityError, UsageError
from erofsgen.oci.images import open_image
from erofsgen.store.directory import DirectoryStore
from erofsgen.store.image import Image


def random_files(seed: int, count: int = 40, largest: int = 300_000) -> dict[bytes, bytes]:
    rng = random.Random(seed)
    files = {}
    for number in range(count):
        size = rng.choice([0, rng.randrange(1, 100), rng.randrange(100, 20_000), rng.randrange(largest)])
        data = rng.randbytes(size) if number % 3 else (b"%d text " % number) * (size // 8)
        files[b"d%d/f%d" % (number % 5, number)] = data
    return files


def contents(store, name) -> dict[bytes, bytes]:
    image = Image.open(store, name)
    return {path: b"".join(image.read(node)) for path, node in image.index.walk() if node.mode & 0o170000 == 0o100000}


def blobs(store) -> set[str]:
    return {digest for digest, _ in store.blobs()}


def test_what_goes_in_comes_out(tmp_path, make_image):
    store = DirectoryStore(tmp_path / "store")
    files = random_files(1)
    files[b"big"] = random.Random(2).randbytes(3_500_000)
    files[b"zeros"] = bytes(2_500_000)
    files[b"mostly zeros"] = b"a" + bytes(3 << 20) + b"b"
    result = make_image(store, "a", files)
    assert contents(store, "a") == files
    assert result.file_bytes == sum(map(len, files.values()))
    image = Image.open(store, "a")
    holes = [extent for extent in image.index.lookup(b"zeros").extents() if extent[2] is not None]
    assert holes == []


@pytest.mark.parametrize("threads", [1, 5])
def test_same_input_same_bytes(tmp_path, make_image, threads):
    files = random_files(3, 200)
    one, other = DirectoryStore(tmp_path / "one"), DirectoryStore(tmp_path / "other")
    first = make_image(one, "a", files, threads=2)
    time.sleep(1.1)  # another second on the clock
    second = make_image(other, "a", files, threads=threads)
    assert first.digest == second.digest
    assert blobs(one) == blobs(other)


@pytest.mark.parametrize("chunk_size", [4096, 64 << 10, 4 << 20])
def test_chunk_sizes(tmp_path, make_image, chunk_size):
    store = DirectoryStore(tmp_path / "store")
    files = {**random_files(4), b"big": random.Random(4).randbytes(5_000_001)}
    make_image(store, "a", files, chunk_size=chunk_size)
    assert contents(store, "a") == files


def test_a_second_image_shares_chunks(tmp_path, make_image):
    store = DirectoryStore(tmp_path / "store")
    files = random_files(5, 100)
    first = make_image(store, "a", files)
    second = make_image(store, "b", {**files, b"more": b"a new file" * 1000})
    assert second.new_bytes == 10_000
    assert second.deduplicated_bytes >= first.new_bytes
    assert contents(store, "b") == {**files, b"more": b"a new file" * 1000}
    alone = DirectoryStore(tmp_path / "alone")
    assert make_image(alone, "b", files, dedup=False).new_bytes == first.new_bytes


def test_few_chunks_of_an_old_pack_are_written_again(tmp_path, make_image):
    """Locality: 1 % of a large pack is not worth a device."""
    store = DirectoryStore(tmp_path / "store")
    old = {b"f%d" % n: random.Random(n).randbytes(20_000) for n in range(1000)}
    make_image(store, "old", old)
    new = {b"f%d" % n: old[b"f%d" % n] for n in range(10)}
    result = make_image(store, "new", new)
    assert result.packs == 1
    assert not {pack.digest for pack in Image.open(store, "old").packs} & {
        pack.digest for pack in Image.open(store, "new").packs
    }
    assert contents(store, "new") == new


def test_max_devices_is_kept(tmp_path, make_image):
    store = DirectoryStore(tmp_path / "store")
    files = {}
    for number in range(12):
        part = {b"p%d-%d" % (number, n): random.Random(100 * number + n).randbytes(9000) for n in range(5)}
        make_image(store, f"part{number}", part)
        files |= part
    assert make_image(store, "many", files).packs == 12
    result = make_image(store, "few", files, max_devices=4)
    assert result.packs <= 4
    assert contents(store, "few") == files


def layered(tmp_path, layers) -> str:
    """An OCI layout of gzip layers, by umoci."""
    layout = tmp_path / "layout"
    subprocess.run(["umoci", "init", "--layout", layout], check=True)
    subprocess.run(["umoci", "new", "--image", f"{layout}:a"], check=True)
    for number, files in enumerate(layers):
        directory = tmp_path / f"layer{number}"
        for name, data in files.items():
            path = directory / name.decode()
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        subprocess.run(["umoci", "insert", "--image", f"{layout}:a", directory, "/"], check=True)
    return f"oci:{layout}:a"


def test_layers_are_read_once(tmp_path):
    store = DirectoryStore(tmp_path / "store")
    base, top = random_files(6), {b"top": b"x" * 5000}
    name = layered(tmp_path, [base, top])
    with open_image(name) as source:
        first = build_image(source, store, tag="a")
    assert (first.layers, first.reused_layers) == (2, 0)
    assert contents(store, "a") == {**base, **top}
    with open_image(name) as source:
        again = build_image(source, store, tag="b")
    assert (again.reused_layers, again.file_bytes) == (2, 0)
    assert again.digest == first.digest


def test_an_interrupted_build_shows_nothing_and_resumes(tmp_path):
    """Killed while the second layer is read; the next build takes the first from its record."""
    store_path = tmp_path / "store"
    name = layered(tmp_path, [random_files(7), random_files(8, 300, 2_000_000)])
    context = multiprocessing.get_context("spawn")
    builder = context.Process(target=_build, args=(name, store_path))
    builder.start()
    records = store_path / "erofsgen" / "layers"
    deadline = time.monotonic() + 60
    while not (records.exists() and any(records.iterdir())) and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(builder.pid, signal.SIGKILL)
    builder.join()
    store = DirectoryStore(store_path)
    if builder.exitcode == -signal.SIGKILL:
        assert store.references() == {}
    with open_image(name) as source:
        result = build_image(source, store, tag="a")
    assert result.reused_layers >= 1
    collect(store)
    assert contents(store, "a") == {**random_files(7), **random_files(8, 300, 2_000_000)}
    assert list((store_path / "erofsgen" / "tmp").iterdir()) == []


def _build(name, path):
    with open_image(name) as source:
        build_image(source, DirectoryStore(path), tag="a")


def test_two_builds_at_once(tmp_path):
    name = layered(tmp_path, [random_files(9, 200), random_files(10, 200)])
    context = multiprocessing.get_context("spawn")
    builders = [context.Process(target=_build, args=(name, tmp_path / "store")) for _ in range(2)]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join()
        assert builder.exitcode == 0
    assert contents(DirectoryStore(tmp_path / "store"), "a") == {**random_files(9, 200), **random_files(10, 200)}


def test_gc_deletes_what_no_image_needs(tmp_path, make_image):
    store = DirectoryStore(tmp_path / "store")
    keep, drop = random_files(11), random_files(12)
    make_image(store, "keep", keep)
    kept = blobs(store)
    make_image(store, "drop", drop)
    store.untag("drop")
    dry = collect(store, dry_run=True)
    assert dry.blobs == len(blobs(store) - kept) > 0
    assert collect(store).blobs == dry.blobs
    assert blobs(store) == kept
    assert contents(store, "keep") == keep
    assert make_image(store, "drop", drop).reused_layers == 0
    assert contents(store, "drop") == drop


def test_gc_waits_for_no_build_but_refuses(tmp_path, make_image):
    store = DirectoryStore(tmp_path / "store")
    make_image(store, "a", random_files(13))
    with store.building(), pytest.raises(BusyError):
        collect(DirectoryStore(store.path))


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: data + b"more",
        lambda data: data[:100] + bytes([data[100] ^ 1]) + data[101:],
        lambda data: gzip.compress(b"not a tar"),
        lambda data: b"",
    ],
    ids=["half", "a byte short", "too long", "a flipped bit", "other content", "empty"],
)
def test_a_bad_layer_leaves_the_store_unchanged(tmp_path, damage):
    name = layered(tmp_path, [random_files(14)])
    layout = tmp_path / "layout"
    blob = max((layout / "blobs" / "sha256").iterdir(), key=lambda path: path.stat().st_size)
    blob.chmod(0o644)
    blob.write_bytes(damage(blob.read_bytes()))
    store = DirectoryStore(tmp_path / "store")
    before = (tmp_path / "store" / "index.json").read_bytes()
    with pytest.raises(ErofsgenError) as failure, open_image(name) as source:
        build_image(source, store, tag="a")
    assert blob.name[:12] in str(failure.value)
    assert isinstance(failure.value, IntegrityError) or "layer" in str(failure.value)
    assert (tmp_path / "store" / "index.json").read_bytes() == before
    assert list((tmp_path / "store" / "erofsgen" / "layers").iterdir()) == []
    assert list((tmp_path / "store" / "erofsgen" / "tmp").iterdir()) == []


def test_a_damaged_record_is_made_again(tmp_path, make_image):
    store = DirectoryStore(tmp_path / "store")
    files = random_files(15)
    make_image(store, "a", files)
    (key,) = store.records()
    data = store.record(key)
    for damaged in (b"", data[:50], data[:-1], b"\x00" * len(data)):
        store.put_record(key, damaged)
        assert make_image(store, "a", files).reused_layers == 0
        assert contents(store, "a") == files
    assert make_image(store, "a", files).reused_layers == 1


@pytest.mark.parametrize(
    "options",
    [{"chunk_size": 5000}, {"chunk_size": 2048}, {"compression_level": 23}, {"threads": 0}, {"max_devices": 0}],
)
def test_options_are_checked(options):
    with pytest.raises(UsageError):
        BuildOptions(**options)


def test_raw_and_zstd_packs(tmp_path, make_image):
    """Incompressible data is stored as it is, and stock zstd turns the other pack into its device."""
    store = DirectoryStore(tmp_path / "store")
    noise, text = random.Random(16).randbytes(3 << 20), b"text " * 500_000
    make_image(store, "a", {b"noise": noise, b"text": text})
    image = Image.open(store, "a")
    raw = next(pack for pack in image.packs if pack.raw)
    packed = next(pack for pack in image.packs if not pack.raw)
    assert store.blob_path(raw.digest).read_bytes()[: len(noise)] == noise
    device = subprocess.run(["zstd", "-dc", store.blob_path(packed.digest)], capture_output=True, check=True).stdout
    assert len(device) == packed.device_size
    assert device.startswith(text[: 1 << 20])


def test_holes_are_at_the_ends_of_files_only(tmp_path, make_image):
    """What the kernel reads over fscache as it should; the zeros before data are one chunk, whoever has them."""
    store = DirectoryStore(tmp_path / "store")
    piece = 1 << 20
    data = random.Random(5).randbytes(piece)
    files = {
        b"before": bytes(3 * piece) + data,
        b"between": data + bytes(2 * piece) + data[:100],
        b"behind": data + bytes(4 * piece),
        b"both": bytes(piece) + data + bytes(piece),
    }
    make_image(store, "a", files)
    assert contents(store, "a") == files
    image = Image.open(store, "a")
    assert image.manifest.layers[0].annotations["org.erofsgen.index.holes"] == "end"
    for name in files:
        holes = [extent.device is None for extent in image.index.lookup(name).extents()]
        assert holes == sorted(holes), name
    assert sum(pack.device_size for pack in image.packs) == 2 * piece + 4096, "data, zeros, and 100 bytes"


def test_repeated_zeros_are_holes_for_who_extracts(tmp_path, make_image):
    store = DirectoryStore(tmp_path / "store")
    data = random.Random(6).randbytes(1 << 20)
    make_image(store, "a", {b"file": bytes(5 << 20) + data, b"twice": data + data + b"x"})
    image = Image.open(store, "a")
    file = list(image.sparse_extents(image.index.lookup(b"file")))
    assert sum(extent.length for extent in file if extent.device is None) >= 4 << 20
    assert all(extent.device is not None for extent in image.sparse_extents(image.index.lookup(b"twice")))
