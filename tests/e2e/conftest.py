"""What the demo image's tree has to look like."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from samples import whole_tree


@pytest.fixture(scope="session")
def expected(umoci_unpacked: Path) -> dict[bytes, tuple[Any, ...]]:
    """All of the tree that umoci unpacks."""
    return whole_tree(umoci_unpacked)
