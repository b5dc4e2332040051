"""Locks in object stores, by a clock that the tests set: who waits for whom, what crashes leave, whom not to trust."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import IO

import msgspec
import pytest
from storekit import named

from erofsgen.errors import BusyError, RemoteError
from erofsgen.store.locks import Times
from erofsgen.store.objects import Object, Objects, ObjectStore

LOCKS = "erofsgen/locks/"
QUICK = Times(poll=0.005, settle=0.2)


class Memory(Objects):
    """Objects in memory, with a clock of their own, that can be made to fail."""

    key_limit = 1000

    def __init__(self) -> None:
        self.now = 1000.0
        self.fails = False
        self.kept: dict[str, tuple[bytes, float]] = {}
        self._mutex = threading.Lock()

    def get(self, key: str, limit: int) -> bytes | None:
        return self.kept.get(key, (None, 0.0))[0]

    def read_into(self, key: str, offset: int, buffer: memoryview, what: str) -> None:
        raise NotImplementedError

    def size(self, key: str) -> int | None:
        data = self.get(key, 0)
        return None if data is None else len(data)

    def put(self, key: str, data: bytes) -> None:
        if self.fails:
            raise RemoteError("no answer")
        with self._mutex:
            self.kept[key] = data, self.now

    def put_file(self, key: str, file: IO[bytes], size: int) -> None:
        self.put(key, file.read())

    def list(self, prefix: str) -> Iterable[Object]:
        with self._mutex:
            return [Object(key, len(data), at) for key, (data, at) in self.kept.items() if key.startswith(prefix)]

    def delete(self, key: str) -> None:
        with self._mutex:
            self.kept.pop(key, None)

    def sweep(self, prefix: str) -> None:
        pass

    def close(self) -> None:
        pass

    def locks(self, kind: str = "") -> list[str]:
        return [lock.key.removeprefix(LOCKS) for lock in self.list(LOCKS + kind)]

    def left_by(self, kind: str, age: float = 0.0) -> str:
        """A lock as somebody else wrote it ``age`` seconds ago."""
        key = f"{LOCKS}{kind}-0123"
        self.kept[key] = b'{"host":"far-away","pid":4711,"since":"yesterday"}', self.now - age
        return key


@pytest.fixture
def memory() -> Memory:
    return Memory()


def client(memory: Memory, times: Times = QUICK, tmp_path=None) -> ObjectStore:
    return ObjectStore("memory://", memory, tmp_path, times=times)


@pytest.fixture
def store(memory: Memory) -> ObjectStore:
    return client(memory)


def test_a_lock_is_an_object_that_says_whose_it_is(memory: Memory, store: ObjectStore):
    with store.building():
        (name,) = memory.locks()
        assert name.startswith("build-")
        content = msgspec.json.decode(memory.kept[LOCKS + name][0])
        assert set(content) == {"host", "pid", "since"}
    with store.collecting():
        (name,) = memory.locks()
        assert name.startswith("gc-")
    assert memory.locks() == []


@pytest.mark.parametrize(("kind", "what"), [("build", "a build is running"), ("gc", "garbage is being collected")])
def test_who_is_in_the_way_is_named(memory: Memory, store: ObjectStore, kind: str, what: str):
    memory.left_by(kind, age=1)
    with pytest.raises(BusyError, match=f"{what} on far-away .process 4711. since yesterday") as caught:
        store.collecting().__enter__()
    assert "after 30 minutes" in caught.value.hint
    assert memory.locks() == [f"{kind}-0123"]


def test_a_lock_that_is_no_json_holds_too(memory: Memory, store: ObjectStore):
    memory.kept[memory.left_by("build", age=1)] = b"{", memory.now - 1
    with pytest.raises(BusyError, match="a build is running"):
        store.collecting().__enter__()


# --- what crashes leave ----------------------------------------------------------------------------------------------


def test_a_lock_holds_for_half_an_hour_of_the_servers_time(memory: Memory, store: ObjectStore):
    left = memory.left_by("build", age=1799)
    with pytest.raises(BusyError):
        store.collecting().__enter__()
    memory.now += 2
    with store.collecting():
        assert left not in memory.kept


def test_builders_pass_a_dead_collector_and_leave_its_lock(memory: Memory, store: ObjectStore):
    left = memory.left_by("gc", age=1801)
    with store.building():
        assert left in memory.kept
        assert len(memory.locks("build")) == 1


def test_builders_wait_for_a_dead_collector_until_its_lock_is_stale(memory: Memory):
    memory.left_by("gc")
    store = client(memory, Times(refresh=0.05, poll=0.005))
    began = threading.Event()

    def build() -> None:
        with store.building():
            began.set()

    thread = threading.Thread(target=build)
    thread.start()
    memory.now += 1799
    assert not began.wait(0.3)
    memory.now += 2
    assert began.wait(60)
    thread.join()


# --- keeping a lock --------------------------------------------------------------------------------------------------


def test_a_lock_is_written_again_and_again(memory: Memory):
    builder, collector = client(memory, Times(refresh=0.01)), client(memory)
    with builder.building():
        (name,) = memory.locks()
        for _ in range(3):
            memory.now += 1700
            while memory.kept[LOCKS + name][1] != memory.now:
                time.sleep(0.005)
        with pytest.raises(BusyError):
            collector.collecting().__enter__()


@pytest.mark.parametrize("kind", ["building", "collecting"])
def test_who_could_not_write_a_lock_does_not_trust_it_ever_again(memory: Memory, kind: str):
    store = client(memory, Times(refresh=0.01, trust=0.2))
    store.tag("before", named(1))

    def hold() -> None:
        with getattr(store, kind)():
            time.sleep(0.4)
            store.tag("meanwhile", named(2))  # it was written all the time
            memory.fails = True
            time.sleep(0.4)
            memory.fails = False
            time.sleep(0.1)
            for use in (
                lambda: store.tag("before", named(3)),
                lambda: store.delete(named(1).digest),
                lambda: store.delete_record("key"),
            ):
                with pytest.raises(RemoteError, match="could not be kept") as caught:
                    use()
                assert caught.value.hint

    with pytest.raises(RemoteError, match="could not be kept"):
        hold()
    assert {name: found.size for name, found in store.references().items()} == {"before": 1, "meanwhile": 2}
    assert memory.locks() == []
    store.tag("after", named(4))


def test_who_was_asleep_knows_by_his_own_clock(memory: Memory):
    """The thread that writes the lock has not noticed anything yet."""
    store = client(memory, Times(trust=0.1))

    def hold() -> None:
        with store.building():
            time.sleep(0.2)

    with pytest.raises(RemoteError, match="could not be kept"):
        hold()


def test_what_went_wrong_first_is_said(memory: Memory):
    store = client(memory, Times(trust=0.05))

    def hold() -> None:
        with store.building():
            time.sleep(0.1)
            raise KeyError("first")

    with pytest.raises(KeyError, match="first"):
        hold()
    assert memory.locks() == []


def test_a_lock_that_cannot_be_written_is_not_held(memory: Memory, store: ObjectStore):
    memory.fails = True
    for lock in (store.building(), store.collecting()):
        with pytest.raises(RemoteError, match="no answer"):
            lock.__enter__()


# --- at once ---------------------------------------------------------------------------------------------------------


def test_the_second_collector_gives_up_at_once(memory: Memory, store: ObjectStore):
    with store.collecting():
        memory.now += 1
        with pytest.raises(BusyError, match="garbage is being collected"):
            client(memory).collecting(wait=60).__enter__()


def test_a_collector_gives_up_for_one_that_began_before_but_wrote_its_lock_again(memory: Memory, store: ObjectStore):
    """That one looks younger, but does not go away."""
    memory.left_by("gc", age=-1)
    began = time.monotonic()
    with pytest.raises(BusyError, match="garbage is being collected"):
        store.collecting().__enter__()
    assert time.monotonic() - began >= QUICK.settle


def test_a_collector_outlasts_a_younger_one(memory: Memory, store: ObjectStore):
    other = memory.left_by("gc", age=-1)
    threading.Timer(0.05, memory.delete, [other]).start()
    with store.collecting():
        assert len(memory.locks()) == 1


def test_a_builder_that_comes_while_a_collector_waits_does_not_delay_it(memory: Memory):
    order = []
    first = client(memory).building()
    first.__enter__()

    def collect() -> None:
        with client(memory).collecting(wait=60):
            order.append("gc")

    def build() -> None:
        with client(memory).building():
            order.append("build")

    collector, builder = threading.Thread(target=collect), threading.Thread(target=build)
    collector.start()
    while not memory.locks("gc"):
        time.sleep(0.001)
    builder.start()
    time.sleep(0.1)
    assert order == []
    first.__exit__(None, None, None)
    collector.join(60)
    builder.join(60)
    assert order == ["gc", "build"]


@pytest.fixture
def dice() -> Iterator[random.Random]:
    seed = random.randrange(1 << 32)
    yield random.Random(seed)
    print(f"seed {seed}")


def test_builders_and_collectors_never_meet(memory: Memory, dice: random.Random):
    """Many of both at random times, on a server whose clock hardly moves."""
    mutex = threading.Lock()
    inside = {"build": 0, "gc": 0}
    done = {"build": 0, "gc": 0, "busy": 0}

    def work(kind: str) -> None:
        times = Times(refresh=dice.uniform(0.002, 0.02), poll=0.001, settle=0.05)
        store = client(memory, times)
        for _ in range(25):
            try:
                with store.building() if kind == "build" else store.collecting(wait=0.02):
                    with mutex:
                        inside[kind] += 1
                        assert inside["gc"] <= 1
                        assert not (inside["gc"] and inside["build"]), inside
                    time.sleep(dice.uniform(0, 0.003))
                    with mutex:
                        inside[kind] -= 1
                done[kind] += 1
            except BusyError:
                done["busy"] += 1
            time.sleep(dice.uniform(0, 0.01))

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, ["build", "build", "build", "gc", "gc", "gc"]))
    assert done["build"] == 75
    assert done["gc"] > 0
    assert memory.locks() == []
