"""packaging/nginx/az-cache.conf as an operator would have edited it, on loopback."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from servers.nginx import nginx

TEMPLATE = Path(__file__).resolve().parents[2] / "packaging" / "nginx" / "az-cache.conf"


@contextlib.contextmanager
def az_cache(place: Path, origin: str) -> Iterator[str]:
    """A cache in front of ``origin`` (``http://HOST:PORT``) that keeps things below ``place``: its own URL."""
    netloc = urlsplit(origin).netloc

    def http(port: int) -> str:
        text = TEMPLATE.read_text()
        for line, edited in (
            ("server origin.example.com:443;", f"server {netloc};"),
            ("default              origin.example.com;", f"default {netloc};"),
            ("/var/cache/nginx/erofsgen", f"{place}/cache"),
            ("listen 8080;", f"listen 127.0.0.1:{port};"),
            ("set $erofsgen_scheme https;", "set $erofsgen_scheme http;"),
        ):
            assert text.count(line) == 1, line
            text = text.replace(line, edited)
        return text

    place.mkdir()
    with nginx(place / "nginx", http) as url:
        yield url
