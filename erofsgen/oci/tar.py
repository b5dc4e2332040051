"""Layers in tar format: v7, ustar, GNU and PAX (POSIX.1-2017, pax; GNU tar manual, "Basic Tar Format").

A streaming parser for archives from strangers. What Go's archive/tar accepts is accepted, because that is what other
image tools read layers with; what cannot be is refused with the member's name and its byte offset.
"""

from __future__ import annotations

import os
import re
import stat
import struct
import zlib
from collections.abc import Iterator
from typing import Final

from erofsgen.erofs.tree import Inode
from erofsgen.errors import FormatError, IntegrityError, UnsupportedError
from erofsgen.oci import pax, sparse
from erofsgen.oci.layer import LINK, OPAQUE, PUT, WHITEOUT, Entry, FileData
from erofsgen.oci.names import NAME_MAX, PATH_MAX, clean, show
from erofsgen.oci.stream import BlockStream
from erofsgen.oci.xattrs import suited

BLOCK: Final = 512
"""Bytes per tar block: one header, and what a member's data is padded to."""

META_LIMIT: Final = 1 << 20
"""Most bytes of a PAX header or a GNU long name, as in Go's archive/tar."""

XATTR_LIMIT: Final = 256 << 20
"""Most bytes of xattrs in one layer. They stay in memory, and compress to next to nothing."""

# name, mode, uid, gid, size, mtime, checksum, type; other fields are sliced out where a member needs them
_HEADER = struct.Struct("100s8s8s8s12s12s8sc")
_CHECKSUM = slice(148, 156)
_LINK_NAME = slice(157, 257)
_MAGIC = slice(257, 263)
_DEV_MAJOR = slice(329, 337)
_DEV_MINOR = slice(337, 345)
_PREFIX = slice(345, 500)
_STAR_PREFIX = slice(345, 476)
_STAR_TRAILER = slice(508, 512)

_OCTAL = re.compile(rb"[ \0]*([0-7]*)(?:[ \0].*)?", re.DOTALL)
_CACHE_LIMIT: Final = 1 << 16
_TIME_LIMIT: Final = 1 << 63

_LINK_TYPE: Final = b"1"
_SYMLINK: Final = b"2"
_DIRECTORY: Final = b"5"
_GNU_SPARSE: Final = b"S"
_DATALESS: Final = {
    b"1": stat.S_IFREG,
    b"2": stat.S_IFLNK,
    b"3": stat.S_IFCHR,
    b"4": stat.S_IFBLK,
    b"5": stat.S_IFDIR,
    b"6": stat.S_IFIFO,
}
"""Types that no data follows, whatever their size field says. A hard link's file type is its target's."""
_PASSED_OVER: Final = {
    b"D": "a dump-dir: a directory and, as its data, a list of names",
    b"N": "long names as GNU tar wrote them before 1.11",
    b"V": "a volume label",
}
_META: Final = frozenset((b"x", b"X", b"g", b"L", b"K"))


