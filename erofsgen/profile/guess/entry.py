"""From a command to what it runs: programs, scripts and their interpreters, through shells and wrappers."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Final

from erofsgen.profile.guess import elf, words
from erofsgen.profile.guess.command import Command
from erofsgen.profile.guess.imports import MAIN, Imports
from erofsgen.profile.guess.libraries import Libraries
from erofsgen.profile.guess.python import Finder, Invocation, Python, invocation, is_python
from erofsgen.profile.guess.rounds import Rounds
from erofsgen.profile.guess.tree import File, Tree, join

_DEPTH: Final = 8
_HEAD: Final = 4096
_COMMANDS: Final = 16
_OBJECTS: Final = 32
_WORD: Final = re.compile(r"[^\W\d]\w*\Z")

_VARIABLES: Final = ("DJANGO_SETTINGS_MODULE", "FLASK_APP", "APP_MODULE", "MODULE_NAME", "CELERY_APP", "UVICORN_APP")
"""Environment variables that name a module to run."""
_ARGUMENTS: Final = ("GUNICORN_CMD_ARGS",)
"""Environment variables that hold more arguments."""


@dataclass
class Run:
    """What a Python runs. ``first``: what it imports on its own; ``hooks``: modules of *.pth files and customization;
    ``mains``: what it was asked for."""

    python: Python
    imports: Imports
    first: list[str]
    hooks: list[str] = field(default_factory=list)
    mains: list[str] = field(default_factory=list)


@dataclass
class Steps:
    """What happens, in order: programs by their paths, scripts, what Pythons run; and words by which files may be
    meant."""

    order: list[bytes | File | Run] = field(default_factory=list)
    words: list[tuple[str, str]] = field(default_factory=list)
    """(word, working directory)."""


class Entry:
    """Finds out what a command runs, by a task of ``rounds``: :meth:`follow`."""

    def __init__(self, tree: Tree, rounds: Rounds, libraries: Libraries) -> None:
        self._tree = tree
        self._rounds = rounds
        self._libraries = libraries
        self.steps = Steps()

    async def run(self, command: Command) -> None:
        """Follow a command to its end."""
        await self._libraries.read_cache()
        preload = command.env.get("LD_PRELOAD", "").replace(":", " ").split()
        for path in preload[:_OBJECTS]:
            self._libraries.start(_bytes(path))
        await self._follow(command, 0)

    async def _follow(self, command: Command, depth: int) -> None:
        if depth > _DEPTH or not command.argv or not command.argv[0]:
            return
        program = self._which(command.argv[0], command)
        file = self._tree.file(program) if program else None
        if program is None or file is None:
            return
        head = await self._rounds.fetch(file.node, 0, _HEAD) or b""
        if head.startswith(elf.MAGIC):
            self._libraries.start(program, runs=True)
            self.steps.order.append(program)
            await self._program(command, program, file, depth)
        elif head.startswith(b"#!"):
            await self._script(command, program, file, head, depth)

    def _which(self, name: str, command: Command) -> bytes | None:
        """Where the program called ``name`` is, links not resolved."""
        if "/" in name:
            places = [join(_bytes(command.cwd), _bytes(name))]
        else:
            paths = command.env.get("PATH", "").split(":")
            places = [join(_bytes(command.cwd), _bytes(path), _bytes(name)) for path in paths]
        for place in places:
            file = self._tree.file(place)
            if file and file.node.mode & 0o111:
                return place
        return None

    async def _program(self, command: Command, program: bytes, file: File, depth: int) -> None:
        """What a compiled program runs that runs others."""
        name = program.rpartition(b"/")[2]
        wrapped = words.wrapped(command.argv)
        if wrapped:
            await self._follow(Command(tuple(wrapped[0]), {**command.env, **wrapped[1]}, command.cwd), depth + 1)
        elif is_python(name) or is_python(file.path.rpartition(b"/")[2]):
            await self._python(command, program, depth)
        elif name.decode("utf-8", "replace") in words.SHELLS:
            await self._shell(command, depth)
        else:
            self._name_files(command)

    def _name_files(self, command: Command) -> None:
        self.steps.words += [(word, command.cwd) for word in command.argv[1:]]

    async def _script(self, command: Command, program: bytes, file: File, head: bytes, depth: int) -> None:
        line = head[2:].split(b"\n", 1)[0].strip().decode("utf-8", "surrogateescape")
        interpreter, *argument = line.split(None, 1)
        argv = (interpreter, *argument, "/" + program.decode("utf-8", "surrogateescape"), *command.argv[1:])
        self.steps.order.append(file)
        await self._follow(Command(argv, command.env, command.cwd), depth + 1)

    # --- shells

    async def _shell(self, command: Command, depth: int) -> None:
        arguments = list(command.argv[1:])
        while arguments and arguments[0].startswith("-") and len(arguments[0]) > 1:
            option = arguments.pop(0)
            if option.startswith("--"):
                continue
            if "c" in option and arguments:
                await self._shell_commands(command, arguments[0], arguments[2:], depth, every=True)
                return
            if option[-1] == "o" and arguments:
                arguments.pop(0)
        file = self._tree.file(join(_bytes(command.cwd), _bytes(arguments[0]))) if arguments else None
        if file and file.node.size <= words.TEXT_MAX:
            text = (await self._rounds.fetch(file.node) or b"").decode("utf-8", "replace")
            await self._shell_commands(command, text, arguments[1:], depth, every=False)

    async def _shell_commands(
        self, command: Command, script: str, arguments: list[str], depth: int, *, every: bool
    ) -> None:
        """Follow a script's commands. ``every``: all of them; otherwise what replaces the shell, what Python runs, and
        the last, since files are full of conditions."""
        environment, cwd = dict(command.env), command.cwd
        found = list(words.commands(script))
        left = _COMMANDS
        for number, simple in enumerate(found):
            added, rest = words.assignments(simple)
            values = {name: words.expanded(value, environment) for name, value in added.items()}
            argv = [
                word
                for each in rest
                for word in (arguments if each in ("$@", "$*") else [words.expanded(each, environment)])
            ]
            match argv:
                case []:
                    environment.update(values)
                    continue
                case ["cd", directory, *_]:
                    cwd = "/" + join(_bytes(cwd), _bytes(directory)).decode("utf-8", "surrogateescape")
                    continue
                case ["export", *settings]:
                    environment.update(words.assignments(settings)[0])
                    continue
            replaces = argv[0] == "exec"
            argv = argv[1:] if replaces else argv
            inner = Command(tuple(argv), {**environment, **values}, cwd)
            if left and argv and (every or replaces or number == len(found) - 1 or self._is_python(inner)):
                left -= 1
                await self._follow(inner, depth + 1)

    def _is_python(self, command: Command) -> bool:
        return is_python(_bytes(command.argv[0]).rpartition(b"/")[2])

    # --- Python

    async def _python(self, command: Command, program: bytes, depth: int) -> None:
        asked = invocation(command.argv[1:])
        python = await Finder(self._tree, self._rounds, command.env).find(program, asked.flags)
        if python is None:
            return
        imports = Imports(self._tree, self._rounds, self._libraries, python)
        run = Run(python, imports, list(python.startup(asked.flags)))
        self.steps.order.append(run)
        for name in run.first:
            imports.start(name)
        if "S" not in asked.flags:
            for number, line in enumerate(python.code):
                run.hooks.append(f"<pth {number}>")
                imports.start_code(line, run.hooks[-1])
            for name in ("sitecustomize", "usercustomize"):
                if imports.start(name):
                    run.hooks.append(name)
        self._main(run, asked, command)
        await self._arguments(run, asked, command, depth)

    def _main(self, run: Run, asked: Invocation, command: Command) -> None:
        imports, cwd = run.imports, _bytes(command.cwd)
        isolated = bool(set(asked.flags) & set("IP"))
        match asked.kind:
            case "script":
                place = join(cwd, _bytes(asked.target))
                file = self._tree.file(place) or self._tree.file(join(place, b"__main__.py"))
                if file:
                    imports.first += [] if isolated else [file.path.rpartition(b"/")[0]]
                    imports.start_script(file)
                    run.mains.append(MAIN)
            case "module":
                imports.first += [] if isolated else [cwd]
                imports.start("runpy")
                inner = f"{asked.target}.__main__"
                module = imports.find(asked.target)
                name = inner if module and module.search is not None else asked.target
                if imports.start(name, entry=True):
                    run.mains += ["runpy", *([asked.target] if name == inner else []), name]
            case "code":
                imports.first += [] if isolated else [cwd]
                imports.start_code(asked.target.encode("utf-8", "surrogateescape"))
                run.mains.append(MAIN)

    async def _arguments(self, run: Run, asked: Invocation, command: Command, depth: int) -> None:
        """What the words behind a script or a module mean: modules to run, scripts, other commands."""
        cwd = _bytes(command.cwd)
        more = [word for name in _ARGUMENTS for word in words.split(command.env.get(name, ""))]
        found = [*asked.rest, *more]
        self.steps.words += [(word, command.cwd) for word in found]
        if asked.kind not in ("script", "module"):
            return
        if cwd not in run.imports.first:
            run.imports.first.append(cwd)
        named = [command.env[name] for name in _VARIABLES if command.env.get(name)]
        for word in [*found, *named][: 8 * _OBJECTS]:
            value = word.partition("=")[2] if word.startswith("-") else word
            name = run.imports.start_object(value) or self._local(run, value)
            file = self._tree.file(join(cwd, _bytes(value))) if value.endswith(".py") else None
            if file and name is None:
                name = f"<script {file.path.decode('utf-8', 'replace')}>"
                run.imports.first.append(file.path.rpartition(b"/")[0])
                run.imports.start_script(file, name)
            if name and name not in run.mains and len(run.mains) < _OBJECTS:
                run.mains.append(name)
        other = next((number for number, word in enumerate(asked.rest) if not word.startswith("-")), None)
        if asked.kind == "script" and other is not None and self._which(asked.rest[other], command):
            await self._follow(Command(asked.rest[other:], command.env, command.cwd), depth + 1)

    def _local(self, run: Run, word: str) -> str | None:
        """A module of the working directory that a lone word names."""
        if not _WORD.match(word):
            return None
        names = self._tree.names(run.imports.first[-1])
        if _bytes(word) in names or _bytes(word + ".py") in names:
            return word if run.imports.start(word, entry=True) else None
        return None


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
