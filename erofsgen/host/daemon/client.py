"""A command's side of the control socket, and the start of a daemon where there is none."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from erofsgen.errors import BusyError, StorageError
from erofsgen.host.daemon import control
from erofsgen.host.daemon.background import LOG, in_background

Progress = Callable[[dict[str, Any]], None]


class Client:
    """One connection to the daemon. Commands follow one another; the last may be :meth:`worker`'s."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lines = connection.makefile("rb")

    @classmethod
    def connect(cls, root: Path) -> Client | None:
        """To the daemon of ``root``, None where none runs. Raises StorageError."""
        connection = control.connect(root)
        return None if connection is None else cls(connection)

    @classmethod
    def start(cls, root: Path, options: Sequence[str] = ()) -> Client:
        """To the daemon of ``root``, which is started where none runs. Raises what kept it from starting."""
        client = cls.connect(root)
        if client is None:
            start(root, options)
            client = cls.connect(root)
        if client is None:
            raise StorageError(f"{root}: the daemon does not answer", hint=f"see {root / LOG}")
        return client

    def call(self, do: str, **arguments: Any) -> dict[str, Any]:  # noqa: ANN401  (what JSON has)
        """Have the supervisor do something; the facts it replies with. Raises the error it replies with."""
        return self._call({"do": do, **arguments}, None)

    def stop(self, *, force: bool = False) -> None:
        """Have the daemon end, and wait until it has. Raises BusyError where lazy mounts need it, unless ``force``."""
        self.call("stop", force=force)
        with suppress(ConnectionError):
            self._lines.readline()  # comes to an end with the process

    def worker(self, do: str, progress: Progress | None = None, **arguments: Any) -> dict[str, Any]:  # noqa: ANN401
        """Have the worker do something. The connection is of no use afterwards."""
        return self._call({"do": "worker", "command": {"do": do, **arguments}}, progress)

    def tell_worker(self, do: str, **arguments: Any) -> None:  # noqa: ANN401
        """Have the worker do something. The connection is of no use afterwards, but for its :meth:`answer`."""
        with suppress(OSError):
            self._connection.sendall(json.dumps({"do": "worker", "command": {"do": do, **arguments}}).encode() + b"\n")

    def answer(self, progress: Progress | None = None) -> dict[str, Any]:
        """The facts that the worker replies with to what it was told. Raises the error it replies with."""
        try:
            for line in self._lines:
                message = json.loads(line)
                if "error" in message:
                    raise control.error_of(message)
                if "ok" in message:
                    facts: dict[str, Any] = message["ok"]
                    return facts
                if progress is not None:
                    progress(message["progress"])
        except OSError as error:
            raise control.no_answer() from error
        raise control.no_answer()

    def close(self) -> None:
        """Hang up."""
        self._lines.close()
        self._connection.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _call(self, command: dict[str, Any], progress: Progress | None) -> dict[str, Any]:
        try:
            self._connection.sendall(json.dumps(command).encode() + b"\n")
        except OSError as error:
            raise control.no_answer() from error
        return self.answer(progress)


def start(root: Path, options: Sequence[str] = ()) -> None:
    """Start a daemon in the background and wait until it answers. Raises what kept it from that."""
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        in_background(root, "erofsgen.host.daemon", "--root", str(root), "--detach", *options)
    except BusyError:
        client = Client.connect(root)
        if client is None:
            raise
        client.close()  # another command has started one in the same moment
