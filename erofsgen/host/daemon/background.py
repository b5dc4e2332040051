"""Programs of ours that go on in the background: the daemon, and servers of mounts."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from erofsgen.errors import ErofsgenError, StorageError

LOG: Final = "daemon.log"
"""What they say, below the root."""
_LOG_LIMIT: Final = 8 << 20
"""Bytes after which the log is begun anew, when one of them starts."""
_START: Final = 60.0
"""Seconds that one has to start in."""


def in_background(root: Path, module: str, *arguments: str, pass_fds: Sequence[int] = ()) -> str:
    """Run ``python -m MODULE``, which forks and goes on, as nobody's child, when it is ready. Returns what it printed.

    Raises the error that it ends with, StorageError where it is not ready in time.
    """
    path = root / LOG
    try:
        log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}") from error
    try:
        if os.fstat(log).st_size > _LOG_LIMIT:
            os.ftruncate(log, 0)
        begin = os.fstat(log).st_size
        ended = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            cwd="/",
            pass_fds=pass_fds,
            timeout=_START,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise StorageError(f"{root}: {module} did not start within {_START:g} s", hint=f"see {path}") from None
    finally:
        os.close(log)
    if ended.returncode:
        raise _reason(module, path, begin, ended.returncode)
    return ended.stdout.decode()


def _reason(module: str, log: Path, begin: int, code: int) -> ErofsgenError:
    """What a program that did not start has said."""
    with log.open("rb") as file:
        file.seek(begin)
        lines = file.read().decode(errors="replace").splitlines()
    said = {kind: line.partition(": ")[2] for line in lines for kind in ("error", "hint") if line.startswith(kind)}
    kinds = {kind.exit_code: kind for kind in ErofsgenError.__subclasses__()}
    return kinds.get(code, StorageError)(
        said.get("error", f"{module} did not start"), hint=said.get("hint", f"see {log}")
    )
