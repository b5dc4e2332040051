"""The chain of tiers by itself: who is asked for what, in which order, and who rests. The clock is the test's."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from fillkit import MemorySource, make_pack

from erofsgen.errors import FormatError, NotFoundError, RemoteError
from erofsgen.host.fill.health import Health, Sample
from erofsgen.host.fill.latency import Budget, Latencies, read_size
from erofsgen.host.fill.tiers import Tiers
from erofsgen.store.base import Speed
from erofsgen.store.directory import DirectoryStore

MIB = 1 << 20
PACKS = [f"{number:064x}" for number in range(4000)]


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def chain(*sources: MemorySource, retries: int = 0, clock: Any = None) -> Tiers:
    return Tiers(sources, retries=retries, backoff=0.1, clock=clock or Clock())


def tier(name: str, **terms: Any) -> MemorySource:
    return MemorySource([], name, **terms)


@pytest.fixture
def sample(tmp_path: Path) -> Sample:
    pack = make_pack(DirectoryStore(tmp_path / "store"), [1, 3, 2])
    return Sample(pack.hex, pack.toc, 1)


def remote(retry_after: float | None = None) -> RemoteError:
    error = RemoteError("503 from there")
    error.retry_after = retry_after
    return error


# --- order -----------------------------------------------------------------------------------------------------------


def test_levels_come_in_order_and_stores_last() -> None:
    tiers = chain(tier("store"), tier("far", level=7), tier("near", level=2), tier("other store"))
    assert tiers.first("pack").order == (2, 1, 0, 3)


def firsts(tiers: Tiers) -> list[str]:
    return [tiers.sources[tiers.first(pack).order[0]].name for pack in PACKS]


def test_one_level_shares_the_packs_by_weight() -> None:
    tiers = chain(tier("a", level=1), tier("b", level=1, weight=2), tier("c", level=1, weight=5), tier("store"))
    counts = Counter(firsts(tiers))
    for name, weight in (("a", 1), ("b", 2), ("c", 5)):
        assert counts[name] == pytest.approx(len(PACKS) * weight / 8, rel=0.12)


def test_packs_stay_where_they_are_when_a_cache_goes_and_its_own_spread() -> None:
    names = ["a", "b", "c", "d"]
    before = firsts(chain(*(tier(name, level=1) for name in names)))
    after = firsts(chain(*(tier(name, level=1) for name in names if name != "b")))
    moved = [new for old, new in zip(before, after, strict=True) if old == "b"]
    assert [new for old, new in zip(before, after, strict=True) if old != "b"] == [old for old in before if old != "b"]
    for name in ("a", "c", "d"):
        assert Counter(moved)[name] == pytest.approx(len(moved) / 3, rel=0.2)


def test_a_resting_caches_packs_spread_as_if_it_were_gone(sample: Sample) -> None:
    tiers = chain(*(tier(name, level=1) for name in "abcd"))
    for _ in range(3):
        tiers.failed(1, remote(), sample)
    assert firsts(tiers) == firsts(chain(*(tier(name, level=1) for name in "acd")))


def test_sources_are_asked_for_the_packs_they_are_for() -> None:
    tiers = chain()
    tiers.add(tier("all", level=1))
    tiers.add(tier("one"), {"p", "q"})
    tiers.add(tier("two"), {"q", "r"})
    assert [tiers.first(pack).order for pack in "pqrs"] == [(0, 1), (0, 1, 2), (0, 2), (0,)]
    tiers.add(tier("one"), {"s"})
    assert [tiers.first(pack).order for pack in "ps"] == [(0, 1), (0, 1)]
    tiers.add(tier("two"))
    assert tiers.first("p").order == (0, 1, 2)
    assert len(tiers.sources) == 3


def test_another_round_is_of_the_packs_own_sources_only() -> None:
    tiers = chain(retries=1)
    for name, pack in (("one", "p"), ("two", "q"), ("three", "p")):
        tiers.add(tier(name), {pack})
    attempt = tiers.first("p")
    for _ in range(2):
        following = tiers.after(attempt, remote())
        assert following is not None
        attempt = following[0]
    assert (attempt.round, attempt.order) == (1, (0, 2))


def test_a_source_may_be_asked_less_often_than_others() -> None:
    tiers = chain(tier("server"), tier("directory", retries=1), retries=3)
    attempt, asked = tiers.first("p"), []
    while True:
        asked.append(attempt.order[0])
        following = tiers.after(attempt, remote())
        if following is None:
            break
        attempt = following[0]
    assert asked == [0, 1, 0, 1, 0, 0]


def test_a_pack_that_a_tier_lacks_is_told_once() -> None:
    tiers = chain(tier("near", level=1), tier("far"))
    lacking = Sample("p", None, 0)  # type: ignore[arg-type]
    tiers.brought(1, 10, "p")
    assert tiers.gaps() == []
    tiers.failed(0, NotFoundError("no blob"), lacking)
    tiers.brought(1, 10, "q")
    assert tiers.gaps() == []
    for _ in range(2):
        tiers.brought(1, 10, "p")
    assert tiers.gaps() == [(0, "p", 1)]
    tiers.brought(1, 10, "p")
    assert tiers.gaps() == []
    assert tiers.first("p").order == (1, 0)
    tiers.closed_gap(0, "p")
    assert tiers.first("p").order == (0, 1)


# --- the breaker -----------------------------------------------------------------------------------------------------


def test_rests_grow_up_to_a_minute_and_a_success_ends_them(sample: Sample) -> None:
    clock = Clock()
    tiers = chain(tier("a"), tier("b"), clock=clock)
    for _ in range(3):
        tiers.failed(0, remote(), sample)
    rests = []
    for _ in range(6):
        rests.append(tiers.rests(0))
        assert tiers.probes(clock.now) == []
        assert tiers.next_probe() == clock.now + rests[-1]
        tiers.failed(0, remote(), sample)  # asked when all others had failed: it rests already
        assert tiers.rests(0) == rests[-1]
        clock.now += rests[-1]
        assert tiers.probes(clock.now) == [(0, sample)]
        assert tiers.first("p").order == (1, 0), "until the probe has succeeded"
        tiers.probed(0, remote())
    assert rests == [5, 10, 20, 40, 60, 60]
    clock.now += 60
    tiers.probed(0, None)
    assert tiers.first("p").order == (0, 1)
    assert (tiers.rests(0), tiers.probes(clock.now), tiers.next_probe()) == (0, [], float("inf"))
    for _ in range(2):
        tiers.failed(0, remote(), sample)
    assert tiers.first("p").order == (0, 1), "it is as good as any again"


def test_whoever_answers_that_it_lacks_the_probe_is_well(sample: Sample) -> None:
    clock = Clock()
    tiers = chain(tier("a"), clock=clock)
    for _ in range(3):
        tiers.bad(0, FormatError("bad"), sample)
    clock.now += 5
    tiers.probed(0, NotFoundError("gone"))
    assert not tiers.health[0].is_open


def test_the_probe_is_the_smallest_frame_it_brought(sample: Sample) -> None:
    health = Health()
    first, second, third = (Sample(sample.pack, sample.toc, index) for index in range(3))
    health.keep(second, brought=False)
    health.keep(third, brought=False)
    assert health.sample is second
    health.keep(third, brought=True)
    health.keep(second, brought=True)
    assert health.sample is third
    health.keep(first, brought=True)
    assert health.sample is first


@pytest.mark.parametrize(("asked", "pause"), [(2.0, 2.0), (30.0, 30.0), (3600.0, 60.0)])
def test_a_pause_that_a_server_asks_for_is_kept(sample: Sample, asked: float, pause: float) -> None:
    clock = Clock()
    tiers = chain(tier("a"), tier("b"), clock=clock)
    tiers.failed(0, remote(asked), sample)
    assert tiers.first("p").order == (1, 0), "at once, not after three failures"
    assert not tiers.may_ask(0)
    assert tiers.next_change(clock.now) == tiers.next_probe() == clock.now + pause
    clock.now += pause - 0.1
    assert not tiers.may_ask(0)
    clock.now += 0.1
    assert tiers.may_ask(0)
    assert tiers.probes(clock.now) == [(0, sample)]


def test_to_ask_for_no_pause_is_to_fail_like_others(sample: Sample) -> None:
    tiers = chain(tier("a"), tier("b"))
    tiers.failed(0, remote(0.0), sample)
    assert tiers.may_ask(0)
    assert tiers.first("p").order == (0, 1)


# --- latency ---------------------------------------------------------------------------------------------------------


def test_nothing_is_slow_before_twenty_reads() -> None:
    latencies = Latencies()
    for _ in range(19):
        latencies.add(0.1, MIB)
    assert latencies.slow_after(MIB, None) is None
    latencies.add(0.1, MIB)
    assert latencies.slow_after(MIB, None) == pytest.approx(0.1)


def test_slow_is_what_takes_longer_than_95_of_100() -> None:
    latencies = Latencies()
    for number in range(1000, 1256 + 1000):
        latencies.add(number / 1e5, MIB)
    window = sorted(number / 1e5 for number in range(2000, 2256))
    limit = latencies.slow_after(MIB, None)
    assert limit is not None
    assert sum(seconds <= limit for seconds in window) / 256 == pytest.approx(0.95, abs=0.005)
    assert (latencies.percentile(50), latencies.percentile(95)) == (window[128], window[243])


def test_large_reads_may_take_longer_where_the_speed_is_known() -> None:
    latencies, speed = Latencies(), Speed(0.01, 100 * MIB)
    for number in range(64):
        size = (number % 8 + 1) * MIB
        latencies.add(0.01 + size / (100 * MIB), size)
    assert latencies.slow_after(MIB, speed) == pytest.approx(0.02)
    assert latencies.slow_after(8 * MIB, speed) == pytest.approx(0.09)


def test_five_milliseconds_are_never_slow() -> None:
    latencies = Latencies()
    for _ in range(30):
        latencies.add(0.0001, MIB)
    assert latencies.slow_after(MIB, None) == 0.005


def test_hedges_are_one_in_twenty_and_a_small_burst() -> None:
    budget, hedges = Budget(), 0
    for _ in range(10_000):
        budget.earn()
        if budget:
            budget.spend()
            hedges += 1
    assert 500 <= hedges <= 504


@pytest.mark.parametrize(
    ("speed", "size"),
    [
        (None, 8 * MIB),
        (Speed(0.0001, 1000 * MIB), MIB),
        (Speed(0.1, 50 * MIB), 5 * MIB // 2),
        (Speed(0.1, 200 * MIB), 8 * MIB),
    ],
)
def test_reads_of_the_background_are_as_large_as_latency_asks_for(speed: Speed | None, size: int) -> None:
    assert read_size(speed, 8 * MIB) == size


def test_such_a_read_takes_half_as_long_as_the_latency_before_it() -> None:
    speed = Speed(0.1, 40 * MIB)
    size = read_size(speed, 64 * MIB)
    assert size / speed.bandwidth == pytest.approx(speed.latency / 2)
    assert read_size(speed, 4096) == 4096
