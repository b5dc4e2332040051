"""containerd as a host has it, with its files below one directory: images pulled and unpacked, containers run.

An image is pulled as kubelet has it pulled, through the CRI: layers are unpacked while others still arrive, which
``ctr images pull`` does one after the other. The CRI is spoken by curl, since Debian 12 has no ``crictl``.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

from hostkit import unmount_below

PROGRAMS = ("containerd", "ctr", "containerd-shim-runc-v2", "runc")
_PATIENCE = 30.0

_CONFIG = """\
version = 2
root = "{place}/root"
state = "{place}/state"
[grpc]
address = "{socket}"
[plugins."io.containerd.grpc.v1.cri"]
restrict_oom_score_adj = true
"""


class Containerd:
    """A daemon with nothing in it; afterwards no process of it runs, nothing is mounted and no file is left."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self._socket = place / "socket"

    def __enter__(self) -> Self:
        self._place.mkdir(parents=True)
        config = self._place / "config.toml"
        config.write_text(_CONFIG.format(place=self._place, socket=self._socket))
        with open(self._place / "log", "wb") as log:
            self._process = subprocess.Popen(["containerd", "--config", config], stdout=log, stderr=log)
        until = time.monotonic() + _PATIENCE
        while self._ctr("version").returncode:
            if self._process.poll() is not None or time.monotonic() > until:
                said = (self._place / "log").read_text(errors="replace")
                self.__exit__()
                raise SystemExit(f"bench: containerd does not answer: {said[-2000:]}")
            time.sleep(0.05)
        return self

    def __exit__(self, *exc: object) -> None:
        for pid in self._shims():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        self._process.terminate()
        try:
            self._process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        unmount_below(self._place)
        shutil.rmtree(self._place, ignore_errors=True)

    def pull(self, reference: str) -> None:
        """Have the image unpacked on this host: ImageService.PullImage of k8s.io/cri-api, ``runtime.v1``.

        gRPC is a POST over HTTP/2: a byte 0, the message's length in four, the message, and a status in a trailer.
        The message is PullImageRequest{1: ImageSpec{1: reference}}.
        """
        message = _field(1, _field(1, reference.encode()))
        answer = subprocess.run(
            [
                "curl", "--silent", "--show-error", "--include", "--http2-prior-knowledge",
                "--unix-socket", self._socket, "--header", "content-type: application/grpc", "--header", "te: trailers",
                "--data-binary", "@-", "http://localhost/runtime.v1.ImageService/PullImage",
            ],
            input=b"\0" + len(message).to_bytes(4, "big") + message, capture_output=True, check=False,
        )  # fmt: skip
        if answer.returncode or b"grpc-status: 0" not in answer.stdout:
            said = (answer.stderr + answer.stdout).decode(errors="replace").strip()
            raise SystemExit(f"bench: containerd could not pull {reference}: {said}")

    def run(self, reference: str, command: Sequence[str], environment: Sequence[str]) -> list[str]:
        """The command that runs a container in the foreground, on this host's network; it passes signals on."""
        given = [word for variable in environment for word in ("--env", variable)]
        return [*self._command(), "run", "--rm", "--net-host", *given, reference, "bench", *command]

    def _command(self) -> list[str]:
        return ["ctr", "--address", os.fspath(self._socket), "--namespace", "k8s.io"]

    def _ctr(self, *arguments: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run([*self._command(), *arguments], capture_output=True, check=False)

    def _shims(self) -> list[int]:
        """Processes that look after containers of this daemon, if any is left."""
        found = []
        for pid in filter(str.isdecimal, os.listdir("/proc")):
            with suppress(OSError):  # it may have gone
                arguments = Path("/proc", pid, "cmdline").read_bytes().split(b"\0")
                if b"shim" in arguments[0] and os.fsencode(self._socket) in arguments:
                    found.append(int(pid))
        return found


def _field(number: int, data: bytes) -> bytes:
    """A length-delimited field of a protobuf message."""
    length, encoded = len(data), b""
    while length > 0x7F:
        encoded += bytes([length & 0x7F | 0x80])
        length >>= 7
    return bytes([number << 3 | 2]) + encoded + bytes([length]) + data
