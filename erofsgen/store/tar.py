"""An image's files as a tar: the PAX format of POSIX.1-2001, the same bytes for the same image.

Names are bytes and stay so: one that is no UTF-8 comes with ``hdrcharset=BINARY``. Extended attributes are
``SCHILY.xattr.*`` records, with ``=`` and ``%`` in their names encoded as GNU tar does. Files with large holes are
sparse in GNU's PAX format 1.0 (GNU tar manual, "Storing Sparse Files"), which GNU tar, bsdtar, Go and Python read.
Owners are numbers only. Entries come in byte order of their paths, a directory before its content.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from struct import Struct
from typing import Final, Protocol

from erofsgen.erofs.node import Extent, Node
from erofsgen.progress import SILENT, Progress, Task
from erofsgen.store.extract import Extracted, device_bytes, file_bytes
from erofsgen.store.image import Image

_BLOCK: Final = 512
_RECORD: Final = 20 * _BLOCK
"""A tar is a multiple of this (POSIX's default blocking factor)."""
_SPARSE_MIN: Final = 1 << 20
"""Bytes of holes from which a file is stored sparse; below, any tar reader should understand it."""

_HEADER: Final = Struct("100s8s8s8s12s12s8sc100s6s2s32s32s8s8s155s12x")
"""name, mode, uid, gid, size, mtime, checksum, type, link name, magic, version, user, group, devmajor, devminor,
prefix (POSIX.1-2001, pax, "ustar Interchange Format")."""
assert _HEADER.size == _BLOCK

_TYPES: Final = {
    stat.S_IFREG: b"0",
    stat.S_IFLNK: b"2",
    stat.S_IFCHR: b"3",
    stat.S_IFBLK: b"4",
    stat.S_IFDIR: b"5",
    stat.S_IFIFO: b"6",
}
_LINK: Final = b"1"
_PAX: Final = b"x"

_NAME_MAX: Final = 100
_ID_MAX: Final = 0o7777777
_SIZE_MAX: Final = 0o77777777777
"""What the fields of a ustar header can hold; the rest goes into PAX records."""


class Output(Protocol):
    """Where the tar goes."""

    def write(self, data: bytes, /) -> object: ...


def write_archive(image: Image, output: Output, *, progress: Progress = SILENT) -> Extracted:
    """Write the image's tree to ``output``. Sockets, which tar cannot express, are left out and noted.

    Raises what writing and reading the image raise.
    """
    with progress.task(f"archiving {image.name}", file_bytes(image)) as task:
        return _Archive(image, output, task).run()


class _Archive:
    def __init__(self, image: Image, output: Output, task: Task) -> None:
        self._image = image
        self._output = output
        self._task = task
        self._links: dict[int, bytes] = {}
        self._written = 0
        self._entries = 0
        self._bytes = 0

    def run(self) -> Extracted:
        sockets = 0
        for path, node in self._image.index.walk():
            if stat.S_ISSOCK(node.mode):
                sockets += 1
                continue
            self._entry(path, node)
            self._entries += 1
        self._write(bytes(2 * _BLOCK))
        self._write(bytes(-self._written % _RECORD))
        notes = [f"sockets left out: {sockets} (tar cannot express them)"] if sockets else []
        return Extracted(self._entries, self._bytes, notes)

    def _entry(self, path: bytes, node: Node) -> None:
        if node.nlink > 1 and not stat.S_ISDIR(node.mode):
            first = self._links.setdefault(node.nid, path)
            if first is not path:
                self._header(path, node, _LINK, target=first)
                return
        kind = _TYPES[stat.S_IFMT(node.mode)]
        if stat.S_ISREG(node.mode):
            self._file(path, node)
        elif stat.S_ISDIR(node.mode):
            self._header(path + b"/" if path else b"./", node, kind)
        else:
            self._header(path, node, kind, target=node.readlink() if stat.S_ISLNK(node.mode) else b"")

    def _file(self, path: bytes, node: Node) -> None:
        inline = node.inline()
        extents = [] if inline else list(self._image.sparse_extents(node))
        kind = _TYPES[stat.S_IFREG]
        if sum(length for _, length, device, _ in extents if device is None) >= _SPARSE_MIN:
            stored = [extent for extent in extents if extent[2] is not None]
            regions = [*((offset, length) for offset, length, _, _ in stored), (node.size, 0)]
            numbers = [len(regions), *(number for region in regions for number in region)]
            sparse_map = b"".join(b"%d\n" % number for number in numbers)
            sparse_map += bytes(-len(sparse_map) % _BLOCK)
            size = len(sparse_map) + sum(length for _, length, _, _ in stored)
            records = [
                (b"GNU.sparse.major", b"1"),
                (b"GNU.sparse.minor", b"0"),
                (b"GNU.sparse.name", path),
                (b"GNU.sparse.realsize", b"%d" % node.size),
            ]
            self._header(_SPARSE_NAME, node, kind, size=size, records=records)
            self._write(sparse_map)
            extents = stored
        else:
            size = node.size
            self._header(path, node, kind, size=size)
        for data in self._data(inline or b"", extents):
            self._write(data)
        self._write(bytes(-size % _BLOCK))
        self._bytes += node.size

    def _data(self, inline: bytes, extents: list[Extent]) -> Iterator[bytes]:
        if inline:
            yield inline
            self._task.advance(len(inline))
        for _, length, device, start in extents:
            if device is None:
                yield bytes(length)  # less than _SPARSE_MIN
            else:
                yield from device_bytes(self._image, device, start, length)
            self._task.advance(length)

    def _header(
        self,
        name: bytes,
        node: Node,
        kind: bytes,
        *,
        size: int = 0,
        target: bytes = b"",
        records: list[tuple[bytes, bytes]] | None = None,
    ) -> None:
        pax = [*(records or []), *_pax_records(name, node, size, target)]
        if kind != _LINK:
            pax += [(b"SCHILY.xattr." + _keyword(key), value) for key, value in node.xattrs()]
        if pax:
            if any(not _is_utf8(value) for key, value in pax if key in _TEXT):
                pax.insert(0, (b"hdrcharset", b"BINARY"))
            body = b"".join(_record(key, value) for key, value in pax)
            self._write(_header(b"PaxHeaders/" + _PLAIN_NAME, _PAX, size=len(body)))
            self._write(body + bytes(-len(body) % _BLOCK))
        seconds = node.mtime // 1_000_000_000
        device = node.rdev if kind in (b"3", b"4") else 0
        self._write(
            _header(
                name if len(name) <= _NAME_MAX else _PLAIN_NAME,
                kind,
                mode=stat.S_IMODE(node.mode),
                uid=node.uid if node.uid <= _ID_MAX else 0,
                gid=node.gid if node.gid <= _ID_MAX else 0,
                size=size if size <= _SIZE_MAX else 0,
                mtime=min(max(seconds, 0), _SIZE_MAX),
                target=target if len(target) <= _NAME_MAX else _PLAIN_NAME,
                device=device,
            )
        )

    def _write(self, data: bytes) -> None:
        self._output.write(data)
        self._written += len(data)


_PLAIN_NAME: Final = b"long"
"""Stands in a ustar field for a name that only its PAX record can hold."""

_SPARSE_NAME: Final = b"GNUSparseFile.0/" + _PLAIN_NAME

_TEXT: Final = (b"path", b"linkpath", b"GNU.sparse.name")


def _pax_records(name: bytes, node: Node, size: int, target: bytes) -> Iterator[tuple[bytes, bytes]]:
    """What the ustar header cannot say."""
    if len(name) > _NAME_MAX or not name.isascii():
        yield b"path", name
    if len(target) > _NAME_MAX or not target.isascii():
        yield b"linkpath", target
    if node.uid > _ID_MAX:
        yield b"uid", b"%d" % node.uid
    if node.gid > _ID_MAX:
        yield b"gid", b"%d" % node.gid
    if size > _SIZE_MAX:
        yield b"size", b"%d" % size
    seconds, nanoseconds = divmod(node.mtime, 1_000_000_000)
    if nanoseconds or not 0 <= seconds <= _SIZE_MAX:
        yield b"mtime", _decimal(node.mtime)


def _decimal(nanoseconds: int) -> bytes:
    """Seconds with their fraction; ``-1.5`` is a second and a half before 1970."""
    sign = b"-" if nanoseconds < 0 else b""
    seconds, fraction = divmod(abs(nanoseconds), 1_000_000_000)
    text = b"%s%d.%09d" % (sign, seconds, fraction) if fraction else b"%s%d" % (sign, seconds)
    return text.rstrip(b"0") if fraction else text


def _keyword(name: bytes) -> bytes:
    return name.replace(b"%", b"%25").replace(b"=", b"%3D")


def _record(key: bytes, value: bytes) -> bytes:
    """``"<length> <key>=<value>\\n"``, where the length counts itself."""
    rest = b" " + key + b"=" + value + b"\n"
    length = len(rest) + len(str(len(rest)))
    if len(str(length)) + len(rest) != length:
        length += 1
    return b"%d" % length + rest


def _is_utf8(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


def _header(
    name: bytes,
    kind: bytes,
    *,
    mode: int = 0o644,
    uid: int = 0,
    gid: int = 0,
    size: int = 0,
    mtime: int = 0,
    target: bytes = b"",
    device: int = 0,
) -> bytes:
    block = _HEADER.pack(
        name,
        b"%07o\0" % mode,
        b"%07o\0" % uid,
        b"%07o\0" % gid,
        b"%011o\0" % size,
        b"%011o\0" % mtime,
        b" " * 8,
        kind,
        target,
        b"ustar\0",
        b"00",
        b"",
        b"",
        b"%07o\0" % os.major(device),
        b"%07o\0" % os.minor(device),
        b"",
    )
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]
