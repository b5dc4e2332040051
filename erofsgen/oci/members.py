"""Random access to the members of an uncompressed tar file, for archives that hold images.

A table of contents is read once, headers only. Symbolic and hard links lead to members of the same archive and never
outside it; nothing is ever extracted. Formats: POSIX ustar and pax, GNU long names, the old tar.
"""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from typing import Final

from erofsgen.errors import FormatError, NotFoundError
from erofsgen.oci import names, pax
from erofsgen.oci.slice import open_slice

_BLOCK: Final = 512
_MEMBERS: Final = 100_000
_EXTENSION_LIMIT: Final = 1 << 20
"""Bytes of one pax header or GNU long name."""
_LINKS: Final = 16
_REGULAR: Final = frozenset(b"0\0007")
_HARD_LINK, _SYMLINK = b"12"
_LONG_NAME, _LONG_LINK = b"LK"
_PAX, _PAX_GLOBAL = b"xg"


@dataclass(frozen=True)
class Member:
    """A member's data in the archive, or the path its link leads to."""

    offset: int
    size: int
    target: bytes | None = None


class Archive:
    """The members of an open, seekable tar file, which is closed with it.

    ``name`` is the archive's, for messages. Raises FormatError (damaged, truncated).
    """

    def __init__(self, file: io.BufferedReader, name: str) -> None:
        self.name = name
        self._file = file
        self._members: dict[bytes, Member] = {}
        self._length = os.fstat(file.fileno()).st_size
        try:
            self._scan()
        except FormatError as error:
            file.close()
            raise FormatError(f"{name}: {error}") from error

    def size(self, path: str) -> int:
        """Bytes of a member. Raises NotFoundError, FormatError (links that lead nowhere)."""
        return self._find(path).size

    def open(self, path: str) -> tuple[io.BufferedReader, int]:
        """A member's data and its size. Raises NotFoundError, FormatError."""
        member = self._find(path)
        return open_slice(self._file.fileno(), member.offset, member.size), member.size

    def __contains__(self, path: str) -> bool:
        return names.clean(path.encode("utf-8", "surrogateescape")) in self._members

    def close(self) -> None:
        """Close the archive; what was opened from it stays open."""
        self._file.close()

    def _find(self, path: str) -> Member:
        key = names.clean(path.encode("utf-8", "surrogateescape"))
        for _ in range(_LINKS):
            member = self._members.get(key)
            if member is None:
                raise NotFoundError(f"{self.name} has no member {names.show(key)}")
            if member.target is None:
                return member
            key = member.target
        raise FormatError(f"{self.name}: the links of {names.show(path.encode())} lead nowhere")

    def _scan(self) -> None:
        position = zeros = 0
        path, link, records = b"", b"", pax.Records()
        while zeros < 2 and position + _BLOCK <= self._length:
            header = os.pread(self._file.fileno(), _BLOCK, position)
            position += _BLOCK
            if not header.strip(b"\0"):
                zeros += 1
                continue
            zeros = 0
            kind = header[156]
            size = _number(header[124:136])
            _check_sum(header)
            if kind not in (_PAX, _PAX_GLOBAL, _LONG_NAME, _LONG_LINK) and b"size" in records:
                size = pax.number(b"size", records[b"size"])
            padded = (size + _BLOCK - 1) // _BLOCK * _BLOCK
            if position + size > self._length:
                raise FormatError(f"a tar member claims {size} bytes, more than the archive has left")
            if kind in (_PAX, _LONG_NAME, _LONG_LINK):
                if size > _EXTENSION_LIMIT:
                    raise FormatError(f"a tar extension of {size} bytes is too long")
                data = os.pread(self._file.fileno(), size, position)
                if kind == _PAX:
                    records = pax.parse(data)
                elif kind == _LONG_NAME:
                    path = data.partition(b"\0")[0]
                else:
                    link = data.partition(b"\0")[0]
            elif kind != _PAX_GLOBAL:
                path = records.get(b"path") or path or _ustar_path(header)
                link = records.get(b"linkpath") or link or _text(header[157:257])
                self._add(names.clean(path), kind, Member(position, size), link)
                path, link, records = b"", b"", pax.Records()
            position += padded
        if zeros == 0 and position % _BLOCK == 0 and position > self._length:
            raise FormatError("the archive is truncated")
        if not self._members:
            raise FormatError("this is not a tar archive, or an empty one")

    def _add(self, path: bytes, kind: int, member: Member, link: bytes) -> None:
        if len(self._members) >= _MEMBERS:
            raise FormatError(f"the archive has more than {_MEMBERS} members")
        if kind in _REGULAR:
            self._members[path] = member  # of equal names the last counts
        elif kind == _HARD_LINK:
            self._members[path] = Member(0, 0, names.clean(link))
        elif kind == _SYMLINK:
            base = b"" if link.startswith(b"/") else path.rpartition(b"/")[0] + b"/"
            self._members[path] = Member(0, 0, names.clean(base + link))


def _text(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


def _ustar_path(header: bytes) -> bytes:
    """The name field, behind the prefix field where the format has one (GNU's puts times there)."""
    name, prefix = _text(header[:100]), _text(header[345:500])
    return prefix + b"/" + name if prefix and header[257:263] == b"ustar\0" else name


def _number(field: bytes) -> int:
    """Octal digits, or GNU's base 256 for what is too large for them."""
    if field[0] & 0x80:
        value = int.from_bytes(field, "big") - (0x80 << 8 * (len(field) - 1))
        if field[0] == 0xFF:
            raise FormatError("a tar member has a negative size")
        return value
    digits = field.strip(b" \0")
    if digits.strip(b"01234567"):
        raise FormatError("this is not a tar archive, or a damaged one")
    return int(digits or b"0", 8)


def _check_sum(header: bytes) -> None:
    """The sum of the header's bytes, its own field taken as blanks; some old tars summed signed bytes."""
    blanked = header[:148] + b" " * 8 + header[156:]
    claimed, total = _number(header[148:156]), sum(blanked)
    if claimed != total and claimed != total - 256 * sum(byte > 127 for byte in blanked):
        raise FormatError("this is not a tar archive, or a damaged one")
