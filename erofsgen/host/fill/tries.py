"""Do the tiers of a configuration answer? One small request to each."""

from __future__ import annotations

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import msgspec

from erofsgen.errors import ErofsgenError, RemoteError
from erofsgen.host.config import Config, Tier
from erofsgen.store.open import open_store

_NO_BLOB = "sha256:" + "0" * 64
_PORTS = {"http": 80, "https": 443}


class Tried(msgspec.Struct, frozen=True, kw_only=True):
    """What came of it. ``latency`` in seconds; ``code`` is the exit code of the error, 0 without one."""

    name: str
    level: int | None
    url: str
    latency: float
    error: str | None
    code: int


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
    latency = time.monotonic() - began
    said = None if error is None else str(error)
    return Tried(
        name=name, level=level, url=url, latency=latency, error=said, code=0 if error is None else error.exit_code
    )


def _connect(url: str, timeout: float) -> None:
    parts = urlsplit(url)
    try:
        socket.create_connection((parts.hostname, parts.port or _PORTS[parts.scheme]), timeout).close()
    except OSError as error:
        reason = error.strerror or str(error)
        raise RemoteError(f"cannot reach {parts.netloc}: {reason}", hint="check the network") from error
