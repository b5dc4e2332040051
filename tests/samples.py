"""Small images with everything in them, made with the standard library's tarfile, for looking into and for damaging.

:func:`write_sample` makes a tar of one of two versions; ``CHANGES`` says how they differ. :func:`snapshot` describes a
directory tree completely, so that trees unpacked by different programs can be compared, which :func:`assert_same` does.
"""

from __future__ import annotations

import hashlib
import io
import os
import random
import stat
import struct
import tarfile
from pathlib import Path
from typing import Any

EPOCH = 1_600_000_000

CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 10, 0, 0, 0)
"""``security.capability``: revision 2, effective, CAP_NET_BIND_SERVICE permitted (linux/capability.h)."""

ACL = struct.pack("<I", 2) + b"".join(
    struct.pack("<HHI", tag, permissions, who)
    for tag, permissions, who in (
        (1, 6, 2**32 - 1),
        (2, 6, 1000),
        (4, 4, 2**32 - 1),
        (16, 6, 2**32 - 1),
        (32, 4, 2**32 - 1),
    )
)
"""``system.posix_acl_access`` of a file with mode 0664: user 1000 may write (linux/posix_acl_xattr.h)."""

ODD_NAMES = (
    b"caf\xe9",
    "grüße".encode(),
    b"tab\there",
    b"new\nline",
    b"back\\slash",
    b"\x1b[31mred",
    b"-dash",
    b" blank ",
)
"""In ``names/``: not UTF-8, UTF-8, control characters, and what a terminal or a shell would take the wrong way."""

DEEP = "/".join(["deep"] + [f"level-{number:02}-of-a-long-path" for number in range(16)])

CHANGES = {
    "added": {b"data/new", b"newdir", b"newdir/below"},
    "removed": {b"data/old", b"olddir", b"olddir/below"},
    "changed": {
        b"data/edited": {"content"},
        b"data/grown": {"size", "content"},
        b"data/touched": {"mtime"},
        b"modes/private": {"mode"},
        b"owners/daemon": {"uid", "gid"},
        b"links/turned": {"target"},
        b"special/null": {"device"},
        b"becomes": {"type", "mode"},
        b"xattrs/user": {"xattrs"},
        b"links/first": {"links"},
        b"links/second": {"links"},
        b"links/third": {"links"},
    },
}
"""Version 1 to version 2: which paths, and what about them."""


def big(version: int = 1) -> bytes:
    """Three and a half chunks: one that compresses, one that does not, one of zeros, half a one; all differ by version
    in the last piece only."""
    numbers = random.Random(5)
    text = b"".join(b"line %d of the sample\n" % number for number in range(60_000))[: 1 << 20]
    return text + numbers.randbytes(1 << 20) + bytes(1 << 20) + random.Random(version).randbytes(500_000)


