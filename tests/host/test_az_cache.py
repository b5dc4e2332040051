"""The AZ cache of packaging/nginx, as a store of its own and as a proxy, in front of a store that nginx serves."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from fillkit import BLOCK, WAIT, FileTarget, Pack, make_pack
from servers.azcache import az_cache
from servers.faultproxy import FaultProxy, status
from servers.nginx import nginx, static_files

from erofsgen.host.config import Config, parse
from erofsgen.host.fill.chain import add_chains
from erofsgen.host.fill.engine import Engine
from erofsgen.host.fill.sources import UrlSource
from erofsgen.store.directory import DirectoryStore
from erofsgen.store.http import HttpStore

pytestmark = pytest.mark.server

MIB = 1 << 20
FRAMES = 24


@dataclass
class Zone:
    origin: FaultProxy
    """What the cache asks, and hosts that do without it; in front of the store's web server."""
    cache: str
    pack: Pack
    client: httpx.Client

    @property
    def path(self) -> str:
        return f"/blobs/sha256/{self.pack.hex}"

    def served(self) -> int:
        """Requests that reached the origin."""
        return len(self.origin.seen(self.pack.hex))


@pytest.fixture
def zone(tmp_path: Path) -> Iterator[Zone]:
    pack = make_pack(DirectoryStore(tmp_path / "store"), [64] * FRAMES, raw=True)  # 6 MiB
    with contextlib.ExitStack() as stack:
        web = stack.enter_context(nginx(tmp_path / "web", static_files(tmp_path / "store")))
        origin = stack.enter_context(FaultProxy(web))
        cache = stack.enter_context(az_cache(tmp_path / "az", origin.url))
        client = stack.enter_context(httpx.Client(trust_env=False))  # one for all: they take long to make
        yield Zone(origin, cache, pack, client)


def get(zone: Zone, first: int, length: int, *, query: str = "") -> httpx.Response:
    headers = {"Range": f"bytes={first}-{first + length - 1}"}
    return zone.client.get(f"{zone.cache}{zone.path}{query}", headers=headers)


def test_a_range_is_fetched_once_whatever_its_signature(zone: Zone) -> None:
    cold, warm = get(zone, 1000, 5000, query="?X-Signature=one"), get(zone, 3000, 5000, query="?X-Signature=two")
    assert [answer.headers["X-Cache-Status"] for answer in (cold, warm)] == ["MISS", "HIT"]
    assert [answer.status_code for answer in (cold, warm)] == [206, 206]
    assert cold.content == zone.pack.blob[1000:6000]
    assert warm.content == zone.pack.blob[3000:8000]
    assert warm.headers["Content-Range"] == f"bytes 3000-7999/{len(zone.pack.blob)}"
    assert zone.served() == 1
    across = get(zone, MIB - 10, 20)
    assert across.content == zone.pack.blob[MIB - 10 : MIB + 10]
    assert zone.served() == 2, "the first slice was there"


def test_only_blobs_are_kept(zone: Zone) -> None:
    for _ in range(2):
        answer = zone.client.get(f"{zone.cache}/index.json")
        assert answer.status_code == 200
        assert "X-Cache-Status" not in answer.headers
    assert len(zone.origin.seen("index.json")) == 2


def test_both_ways_in_share_what_is_kept(zone: Zone) -> None:
    store = HttpStore(zone.cache)
    through = HttpStore(zone.origin.url, proxy=zone.cache)
    assert store.size(zone.pack.digest) == through.size(zone.pack.digest) == len(zone.pack.blob)
    before = zone.served()
    assert store.read(zone.pack.digest, 2 * MIB, 100_000) == zone.pack.blob[2 * MIB :][:100_000]
    assert zone.served() == before + 1
    assert through.read(zone.pack.digest, 2 * MIB + 50, 100_000) == zone.pack.blob[2 * MIB + 50 :][:100_000]
    assert zone.served() == before + 1
    assert {request.headers["Host"] for request in zone.origin.seen("")} == {zone.origin.url.removeprefix("http://")}
    assert store.size("sha256:" + "0" * 64) is None
    store.close()
    through.close()


def test_it_serves_what_it_has_while_the_origin_is_down(zone: Zone) -> None:
    get(zone, 0, 10)
    zone.origin.fault("", status(503), times=None)
    assert get(zone, 500, 1000).content == zone.pack.blob[500:1500]
    assert get(zone, 3 * MIB, 10).status_code == 503


def test_hosts_that_come_together_do_not_wait_long_for_each_other(zone: Zone) -> None:
    zone.origin.latency = 0.05
    took = []

    def host() -> None:
        began = time.monotonic()
        assert get(zone, 0, 1000).content == zone.pack.blob[:1000]
        took.append(time.monotonic() - began)

    hosts = [threading.Thread(target=host) for _ in range(8)]
    for each in hosts:
        each.start()
    for each in hosts:
        each.join()
    assert len(took) == 8
    assert zone.served() == 1, "one of them fetched it"
    assert max(took) < 0.45, "half a second is what nginx would wait by itself"


def configuration(zone: Zone, *, proxy: bool) -> Config:
    way = "proxy" if proxy else "url"
    return parse(f'[[tier]]\nname = "az"\n{way} = "{zone.cache}"\n[origin]\nhedge = false\n'.encode(), "test")


@pytest.mark.parametrize("proxy", [True, False], ids=["proxy", "url"])
def test_a_host_reads_through_it_and_past_it(zone: Zone, tmp_path: Path, proxy: bool) -> None:
    name = f"az ({zone.origin.url})" if proxy else "az"
    for host in range(3):
        place = tmp_path / str(host)
        place.mkdir()
        target = FileTarget(place, zone.pack)
        if host == 2:
            zone.origin.fault("", status(503), times=None)
        before = zone.served()
        with Engine([], threads=4, retries=1) as engine:
            add_chains(engine, configuration(zone, proxy=proxy), [zone.origin.url], [zone.pack.hex])
            engine.request(target, 0, FRAMES * 64 * BLOCK).result(WAIT)
            sources = engine.stats()["sources"]
        assert list(sources) == [name, zone.origin.url]
        assert sources[name]["failed"] == 0
        assert sources[zone.origin.url]["reads"] == 0
        assert (zone.served() > before) == (host == 0), "only the first host costs the origin anything"
        assert target.check() == list(range(FRAMES))
        target.close()


def test_a_dead_cache_costs_no_read(zone: Zone, tmp_path: Path) -> None:
    target = FileTarget(tmp_path, zone.pack)
    with Engine([], threads=4) as engine:
        engine.add_source(UrlSource("http://127.0.0.1:1", name="az", level=1, timeout=1.0))
        engine.add_source(UrlSource(zone.origin.url))
        engine.request(target, 0, FRAMES * 64 * BLOCK).result(WAIT)
        sources = engine.stats()["sources"]
    assert target.check() == list(range(FRAMES))
    assert sources["az"]["reads"] == 0
    assert "cannot reach 127.0.0.1:1" in str(sources["az"]["error"])
    target.close()
