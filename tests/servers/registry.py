"""Debian's docker-registry on loopback."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from servers.process import daemon, free_port, wait_for_port

USER, PASSWORD = "tester", "pw"
_HTPASSWD = "$2y$05$abcdefghijklmnopqrstuuHIrMEWpUCQe2YqFR3sXwQ75u4od..9q"
"""bcrypt of PASSWORD."""


@contextlib.contextmanager
def docker_registry(
    root: Path, *, password: bool = False, certificate: tuple[Path, Path] | None = None
) -> Iterator[str]:
    """Debian's docker-registry with its files below ``root``: its ``HOST:PORT``.

    ``password`` asks everybody for USER and PASSWORD; ``certificate`` (certificate, key) makes it speak TLS.
    """
    root.mkdir(parents=True, exist_ok=True)
    port = free_port()
    config: dict[str, Any] = {
        "version": 0.1,
        "log": {"level": "warn", "accesslog": {"disabled": True}},
        "storage": {"filesystem": {"rootdirectory": str(root / "data")}, "delete": {"enabled": True}},
        "http": {"addr": f"127.0.0.1:{port}"},
    }
    if password:
        (root / "htpasswd").write_text(f"{USER}:{_HTPASSWD}\n")
        config["auth"] = {"htpasswd": {"realm": "tests", "path": str(root / "htpasswd")}}
    if certificate:
        config["http"]["tls"] = {"certificate": str(certificate[0]), "key": str(certificate[1])}
    (root / "config.yml").write_text(json.dumps(config))  # JSON is YAML
    log = root / "log"
    with daemon(["docker-registry", "serve", root / "config.yml"], log) as process:
        wait_for_port(process, port, log)
        yield f"localhost:{port}"


def make_certificate(directory: Path) -> tuple[Path, Path]:
    """A self-signed certificate for localhost, and its key."""
    certificate, key = directory / "server.crt", directory / "server.key"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1",
         "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    return certificate, key
