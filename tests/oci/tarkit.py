"""Tar archives byte by byte, trees made of them, and what a tree or a directory on disk holds, in one form."""

from __future__ import annotations

import hashlib
import io
import json
import os
import stat
import subprocess
from pathlib import Path

from erofsgen.erofs.tree import walk
from erofsgen.oci.merge import Merger
from erofsgen.oci.stream import open_stream
from erofsgen.oci.tar import TarReader

T = 1_600_000_000
KINDS = {"dir": b"5", "file": b"0", "sym": b"2", "hard": b"1", "chr": b"3", "blk": b"4", "fifo": b"6"}


def octal(value, width):
    return b"%0*o\0" % (width - 1, value)


def base256(value, width):
    return ((1 << (8 * width - 1)) | (value & (1 << (8 * width - 1)) - 1)).to_bytes(width, "big")


def header(
    name,
    kind=b"0",
    size=0,
    *,
    mode=0o644,
    uid=0,
    gid=0,
    mtime=T,
    link=b"",
    magic=b"ustar\x0000",
    rdev=(0, 0),
    prefix=b"",
    fields=None,
):
    """One header block. ``fields`` maps offsets to bytes that are put over the finished fields."""
    number = lambda value, width: value if isinstance(value, bytes) else octal(value, width)  # noqa: E731
    block = bytearray(512)

    def put(at, raw):
        block[at : at + len(raw)] = raw

    put(0, name)
    put(100, number(mode, 8))
    put(108, number(uid, 8))
    put(116, number(gid, 8))
    put(124, number(size, 12))
    put(136, number(mtime, 12))
    put(156, kind)
    put(157, link)
    put(257, magic)
    if kind in (b"3", b"4"):
        put(329, number(rdev[0], 8))
        put(337, number(rdev[1], 8))
    put(345, prefix)
    for at, raw in (fields or {}).items():
        put(at, raw)
    put(148, b" " * 8)
    put(148, b"%06o\0 " % sum(block))
    return bytes(block)


def padded(data):
    return data + bytes(-len(data) % 512)


def record(key, value):
    body = b" " + key + b"=" + value + b"\n"
    length = len(body) + 1
    while length != len(body) + len(str(length)):
        length = len(body) + len(str(length))
    return str(length).encode() + body


def pax(records, kind=b"x"):
    data = b"".join(record(key, value) for key, value in records.items())
    return header(b"pax", kind, len(data)) + padded(data)


def gnu_long(kind, text):
    return header(b"././@LongLink", kind, len(text) + 1, magic=b"ustar  \0") + padded(text + b"\0")


def as_bytes(text):
    return text if isinstance(text, bytes) else text.encode()


def member(kind, name, content=b"", *, xattrs=None, ns=None, **attributes):
    """One member with whatever extended headers it needs. ``content`` is data or a link's target."""
    name, content = as_bytes(name), as_bytes(content)
    attributes.setdefault("mode", {"dir": 0o755, "sym": 0o777}.get(kind, 0o644))
    records = {b"SCHILY.xattr." + as_bytes(key): as_bytes(value) for key, value in (xattrs or {}).items()}
    if ns is not None:
        records[b"mtime"] = b"%d.%09d" % divmod(ns, 10**9)
    if len(name) > 100:
        records[b"path"] = name
    if kind in ("sym", "hard") and len(content) > 100:
        records[b"linkpath"] = content
    head = pax(records) if records else b""
    if kind in ("sym", "hard"):
        return head + header(name[:100], KINDS[kind], link=content[:100], **attributes)
    data = content if kind == "file" else b""
    return head + header(name[:100], KINDS[kind], len(data), **attributes) + padded(data)


def archive(*members, end=True):
    return b"".join(members) + bytes(1024 if end else 0)


def stream(tar, **checks):
    checks = {"media_type": "", "digest": None, "size": None, "diff_id": None, "what": "layer 1"} | checks
    return open_stream(io.BytesIO(tar), **checks)


def content_of(data, chunk_size=1 << 16):
    """The bytes of a FileData, holes as zeros."""
    left, pieces = data.size, []
    for view in data.chunks(chunk_size):
        length = min(left, chunk_size)
        assert view is None or len(view) == length
        pieces.append(bytes(length) if view is None else bytes(view))
        left -= length
    assert left == 0
    return b"".join(pieces)


def entries(tar, **checks):
    """All entries of a tar; the bytes of regular files end up in ``inode.data``."""
    with stream(tar, **checks) as source:
        found = []
        for entry, data in TarReader(source):
            if data is not None:
                entry.inode.data = content_of(data)
            found.append(entry)
        return found


