"""``erofsgen config``: what the configuration file says, and whether its tiers answer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from erofsgen.cli.shared import Settings, shared_options, verb

if TYPE_CHECKING:
    from erofsgen.host.config import Config
    from erofsgen.host.fill.tries import Tried


@click.group(no_args_is_help=True)
def command() -> None:
    """Look at the configuration and check it."""


command.params.extend(shared_options(json=True))


@verb(json=True, name="check")
@click.argument("file", required=False, type=click.Path(path_type=Path))
@click.option("--offline", is_flag=True, help="Only read the file; try no tier.")
def check(settings: Settings, file: Path | None, offline: bool) -> None:
    """Check the configuration and try its tiers.

    Every tier is asked for a blob that does not exist, a proxy on behalf of a store that it stands for. Exits with the
    code of the first error.
    """
    from erofsgen.cli import output
    from erofsgen.host.config import load
    from erofsgen.host.fill.tries import try_all

    config = load(file)
    tried = [] if offline else try_all(config)
    if settings.json:
        output.document({**_facts(config), "tried": [_told(one) for one in tried]})
    elif offline:
        _print(config)
    else:
        output.table(
            ["TIER", "LEVEL", "URL", "STATE"],
            [(one.name, str(one.level or "-"), output.printable(one.url), _state(one)) for one in tried],
        )
    for one in tried:
        if one.error is not None:
            raise type(one.error)(f"{one.name}: {one.error}", hint=one.error.hint)


@verb(json=True, name="show")
def show(settings: Settings) -> None:
    """Show the configuration with its defaults."""
    from erofsgen.cli import output
    from erofsgen.host.config import load, place

    path, _ = place()
    config = load()
    if settings.json:
        output.document({"file": str(path) if path.exists() else None, **_facts(config)})
        return
    output.facts([("file", str(path) if path.exists() else f"none ({path})"), ("store", settings.store)])
    _print(config)


for subcommand in (check, show):
    command.add_command(subcommand)


def _facts(config: Config) -> dict[str, object]:
    import msgspec

    facts: dict[str, object] = msgspec.to_builtins(config)
    return facts


def _print(config: Config) -> None:
    from erofsgen.cli import output

    own = config.origin
    rows = [
        (
            tier.name, str(config.level(tier)), output.printable(tier.url or f"proxy {tier.proxy}"),
            output.printable(" ".join(tier.origins)), str(tier.weight), f"{tier.timeout:g} s", str(tier.concurrency),
            " ".join(word for word, true in (("hedge", tier.hedge), ("feed", tier.feed)) if true),
        )
        for tier in config.tier
    ]  # fmt: skip
    rows.append(("origin", "-", "", "*", "-", f"{own.timeout:g} s", str(own.concurrency), "hedge" if own.hedge else ""))
    output.table(["TIER", "LEVEL", "URL", "FOR", "WEIGHT", "TIMEOUT", "AT A TIME", "ALSO"], rows)


def _told(tried: Tried) -> dict[str, object]:
    return {
        "name": tried.name,
        "level": tried.level,
        "url": tried.url,
        "latency": tried.latency,
        "error": None if tried.error is None else str(tried.error),
    }


def _state(tried: Tried) -> str:
    from erofsgen.cli import output

    return f"ok, {1000 * tried.latency:.1f} ms" if tried.error is None else output.one_line(str(tried.error))
