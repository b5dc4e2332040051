"""Writes the manual pages, ``erofsgen.1`` and one per verb, from the command line's own definitions.

``python packaging/man.py [DIRECTORY]``; the directory is ``packaging/man`` by default, which is kept in git and which a
test compares with what this prints. Pages carry the version but no date: the same source gives the same pages.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from erofsgen import __version__
from erofsgen.cli.main import EXIT_CODES, program

ENVIRONMENT = (
    ("EROFSGEN_STORE", "The store, where --store is not given."),
    ("EROFSGEN_ROOT", "The directory of host state, where --root is not given."),
    ("EROFSGEN_CONFIG", "The configuration file, where --config is not given."),
    ("EROFSGEN_METRICS", "Where daemons serve metrics, where --metrics is not given; a path has to be absolute."),
    ("EROFSGEN_LOG_FORMAT", "How daemons write their log, text or json, where --log-format is not given."),
    ("XDG_DATA_HOME", "Where the defaults of both lie for everybody but root; ~/.local/share if it is not set."),
    ("TZ", "The time zone of listings."),
)
FILES = (
    ("/var/lib/erofsgen/store", "Root's store. Others have $XDG_DATA_HOME/erofsgen/store."),
    ("/etc/erofsgen/config.toml", "Root's configuration. Others have $XDG_CONFIG_HOME/erofsgen/config.toml."),
    ("/var/lib/erofsgen", "Root's host state. Others have $XDG_DATA_HOME/erofsgen."),
)
NAMES = (
    "With --json a command prints one JSON document on standard output. Names of files are strings; a byte of a name "
    "that is not UTF-8 is the lone surrogate U+DC80 to U+DCFF that Python's surrogateescape makes of it, written as "
    "\\udcNN. Sizes are bytes and times are nanoseconds since 1970, unless a name says otherwise. Otherwise names are "
    "printed with every unprintable byte as \\xNN and a backslash as \\\\."
)


def text(plain: str) -> str:
    """Text as roff: nothing in it is markup, dashes are ASCII."""
    escaped = plain.replace("\\", "\\e").replace("-", "\\-")
    return "\n".join("\\&" + line if line.startswith((".", "'")) else line for line in escaped.split("\n"))


def bold(plain: str) -> str:
    """Text in bold."""
    return f"\\fB{text(plain)}\\fR"


def paragraphs(document: str) -> Iterator[str]:
    """A help text: paragraphs are filled, those that begin with ``\\b`` are not; commands in backticks are bold."""
    for number, paragraph in enumerate(re.split(r"\n\s*\n", inspect.cleandoc(document).strip())):
        if number:
            yield ".PP"
        if paragraph.startswith("\b"):
            yield f".nf\n{text(paragraph[1:].strip(chr(10)))}\n.fi"
        else:
            parts = " ".join(paragraph.split()).split("`")
            yield "".join(bold(part) if odd % 2 else text(part) for odd, part in enumerate(parts))


def entries(pairs: Iterator[tuple[str, str]]) -> Iterator[str]:
    """A tagged list; the tags are roff already."""
    for tag, description in pairs:
        yield f".TP\n{tag}\n{text(description)}"


def options(command: click.Command) -> Iterator[tuple[str, str]]:
    """Every option: its names and value, what it does."""
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            names = ", ".join(bold(name) for name in [*parameter.opts, *parameter.secondary_opts])
            if not parameter.is_flag:
                choices = parameter.type.choices if isinstance(parameter.type, click.Choice) else ()
                what = parameter.metavar or "|".join(choices)
                assert what, f"{parameter.name} has no metavar"
                names += f" \\fI{text(what)}\\fR"
            yield names, parameter.help or ""
    yield bold("--help"), "Show the usage and exit."


def usage(command: click.Command, name: str) -> str:
    """The synopsis."""
    pieces = ["[OPTION]..."]
    for parameter in command.params:
        if isinstance(parameter, click.Argument):
            what = parameter.metavar or (parameter.name or "").upper()
            if isinstance(parameter.type, click.Choice):
                what = "|".join(parameter.type.choices)
            if parameter.nargs == -1:
                what = what.removesuffix("S") + "..."
            pieces.append(what if parameter.required else f"[{what}]")
    if isinstance(command, click.Group):
        pieces.append("VERB [ARGUMENT]...")
    return f"{bold(name)} {text(' '.join(pieces))}"


def page(command: click.Command, name: str) -> str:
    """One manual page. ``name`` is ``erofsgen``, ``erofsgen VERB`` or ``erofsgen VERB VERB``."""
    title = name.replace(" ", "-")
    verbs = {}
    if isinstance(command, click.Group):
        context = click.Context(command)
        verbs = {verb: command.get_command(context, verb) for verb in command.list_commands(context)}
    lines = [
        f'.TH {title.upper().replace("-", chr(92) + "-")} 1 "" "erofsgen {__version__}" "User Commands"',
        ".SH NAME",
        f"{text(title)} \\- {text(command.get_short_help_str(limit=200).rstrip('.'))}",
        ".SH SYNOPSIS",
        usage(command, name),
        ".SH DESCRIPTION",
        *paragraphs(command.help or ""),
    ]
    if verbs:
        lines.append(".SH COMMANDS")
        lines += entries((bold(verb), found.get_short_help_str(limit=200)) for verb, found in verbs.items() if found)
    lines += [".SH OPTIONS", *entries(options(command))]
    lines += [".SH OUTPUT", text(NAMES)] if verbs else []
    lines += [".SH ENVIRONMENT", *entries((bold(variable), what) for variable, what in ENVIRONMENT)] if verbs else []
    lines += [".SH FILES", *entries((f"\\fI{text(file)}\\fR", what) for file, what in FILES)] if verbs else []
    lines += [".SH EXIT STATUS", *entries((bold(str(code)), meaning.replace("`", "")) for code, meaning in EXIT_CODES)]
    also = [f".BR {text(f'{title}-{verb}')} (1)" for verb in verbs] or [".BR erofsgen (1)"]
    lines += [".SH SEE ALSO", ",\n".join(also)]
    return "\n".join(lines) + "\n"


def pages() -> dict[str, str]:
    """Every page by its file name."""
    return dict(_pages(program, "erofsgen"))


def _pages(command: click.Command, name: str) -> Iterator[tuple[str, str]]:
    """A command's page, and those of its verbs."""
    yield f"{name.replace(' ', '-')}.1", page(command, name)
    if isinstance(command, click.Group):
        context = click.Context(command)
        for verb in command.list_commands(context):
            found = command.get_command(context, verb)
            assert found is not None
            yield from _pages(found, f"{name} {verb}")


def main(directory: Path) -> None:
    """Write the pages, and remove those of verbs that are gone."""
    directory.mkdir(parents=True, exist_ok=True)
    made = pages()
    for stale in directory.glob("erofsgen*.1"):
        if stale.name not in made:
            stale.unlink()
    for name, content in made.items():
        (directory / name).write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "man")
