"""A start from its first run to an optimized image: record, replay, guess, optimize, with real containers."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from erofsgen import errors
from erofsgen.host.daemon.client import Client
from erofsgen.profile import beside
from erofsgen.store.directory import DirectoryStore
from erofsgen.store.image import Image

from .conftest import PROGRAM, Erofsgen

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(not shutil.which("runc"), reason="no OCI runtime is installed"),
]

COMMAND = ["python3", "-c", "import numpy; print(numpy.arange(3).sum())"]


@pytest.fixture
def host(demo_store: DirectoryStore, tmp_path: Path, require_root: None, capfdbinary) -> Erofsgen:
    """The program with a copy of the demo image's store and an empty cache."""
    shutil.copytree(demo_store.path, tmp_path / "store", copy_function=os.link)
    return Erofsgen(tmp_path / "store", tmp_path / "host", capfdbinary)


def prefetched(host: Erofsgen) -> dict[str, dict[str, int]]:
    """What was prefetched for which reason, once all that was recorded is taken in."""
    for do in ("take in", "status"):
        client = Client.connect(host.root)
        assert client is not None
        with client:
            facts = client.worker(do, token="")
    reasons: dict[str, dict[str, int]] = facts["prefetch"]["reasons"]
    return reasons


def start(host: Erofsgen, name: str, *options: str) -> None:
    process = host.process("--quiet", "run", *options, name, *COMMAND)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, b"3\n", b"")


def test_a_start_is_recorded_replayed_and_optimized(host: Erofsgen):
    run = [PROGRAM, "--quiet", "run", "demo", *COMMAND]
    process = host.process("profile", "record", "--json", "--name", "sum", "--", *run)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert out.startswith(b"3\n")
    store = DirectoryStore(host.store)
    image = Image.open(store, "demo")
    recorded = {profile.command: profile for profile in beside.load(store, image.digest)}["sum"]
    assert recorded.runs == 1
    assert 5 << 20 < recorded.size < 100 << 20

    host("cache", "clear")
    start(host, "demo", "--profile", "sum", "--prefetch", "profile")
    brought = prefetched(host)
    assert brought.keys() == {"recorded"}
    assert brought["recorded"]["used_bytes"] >= 0.9 * brought["recorded"]["judged_bytes"] > 0
    shown = host("profile", "show", "demo", "--command", "sum").out
    assert b"numpy" in shown

    host("optimize", "demo", "--as", "hot", "--command", "sum")
    hot = Image.open(store, "hot")
    assert [pack.hot is not None for pack in hot.packs].count(True) == 1
    host("cache", "clear")
    start(host, "hot", "--profile", "sum", "--prefetch", "profile")
    after = prefetched(host)["recorded"]
    hot_size = next(pack.device_size for pack in hot.packs if pack.hot is not None)
    assert after["bytes"] - brought["recorded"]["bytes"] <= hot_size + (4 << 20)


def test_a_start_never_seen_is_guessed(host: Erofsgen):
    """The command is none that the builder could guess for."""
    start(host, "demo", "--prefetch", "heuristics")
    brought = prefetched(host)
    assert brought
    assert sum(reason["used_bytes"] for reason in brought.values()) > 0


def test_recording_without_a_daemon(host: Erofsgen):
    outcome = host.any("profile", "record", "--", "true")
    assert outcome.code == errors.BusyError.exit_code
    assert "no daemon" in outcome.err
