"""Report logs, and the table they become."""

from __future__ import annotations

import json
import os
import string
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmtests import conformance, results
from vmtests.results import Result, Verdict

SUITE = """\
import os, pytest

@pytest.fixture
def broken():
    raise OSError("no such thing")

def test_passes(record_property):
    record_property("plane", "fscache")
    record_property("case", "cold read")

def test_fails():
    assert 1 == 2, "different"

def test_errors(broken):
    pass

@pytest.mark.skip(reason="not on 6.1")
def test_skips():
    pass

@pytest.mark.xfail(reason="loses a wake-up", strict=True)
def test_expected(record_property):
    record_property("plane", "fscache")
    assert False

def test_dies():
    os._exit(9)

def test_after():
    pass
"""


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """A report log as pytest writes it when its process dies in the middle."""
    directory = tmp_path_factory.mktemp("suite")
    (directory / "test_suite.py").write_text(SUITE)
    (directory / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--report-log={directory / 'log'}"]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run(command, cwd=directory, env=environment, capture_output=True)
    return directory / "log"


def named(found):
    return {result.nodeid.split("::")[1]: result for result in found}


def test_a_report_log_is_read(log):
    found = named(results.read(log))
    assert {name: result.verdict for name, result in found.items() if result.finished} == {
        "test_passes": Verdict.PASSED,
        "test_fails": Verdict.FAILED,
        "test_errors": Verdict.FAILED,
        "test_skips": Verdict.SKIPPED,
        "test_expected": Verdict.XFAILED,
    }
    assert found["test_passes"].properties == {"plane": "fscache", "case": "cold read"}
    assert "AssertionError: different" in found["test_fails"].text
    assert "test_suite.py:12" in found["test_fails"].text
    assert "OSError: no such thing" in found["test_errors"].text
    assert found["test_skips"].text == "not on 6.1"
    assert found["test_expected"].text == "loses a wake-up"


def test_the_test_a_guest_died_in_failed(log):
    found = results.read(log)
    results.settle(found, cut=False, end="crashed")
    dying = named(found)["test_dies"]
    assert (dying.verdict, dying.text) == (Verdict.FAILED, "the guest crashed during this test")


def test_a_torn_log_is_read_up_to_the_tear(log, tmp_path):
    text = log.read_bytes()
    torn = tmp_path / "torn"
    for length in range(0, len(text), 97):
        torn.write_bytes(text[:length])
        assert len(results.read(torn)) <= 6
    assert results.read(tmp_path / "missing") == []


def test_a_module_that_cannot_be_imported_failed(tmp_path):
    (tmp_path / "test_bad.py").write_text("import nothing_of_that_name\n")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--report-log={tmp_path / 'log'}"]
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    subprocess.run(command, cwd=tmp_path, capture_output=True)
    (only,) = results.read(tmp_path / "log")
    assert only.verdict is Verdict.FAILED
    assert "nothing_of_that_name" in only.text


def cell(plane, case, verdict=Verdict.PASSED, text="", **properties):
    return Result("test", verdict, text, 1.0, {"plane": plane, "case": case, **properties}, True)


def make(*cells, release="6.12.117"):
    return conformance.column(cells, release=release, date="2026-11-24", virtualisation="TCG", seconds=61.6)


def test_the_page(tmp_path):
    record, page = tmp_path / "record.json", tmp_path / "page.md"
    stock = make(
        cell("fanotify", "cold read"),
        cell("fanotify", "fill error", Verdict.FAILED, "assert 1 == 2"),
        cell("fscache", "cold read", Verdict.SKIPPED, "built without\non-demand mode"),
        cell("fscache", "fill error", Verdict.SKIPPED, "built without\non-demand mode"),
        Result("no cell", Verdict.FAILED),
        release="7.3.4+deb13-amd64",
    )
    conformance.record("7.x", stock, record, page)
    ondemand = make(
        cell("fscache", "cold read"),
        cell("fscache", "fill error", Verdict.FAILED, "assert", kernel_fault="returns zeros"),
    )
    conformance.record("6.12-ondemand", ondemand, record, page)
    text = page.read_text()
    assert (
        text[text.index("## Kernels") :]
        == """\
## Kernels

| kernel | release | what | run on | guest | seconds |
|---|---|---|---|---|---|
| 6.12-ondemand | 6.12.117 | Debian's 6.12 source with cachefiles' on-demand mode | 2026-11-24 | TCG | 62 |
| 7.x | 7.3.4+deb13-amd64 | the newest 7.x in Debian's suites | 2026-11-24 | TCG | 62 |

## fanotify

| case | 6.12-ondemand | 7.x |
|---|---|---|
| cold read |  | pass |
| fill error |  | **FAIL** |

## fscache

| case | 6.12-ondemand | 7.x |
|---|---|---|
| cold read | pass | - [1](#notes) |
| fill error | kernel fault [2](#notes) | - [1](#notes) |

## Notes

1. built without on-demand mode
2. returns zeros
"""
    )


@pytest.mark.parametrize(
    ("several", "verdict"),
    [
        ([Verdict.PASSED, Verdict.SKIPPED], "pass"),
        ([Verdict.SKIPPED, Verdict.SKIPPED], "skip"),
        ([Verdict.CUT, Verdict.PASSED], "pass"),
        ([Verdict.PASSED, Verdict.XFAILED], "fault"),
        ([Verdict.FAILED, Verdict.PASSED, Verdict.XFAILED], "fail"),
    ],
)
def test_a_cell_of_several_tests(several, verdict):
    (only,) = make(*(cell("fscache", "cold read", one) for one in several))["cells"]
    assert (only["verdict"], only["seconds"]) == (verdict, len(several))


words = st.text(string.ascii_letters + " ", min_size=1, max_size=8).map(str.strip).filter(bool)
columns = st.lists(
    st.builds(cell, words, words, st.sampled_from(Verdict), words), max_size=8
).map(lambda cells: make(*cells))  # fmt: skip


@given(st.lists(st.tuples(st.sampled_from(["6.1", "6.12", "7.x", "a new one"]), columns), max_size=6))
def test_a_run_replaces_its_own_column_only(tmp_path_factory, runs):
    directory: Path = tmp_path_factory.mktemp("docs")
    record, page = directory / "record.json", directory / "page.md"
    for name, column in runs:
        conformance.record(name, column, record, page)
    if runs:
        stored = json.loads(record.read_text())
        assert stored == dict(runs)
        assert page.read_text() == conformance.render(stored)


def test_amending_replaces_the_cells_that_ran(tmp_path):
    def column(release, **verdicts):
        cells = [
            {"plane": "eager", "case": case, "verdict": verdict, "reason": "", "seconds": 1.0}
            for case, verdict in verdicts.items()
        ]
        return {"release": release, "date": "2026-01-01", "virtualisation": "TCG", "seconds": 9, "cells": cells}

    path, page = tmp_path / "record", tmp_path / "page"
    conformance.record("6.1", column("6.1.1", cold="pass", warm="fail"), path, page)
    conformance.record("6.1", column("6.1.1", warm="pass"), path, page, amend=True)
    found = json.loads(path.read_text())["6.1"]["cells"]
    assert [(cell["case"], cell["verdict"]) for cell in found] == [("cold", "pass"), ("warm", "pass")]
    conformance.record("6.1", column("6.1.2", warm="pass"), path, page, amend=True)
    assert len(json.loads(path.read_text())["6.1"]["cells"]) == 1, "another kernel's results are no results of this one"
