"""The guess: bytes of files in the order in which a start is expected to want them, each with its reason."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from operator import itemgetter
from typing import Final, NamedTuple

import numpy as np

from erofsgen.erofs.node import Extent
from erofsgen.erofs.reader import Index
from erofsgen.profile.chunks import Chunks
from erofsgen.profile.guess import weights
from erofsgen.profile.guess.command import Command
from erofsgen.profile.guess.elf import Span
from erofsgen.profile.guess.entry import Entry, Run
from erofsgen.profile.guess.imports import Module
from erofsgen.profile.guess.libraries import CACHE, Libraries, Object
from erofsgen.profile.guess.loading import merged
from erofsgen.profile.guess.rounds import Read, Rounds
from erofsgen.profile.guess.stacks import known
from erofsgen.profile.guess.tree import File, Tree
from erofsgen.profile.profile import ROW, Profile

REASONS: Final = ("loader", "program", "libraries", "interpreter", "imports", "stacks", "weights")
"""The names of the heuristics: a guess's reason is one of them."""

READ_MAX: Final = 1 << 30
"""Bytes that are read at most to find out."""

_STRAY_MAX: Final = 16 << 20
"""A file that a string in source may mean is taken up to this size, unless it is one of weights."""
_CODE: Final = (b".py", b".pyc", b".so")
"""Such files are other heuristics' business."""

_SYSTEM: Final = (
    b"etc/ld.so.preload", b"usr/lib/locale/locale-archive", b"usr/share/locale/locale.alias",
    *(b"usr/lib/locale/C.utf8/LC_" + name for name in (
        b"CTYPE", b"COLLATE", b"IDENTIFICATION", b"MEASUREMENT", b"MONETARY", b"NAME", b"NUMERIC", b"PAPER",
        b"TELEPHONE", b"TIME", b"ADDRESS")),
    b"usr/lib/locale/C.utf8/LC_MESSAGES/SYS_LC_MESSAGES", b"usr/lib/x86_64-linux-gnu/gconv/gconv-modules.cache",
    b"usr/lib/aarch64-linux-gnu/gconv/gconv-modules.cache", b"usr/lib64/gconv/gconv-modules.cache",
    b"etc/localtime", b"etc/nsswitch.conf", b"etc/passwd", b"etc/group",
)  # fmt: skip
"""What most starts read besides programs and libraries."""

_BESIDE: Final = {b"libcrypto.so": (b"etc/ssl/openssl.cnf", b"usr/lib/ssl/openssl.cnf", b"etc/pki/tls/openssl.cnf")}
"""Files that libraries read when they are loaded, by the beginnings of the libraries' names."""


class Guess(NamedTuple):
    """``length`` bytes of the file at ``path`` from ``offset``; ``path`` is without links and leading slash."""

    reason: str
    path: bytes
    offset: int
    length: int


def guess(index: Index, read: Read, command: Command, *, budget: int = 512 << 20) -> list[Guess]:
    """What ``command`` will read of an image, no byte twice, in the order in which it is expected to: ``budget`` bytes
    at most.

    ``read`` is called with pieces of many files at once, a few dozen times at most; it is for the caller to say that a
    piece could not be had. Raises what ``read`` raises, nothing else; a command that makes no sense is a start that
    reads nothing.
    """
    tree = Tree(index)
    rounds = Rounds(read, limit=READ_MAX)
    libraries = Libraries(tree, rounds, command.env)
    entry = Entry(tree, rounds, libraries)
    rounds.start(entry.run(command))
    rounds.run()
    result = _Result(tree, libraries, budget)
    result.add_all(entry, command)
    return result.guesses


