"""The fill engine's clock."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest
from fillkit import WAIT, no_thread_left

from erofsgen.host.fill.alarm import Alarm

NEVER = float("inf")


@pytest.fixture
def start() -> Iterator[Callable[[Callable[[float], float]], Alarm]]:
    alarms: list[Alarm] = []

    def make(ring: Callable[[float], float]) -> Alarm:
        alarms.append(Alarm(ring, "test-alarm"))
        return alarms[-1]

    with no_thread_left():
        yield make
        for alarm in alarms:
            alarm.stop()


def test_it_rings_at_the_time_set_and_at_what_ring_returns(start: Callable[..., Alarm]) -> None:
    rung: list[float] = []
    third = threading.Event()

    def ring(now: float) -> float:
        rung.append(now)
        if len(rung) == 3:
            third.set()
        return now + 0.05 if len(rung) < 3 else NEVER

    begun = time.monotonic()
    start(ring).at(begun + 0.05)
    assert third.wait(WAIT)
    assert not third.clear()
    assert not third.wait(0.1)
    assert [begun + 0.05 <= rung[0], rung[0] + 0.05 <= rung[1], rung[1] + 0.05 <= rung[2]] == [True] * 3
    assert rung[2] - begun < 1


def test_an_earlier_time_wins_and_a_later_one_changes_nothing(start: Callable[..., Alarm]) -> None:
    rung = threading.Event()
    alarm = start(lambda _: rung.set() or NEVER)
    alarm.at(NEVER)
    alarm.at(time.monotonic() + 3600)
    alarm.at(time.monotonic() + 0.02)
    alarm.at(time.monotonic() + 1800)
    assert rung.wait(WAIT)


def test_a_time_set_while_it_rings_is_not_lost(start: Callable[..., Alarm]) -> None:
    """By one who came too late for this ring to find what it set the time for."""
    looking, go_on, second = threading.Event(), threading.Event(), threading.Event()

    def ring(_: float) -> float:
        if looking.is_set():
            second.set()
        looking.set()
        assert go_on.wait(WAIT)
        return NEVER

    alarm = start(ring)
    alarm.at(time.monotonic())
    assert looking.wait(WAIT)
    alarm.at(time.monotonic() + 0.02)
    go_on.set()
    assert second.wait(WAIT)


def test_it_can_be_stopped_from_within(start: Callable[..., Alarm]) -> None:
    done = threading.Event()
    alarms: list[Alarm] = []

    def ring(_: float) -> float:
        alarms[0].stop()
        done.set()
        return NEVER

    alarms.append(start(ring))
    alarms[0].at(0)
    assert done.wait(WAIT)
