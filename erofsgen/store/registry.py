"""A store in a repository of an OCI registry: indexes and packs are blobs, images are its tags, nothing else is needed.

``docker://HOST[:PORT]/REPOSITORY[?tls-verify=false&authfile=FILE]``. Credentials are those of podman and Docker. An
image built from one of the same repository refers to that as its ``subject``, and is found by the tag of that, too.
Profiles refer to their image in the same way; their type is another, and nobody takes them for an image.

A registry keeps manifests apart from blobs, and asks for a manifest's tag, if any, when it is written. Here a manifest
is written before it is named, as any blob: a few kilobytes that the registry may collect, since reads of what is no
blob, or no more, look among the manifests. So images that other tools have pushed are read, too.

Registries do not list blobs, collect garbage themselves, and keep no layer records: every build converts all layers.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from datetime import UTC, datetime
from typing import Final, TypeVar

import msgspec

from erofsgen.errors import FormatError, IntegrityError, NotFoundError, RemoteError, UnsupportedError, UsageError
from erofsgen.oci.httpclient import Body
from erofsgen.oci.manifest import DOCUMENT_LIMIT, INDEX_TYPES, resolve
from erofsgen.oci.patience import Policy
from erofsgen.oci.reference import Reference, is_digest, is_tag
from erofsgen.oci.registryclient import ACCEPT, RegistryClient
from erofsgen.store import keys, profiles, referrers
from erofsgen.store.base import BlobWriter, Descriptor, Speed, Store, scratch
from erofsgen.store.documents import Documents
from erofsgen.store.image import read_blob
from erofsgen.store.manifest import ARTIFACT_TYPE
from erofsgen.store.spool import Spool
from erofsgen.store.transport import Locate, Location, Refusal, Transport

T = TypeVar("T")

_CREATED: Final = "org.opencontainers.image.created"
_THREADS: Final = 8


class _Facts(msgspec.Struct, rename="camel"):
    """What of a manifest decides how it is named."""

    artifact_type: str | None = None
    subject: Descriptor | None = None
    annotations: dict[str, str] | None = None


class _Tags(msgspec.Struct):
    tags: list[str] | None = None


class RegistryStore(Store):
    """The store at ``place``, ``docker://HOST[:PORT]/REPOSITORY``. Raises UsageError; nothing is asked yet."""

    def __init__(
        self,
        place: str,
        *,
        policy: Policy | None = None,
        tls_verify: bool = True,
        authfile: str | None = None,
        proxy: str | None = None,
    ) -> None:
        name = place.removeprefix("docker://")
        if set(name.rpartition("/")[2]) & set(":@"):
            raise UsageError(
                f"{place} is no repository", hint="write docker://HOST[:PORT]/REPOSITORY, and the tag as image"
            )
        reference = Reference.parse(name)
        self.url = place
        self.scratch = scratch(place)
        self._client = RegistryClient(reference, tls_verify=tls_verify, authfile=authfile, policy=policy)
        self._policy = policy
        self._proxy = proxy
        self._documents = Documents()
        self._lock = threading.Lock()
        self._transport: Transport | None = None

    @property
    def speed(self) -> Speed | None:  # type: ignore[override]
        return self._transport.speed if self._transport else None

    # --- blobs -------------------------------------------------------------------------------------------------------

    def size(self, digest: str) -> int | None:
        what = _what(digest)
        # Tried again from the start: asked for a large blob that came in between as a manifest, registries answer 500
        places = (self._locate(f"{kind}/{digest}") for kind in ("blobs", "manifests"))
        return self._reader().size(next(places), what, *places)

    def read_into(self, digest: str, offset: int, buffer: memoryview) -> None:
        if self._documents.read_into(digest, offset, buffer):
            return
        what = _what(digest)
        try:
            self._reader().read_into(self._locate(f"blobs/{digest}"), offset, buffer, what)
        except NotFoundError:
            if offset + len(buffer) > DOCUMENT_LIMIT:
                raise
            self._reader().read_into(self._locate(f"manifests/{digest}"), offset, buffer, what)

    def create(self, *, digest: str | None = None, size: int | None = None) -> BlobWriter:
        return Spool(self.scratch / "tmp", digest, size, self._upload)

    def blobs(self) -> Iterator[tuple[str, int]]:
        raise UnsupportedError(f"{self.url}: a registry does not list blobs")

    def delete(self, digest: str) -> None:
        self._delete(f"blobs/{digest}", _what(digest))

    # --- images ------------------------------------------------------------------------------------------------------

    def references(self) -> dict[str, Descriptor]:
        meant = self._of_each_tag(self._own)
        return {name: manifest for name, manifest in meant.items() if manifest is not None}

    def reference(self, name: str) -> Descriptor | None:
        """The image tagged ``name``, or made from the source image tagged ``name``: the newest of several."""
        if not (is_tag(name) or is_digest(name)) or keys.profiled(name):
            return None
        try:
            root, data = self._client.manifest(name)
        except NotFoundError:
            return None
        found = Descriptor(root.media_type, root.digest, root.size, artifact_type=_facts(data, name).artifact_type)
        if found.artifact_type == ARTIFACT_TYPE:
            self._documents.keep(found.digest, data)
            return found
        subject = root.digest
        if root.media_type in INDEX_TYPES:
            subject = resolve([root], self._client.document, None, f"{self.url}:{name}").subject.digest
        made = referrers.find(self._client, subject, ARTIFACT_TYPE)
        return max(reversed(made), key=_created, default=None)

    def called(self, name: str) -> str:
        """The tag that is in ``name``, else the nearest one to it."""
        if is_tag(name):
            return name
        try:
            return Reference.parse(name).tag or "latest"
        except UsageError:
            return re.sub(r"[^A-Za-z0-9_.-]", "-", name)[-128:].lstrip(".-") or "latest"

    def repository(self, name: str) -> str:  # noqa: ARG002
        """All images of one repository are versions of one."""
        return self.url

    def check_name(self, name: str) -> None:
        super().check_name(name)
        if not is_tag(name):
            raise UsageError(
                f"{self.url}: {name!r} is no tag", hint=f"a registry's images are called by tags: {self.called(name)}"
            )

    def tag(self, name: str, manifest: Descriptor) -> None:
        self.check_name(name)
        self._tag(name, manifest)

    def _tag(self, name: str, manifest: Descriptor) -> None:
        data = read_blob(self, manifest.digest, manifest.size, limit=DOCUMENT_LIMIT)
        said = self._client.put_manifest(name, manifest.media_type, data)
        facts = _facts(data, name)
        if facts.subject is not None and "OCI-Subject" not in said:
            referrer = msgspec.structs.replace(
                manifest, artifact_type=facts.artifact_type, annotations=facts.annotations or {}, data=None
            )
            referrers.add(self._client, facts.subject.digest, referrer)

    def untag(self, name: str) -> None:
        """Drop a tag; where the registry deletes only whole manifests, that, if it has no other tag.

        Raises UnsupportedError where neither is possible.
        """
        if not is_tag(name):
            raise self._no_image(name)
        try:
            manifest, data = self._client.manifest(name)
        except NotFoundError:
            raise self._no_image(name) from None
        what = f"image {name!r}"
        if self._client.status("DELETE", f"manifests/{name}", what, (200, 202, 400, 404, 405)) < 400:
            return
        digests = self._of_each_tag(self._digest)
        others = [tag for tag, digest in digests.items() if digest == manifest.digest and tag != name]
        if others:
            raise UnsupportedError(
                f"{self.url}: this registry deletes images, not tags, and {name!r} has the tag {others[0]!r}, too",
                hint="remove all of them by naming the image's digest, or keep this one",
            )
        subject = _facts(data, name).subject
        if subject is not None:
            self._delete_referrer(subject.digest, manifest.digest, what)
        else:
            self._delete(f"manifests/{manifest.digest}", what)

    # --- profiles ----------------------------------------------------------------------------------------------------

    def profiled(self) -> set[str]:
        return keys.images_profiled(self._tags())

    def profiles(self, image: str) -> Descriptor | None:
        try:
            manifest, data = self._client.manifest(keys.profiles(image))
        except NotFoundError:
            return None
        self._documents.keep(manifest.digest, data)
        return Descriptor(manifest.media_type, manifest.digest, manifest.size, artifact_type=profiles.TYPE)

    def tag_profiles(self, image: str, manifest: Descriptor) -> None:
        """The manifest that was there before is deleted, if the registry lets us: nobody else would ever do it."""
        before = None
        with suppress(FormatError, UnsupportedError):
            before = self.profiles(image)
        self._tag(keys.profiles(image), manifest)
        if before is not None and before.digest != manifest.digest:
            with suppress(RemoteError, UnsupportedError):
                self._delete_referrer(image, before.digest, "older profiles")

    def untag_profiles(self, image: str) -> None:
        found = self.profiles(image)
        if found is None:
            raise NotFoundError(f"{self.url}: no profiles of {image}")
        what = f"profiles of {image}"
        try:
            self._delete_referrer(image, found.digest, what)
        except UnsupportedError:
            if (
                self._client.status("DELETE", f"manifests/{keys.profiles(image)}", what, (200, 202, 400, 404, 405))
                >= 400
            ):
                raise

    # --- what registries have not ------------------------------------------------------------------------------------

    def record(self, key: str) -> bytes | None:  # noqa: ARG002
        return None

    def put_record(self, key: str, data: bytes) -> None:
        """Keeps nothing."""

    def records(self) -> Iterator[str]:
        return iter(())

    def delete_record(self, key: str) -> None:
        """There is none."""

    def building(self) -> AbstractContextManager[None]:
        return nullcontext()

    def collecting(self, *, wait: float = 0.0) -> AbstractContextManager[None]:  # noqa: ARG002
        raise UnsupportedError(
            f"{self.url}: a registry collects its garbage itself", hint="see its own documentation for how and when"
        )

    def doubt(self) -> None:
        if self._transport:
            self._transport.doubt()

    def close(self) -> None:
        if self._transport:
            self._transport.close()
        self._client.http.close()
        self._client.http.dispose()

    # -----------------------------------------------------------------------------------------------------------------

    def _reader(self) -> Transport:
        """Made when the API is known: reading whom TLS trusts takes its time, and plain HTTP does without."""
        with self._lock:
            if self._transport is None:
                self._transport = Transport(policy=self._policy, tls=self._client.tls(), proxy=self._proxy)
            return self._transport

    def _locate(self, path: str) -> Locate:
        """Where ``path`` is; what does not let us in is answered with another token."""
        generation = 0

        def locate(refusal: Refusal | None) -> Location:
            nonlocal generation
            if refusal is not None:
                challenges = [refusal.headers.get("www-authenticate", "")]
                self._client.renew(generation, refusal.status, challenges, refusal.body)
            headers, generation = self._client.authorization()
            return Location(str(self._client.url(path)), {"Accept": ACCEPT, **headers})

        return locate

    def _upload(self, digest: str, size: int, spool: Spool) -> None:
        if self.size(digest) != size:
            self._client.upload(digest, Body(size, spool.pieces))

    def _delete(self, path: str, what: str) -> None:
        if self._client.status("DELETE", path, what, (200, 202, 404, 405)) == 405:
            raise UnsupportedError(f"{self.url}: this registry does not delete anything", hint="ask who runs it")

    def _delete_referrer(self, subject: str, digest: str, what: str) -> None:
        referrers.remove(self._client, subject, digest)
        self._delete(f"manifests/{digest}", what)

    def _own(self, tag: str) -> Descriptor | None:
        """The image that is tagged so itself."""
        try:
            manifest, data = self._client.manifest(tag)
        except IntegrityError:
            raise
        except (NotFoundError, UnsupportedError, FormatError):  # gone meanwhile, or nothing that we know
            return None
        if _facts(data, tag).artifact_type != ARTIFACT_TYPE:
            return None
        return Descriptor(manifest.media_type, manifest.digest, manifest.size, artifact_type=ARTIFACT_TYPE)

    def _digest(self, tag: str) -> str | None:
        try:
            return self._client.manifest(tag)[0].digest
        except NotFoundError:
            return None

    def _of_each_tag(self, ask: Callable[[str], T]) -> dict[str, T]:
        tags = [tag for tag in keys.images(self._tags()) if not referrers.is_list(tag)]
        with ThreadPoolExecutor(_THREADS, "tags") as pool:
            return dict(zip(tags, pool.map(ask, tags), strict=True))

    def _tags(self) -> list[str]:
        tags: list[str] = []
        try:
            for data, _ in self._client.pages("tags/list", f"list of tags of {self.url}"):
                tags += msgspec.json.decode(data, type=_Tags).tags or []
        except NotFoundError:  # a registry makes a repository when something is pushed to it
            return []
        except msgspec.MsgspecError as error:
            raise FormatError(f"{self.url}: the list of tags is malformed: {error}") from None
        return [tag for tag in tags if is_tag(tag)]

    def _no_image(self, name: str) -> NotFoundError:
        return NotFoundError(f"{self.url}: no image {name!r}", hint="see `erofsgen images`")


def _what(digest: str) -> str:
    """A blob in messages. Raises FormatError for what is no sha256 digest."""
    keys.blob(digest)
    return f"blob {digest}"


def _facts(data: bytes, name: str) -> _Facts:
    try:
        return msgspec.json.decode(data, type=_Facts)
    except msgspec.MsgspecError as error:
        raise FormatError(f"{name}: its manifest is malformed: {error}") from None


def _created(manifest: Descriptor) -> float:
    """When an image was made, in seconds since 1970, 0 where it does not say so."""
    try:
        moment = datetime.fromisoformat(manifest.annotations.get(_CREATED, ""))
    except ValueError:
        return 0.0
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
