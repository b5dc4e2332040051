"""One repository of a registry, read and written after the OCI distribution specification 1.1.

:class:`RegistryClient` finds the API, answers challenges and tells what went wrong. Plain HTTP is used only within this
machine, or where the user gave up TLS verification.
"""

from __future__ import annotations

import hashlib
import re
import ssl
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Final, TypeVar

import httpx

from erofsgen.errors import ErofsgenError, IntegrityError, NotFoundError, RemoteError
from erofsgen.oci.auth import Credentials, find_credentials
from erofsgen.oci.bearer import Authorizer, login_hint
from erofsgen.oci.httpclient import Body, HttpClient, failure, origin
from erofsgen.oci.manifest import (
    DOCUMENT_LIMIT,
    FOREIGN_TYPES,
    INDEX_TYPES,
    MANIFEST_TYPES,
    Descriptor,
    parse,
)
from erofsgen.oci.patience import Policy, Transient, patiently
from erofsgen.oci.reference import Reference, is_digest, is_loopback

T = TypeVar("T")

ACCEPT: Final = ", ".join(sorted(INDEX_TYPES | MANIFEST_TYPES))
"""What to say that one understands when one asks for a manifest."""
_FOUND: Final = frozenset({200, 206, 416})
_PAGES: Final = 10_000
"""Pages of a list at most."""
_EXPIRED: Final = re.compile(r"expir", re.IGNORECASE)
"""Some registries answer 400 or 403 instead of 401 when a token is too old, and storage services when a link is."""


