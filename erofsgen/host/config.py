"""The configuration file: which store is meant by default, and the chain of tiers in front of the stores of images.

TOML. ``EROFSGEN_CONFIG`` names it; otherwise it is ``/etc/erofsgen/config.toml`` for root and
``$XDG_CONFIG_HOME/erofsgen/config.toml`` for everybody else. Without one the defaults hold.

::

    store = "s3://images/prod"

    [[tier]]
    name = "az-cache"
    proxy = "http://az-cache.internal:8080"

    [[tier]]
    name = "cdn"
    url = "https://cdn.example.com/images"
    for = ["s3://images/prod"]

    [origin]
    timeout = 10.0

    [prefetch]
    bytes = 4294967296
"""

from __future__ import annotations

import os
import re
import tomllib
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Final
from urllib.parse import urlsplit

import msgspec

from erofsgen.errors import FormatError, NotFoundError, StorageError

VARIABLE: Final = "EROFSGEN_CONFIG"

Seconds = Annotated[float, msgspec.Meta(gt=0, le=600)]
Count = Annotated[int, msgspec.Meta(ge=1, le=1000)]

_SCHEMES: Final = ("s3", "docker", "http", "https")
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_FIELD: Final = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)


class Tier(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename={"origins": "for"}):
    """``[[tier]]``: a cache or a copy that is asked before the stores of images. The nearest comes first.

    - ``name``: what messages and ``erofsgen status`` call it.
    - ``url``: a store that has the same blobs: a directory or a URL. Either this or
    - ``proxy``: ``http://HOST:PORT`` of a caching HTTP proxy; what the origin would be asked goes through it.
    - ``for``: the stores of images that it stands for, without their options; ``*`` and ``?`` are wildcards. All where
      it is not given.
    - ``timeout``: seconds after which the next tier is asked as well, and the silence that breaks a connection.
    - ``level``: tiers of one level share the packs by ``weight``; less is nearer. By default its place in the file.
    - ``weight``: its share of the packs among the tiers of its level.
    - ``concurrency``: reads at a time, of each origin where it is a proxy.
    - ``hedge``: ask elsewhere, too, when a demand takes longer than 95 of 100 of this tier's do.
    - ``feed``: copy packs into it that it lacked and another tier had. For stores that can be written to.
    """

    name: str
    url: str | None = None
    proxy: str | None = None
    origins: Annotated[list[str], msgspec.Meta(min_length=1)] = msgspec.field(default_factory=lambda: ["*"])
    timeout: Seconds = 2.0
    level: Count | None = None
    weight: Count = 1
    concurrency: Count = 16
    hedge: bool = True
    feed: bool = False

    def stands_for(self, origin: str) -> bool:
        """Whether it is asked for images of the store ``origin``. A proxy is of no use for directories."""
        if self.proxy is not None and "://" not in origin:
            return False
        bare = origin.partition("?")[0].rstrip("/")
        return any(fnmatchcase(bare, pattern.rstrip("/")) for pattern in self.origins)


class Origin(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[origin]``: how the stores of images themselves are asked. The fields are those of a tier."""

    timeout: Seconds = 10.0
    concurrency: Count = 64
    hedge: bool = True


class Prefetch(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[prefetch]``: what is brought ahead of a start, and what is recorded of it.

    - ``bytes``: device bytes of one start at most; 0: no limit.
    - ``seconds``: after the mount, within which frames are asked for; 0: no limit.
    - ``bandwidth``: device bytes a second of one start; 0: no limit.
    - ``confidence``: the share of the runs that must have touched a chunk.
    - ``record``: whether every lazy mount is recorded.
    """

    bytes: Annotated[int, msgspec.Meta(ge=0)] = 0
    seconds: Annotated[float, msgspec.Meta(ge=0, le=86400)] = 120.0
    bandwidth: Annotated[int, msgspec.Meta(ge=0)] = 0
    confidence: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.5
    record: bool = True


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole file. ``store``: the default of ``--store``."""

    store: str | None = None
    tier: list[Tier] = []
    origin: Origin = Origin()
    prefetch: Prefetch = Prefetch()

    def level(self, tier: Tier) -> int:
        """A tier's level, given or by its place."""
        return tier.level or self.tier.index(tier) + 1


def place() -> tuple[Path, bool]:
    """Where the configuration is, and whether somebody named it, so that it has to be there."""
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named), True
    if os.geteuid() == 0:
        return Path("/etc/erofsgen/config.toml"), False
    home = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return Path(home, "erofsgen", "config.toml"), False


