"""The sources that a configuration puts in front of an image's stores."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from erofsgen.host.config import Config
from erofsgen.host.fill.engine import Engine
from erofsgen.host.fill.sources import UrlSource


def chain(config: Config, origin: str) -> list[UrlSource]:
    """The tiers that stand for the store ``origin``, then that itself. Nothing is opened yet."""
    sources = [
        UrlSource(
            tier.url or origin,
            name=tier.name if tier.url else f"{tier.name} ({origin})",
            proxy=tier.proxy,
            level=config.level(tier),
            weight=tier.weight,
            timeout=tier.timeout,
            concurrency=tier.concurrency,
            hedge=tier.hedge,
            create=tier.feed,
        )
        for tier in config.tier
        if tier.stands_for(origin)
    ]
    own = config.origin
    sources.append(UrlSource(origin, timeout=own.timeout, concurrency=own.concurrency, hedge=own.hedge))
    return sources


def add_chains(engine: Engine, config: Config, origins: Iterable[str], packs: Collection[str]) -> None:
    """Have ``engine`` ask for ``packs`` at what stands for the stores ``origins``, and at those themselves."""
    for origin in origins:
        for source in chain(config, origin):
            engine.add_source(source, packs)
