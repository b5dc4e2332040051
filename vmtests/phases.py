"""A kernel's run: up to three boots on the same scratch disks.

::

    main      every case without a phase          ends with a clean power-off
    reboot    cases marked phase("reboot")        what was left on the disks is there; a case that creates `power-cut`
                                                  in the share has the guest killed while it goes on
    aftercut  cases marked phase("aftercut")      after that, or after another clean power-off

A phase without a case is not booted. A guest that crashes or hangs fails the test it was in; the others of its phase
are run in another guest, at most :data:`CRASHES` times.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from erofsgen.errors import UsageError
from vmtests import results
from vmtests.guest import NOT_RUN, SCRATCH, SHARE, End, Outcome
from vmtests.kernels import Kernel
from vmtests.places import CASES, REPOSITORY
from vmtests.results import Result, Verdict

PHASES = ("main", "reboot", "aftercut")
CRASHES = 3
CASE_SECONDS = 600
"""A test that takes longer fails."""

_PLUGINS = ("pytest_timeout", "pytest_reportlog.plugin")  # others take seconds to import in a guest

_TESTS_FAILED, _NO_TESTS = 1, 5  # pytest's exit codes, beside 0

Boot = Callable[[str, str, Mapping[str, str]], Outcome]
"""Boots a guest under a label, runs a command with an environment in it, and waits for its end."""

Collect = Callable[[str, str, str], list[str]]
"""The tests of a kernel, a phase and an expression: :func:`collect`, or a test's."""


@dataclass
class Run:
    """What came of one kernel: its results, and its boots by their labels."""

    results: list[Result] = field(default_factory=list)
    boots: dict[str, Outcome] = field(default_factory=dict)
    troubles: list[str] = field(default_factory=list)
    """What went wrong beside failing tests."""

    @property
    def passed(self) -> bool:
        """Whether nothing failed. A test that fails because of its kernel, and says so, is no failure."""
        return not self.troubles and not any(failed(result) for result in self.results)


def failed(result: Result) -> bool:
    """Whether a test failed, and not for a fault of its kernel."""
    return result.verdict is Verdict.FAILED and "kernel_fault" not in result.properties


def collect(kernel: str, phase: str, expression: str) -> list[str]:
    """The tests of a phase, as pytest on this machine lists them. Raises UsageError where it cannot."""
    environment = {**os.environ, "EROFSGEN_VM_PHASE": phase, "EROFSGEN_VM_KERNEL": kernel}
    environment.pop("EROFSGEN_VM", None)
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # the byte code of cases, which pytest makes itself, is for guests
    command = [sys.executable, *_pytest(expression), "--collect-only", "--quiet"]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    if done.returncode not in (0, _NO_TESTS):
        raise UsageError(f"the cases cannot be collected:\n{done.stdout}{done.stderr}".rstrip())
    return [line for line in done.stdout.splitlines() if "::" in line]


def run_kernel(kernel: Kernel, expression: str, share: Path, boot: Boot, collect: Collect = collect) -> Run:
    """Run all phases of a kernel. ``share`` is where the guests' :data:`vmtests.guest.SHARE` is on this machine."""
    run = Run()
    for phase in PHASES:
        expected = collect(kernel.name, phase, expression)
        crashes = 0
        while expected and crashes <= CRASHES:
            label = f"{phase}-{len(run.boots) + 1}"
            done = [result.nodeid for result in run.results]
            outcome = boot(label, _command(label, phase, expression, done), _environment(kernel, phase))
            run.boots[label] = outcome
            found = results.read(share / f"{label}.jsonl")
            results.settle(found, cut=outcome.end is End.CUT, end=outcome.end.value)
            run.results += found
            seen = {result.nodeid for result in found}
            expected = [nodeid for nodeid in expected if nodeid not in seen]
            if outcome.end is End.DONE:
                if outcome.status == NOT_RUN:
                    run.troubles.append(f"the guest could not be set up in {label}")
                elif outcome.status not in (0, _TESTS_FAILED, _NO_TESTS):
                    run.troubles.append(f"pytest exited with {outcome.status} in {label}")
                break
            if outcome.end is not End.CUT:
                crashes += 1
                run.troubles.append(f"the guest {outcome.end.value} in {label}")
            if not found:
                break
        if expected:
            run.troubles.append(f"not run in phase {phase}: {', '.join(expected)}")
    return run


def _environment(kernel: Kernel, phase: str) -> dict[str, str]:
    """What the cases find in their environment."""
    return {
        "EROFSGEN_VM": "1",
        "EROFSGEN_VM_KERNEL": kernel.name,
        "EROFSGEN_VM_RELEASE": kernel.release,
        "EROFSGEN_VM_PHASE": phase,
        "EROFSGEN_VM_EXT4": f"{SCRATCH}/ext4",
        "EROFSGEN_VM_XFS": f"{SCRATCH}/xfs",
        "EROFSGEN_VM_SHARE": SHARE,
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
    }


def _command(label: str, phase: str, expression: str, done: Iterable[str]) -> str:
    """The guest's command: pytest on this tree, without the tests that were run in an earlier guest of the phase."""
    options = [
        *(f"-p{plugin}" for plugin in _PLUGINS),
        f"--report-log={SHARE}/{label}.jsonl",
        f"--basetemp={SCRATCH}/ext4/pytest-{phase}",
        f"--timeout={CASE_SECONDS}",
        f"--override-ini=faulthandler_timeout={CASE_SECONDS}",
        *(f"--deselect={nodeid}" for nodeid in done),
    ]
    return f"cd {shlex.quote(str(REPOSITORY))} && {shlex.join([sys.executable, *_pytest(expression), *options])}"


def _pytest(expression: str) -> list[str]:
    selection = ["-k", expression] if expression else []
    return ["-m", "pytest", str(CASES), "-p", "no:cacheprovider", *selection]
