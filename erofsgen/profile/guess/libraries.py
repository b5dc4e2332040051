"""What the dynamic loader loads with a program or a library, found as it finds it: ld.so(8).

The order of search is DT_RPATH (of the file and of those that need it, unless it has DT_RUNPATH), LD_LIBRARY_PATH,
DT_RUNPATH, /etc/ld.so.cache, the default directories; musl has its own list. /etc/ld.so.conf is left alone: the
loader does not read it, only ldconfig does.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from erofsgen.errors import FormatError
from erofsgen.profile.guess import elf as format_
from erofsgen.profile.guess.constructors import called, code_at, constructors, executable, pointers
from erofsgen.profile.guess.elf import (
    DT_INIT_ARRAY,
    DT_INIT_ARRAYSZ,
    DT_NEEDED,
    DT_RELA,
    DT_RELASZ,
    DT_RPATH,
    DT_RUNPATH,
    DT_STRSZ,
    DT_STRTAB,
    PT_DYNAMIC,
    PT_INTERP,
    Elf,
    Span,
)
from erofsgen.profile.guess.loading import WHOLE, covers, merged, touched
from erofsgen.profile.guess.rounds import Rounds
from erofsgen.profile.guess.tree import File, Tree, join

CACHE: Final = b"etc/ld.so.cache"
_CACHE_MAGIC: Final = b"glibc-ld.so.cache1.1"
_CACHE_MAX: Final = 16 << 20
_CACHE_HEADER: Final = 48
_CACHE_ENTRY: Final = struct.Struct("<iIIIQ")

OBJECTS_MAX: Final = 5_000
_NEEDED_MAX: Final = 1_000
_HEAD: Final = 1 << 20
"""A file up to this size is one chunk: reading less of it saves nothing."""
_STRINGS_MAX: Final = 64 << 10
_DYNAMIC_MAX: Final = 64 << 10
_RELOCATIONS_MAX: Final = 64 << 20
_ARRAY_MAX: Final = 1 << 20
_CODE_MAX: Final = 16 << 20
"""Constructors' code that is read for what it calls."""

_MULTIARCH: Final = {
    62: b"x86_64",
    183: b"aarch64",
    243: b"riscv64",
    3: b"i386",
    40: b"arm",
    21: b"powerpc64le",
    22: b"s390x",
}


@dataclass
class Object:
    """A program or library. ``spans``: what loading it touches; ``needed``: the libraries it needs, as they are called;
    ``libraries``: where those are, as far as they were found."""

    file: File
    spans: list[Span]
    interpreter: bytes | None = None
    needed: list[bytes] = field(default_factory=list)
    libraries: list[bytes] = field(default_factory=list)


