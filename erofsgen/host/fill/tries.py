"""Do the tiers of a configuration answer? One small request to each."""

from __future__ import annotations

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from erofsgen.errors import ErofsgenError, RemoteError
from erofsgen.host.config import Config, Tier
from erofsgen.store.open import open_store

_NO_BLOB: Final = "sha256:" + "0" * 64
_PORTS: Final = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Tried:
    """What came of it. ``latency`` in seconds, until the answer or the error."""

    name: str
    level: int | None
    url: str
    latency: float
    error: ErofsgenError | None


def try_all(config: Config) -> list[Tried]:
    """Ask each tier, and the default store, for a blob that does not exist; all at once."""
    with ThreadPoolExecutor(16, "try") as pool:
        tried = [pool.submit(_try_tier, config, tier) for tier in config.tier]
        if config.store is not None:
            tried.append(pool.submit(_try, "origin", None, config.store, config.store, config.origin.timeout, None))
        return [one.result() for one in tried]


def _try_tier(config: Config, tier: Tier) -> Tried:
    url, store = tier.url, tier.url
    if tier.proxy is not None:
        known = [origin for origin in tier.origins if not set("*?[") & set(origin)]
        known += [config.store] if config.store is not None and tier.stands_for(config.store) else []
        url, store = tier.proxy, next(iter(known), None)
    assert url is not None
    return _try(tier.name, config.level(tier), url, store, tier.timeout, tier.proxy)


def _try(name: str, level: int | None, url: str, store: str | None, timeout: float, proxy: str | None) -> Tried:
    error: ErofsgenError | None = None
    began = time.monotonic()
    try:
        if store is None:
            _connect(url, timeout)  # a proxy for whatever comes
        else:
            opened = open_store(store, attempts=1, timeout=timeout, proxy=proxy)
            began = time.monotonic()
            try:
                opened.size(_NO_BLOB)
            finally:
                opened.close()
    except ErofsgenError as raised:
        error = raised
    return Tried(name, level, url, time.monotonic() - began, error)


def _connect(url: str, timeout: float) -> None:
    parts = urlsplit(url)
    try:
        socket.create_connection((parts.hostname, parts.port or _PORTS[parts.scheme]), timeout).close()
    except OSError as error:
        reason = error.strerror or str(error)
        raise RemoteError(f"cannot reach {parts.netloc}: {reason}", hint="check the network") from error
