"""The tar parser: every dialect, hostile and broken archives, and file data."""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import stat
import subprocess
import sys
import tarfile
import textwrap
from pathlib import Path
from types import SimpleNamespace

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from erofsgen.errors import ErofsgenError, FormatError, IntegrityError, UnsupportedError
from erofsgen.oci import stream as stream_module
from erofsgen.oci import tar as tar_module
from erofsgen.oci.layer import LINK, OPAQUE, PUT, WHITEOUT
from erofsgen.oci.tar import TarReader

kit = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("tarkit.py"))))
archive, header, padded, pax, T = kit.archive, kit.header, kit.padded, kit.pax, kit.T
GNU = b"ustar  \0"
V7 = bytes(8)


def only(*blocks, **checks):
    """The single entry of an archive."""
    (entry,) = kit.entries(archive(*blocks), **checks)
    return entry


def path_of(*blocks):
    return only(*blocks).path


# dialects


@pytest.mark.parametrize("magic", [V7, b"ustar\x0000", GNU], ids=["v7", "ustar", "gnu"])
def test_plain_fields(magic):
    block = header(b"usr/x", size=3, mode=0o4751, uid=12, gid=34, mtime=56, magic=magic)
    inode = only(block, padded(b"abc")).inode
    assert (inode.mode, inode.uid, inode.gid, inode.mtime) == (stat.S_IFREG | 0o4751, 12, 34, 56 * 10**9)
    assert (inode.size, inode.data) == (3, b"abc")


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"name": b"n" * 100}, b"n" * 100),
        ({"name": b"name", "prefix": b"some/prefix"}, b"some/prefix/name"),
        ({"name": b"n" * 100, "prefix": b"p" * 155}, b"p" * 155 + b"/" + b"n" * 100),
        ({"name": b"name", "prefix": b"not a prefix", "magic": GNU}, b"name"),
        ({"name": b"name", "prefix": b"not a prefix", "magic": V7}, b"name"),
        ({"name": b"name", "prefix": b"p" * 131 + b"12345", "fields": {508: b"tar\0"}}, b"p" * 131 + b"/name"),
        ({"name": b"name\0left over"}, b"name"),
        ({"name": b"\xff\xfe \n"}, b"\xff\xfe \n"),
    ],
)
def test_names_in_headers(fields, path):
    assert path_of(header(fields.pop("name"), **fields)) == path


def test_octal_fields_may_be_padded_with_spaces_or_empty():
    inode = only(header(b"x", uid=b"   17 \0", gid=b"    21\0 ", mtime=bytes(12), mode=b"000755 \0")).inode
    assert (inode.uid, inode.gid, inode.mtime, inode.mode & 0o7777) == (0o17, 0o21, 0, 0o755)


def test_base_256_numbers():
    inode = only(
        header(b"x", uid=kit.base256(2**32 - 2, 8), gid=kit.base256(70_000, 8), mtime=kit.base256(-5, 12))
    ).inode
    assert (inode.uid, inode.gid, inode.mtime) == (2**32 - 2, 70_000, -5 * 10**9)


def test_times_no_file_system_holds_become_zero():
    assert only(header(b"x", mtime=b"777777777777")).inode.mtime == 0
    assert only(pax({b"mtime": b"-99999999999"}), header(b"x")).inode.mtime == 0


@pytest.mark.parametrize("high", [b"\xe9\xff", b"\x80" * 20])
def test_signed_checksums(high):
    block = bytearray(header(high))
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % (sum(byte - 256 if byte > 127 else byte for byte in block) & 0o777777)
    assert path_of(bytes(block)) == high


def test_gnu_long_names():
    name, link = b"a/" + b"n" * 250, b"t" * 300
    entry = only(kit.gnu_long(b"K", link), kit.gnu_long(b"L", name), header(b"short", b"2", link=b"short", magic=GNU))
    assert (entry.path, entry.inode.data) == (name, link)
    after = kit.entries(archive(kit.gnu_long(b"L", name), header(b"x"), header(b"y")))
    assert [entry.path for entry in after] == [name, b"y"]


