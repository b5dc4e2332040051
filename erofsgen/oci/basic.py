"""A user name and a password, as HTTP servers and proxies want to see them (RFC 7617)."""

from __future__ import annotations

from base64 import b64encode


def basic(user: str | None, password: str | None) -> str:
    """The value of an ``Authorization`` or ``Proxy-Authorization`` header."""
    return "Basic " + b64encode(f"{user}:{password}".encode()).decode()
