"""The fill engine and its tiers: sources that fail, lie or hang."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import pytest
from fillkit import BLOCK, WAIT, FileTarget, Gate, MemorySource, Pack, eventually, make_pack, no_thread_left

from erofsgen.errors import ErofsgenError, FormatError, IntegrityError, NotFoundError, RemoteError, StorageError
from erofsgen.host.fill.engine import Engine, Priority
from erofsgen.host.fill.health import Sample
from erofsgen.host.fill.tiers import Tiers
from erofsgen.store.directory import DirectoryStore

FRAMES = 12


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    with no_thread_left():
        yield


@pytest.fixture(params=["zstd", "raw"])
def pack(request: pytest.FixtureRequest, store_dir: Path) -> Pack:
    return make_pack(DirectoryStore(store_dir), [2] * FRAMES, raw=request.param == "raw")


@pytest.fixture
def target(pack: Pack, tmp_path: Path) -> Iterator[FileTarget]:
    target = FileTarget(tmp_path, pack)
    yield target
    target.check()
    target.close()


def raises(error: BaseException) -> Callable[[bytes, range], bytes]:
    def change(_data: bytes, _frames: range) -> bytes:
        raise error

    return change


def flip(data: bytes, frames: range, *, bad: int = 5) -> bytes:
    """One bit of frame ``bad`` is wrong: of its zstd frame or of its bytes."""
    if bad not in frames:
        return data
    place = (bad - frames[0]) * len(data) // len(frames) + 3000
    return data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]


def wrong_frame(pack: Pack) -> Callable[[bytes, range], bytes]:
    """Frame 5 is another frame of the same pack, right in itself, padded to the length expected."""

    def change(data: bytes, frames: range) -> bytes:
        if 5 not in frames:
            return data
        start, end, other = pack.offsets[5], pack.offsets[6], pack.offsets[7]
        base = pack.offsets[frames[0]]
        return data[: start - base] + pack.blob[other : other + end - start] + data[end - base :]

    return change


FAULTS: dict[str, Callable[[Pack], Callable[[bytes, range], Any]]] = {
    "raises remote": lambda _: raises(RemoteError("503 from the registry")),
    "raises os": lambda _: raises(ConnectionResetError(104, "Connection reset by peer")),
    "raises anything": lambda _: raises(ZeroDivisionError("bug")),
    "raises exit": lambda _: raises(SystemExit(1)),
    "absent": lambda _: raises(NotFoundError("no blob")),
    "short": lambda _: lambda data, _: data[:-1],
    "empty": lambda _: lambda data, _: b"",
    "long": lambda _: lambda data, _: data + b"\0",
    "no bytes": lambda _: lambda data, _: None,
    "text": lambda _: lambda data, _: "x" * len(data),
    "zeros": lambda _: lambda data, _: bytes(len(data)),
    "one bit flipped": lambda _: flip,
    "wrong frame": wrong_frame,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_next_source_brings_the_right_bytes(pack: Pack, target: FileTarget, fault: str) -> None:
    bad = MemorySource([pack], "bad", change=FAULTS[fault](pack))
    good = MemorySource([pack], "good")
    with Engine([bad, good], threads=2) as engine:
        engine.request(target, 0, FRAMES * 2 * BLOCK).result(WAIT)
        stats = engine.stats()
    assert target.check() == list(range(FRAMES))
    assert sorted(target.writes) == list(range(FRAMES))
    of_bad = stats["sources"]["bad"]
    blamed = {"one bit flipped": (0, 0, 1), "wrong frame": (0, 0, 1), "zeros": (0, 0, FRAMES), "absent": (0, 1, 0)}
    expected = blamed.get(fault, (1, 0, 0))
    assert (of_bad["failed"], of_bad["absent"], of_bad["bad_frames"]) == expected
    assert all(stats["sources"]["good"][key] == 0 for key in ("failed", "absent", "bad_frames"))
    if fault in ("one bit flipped", "wrong frame"):
        assert [read.frames for read in good.reads] == [range(5, 6)], "the bad frame alone is fetched again"
        assert bad.fetched[5] == 1
    assert stats["in_flight"] == 0


@pytest.mark.parametrize("fault", FAULTS)
def test_where_there_is_no_other_source_there_is_an_error_and_no_mark(
    pack: Pack, target: FileTarget, fault: str
) -> None:
    bad = MemorySource([pack], "the-bad-one", change=FAULTS[fault](pack))
    with Engine([bad], threads=2, retries=1, backoff=0.01) as engine:
        future = engine.request(target, 5 * 2 * BLOCK, 1)
        with pytest.raises(
            ErofsgenError, match=f"^pack {pack.hex}: frame 5: no source has it: the-bad-one: "
        ) as raised:
            future.result(WAIT)
        assert "\n" not in str(raised.value)
    assert target.check() == []
    assert len(bad.reads) == (1 if fault == "absent" else 2), "absent stays absent"


def test_a_bad_source_is_named_in_the_log(pack: Pack, target: FileTarget, caplog: pytest.LogCaptureFixture) -> None:
    bad = MemorySource([pack], "mirror-7", change=flip)
    absent = MemorySource([pack], "near-cache", change=raises(NotFoundError("no blob")))
    failing = MemorySource([pack], "far-away", change=raises(RemoteError("503")))
    with caplog.at_level(logging.WARNING), Engine([absent, failing, bad, MemorySource([pack])], threads=2) as engine:
        engine.request(target, 0, FRAMES * 2 * BLOCK).result(WAIT)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2, "a tier that lacks a blob is nothing to warn of"
    assert lines[0] == f"far-away: pack {pack.hex}: 503"
    assert lines[1].startswith(f"mirror-7: pack {pack.hex}: frame 5 ")
    assert {record.name for record in caplog.records} == {"erofsgen.host.fill.engine"}


def test_when_all_sources_fail_the_error_names_each(pack: Pack, target: FileTarget) -> None:
    sources = [
        MemorySource([pack], "one", change=raises(RemoteError("refused", hint="log in"))),
        MemorySource([pack], "two", change=lambda data, _: data[:-1]),
        MemorySource([pack], "three", change=flip),
    ]
    with Engine(sources, threads=2, retries=1, backoff=0.01) as engine:
        future = engine.request(target, 5 * 2 * BLOCK, 2 * BLOCK)
        with pytest.raises(RemoteError) as raised:
            future.result(WAIT)
    text = str(raised.value)
    assert text.startswith(f"pack {pack.hex}: frame 5: no source has it: one: refused; two: ")
    assert text.count("one: ") == text.count("two: ") == text.count("three: ") == 1
    assert "expected; three: pack" in text
    assert raised.value.hint == "log in"
    assert [len(source.reads) for source in sources] == [2, 2, 2]


@pytest.mark.parametrize(
    ("first", "second", "kind"),
    [
        (NotFoundError("a"), NotFoundError("b"), NotFoundError),
        (IntegrityError("a"), IntegrityError("b"), IntegrityError),
        (FormatError("a"), IntegrityError("b"), FormatError),
        (StorageError("a"), StorageError("b"), StorageError),
        (NotFoundError("a"), RemoteError("b"), RemoteError),
        (OSError(5, "a"), ValueError("b"), RemoteError),
    ],
)
def test_kind_of_the_error(
    pack: Pack, target: FileTarget, first: BaseException, second: BaseException, kind: type[ErofsgenError]
) -> None:
    sources = [MemorySource([pack], str(number), change=raises(error)) for number, error in enumerate((first, second))]
    with Engine(sources, threads=2, retries=0) as engine:
        assert type(engine.request(target, 0, 1).exception(WAIT)) is kind


def test_one_bad_frame_fails_nobody_elses_request(pack: Pack, target: FileTarget) -> None:
    with Engine([MemorySource([pack], change=flip)], threads=2, retries=0) as engine:
        futures = [engine.request(target, frame * 2 * BLOCK, 1) for frame in range(FRAMES)]
        whole = engine.request(target, 0, FRAMES * 2 * BLOCK)
        wait([*futures, whole], WAIT)
        failed = [frame for frame, future in enumerate(futures) if future.exception()]
        assert failed == [5]
        assert isinstance(whole.exception(), FormatError)
    assert target.check() == [frame for frame in range(FRAMES) if frame != 5]


def test_sources_recover_within_the_retries(pack: Pack, target: FileTarget) -> None:
    tries = iter(range(99))

    def twice(data: bytes, frames: range) -> bytes:
        if next(tries) < 2:
            raise RemoteError("try later")
        return data

    source = MemorySource([pack], change=twice)
    with Engine([source], threads=2, retries=2, backoff=0.02) as engine:
        engine.request(target, 0, FRAMES * 2 * BLOCK).result(WAIT)
        assert engine.stats()["retries"] == 2
    first, second, third = (read.at for read in source.reads)
    assert 0.01 <= second - first < 0.2
    assert 0.02 <= third - second < 0.2
    assert target.check() == list(range(FRAMES))


def test_waiting_for_a_retry_holds_no_thread_and_no_memory(pack: Pack, target: FileTarget) -> None:
    def change(data: bytes, frames: range) -> bytes:
        if frames[0] < 6:
            raise RemoteError("try later")
        return data

    with Engine([MemorySource([pack], change=change)], threads=2, retries=1, backoff=60, read_size=1) as engine:
        stuck = [engine.request(target, frame * 2 * BLOCK, 1) for frame in range(6)]
        eventually(lambda: engine.stats()["retries"] == 6)
        assert engine.stats()["in_flight"] == 0
        assert engine.stats()["queued"]["demand"] == 6
        engine.request(target, 8 * 2 * BLOCK, 1).result(WAIT)
        assert not any(future.done() for future in stuck)
    assert all(future.exception(0) for future in stuck)


def tiers(count: int, retries: int, **more: Any) -> Tiers:
    return Tiers([MemorySource([], str(number)) for number in range(count)], retries=retries, backoff=0.1, **more)


@pytest.mark.parametrize(("count", "retries"), [(1, 0), (1, 3), (3, 0), (3, 2)])
def test_every_source_is_asked_once_a_round_and_pauses_grow(count: int, retries: int) -> None:
    for seed in range(50):
        chain = tiers(count, retries, uniform=random.Random(seed).uniform)
        attempt, asked, pauses = chain.first("pack"), [], []
        while True:
            asked.append(attempt.order[0])
            following = chain.after(attempt, RemoteError("no"))
            if following is None:
                break
            attempt, pause = following
            pauses.append(pause)
        assert asked == list(range(count)) * (retries + 1)
        between = pauses[count - 1 :: count]
        assert len(between) == retries
        for number, pause in enumerate(between):
            assert 0.05 * 2**number <= pause <= 0.1 * 2**number
        assert sum(pauses) == sum(between), "no pause between tiers"


def test_pauses_have_a_limit_and_differ() -> None:
    chain = tiers(1, 40)
    attempt, pauses = chain.first("pack"), []
    while (following := chain.after(attempt, RemoteError("no"))) is not None:
        attempt, pause = following
        pauses.append(pause)
    assert len(pauses) == 40
    assert max(pauses) <= 5
    assert len(set(pauses[10:])) > 20


def test_a_source_that_keeps_failing_is_asked_last_for_a_while(pack: Pack) -> None:
    now = 100.0
    chain = tiers(3, 0, clock=lambda: now)
    sample, other = Sample("pack", pack.toc, 0), Sample("other", pack.toc, 0)
    for _ in range(2):
        chain.failed(0, RemoteError("down"), sample)
    assert chain.first("pack").order == (0, 1, 2)
    chain.succeeded(0, sample)
    for _ in range(2):
        chain.failed(0, RemoteError("down"), sample)
    assert chain.first("pack").order == (0, 1, 2), "only failures in a row count"
    chain.bad(0, FormatError("bad"), sample)
    assert chain.first("pack").order == (1, 2, 0)
    for _ in range(9):
        chain.failed(1, NotFoundError("no blob"), other)
    assert chain.first("pack").order == (1, 2, 0), "not to have a blob is no failure"
    assert chain.first("other").order == (2, 0, 1), "who lacked a pack is asked last for it"
    now += 5.1
    assert chain.first("pack").order == (1, 2, 0), "no reader pays for finding out"
    assert chain.probes(now) == [(0, sample)]
    chain.probed(0, None)
    assert chain.first("pack").order == (0, 1, 2)


def test_a_dead_tier_does_not_cost_every_read_its_failure(pack: Pack, target: FileTarget) -> None:
    dead = MemorySource([pack], "dead", change=raises(RemoteError("down")))
    with Engine([dead, MemorySource([pack])], threads=2) as engine:
        for frame in range(FRAMES):
            engine.request(target, frame * 2 * BLOCK, 1).result(WAIT)
    assert len(dead.reads) == 3


def test_a_source_may_come_later(pack: Pack, target: FileTarget) -> None:
    with Engine([]) as engine:
        with pytest.raises(NotFoundError, match="no store is known that has it"):
            engine.request(target, 0, 1).result(WAIT)
        late = MemorySource([pack], "late")
        engine.add_source(late)
        engine.add_source(MemorySource([], "late"))
        engine.request(target, 0, 1).result(WAIT)
        assert list(engine.stats()["sources"]) == ["late"]
    assert target.check() == [0]


def test_slow_drip_is_overtaken_and_its_late_bytes_are_not_needed(pack: Pack, target: FileTarget) -> None:
    gate = Gate()
    drip = MemorySource([pack], "drip", before=gate)
    good = MemorySource([pack], "good")
    with Engine([drip, good], threads=2, patience=0.05) as engine:
        started = time.monotonic()
        engine.request(target, 0, FRAMES * 2 * BLOCK).result(WAIT)
        assert 0.05 <= time.monotonic() - started < 1
        assert engine.stats()["in_flight"] > 0, "what the stuck read will bring is accounted for"
        gate.open()
        eventually(lambda: engine.stats()["in_flight"] == 0)
        eventually(lambda: engine.stats()["threads"] == 2)
        stats = engine.stats()
    assert stats["overtaken_reads"] == 1
    assert stats["sources"]["drip"]["failed"] == 1
    assert sorted(target.writes) == list(range(FRAMES))
    assert len(good.reads) == 1


def test_a_read_that_is_late_and_fails_counts_once(pack: Pack, target: FileTarget) -> None:
    gate = Gate()
    late = MemorySource([pack], "late", before=gate, change=raises(RemoteError("at last")))
    with Engine([late, MemorySource([pack], "good")], threads=2, patience=0.05) as engine:
        engine.request(target, 0, FRAMES * 2 * BLOCK).result(WAIT)
        gate.open()
        eventually(lambda: engine.stats()["in_flight"] == 0)
        assert engine.stats()["sources"]["late"]["failed"] == 1
        assert engine.stats()["retries"] == 1
    assert sorted(target.writes) == list(range(FRAMES))


def test_what_nobody_waits_for_is_not_tried_again(pack: Pack, target: FileTarget) -> None:
    gate = Gate()
    source = MemorySource([pack], before=gate, change=raises(RemoteError("no")))
    with Engine([source], threads=2, retries=5, backoff=0.01) as engine:
        future = engine.request(target, 0, 1, deadline=time.monotonic() + 0.05)
        with pytest.raises(RemoteError, match="in time"):
            future.result(WAIT)
        gate.open()
        eventually(lambda: not len(engine._schedule))
        assert engine.stats()["retries"] == 0
    assert len(source.reads) == 1


def test_closing_ends_the_retries(pack: Pack, target: FileTarget) -> None:
    gate = Gate()
    sources = [MemorySource([pack], name, before=gate, change=raises(RemoteError("no"))) for name in ("one", "two")]
    engine = Engine(sources, threads=2)
    future = engine.request(target, 0, 1)
    gate.wait_for()
    threading.Timer(0.05, gate.open).start()
    engine.close()
    with pytest.raises(RemoteError, match=r"no source has it: one: no$"):
        future.result(0)
    assert not sources[1].reads


def test_late_bytes_serve_when_they_are_first(pack: Pack, target: FileTarget) -> None:
    slow, slower = Gate(), Gate()
    sources = [MemorySource([pack], "slow", before=slow), MemorySource([pack], "slower", before=slower)]
    with Engine(sources, threads=2, patience=0.05) as engine:
        future = engine.request(target, 0, FRAMES * 2 * BLOCK)
        slower.wait_for()
        slow.open()
        future.result(WAIT)
        assert sorted(target.writes) == list(range(FRAMES))
        slower.open()
        eventually(lambda: engine.stats()["in_flight"] == 0)
    assert sorted(target.writes) == list(range(FRAMES)), "written once"


def test_late_bytes_may_be_bad_too(pack: Pack, target: FileTarget) -> None:
    slow, slower = Gate(), Gate()
    sources = [
        MemorySource([pack], "slow", before=slow, change=lambda data, _: bytes(len(data))),
        MemorySource([pack], "slower", before=slower),
    ]
    with Engine(sources, threads=2, patience=0.05, retries=1, backoff=0.01) as engine:
        future = engine.request(target, 0, FRAMES * 2 * BLOCK)
        slower.wait_for()
        slow.open()
        eventually(lambda: engine.stats()["sources"]["slow"]["bad_frames"] >= FRAMES)
        slower.open()
        future.result(WAIT)
        eventually(lambda: engine.stats()["in_flight"] == 0)
    assert target.check() == list(range(FRAMES))
    assert sorted(target.writes) == list(range(FRAMES))


def test_hanging_reads_do_not_use_up_the_threads(pack: Pack, target: FileTarget) -> None:
    gate = Gate()
    hanging = MemorySource([pack], "hanging", before=lambda frames: gate(frames) if frames[0] < 3 else None)
    with Engine([hanging, MemorySource([pack])], threads=2, patience=0.05, read_size=1) as engine:
        futures = [engine.request(target, frame * 2 * BLOCK, 1) for frame in range(3)]
        wait(futures, WAIT)
        assert not any(future.exception() for future in futures)
        assert engine.stats()["threads"] == 4, "as many again at most"
        engine.request(target, 8 * 2 * BLOCK, 1).result(WAIT)
        gate.open()
        eventually(lambda: engine.stats()["threads"] == 2)
        engine.request(target, 0, FRAMES * 2 * BLOCK).result(WAIT)
    assert target.check() == list(range(FRAMES))


def test_the_last_tier_is_waited_for(pack: Pack, target: FileTarget) -> None:
    source = MemorySource([pack], before=lambda _: time.sleep(0.2))
    with Engine([source], threads=2, patience=0.01) as engine:
        engine.request(target, 0, 1).result(WAIT)
        assert engine.stats()["overtaken_reads"] == 0
    assert len(source.reads) == 1


def test_errors_hold_no_bytes(pack: Pack, target: FileTarget) -> None:
    """A future may be kept for long, and a traceback keeps what its functions had."""
    seen: list[memoryview] = []

    def fail(_frame: int, data: bytes) -> None:
        copy = memoryview(bytearray(data))
        seen.append(copy)
        local = memoryview(copy)  # cannot be released before the function's locals are gone
        raise OSError(28, "No space left on device", local.nbytes)

    target.write_frame = fail  # type: ignore[method-assign]
    with Engine([MemorySource([pack])], threads=2) as engine:
        error = engine.request(target, 0, 1).exception(WAIT)
        assert isinstance(error, StorageError)
        functions = []
        cause: BaseException | None = error
        while cause is not None:
            trace = cause.__traceback__
            while trace is not None:
                functions.append(trace.tb_frame.f_code.co_name)
                assert not [
                    value for value in trace.tb_frame.f_locals.values() if isinstance(value, memoryview | bytes)
                ]
                trace = trace.tb_next
            cause = cause.__cause__
    assert "fail" in functions


@pytest.mark.parametrize("seed", range(6))
def test_anything_may_happen_but_wrong_bytes(store_dir: Path, tmp_path: Path, seed: int) -> None:
    """Random faults in three tiers, random requests from several threads; what is marked is right, what is done is
    there, every future is done, nothing is left."""
    choice = random.Random(seed)
    pack = make_pack(DirectoryStore(store_dir), [choice.randrange(1, 9) for _ in range(150)], raw=seed % 2 > 0)
    target = FileTarget(tmp_path, pack)
    lock = threading.Lock()

    def fault(rate: float) -> Callable[[bytes, range], Any]:
        def change(data: bytes, frames: range) -> Any:
            with lock:
                kind, place = choice.random(), choice.randrange(len(data))
                what = choice.choice(("raise", "short", "long", "flip", "other", "slow", "none"))
                what = what if kind < rate else "nothing"
            if what == "raise":
                raise RemoteError("refused")
            if what == "slow":
                time.sleep(0.06)
            return {
                "short": data[:place],
                "long": data + data[: place + 1],
                "flip": data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :],
                "other": pack.blob[: len(data)],
                "none": None,
            }.get(what, data)

        return change

    sources = [
        MemorySource([pack], f"tier-{rate}", change=fault(rate), hedged=True, concurrency=3) for rate in (0.6, 0.4, 0.2)
    ]
    served = failed = 0
    problems: list[BaseException] = []

    def work(number: int) -> None:
        nonlocal served, failed
        mine = random.Random(seed * 100 + number)
        try:
            for _ in range(25):
                offset, length = mine.randrange(target.toc.device_size), mine.randrange(1, 100 * BLOCK)
                priority = mine.choice(list(Priority))
                deadline = time.monotonic() + mine.choice((0.005, 10))
                future = engine.request(target, offset, length, priority=priority, deadline=deadline)
                error = future.exception(WAIT)
                assert error is None or isinstance(error, ErofsgenError)
                if error is None:
                    frames = target.toc.frames(offset, min(length, target.toc.device_size - offset))
                    assert target.ready(frames[0], frames[-1])
                with lock:
                    served += error is None
                    failed += error is not None
        except BaseException as error:
            problems.append(error)

    with Engine(
        sources, threads=4, retries=1, backoff=0.005, patience=0.03, memory=1 << 20, read_size=100_000
    ) as engine:
        workers = [threading.Thread(target=work, args=(number,)) for number in range(6)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        eventually(lambda: not len(engine._schedule))
        eventually(lambda: engine.stats()["in_flight"] == 0)
        eventually(lambda: engine.stats()["threads"] == 4)
        stats = engine.stats()
        assert set(stats["queued"].values()) == {0}
        assert engine._schedule._urgent == engine._schedule._background_busy == 0
        assert engine._schedule._background_opening == 0
    assert not problems
    assert served > 50
    assert stats["in_flight_peak"] <= 1 << 20
    assert len(target.check()) == len(set(target.writes)) == len(target.writes)
    target.close()