def test_pax_records_override_the_header():
    records = {
        b"path": b"p/" + b"x" * 200,
        b"uid": b"4294967295",
        b"gid": b"99999",
        b"mtime": b"1234567890.123456789123",
        b"size": b"4",
        b"hdrcharset": b"BINARY",
        b"comment": b"ignored",
        b"SCHILY.acl.access": b"ignored",
    }
    inode = only(pax(records), header(b"short", size=0), padded(b"data")).inode
    assert (inode.uid, inode.gid, inode.mtime) == (2**32 - 1, 99999, 1234567890_123456789)
    assert (inode.size, inode.data, inode.xattrs) == (4, b"data", ())


@pytest.mark.parametrize(
    ("text", "nanoseconds"),
    [
        (b"0", 0),
        (b"1.", 10**9),
        (b"1.5", 1_500_000_000),
        (b"-1.5", -1_500_000_000),
        (b"-0.000000001", -1),
        (b"9007199254740993.000000001", 0),  # beyond 64 bits of nanoseconds
        (b"9007199254.740993001", 9007199254_740993001),  # a double would lose this
    ],
)
def test_pax_times_are_exact(text, nanoseconds):
    assert only(pax({b"mtime": text}), header(b"x")).inode.mtime == nanoseconds


def test_global_pax_records_hold_until_overridden():
    found = kit.entries(
        archive(
            pax({b"uid": b"7", b"gid": b"8", b"SCHILY.xattr.user.g": b"1"}, b"g"),
            header(b"a"),
            pax({b"uid": b"9"}),
            header(b"b"),
            pax({b"gid": b""}, b"g"),
            header(b"c", gid=3),
        )
    )
    assert [(e.inode.uid, e.inode.gid) for e in found] == [(7, 8), (9, 8), (7, 3)]
    assert all(e.inode.xattrs == ((b"user.g", b"1"),) for e in found)


def test_xattrs_are_bytes_and_only_those_an_image_carries():
    records = {
        b"SCHILY.xattr.user.z": bytes(range(256)),
        b"SCHILY.xattr.security.capability": b"\1",
        b"SCHILY.xattr.trusted.overlay.opaque": b"y",
        b"SCHILY.xattr.trusted.a": b"=\n",
        b"SCHILY.xattr.system.posix_acl_access": b"\2\0\0\0",
        b"SCHILY.xattr.system.nfs4_acl": b"x",
        b"SCHILY.xattr.com.apple.provenance": b"x",
        b"SCHILY.xattr.user.": b"x",
        b"LIBARCHIVE.xattr.user.z": b"eA==",
    }
    assert only(pax(records), header(b"f")).inode.xattrs == (
        (b"security.capability", b"\1"),
        (b"system.posix_acl_access", b"\2\0\0\0"),
        (b"trusted.a", b"=\n"),
        (b"user.z", bytes(range(256))),
    )
    assert dict(only(pax(records), header(b"f", b"2", link=b"t")).inode.xattrs).keys() == {
        b"security.capability",
        b"system.posix_acl_access",
        b"trusted.a",
    }


@pytest.mark.parametrize(
    ("kind", "name", "mode", "data"),
    [
        (b"0", b"x", stat.S_IFREG, b"12345"),
        (b"\0", b"x", stat.S_IFREG, b"12345"),
        (b"\0", b"x/", stat.S_IFDIR, None),
        (b"0", b"x/", stat.S_IFREG, b"12345"),
        (b"7", b"x", stat.S_IFREG, b"12345"),  # contiguous
        (b"s", b"x", stat.S_IFREG, b"12345"),  # unknown: POSIX says regular
        (b"D", b"x", stat.S_IFDIR, b""),  # GNU dump-dir, whose data is no content
        (b"5", b"x", stat.S_IFDIR, None),
        (b"6", b"x", stat.S_IFIFO, None),
        (b"3", b"x", stat.S_IFCHR, None),
        (b"4", b"x", stat.S_IFBLK, None),
    ],
)
def test_types(kind, name, mode, data):
    """A size counts where data follows; links, directories and devices have none whatever their header says."""
    block = header(name, kind, 5, rdev=(8, 1)) + (padded(b"12345") if data is not None else b"")
    first, second = kit.entries(archive(block, header(b"next")))
    assert (first.path, first.op, stat.S_IFMT(first.inode.mode), second.path) == (b"x", PUT, mode, b"next")
    assert first.inode.data == (data or b"")
    assert first.inode.size == len(data or b"")
    assert first.inode.rdev == (os.makedev(8, 1) if kind in (b"3", b"4") else 0)


