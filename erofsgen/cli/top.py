"""``erofsgen top``: what mounts, tiers and the fill engine do just now."""

from __future__ import annotations

import os
import select
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import click

from erofsgen.cli.shared import Settings, verb

if TYPE_CHECKING:
    from rich.console import RenderableType

    from erofsgen.host.top import Sampler, View


@verb(json=True)
@click.option(
    "--interval", type=click.FloatRange(min=0.1, max=3600), metavar="SECONDS", default=1.0, show_default=True,
    help="Over how long rates are taken.",
)  # fmt: skip
@click.option("--once", is_flag=True, help="Print one view and end; so does --json.")
def command(settings: Settings, interval: float, once: bool) -> None:
    """Watch mounts, tiers and the fill engine at work.

    Rates are of the last interval; MISSES are the share of the reads that had to wait for data, WAITING the seconds
    that readers waited in each second, all together. With q or Ctrl-C it ends. Where standard output is no terminal,
    views follow one another.
    """
    from erofsgen.cli import output
    from erofsgen.host.top import Sampler, view

    sampler = Sampler(settings.root)
    before = sampler.sample()
    if before is None:
        if settings.json:
            output.document({"running": False})
        else:
            output.line(f"no daemon runs for {settings.root}")
        return
    if settings.json or once:
        time.sleep(interval)
        after = sampler.sample()
        if settings.json:
            output.document({"running": after is not None, **(_plain(view(before, after)) if after else {})})
        else:
            _print(None if after is None else view(before, after), settings)
        return
    with suppress(KeyboardInterrupt):
        if sys.stdout.isatty():
            _live(sampler, interval, settings)
        else:
            for found in _views(sampler, interval):
                _print(found, settings)
                output.line()
                sys.stdout.flush()


def _views(sampler: Sampler, interval: float) -> Iterator[View | None]:
    """A view of each interval, for ever; None while no daemon runs."""
    from erofsgen.host.top import view

    before = sampler.sample()
    while True:
        if _left(interval):
            return
        after = sampler.sample()
        yield None if before is None or after is None else view(before, after)
        before = after


def _live(sampler: Sampler, interval: float, settings: Settings) -> None:
    from rich.console import Console
    from rich.live import Live

    console = Console(markup=False, highlight=False, emoji=False)
    waiting = f"{settings.root}: the first {interval:g} s …"
    with _keys(), Live(waiting, console=console, screen=True, auto_refresh=False) as live:
        for found in _views(sampler, interval):
            live.update(_drawn(found, settings), refresh=True)


def _left(seconds: float) -> bool:
    """Wait; True when somebody has typed q."""
    if not _is_watched():
        time.sleep(seconds)
        return False
    until = time.monotonic() + seconds
    while (rest := until - time.monotonic()) > 0:
        ready, _, _ = select.select([sys.stdin.fileno()], [], [], rest)
        if ready and (not (typed := os.read(sys.stdin.fileno(), 64)) or b"q" in typed.lower()):
            return True
    return False


def _is_watched() -> bool:
    return sys.stdout.isatty() and sys.stdin is not None and sys.stdin.isatty()


@contextmanager
def _keys() -> Iterator[None]:
    """Have keys at once, and not shown, while standard input is a terminal."""
    if not _is_watched():
        yield
        return
    import termios
    import tty

    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    try:
        tty.setcbreak(terminal)
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)


def _print(found: View | None, settings: Settings) -> None:
    from erofsgen.cli import output
    from erofsgen.cli.topview import sections, summary

    if found is None:
        output.line(f"no daemon runs for {settings.root}")
        return
    output.facts(summary(found))
    for section in sections(found):
        output.line()
        output.table(section.headings, section.rows, right=section.right)


def _drawn(found: View | None, settings: Settings) -> RenderableType:
    """The same for a screen."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from erofsgen.cli import output
    from erofsgen.cli.topview import sections, summary

    when = time.strftime("%H:%M:%S")
    title = Text(f"erofsgen top  {when}  {output.printable(str(settings.root))}  (q: leave)\n", style="bold")
    if found is None:
        return Group(title, Text(f"no daemon runs for {output.printable(str(settings.root))}"))
    facts = Table.grid(padding=(0, 2, 0, 0))
    for name, value in summary(found):
        facts.add_row(name, value)
    tables: list[RenderableType] = []
    for section in sections(found):
        table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
        for number, heading in enumerate(section.headings):
            table.add_column(heading, justify="right" if number in section.right else "left", overflow="ellipsis")
        for row in section.rows:
            table.add_row(*row)
        tables += [Text(), table]
    return Group(title, facts, *tables)


def _plain(found: View) -> dict[str, object]:
    import msgspec

    facts: dict[str, object] = msgspec.to_builtins(found)
    return facts
