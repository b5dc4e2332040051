"""A command line as a shell and the usual wrappers read it, as far as that can be said without running anything."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

SHELLS: Final = frozenset({"sh", "bash", "dash", "ash"})

TEXT_MAX: Final = 64 << 10
_COMMANDS_MAX: Final = 200

_WRAPPERS: Final[dict[str, tuple[str, int]]] = {
    "catatonit": ("", 0),
    "conda": ("n p", 1),
    "docker-init": ("", 0),
    "dumb-init": ("r", 0),
    "env": ("u C", 0),
    "exec": ("a", 0),
    "gosu": ("", 1),
    "ionice": ("c n", 0),
    "nice": ("n", 0),
    "nohup": ("", 0),
    "numactl": ("C N m p i", 0),
    "pdm": ("", 1),
    "pipenv": ("", 1),
    "poetry": ("", 1),
    "setpriv": ("", 0),
    "stdbuf": ("i o e", 0),
    "su-exec": ("", 1),
    "time": ("", 0),
    "timeout": ("k s", 1),
    "tini": ("e p", 0),
    "uv": ("", 1),
}
"""Programs that run another one: their options of one letter with an argument, the words before the other's name."""

_ASSIGNMENT: Final = re.compile(r"[A-Za-z_]\w*=")
_VARIABLE: Final = re.compile(r"\$(?:(\w+)|\{(\w+)(?::?-([^{}]*))?\})")
_SEPARATORS: Final = frozenset({"&&", "||", ";", "|", "&", ";;", "(", ")"})
_KEYWORDS: Final = frozenset(
    {"if", "then", "else", "elif", "fi", "for", "while", "until", "do", "done", "case", "esac", "{", "}", "!"}
)


def wrapped(argv: Sequence[str]) -> tuple[list[str], dict[str, str]] | None:
    """(the command that a wrapper runs, what it adds to the environment); None if ``argv`` is no wrapper's."""
    name = argv[0].rpartition("/")[2]
    if name.startswith("tini"):
        name = "tini"
    if name not in _WRAPPERS:
        return None
    letters, positional = _WRAPPERS[name]
    added: dict[str, str] = {}
    words = list(argv[1:])
    while words:
        word = words[0]
        if word == "--":
            words.pop(0)
            break
        if word.startswith("-") and len(word) > 1:
            words.pop(0)
            if name == "env" and word in ("-S", "--split-string") and words:
                words[:1] = split(words[0])
            elif len(word) == 2 and word[1] in letters and words:
                words.pop(0)
        elif name == "env" and _ASSIGNMENT.match(word):
            variable, _, value = words.pop(0).partition("=")
            added[variable] = value
        elif positional:
            words.pop(0)
            positional -= 1
        else:
            break
    return (words, added) if words else None


def split(text: str) -> list[str]:
    """A text's words as a shell has them; those in blanks where its quotes are not closed."""
    try:
        return shlex.split(text[:TEXT_MAX])
    except ValueError:
        return text[:TEXT_MAX].split()


def expanded(word: str, environment: Mapping[str, str]) -> str:
    """A word with its variables replaced, by their defaults or nothing where they are not known."""
    return _VARIABLE.sub(lambda found: environment.get(found[1] or found[2]) or found[3] or "", word)


def commands(script: str) -> Iterator[list[str]]:
    """The simple commands of a shell script in order, words not expanded; what is no such command may be among them."""
    count = 0
    for line in script[:TEXT_MAX].replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|()")
        lexer.whitespace_split = True
        lexer.commenters = "#"
        try:
            words = list(lexer)
        except ValueError:
            continue
        command: list[str] = []
        for word in [*words, ";"]:
            if word in _SEPARATORS or (word in _KEYWORDS and not command):
                if command:
                    yield command
                    count += 1
                command = []
            else:
                command.append(word)
        if count >= _COMMANDS_MAX:
            return


def assignments(command: list[str]) -> tuple[dict[str, str], list[str]]:
    """(what is set before a simple command, the command itself)."""
    found: dict[str, str] = {}
    rest = list(command)
    while rest and _ASSIGNMENT.match(rest[0]):
        name, _, value = rest.pop(0).partition("=")
        found[name] = value
    return found, rest