def test_links():
    found = kit.entries(
        archive(header(b"s", b"2", 9, link=b"../t//x"), header(b"h", b"1", 9, link=b"/../t//x", mode=0o600))
    )
    assert [(e.op, e.path, e.target, e.inode.data, e.inode.size) for e in found] == [
        (PUT, b"s", b"", b"../t//x", 0),
        (LINK, b"h", b"t/x", b"", 0),
    ]
    assert found[1].inode.mode & 0o7777 == 0o600


def test_volume_labels_and_old_long_names_are_passed_over():
    skipped = [header(b"label", b"V", magic=GNU), header(b"names", b"N", 700, magic=GNU), bytes(1024)]
    assert path_of(*skipped, header(b"x")) == b"x"


@pytest.mark.parametrize(
    ("name", "op", "path"),
    [
        (b".wh.x", WHITEOUT, b"x"),
        (b"a/.wh.x", WHITEOUT, b"a/x"),
        (b"./a//.wh.x y", WHITEOUT, b"a/x y"),
        (b"a/.wh..x", WHITEOUT, b"a/.x"),
        (b"a/.wh..wh..opq", OPAQUE, b"a"),
        (b".wh..wh..opq", OPAQUE, b""),
        (b"a/x.wh.y", PUT, b"a/x.wh.y"),
        (b"a.wh./x", PUT, b"a.wh./x"),
    ],
)
def test_whiteouts(name, op, path):
    entry = only(header(name, size=1), padded(b"x"))
    assert (entry.op, entry.path) == (op, path)
    assert (entry.inode is None) == (op != PUT)


def test_aufs_files_are_ignored():
    names = [b".wh..wh.aufs", b".wh..wh.plnk/", b".wh..wh.plnk/12.34", b"a/.wh..wh.x", b".wh..wh.orph/.wh..wh..opq"]
    assert kit.entries(archive(*(header(name, size=2) + padded(b"zz") for name in names))) == []


def test_stargz_members_are_files():
    names = [b"stargz.index.json", b".prefetch.landmark", b".no.prefetch.landmark"]
    assert [e.path for e in kit.entries(archive(*map(header, names)))] == names


# what is refused


def huge_sparse(name, size):
    return header(name, b"S", 0, magic=GNU, fields={483: kit.base256(size, 12)})


def padded_pairs(*pairs):
    """Sparse map entries in base 256, which can be negative."""
    return b"".join(kit.base256(value, 12) if value < 0 else b"%011o\0" % value for pair in pairs for value in pair)


SPARSE_1_0 = pax({b"GNU.sparse.major": b"1", b"GNU.sparse.minor": b"0", b"GNU.sparse.realsize": b"5000"})


def sparse_gnu(pairs, stored, real, more=b"", extended=0):
    text = b"".join(b"%011o\0%011o\0" % pair for pair in pairs)
    return (
        header(b"s", b"S", stored, magic=GNU, fields={386: text, 482: bytes([extended]), 483: b"%011o\0" % real}) + more
    )


