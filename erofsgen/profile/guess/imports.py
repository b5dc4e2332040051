"""The static import graph of what a Python runs: modulefinder(1)'s work over an index, level by level.

A module is found as importlib's FileFinder finds it: packages first, extension modules before sources; a source's byte
code is what is read where it is valid. What functions import is left out, but for the entrypoint's own: those run.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from itertools import islice
from typing import Final

from erofsgen.profile.guess import bytecode, source
from erofsgen.profile.guess.libraries import Libraries
from erofsgen.profile.guess.python import Python
from erofsgen.profile.guess.request import Code, Request
from erofsgen.profile.guess.rounds import Rounds
from erofsgen.profile.guess.stacks import NEVER, known
from erofsgen.profile.guess.tree import File, Tree, join

MAIN: Final = "__main__"

MODULES_MAX: Final = 20_000
_FILE_MAX: Final = 8 << 20
_NAME_MAX: Final = 300
_PORTIONS_MAX: Final = 100
_TEXTS_MAX: Final = 2_000
_MATCHES_MAX: Final = 20_000
_OBJECT: Final = re.compile(r"([^\W\d]\w*(?:\.[^\W\d]\w*)*)(?::[\w.]+(?:\(.*\))?)?\Z")

_DOTTED: Final = re.compile(rb"\0((?:[A-Za-z_]\w*\.)+[A-Za-z_]\w*)(?=\0)")


@dataclass
class Module:
    """``place``: where it was found, links not resolved; ``files``: what is read of it, in order; ``search``: where a
    package's modules are; ``below``: what it imports, in order; ``more``: what the table of stacks says that it imports
    besides; ``texts``: the strings in it, of entrypoints."""

    name: str
    place: bytes = b""
    files: list[File] = field(default_factory=list)
    search: list[bytes] | None = None
    extension: bool = False
    below: list[str] = field(default_factory=list)
    more: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    @property
    def package(self) -> str:
        """What its relative imports are relative to."""
        return self.name if self.search is not None else self.name.rpartition(".")[0]


class Imports:
    """Follows imports by tasks of ``rounds``; :meth:`walk` says what came of it.

    ``first``: directories that come before the Python's own path.
    """

    def __init__(self, tree: Tree, rounds: Rounds, libraries: Libraries, python: Python) -> None:
        self._tree = tree
        self._rounds = rounds
        self._libraries = libraries
        self._python = python
        self.first: list[bytes] = []
        self._modules: dict[str, Module | None] = {}
        self._begun: set[str] = set()
        self._entries: set[str] = set()

    # --- where to begin

    def start(self, name: str, *, entry: bool = False) -> bool:
        """Import a module and the packages above it; whether there is one. ``entry``: it is what the command runs."""
        if entry:
            self._entries.add(name)
        return name in self._import(name)

    def start_script(self, file: File, name: str = MAIN) -> None:
        """Run a source as a main module."""
        self._entries.add(name)
        module = self._modules[name] = Module(name, file.path, [file])
        self._begun.add(name)
        self._rounds.start(self._read_source(module, file))

    def start_code(self, text: bytes, name: str = MAIN) -> None:
        """Run source that is in no file, as a main module."""
        self._entries.add(name)
        module = self._modules[name] = Module(name)
        self._begun.add(name)
        self._take(module, source.imports(text, everything=True))

    def start_object(self, text: str) -> str | None:
        """Import what ``module:object`` or a dotted name means, if that is a module of the image; its name."""
        found = _OBJECT.match(text) if len(text) <= _NAME_MAX else None
        parts = found[1].split(".") if found else []
        for count in (len(parts), len(parts) - 1):
            # a lone word may mean anything
            if count > 1 or (count == 1 and ":" in text):
                name = ".".join(parts[:count])
                if self.find(name):
                    self.start(name, entry=True)
                    return name
        return None

    # --- modules

    def find(self, name: str) -> Module | None:
        """The module of this name, not yet imported; None where there is none."""
        if name in self._modules:
            return self._modules[name]
        if len(name) > _NAME_MAX or len(self._modules) >= MODULES_MAX:
            return None
        above, _, tail = name.rpartition(".")
        if self._python.is_frozen(name):
            found: Module | None = Module(name)
        elif above:
            package = self.find(above)
            found = self._look(name, tail, package.search) if package and package.search is not None else None
        else:
            found = self._look(name, tail, [*self.first, *self._python.path])
        self._modules[name] = found
        return found

    def _look(self, name: str, tail: str, directories: list[bytes]) -> Module | None:
        wanted = tail.encode("utf-8", "surrogateescape")
        portions: list[bytes] = []
        for place in directories:
            directory = self._tree.directory(place)
            if directory is None:
                continue
            if wanted in directory.names:
                inside = join(directory.path, wanted)
                found = self._load(name, inside, b"__init__")
                if found:
                    found.search = [inside]
                    return found
                if len(portions) < _PORTIONS_MAX and self._tree.directory(inside):
                    portions.append(inside)
            found = self._load(name, directory.path, wanted)
            if found:
                return found
        return Module(name, search=portions) if portions else None

    def _load(self, name: str, place: bytes, stem: bytes) -> Module | None:
        directory = self._tree.directory(place)
        if directory is None:
            return None
        for suffix in (*self._python.suffixes, b".py", b".pyc"):
            if stem + suffix in directory.names:
                found = join(directory.path, stem + suffix)
                file = self._tree.file(found)
                if file:
                    return Module(name, found, [file], extension=suffix.endswith(b".so"))
        return None

    def _import(self, name: str) -> list[str]:
        """Import a module and the packages above it; the names of those that there are."""
        found: list[str] = []
        parts = name.split(".") if len(name) <= _NAME_MAX else []
        for count in range(1, len(parts) + 1):
            module = self.find(".".join(parts[:count]))
            if module is None:
                break
            found.append(module.name)
            if module.name not in self._begun:
                self._begun.add(module.name)
                self._begin(module)
        return found

    def _begin(self, module: Module) -> None:
        """Have it found out what a module imports and loads."""
        if module.extension:
            self._libraries.start(module.place, then=partial(self._take_compiled, module))
        elif module.files:
            self._rounds.start(self._read(module))
        for name in known(module.name).imports:
            module.more += self._import(name)
        for file in self.files(module, known(module.name).libraries):
            self._libraries.start(file.path)

    async def _read(self, module: Module) -> None:
        """Find out what a module imports that is source or byte code."""
        file = module.files[0]
        cached = file if file.path.endswith(b".pyc") else self._tree.file(self._python.cached(module.place))
        if cached and cached.node.size <= _FILE_MAX:
            data = await self._rounds.fetch(cached.node) or b""
            valid = cached is file or bytecode.is_valid(data, file.node.mtime // 1_000_000_000, file.node.size)
            if cached is not file:
                module.files = [cached] if valid and not bytecode.is_checked(data) else [cached, file]
            code = bytecode.imports(data, everything=self._runs(module)) if valid else None
            if code is not None:
                self._take(module, code)
                return
        if cached is not file:
            await self._read_source(module, file)

    async def _read_source(self, module: Module, file: File) -> None:
        if file.node.size <= _FILE_MAX:
            data = await self._rounds.fetch(file.node) or b""
            self._take(module, source.imports(data, everything=self._runs(module)))

    def _runs(self, module: Module) -> bool:
        """Whether a module is the entrypoint or part of it, so that its functions run."""
        main = module.name.rpartition(".")[2] == MAIN or module.name.startswith("<")
        return module.name in self._entries and (main or self._is_own(module))

    def _is_own(self, module: Module) -> bool:
        """Whether a module is the application's, not a package's: only its strings say what is meant."""
        return not any(module.place.startswith(place + b"/") for place in (self._python.library, *self._python.sites))

    def _take(self, module: Module, code: Code) -> None:
        without = known(module.name).without
        for request in code.requests:
            name = absolute(module, request)
            if name is None or name in without or name in NEVER:
                continue
            module.below += self._import(name)
            module.more += [each for more in known(name).named(request.names) for each in self._import(more)]
            package = self._modules.get(name)
            if package is None or package.search is None:
                continue
            for wanted in request.names:
                inside = f"{name}.{wanted}"
                if wanted != "*" and inside not in without and inside not in NEVER and self.find(inside):
                    module.below += self._import(inside)[-1:]
        module.texts = list(dict.fromkeys(code.texts))[:_TEXTS_MAX] if self._is_own(module) else []
        for text in module.texts:
            meant = self.start_object(text)
            if meant:
                module.below += self._import(meant)

    def _take_compiled(self, module: Module, data: bytes) -> None:
        """Cython's modules import others of theirs whose names are strings in them."""
        if b"_cython_" not in data:
            return
        for found in islice(_DOTTED.finditer(data), _TEXTS_MAX):
            name = found[1].decode()
            other = self.find(name) if name not in NEVER and name not in module.below else None
            if other and other.extension and other is not module:
                module.below += self._import(name)

    # --- what came of it

    def walk(self, names: Iterable[str], reason: str, seen: set[str]) -> Iterator[tuple[str, Module]]:
        """(reason, module) of everything that importing ``names`` imports, in the order in which it is read: what only
        the table of stacks names has the reason ``stacks``. What is ``seen`` is left out, and what comes is added."""
        waiting = [(above, reason) for name in names for above in _packages(name)][::-1]
        while waiting:
            name, why = waiting.pop()
            module = self._modules.get(name)
            if module is None or name in seen or name not in self._begun:
                continue
            seen.add(name)
            yield why, module
            waiting += [(more, "stacks") for more in module.more if more not in seen][::-1]
            waiting += [(below, why) for below in module.below if below not in seen][::-1]

    def texts(self) -> Iterator[str]:
        """The strings in what the command runs."""
        for name in sorted(self._entries):
            module = self._modules.get(name)
            yield from module.texts if module else ()

    def files(self, module: Module, patterns: Iterable[str]) -> Iterator[File]:
        """The files that patterns relative to a module's directory mean."""
        directory = module.place.rpartition(b"/")[0]
        for pattern in patterns if module.place else ():
            yield from islice(self._matching(directory, pattern.encode().split(b"/")), _MATCHES_MAX)

    def _matching(self, directory: bytes, parts: list[bytes]) -> Iterator[File]:
        name, rest = parts[0], parts[1:]
        if b"*" in name or b"?" in name:
            found = [
                other for other in self._tree.names(directory) if fnmatchcase(os.fsdecode(other), os.fsdecode(name))
            ]
        else:
            found = [name]
        for other in found:
            place = directory.rpartition(b"/")[0] if other == b".." else join(directory, other)
            if rest:
                yield from self._matching(place, rest)
            else:
                file = self._tree.file(place)
                if file:
                    yield file


def _packages(name: str) -> list[str]:
    """The module's packages and itself."""
    parts = name.split(".") if not name.startswith("<") else [name]
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def absolute(module: Module, request: Request) -> str | None:
    """The full name of what a module imports from; None where that is beyond its package."""
    if not request.level:
        return request.name or None
    parts = module.package.split(".")
    if module.name == MAIN or request.level > len(parts):
        return None
    base = parts[: len(parts) - request.level + 1]
    return ".".join([*base, request.name] if request.name else base) or None
