"""Who could bring packs that are not here: the tiers of the configuration, and the stores of the image."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Final
from urllib.parse import urlsplit

from erofsgen.errors import ErofsgenError, NotFoundError
from erofsgen.host.config import Config
from erofsgen.host.explain.facts import Source
from erofsgen.host.fill.chain import chain
from erofsgen.host.fill.sources import UrlSource, describe

_GRACE: Final = 1.0
"""Seconds beyond the timeout in which a store that keeps to it has given up."""
_PORTS: Final = {"http": 80, "https": 443}


class _Asked:
    """What is known of a source so far; written by its thread, read by another when time is up."""

    def __init__(self, source: UrlSource) -> None:
        self.source = source
        self.latency: float | None = None
        self.packs: dict[str, bool] = {}
        self.error: str | None = None
        self.done = False

    def facts(self, *, asked: bool) -> Source:
        late = "no answer in time" if asked and not self.done else None
        return Source(
            name=self.source.name,
            level=self.source.level,
            url=self.source.url if self.source.proxy is None else self.source.proxy,
            proxy=self.source.proxy is not None,
            asked=asked,
            latency=self.latency,
            packs=dict(self.packs),
            error=self.error or late,
        )


def sources(
    config: Config, stores: Iterable[str], packs: Sequence[str], *, remote: bool, timeout: float
) -> list[Source]:
    """All that stands for ``stores``, nearest first, and which of ``packs`` (digests) each has.

    All at once, ``timeout`` seconds each. Without ``remote`` only directories are asked.
    """
    chained: dict[str, UrlSource] = {}
    for store in stores:
        for source in chain(config, store):
            chained.setdefault(source.name, source)
    ordered = sorted(chained.values(), key=lambda source: (source.level is None, source.level or 0))
    asked = [_Asked(source) for source in ordered]
    until = time.monotonic() + timeout
    threads = {
        one: threading.Thread(target=_ask, args=(one, packs, until), daemon=True)
        for one in asked
        if remote or ("://" not in one.source.url and one.source.proxy is None)
    }
    for thread in threads.values():
        thread.start()
    for thread in threads.values():
        thread.join(max(0.0, until + _GRACE - time.monotonic()))
    return [one.facts(asked=one in threads) for one in asked]


def _ask(one: _Asked, packs: Sequence[str], until: float) -> None:
    began = time.monotonic()
    try:
        if one.source.proxy is not None:
            _connect(one.source.proxy, until - began)
            one.latency = time.monotonic() - began
        else:
            _ask_store(one, packs, until)
    except NotFoundError as error:  # the store itself
        one.error = describe(error)
    except (ErofsgenError, OSError) as error:
        one.latency = one.latency or time.monotonic() - began
        one.error = describe(error)
    one.done = True


def _ask_store(one: _Asked, packs: Sequence[str], until: float) -> None:
    store = one.source.opened(until - time.monotonic())
    try:
        for pack in packs:
            began = time.monotonic()
            if began >= until:
                raise TimeoutError(f"{len(packs) - len(one.packs)} packs were not asked for in time")
            one.packs[pack] = store.size(pack) is not None
            one.latency = one.latency or time.monotonic() - began
    finally:
        store.close()


def _connect(url: str, timeout: float) -> None:
    parts = urlsplit(url)
    socket.create_connection((parts.hostname, parts.port or _PORTS[parts.scheme]), timeout).close()