class TarReader:
    """The entries of one layer, in archive order; see :class:`erofsgen.oci.layer.LayerReader`.

    Iteration ends when the whole blob has been read and verified. Raises FormatError (malformed or truncated, with
    member and offset), IntegrityError (digest or length), UnsupportedError (multi-volume archives, absurd holes), and
    what the stream's source raises. A damaged blob is reported as such, not as the malformed tar it looks like.
    """

    def __init__(self, stream: BlockStream) -> None:
        self._stream = stream
        self._name = b""
        self._offset = 0
        self._left = 0
        self._padding = 0
        self._holes = 0
        self._xattr_bytes = 0
        self._current: _Data | None = None
        self._numbers = _Numbers()
        self._parents = _Parents()
        self._globals: pax.Records = {}
        self._records: pax.Records = {}
        self._long_name = b""
        self._long_link = b""
        self._extended = False

    def __iter__(self) -> Iterator[tuple[Entry, FileData | None]]:
        try:
            yield from self._entries()
            self._stream.finish()
        except IntegrityError:
            raise
        except (FormatError, UnsupportedError) as error:
            self._stream.finish()  # raises IntegrityError if the blob itself is damaged
            raise type(error)(self._locate(str(error)), hint=error.hint) from None

    def _entries(self) -> Iterator[tuple[Entry, FileData | None]]:
        numbers = self._numbers
        parents = self._parents
        unpack = _HEADER.unpack_from
        while (header := self._next_header()) is not None:
            name, mode, uid, gid, size_field, mtime, _, kind = unpack(header)
            name = name.rstrip(b"\0")
            if b"\0" in name or header[345]:
                name = _full_name(name, header)
            self._name = name
            size = numbers[size_field]
            if kind in _META:
                self._read_meta(kind, size)
                continue

            inode = Inode(numbers[mode] & 0o7777, numbers[uid], numbers[gid], numbers[mtime] * 1_000_000_000)
            link = b""
            records: pax.Records = {}
            if self._extended:
                name, link, size, records = self._apply_meta(inode, name, size)
                self._name = name
            if (inode.uid | inode.gid) >> 32:
                raise FormatError(f"owner {inode.uid}:{inode.gid} does not fit 32 bits")
            if not -_TIME_LIMIT <= inode.mtime < _TIME_LIMIT:
                inode.mtime = 0  # as containerd does with times that no file system holds

            if name[-1:] == b"/":
                if kind == b"\0":
                    kind = _DIRECTORY  # how archives older than ustar say it
                name = name.rstrip(b"/") or b"/"
            parent, _, base = name.rpartition(b"/")
            path = parents[parent] + base
            if base in (b"", b".", b"..") or len(base) > NAME_MAX or len(path) > PATH_MAX or b"\0" in base:
                if not name:
                    raise FormatError("a member has no name")
                path = clean(name)

            data: _Data | None = None
            if kind in _DATALESS:
                inode.mode |= _DATALESS[kind]
                if kind != _DIRECTORY:
                    link = self._complete(inode, kind, header, link)
            else:
                if size < 0:
                    raise FormatError("its size is negative")
                self._left = size
                self._padding = -size % BLOCK
                if kind in _PASSED_OVER:
                    if kind != b"D":
                        continue
                    inode.mode |= stat.S_IFDIR
                else:
                    data = self._regular(inode, kind, header, size, records)
            self._current = data

            if b".wh." in path:
                marker = _marker(path)
                if marker is not None:
                    if marker.path != path:
                        yield marker, None
                    continue
            if kind == _LINK_TYPE:
                yield Entry(path, LINK, inode, clean(link)), None
            else:
                yield Entry(path, PUT, inode), data

    def _next_header(self) -> memoryview | None:
        """The next header block, its checksum verified; None at the end of the archive."""
        stream = self._stream
        rest = self._left + self._padding
        if rest:
            if stream.end - stream.pos >= rest:
                stream.pos += rest
            else:
                self._pass_over()
            self._left = self._padding = 0
            self._current = None
        pos = stream.pos
        if stream.end - pos >= BLOCK:
            header = stream.buffer[pos : pos + BLOCK]
            stream.pos = pos + BLOCK
        else:
            header = stream.read(BLOCK)
            if len(header) < BLOCK:
                # as in Go, an archive may end without its end marker, but not within a header
                if header or self._pending:
                    raise FormatError("the archive is truncated in a header")
                return None
        # Adler-32's low half is 1 + the sum of the bytes mod 65521, which 256 bytes cannot reach
        adler32 = zlib.adler32
        total = (adler32(header[:256]) & 0xFFFF) + (adler32(header[256:]) & 0xFFFF) - 2
        if not total:
            self._end_of_archive()
            return None
        self._offset = stream.base + stream.pos - BLOCK
        field = header[_CHECKSUM].tobytes()
        total += 8 * 0x20 + 1 - (adler32(field) & 0xFFFF)
        try:
            stored = self._numbers[field]
        except FormatError:
            stored = -1
        if stored != total and stored != total - 256 * _high_bytes(header):
            self._name = b""
            raise FormatError("bad header checksum" if self._offset else "this is not a tar archive")
        return header

    def _end_of_archive(self) -> None:
        if self._pending:
            raise FormatError("the archive ends after an extended header")
        second = self._stream.read(BLOCK)
        if 0 < len(second) < BLOCK:
            raise FormatError("the archive is truncated in its end marker")
        if any(second):
            raise FormatError("a block of zeros stands between two members")

    def _pass_over(self) -> None:
        """Skip what the consumer left of a member. Only the padding of the last one may be missing, as in Go."""
        if self._stream.skip(self._left) < self._left:
            raise FormatError("the archive is truncated in this member's data")
        self._stream.skip(self._padding)

    @property
    def _pending(self) -> bool:
        return bool(self._records or self._long_name or self._long_link)

    def _read_meta(self, kind: bytes, size: int) -> None:
        """Take in an extended header; it speaks about the next member, or about all that follow (``g``)."""
        if not 0 <= size <= META_LIMIT:
            raise FormatError(f"an extended header of {size:,} bytes")
        data = self._stream.read(size).tobytes()
        if len(data) < size or self._stream.skip(-size % BLOCK) < -size % BLOCK:
            raise FormatError("the archive is truncated in an extended header")
        self._extended = True
        if kind == b"L":
            self._long_name = data.partition(b"\0")[0]
        elif kind == b"K":
            self._long_link = data.partition(b"\0")[0]
        elif kind == b"g":
            self._globals = self._globals | pax.parse(data)
            if sum(map(len, self._globals.values())) > META_LIMIT:
                raise UnsupportedError("too many global PAX records")
        else:
            self._records = pax.parse(data)

    def _apply_meta(self, inode: Inode, name: bytes, size: int) -> tuple[bytes, bytes, int, pax.Records]:
        """Let the extended headers override the member's own: returns name, link target, size, and all records."""
        records = self._globals | self._records if self._globals else self._records
        if b"" in records.values():  # an empty value takes a record back, but an attribute may be empty
            records = {key: value for key, value in records.items() if value or key.startswith(pax.XATTR)}
        if b"size" in records:
            size = pax.number(b"size", records[b"size"])
        if b"uid" in records:
            inode.uid = pax.number(b"uid", records[b"uid"])
        if b"gid" in records:
            inode.gid = pax.number(b"gid", records[b"gid"])
        if b"mtime" in records:
            inode.mtime = pax.nanoseconds(records[b"mtime"])
        if len(records) > 1 or b"mtime" not in records:  # archives that give times only are common
            inode.xattrs = pax.xattrs(records)
            if inode.xattrs:
                self._xattr_bytes += sum(len(value) for _, value in inode.xattrs)
                if self._xattr_bytes > XATTR_LIMIT:
                    raise UnsupportedError(f"more than {XATTR_LIMIT >> 20} MiB of xattrs in one layer")
        name = self._long_name or records.get(b"GNU.sparse.name") or records.get(b"path") or name
        link = self._long_link or records.get(b"linkpath", b"")
        self._records = {}
        self._long_name = self._long_link = b""
        self._extended = bool(self._globals)
        return name, link, size, records

    def _complete(self, inode: Inode, kind: bytes, header: memoryview, link: bytes) -> bytes:
        """Fill in what only links, devices and fifos have. Returns the link's target."""
        inode.xattrs = suited(inode.xattrs, inode.mode)
        if kind in (_LINK_TYPE, _SYMLINK):
            link = link or _until_nul(header[_LINK_NAME])
            if not link:
                raise FormatError("a link without a target")
            if kind == _SYMLINK:
                if len(link) > PATH_MAX or b"\0" in link:
                    raise FormatError("its symlink target is too long or has a NUL byte in it")
                inode.data = link
        elif kind != b"6":
            major = minor = 0
            if header[_MAGIC].tobytes().startswith(b"ustar"):
                major = self._numbers[header[_DEV_MAJOR].tobytes()]
                minor = self._numbers[header[_DEV_MINOR].tobytes()]
            if not (0 <= major < 1 << 12 and 0 <= minor < 1 << 20):
                raise FormatError(f"device number {major}:{minor} is beyond Linux's 4095:1048575")
            inode.rdev = os.makedev(major, minor)
        return link

    def _regular(self, inode: Inode, kind: bytes, header: memoryview, size: int, records: pax.Records) -> _Data:
        """The data of a regular file. Types unknown to us are regular files too, as POSIX asks."""
        if kind == b"M":
            raise UnsupportedError("the archive is one volume of several", hint="join the volumes into one archive")
        inode.mode |= stat.S_IFREG
        data = _Data(self, size)
        if kind == _GNU_SPARSE:
            segments, real_size = sparse.from_gnu_header(header, self._read_block, self._numbers.__getitem__)
            data = self._sparse(segments, real_size)
        elif records:
            form = records.get(b"GNU.sparse.major"), records.get(b"GNU.sparse.minor")
            real = b"GNU.sparse.realsize" if b"GNU.sparse.realsize" in records else b"GNU.sparse.size"
            if form == (b"1", b"0") and real in records:
                segments = sparse.from_data(self._read_stored_block)
                data = self._sparse(segments, pax.number(real, records[real]))
            elif form in ((None, None), (b"0", b"0"), (b"0", b"1")) and real in records:
                segments = sparse.from_text(records.get(pax.SPARSE_MAP, b""))
                data = self._sparse(segments, pax.number(real, records[real]))
        inode.size = data.size
        return data

    def _sparse(self, segments: sparse.Segments, size: int) -> _Data:
        segments = sparse.check(segments, size, self._left)
        self._holes = sparse.add_holes(self._holes, size - self._left)
        return _SparseData(self, size, segments)

    def _read_block(self) -> memoryview:
        block = self._stream.read(BLOCK)
        if len(block) < BLOCK:
            raise FormatError("the archive is truncated in this member's sparse map")
        return block

    def _read_stored_block(self) -> memoryview:
        """One block of a sparse map that is kept among the member's data."""
        if self._left < BLOCK:
            raise FormatError("its sparse map is longer than its data")
        self._left -= BLOCK
        return self._read_block()

    def take(self, data: _Data, size: int) -> memoryview:
        """The current member's next ``size`` stored bytes, all of them; ``data`` must be that member's."""
        if data is not self._current or size > self._left:
            raise RuntimeError("the data of an entry is read once, and before the next entry is asked for")
        view = self._stream.read(size)
        self._left -= len(view)
        if len(view) < size:
            raise FormatError(self._locate("the archive is truncated in this member's data"))
        return view

    def _locate(self, message: str) -> str:
        member = f"{show(self._name)} " if self._name else ""
        return f"{self._stream.what}: {member}at byte {self._offset:,} of the tar: {message}"