REFUSED = [
    ("not tar", b"hello" * 200, "layer 1: at byte 0 of the tar: this is not a tar archive"),
    ("a later header", header(b"a") + b"x" * 512, "layer 1: at byte 512 of the tar: bad header checksum"),
    (
        "a wrong checksum",
        header(b"a") + header(b"b").replace(b"b", b"c"),
        "at byte 512 of the tar: bad header checksum",
    ),
    ("zeros between", header(b"a") + bytes(512) + header(b"b"), "a block of zeros stands between two members"),
    ("half an end marker", header(b"a") + bytes(700), "truncated in its end marker"),
    ("no name", header(b""), "a member has no name"),
    ("long component", pax({b"path": b"a/" + b"b" * 256 + b"/c"}) + header(b"x"), "longer than 255 bytes"),
    ("long last component", pax({b"path": b"a/" + b"b" * 256}) + header(b"x"), "longer than 255 bytes"),
    (
        "long path",
        pax({b"path": b"abc/" * 1024 + b"d"}) + header(b"x"),
        "its path is 4,097 bytes long, more than 4,095",
    ),
    ("NUL in a name", pax({b"path": b"a\0b"}) + header(b"x"), "NUL byte"),
    ("NUL in a parent", pax({b"path": b"a\0b/c"}) + header(b"x"), "NUL byte"),
    ("NUL in a hard link", pax({b"linkpath": b"a\0b"}) + header(b"x", b"1"), "NUL byte"),
    ("NUL in a symlink", pax({b"linkpath": b"a\0b"}) + header(b"x", b"2"), "NUL byte"),
    ("long symlink", pax({b"linkpath": b"a" * 4096}) + header(b"x", b"2"), "symlink target is too long"),
    ("empty symlink", header(b"x", b"2"), "a link without a target"),
    ("empty hard link", header(b"x", b"1"), "a link without a target"),
    ("whiteout of nothing", header(b"a/.wh."), "a whiteout that names no file"),
    ("whiteout of .", header(b"a/.wh.."), "a whiteout that names no file"),
    ("whiteout of ..", header(b"a/.wh..."), "a whiteout that names no file"),
    ("negative size", header(b"x", size=kit.base256(-1, 12)), "its size is negative"),
    ("negative size of what is passed over", header(b"x", b"V", kit.base256(-512, 12), magic=GNU), "size is negative"),
    ("negative size of a long name", header(b"x", b"L", kit.base256(-512, 12), magic=GNU), "extended header of -512"),
    ("absurd size", header(b"x", size=kit.base256(1 << 80, 12)), "does not fit 64 bits"),
    ("8 EiB of data", header(b"x", size=kit.base256((1 << 63) - 1, 12)), "truncated in this member's data"),
    ("large owner", header(b"x", uid=kit.base256(1 << 32, 8)), "owner 4294967296:0 does not fit 32 bits"),
    ("negative owner", header(b"x", gid=kit.base256(-2, 8)), "owner 0:-2 does not fit 32 bits"),
    ("large PAX owner", pax({b"uid": b"4294967296"}) + header(b"x"), "does not fit 32 bits"),
    ("not octal", header(b"x", mode=b"0000648\0"), "not octal"),
    ("underscores are no digits", header(b"x", size=b"0000_000001\0"), "not octal"),
    ("large device", header(b"x", b"3", rdev=(4096, 0)), "device number 4096:0 is beyond"),
    ("multi-volume", header(b"x", b"M", magic=GNU), "one volume of several"),
    ("huge PAX header", header(b"x", b"x", 1 << 21), "an extended header of 2,097,152 bytes"),
    ("huge long name", header(b"x", b"L", kit.base256(1 << 62, 12), magic=GNU), "an extended header of 4,611"),
    ("PAX header and the end", pax({b"path": b"x"}) + bytes(1024), "ends after an extended header"),
    ("PAX header and nothing", pax({b"path": b"x"}), "truncated in a header"),
    ("sparse map out of order", sparse_gnu([(512, 512), (0, 512)], 1024, 4096, bytes(1024)), "out of order"),
    ("sparse map overlaps", sparse_gnu([(0, 600), (512, 424)], 1024, 4096, bytes(1024)), "out of order"),
    ("sparse map beyond the end", sparse_gnu([(4000, 512)], 512, 4096, bytes(512)), "beyond the file's end"),
    (
        "sparse map counts wrong",
        sparse_gnu([(0, 512)], 1024, 4096, bytes(1024)),
        "counts 512 bytes, the archive holds 1,024",
    ),
    (
        "sparse map that goes back",
        header(b"s", b"S", 512, magic=GNU, fields={386: padded_pairs((0, 1024), (1024, -512)), 483: b"%011o\0" % 4096}),
        "out of order",
    ),
    ("negative sparse size", huge_sparse(b"x", -5), "its size is negative"),
    ("sparse map cut", sparse_gnu([(0, 512)], 512, 4096, extended=1), "truncated in this member's sparse map"),
    (
        "sparse map endless",
        sparse_gnu([(0, 1)], 1, 1, (b"%011o\0%011o\0" % (1, 0) * 21 + b"\1" + bytes(7)) * 3000, extended=1),
        "its sparse map is too long",
    ),
    ("sparse 1.0 without a map", SPARSE_1_0 + header(b"x"), "sparse map is longer than its data"),
    ("sparse 1.0 without a count", SPARSE_1_0 + header(b"x", size=512) + padded(b"x"), "sparse map has no length"),
    (
        "sparse 1.0 with a huge count",
        SPARSE_1_0 + header(b"x", size=1 << 22) + padded(b"99999999\n") + bytes(1 << 22),
        "sparse map is too long",
    ),
    (
        "sparse 0.1 with half a pair",
        pax({b"GNU.sparse.map": b"0,1,2", b"GNU.sparse.size": b"9"}) + header(b"x", size=1) + padded(b"x"),
        "not made of pairs",
    ),
    ("sparse 0.0 unordered", pax({b"GNU.sparse.numbytes": b"10"}) + header(b"x"), "do not alternate"),
]


