"""ELF files as the dynamic loader sees them: program headers and the dynamic section, nothing of the sections.

Structures are those of elf(5) and of the System V ABI; both word sizes and both byte orders.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from erofsgen.errors import FormatError

MAGIC: Final = b"\x7fELF"

PT_LOAD: Final = 1
PT_DYNAMIC: Final = 2
PT_INTERP: Final = 3
PF_X: Final = 1
PF_W: Final = 2

DT_NULL: Final = 0
DT_NEEDED: Final = 1
DT_PLTRELSZ: Final = 2
DT_STRTAB: Final = 5
DT_SYMTAB: Final = 6
DT_RELA: Final = 7
DT_RELASZ: Final = 8
DT_STRSZ: Final = 10
DT_RPATH: Final = 15
DT_REL: Final = 17
DT_RELSZ: Final = 18
DT_JMPREL: Final = 23
DT_INIT_ARRAY: Final = 25
DT_INIT_ARRAYSZ: Final = 27
DT_RUNPATH: Final = 29
DT_RELRSZ: Final = 35
DT_RELR: Final = 36
DT_GNU_HASH: Final = 0x6FFFFEF5
DT_VERSYM: Final = 0x6FFFFFF0

_TABLES: Final = ((DT_STRTAB, DT_STRSZ), (DT_RELA, DT_RELASZ), (DT_REL, DT_RELSZ), (DT_JMPREL, DT_PLTRELSZ),
                  (DT_RELR, DT_RELRSZ))  # fmt: skip
"""Tables that the dynamic section gives a size for."""
_STARTS: Final = (DT_SYMTAB, DT_GNU_HASH, DT_VERSYM, *(start for start, _ in _TABLES))

HEADER: Final = 64
SEGMENTS_MAX: Final = 256
ENTRIES_MAX: Final = 4096
NAME_MAX: Final = 4096


class Span(NamedTuple):
    """``length`` bytes of a file at ``offset``."""

    offset: int
    length: int

    @property
    def end(self) -> int:
        """Where it ends."""
        return self.offset + self.length


class Segment(NamedTuple):
    """A program header, as far as it says what is in the file."""

    kind: int
    flags: int
    offset: int
    address: int
    length: int

    @property
    def span(self) -> Span:
        """Its bytes of the file."""
        return Span(self.offset, self.length)


@dataclass
class Elf:
    """``tags``: the dynamic section's entries but for names; ``names``: of each tag that is a name, its places in the
    string table."""

    wide: bool
    order: str
    machine: int
    segments: list[Segment]
    tags: dict[int, int] = field(default_factory=dict)
    names: dict[int, list[int]] = field(default_factory=dict)

    def first(self, kind: int) -> Segment | None:
        """The first segment of a kind."""
        return next((segment for segment in self.segments if segment.kind == kind), None)

    def offset_of(self, address: int) -> int | None:
        """Where in the file the byte is that is loaded at ``address``."""
        for segment in self.segments:
            if segment.kind == PT_LOAD and segment.address <= address < segment.address + segment.length:
                return address - segment.address + segment.offset
        return None

    def address_of(self, offset: int) -> int | None:
        """At which address the byte at ``offset`` of the file is loaded."""
        for segment in self.segments:
            if segment.kind == PT_LOAD and segment.offset <= offset < segment.offset + segment.length:
                return offset - segment.offset + segment.address
        return None

    def read_dynamic(self, data: bytes) -> None:
        """Take in the dynamic section's bytes."""
        entry = struct.Struct(self.order + ("QQ" if self.wide else "II"))
        for number in range(min(len(data) // entry.size, ENTRIES_MAX)):
            tag, value = entry.unpack_from(data, number * entry.size)
            if tag == DT_NULL:
                break
            if tag in (DT_NEEDED, DT_RPATH, DT_RUNPATH):
                self.names.setdefault(tag, []).append(value)
            else:
                self.tags.setdefault(tag, value)

    def table(self, start: int, size: int) -> Span | None:
        """The table whose address and size stand under these tags."""
        offset = self.offset_of(self.tags[start]) if start in self.tags and size in self.tags else None
        return None if offset is None else Span(offset, self.tags[size])

    def tables(self) -> list[Span]:
        """What the loader reads to relocate and to find symbols, as far as it is known where it ends: a table without
        a size ends where the next begins."""
        starts = sorted({self.tags[tag] for tag in _STARTS if tag in self.tags})
        sizes = {self.tags[start]: self.tags.get(size, 0) for start, size in _TABLES if start in self.tags}
        found: list[Span] = []
        for number, address in enumerate(starts):
            offset = self.offset_of(address)
            following = starts[number + 1] if number + 1 < len(starts) else address
            length = sizes.get(address, following - address)
            if offset is not None and length:
                found.append(Span(offset, length))
        return found


def parse(data: bytes) -> Elf:
    """An ELF file's headers out of its first bytes. Raises FormatError."""
    if len(data) < HEADER or data[:4] != MAGIC or data[4] not in (1, 2) or data[5] not in (1, 2):
        raise FormatError("no ELF file")
    wide, order = data[4] == 2, "<" if data[5] == 1 else ">"
    machine = struct.unpack_from(order + "H", data, 18)[0]
    if wide:
        start, size, count = struct.unpack_from(order + "Q14xHH", data, 32)
        header = struct.Struct(order + "IIQQQQ")
    else:
        start, size, count = struct.unpack_from(order + "I10xHH", data, 28)
        header = struct.Struct(order + "IIIIIII")
    if count > SEGMENTS_MAX or (count and size < header.size):
        raise FormatError(f"an ELF file with {count} segments")
    segments: list[Segment] = []
    for number in range(count):
        at = start + number * size
        if at + header.size > len(data):
            raise FormatError("its segments are described elsewhere")
        if wide:
            kind, flags, offset, address, _, length = header.unpack_from(data, at)
        else:
            kind, offset, address, _, length, _, flags = header.unpack_from(data, at)
        segments.append(Segment(kind, flags, offset, address, length))
    return Elf(wide, order, machine, segments)


def text_at(data: bytes, at: int) -> bytes:
    """The string at ``at``, empty where there is none."""
    if not 0 <= at < len(data):
        return b""
    end = data.find(b"\0", at, at + NAME_MAX)
    return data[at:end] if end >= 0 else b""
