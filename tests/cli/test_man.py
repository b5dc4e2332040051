"""The manual pages in packaging/man are what the command line says today."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = REPOSITORY / "packaging" / "man"


def test_pages_are_fresh(tmp_path: Path):
    subprocess.run([sys.executable, REPOSITORY / "packaging" / "man.py", tmp_path], check=True)
    fresh = {page.name: page.read_text() for page in tmp_path.iterdir()}
    kept = {page.name: page.read_text() for page in PAGES.iterdir()}
    assert kept == fresh, "run `python packaging/man.py`"


@pytest.mark.skipif(not shutil.which("groff"), reason="groff is not installed")
@pytest.mark.parametrize("page", sorted(PAGES.iterdir()), ids=lambda page: page.name)
def test_pages_are_well_formed(page: Path):
    result = subprocess.run(["groff", "-man", "-ww", "-Tutf8", page], capture_output=True)
    assert result.stderr == b""
    assert result.stdout.startswith(page.stem.upper().encode())
