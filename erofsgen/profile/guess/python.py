"""A Python of an image: where its modules are looked for, and what it reads before anything it was asked to run.

This follows CPython's Modules/getpath.py, Lib/site.py and PEP 405, and Debian's patches to them. What is not there, or
only for builds from a source tree, is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from erofsgen.profile.guess.rounds import Rounds
from erofsgen.profile.guess.tree import File, Tree, join

_NAME: Final = re.compile(rb"(?:python|pypy)(?:\d(?:\.\d+)?)?[tdm]*\Z")
_VERSION: Final = re.compile(rb"python(3)\.(\d+)")
_LIBRARIES: Final = (b"lib", b"lib64")
_SMALL: Final = 1 << 20
_PTH_MAX: Final = 1_000

_TRIPLES: Final = ("x86_64-linux-gnu", "aarch64-linux-gnu", "x86_64-linux-musl", "aarch64-linux-musl")

FROZEN_SINCE: Final = (3, 11)
FROZEN: Final = frozenset({
    "_collections_abc", "_sitebuiltins", "abc", "codecs", "genericpath", "importlib.machinery", "importlib.util", "io",
    "ntpath", "os", "posixpath", "runpy", "site", "stat", "zipimport",
})  # fmt: skip
"""Modules that are part of the interpreter from 3.11 on: no file is read for them (Python/frozen.c)."""
_ALWAYS_FROZEN: Final = frozenset({"importlib._bootstrap", "importlib._bootstrap_external", "zipimport"})

_ARGUMENT: Final = frozenset("WX")
"""Options that take an argument, besides -c and -m."""


def is_python(name: bytes) -> bool:
    """Whether a program of this name is a Python."""
    return bool(_NAME.match(name))


class Invocation(NamedTuple):
    """What a Python was asked to run. ``kind``: ``script``, ``module``, ``code`` or ``shell``; ``flags``: its options
    of one letter."""

    flags: str
    kind: str
    target: str
    rest: tuple[str, ...]


def invocation(arguments: Sequence[str]) -> Invocation:
    """Python's command line without the program."""
    flags = ""
    words = iter(range(len(arguments)))
    for number in words:
        word = arguments[number]
        if word == "--":
            break
        if not word.startswith("-") or word == "-":
            return Invocation(flags, "script", word, tuple(arguments[number + 1 :]))
        if word.startswith("--"):
            if word == "--check-hash-based-pycs":
                next(words, None)
            continue
        for place, letter in enumerate(word[1:], 2):
            if letter in "cm" or letter in _ARGUMENT:
                value, behind = word[place:], number + 1
                if not value:
                    value = arguments[number + 1] if number + 1 < len(arguments) else ""
                    behind = next(words, number) + 1
                if letter in "cm":
                    kind = "code" if letter == "c" else "module"
                    return Invocation(flags, kind, value, tuple(arguments[behind:]))
                break
            flags += letter
    return Invocation(flags, "shell", "", ())


@dataclass
class Python:
    """``path``: sys.path, without what is put before it for a script; ``sites``: the directories in it whose *.pth
    files are read; ``pth``: those files; ``code``: lines in them that are executed; ``config``: pyvenv.cfg."""

    version: tuple[int, int]
    library: bytes
    path: list[bytes]
    suffixes: list[bytes]
    optimized: int = 0
    sites: list[bytes] = field(default_factory=list)
    pth: list[File] = field(default_factory=list)
    code: list[bytes] = field(default_factory=list)
    config: File | None = None

    def cached(self, source: bytes) -> bytes:
        """Where the byte code of a source is."""
        directory, _, name = source.rpartition(b"/")
        level = b".opt-%d" % self.optimized if self.optimized else b""
        return join(directory, b"__pycache__", b"%s.cpython-%d%d%s.pyc" % (name[:-3], *self.version, level))

    def is_frozen(self, name: str) -> bool:
        """Whether a module is part of the interpreter."""
        return name in _ALWAYS_FROZEN or (self.version >= FROZEN_SINCE and name in FROZEN)

    def startup(self, flags: str) -> Iterator[str]:
        """The modules that it imports first, in order."""
        frozen = self.version >= FROZEN_SINCE
        yield from ("encodings", "codecs", "encodings.aliases", "encodings.utf_8")
        if not frozen:
            yield from ("encodings.latin_1", "io", "abc")
        if "S" not in flags:
            if self.version >= (3, 13) and self.pth:
                yield "encodings.utf_8_sig"
            yield from ("site", "os", "stat", "_collections_abc", "posixpath", "genericpath", "_sitebuiltins")
            if self.version < (3, 10):
                yield "_bootlocale"
        if self.version >= (3, 13):
            yield "linecache"


