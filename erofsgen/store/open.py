"""From what the user calls a store to the store.

::

    /a/directory                                an OCI image layout
    s3://BUCKET[/PREFIX][?OPTIONS]              objects in S3 or what speaks its protocol
    docker://HOST[:PORT]/REPOSITORY[?OPTIONS]   a repository of a registry; names are its tags
    http[s]://HOST[:PORT][/PATH]                a store that somebody serves; read only

Each kind's module says what its options are. What opens a kind is imported when one is opened.
"""

from __future__ import annotations

import os
from dataclasses import replace
from urllib.parse import parse_qsl

from erofsgen.errors import UsageError
from erofsgen.store.base import Store


def absolute(url: str) -> str:
    """A store's name that means the same in every working directory."""
    return url if "://" in url else os.path.abspath(url)


def open_store(
    url: str,
    *,
    create: bool = False,
    attempts: int | None = None,
    timeout: float | None = None,
    proxy: str | None = None,
) -> Store:
    """The store at ``url``; its directory or bucket is made where it is missing and ``create`` is set.

    ``attempts``: how often a request is made in all when failures may pass; by default as often as a user at a terminal
    would wait for, 1 for who has other tiers. ``timeout``: seconds of silence that break a connection. ``proxy``
    (``http://HOST:PORT``): asked for ranges of blobs, and may keep them.

    Raises NotFoundError, UsageError, UnsupportedError, StorageError, RemoteError.
    """
    scheme, separator, _ = url.partition("://")
    if not separator:
        from erofsgen.store.directory import DirectoryStore

        return DirectoryStore(url, create=create)
    from erofsgen.oci.patience import Policy

    policy = Policy() if attempts is None else Policy(attempts=attempts)
    if timeout is not None:
        policy = replace(policy, connect_timeout=min(timeout, policy.connect_timeout), read_timeout=timeout)
    place, _, query = url.partition("?")
    options = Options(url, query)
    match scheme:
        case "docker":
            from erofsgen.store.registry import RegistryStore

            store: Store = RegistryStore(
                place,
                policy=policy,
                tls_verify=options.flag("tls-verify", default=True),
                authfile=options.text("authfile"),
                proxy=proxy,
            )
        case "http" | "https":
            from erofsgen.store.http import HttpStore

            tls_verify = options.flag("tls-verify", default=True)
            store = HttpStore(place, policy=policy, tls_verify=tls_verify, proxy=proxy)
        case "s3":
            from erofsgen.store.s3 import open_s3

            store = open_s3(place, options, policy=policy, create=create, proxy=proxy)
        case _:
            raise UsageError(f"{url}: there are no {scheme} stores", hint="s3, docker, http, https, or a directory")
    store.url = url
    options.done()
    return store


class Options:
    """What stands behind the ``?`` of a store's URL. Each is asked for once, then :meth:`done` finds what is left."""

    def __init__(self, url: str, query: str) -> None:
        self._url = url
        self._left = dict(parse_qsl(query, keep_blank_values=True))

    def text(self, name: str) -> str | None:
        """An option's value, None where it is not given."""
        return self._left.pop(name, None)

    def flag(self, name: str, *, default: bool = False) -> bool:
        """An option that is true or false. Raises UsageError."""
        value = self._left.pop(name, None)
        if value not in (None, "", "true", "false"):
            raise UsageError(f"{self._url}: {name} is true or false, not {value!r}")
        return default if value is None else value != "false"

    def done(self) -> None:
        """Raises UsageError for options that nobody asked for."""
        if self._left:
            raise UsageError(f"{self._url}: unknown option {next(iter(self._left))!r}")
