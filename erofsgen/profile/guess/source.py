"""Imports out of Python source, by its lines.

This is for sources without valid byte code (:mod:`erofsgen.profile.guess.bytecode`), and for ``python -c``. A parser
would be exact, but ``ast.parse`` must not see foreign text (deep nesting can crash it), and takes 195 ms for a MB where
this takes 25 ms. Only lines that begin with a keyword are looked at; their indentation says what is at module level. A
line that a string or a condition makes void costs bytes, nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice
from typing import Final

from erofsgen.profile.guess.request import Code, Request

_STATEMENT_MAX: Final = 16 << 10
_REQUESTS_MAX: Final = 10_000
_ALIASES_MAX: Final = 100

_LINE: Final = re.compile(
    rb"^([ \t]*)(import|from|if|elif|else|try|except|finally|with|for|while|async|def|class|match|case)\b", re.MULTILINE
)
_QUOTES: Final = re.compile(rb"\"\"\"|'''")
_ONE_LINER: Final = re.compile(rb":[ \t]*((?:import|from)\s.*)")
_COMMENT: Final = re.compile(rb"#[^\n]*")
_FROM: Final = re.compile(rb"from\s*(\.*)\s*([\w.]*?)\s*\bimport\b\s*(.*)", re.DOTALL)
_IMPORT: Final = re.compile(rb"import\s+(.*)", re.DOTALL)
_NAME: Final = re.compile(rb"[^\W\d]\w*(?:\.[^\W\d]\w*)*\Z")
_ALIAS: Final = re.compile(rb"\bimport\s+([\w.]+)\s+as\s+(\w+)")
_NAMED: Final = re.compile(rb"\b(?:__import__|import_module)\(\s*['\"]([A-Za-z_][\w.]*)['\"]")
_STRING: Final = re.compile(rb"\"([^\"\\\n]{1,1000})\"|'([^'\\\n]{1,1000})'")


def imports(source: bytes, *, everything: bool = False) -> Code:
    """What a module imports.

    ``everything``: also what its functions import and the block for ``__main__``, and all of its one-line strings.
    """
    code = _without_docstrings(source)
    requests: list[Request] = []
    done = 0
    skipped: int | None = None  # lines that are indented more belong to a function
    for line in _LINE.finditer(code):
        indent = len(line[1].expandtabs())
        if line.start() < done or (skipped is not None and indent > skipped):
            continue
        skipped = None
        keyword = line[2]
        if keyword in (b"import", b"from"):
            done, statement = _statement(code, line.start(2))
            requests += _requests(statement)
            if len(requests) > _REQUESTS_MAX:
                break
            continue
        end = code.find(b"\n", line.end())
        rest = code[line.end() : end if end >= 0 else len(code)]
        if not _runs(keyword, rest, everything=everything):
            skipped = indent
        elif b"import" in rest:
            found = _ONE_LINER.search(rest)
            if found:
                requests += _requests(found[1])
    if not everything:
        return Code(requests, [])
    named = [Request(0, name.decode(), ()) for name in _NAMED.findall(code)[:_REQUESTS_MAX]]
    return Code([*requests, *named, *_attributes(code, requests)], list(_texts(source)))


def _runs(keyword: bytes, rest: bytes, *, everything: bool) -> bool:
    """Whether an import runs what is below this line. ``rest``: what follows its keyword."""
    if keyword == b"def" or (keyword == b"async" and rest.lstrip().startswith(b"def")):
        return everything
    if keyword == b"if":
        if b"TYPE_CHECKING" in rest:
            return b"not " in rest or b" or " in rest
        if b"__name__" in rest and b"__main__" in rest:
            return everything
    return True


def _without_docstrings(source: bytes) -> bytes:
    """The source without strings in three quotes, as far as quotes look like those of a string."""
    kept: list[bytes] = []
    done = 0
    while opened := _QUOTES.search(source, done):
        start = opened.start()
        line = source[max(source.rfind(b"\n", done, start) + 1, done) : start]
        if b"#" in line or line.endswith((b"'", b'"')):
            kept.append(source[done : opened.end()])
            done = opened.end()
            continue
        end = source.find(opened[0], opened.end())
        if end < 0:
            break
        kept.append(source[done:start])
        done = end + 3
    kept.append(source[done:])
    return b"".join(kept)


def _statement(code: bytes, start: int) -> tuple[int, bytes]:
    """(where the logical line from ``start`` ends, the line without comments)."""
    limit = start + _STATEMENT_MAX
    end = start
    while True:
        end = code.find(b"\n", end, limit)
        if end < 0:
            end = min(len(code), limit)
            break
        if code[end - 1 : end] != b"\\":
            break
        end += 1
    line = code[start:end]
    if b"(" in line and b")" not in _COMMENT.sub(b"", line):
        closed = code.find(b")", end, limit)
        end = max(end, closed + 1)
        line = code[start:end]
    return end, _COMMENT.sub(b"", line).replace(b"\\\n", b" ")


def _requests(statement: bytes) -> Iterator[Request]:
    for part in statement.split(b";"):
        part = part.strip()
        found = _FROM.match(part)
        if found:
            level, name, wanted = len(found[1]), found[2], found[3].strip(b" \t()")
            names = tuple(_names(wanted)) if wanted != b"*" else ("*",)
            if names and (name or level) and (not name or _NAME.match(name)):
                yield Request(level, name.decode("utf-8", "replace"), names)
            continue
        found = _IMPORT.match(part)
        if found:
            for dotted in _names(found[1]):
                yield Request(0, dotted, ())


def _names(listed: bytes) -> Iterator[str]:
    """The names in ``a, b as c``."""
    for item in listed.split(b","):
        words = item.split()
        if words and _NAME.match(words[0]):
            yield words[0].decode("utf-8", "replace")


def _attributes(code: bytes, requests: list[Request]) -> Iterator[Request]:
    """Attributes of imported packages, which may be modules that are imported when they are asked for."""
    plain = {each.name.partition(".")[0].encode() for each in requests if not each.names}
    aliases = {name: name for name in sorted(plain)[:_ALIASES_MAX]}
    aliases |= {found[2]: found[1] for found in islice(_ALIAS.finditer(code), _ALIASES_MAX)}
    for alias, name in aliases.items():
        for rest in sorted(set(re.findall(rb"\b%s((?:\.[^\W\d]\w*)+)" % re.escape(alias), code)))[:_REQUESTS_MAX]:
            yield Request(0, (name + rest).decode("utf-8", "replace"), ())


def _texts(source: bytes) -> Iterator[str]:
    for double, single in _STRING.findall(source):
        yield (double or single).decode("utf-8", "replace")
