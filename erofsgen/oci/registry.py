"""Images in registries: ``docker://``, after the OCI distribution specification 1.1.

:class:`RegistryClient` speaks for one repository: it finds the API, answers challenges and tells what went wrong.
:class:`RegistryImage` is a :class:`~erofsgen.oci.source.SourceImage`. Plain HTTP is used only within this machine, or
where the user gave up TLS verification.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO, Final, Self

import httpx

from erofsgen.errors import ErofsgenError, IntegrityError, NotFoundError, RemoteError
from erofsgen.oci.auth import Credentials, find_credentials
from erofsgen.oci.bearer import Authorizer, login_hint
from erofsgen.oci.download import Downloads
from erofsgen.oci.httpclient import HttpClient, failure, origin
from erofsgen.oci.manifest import (
    DOCUMENT_LIMIT,
    FOREIGN_TYPES,
    INDEX_TYPES,
    MANIFEST_TYPES,
    Descriptor,
    parse,
    resolve,
)
from erofsgen.oci.patience import Patience, Policy, Transient
from erofsgen.oci.reference import Reference, is_digest, is_loopback, ref_name
from erofsgen.oci.source import Layer, Subject
from erofsgen.progress import Progress

_ACCEPT: Final = ", ".join(sorted(INDEX_TYPES | MANIFEST_TYPES))
_EXPIRED: Final = re.compile(r"expir", re.IGNORECASE)
"""Some registries answer 400 or 403 instead of 401 when a token is too old, and storage services when a link is."""


class RegistryClient:
    """Reads one repository of one registry. Thread-safe."""

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
        data, headers = self._read(f"manifests/{name}", what, {"Accept": _ACCEPT})
        algorithm = name.partition(":")[0] if is_digest(name) else "sha256"
        digest = f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}"
        claimed = name if is_digest(name) else headers.get("Docker-Content-Digest", "")
        if claimed.startswith(f"{algorithm}:") and claimed != digest:
            raise IntegrityError(f"{what} does not have its digest: the content was changed or damaged")
        media_type, _ = parse(data, headers.get("Content-Type", ""), what)
        return Descriptor(media_type=media_type, digest=digest, size=len(data)), data

    def document(self, blob: Descriptor) -> bytes:
        """A small blob, not verified: a manifest by digest, or a config."""
        what = f"blob {blob.digest} of {self._reference.repository}"
        if blob.media_type in INDEX_TYPES | MANIFEST_TYPES:
            return self._read(f"manifests/{blob.digest}", what, {"Accept": _ACCEPT})[0]
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
                response = stack.enter_context(self._get(f"blobs/{blob.digest}", what, headers))
            except NotFoundError:
                if not failed:
                    raise
                raise next((error for error in failed if isinstance(error, Transient)), failed[0]) from None
            yield response

    def _read(self, path: str, what: str, headers: Mapping[str, str]) -> tuple[bytes, httpx.Headers]:
        """A short body, with as many attempts as the policy allows."""
        patience = Patience(self.http.policy, self.http.stop)
        while True:
            try:
                with self._get(path, what, headers) as response:
                    return self.http.body(response, DOCUMENT_LIMIT, what), response.headers
            except Transient as error:
                patience.pause(error)

    @contextmanager
    def _get(self, path: str, what: str, headers: Mapping[str, str]) -> Iterator[httpx.Response]:
        """One attempt at a successful response: 200, 206 or 416. What was refused as too old is renewed once."""
        url = self._api().join(f"{self._reference.repository}/{path}")
        for renewable in (True, False):
            value, generation = self._authorizer.current()
            authorization = {"Authorization": value} if value else {}
            with self.http.stream("GET", url, {**headers, **authorization}) as response:
                if response.status_code in (200, 206, 416):
                    yield response
                    return
                body = self.http.error_text(response)
            expired = response.status_code in (400, 403) and _EXPIRED.search(body) is not None
            if origin(response.url) != origin(url):
                renewed = expired  # the link we were sent to: the registry makes a new one
            else:
                challenges = response.headers.get_list("WWW-Authenticate")
                refused = response.status_code == 401 or (expired and value is not None)
                renewed = renewable and refused and self._authorizer.renew(generation, challenges)
            if not (renewable and renewed):
                raise self._failure(response, what, body)

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


class RegistryImage:
    """An image in a registry. Layers are downloaded whole before they are opened, several at a time.

    Without ``downloads`` they go to a temporary directory. With it, an interrupted download is continued by a later
    run; when the ``with`` block ends without an exception, the files are dropped.
    """

    def __init__(
        self,
        reference: Reference,
        *,
        platform: str | None = None,
        tls_verify: bool = True,
        authfile: str | None = None,
        downloads: Path | None = None,
        progress: Progress | None = None,
        policy: Policy | None = None,
    ) -> None:
        self.name = ref_name(str(reference))
        self._client = RegistryClient(reference, tls_verify=tls_verify, authfile=authfile, policy=policy)
        try:
            root, data = self._client.manifest(reference.digest or reference.tag or "")

            def read(blob: Descriptor) -> bytes:
                return data if blob.digest == root.digest else self._client.document(blob)

            resolved = resolve([root], read, platform, str(reference))
            self._blobs = resolved.blobs
            self.subject: Subject | None = resolved.subject
            self.config = resolved.config
            self.layers: tuple[Layer, ...] = resolved.layers
            self._downloads = Downloads(
                self._client.open_blob, self._client.http, downloads, where=str(reference), progress=progress
            )
        except BaseException:
            self._client.http.dispose()
            raise

    def fetch(self, indices: Iterable[int]) -> None:
        """Start to download these layers."""
        for index in indices:
            self._downloads.start(self._blobs[index])

    def open_layer(self, index: int) -> BinaryIO:
        """The verified blob; waits until it has arrived.

        Raises NotFoundError, IntegrityError, RemoteError, StorageError.
        """
        return self._downloads.open(self._blobs[index])

    def close(self, *, keep: bool = False) -> None:
        """Stop downloads and drop their files; with ``keep``, leave what a later run can use."""
        self._downloads.close(keep=keep)
        self._client.http.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close(keep=exc[0] is not None)