class _Result:
    def __init__(self, tree: Tree, libraries: Libraries, budget: int) -> None:
        self._tree = tree
        self._libraries = libraries
        self._left = budget
        self._seen: set[tuple[bytes, int]] = set()
        self.guesses: list[Guess] = []

    def add_all(self, entry: Entry, command: Command) -> None:
        """Everything, in order."""
        for what in entry.steps.order:
            if isinstance(what, Run):
                self._run(what)
            elif isinstance(what, File):
                self._file("program", what)
            else:
                self._program(what)
        runs = [what for what in entry.steps.order if isinstance(what, Run)]
        self._weights(entry, runs, command)

    def _add(self, reason: str, path: bytes, offset: int, length: int) -> None:
        length = min(length, self._left)
        if length > 0 and (path, offset) not in self._seen:
            self._seen.add((path, offset))
            self._left -= length
            self.guesses.append(Guess(reason, path, offset, length))

    def _file(self, reason: str, file: File) -> None:
        self._add(reason, file.path, 0, file.node.size)

    # --- programs

    def _program(self, path: bytes) -> None:
        for number, found in enumerate(self._libraries.closure(path)):
            self._object("libraries" if number else "program", found)
            if number == 1:
                self._files("loader", [CACHE])
        self._files("loader", _SYSTEM)

    def _object(self, reason: str, found: Object) -> None:
        name = found.file.path.rpartition(b"/")[2]
        if name.startswith((b"ld-", b"ld.", b"ld64", b"libc.so", b"libc-")):
            reason = "loader"
        # whole chunks, since nothing less is brought
        chunk, size = found.file.node.chunk_size or 1, found.file.node.size
        whole = [
            Span(start - start % chunk, length + start % chunk + -(start + length) % chunk)
            for start, length in found.spans
        ]
        for span in merged(whole, size):
            self._add(reason, found.file.path, span.offset, span.length)
        for beginning, beside in _BESIDE.items():
            if name.startswith(beginning):
                self._files("libraries", beside)

    def _files(self, reason: str, paths: Iterable[bytes]) -> None:
        for path in paths:
            file = self._tree.file(path)
            if file:
                self._file(reason, file)

    # --- Python

    def _run(self, run: Run) -> None:
        python = run.python
        for file in (*([python.config] if python.config else []), *self._zip(python.path)):
            self._file("interpreter", file)
        seen = self._modules(run, run.first, "interpreter", set())
        for file in python.pth:
            self._file("interpreter", file)
        seen = self._modules(run, run.hooks, "interpreter", seen)
        self._modules(run, run.mains, "imports", seen)

    def _zip(self, path: list[bytes]) -> list[File]:
        found = [self._tree.file(place) for place in path if place.endswith(b".zip")]
        return [file for file in found if file]

    def _modules(self, run: Run, names: list[str], reason: str, seen: set[str]) -> set[str]:
        for why, module in run.imports.walk(names, reason, seen):
            self._module(run, module, why)
        return seen

    def _module(self, run: Run, module: Module, reason: str) -> None:
        if module.extension:
            for number, found in enumerate(self._libraries.closure(module.files[0].path)):
                self._object("libraries" if number else reason, found)
        else:
            for file in module.files:
                self._file(reason, file)
        row = known(module.name)
        for file in run.imports.files(module, row.libraries):
            for found in self._libraries.closure(file.path):
                self._object("stacks", found)
        for file in run.imports.files(module, row.files):
            self._file("stacks", file)

    # --- weights

    def _weights(self, entry: Entry, runs: Sequence[Run], command: Command) -> None:
        environment = dict(command.env)
        for word, cwd in entry.steps.words:
            self._named(word, cwd, environment, stray=self._left)
        for word in command.env.values():
            self._named(word, command.cwd, environment, stray=0)
        for run in runs:
            for word in run.imports.texts():
                self._named(word, command.cwd, environment, stray=_STRAY_MAX)

    def _named(self, word: str, cwd: str, environment: dict[str, str], *, stray: int) -> None:
        for file in weights.named(self._tree, word, cwd, environment):
            if weights.is_weights(file.path) or (file.node.size <= stray and not file.path.endswith(_CODE)):
                self._file("weights", file)


def guessed_profile(guesses: Sequence[Guess], chunks: Chunks, packs: Sequence[str], command_name: str) -> Profile:
    """The guesses as a profile of the image that ``chunks`` are of: a row for each chunk, of the first guess that names
    it. ``packs``: the image's, SHA-256 in hex, in the order of its devices. ``first`` counts up in the expected order.
    """
    tree = Tree(chunks.index)
    extents: dict[bytes, list[Extent]] = {}
    ranges: list[tuple[int, int, int, int]] = []
    for number, (_, path, offset, length) in enumerate(guesses):
        if path not in extents:
            file = tree.file(path)
            extents[path] = file.node.extents() if file else []
        of_file = extents[path]
        for start, size, device, place in of_file[bisect_right(of_file, offset, key=itemgetter(0)) - 1 :]:
            begin, end = max(start, offset), min(start + size, offset + length)
            if start >= offset + length:
                break
            if device and begin < end:
                ranges.append((device, place + begin - start, end - begin, number))
    devices, begins, sizes, numbers = np.array(ranges, np.int64).reshape(-1, 4).T
    found, which = chunks.touched_many(devices, begins, sizes)
    # the first guess that names a chunk has it
    order = np.sort(np.unique(found, return_index=True)[1])
    rows = np.zeros(len(order), ROW)
    table = chunks.table[found[order]]
    rows["pack"], rows["block"], rows["length"] = table["device"] - 1, table["block"], table["length"]
    rows["first"] = np.arange(len(order))
    reasons = np.array([REASONS.index(each.reason) for each in guesses], np.uint8)
    rows["reason"] = reasons[numbers[which[order]]]
    return Profile(command_name, 0, list(packs), list(REASONS), rows)
