"""Runs a command of ours and has what it starts recorded in full."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from erofsgen.errors import BusyError, NotFoundError, UsageError
from erofsgen.host.daemon.client import Client
from erofsgen.host.prefetch.start import RECORD
from erofsgen.store.open import absolute


class Recorded(NamedTuple):
    """How the command ended, and facts of what was recorded: ``image`` (the manifest's digest), ``command``,
    ``touches``, ``waited`` (seconds), ``chunks``, ``bytes``, ``runs``, ``complete``."""

    exit_code: int
    recordings: list[dict[str, Any]]


def record(command: Sequence[str], *, root: Path, store: str, name: str | None = None) -> Recorded:
    """Run ``command``, which starts containers or mounts of ``root``, and take in what they touched until they ended.

    Unless it says otherwise, it takes images from ``store``.

    ``name``: of their profiles, by default each one's command. What the command leaves mounted goes on being recorded.
    Raises NotFoundError (no such program), BusyError (the daemon is gone), UsageError (no name).
    """
    if name is not None and not name.isprintable():
        raise UsageError(f"{name!r} is no name of a profile")
    token = secrets.token_hex(8)
    places = {"EROFSGEN_ROOT": os.fspath(root.absolute()), "EROFSGEN_STORE": absolute(store)}
    environment = {**os.environ, **places, RECORD: token if name is None else f"{token}:{name}"}
    try:
        process = subprocess.Popen(command, env=environment)
    except OSError as error:
        raise NotFoundError(f"{command[0]}: {error.strerror}") from None
    before = signal.signal(signal.SIGTERM, lambda number, _: process.send_signal(number))
    try:
        while True:
            try:
                code = process.wait()
                break
            except KeyboardInterrupt:  # it got the signal as well, and says how it ends
                continue
    finally:
        signal.signal(signal.SIGTERM, before)
    client = Client.connect(root)
    if client is None:
        raise BusyError(f"{root}: no daemon is running that has recorded anything", hint="record a lazy start")
    with client:
        found = client.worker("take in", token=token)["recordings"]
    return Recorded(code if code >= 0 else 128 - code, found)
