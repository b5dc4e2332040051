"""The benchmarks' ruler: wall time, and peak memory of a process tree."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

MEASURE = Path(__file__).resolve().parent.parent / "bench" / "measure.py"


@pytest.fixture(scope="module")
def measure():
    spec = importlib.util.spec_from_file_location("bench_measure", MEASURE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_measure"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


HOLD = "import time; held = b'x' * (60 << 20); time.sleep(0.4)"


def test_peak_counts_children_at_the_same_time(measure):
    one = measure.run(sys.executable, "-c", HOLD)
    assert 60 << 20 <= one.peak < 110 << 20
    two = measure.run("sh", "-c", f'{sys.executable} -c "{HOLD}" & {sys.executable} -c "{HOLD}" & wait')
    assert 120 << 20 <= two.peak < 220 << 20
    one_after_the_other = measure.run("sh", "-c", f'{sys.executable} -c "{HOLD}"; {sys.executable} -c "{HOLD}"')
    assert 60 << 20 <= one_after_the_other.peak < 110 << 20


def test_short_peaks_are_not_missed(measure):
    assert measure.run(sys.executable, "-c", "b'x' * (90 << 20)").peak >= 90 << 20


def test_what_the_bench_itself_holds_is_not_counted(measure):
    held = b"x" * (90 << 20)
    assert measure.run("true").peak < 30 << 20
    assert len(held) == 90 << 20


def test_time_and_output(measure):
    result = measure.run("sh", "-c", "sleep 0.3; echo said; echo more >&2")
    assert 0.3 <= result.seconds < 5
    assert result.cpu < 0.3
    assert result.output == "said\n"


def test_a_failing_command_is_an_error_with_its_output(measure, capsys):
    with pytest.raises(SystemExit, match="exit code 3"):
        measure.run("sh", "-c", "echo why >&2; exit 3")
    assert "why" in capsys.readouterr().err


def test_a_goal_is_met_up_to_its_target(measure):
    assert measure.Goal("g", 0.3, 0.3).json() == '{"goal": "g", "value": 0.3, "target": 0.3, "met": true}'
    assert '"met": false' in measure.Goal("g", 0.300001, 0.3).json()


def test_series_takes_medians_and_the_highest_peak(measure):
    runs = [measure.Run(seconds=s, cpu=s, peak=p, output="") for s, p in ((1.0, 5), (9.0, 7), (2.0, 6))]
    series = measure.Series(runs)
    assert (series.seconds, series.peak, series.spread) == (2.0, 7, "1.00 - 9.00")


def test_a_goal_at_least_is_met_from_its_target(measure):
    assert measure.Goal("g", 0.95, 0.95, at_least=True).met
    assert not measure.Goal("g", 0.949, 0.95, at_least=True).met


def test_a_goal_without_a_value_is_not_met(measure, capsys):
    goal = measure.Goal("g", None, 2, at_least=True)
    assert goal.json() == '{"goal": "g", "value": null, "target": 2, "met": false}'
    measure.print_goals([goal], as_json=False)
    assert "no" in capsys.readouterr().out