class Finder:
    """Finds out about a Python by its program's path."""

    def __init__(self, tree: Tree, rounds: Rounds, environment: Mapping[str, str]) -> None:
        self._tree = tree
        self._rounds = rounds
        self._environment = environment

    async def find(self, program: bytes, flags: str) -> Python | None:
        """The Python at ``program`` as it is with these options; None where its modules are nowhere."""
        environment = {} if set(flags) & set("EI") else self._environment
        home, venv, config, system = program, None, None, True
        for directory in (_above(program), _above(_above(program))):
            config = self._tree.file(join(directory, b"pyvenv.cfg"))
            if config:
                settings = parse_settings(await self._rounds.fetch(config.node, 0, _SMALL) or b"")
                venv = directory
                system = settings.get(b"include-system-site-packages", b"").lower() == b"true"
                base = settings.get(b"home", b"").strip()
                names = [program.rpartition(b"/")[2], b"python3", b"python"]
                home = next((join(base, name) for name in names if base and self._tree.file(join(base, name))), program)
                break
        real = self._tree.file(home)
        library = self._library(real.path if real else home, environment)
        if library is None:
            return None
        found = _VERSION.search(library)
        version = (3, int(found[2])) if found else (3, 0)
        python = Python(version, library, [], self._suffixes(version, library), config=config)
        level = environment.get("PYTHONOPTIMIZE", "")
        python.optimized = min(2, max(flags.count("O"), int(level) if level.isdigit() else int(bool(level))))
        above, name = library.rpartition(b"/")[::2]
        paths = environment.get("PYTHONPATH", "").split(":")
        python.path += [path.encode("utf-8", "surrogateescape") for path in paths if path.startswith("/")]
        python.path += [join(above, b"python%d%d.zip" % version), library, join(library, b"lib-dynload")]
        if "S" not in flags:
            await self._add_sites(
                python, [*self._user_site(flags, environment, name), *_sites(venv, library, system=system)]
            )
        return python

    def _library(self, program: bytes, environment: Mapping[str, str]) -> bytes | None:
        """The directory of the standard library: above the program, where os.py is."""
        name = program.rpartition(b"/")[2]
        exact = _VERSION.search(name)
        above = _above(program)
        places = [environment.get("PYTHONHOME", "").split(":")[0].encode("utf-8", "surrogateescape")]
        while True:
            places.append(above)
            if not above:
                break
            above = _above(above)
        for place in (*places, b"usr/local", b"usr"):
            for libraries in _LIBRARIES:
                for entry in self._versions(join(place, libraries), exact[0] if exact else None):
                    directory = self._tree.directory(join(place, libraries, entry))
                    if directory and directory.names.keys() & {b"os.py", b"os.pyc"}:
                        return directory.path
        return None

    def _versions(self, directory: bytes, exact: bytes | None) -> list[bytes]:
        if exact:
            return [exact]
        found = [name for name in self._tree.names(directory) if _VERSION.fullmatch(name)]
        return sorted(found, key=lambda name: int(name.rpartition(b".")[2]), reverse=True)

    def _suffixes(self, version: tuple[int, int], library: bytes) -> list[bytes]:
        """What extension modules' names end with, in the order of the search."""
        names = self._tree.names(join(library, b"lib-dynload"))
        tag = b".cpython-%d%d-" % version
        own = next((name[name.index(tag) :] for name in names if tag in name and name.endswith(b".so")), None)
        tags = [own] if own else [tag + triple.encode() + b".so" for triple in _TRIPLES]
        return [*tags, b".abi3.so", b".so"]

    def _user_site(self, flags: str, environment: Mapping[str, str], name: bytes) -> list[bytes]:
        if set(flags) & set("sI") or environment.get("PYTHONNOUSERSITE"):
            return []
        base = self._environment.get("PYTHONUSERBASE") or self._environment.get("HOME", "/root") + "/.local"
        return [join(base.encode("utf-8", "surrogateescape"), b"lib", name, b"site-packages")]

    async def _add_sites(self, python: Python, sites: list[bytes]) -> None:
        for site in sites:
            directory = self._tree.directory(site)
            if directory is None or directory.path in python.sites:
                continue
            python.sites.append(directory.path)
            python.path.append(directory.path)
            for name in sorted(directory.names):
                file = self._tree.file(join(directory.path, name)) if name.endswith(b".pth") else None
                if file and file.node.size <= _SMALL and len(python.pth) < _PTH_MAX and not name.startswith(b"."):
                    python.pth.append(file)
                    self._take_pth(python, directory.path, await self._rounds.fetch(file.node) or b"")

    def _take_pth(self, python: Python, site: bytes, data: bytes) -> None:
        for line in data.splitlines():
            if line.startswith((b"import ", b"import\t")):
                python.code.append(line)
            elif line.strip() and not line.startswith(b"#"):
                place = self._tree.directory(join(site, line.strip()))
                if place and place.path not in python.path:
                    python.path.append(place.path)


def _above(path: bytes) -> bytes:
    return path.strip(b"/").rpartition(b"/")[0]


def _sites(venv: bytes | None, library: bytes, *, system: bool) -> Iterator[bytes]:
    """The directories for packages, those that are not there included."""
    name = library.rpartition(b"/")[2]
    base = _above(_above(library))
    if venv is not None:
        for libraries in _LIBRARIES:
            yield join(venv, libraries, name, b"site-packages")
    if venv is None or system:
        yield join(base, b"local/lib", name, b"dist-packages")
        yield join(base, b"lib/python3/dist-packages")
        yield join(base, b"lib", name, b"dist-packages")
        yield join(base, b"local/lib", name, b"site-packages")
        for libraries in _LIBRARIES:
            yield join(base, libraries, name, b"site-packages")


def parse_settings(data: bytes) -> dict[bytes, bytes]:
    """The settings of a pyvenv.cfg."""
    pairs = (line.partition(b"=") for line in data.splitlines()[:1_000])
    return {name.strip().lower(): value.strip() for name, joint, value in pairs if joint}
