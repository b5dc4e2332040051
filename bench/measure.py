"""Running a command and knowing what it cost: wall time, CPU time, peak memory of its whole process tree."""

from __future__ import annotations

import json
import os
import platform
import select
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

REPOSITORY = Path(__file__).resolve().parent.parent
SAMPLE_SECONDS = 0.02
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Run:
    """One run: ``seconds`` of wall time, ``cpu`` seconds of all its processes, ``peak`` bytes, what it printed."""

    seconds: float
    cpu: float
    peak: int
    output: str


def run(*command: str | Path, cwd: Path | None = None) -> Run:
    """Run a command to its end.

    ``peak`` is the most that the resident sets of the command and its descendants added up to at one time, seen every
    20 ms, and at least the largest resident set the kernel saw in any one of them. Pages they share count twice.

    Raises SystemExit with what the command printed if it fails.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, tempfile.TemporaryFile() as facts:
        os.set_inheritable(facts.fileno(), True)
        launcher = [sys.executable, "-IS", Path(__file__).with_name("launch.py"), str(facts.fileno())]
        process = subprocess.Popen(
            [*launcher, *command], stdin=subprocess.DEVNULL, stdout=out, stderr=err, cwd=cwd, pass_fds=[facts.fileno()]
        )
        peak = 0
        with open(os.pidfd_open(process.pid)) as ended:  # readable when the launcher is a zombie
            while not select.select([ended], [], [], SAMPLE_SECONDS)[0]:
                peak = max(peak, sum(_tree_rss(child) for child in _children(process.pid)))
        process.wait()
        for file in (out, err, facts):
            file.seek(0)
        output = out.read().decode(errors="replace")
        if process.returncode:
            sys.stderr.write(output + err.read().decode(errors="replace"))
            raise SystemExit(f"bench: {' '.join(map(str, command))}: exit code {process.returncode}")
        kernel = json.loads(facts.read())
    return Run(seconds=kernel["seconds"], cpu=kernel["cpu"], peak=max(peak, kernel["peak"]), output=output)


def _children(pid: int) -> list[int]:
    """Processes that this one started and that are still there; none if it has gone itself."""
    found: list[int] = []
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children") as children:
                found += map(int, children.read().split())
    except OSError:
        pass
    return found


def _tree_rss(pid: int) -> int:
    """Resident bytes of a process and its descendants; 0 for what has gone meanwhile."""
    try:
        with open(f"/proc/{pid}/statm") as statm:
            own = int(statm.read().split()[1]) * _PAGE
    except OSError:
        return 0
    return own + sum(_tree_rss(child) for child in _children(pid))


@dataclass(frozen=True)
class Series:
    """Runs of the same command."""

    runs: Sequence[Run]

    @property
    def seconds(self) -> float:
        return statistics.median(run.seconds for run in self.runs)

    @property
    def cpu(self) -> float:
        return statistics.median(run.cpu for run in self.runs)

    @property
    def peak(self) -> int:
        return max(run.peak for run in self.runs)

    @property
    def spread(self) -> str:
        return f"{min(run.seconds for run in self.runs):.2f} - {max(run.seconds for run in self.runs):.2f}"


@dataclass(frozen=True)
class Goal:
    """A figure that has to be at most ``target``, or ``at_least`` that; None, which is never met: not to be had."""

    goal: str
    value: float | None
    target: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        if self.value is None:
            return False
        return self.value >= self.target if self.at_least else self.value <= self.target

    def json(self) -> str:
        value = None if self.value is None else float(f"{self.value:.4g}")
        return json.dumps({"goal": self.goal, "value": value, "target": self.target, "met": self.met})


def print_goals(goals: Iterable[Goal], *, as_json: bool) -> None:
    """One JSON object a line, or a table."""
    if as_json:
        for goal in goals:
            print(goal.json(), flush=True)
        return
    table = Table("goal", "value", "target", "met", title="goals")
    for column in table.columns[1:3]:
        column.justify = "right"
    for goal in goals:
        target = f"{'≥' if goal.at_least else '≤'} {goal.target:g}"
        value = "-" if goal.value is None else f"{goal.value:.4g}"
        table.add_row(goal.goal, value, target, "[green]yes" if goal.met else "[red]no")
    Console().print(table)


def print_series(title: str, rows: dict[str, Series], *, as_json: bool) -> None:
    """The runs behind the goals; on standard error with ``--json``."""
    table = Table("command", "runs", "median s", "min - max s", "CPU s", "peak MiB", title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, series in rows.items():
        table.add_row(
            name,
            str(len(series.runs)),
            f"{series.seconds:.2f}",
            series.spread,
            f"{series.cpu:.2f}",
            f"{series.peak / 2**20:.0f}",
        )
    Console(stderr=as_json).print(table)


@dataclass(frozen=True)
class Figure:
    """The same thing measured several times, in ``unit``."""

    what: str
    values: Sequence[float]
    unit: str

    @property
    def median(self) -> float:
        return statistics.median(self.values)


def print_figures(title: str, figures: Iterable[Figure], *, as_json: bool) -> None:
    """The figures behind the goals; on standard error with ``--json``."""
    table = Table("what", "rounds", "median", "min - max", "unit", title=title)
    for column in table.columns[1:4]:
        column.justify = "right"
    for figure in figures:
        spread = f"{min(figure.values):.4g} - {max(figure.values):.4g}"
        table.add_row(figure.what, str(len(figure.values)), f"{figure.median:.4g}", spread, figure.unit)
    Console(stderr=as_json).print(table)


def machine() -> str:
    """This machine in one line."""
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    memory = os.sysconf("SC_PHYS_PAGES") * _PAGE / 2**30
    return (
        f"{os.cpu_count()} x {model}, {memory:.0f} GiB, Linux {platform.release()}, Python {platform.python_version()}"
    )


def read_through(*places: Path) -> None:
    """Bring files, and all files below directories, into the page cache."""
    buffer = bytearray(1 << 20)
    for place in places:
        files = [place] if place.is_file() else (Path(top, name) for top, _, names in os.walk(place) for name in names)
        for path in files:
            if path.is_file() and not path.is_symlink():
                with open(path, "rb", buffering=0) as file:
                    while file.readinto(buffer):
                        pass
