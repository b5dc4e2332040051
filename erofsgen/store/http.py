"""A store that a web server or a CDN serves: files of a directory store, or objects of an object store. Read only.

``http[s]://HOST[:PORT][/PATH][?tls-verify=false]``. Servers that ask for a password get what ``~/.netrc`` has for them.
Web servers do not list: an object store's references are found by name only.
"""

from __future__ import annotations

import netrc
import os
import string
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from urllib.parse import quote, urlsplit

from erofsgen.errors import NotFoundError, UnsupportedError, UsageError
from erofsgen.oci.basic import basic
from erofsgen.oci.patience import Policy
from erofsgen.oci.tls import tls_context
from erofsgen.store import keys, layout
from erofsgen.store.base import DESCRIPTOR_LIMIT, BlobWriter, Descriptor, Speed, Store, scratch
from erofsgen.store.documents import Documents
from erofsgen.store.manifest import MANIFEST_LIMIT
from erofsgen.store.transport import Locate, Location, Transport


class HttpStore(Store):
    """The store below ``url``, which has no query. Raises UsageError."""

    def __init__(
        self, url: str, *, policy: Policy | None = None, tls_verify: bool = True, proxy: str | None = None
    ) -> None:
        self.url = url
        self.scratch = scratch(url)
        self._base = quote(url.rstrip("/"), safe=string.punctuation) + "/"
        self._headers = _credentials(_host(url))
        self._documents = Documents()
        tls = tls_context(None, verify=tls_verify) if url.startswith("https:") else None
        self._transport = Transport(policy=policy, tls=tls, proxy=proxy)
        self._lists: bool | None = None
        """Whether there is an index of all references, as far as that is known."""

    @property
    def speed(self) -> Speed | None:  # type: ignore[override]
        return self._transport.speed

    def size(self, digest: str) -> int | None:
        return self._transport.size(self._locate(keys.blob(digest)), f"blob {digest}")

    def read_into(self, digest: str, offset: int, buffer: memoryview) -> None:
        if not self._documents.read_into(digest, offset, buffer):
            self._transport.read_into(self._locate(keys.blob(digest)), offset, buffer, f"blob {digest}")

    def references(self) -> dict[str, Descriptor]:
        return layout.images(self._index())

    def reference(self, name: str) -> Descriptor | None:
        with suppress(UnsupportedError):
            return self.references().get(name)
        return None if keys.profiled(name) else self._meaning(name)

    def profiled(self) -> set[str]:
        return keys.images_profiled(layout.references(self._index()))

    def profiles(self, image: str) -> Descriptor | None:
        if self._lists is not False:  # who looks has opened the image before, and knows
            with suppress(UnsupportedError):
                return layout.references(self._index()).get(keys.profiles(image))
        return self._meaning(keys.profiles(image))

    def _index(self) -> layout.Index:
        try:
            data = self._transport.get(self._locate(keys.INDEX), MANIFEST_LIMIT, keys.INDEX)
        except NotFoundError:
            self._lists = False
            raise UnsupportedError(
                f"{self.url}: this server does not list images", hint="name one that is there"
            ) from None
        self._lists = True
        return layout.parse(data, what=f"{self._base}{keys.INDEX}")

    def _meaning(self, name: str) -> Descriptor | None:
        try:
            data = self._transport.get(self._locate(keys.reference(name)), DESCRIPTOR_LIMIT, f"image {name!r}")
        except NotFoundError:
            return None
        return self._documents.parse(data, f"{self._base}{keys.reference(name)}")

    def blobs(self) -> Iterator[tuple[str, int]]:
        raise self._cannot("does not list blobs")

    def record(self, key: str) -> bytes | None:  # noqa: ARG002
        return None

    def records(self) -> Iterator[str]:
        return iter(())

    def create(self, *, digest: str | None = None, size: int | None = None) -> BlobWriter:  # noqa: ARG002
        raise self._cannot("cannot be written to")

    def delete(self, digest: str) -> None:  # noqa: ARG002
        raise self._cannot("cannot be written to")

    def tag(self, name: str, manifest: Descriptor) -> None:  # noqa: ARG002
        raise self._cannot("cannot be written to")

    def untag(self, name: str) -> None:  # noqa: ARG002
        raise self._cannot("cannot be written to")

    def put_record(self, key: str, data: bytes) -> None:  # noqa: ARG002
        raise self._cannot("cannot be written to")

    def delete_record(self, key: str) -> None:  # noqa: ARG002
        raise self._cannot("cannot be written to")

    def building(self) -> AbstractContextManager[None]:
        raise self._cannot("cannot be written to")

    def collecting(self, *, wait: float = 0.0) -> AbstractContextManager[None]:  # noqa: ARG002
        raise self._cannot("cannot be written to")

    def doubt(self) -> None:
        self._transport.doubt()

    def close(self) -> None:
        self._transport.close()

    def _locate(self, key: str) -> Locate:
        location = Location(self._base + quote(key), self._headers)
        return lambda _refusal: location

    def _cannot(self, what: str) -> UnsupportedError:
        return UnsupportedError(f"{self.url}: a web server {what}", hint="name the store that it serves")


def _host(url: str) -> str:
    """The host of a URL that is one. Raises UsageError."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        host = None
    if not host:
        raise UsageError(f"{url}: not a URL", hint="http://HOST[:PORT]/PATH")
    if "@" in parts.netloc:  # a store's name is shown, and kept in files that others may read
        raise UsageError(f"{host}: a store's URL has no password in it", hint="put it into ~/.netrc")
    return host


def _credentials(host: str) -> Mapping[str, str]:
    """The header for what ``~/.netrc`` says of ``host``, if it says anything."""
    try:
        found = netrc.netrc(os.environ.get("NETRC")).authenticators(host)
    except (OSError, UnicodeError, netrc.NetrcParseError):
        return {}
    if found is None:
        return {}
    login, _, password = found
    return {"Authorization": basic(login, password)}
