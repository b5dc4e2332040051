"""Whom TLS trusts: the system's authorities, and ``certs.d`` as podman and Docker have it."""

from __future__ import annotations

import os
import ssl
from pathlib import Path

from erofsgen.errors import RemoteError

CERTS_DIRS: tuple[Path, ...] = (
    Path("~/.config/containers/certs.d"),
    Path("/etc/containers/certs.d"),
    Path("/etc/docker/certs.d"),
)
"""Where ``HOST[:PORT]/*.crt`` are a registry's authorities and ``*.cert`` with ``*.key`` are shown to it."""


def tls_context(registry: str | None, *, verify: bool) -> ssl.SSLContext:
    """For ``registry`` (``HOST[:PORT]``), or for servers that have no certificates of their own here."""
    context = ssl.create_default_context()
    paths = ssl.get_default_verify_paths()
    if not paths.cafile and not (paths.capath and os.listdir(paths.capath)):
        import certifi  # a system without authorities of its own, such as a bare container

        context.load_verify_locations(certifi.where())
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    for directory in CERTS_DIRS if registry else ():
        _load_certs(context, directory.expanduser() / str(registry))
    return context


def _load_certs(context: ssl.SSLContext, directory: Path) -> None:
    try:
        names = sorted(os.listdir(directory))
        for name in names:
            if name.endswith(".crt"):
                context.load_verify_locations(directory / name)
            elif name.endswith(".cert"):
                context.load_cert_chain(directory / name, directory / f"{name[:-5]}.key")
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise RemoteError(f"cannot load the certificates in {directory}: {error.strerror or error}") from error