class _Data:
    """The bytes of a regular file; see :class:`erofsgen.oci.layer.FileData`."""

    __slots__ = ("_reader", "size")

    def __init__(self, reader: TarReader, size: int) -> None:
        self._reader = reader
        self.size = size

    def chunks(self, chunk_size: int) -> Iterator[memoryview | None]:
        size = self.size
        if 0 < size <= chunk_size:
            return iter((self._reader.take(self, size),))
        return self._cut(chunk_size)

    def _cut(self, chunk_size: int) -> Iterator[memoryview | None]:
        take = self._reader.take
        left = self.size
        while left:
            step = min(left, chunk_size)
            yield take(self, step)
            left -= step


class _SparseData(_Data):
    """The bytes of a sparse file: ``segments`` of data, in order, holes between them."""

    __slots__ = ("_segments",)

    def __init__(self, reader: TarReader, size: int, segments: sparse.Segments) -> None:
        super().__init__(reader, size)
        self._segments = segments

    def chunks(self, chunk_size: int) -> Iterator[memoryview | None]:
        return self._cut(chunk_size)

    def _cut(self, chunk_size: int) -> Iterator[memoryview | None]:
        take = self._reader.take
        segments = iter(self._segments)
        none = (self.size, 0)
        offset, length = next(segments, none)
        for start in range(0, self.size, chunk_size):
            end = min(start + chunk_size, self.size)
            if offset >= end:
                yield None
            elif offset <= start and offset + length >= end:
                yield take(self, end - start)
                if offset + length == end:
                    offset, length = next(segments, none)
                else:
                    offset, length = end, offset + length - end
            else:
                piece = bytearray(end - start)
                while offset < end:
                    step = min(length, end - offset)
                    piece[offset - start : offset - start + step] = take(self, step)
                    if step == length:
                        offset, length = next(segments, none)
                    else:
                        offset, length = offset + step, length - step
                yield memoryview(piece).toreadonly()


