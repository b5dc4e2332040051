"""Layer blobs as streams: every compression, damage, wrong digests, and threads that always end."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
import random
import runpy
import struct
import threading
import tracemalloc
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from erofsgen.errors import FormatError, IntegrityError, RemoteError, StorageError, UnsupportedError
from erofsgen.oci import decompress
from erofsgen.oci import stream as stream_module
from erofsgen.oci.stream import open_stream

kit = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("tarkit.py"))))
PLAIN = random.Random(1).randbytes(3000) + b"the same again " * 4000


def sha256(data):
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def everything(blob, **checks):
    with kit.stream(blob, **checks) as stream:
        data = b"".join(iter(lambda: bytes(stream.read(10_000)), b""))
        stream.finish()
        return data


def gzip_members(*parts):
    return b"".join(gzip.compress(part, mtime=0) for part in parts)


def gzip_header(flags, fields):
    """A member whose header has optional fields."""
    head = b"\x1f\x8b\x08" + bytes([flags]) + bytes(4) + b"\0\xff" + fields
    if flags & 2:
        head += struct.pack("<H", zlib.crc32(head) & 0xFFFF)
    deflate = zlib.compressobj(wbits=-15)
    body = deflate.compress(PLAIN) + deflate.flush()
    return head + body + struct.pack("<II", zlib.crc32(PLAIN), len(PLAIN))


def zstd(data, **options):
    return zstandard.ZstdCompressor(**options).compress(data)


def skippable(data, number=0):
    return struct.pack("<II", 0x184D2A50 + number, len(data)) + data


def zstd_streamed(data):
    """A frame without content size, of many small blocks."""
    compressor = zstandard.ZstdCompressor(level=1, write_checksum=True).compressobj()
    pieces = [
        compressor.compress(data[at : at + 500]) + compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
        for at in range(0, len(data), 500)
    ]
    return b"".join(pieces) + compressor.flush()


HALF = len(PLAIN) // 2
BLOBS = {
    "plain": PLAIN,
    "gzip": gzip_members(PLAIN),
    "gzip stored": gzip.compress(PLAIN, 0, mtime=0),
    "gzip members": gzip_members(*(PLAIN[at : at + 1000] for at in range(0, len(PLAIN), 1000))),
    "gzip empty members": gzip_members(b"", PLAIN[:HALF], b"", PLAIN[HALF:], b""),
    "gzip header fields": gzip_header(2 | 4 | 8 | 16, b"\5\0extra" + b"name\0" + b"comment\0"),
    "gzip zero padding": gzip_members(PLAIN) + bytes(5000),
    "zstd": zstd(PLAIN),
    "zstd without size": zstd(PLAIN, write_content_size=False, write_checksum=True),
    "zstd blocks": zstd_streamed(PLAIN),
    "zstd raw blocks": zstd(PLAIN[:3000]) + zstd(PLAIN[3000:], level=19),
    "zstd frames": b"".join(zstd(PLAIN[at : at + 1000], write_checksum=True) for at in range(0, len(PLAIN), 1000)),
    "zstd skippable frames": skippable(b"first") + zstd(PLAIN[:HALF]) + skippable(b"", 9) + zstd(PLAIN[HALF:])
    + skippable(bytes(70_000), 15),
    "xz": lzma.compress(PLAIN[:HALF]) + bytes(8) + lzma.compress(PLAIN[HALF:]) + bytes(4),
    "bzip2": bz2.compress(PLAIN[:HALF]) + bz2.compress(PLAIN[HALF:]),
}  # fmt: skip
COMPRESSED = [name for name in BLOBS if name != "plain"]


@pytest.fixture(params=["isal", "zlib"])
def gzip_library(request, monkeypatch):
    if request.param == "zlib":
        monkeypatch.setattr(decompress, "GzipFile", gzip.GzipFile)
        monkeypatch.setattr(decompress, "DeflateError", zlib.error)


@pytest.mark.usefixtures("gzip_library")
@pytest.mark.parametrize("name", BLOBS)
def test_plain_bytes_come_out_and_everything_is_checked(name):
    blob = BLOBS[name]
    assert everything(blob) == PLAIN
    assert everything(blob, digest=sha256(blob), size=len(blob), diff_id=sha256(PLAIN)) == PLAIN


@pytest.mark.parametrize("name", BLOBS)
def test_wrong_names(name):
    blob = BLOBS[name]
    wrong = "sha256:" + "0" * 64
    with pytest.raises(IntegrityError, match=f"layer 1: blob digest is {sha256(blob)}, expected {wrong}"):
        everything(blob, digest=wrong)
    with pytest.raises(IntegrityError, match=f"layer 1: uncompressed digest is {sha256(PLAIN)}, expected {wrong}"):
        everything(blob, digest=sha256(blob), diff_id=wrong)
    with pytest.raises(IntegrityError, match=r"layer 1: blob is [0-9,]+ bytes long, expected"):
        everything(blob, size=len(blob) + 1)
    with pytest.raises(IntegrityError, match="layer 1: blob is longer than the expected"):
        everything(blob, size=len(blob) - 1)


def test_an_uncompressed_layer_with_a_diff_id_of_its_own():
    with pytest.raises(IntegrityError, match="uncompressed digest"):
        everything(PLAIN, digest=sha256(PLAIN), diff_id=sha256(b"other"))
    blob = BLOBS["gzip"]
    with pytest.raises(IntegrityError, match="uncompressed digest"):
        everything(blob, digest=sha256(blob), diff_id=sha256(blob))


@pytest.mark.usefixtures("gzip_library", "small_blocks")
@pytest.mark.parametrize("name", COMPRESSED)
def test_truncated_compression(name):
    """Cut anywhere: whole members and frames are a shorter blob, anything else is an error. Never a clean wrong end."""
    blob = BLOBS[name]
    lengths = sorted({*range(1, 24), *range(len(blob) - 24, len(blob)), *range(24, len(blob), max(1, len(blob) // 40))})
    for length in lengths:
        try:
            data = everything(blob[:length])
        except FormatError as error:
            assert str(error).startswith("layer 1: ")  # noqa: PT017
        else:
            if length < 6:  # too short for a magic number: it is then a plain, and no tar
                continue
            if len(data) == len(PLAIN):  # only padding or a skippable frame is missing
                assert data == PLAIN
            else:
                assert "members" in name or "frames" in name or name in ("xz", "bzip2", "zstd raw blocks")
                assert PLAIN.startswith(data)
        with pytest.raises(IntegrityError):
            everything(blob[:length], size=len(blob), digest=sha256(blob))


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(stream_module, "BLOCK_SIZE", 1 << 16)


@pytest.mark.usefixtures("gzip_library", "small_blocks")
@pytest.mark.parametrize("name", COMPRESSED)
def test_damaged_compression(name):
    blob = BLOBS[name]
    for at in [*range(24), *range(24, len(blob), max(1, len(blob) // 40)), *range(len(blob) - 12, len(blob))]:
        damaged = bytearray(blob)
        damaged[at] ^= 0x55
        with pytest.raises(IntegrityError, match="blob digest"):
            everything(bytes(damaged), digest=sha256(blob), size=len(blob))
        with pytest.raises(FormatError) if at > 9 and "zstd" not in name else Maybe(FormatError, UnsupportedError):
            data = everything(bytes(damaged), diff_id=sha256(PLAIN))
            assert data == PLAIN
            raise FormatError("an unused byte was changed")


class Maybe:
    """Passes with one of these errors, or none."""

    def __init__(self, *errors):
        self.errors = errors

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        return kind is not None and issubclass(kind, self.errors)


@pytest.mark.usefixtures("gzip_library")
@pytest.mark.parametrize(
    ("blob", "message"),
    [
        (BLOBS["gzip"] + b"garbage behind it", "layer 1: bad gzip data"),
        (BLOBS["gzip"] + bytes(100) + b"garbage behind it", "layer 1: bad gzip data"),
        (BLOBS["gzip"][:3] + b"\xe0" + BLOBS["gzip"][4:-8] + bytes(8), "layer 1: "),
        (BLOBS["gzip"] + b"\x1f\x8b\x08", "layer 1: gzip data ends before its end marker"),
        (BLOBS["zstd"] + b"garbage behind it", "layer 1: bad zstd data"),
        (BLOBS["zstd"] + skippable(b"abc")[:-1], "layer 1: zstd data ends inside a frame"),
        (BLOBS["zstd"] + b"\x28\xb5", "layer 1: zstd data ends inside a frame"),
        (zstd(b"x" * 10)[:4], "layer 1: zstd data ends inside a frame"),
        (BLOBS["xz"] + b"garbage behind it", "layer 1: bad xz data"),
        (BLOBS["bzip2"] + b"garbage", "layer 1: bad bzip2 data"),
    ],
)
def test_garbage_is_refused(blob, message):
    with pytest.raises(FormatError) as error:
        everything(blob)
    assert str(error.value).startswith(message)
    with pytest.raises(IntegrityError, match="blob digest"):
        everything(blob, digest=sha256(BLOBS["gzip"]))


def test_memory_hungry_compression_is_refused(monkeypatch):
    monkeypatch.setattr(decompress, "XZ_MEMORY", 1 << 20)
    with pytest.raises(FormatError, match="layer 1: bad xz data: Memory usage limit exceeded"):
        everything(lzma.compress(b"x", preset=1))
    window = zstandard.ZstdCompressionParameters.from_level(3, window_log=30)
    frame = zstandard.ZstdCompressor(compression_params=window).compressobj()
    blob = frame.compress(b"x" * 100) + frame.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK) + frame.flush()
    with pytest.raises(FormatError, match="layer 1: bad zstd data"):
        everything(blob)


def test_encrypted_layers_and_other_digests_are_refused():
    for checks in (
        {"media_type": "application/vnd.oci.image.layer.v1.tar+gzip+encrypted"},
        {"digest": "sha512:" + "0" * 128},
        {"diff_id": "md5:0"},
    ):
        with pytest.raises(UnsupportedError, match="layer 1"):
            kit.stream(PLAIN, **checks)


def test_empty_blobs():
    assert everything(b"", digest=sha256(b""), size=0, diff_id=sha256(b"")) == b""
    assert everything(gzip_members(b""), diff_id=sha256(b"")) == b""
    assert everything(zstd(b""), diff_id=sha256(b"")) == b""


@pytest.mark.parametrize("name", ["plain", "gzip", "zstd", "xz"])
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps=st.lists(st.tuples(st.booleans(), st.integers(0, 9000)), max_size=40))
def test_read_skip_and_tell(name, steps):
    """Any series of calls, over blocks of odd size, against the plain bytes."""
    size, stream_module.BLOCK_SIZE = stream_module.BLOCK_SIZE, 4001
    try:
        with kit.stream(BLOBS[name], diff_id=sha256(PLAIN)) as stream:
            at = 0
            for reads, count in steps:
                expected = PLAIN[at : at + count]
                if reads:
                    assert stream.read(count) == expected
                else:
                    assert stream.skip(count) == len(expected)
                at += len(expected)
                assert stream.tell() == at
            stream.finish()
            assert stream.read(10) == b""
            assert stream.skip(10) == 0
    finally:
        stream_module.BLOCK_SIZE = size


def test_reads_inside_a_block_are_not_copied():
    with kit.stream(BLOBS["gzip"]) as stream:
        first, second = stream.read(1000), stream.read(1000)
        assert first.obj is second.obj is stream.buffer.obj
        assert first.readonly


BOMB = 64 << 20


@pytest.mark.parametrize(
    "compress", [lambda data: gzip.compress(data, 1), zstd, lambda data: lzma.compress(data, preset=0)]
)
def test_a_decompression_bomb_costs_no_memory(compress):
    blob = compress(bytes(BOMB))
    assert len(blob) < 1 << 20
    tracemalloc.start()
    try:
        with kit.stream(blob, diff_id=sha256(bytes(BOMB))) as stream:
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            assert stream.skip(1 << 40) == BOMB
            stream.finish()
            peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak - before < 24 << 20


class Raw(io.RawIOBase):
    """A blob that gives a few bytes at a time, and then fails, or waits until it is told to go on."""

    def __init__(self, data, error=None, gate=None):
        self.data, self.error, self.gate = io.BytesIO(data), error, gate

    def readable(self):
        return True

    def readinto(self, buffer):
        count = self.data.readinto(memoryview(buffer)[:777])
        if not count and self.gate is not None:
            self.gate.wait()
        if not count and self.error is not None:
            raise self.error
        return count


class ReadOnly:
    """The least a source may have."""

    def __init__(self, data):
        self.data, self.closed = io.BytesIO(data), False

    def read(self, size=-1):
        return self.data.read(min(size, 999) if size >= 0 else size)

    def close(self):
        self.closed = True


def threads_of(what):
    return [thread for thread in threading.enumerate() if what in thread.name]


def open_raw(raw, what, **checks):
    return open_stream(
        raw, **({"media_type": "", "digest": None, "size": None, "diff_id": None, "what": what} | checks)
    )


@pytest.mark.parametrize("name", BLOBS)
@pytest.mark.parametrize("kind", [Raw, ReadOnly])
def test_sources_that_give_little_at_a_time(name, kind):
    raw = kind(BLOBS[name])
    with open_raw(raw, "trickle", digest=sha256(BLOBS[name]), diff_id=sha256(PLAIN)) as stream:
        assert stream.read(len(PLAIN) + 1) == PLAIN
        stream.finish()
    assert raw.closed


@pytest.mark.parametrize("name", ["plain", "gzip", "zstd", "xz"])
@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (RemoteError("registry went away"), RemoteError, "registry went away"),
        (OSError(5, "Input/output error"), StorageError, "layer 1: Input/output error"),
        (MemoryError(), MemoryError, ""),
    ],
)
def test_errors_of_the_source_are_passed_on(name, error, raised, message):
    raw = Raw(BLOBS[name][:-9], error)
    with open_raw(raw, "layer 1", diff_id=sha256(PLAIN)) as stream:
        for _ in range(2):  # it does not go away
            with pytest.raises(raised) as caught:
                stream.finish()
            assert str(caught.value) == message
    assert raw.closed


def test_closing_early_ends_the_threads_and_closes_the_blob(monkeypatch):
    monkeypatch.setattr(stream_module, "BLOCK_SIZE", 100)  # far more blocks than the queues hold
    for name, blob in BLOBS.items():
        raw = Raw(blob)
        with open_raw(raw, f"early {name}", diff_id=sha256(PLAIN)) as stream:
            stream.read(10)
        assert raw.closed
        stream.close()
        with pytest.raises(ValueError, match="closed"):
            stream.read(1)
        for thread in threads_of(f"early {name}"):
            thread.join(10)
            assert not thread.is_alive()


def test_closing_waits_for_a_read_that_is_under_way():
    gate = threading.Event()
    raw = Raw(PLAIN, gate=gate)
    stream = open_raw(raw, "gate")
    closer = threading.Thread(target=stream.close)
    closer.start()
    closer.join(0.05)
    assert closer.is_alive()
    assert not raw.closed
    gate.set()
    closer.join(10)
    assert raw.closed
    for thread in threads_of("gate"):
        thread.join(10)


def test_frame_walker_in_pieces_of_any_size():
    for name in (name for name in BLOBS if name.startswith("zstd")):
        blob = BLOBS[name]
        for step in (1, 2, 3, 7, 1000, len(blob)):
            walker = decompress.FrameWalker()
            for at in range(0, len(blob), step):
                walker.feed(blob[at : at + step])
                assert walker.complete <= (at + step >= len(blob) or "frames" in name or name == "zstd raw blocks")
            assert walker.complete
