"""Debian's nginx on loopback, with every file it writes below one directory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from servers.process import daemon, free_port, wait_for_port

_CONFIG = """\
{user}
daemon off;
worker_processes 1;
pid nginx.pid;
error_log stderr warn;
events {{ worker_connections 512; }}
http {{
access_log off;
default_type application/octet-stream;
client_body_temp_path body;
proxy_temp_path proxy;
fastcgi_temp_path fastcgi;
uwsgi_temp_path uwsgi;
scgi_temp_path scgi;
{http}
}}
"""


@dataclass(frozen=True)
class StaticServer:
    """A web server and the directory it serves."""

    url: str
    """``http://127.0.0.1:PORT``."""
    directory: Path


@contextlib.contextmanager
def nginx(prefix: Path, http: Callable[[int], str]) -> Iterator[str]:
    """nginx whose ``http { }`` block holds what ``http`` says for a port: its ``http://127.0.0.1:PORT``.

    ``prefix`` is where relative paths in the configuration begin; nginx writes nowhere else.
    """
    prefix.mkdir(parents=True, exist_ok=True)
    port = free_port()
    # Workers of a root nginx would be nobody, who may not look into a test's directory.
    user = "user root root;" if os.geteuid() == 0 else ""
    config, log = prefix / "nginx.conf", prefix / "log"
    config.write_text(_CONFIG.format(user=user, http=http(port)))
    with daemon(["nginx", "-p", prefix, "-c", config, "-e", "stderr"], log) as process:
        wait_for_port(process, port, log)
        yield f"http://127.0.0.1:{port}"


def static_files(directory: Path) -> Callable[[int], str]:
    """For :func:`nginx`: serve the files below ``directory``, list none."""

    def http(port: int) -> str:
        return f"server {{ listen 127.0.0.1:{port}; root {directory}; autoindex off; }}"

    return http