class _Numbers(dict[bytes, int]):
    """Header fields and their values: octal text, or base 256 where the first bit is set. Owners and times repeat."""

    def __missing__(self, field: bytes) -> int:
        if len(self) > _CACHE_LIMIT:
            self.clear()
        if field[0] & 0x80:
            bits = 8 * len(field) - 1
            value = int.from_bytes(field, "big") & (1 << bits) - 1
            if field[0] & 0x40:
                value -= 1 << bits
            if not -1 << 63 <= value < 1 << 63:
                raise FormatError("a number in its header does not fit 64 bits")
        else:
            match = _OCTAL.fullmatch(field)
            if not match:
                raise FormatError("a number in its header is not octal")
            value = int(match[1] or b"0", 8)
        self[field] = value
        return value


class _Parents(dict[bytes, bytes]):
    """Directory parts of names, and what they are inside the image: ``b""`` or a clean path and its slash."""

    def __missing__(self, parent: bytes) -> bytes:
        if len(self) > _CACHE_LIMIT:
            self.clear()
        cleaned = clean(parent)
        self[parent] = prefix = cleaned + b"/" if cleaned else b""
        return prefix


def _until_nul(field: memoryview | bytes) -> bytes:
    return bytes(field).partition(b"\0")[0]


def _full_name(name: bytes, header: memoryview) -> bytes:
    """The name and, where the format has one, its prefix field."""
    name = _until_nul(name)
    if bytes(header[_MAGIC]) != b"ustar\0":
        return name  # GNU keeps other things there, v7 nothing
    star = bytes(header[_STAR_TRAILER]) == b"tar\0"
    prefix = _until_nul(header[_STAR_PREFIX if star else _PREFIX])
    return prefix + b"/" + name if prefix else name


def _high_bytes(header: memoryview) -> int:
    """How many bytes outside the checksum field are above 127: some old archives sum signed bytes."""
    block = bytearray(header)
    block[_CHECKSUM] = bytes(8)
    return sum(byte > 127 for byte in block)


def _marker(path: bytes) -> Entry | None:
    """The whiteout or opaque marker that ``path`` is; None for an ordinary file.

    An entry with ``path`` unchanged stands for AUFS's own files (``.wh..wh.*``), which are nobody's.
    """
    parent, _, base = path.rpartition(b"/")
    if base == b".wh..wh..opq" and b".wh..wh." not in parent:
        return Entry(parent, OPAQUE)
    if any(part.startswith(b".wh..wh.") for part in path.split(b"/")):
        return Entry(path, WHITEOUT)
    if not base.startswith(b".wh."):
        return None
    hidden = base[4:]
    if hidden in (b"", b".", b".."):
        raise FormatError("a whiteout that names no file")
    return Entry(parent + b"/" + hidden if parent else hidden, WHITEOUT)