@pytest.mark.parametrize(("tar", "message"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_refused(tar, message):
    with pytest.raises((FormatError, UnsupportedError)) as error:
        kit.entries(tar)
    assert message in str(error.value)
    assert str(error.value).startswith("layer 1: ")


@pytest.mark.parametrize(
    "data",
    [
        b"x",
        b"5\n",
        b"8 path=a\n\n",
        b"7 path=a\n",
        b"0 path=a\n",
        b"-9 path=a\n",
        b"9 pathxa\n",
        b"6 =ab\n",
        b"99999999999999999999999 a=b\n",
        b"9\0path=a\n",
        b"10 pa\0th=a\n",
        b" 9 path=a\n",
        b"9_0 path=a\n",
        b"9 path=a\n9 path=",
    ],
)
def test_malformed_pax_records_are_refused(data):
    with pytest.raises(FormatError, match="bad PAX header"):
        kit.entries(archive(header(b"pax", b"x", len(data)), padded(data), header(b"x")))


def test_of_equal_pax_records_the_last_counts_and_empty_ones_take_back():
    data = b"9 path=a\n9 path=b\n8 uid=9\n7 uid=\n" + kit.record(b"SCHILY.xattr.user.empty", b"")
    entry = only(header(b"pax", b"x", len(data)), padded(data), header(b"x", uid=4))
    assert (entry.path, entry.inode.uid, entry.inode.xattrs) == (b"b", 4, ((b"user.empty", b""),))


@pytest.mark.parametrize("key", [b"size", b"uid", b"gid", b"mtime"])
@pytest.mark.parametrize("value", [b"x", b"1e3", b"1_0", b" 1", b"9" * 5000, b"\xd9\xa1"])
def test_malformed_pax_numbers_are_refused(key, value):
    with pytest.raises(FormatError, match="bad PAX header"):
        kit.entries(archive(pax({key: value}), header(b"x")))


def test_extended_headers_cannot_fill_the_memory(monkeypatch):
    monkeypatch.setattr(tar_module, "XATTR_LIMIT", 100_000)
    members = [pax({b"SCHILY.xattr.user.%d" % number: bytes(60_000)}) + header(b"x") for number in range(3)]
    with pytest.raises(UnsupportedError, match="of xattrs in one layer"):
        kit.entries(archive(*members))
    with pytest.raises(UnsupportedError, match="too many global PAX records"):
        kit.entries(archive(*(pax({b"k%d" % number: bytes(60_000)}, b"g") for number in range(30))))


def test_long_xattrs_are_refused():
    with pytest.raises(FormatError, match=r"xattr .* cannot be stored"):
        kit.entries(archive(pax({b"SCHILY.xattr.user.x": bytes(65536)}), header(b"x")))
    with pytest.raises(FormatError, match=r"xattr .* cannot be stored"):
        kit.entries(archive(pax({b"SCHILY.xattr.user." + b"x" * 251: b""}), header(b"x")))


# truncation and damage


def every_kind():
    """A small archive of everything, and the lengths at which it may end as if it were complete."""
    members = [
        [header(b"dir/", b"5")],
        [header(b"dir/file", size=700), padded(b"d" * 700)],
        [pax({b"path": b"dir/" + b"l" * 150, b"SCHILY.xattr.user.a": b"\0"}), header(b"l", size=3), padded(b"abc")],
        [kit.gnu_long(b"L", b"g" * 200) + header(b"g", b"2", link=b"t", magic=GNU)],
        [sparse_gnu([(512, 512), (2048, 10)], 522, 4096), padded(b"s" * 522)],
        [SPARSE_1_0, header(b"s1", size=512 + 4), padded(b"1\n4096\n4\n"), padded(b"tail")],
        [header(b"dir/hard", b"1", link=b"dir/file")],
        [header(b"dir/.wh.gone")],
    ]
    ends, length = {0}, 0
    for blocks in members:
        length += sum(map(len, blocks))
        # the padding after the last data may be missing
        ends.update(range(length - len(blocks[-1]) + len(blocks[-1].rstrip(b"\0")), length) if len(blocks) > 1 else ())
        ends.add(length)
    # one block of zeros will do as an end marker
    ends.update((length + 512, length + 1024))
    return archive(*(block for blocks in members for block in blocks)), ends


@pytest.fixture
def small_blocks(monkeypatch):
    """Thousands of short streams: small blocks are quicker to allocate."""
    monkeypatch.setattr(stream_module, "BLOCK_SIZE", 1 << 14)


@pytest.mark.usefixtures("small_blocks")
def test_truncation_anywhere():
    tar, ends = every_kind()
    whole = [entry.path for entry in kit.entries(tar)]
    assert len(whole) == 8
    for length in range(len(tar) + 1):
        if length % 512 not in (0, 1, 511) and length % 11:  # every block's edges, and samples between them
            continue
        if length in ends:
            found = [entry.path for entry in kit.entries(tar[:length])]
            assert found == whole[: len(found)]
        else:
            with pytest.raises(FormatError, match=r"at byte \S+ of the tar: the archive is truncated"):
                kit.entries(tar[:length])


@pytest.mark.usefixtures("small_blocks")
def test_damage_anywhere_is_a_format_error_or_harmless():
    tar, _ = every_kind()
    headers = [at for at in range(len(tar) - 1024) if tar[at // 512 * 512 + 257 :].startswith(b"ustar")]
    for at in range(0, len(tar) - 1024, 5):  # no divisor of 512: every field is hit in some header
        damaged = bytearray(tar)
        damaged[at] ^= 0x81
        if at in headers and at % 512 != 155:  # that byte lies behind the end of the checksum field's number
            with pytest.raises(FormatError, match="this is not a tar archive" if at < 512 else "bad header checksum"):
                kit.entries(bytes(damaged))
        else:
            with contextlib.suppress(FormatError):
                kit.entries(bytes(damaged))


def test_a_damaged_blob_is_blamed_before_its_tar():
    tar = archive(header(b"a"), header(b"b"))
    digest = "sha256:" + "0" * 64
    with pytest.raises(IntegrityError, match="blob digest is"):
        kit.entries(tar[:600], digest=digest)
    with pytest.raises(IntegrityError, match="blob digest is"):
        kit.entries(tar[:512] + b"?" * 512 + bytes(1 << 16), digest=digest)
    with pytest.raises(IntegrityError, match="uncompressed digest is"):
        kit.entries(tar[:512] + b"?" * 512 + bytes(1 << 16), diff_id=digest)
    with pytest.raises(IntegrityError, match="blob digest is"):
        kit.entries(tar, digest=digest)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.binary(max_size=600), st.integers(0, 511), st.binary(max_size=40))
def test_no_input_raises_anything_else(data, at, noise):
    """Random bytes, and a header with noise in it whose checksum is right."""
    block = bytearray(header(b"x", size=len(data)))
    block[at : at + len(noise)] = noise
    block = block[:512]
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    for tar in (data, bytes(block) + padded(data) + bytes(1024)):
        with contextlib.suppress(ErofsgenError):
            kit.entries(tar)


# the same archives through another parser

NAMES = st.lists(
    st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=60), min_size=1, max_size=5
)


@st.composite
def tarinfos(draw):
    parts = draw(
        NAMES.filter(
            lambda parts: all(p not in (".", "..") and len(p.encode()) < 256 and ".wh." not in p for p in parts)
        )
    )
    info = tarfile.TarInfo("/".join(parts))
    info.mode = draw(st.integers(0, 0o7777))
    info.uid, info.gid = draw(st.integers(0, 2**32 - 1)), draw(st.integers(0, 2**32 - 1))
    info.type = draw(
        st.sampled_from([tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE])
    )
    nanoseconds = draw(st.integers(-(2**62), 2**62))
    info.mtime = nanoseconds // 10**9
    if info.type == tarfile.REGTYPE:
        info.size = draw(st.integers(0, 2000))
    if info.type in (tarfile.SYMTYPE, tarfile.LNKTYPE):
        info.linkname = "/".join(draw(NAMES.filter(lambda parts: not {".", ".."} & set(parts))))
    if info.type == tarfile.CHRTYPE:
        info.devmajor, info.devminor = draw(st.integers(0, 4095)), draw(st.integers(0, 2**20 - 1))
    return info, nanoseconds


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(tarinfos(), max_size=6), st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
def test_agrees_with_tarfile(members, form):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as out:
        for info, nanoseconds in members:
            if form == tarfile.PAX_FORMAT:
                seconds, rest = divmod(abs(nanoseconds), 10**9)
                info.pax_headers = {"mtime": f"{'-' if nanoseconds < 0 else ''}{seconds}.{rest:09}"}
            out.addfile(info, io.BytesIO(bytes(index % 251 for index in range(info.size))))
    ours = kit.entries(buffer.getvalue())
    buffer.seek(0)
    with tarfile.open(fileobj=buffer) as theirs:
        infos = theirs.getmembers()
        assert len(ours) == len(infos) == len(members)
        for entry, info, (_, nanoseconds) in zip(ours, infos, members, strict=True):
            inode = entry.inode
            assert entry.path == info.name.encode("utf-8", "surrogateescape")
            assert (inode.mode & 0o7777, inode.uid, inode.gid) == (info.mode, info.uid, info.gid)
            assert (entry.op == LINK) == info.islnk()
            if form == tarfile.PAX_FORMAT:
                assert inode.mtime == nanoseconds
            else:
                assert inode.mtime == info.mtime * 10**9
            if info.isreg():
                assert inode.data == theirs.extractfile(info).read()
            elif info.issym():
                assert inode.data == info.linkname.encode()
            elif info.islnk():
                assert entry.target == info.linkname.encode()
            elif info.ischr():
                assert inode.rdev == os.makedev(info.devmajor, info.devminor)


# sparse files

SPARSE_FORMATS = [
    ["--format=gnu"],
    ["--format=posix", "--sparse-version=0.0"],
    ["--format=posix", "--sparse-version=0.1"],
    ["--format=posix", "--sparse-version=1.0"],
]


@pytest.mark.parametrize("options", SPARSE_FORMATS, ids=" ".join)
def test_sparse_files_of_gnu_tar(tmp_path, options):
    files = {
        "empty": [(1 << 20, b"")],
        "head": [(0, b"head" * 1000), (1 << 20, b"")],
        "tail": [((1 << 20) - 10, b"0123456789")],
        "many": [(65536 * number, b"%07d" % number * 300) for number in range(60)],
        "dense": [(0, os.urandom(20_000))],
        "n" * 120: [(200_000, b"long name")],
    }
    for name, pieces in files.items():
        with (tmp_path / name).open("wb") as file:
            for at, data in pieces:
                file.seek(at)
                file.write(data)
            file.truncate(max(at + len(data) for at, data in pieces))
    names = sorted(files)
    tar = subprocess.run(
        ["tar", "-c", "--sparse", "--hole-detection=raw", *options, *names],
        cwd=tmp_path,
        capture_output=True,
        check=True,
    ).stdout
    assert len(tar) < 400_000
    for chunk_size in (1000, 4096, 65536, 1 << 21):
        with kit.stream(tar) as source:
            found = []
            for entry, data in TarReader(source):
                want = (tmp_path / entry.path.decode()).read_bytes()
                assert entry.inode.size == data.size == len(want)
                pieces = list(data.chunks(chunk_size))
                assert len(pieces) == -(-len(want) // chunk_size)
                for number, piece in enumerate(pieces):
                    expected = want[number * chunk_size : (number + 1) * chunk_size]
                    if piece is None:
                        assert not any(expected)
                    else:
                        assert piece == expected
                if entry.path == b"empty":
                    assert pieces == [None] * len(pieces)
                found.append(entry.path.decode())
            assert found == names


def test_sparse_members_left_unread_are_passed_over():
    tar, _ = every_kind()
    with kit.stream(tar) as source:
        assert len([entry.path for entry, _ in TarReader(source)]) == 8


def test_holes_of_a_hostile_size_are_refused_and_large_ones_are_cheap():
    with pytest.raises(UnsupportedError, match="more than 4 TiB of holes in one layer"):
        kit.entries(archive(huge_sparse(b"x", (1 << 63) - 1)))
    with kit.stream(archive(huge_sparse(b"lastlog", 1 << 40))) as source:
        for _, data in TarReader(source):
            pieces = data.chunks(1 << 20)
            assert sum(1 for piece in pieces if piece is None) == 1 << 20
    with (
        pytest.raises(UnsupportedError, match="more than 4 TiB"),
        kit.stream(archive(*(huge_sparse(b"%d" % number, 1 << 41) for number in range(3)))) as source,
    ):
        for _ in TarReader(source):
            pass


# file data


def test_chunks_are_cut_at_the_chunk_size_and_may_be_kept(monkeypatch):
    monkeypatch.setattr(stream_module, "BLOCK_SIZE", 10_000)
    contents = {f"f{size}": os.urandom(size) for size in (0, 1, 511, 512, 4096, 9000, 12_288, 50_000)}
    tar = archive(*(kit.member("file", name, data) for name, data in contents.items()))
    kept = {}
    with kit.stream(tar) as source:
        for entry, data in TarReader(source):
            kept[entry.path.decode()] = pieces = list(data.chunks(4096))
            assert [len(piece) for piece in pieces[:-1]] == [4096] * (len(pieces) - 1)
            assert all(piece.readonly for piece in pieces)
    assert {name: b"".join(pieces) for name, pieces in kept.items()} == contents


def test_chunks_inside_a_block_are_not_copied():
    with kit.stream(archive(kit.member("file", "x", bytes(100_000)))) as source:
        for _, data in TarReader(source):
            assert all(piece.obj is source.buffer.obj for piece in data.chunks(4096))


def test_data_that_is_left_is_passed_over():
    tar = archive(*(kit.member("file", f"f{number}", bytes(3000)) for number in range(5)))
    with kit.stream(tar) as source:
        names = []
        for entry, data in TarReader(source):
            names.append(entry.path)
            next(data.chunks(1000))
    assert names == [b"f%d" % number for number in range(5)]


def test_data_is_read_once_and_in_time():
    tar = archive(kit.member("file", "a", b"1"), kit.member("file", "b", b"22"))
    with kit.stream(tar) as source:
        reader = iter(TarReader(source))
        _, first = next(reader)
        assert kit.content_of(first) == b"1"
        with pytest.raises(RuntimeError):
            kit.content_of(first)
        _, second = next(reader)
        late = second.chunks(1)
        next(late)
        assert list(reader) == []
        with pytest.raises(RuntimeError):
            next(late)


def test_truncated_data_names_the_member():
    with kit.stream(archive(header(b"usr/file", size=5000), bytes(600), end=False)) as source:
        reader = iter(TarReader(source))
        _, data = next(reader)
        with pytest.raises(FormatError) as error:
            list(data.chunks(1 << 20))
    assert str(error.value) == "layer 1: usr/file at byte 0 of the tar: the archive is truncated in this member's data"


def test_iteration_ends_with_every_check_made():
    tar = archive(header(b"a")) + b"trailing data, as part of the blob"
    with kit.stream(tar, size=len(tar)) as source:
        assert len(list(TarReader(source))) == 1
    with kit.stream(tar, size=len(tar) + 1) as source, pytest.raises(IntegrityError):
        list(TarReader(source))


# nothing but reading

HOSTILE = [
    kit.member("file", "../../../outside", "x"),
    kit.member("file", "/tmp/absolute", "x"),
    kit.member("sym", "out", "/"),
    kit.member("file", "out/through", "x"),
    kit.member("sym", "up", "../../.."),
    kit.member("file", "up/through", "x"),
    kit.member("hard", "passwd", "/etc/passwd2"),
    kit.member("chr", "null", rdev=(1, 3)),
]


def test_reading_and_merging_touch_no_file(tmp_path):
    """In a process of its own, where the first file-system event but a read ends it."""
    tar = tmp_path / "hostile.tar"
    tar.write_bytes(archive(kit.member("file", "/etc/passwd2"), *HOSTILE))
    code = """
        import runpy, sys, io
        kit = runpy.run_path(sys.argv[1])
        tar = open(sys.argv[2], "rb").read()
        kit["merge"]([kit["archive"](kit["member"]("file", "warm"))])
        def refuse(event, arguments):
            if event.partition(".")[0] in ("os", "shutil", "subprocess") or event == "open":
                print("touched:", event, arguments, flush=True)
                os._exit(9)
        import os
        sys.addaudithook(refuse)
        tree = kit["merge"]([tar, tar])
        paths = sorted(path for path, _ in kit["walk"](tree))
        print(len(paths))
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(Path(__file__).with_name("tarkit.py")), str(tar)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (0, "11\n", "")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give it up")
def test_reading_needs_no_root():
    tar = archive(
        *HOSTILE[:6],
        kit.member(
            "blk", "disk", rdev=(8, 0), uid=0, mode=0o4600, xattrs={"trusted.x": "1", "security.capability": "2"}
        ),
    )
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setgid(65534)
            os.setuid(65534)
            kit.merge([tar])
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
