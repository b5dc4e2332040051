"""Style, types, import contracts and shell scripts, as test cases: a slip fails the suite like any other bug."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
TOOLS = Path(sys.executable).parent
PACKAGES = ["erofsgen", "fanotify_daemon", "fscache_daemon", "fusefallback", "vmtests"]
PYTHON_DIRECTORIES = [*PACKAGES, "tests", "bench", "examples"]
SHELL_SCRIPTS = sorted(
    str(path.relative_to(REPOSITORY))
    for directory in (".ci", "packaging", "vmtests")
    for path in (REPOSITORY / directory).rglob("*")
    if path.is_file() and path.read_bytes().startswith(b"#!/usr/bin/env bash\n")
)


def check(*command: str | Path) -> None:
    result = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode:
        pytest.fail(result.stdout, pytrace=False)


def test_ruff_finds_nothing():
    check(TOOLS / "ruff", "check", "--quiet", *PYTHON_DIRECTORIES)


def test_code_is_formatted():
    check(TOOLS / "ruff", "format", "--check", *PYTHON_DIRECTORIES)


def test_types():
    check(TOOLS / "mypy", *(word for package in PACKAGES for word in ("-p", package)))


def test_imports_point_one_way():
    check(TOOLS / "lint-imports")


def test_there_are_shell_scripts():
    assert {".ci/run", "packaging/setup", "packaging/clean", "vmtests/run"} <= set(SHELL_SCRIPTS)


@pytest.mark.parametrize("script", SHELL_SCRIPTS)
def test_shell_scripts(script):
    check("bash", "-n", script)
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    check("shellcheck", script)
