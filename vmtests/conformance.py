"""The conformance table: what each case came to, on every plane, on every kernel.

``docs/conformance.json`` is the record, ``docs/conformance.md`` what people read, always written anew from it. A run of
one kernel replaces that kernel's column and no other. A test is in the table if its user properties name a ``plane``
and a ``case``; ``kernel_fault`` among them says why a failure is the kernel's and not ours.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vmtests.kernels import CATALOGUE
from vmtests.places import REPOSITORY
from vmtests.results import Result, Verdict

RECORD = REPOSITORY / "docs/conformance.json"
PAGE = REPOSITORY / "docs/conformance.md"

Column = dict[str, Any]
"""A kernel's results: ``release``, ``date``, ``virtualisation``, ``seconds``, and ``cells``, a list of cells.

A cell is ``{"plane", "case", "verdict", "reason", "seconds"}`` with a verdict of :data:`SIGNS`.
"""

SIGNS = {"skip": "-", "pass": "pass", "fault": "kernel fault", "fail": "**FAIL**"}
"""How verdicts are written. Where several tests share a cell the last of their verdicts in this order counts."""

_HEAD = """\
# Conformance

Every case on every plane on every kernel that has the plane, as `make vmtest-all` found it; [how to run and extend
it](vmtests.md). This page is written by `vmtests/run`.

**pass**: as it should be. **FAIL**: a bug of ours. **kernel fault**: this kernel cannot do better, the note says why.
**-**: does not apply, the note says why. Empty: not run.
"""


def column(results: Iterable[Result], *, release: str, date: str, virtualisation: str, seconds: float) -> Column:
    """A kernel's column. Tests that are in no cell are left out."""
    cells: dict[tuple[str, str], dict[str, Any]] = {}
    for result in results:
        plane, case = result.properties.get("plane"), result.properties.get("case")
        if plane is None or case is None:
            continue
        verdict, reason = _judge(result)
        cell = cells.setdefault(
            (plane, case), {"plane": plane, "case": case, "verdict": verdict, "reason": reason, "seconds": 0.0}
        )
        cell["seconds"] = round(cell["seconds"] + result.seconds, 1)
        if _rank(verdict) >= _rank(cell["verdict"]):
            cell["verdict"], cell["reason"] = verdict, reason
    return {
        "release": release,
        "date": date,
        "virtualisation": virtualisation,
        "seconds": round(seconds),
        "cells": [cells[key] for key in sorted(cells)],
    }


def record(name: str, new: Column, path: Path = RECORD, page: Path = PAGE, *, amend: bool = False) -> None:
    """Put the column of kernel ``name`` into the record, in place of its last one, and write the page anew.

    ``amend``: cells that are not in ``new`` stay as they are, if they are of the same release.
    """
    columns: dict[str, Column] = json.loads(path.read_text()) if path.exists() else {}
    old = columns.get(name)
    columns[name] = amended(old, new) if amend and old and old["release"] == new["release"] else new
    order = [*CATALOGUE, *sorted(set(columns) - set(CATALOGUE))]
    columns = {known: columns[known] for known in order if known in columns}
    _replace(path, json.dumps(columns, indent=1, ensure_ascii=False) + "\n")
    _replace(page, render(columns))


def amended(old: Column, new: Column) -> Column:
    """``old`` with the cells of ``new``."""
    cells = {(cell["plane"], cell["case"]): cell for column in (old, new) for cell in column["cells"]}
    return {**old, "date": new["date"], "cells": [cells[key] for key in sorted(cells)]}


def render(columns: dict[str, Column]) -> str:
    """The page: the kernels, then a table for each plane, a row for each case and a column for each kernel."""
    notes: dict[str, int] = {}
    parts = [_HEAD, "## Kernels\n", _kernels(columns)]
    cells = {(name, cell["plane"], cell["case"]): cell for name, column in columns.items() for cell in column["cells"]}
    for plane in sorted({plane for _, plane, _ in cells}):
        rows = sorted({case for _, where, case in cells if where == plane})
        lines = [
            "| " + " | ".join(_cell(cells.get((name, plane, case)), notes) for name in columns) + " |" for case in rows
        ]
        table = [f"| case | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
        table += [f"| {case} {line}" for case, line in zip(rows, lines, strict=True)]
        parts += [f"## {plane}\n", "\n".join(table) + "\n"]
    if notes:
        parts += ["## Notes\n", "\n".join(f"{number}. {_plain(note)}" for note, number in notes.items()) + "\n"]
    return "\n".join(parts)


def _judge(result: Result) -> tuple[str, str]:
    fault = result.properties.get("kernel_fault", "")
    if result.verdict in (Verdict.PASSED, Verdict.CUT):
        return "pass", ""
    if result.verdict is Verdict.SKIPPED:
        return ("fault", fault) if fault else ("skip", result.text)
    if fault or result.verdict is Verdict.XFAILED:
        return "fault", fault or result.text
    return "fail", ""


def _rank(verdict: str) -> int:
    return list(SIGNS).index(verdict)


def _kernels(columns: dict[str, Column]) -> str:
    lines = ["| kernel | release | what | run on | guest | seconds |", "|---|---|---|---|---|---|"]
    for name, column in columns.items():
        what = CATALOGUE[name].what if name in CATALOGUE else ""
        values = (name, column["release"], what, column["date"], column["virtualisation"], str(column["seconds"]))
        lines.append(f"| {' | '.join(values)} |")
    return "\n".join(lines) + "\n"


def _cell(cell: dict[str, Any] | None, notes: dict[str, int]) -> str:
    if cell is None:
        return ""
    sign = SIGNS[cell["verdict"]]
    if cell["verdict"] in ("pass", "fail"):
        return sign
    number = notes.setdefault(cell["reason"] or "no reason given", len(notes) + 1)
    return f"{sign} [{number}](#notes)"


def _plain(note: str) -> str:
    """A note in one line that ends no table and no list."""
    return " ".join(note.split())


def _replace(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