def merge(layers):
    merger = Merger()
    for tar in layers:
        merger.apply(entries(tar))
    return merger.root


def row(mode, uid, gid, mtime, what, xattrs, names):
    kind = {
        stat.S_IFDIR: "dir",
        stat.S_IFREG: "file",
        stat.S_IFLNK: "sym",
        stat.S_IFCHR: "chr",
        stat.S_IFBLK: "blk",
        stat.S_IFIFO: "fifo",
        stat.S_IFSOCK: "sock",
    }[stat.S_IFMT(mode)]
    permissions = 0o777 if kind == "sym" else stat.S_IMODE(mode)
    return {
        "kind": kind,
        "mode": oct(permissions),
        "owner": (uid, gid),
        "mtime": mtime,
        "what": what,
        "xattrs": tuple(xattrs),
        "names": tuple(sorted(names)) if kind != "dir" and len(names) > 1 else (),
    }


def describe_tree(root):
    """Path to row, of a merged tree."""
    paths = list(walk(root))
    names = {}
    for path, inode in paths:
        names.setdefault(id(inode), []).append(path)
    found = {}
    for path, inode in paths:
        device = stat.S_ISCHR(inode.mode) or stat.S_ISBLK(inode.mode)
        what = (os.major(inode.rdev), os.minor(inode.rdev)) if device else inode.data
        assert inode.size == (len(inode.data) if stat.S_ISREG(inode.mode) else 0)
        assert (inode.children is not None) == stat.S_ISDIR(inode.mode)
        found[path] = row(inode.mode, inode.uid, inode.gid, inode.mtime, what, inode.xattrs, names[id(inode)])
    return found


def describe_directory(top):
    """Path to row, of a directory on disk."""
    top = os.fsencode(top)
    found, names = {}, {}
    paths = [top]
    for directory, folders, files in os.walk(top):
        paths += [directory + b"/" + name for name in folders + files]
    for full in paths:
        status = os.lstat(full)
        names.setdefault(status.st_ino, []).append(full[len(top) + 1 :])
    for full in paths:
        status = os.lstat(full)
        mode = status.st_mode
        what = b""
        if stat.S_ISREG(mode):
            with open(full, "rb") as file:
                what = file.read()
        elif stat.S_ISLNK(mode):
            what = os.readlink(full)
        elif stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
            what = (os.major(status.st_rdev), os.minor(status.st_rdev))
        xattrs = sorted(
            (os.fsencode(name), os.getxattr(full, name, follow_symlinks=False))
            for name in os.listxattr(full, follow_symlinks=False)
        )
        group = names[status.st_ino]
        found[full[len(top) + 1 :]] = row(mode, status.st_uid, status.st_gid, status.st_mtime_ns, what, xattrs, group)
    return found


def expect(kind, what=b"", *, mode=None, uid=0, gid=0, mtime=T, ns=None, xattrs=(), names=(), rdev=None):
    """The row that a member made with the same arguments should become."""
    return {
        "kind": kind,
        "mode": oct(mode if mode is not None else {"dir": 0o755, "sym": 0o777}.get(kind, 0o644)),
        "owner": (uid, gid),
        "mtime": mtime * 10**9 if ns is None else ns,
        "what": rdev if rdev is not None else as_bytes(what),
        "xattrs": tuple(sorted((as_bytes(key), as_bytes(value)) for key, value in dict(xattrs).items())),
        "names": tuple(sorted(map(as_bytes, names))),
    }


def oci_layout(top, layers):
    """An OCI layout with one image, ``image``, of uncompressed layers."""
    blobs = Path(top) / "blobs" / "sha256"
    blobs.mkdir(parents=True)

    def blob(data, media_type):
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)}

    descriptors = [blob(tar, "application/vnd.oci.image.layer.v1.tar") for tar in layers]
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {},
        "rootfs": {"type": "layers", "diff_ids": [descriptor["digest"] for descriptor in descriptors]},
    }
    manifest = {
        "schemaVersion": 2,
        "config": blob(json.dumps(config).encode(), "application/vnd.oci.image.config.v1+json"),
        "layers": descriptors,
    }
    entry = blob(json.dumps(manifest).encode(), "application/vnd.oci.image.manifest.v1+json")
    entry["annotations"] = {"org.opencontainers.image.ref.name": "image"}
    (Path(top) / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    (Path(top) / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))


def umoci_unpack(work, layers):
    """The rows of what ``umoci unpack`` leaves on disk; RuntimeError with its message if it refuses."""
    oci_layout(Path(work) / "layout", layers)
    command = ["umoci", "unpack", "--image", f"{work}/layout:image", f"{work}/bundle"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(result.stderr)
    return describe_directory(Path(work) / "bundle" / "rootfs")