class Libraries:
    """Looks at programs and libraries by tasks of ``rounds``; :meth:`closure` says what came of it."""

    def __init__(self, tree: Tree, rounds: Rounds, environment: Mapping[str, str]) -> None:
        self._tree = tree
        self._rounds = rounds
        paths = environment.get("LD_LIBRARY_PATH", "").replace(";", ":").split(":")
        self._library_path = [path.encode() for path in paths if path.startswith("/")]
        self._objects: dict[bytes, Object | None] = {}
        self._cache: dict[bytes, list[bytes]] = {}
        self._musl: list[bytes] | None = None

    async def read_cache(self) -> None:
        """Read /etc/ld.so.cache, before anything else is looked at."""
        cache = self._tree.file(CACHE)
        if cache and cache.node.size <= _CACHE_MAX:
            self._cache = parse_cache(await self._rounds.fetch(cache.node) or b"")

    def start(self, path: bytes, *, runs: bool = False, then: Callable[[bytes], None] | None = None) -> None:
        """Look at a file and at everything it needs. ``runs``: see :func:`~erofsgen.profile.guess.loading.touched`;
        so does a file that ``then`` is to see all bytes of, if they are not too many."""
        self._start(path, (), runs=runs or then is not None, then=then)

    def _start(
        self, path: bytes, above: tuple[bytes, ...], *, runs: bool = False, then: Callable[[bytes], None] | None = None
    ) -> None:
        file = self._tree.file(path)
        if file and file.path not in self._objects and len(self._objects) < OBJECTS_MAX:
            self._objects[file.path] = None
            self._rounds.start(self._look(file, path, above, runs=runs, then=then))

    async def _look(
        self, file: File, path: bytes, above: tuple[bytes, ...], *, runs: bool, then: Callable[[bytes], None] | None
    ) -> None:
        size = file.node.size
        head = await self._rounds.fetch(file.node, 0, size if then and size <= WHOLE else _HEAD)
        if not head:
            return
        if then and len(head) == size:
            then(head)
        elf = format_.parse(head)
        found = self._objects[file.path] = Object(file, touched(elf, size, runs=runs))
        part = elf.first(PT_INTERP)
        if part and 0 < part.length < format_.NAME_MAX:
            found.interpreter = (await self._part(file, head, part.span) or b"").rstrip(b"\0") or None
            if found.interpreter:
                self._take_interpreter(found.interpreter)
                self._start(found.interpreter, ())
        dynamic = elf.first(PT_DYNAMIC)
        if dynamic is None:
            return
        elf.read_dynamic(await self._part(file, head, Span(dynamic.offset, min(dynamic.length, _DYNAMIC_MAX))) or b"")
        found.spans = touched(elf, size, runs=runs)
        if any(not covers(found.spans, segment.span, size) for segment in executable(elf)):
            found.spans = merged([*found.spans, *await self._constructors(file, head, elf)], size)
        names = await self._names(file, head, elf)
        origin = b"/" + path.strip(b"/").rpartition(b"/")[0]
        rpath = [] if DT_RUNPATH in names else list(_directories(names.get(DT_RPATH, []), origin))
        runpath = list(_directories(names.get(DT_RUNPATH, []), origin))
        below = (*rpath, *above)[:64]
        searched = [*([] if DT_RUNPATH in names else below), *self._library_path, *runpath]
        found.needed = names.get(DT_NEEDED, [])[:_NEEDED_MAX]
        for name in found.needed:
            place = self._search(name, searched, elf)
            if place is not None:
                found.libraries.append(place)
                self._start(place, below)

    async def _constructors(self, file: File, head: bytes, elf: Elf) -> list[Span]:
        """Where the code lies that runs while a file is loaded of whose code only that is wanted."""
        table, array = elf.table(DT_RELA, DT_RELASZ), elf.table(DT_INIT_ARRAY, DT_INIT_ARRAYSZ)
        if array is None or array.length > _ARRAY_MAX:
            return []
        relocations = b""
        if table and table.length <= _RELOCATIONS_MAX:
            relocations = await self._part(file, head, table) or b""
        found = constructors(elf, relocations)
        if not len(found):
            found = pointers(elf, await self._part(file, head, array) or b"")
        spans = code_at(elf, found)
        more: list[Span] = []
        if sum(span.length for span in spans) <= _CODE_MAX:
            codes = await self._rounds.fetch_all(file.node, spans)
            for span, code in zip(spans, codes, strict=True):
                more += code_at(elf, called(elf, code or b"", elf.address_of(span.offset) or 0), reach=1)
        return [*spans, *more]

    async def _part(self, file: File, head: bytes, span: Span) -> bytes | None:
        """Bytes of a file whose first ones are here."""
        if span.end <= len(head):
            return head[span.offset : span.end]
        return await self._rounds.fetch(file.node, span.offset, span.length)

    async def _names(self, file: File, head: bytes, elf: Elf) -> dict[int, list[bytes]]:
        """The names that the dynamic section gives, by tag."""
        strings = elf.table(DT_STRTAB, DT_STRSZ)
        places = [place for listed in elf.names.values() for place in listed]
        if strings is None or not places:
            return {}
        first, last = min(places), min(max(places) + 256, strings.length)
        if last - first > _STRINGS_MAX and strings.end > len(head):
            last = first + _STRINGS_MAX  # patched files have all new names together, behind the old ones
        data = await self._part(file, head, Span(strings.offset + first, last - first)) or b""
        return {
            tag: [name for name in (format_.text_at(data, place - first) for place in listed) if name]
            for tag, listed in elf.names.items()
        }

    def _search(self, name: bytes, directories: list[bytes], elf: Elf) -> bytes | None:
        if b"/" in name:
            return name if name.startswith(b"/") and self._tree.file(name) else None
        for directory in directories:
            if self._tree.file(join(directory, name)):
                return join(directory, name)
        for path in self._cache.get(name, ()):
            if self._tree.file(path):
                return path
        for directory in self._defaults(elf):
            if self._tree.file(join(directory, name)):
                return join(directory, name)
        return None

    def _take_interpreter(self, interpreter: bytes) -> None:
        """musl has its own directories; those of /etc/ld-musl-*.path are the same in distributions."""
        if b"ld-musl" in interpreter:
            self._musl = [b"/lib", b"/usr/local/lib", b"/usr/lib"]

    def _defaults(self, elf: Elf) -> list[bytes]:
        if self._musl is not None:
            return self._musl
        triple = _MULTIARCH.get(elf.machine, b"none") + b"-linux-gnu"
        wide = [b"/lib64", b"/usr/lib64"] if elf.wide else []
        return [b"/lib/" + triple, b"/usr/lib/" + triple, *wide, b"/lib", b"/usr/lib"]

    # --- what came of it

    def object(self, path: bytes) -> Object | None:
        """What was found out about the file that ``path`` leads to."""
        file = self._tree.file(path)
        return self._objects.get(file.path) if file else None

    def closure(self, path: bytes) -> Iterator[Object]:
        """The file and everything it loads, in the order of loading: breadth first, its interpreter before that."""
        first = self.object(path)
        if first is None:
            return
        seen = {first.file.path}
        queue = [first]
        if first.interpreter:
            loader = self.object(first.interpreter)
            if loader and loader.file.path not in seen:
                seen.add(loader.file.path)
                queue.insert(1, loader)
        for found in queue:  # grows
            yield found
            for library in found.libraries:
                below = self.object(library)
                if below and below.file.path not in seen:
                    seen.add(below.file.path)
                    queue.append(below)


