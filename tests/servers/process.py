"""Daemons of the tests: free ports, waiting until one answers, stopping it by its own pid."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest


def free_port() -> int:
    """A loopback TCP port that nobody listens on, below those that the kernel gives to outgoing connections.

    Between this call and the daemon's own bind nobody but another test run's daemon can take it: of the two processes
    of one run, one has the even numbers.
    """
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    while True:
        port = random.randrange(20000 + number % 2, 32768, 2)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


@contextlib.contextmanager
def daemon(command: Sequence[str | Path], log: Path, *, stop_within: float = 10) -> Iterator[subprocess.Popen[bytes]]:
    """A process in the foreground that writes to ``log`` and is gone afterwards, ``stop_within`` seconds at most."""
    with open(log, "ab") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(stop_within)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_for_port(process: subprocess.Popen[bytes], port: int, log: Path, timeout: float = 10) -> None:
    """Return as soon as ``process`` takes connections on ``port``; otherwise fail the test with its log."""
    deadline = time.monotonic() + timeout
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.02)
    pytest.fail(f"{process.args!r} does not answer on port {port}:\n{log.read_text(errors='replace')[-4000:]}")
