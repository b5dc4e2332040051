"""What is booted when, with guests that are not there: a boot writes the report log its script says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vmtests import phases
from vmtests.guest import End, Outcome
from vmtests.kernels import Kernel
from vmtests.places import REPOSITORY
from vmtests.results import Verdict

KERNEL = Kernel("6.12-ondemand", "6.12.117", Path("vmlinuz"), Path("config"), None)
END = {"done": End.DONE, "cut": End.CUT, "crash": End.CRASHED, "hang": End.DEADLINE}


def lines(name):
    """What a report log has of a test. One named ``x!`` does not end, ``x?`` fails."""
    for when in ("setup",) if name.endswith("!") else ("setup", "call", "teardown"):
        outcome = "failed" if name.endswith("?") and when == "call" else "passed"
        report = {"$report_type": "TestReport", "nodeid": name.rstrip("!?"), "when": when, "duration": 1.0}
        yield {**report, "outcome": outcome, "longrepr": None, "user_properties": []}


class Machine:
    """``script`` is one entry a boot: how it ends, then the tests that are run."""

    def __init__(self, share, *script):
        self.share, self.script, self.booted = share, list(script), []

    def __call__(self, label, command, environment):
        end, *tests = self.script.pop(0)
        self.booted.append((environment["EROFSGEN_VM_PHASE"], re.findall(r"--deselect=(\S+)", command)))
        with open(self.share / f"{label}.jsonl", "w") as log:
            for name in tests:
                log.writelines(json.dumps(line) + "\n" for line in lines(name))
        status = None if end != "done" else int(any(name.endswith("?") for name in tests))
        return Outcome(END[end], status, 1.0, Path("console"), Path("output"))


def run(tmp_path, expected, *script):
    """Run the phases; returns the run and the phases that were booted, each with what was left out."""
    machine = Machine(tmp_path, *script)
    result = phases.run_kernel(
        KERNEL, "", tmp_path, machine, lambda kernel, phase, expression: list(expected.get(phase, ()))
    )
    assert machine.script == [], "boots that were not made"
    return result, machine.booted


def verdicts(result):
    return {one.nodeid: one.verdict for one in result.results}


def test_a_phase_without_cases_is_not_booted(tmp_path):
    result, booted = run(tmp_path, {"main": ["a", "b"]}, ("done", "a", "b"))
    assert booted == [("main", [])]
    assert result.passed
    assert verdicts(result) == {"a": Verdict.PASSED, "b": Verdict.PASSED}


def test_no_case_at_all_boots_nothing(tmp_path):
    result, booted = run(tmp_path, {})
    assert (booted, result.results) == ([], [])


def test_phases_follow_each_other(tmp_path):
    result, booted = run(
        tmp_path, {"main": ["a"], "reboot": ["b"], "aftercut": ["c"]}, ("done", "a"), ("cut", "b!"), ("done", "c")
    )
    assert [phase for phase, _ in booted] == ["main", "reboot", "aftercut"]
    assert result.passed
    assert verdicts(result)["b"] is Verdict.CUT


def test_every_case_may_have_its_own_power_cut(tmp_path):
    result, booted = run(
        tmp_path, {"reboot": ["a", "b", "c"], "aftercut": ["d"]}, ("cut", "a", "b!"), ("cut", "c!"), ("done", "d")
    )
    assert booted == [("reboot", []), ("reboot", ["a", "b"]), ("aftercut", ["a", "b", "c"])]
    assert result.passed


@pytest.mark.parametrize(("end", "words"), [("crash", "crashed"), ("hang", "did not finish in time")])
def test_a_guest_that_dies_fails_its_test_and_the_others_are_run(tmp_path, end, words):
    result, booted = run(tmp_path, {"main": ["a", "b", "c"]}, (end, "a", "b!"), ("done", "c"))
    assert booted == [("main", []), ("main", ["a", "b"])]
    assert verdicts(result) == {"a": Verdict.PASSED, "b": Verdict.FAILED, "c": Verdict.PASSED}
    assert f"the guest {words} during this test" in result.results[1].text
    assert not result.passed


def test_a_kernel_that_crashes_again_and_again_is_left_alone(tmp_path):
    tests = [str(number) for number in range(9)]
    result, booted = run(tmp_path, {"main": tests}, *(("crash", f"{number}!") for number in range(4)))
    assert len(booted) == phases.CRASHES + 1
    assert "not run in phase main: 4, 5, 6, 7, 8" in result.troubles


def test_a_guest_that_runs_nothing_is_not_booted_again(tmp_path):
    result, booted = run(tmp_path, {"main": ["a"]}, ("crash",))
    assert len(booted) == 1
    assert result.troubles == ["the guest crashed in main-1", "not run in phase main: a"]


def test_a_test_that_fails_fails_the_run_and_the_next_phase_is_booted(tmp_path):
    result, booted = run(tmp_path, {"main": ["a"], "reboot": ["b"]}, ("done", "a?"), ("done", "b"))
    assert [phase for phase, _ in booted] == ["main", "reboot"]
    assert not result.passed
    assert result.troubles == []


def test_a_test_that_fails_for_its_kernels_fault_does_not(tmp_path):
    result, _ = run(tmp_path, {"main": ["a"]}, ("done", "a?"))
    result.results[0].properties["kernel_fault"] = "loses a wake-up"
    assert result.passed


def test_a_test_that_was_not_run_is_not_passed_over(tmp_path):
    result, _ = run(tmp_path, {"main": ["a", "b"]}, ("done", "a"))
    assert not result.passed
    assert result.troubles == ["not run in phase main: b"]


def test_the_cases_are_collected_by_phase():
    main = phases.collect("6.12-ondemand", "main", "")
    assert "vmtests/cases/test_guest.py::test_loopback_works" in main
    assert not set(main) & set(phases.collect("6.12-ondemand", "reboot", ""))
    assert phases.collect("6.12-ondemand", "main", "loopback") == ["vmtests/cases/test_guest.py::test_loopback_works"]
    assert phases.collect("6.12-ondemand", "main", "nosuchcase") == []


def test_on_this_machine_the_cases_are_skipped():
    environment = {name: text for name, text in os.environ.items() if not name.startswith("EROFSGEN_VM")}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "vmtests/cases/test_guest.py"]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "6 skipped" in done.stdout
    assert "runs in a guest, see vmtests/run" in done.stdout
