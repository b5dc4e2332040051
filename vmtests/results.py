"""What pytest wrote down in a guest: pytest-reportlog's report log, a JSON object a line, read even half-written."""

from __future__ import annotations

import enum
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class Verdict(enum.Enum):
    """What became of a test. ``CUT`` is one that was running when the guest's power was cut on purpose."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"
    XFAILED = "xfailed"
    CUT = "cut"


@dataclass
class Result:
    """One test. ``text`` is why it failed or was skipped; ``properties`` are pytest's user properties."""

    nodeid: str
    verdict: Verdict = Verdict.PASSED
    text: str = ""
    seconds: float = 0.0
    properties: dict[str, str] = field(default_factory=dict)
    finished: bool = False


def read(path: Path) -> list[Result]:
    """The tests of a report log, in their order, also those that did not end. A torn last line is no error."""
    results: dict[str, Result] = {}
    for report in _lines(path):
        nodeid = report.get("nodeid") or "collection"
        kind = report.get("$report_type")
        if kind == "CollectReport" and report["outcome"] == "failed":
            results[nodeid] = Result(nodeid, Verdict.FAILED, _text(report["longrepr"]), finished=True)
        elif kind == "TestReport":
            _add(results.setdefault(nodeid, Result(nodeid)), report)
    return list(results.values())


def settle(results: Iterable[Result], *, cut: bool, end: str) -> None:
    """Give tests that were running when the guest ended their verdict; ``end`` says how that was, in words."""
    for result in results:
        if not result.finished:
            result.finished = True
            result.verdict = Verdict.CUT if cut else Verdict.FAILED
            result.text = result.text if cut else f"the guest {end} during this test\n{result.text}".rstrip()


def _add(result: Result, report: dict[str, Any]) -> None:
    result.seconds += report.get("duration", 0.0)
    result.properties.update({name: str(value) for name, value in report.get("user_properties", ())})
    outcome = report["outcome"]
    if outcome == "failed":
        result.verdict = Verdict.FAILED
        result.text = "\n".join(filter(None, (result.text, _text(report["longrepr"]))))
    elif outcome == "skipped" and result.verdict is not Verdict.FAILED:
        expected = "wasxfail" in report
        result.verdict = Verdict.XFAILED if expected else Verdict.SKIPPED
        result.text = report["wasxfail"] if expected else _text(report["longrepr"])
    result.finished = report["when"] == "teardown"


def _text(longrepr: Any) -> str:  # noqa: ANN401  (what the JSON has)
    """A failure as pytest would show it, or a skip's reason."""
    if longrepr is None or isinstance(longrepr, str):
        return longrepr or ""
    if isinstance(longrepr, list):  # a skip: file, line, reason
        return str(longrepr[-1]).removeprefix("Skipped: ")
    crash = longrepr.get("reprcrash") or {}
    lines = [line for entry in (longrepr.get("reprtraceback") or {}).get("reprentries", ()) for line in _entry(entry)]
    for title, content, _ in longrepr.get("sections", ()):
        lines += [f"--- {title} ---", content.rstrip()]
    return "\n".join(lines) or str(crash.get("message", longrepr))


def _entry(entry: dict[str, Any]) -> list[str]:
    data = entry.get("data") or {}
    place = data.get("reprfileloc") or {}
    where = [f"{place['path']}:{place['lineno']}: {place['message']}"] if place else []
    return [*data.get("lines", ()), *where]


def _lines(path: Path) -> Iterable[dict[str, Any]]:
    if not path.exists():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                yield json.loads(line)
            except ValueError:
                return