class RegistryClient:
    """Speaks for one repository of one registry. Thread-safe.

    Paths are relative to the repository, ``blobs/sha256:…``; ``what`` is what one is called in messages.
    """

    def __init__(
        self,
        reference: Reference,
        *,
        tls_verify: bool = True,
        authfile: str | None = None,
        policy: Policy | None = None,
    ) -> None:
        self.http = HttpClient(reference.host, tls_verify=tls_verify, policy=policy)
        self._reference = reference
        self._tls_verify = tls_verify
        self._base: httpx.URL | None = None
        self._base_lock = threading.Lock()
        self._logged_in = False

        def credentials() -> Credentials | None:
            found = find_credentials(reference.registry, reference.repository, authfile)
            self._logged_in = found is not None
            return found

        self._authorizer = Authorizer(reference.registry, reference.repository, self.http, credentials)

    def manifest(self, name: str) -> tuple[Descriptor, bytes]:
        """A manifest or an index, by tag or digest, with its descriptor.

        Raises NotFoundError, RemoteError, IntegrityError, FormatError, UnsupportedError.
        """
        what = f"manifest {name} of {self._reference.repository}"
        data, response = self._read(f"manifests/{name}", what, {"Accept": ACCEPT})
        algorithm = name.partition(":")[0] if is_digest(name) else "sha256"
        digest = f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}"
        claimed = name if is_digest(name) else response.headers.get("Docker-Content-Digest", "")
        if claimed.startswith(f"{algorithm}:") and claimed != digest:
            raise IntegrityError(f"{what} does not have its digest: the content was changed or damaged")
        media_type, _ = parse(data, response.headers.get("Content-Type", ""), what)
        return Descriptor(media_type=media_type, digest=digest, size=len(data)), data

    def document(self, blob: Descriptor) -> bytes:
        """A small blob, not verified: a manifest by digest, or a config."""
        what = f"blob {blob.digest} of {self._reference.repository}"
        if blob.media_type in INDEX_TYPES | MANIFEST_TYPES:
            return self._read(f"manifests/{blob.digest}", what, {"Accept": ACCEPT})[0]
        return self._read(f"blobs/{blob.digest}", what, {})[0]

    @contextmanager
    def open_blob(self, blob: Descriptor, start: int) -> Iterator[httpx.Response]:
        """A blob's bytes from ``start`` on, in one attempt; the server may ignore ``start``.

        A foreign layer is looked for at its own addresses first. Raises Transient, NotFoundError, RemoteError.
        """
        what = f"blob {blob.digest} of {self._reference.repository}"
        headers = {"Range": f"bytes={start}-"} if start else {}
        failed: list[Exception] = []
        with ExitStack() as stack:
            for url in (blob.urls or ()) if blob.media_type in FOREIGN_TYPES else ():
                try:
                    response = stack.enter_context(self._elsewhere(url, what, headers))
                except (Transient, ErofsgenError) as error:
                    failed.append(error)
                    continue
                yield response
                return
            try:
                response = stack.enter_context(self.request("GET", f"blobs/{blob.digest}", what, headers))
            except NotFoundError:
                if not failed:
                    raise
                raise next((error for error in failed if isinstance(error, Transient)), failed[0]) from None
            yield response

    def pages(self, path: str, what: str) -> Iterator[tuple[bytes, httpx.Response]]:
        """The pages of a list, each with the head of its response. Raises NotFoundError, RemoteError."""
        page: str | httpx.URL = path
        for _ in range(_PAGES):
            data, response = self._read(page, what, {})
            yield data, response
            following = response.links.get("next", {}).get("url")
            if not following:
                return
            page = self.http.join(response.url, following)
        raise RemoteError(f"{self._reference.host} sends {what} without end")

    def upload(self, digest: str, body: Body) -> None:
        """Write a blob. The registry shows it when it is whole and has its digest. Raises RemoteError."""
        what = f"upload of blob {digest} to {self._reference.repository}"
        self._patiently(lambda: self._upload(digest, body, what))

    def put_manifest(self, name: str, media_type: str, data: bytes) -> httpx.Headers:
        """Let a tag mean this manifest or index. What the registry says. Raises RemoteError."""

        def attempt() -> httpx.Headers:
            body = Body(len(data), lambda: [data])
            what = f"manifest {name} of {self._reference.repository}"
            headers = {"Content-Type": media_type}
            with self.request("PUT", f"manifests/{name}", what, headers, body=body, good=(201,)) as response:
                return response.headers

        return self._patiently(attempt)

    def status(self, method: str, path: str, what: str, good: Collection[int]) -> int:
        """What HEAD or DELETE is answered with, a status among ``good``. Raises NotFoundError, RemoteError."""

        def attempt() -> int:
            with self.request(method, path, what, {"Accept": ACCEPT}, good=good) as response:
                return response.status_code

        return self._patiently(attempt)

    def tls(self) -> ssl.SSLContext | None:
        """How the API shows who it is, None where it is plain HTTP. Raises RemoteError."""
        return self.http.tls if self._patiently(self._api).scheme == "https" else None

    def url(self, path: str) -> httpx.URL:
        """Where ``path`` is. Raises Transient, RemoteError."""
        return self._api().join(f"{self._reference.repository}/{path}")

    def authorization(self) -> tuple[dict[str, str], int]:
        """The headers that let us in, none as long as nobody asked for any, and their generation.

        Raises Transient, RemoteError.
        """
        value, generation = self._authorizer.current()
        return ({"Authorization": value} if value else {}), generation

    def renew(self, generation: int, status: int, challenges: list[str], body: str) -> bool:
        """After a refusal of the headers of ``generation``: whether there are others now.

        Raises Transient, RemoteError.
        """
        expired = generation > 0 and status in (400, 403) and _EXPIRED.search(body) is not None
        return (status == 401 or expired) and self._authorizer.renew(generation, challenges)

    @contextmanager
    def request(
        self,
        method: str,
        where: str | httpx.URL,
        what: str,
        headers: Mapping[str, str],
        *,
        body: Body | None = None,
        good: Collection[int] = _FOUND,
    ) -> Iterator[httpx.Response]:
        """One attempt at a response whose status is ``good``, at a path or an address that the registry gave us.

        What was refused as too old is renewed once. Raises Transient, NotFoundError, RemoteError.
        """
        url = self.url(where) if isinstance(where, str) else where
        ours = origin(url) == origin(self._api())
        for renewable in (True, False):
            authorization, generation = self.authorization() if ours else ({}, 0)
            with self.http.stream(method, url, {**headers, **authorization}, body=body) as response:
                if response.status_code in good:
                    yield response
                    return
                text = self.http.error_text(response)
            if not ours:
                renewed = False
            elif origin(response.url) != origin(url):  # the link we were sent to: the registry makes a new one
                renewed = response.status_code in (400, 403) and _EXPIRED.search(text) is not None
            else:
                challenges = response.headers.get_list("WWW-Authenticate")
                renewed = renewable and self.renew(generation, response.status_code, challenges, text)
            if not (renewable and renewed):
                raise self._failure(response, what, text)

    def _read(self, where: str | httpx.URL, what: str, headers: Mapping[str, str]) -> tuple[bytes, httpx.Response]:
        """A short body and the head it came with."""

        def attempt() -> tuple[bytes, httpx.Response]:
            with self.request("GET", where, what, headers) as response:
                return self.http.body(response, DOCUMENT_LIMIT, what), response

        return self._patiently(attempt)

    def _upload(self, digest: str, body: Body, what: str) -> None:
        """One attempt, from the start."""
        with self.request("POST", "blobs/uploads/", what, {}, good=(202,)) as response:
            place = response.headers.get("Location")
            if not place:
                raise RemoteError(f"{self._reference.host} does not say where to send the {what}")
            target = self.http.join(response.url, place).copy_merge_params({"digest": digest})
        headers = {"Content-Type": "application/octet-stream"}
        try:
            with self.request("PUT", target, what, headers, body=body, good=(201,)):
                return
        except NotFoundError as error:  # it has forgotten what it began
            raise Transient(RemoteError(str(error))) from error

    def _patiently(self, attempt: Callable[[], T]) -> T:
        """As many attempts as the policy allows."""
        return patiently(self.http.policy, self.http.stop, attempt)

    @contextmanager
    def _elsewhere(self, url: str, what: str, headers: Mapping[str, str]) -> Iterator[httpx.Response]:
        """A response from a foreign layer's own address. No credentials go there."""
        try:
            target = httpx.URL(url)
        except httpx.InvalidURL:
            target = httpx.URL("")
        if target.scheme not in ("http", "https") or not target.host:
            raise RemoteError(f"{what} has an address that is not HTTP")
        with self.http.stream("GET", target, headers) as response:
            if response.status_code not in (200, 206, 416):
                raise failure(response, what, self.http.error_text(response))
            yield response

    def _api(self) -> httpx.URL:
        """Where the API is. Raises Transient, RemoteError."""
        with self._base_lock:
            if self._base is None:
                self._base = self._find_api()
            return self._base

    def _find_api(self) -> httpx.URL:
        """HTTPS; within this machine HTTP first, and without verification HTTP at last, each where it answers."""
        host = self._reference.host
        if is_loopback(host):
            schemes = ("http", "https")
        elif self._tls_verify:
            return httpx.URL(f"https://{host}/v2/")
        else:
            schemes = ("https", "http")
        failed: Exception | None = None
        for scheme in schemes:
            url = httpx.URL(f"{scheme}://{host}/v2/")
            try:
                with self.http.stream("GET", url, {}) as response:
                    if scheme == "https" or response.status_code != 400:  # 400: plain HTTP was sent to a TLS port
                        return url
            except (Transient, RemoteError) as error:
                failed = error if failed is None or scheme == "https" else failed
        raise failed or RemoteError(f"{host} is no registry")

    def _failure(self, response: httpx.Response, what: str, body: str) -> ErofsgenError | Transient:
        raised = failure(response, what, body)
        if isinstance(raised, RemoteError) and response.status_code in (401, 403):
            registry = self._reference.registry
            if self._logged_in:
                raised.hint = f"the credentials for {registry} do not allow it"
            else:
                raised.hint = f"there is no such image, or it needs credentials: {login_hint(registry)}"
        return raised
