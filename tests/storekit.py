"""Places for stores that tests write to, and clients of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from servers.s3 import S3Server

from erofsgen.oci.patience import Policy
from erofsgen.store.base import Descriptor, Store
from erofsgen.store.locks import Times
from erofsgen.store.manifest import MANIFEST_TYPE
from erofsgen.store.open import Options, open_store

TIMES = Times(poll=0.02)
"""Tests do not want to wait for the next look at a lock."""

ODD_NAMES = (
    "docker.io/library/python:3.11",
    "größe/漢字:ü",
    "a b",
    "a%2Fb",
    "a?b&c=d+e#f",
    "x" * 200,
    "..",
    "-",
    "'\"",
)


@dataclass
class Place:
    """Where one test's store is. Every ``open`` is a client of its own; all are closed when the test ends."""

    url: str
    names: tuple[str, ...] = ODD_NAMES
    """What an image can be called there."""
    opener: Callable[..., Store] = lambda url: open_store(url, create=True)
    opened: list[Store] = field(default_factory=list)

    def open(self, options: str = "", **how: object) -> Store:
        """The store, with more of what stands behind its URL's ``?``."""
        joint = "" if not options else "&" if "?" in self.url else "?"
        self.opened.append(self.opener(f"{self.url}{joint}{options}", **how))
        return self.opened[-1]

    def close(self) -> None:
        for store in self.opened:
            store.close()


def s3_place(server: S3Server, monkeypatch: pytest.MonkeyPatch, options: str = "") -> Place:
    """Below a prefix of a new bucket, for whoever takes what he needs from the environment."""
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    return Place(f"s3://{server.bucket()}/some/where{options}", opener=open_s3)


def open_s3(url: str, *, times: Times = TIMES, attempts: int = 3, proxy: str | None = None) -> Store:
    """The store at ``url``, by one who is in a hurry."""
    from erofsgen.store import s3  # boto3 takes half a second, which most test runs need not spend

    place, _, query = url.partition("?")
    options, policy = Options(url, query), Policy(attempts=attempts, backoff=0.01)
    store = s3.open_s3(place, options, policy=policy, create=True, times=times, proxy=proxy)
    options.done()
    return store


def sha256(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def named(number: int) -> Descriptor:
    """A manifest's descriptor, one for each number."""
    return Descriptor(MANIFEST_TYPE, sha256(b"%d" % number), number, {"org.example.number": str(number)})
