"""The configuration file: what is understood, and what is said of mistakes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from erofsgen.errors import ErofsgenError, FormatError, NotFoundError, StorageError
from erofsgen.host import config
from erofsgen.host.config import Config, load, parse
from erofsgen.host.fill.chain import chain

FULL = b"""
store = "s3://images/prod"

[[tier]]
name = "az-cache"
proxy = "http://az-cache.internal:8080"
timeout = 1
level = 3
weight = 2
concurrency = 32
hedge = false

[[tier]]
name = "copy"
url = "/mnt/copy"
for = ["s3://images/*", "docker://registry.internal/app/"]
feed = true

[origin]
timeout = 20
concurrency = 4
"""


def test_everything_that_can_be_said() -> None:
    found = parse(FULL, "test")
    assert found.store == "s3://images/prod"
    az, copy = found.tier
    assert (az.name, az.proxy, az.timeout, az.weight, az.concurrency) == (
        "az-cache",
        "http://az-cache.internal:8080",
        1,
        2,
        32,
    )
    assert (az.hedge, az.feed, copy.hedge, copy.feed, copy.timeout) == (False, False, True, True, 2.0)
    assert [found.level(tier) for tier in found.tier] == [3, 2]
    assert (found.origin.timeout, found.origin.concurrency, found.origin.hedge) == (20, 4, True)


def test_nothing_is_a_configuration_too() -> None:
    assert parse(b"", "test") == Config()


TIER = '[[tier]]\nname = "a"\nurl = "/a"\n'

MALFORMED = {
    "no toml": ("store = ", "config.toml: Invalid value (at end of document)"),
    "key given twice": ('store = "/a"\nstore = "/b"\n', "config.toml: Cannot overwrite a value (at line 2, column 13)"),
    "unknown key": ('stroe = "/a"', "config.toml: unknown key 'stroe'; there are store, tier, origin"),
    "store is no text": ("store = 7", "config.toml: store: expected `str`, got `int`"),
    "store is of no kind": (
        'store = "ftp://a/b"',
        "store: there are no 'ftp' stores, only s3, docker, http, https and directories",
    ),
    "store is relative": ('store = "images"', "store: a directory's path has to be absolute"),
    "store has no host": ('store = "https:///images"', "store: 'https:///images' names no host"),
    "store has no port": ('store = "https://host:port/images"', "store: 'https://host:port/images' names no host"),
    "one tier, not a list": ('[tier]\nname = "a"', "config.toml: tier: expected an array, got a table"),
    "tier is no table": ("tier = [7]", "config.toml: tier[0]: expected a table, got `int`"),
    "tier without a name": ('[[tier]]\nurl = "/a"', "config.toml: tier[0]: lacks the key `name`"),
    "unknown key of a tier": (
        TIER + "timeuot = 1",
        "tier[0]: unknown key 'timeuot'; there are name, url, proxy, for, timeout, level, weight, concurrency, hedge,",
    ),
    "field that only has a name in Python": (TIER + 'origins = ["*"]', "unknown key 'origins'"),
    "unknown key of the origin": (
        "[origin]\nweight = 1",
        "origin: unknown key 'weight'; there are timeout, concurrency, hedge",
    ),
    "bad name": (
        '[[tier]]\nname = "a b"\nurl = "/a"',
        "tier[0].name: 1 to 64 letters, digits, dots, dashes and underscores",
    ),
    "empty name": ('[[tier]]\nname = ""\nurl = "/a"', "tier[0].name: 1 to 64 letters"),
    "name with a line's end": ('[[tier]]\nname = "a\\n"\nurl = "/a"', "tier[0].name: 1 to 64 letters"),
    "same name": (TIER + '[[tier]]\nname = "a"\nurl = "/b"', "tier[1].name: another tier is called 'a'"),
    "neither url nor proxy": ('[[tier]]\nname = "a"', "tier[0]: either `url` or `proxy` is needed"),
    "both": (TIER + 'proxy = "http://b"', "tier[0]: either `url` or `proxy` is needed"),
    "url of no kind": ('[[tier]]\nname = "a"\nurl = "gopher://a"', "tier[0].url: there are no 'gopher' stores"),
    "proxy without http": (
        '[[tier]]\nname = "a"\nproxy = "socks5://a:1"',
        "tier[0].proxy: 'socks5://a:1' is not http://HOST:PORT",
    ),
    "proxy with a path": (
        '[[tier]]\nname = "a"\nproxy = "http://a/b"',
        "tier[0].proxy: 'http://a/b' is not http://HOST:PORT",
    ),
    "proxy without a host": ('[[tier]]\nname = "a"\nproxy = "az-cache:80"', "tier[0].proxy: 'az-cache:80' is not"),
    "for is no list": (TIER + 'for = "s3://b"', "tier[0].for: expected an array, got `str`"),
    "for is empty": (TIER + "for = []", "tier[0].for: expected an array of length >= 1"),
    "no time": (TIER + "timeout = 0", "tier[0].timeout: expected `float` > 0.0"),
    "negative time": (TIER + "timeout = -1", "tier[0].timeout: expected `float` > 0.0"),
    "time is no number": (TIER + "timeout = nan", "tier[0].timeout: expected `float` > 0.0"),
    "for ever": ("[origin]\ntimeout = inf", "origin.timeout: expected `float` <= 600.0"),
    "time as text": ('[origin]\ntimeout = "2s"', "origin.timeout: expected `float`, got `str`"),
    "no weight": (TIER + "weight = 0", "tier[0].weight: expected `int` >= 1"),
    "broken weight": (TIER + "weight = 1.5", "tier[0].weight: expected `int`, got `float`"),
    "no reads": (TIER + "concurrency = 0", "tier[0].concurrency: expected `int` >= 1"),
    "level of text": (TIER + 'level = "near"', "tier[0].level: expected `int`, got `str`"),
    "hedge of numbers": (TIER + "hedge = 1", "tier[0].hedge: expected `bool`, got `int`"),
    "feeding a web server": (
        '[[tier]]\nname = "a"\nurl = "http://a"\nfeed = true',
        "tier[0].feed: only a tier whose `url` is",
    ),
    "feeding a proxy": (
        '[[tier]]\nname = "a"\nproxy = "http://a"\nfeed = true',
        "tier[0].feed: only a tier whose `url` is",
    ),
    "a name to fool terminals": ('"\\u001b[2J" = 1', "unknown key '\\x1b[2J'"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_mistake_is_said_in_one_line(case: str) -> None:
    text, expected = MALFORMED[case]
    with pytest.raises(FormatError) as raised:
        parse(text.encode(), "/etc/erofsgen/config.toml")
    said = str(raised.value)
    assert expected in said
    assert said.startswith("/etc/erofsgen/config.toml: ")
    assert said.isprintable()


def test_what_is_no_text_is_no_configuration() -> None:
    with pytest.raises(FormatError, match=r"^it: 'utf-8' codec can't decode byte 0xff"):
        parse(b"\xff", "it")


def test_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EROFSGEN_CONFIG", raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert config.place() == (Path("/etc/erofsgen/config.toml"), False)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert config.place() == (tmp_path / "erofsgen/config.toml", False)
    assert load() == Config()
    (tmp_path / "erofsgen").mkdir()
    (tmp_path / "erofsgen/config.toml").write_text('store = "/a"')
    assert load().store == "/a"
    monkeypatch.setenv("EROFSGEN_CONFIG", str(tmp_path / "other.toml"))
    with pytest.raises(NotFoundError, match=r"other\.toml: no such configuration"):
        load()
    with pytest.raises(StorageError, match="Is a directory"):
        load(tmp_path)


def names(found: Config, origin: str) -> list[str]:
    return [source.name for source in chain(found, origin)]


def test_tiers_stand_for_the_stores_they_name() -> None:
    found = parse(FULL, "test")
    s3 = "s3://images/prod?endpoint=http://minio:9000"
    assert names(found, s3) == [f"az-cache ({s3})", "copy", s3]
    docker = "docker://registry.internal/app"
    assert names(found, docker) == [f"az-cache ({docker})", "copy", docker]
    assert names(found, "s3://other") == ["az-cache (s3://other)", "s3://other"]
    assert names(found, "/srv/images") == ["/srv/images"], "there is no proxy for directories"


def test_what_the_file_says_of_a_tier_holds_for_its_source() -> None:
    az, copy, own = chain(parse(FULL, "test"), "s3://images/prod")
    assert (az.url, az.level, az.weight, az.timeout, az.concurrency, az.hedged, az.feed) == (
        "s3://images/prod", 3, 2, 1, 32, False, False,
    )  # fmt: skip
    assert (copy.url, copy.level, copy.timeout, copy.hedged, copy.feed) == ("/mnt/copy", 2, 2.0, False, True)
    assert (own.url, own.level, own.timeout, own.concurrency, own.hedged) == ("s3://images/prod", None, 20, 4, True)


def test_a_tier_that_cannot_be_opened_fails_like_one_that_is_down() -> None:
    """A chain may name what is not there: that is found out when it is read, and the next is asked."""
    (missing, _) = chain(parse(b'[[tier]]\nname = "a"\nurl = "/nowhere"', "test"), "/b")
    with pytest.raises(ErofsgenError, match="no store at /nowhere") as raised:
        missing.read_into("sha256:" + "0" * 64, 0, memoryview(bytearray(1)))
    assert not isinstance(raised.value, NotFoundError), "which would mean that it lacks this one blob"
