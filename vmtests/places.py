"""Where things are, and how tools are run."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fcntl import LOCK_EX, flock
from pathlib import Path

from erofsgen.errors import ErofsgenError, NotFoundError

REPOSITORY = Path(__file__).resolve().parent.parent
CACHE = REPOSITORY / ".cache"
KERNELS = CACHE / "kernels"
"""A directory for each finished kernel, see :mod:`vmtests.kernels`."""

RUNS = CACHE / "vmtests"
"""What the last run of each kernel left: scratch disks, report logs, console logs."""

CASES = Path("vmtests/cases")
SOURCES = ("erofsgen", "fanotify_daemon", "fscache_daemon", "fusefallback", "tests", "vmtests")
"""Where guests import from, beside what is installed."""


def run(*command: str | Path, cwd: Path | None = None, environment: Mapping[str, str] | None = None) -> str:
    """Run a tool; returns its standard output. Raises ErofsgenError with the last lines it wrote to the other one."""
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            env={**os.environ, "LC_ALL": "C.UTF-8", **(environment or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    except FileNotFoundError:
        raise NotFoundError(f"{command[0]} is not installed", hint="run packaging/setup vm") from None
    if done.returncode:
        complaint = " / ".join((done.stderr or done.stdout).strip().splitlines()[-3:])
        raise ErofsgenError(f"{' '.join(map(str, command[:4]))} … exited with {done.returncode}: {complaint}")
    return done.stdout


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file ``path``; waits for whoever holds it. The kernel lets go of it when its holder dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as lock:
        flock(lock, LOCK_EX)
        yield