def _directories(listed: list[bytes], origin: bytes) -> Iterator[bytes]:
    for name in listed:
        for directory in name.split(b":"):
            directory = directory.replace(b"$ORIGIN", origin).replace(b"${ORIGIN}", origin)
            if directory.startswith(b"/") and b"$" not in directory:
                yield directory


def parse_cache(data: bytes) -> dict[bytes, list[bytes]]:
    """The paths that /etc/ld.so.cache has for each library's name, those for special processors left out.

    Both layouts of glibc's sysdeps/generic/dl-cache.h: the new one alone or behind the old one. Empty for others.
    """
    start = data.find(_CACHE_MAGIC)
    if start < 0 or start + _CACHE_HEADER > len(data):
        return {}
    count = struct.unpack_from("<I", data, start + len(_CACHE_MAGIC))[0]
    end = start + _CACHE_HEADER + count * _CACHE_ENTRY.size
    if end > len(data):
        return {}
    found: dict[bytes, list[bytes]] = {}
    for _, name, path, _, special in _CACHE_ENTRY.iter_unpack(data[start + _CACHE_HEADER : end]):
        if not special:
            place = format_.text_at(data, start + path)
            if place.startswith(b"/"):
                found.setdefault(format_.text_at(data, start + name), []).append(place)
    return found


def is_elf(head: bytes) -> bool:
    """Whether these first bytes are an ELF file's."""
    try:
        format_.parse(head)
    except FormatError:
        return False
    return True