def load(path: Path | None = None) -> Config:
    """The configuration in ``path``, by default where :func:`place` says.

    Raises NotFoundError (a file that was named is not there), FormatError (what is wrong, and where), StorageError.
    """
    named = path is not None
    if path is None:
        path, named = place()
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        if not named:
            return Config()
        raise NotFoundError(f"{path}: no such configuration") from None
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}") from error
    return parse(data, str(path))


def parse(data: bytes, what: str) -> Config:
    """The configuration that ``data`` is; messages call it ``what``. Raises FormatError."""
    try:
        facts = tomllib.loads(data.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise FormatError(f"{what}: {error}") from None
    try:
        config = msgspec.convert(facts, Config)
    except msgspec.ValidationError as error:
        raise FormatError(f"{what}: {_explain(str(error))}") from None
    for key, reason in _problems(config):
        raise FormatError(f"{what}: {key}: {reason}")
    return config


def _explain(message: str) -> str:
    """What msgspec says, with the key first and in TOML's words."""
    text, _, key = message.partition(" - at `$")
    key = key.rstrip("`").lstrip(".")
    kind: Any = Tier if key.startswith("tier[") else _TABLES.get(key, Config)
    unknown = _FIELD.fullmatch(text)
    if unknown:
        text = f"unknown key {unknown[1]!a}; there are {', '.join(kind.__struct_encode_fields__)}"
    text = text.replace("Object missing required field", "lacks the key").replace("Expected", "expected")
    text = text.replace(" | null`", "`").replace("`array`", "an array").replace("`object`", "a table")
    return f"{key}: {text}" if key else text


_TABLES: Final = {"origin": Origin, "prefetch": Prefetch}


def _problems(config: Config) -> list[tuple[str, str]]:
    """What is wrong beyond types: the keys, and what they should be."""
    found = []
    if config.store is not None and (reason := _no_store(config.store)):
        found.append(("store", reason))
    names: set[str] = set()
    for number, tier in enumerate(config.tier):
        at = f"tier[{number}]"
        if not _NAME.fullmatch(tier.name):
            found.append((f"{at}.name", "1 to 64 letters, digits, dots, dashes and underscores are allowed"))
        elif tier.name in names:
            found.append((f"{at}.name", f"another tier is called {tier.name!r}"))
        names.add(tier.name)
        if (tier.url is None) == (tier.proxy is None):
            found.append((at, "either `url` or `proxy` is needed"))
        if tier.url is not None and (reason := _no_store(tier.url)):
            found.append((f"{at}.url", reason))
        if tier.proxy is not None and (reason := _no_proxy(tier.proxy)):
            found.append((f"{at}.proxy", reason))
        if tier.feed and (tier.url is None or tier.url.startswith("http")):
            found.append((f"{at}.feed", "only a tier whose `url` is a directory, s3 or docker can be written to"))
    return found


def _no_store(url: str) -> str | None:
    """Why ``url`` cannot be a store."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        return None if url.startswith("/") else "a directory's path has to be absolute"
    if scheme not in _SCHEMES:
        return f"there are no {scheme!a} stores, only {', '.join(_SCHEMES)} and directories"
    return None if _has_host(url) and rest else f"{url!a} names no host"


def _no_proxy(url: str) -> str | None:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not _has_host(url) or parts.path.strip("/") or parts.query:
        return f"{url!a} is not http://HOST:PORT"
    return None


def _has_host(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:  # of a port that is no number
        return False