def write_sample(path: Path, version: int = 1) -> Path:
    """Write the sample's tar to ``path``, which is returned."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, encoding="utf-8", errors="surrogateescape") as tar:
        for entry, content in sorted(
            _entries(version), key=lambda pair: pair[0].name.encode("utf-8", "surrogateescape")
        ):
            tar.addfile(entry, io.BytesIO(content))
    return path


def _entries(version: int) -> list[tuple[tarfile.TarInfo, bytes]]:
    entries: list[tuple[tarfile.TarInfo, bytes]] = []
    first = version == 1

    def add(
        name: str | bytes, kind: bytes = tarfile.REGTYPE, mode: int = 0o644, content: bytes = b"", **fields: Any
    ) -> None:
        info = tarfile.TarInfo(os.fsdecode(name))
        info.type, info.mode, info.size, info.mtime = kind, mode, len(content), EPOCH
        for xattr, value in fields.pop("xattrs", {}).items():
            info.pax_headers[f"SCHILY.xattr.{xattr}"] = value.decode("utf-8", "surrogateescape")
        for header, value in fields.pop("pax", {}).items():
            info.pax_headers[header] = value
        for field, value in fields.items():
            setattr(info, field, value)
        entries.append((info, content))

    def directory(name: str, mode: int = 0o755, **fields: Any) -> None:
        add(name, tarfile.DIRTYPE, mode, **fields)

    for name in ("data", "links", "modes", "names", "owners", "special", "times", "xattrs"):
        directory(name)
    add("data/empty")
    add("data/small", content=b"a few bytes\n")
    add("data/block", content=bytes(range(256)) * 16)
    add("data/big", content=big())
    add("data/copy", content=big())
    add("data/noise", content=random.Random(7).randbytes(1_500_000))
    add("data/edited", content=big(version))
    add("data/grown", content=b"x" * (5000 if first else 5001))
    add("data/zeros", content=bytes(5 << 20))
    add("data/touched", content=b"same" * 3000, mtime=EPOCH + version)
    add("data/old" if first else "data/new", content=b"moved" * 2000)
    below = "olddir" if first else "newdir"
    directory(below)
    add(f"{below}/below", content=b"found here")

    add("links/first", content=b"several names\n" * 300)
    add("links/second", tarfile.LNKTYPE, linkname="links/first")
    if first:
        add("links/third", tarfile.LNKTYPE, linkname="links/first")
    else:
        add("links/third", content=b"several names\n" * 300)
    add("links/relative", tarfile.SYMTYPE, 0o777, linkname="../data/small")
    add("links/absolute", tarfile.SYMTYPE, 0o777, linkname="/data/small")
    add("links/dir", tarfile.SYMTYPE, 0o777, linkname="../data")
    add("links/up", tarfile.SYMTYPE, 0o777, linkname="../../../../data/small")
    add("links/turned", tarfile.SYMTYPE, 0o777, linkname="old" if first else "new")
    add("links/dangling", tarfile.SYMTYPE, 0o777, linkname="nowhere")
    add("links/loop", tarfile.SYMTYPE, 0o777, linkname="loop")
    add("links/7", tarfile.SYMTYPE, 0o777, linkname="x" * 300)

    add("modes/setuid", mode=0o4755, content=b"#!/bin/sh\n")
    add("modes/private", mode=0o600 if first else 0o640)
    add("modes/none", mode=0)
    directory("modes/sticky", 0o1777)
    directory("modes/setgid", 0o2775)
    directory("modes/closed", 0o000)
    add("modes/closed/inside", content=b"still there")
    add("becomes", tarfile.REGTYPE if first else tarfile.DIRTYPE, 0o644 if first else 0o755)

    for name in ODD_NAMES:
        add(b"names/" + name, content=b"named " + name)
    add("names/" + "n" * 255)
    for level in range(1, DEEP.count("/") + 2):
        directory("/".join(DEEP.split("/")[:level]))
    add(f"{DEEP}/bottom", content=b"a path of some hundred bytes")
    add(f"{DEEP}/link-to-bottom", tarfile.LNKTYPE, linkname=f"{DEEP}/bottom")

    add("owners/daemon", uid=1 if first else 2, gid=1 if first else 2)
    add("owners/big", uid=4_000_000_000, gid=70_000)

    add("special/null", tarfile.CHRTYPE, 0o666, devmajor=1, devminor=3 if first else 5)
    add("special/disk", tarfile.BLKTYPE, 0o660, devmajor=259, devminor=70_000)
    add("special/fifo", tarfile.FIFOTYPE, 0o4620)

    add("times/fraction", pax={"mtime": "1600000000.123456789"})
    add("times/before", pax={"mtime": "-1.5"})
    add("times/future", pax={"mtime": "5000000000"})
    add("times/link", tarfile.SYMTYPE, 0o777, linkname="x", pax={"mtime": "1234567890.5"})

    add("xattrs/user", xattrs={"user.origin": b"sample %d" % version, "user.binary": bytes(range(1, 256))})
    add("xattrs/capability", mode=0o755, content=b"x", xattrs={"security.capability": CAPABILITY})
    add("xattrs/acl", mode=0o664, xattrs={"system.posix_acl_access": ACL})
    add("xattrs/trusted", xattrs={"trusted.note": b"for root only"})
    directory("xattrs/dir", xattrs={"user.origin": b"a directory"})
    return entries


def snapshot(top: Path) -> dict[bytes, tuple[Any, ...]]:
    """Every path below ``top`` and all that can be known about it; hard links as the set of their names."""
    result: dict[bytes, tuple[Any, ...]] = {}
    links: dict[tuple[int, int], list[bytes]] = {}
    root = os.fsencode(top)
    for directory, names, files in os.walk(root):
        for name in names + files:
            path = b"%s/%s" % (directory, name)  # os.path.join and relpath would be half of all the time
            status = os.lstat(path)
            inside = path[len(root) + 1 :]
            if not stat.S_ISDIR(status.st_mode):
                links.setdefault((status.st_dev, status.st_ino), []).append(inside)
            content: Any = None
            if stat.S_ISREG(status.st_mode):
                with open(path, "rb") as file:
                    content = hashlib.file_digest(file, "blake2b").hexdigest()
            elif stat.S_ISLNK(status.st_mode):
                content = os.readlink(path)
            result[inside] = (
                status.st_mode,
                status.st_uid,
                status.st_gid,
                status.st_mtime_ns,
                status.st_rdev if stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode) else 0,
                content,
                tuple(
                    (key, os.getxattr(path, key, follow_symlinks=False))
                    for key in sorted(os.listxattr(path, follow_symlinks=False))
                ),
            )
    for names in links.values():
        for name in names:
            result[name] += (tuple(sorted(names)),)
    return result


def whole_tree(top: Path) -> dict[bytes, tuple[Any, ...]]:
    """:func:`snapshot`, and ``top``'s own attributes as ``b""``."""
    info = os.lstat(top)
    return {**snapshot(top), b"": (info.st_mode, info.st_uid, info.st_gid, info.st_mtime_ns)}


FIELDS = ("mode", "uid", "gid", "mtime", "rdev", "content", "xattrs", "names")


def assert_same(ours: dict[bytes, tuple[Any, ...]], theirs: dict[bytes, tuple[Any, ...]]) -> None:
    """Two snapshots are equal; if not, the first differences are said."""
    assert sorted(ours) == sorted(theirs)
    differences = [
        f"{path!r}: {name} {a!r} != {b!r}"
        for path in sorted(ours)
        for name, a, b in zip(FIELDS, ours[path], theirs[path], strict=False)
        if a != b
    ]
    assert not differences, "\n".join(differences[:20])
