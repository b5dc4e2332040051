"""Which manifests of a repository refer to another one as their subject, after the OCI distribution specification 1.1.

Registries with the referrers API keep that list. For the others their clients do, as an index with a tag made of the
subject's digest (the specification's "referrers tag schema"), which nobody locks: see :func:`add`.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable
from typing import Any, Final
from urllib.parse import quote

import msgspec

from erofsgen.errors import NotFoundError, RemoteError
from erofsgen.oci.manifest import OCI_INDEX
from erofsgen.oci.registryclient import RegistryClient
from erofsgen.store import layout
from erofsgen.store.base import Descriptor

_LIST: Final = re.compile(r"(sha256-[0-9a-f]{64}|sha512-[0-9a-f]{64,128})")
_ATTEMPTS: Final = 20


def is_list(tag: str) -> bool:
    """Whether a tag is one of the tag schema's."""
    return _LIST.fullmatch(tag) is not None


def find(client: RegistryClient, subject: str, artifact_type: str) -> list[Descriptor]:
    """What of this type refers to the manifest with the digest ``subject``. Raises RemoteError, FormatError."""
    found = _ask(client, subject, artifact_type)
    if found is None:
        index = _read(client, _tag(subject))
        found = msgspec.convert(index["manifests"], list[Descriptor])
    return [referrer for referrer in found if referrer.artifact_type == artifact_type]


def add(client: RegistryClient, subject: str, referrer: Descriptor) -> None:
    """Put ``referrer`` on the list that a registry without the API has for ``subject``. Raises RemoteError.

    Of two who change the list at the same time, the second may write what it read before the first had written. So each
    looks again once it has given whoever read before it the time to write, and begins anew where its entry is gone.
    """
    for _ in range(_ATTEMPTS):
        began = time.monotonic()
        if not _change(client, subject, lambda listed: _with(client, listed, referrer)):
            return
        took = time.monotonic() - began
        client.http.stop.wait(random.uniform(2, 4) * took)
    raise RemoteError(
        f"the list of what refers to {subject} is changed by too many at once", hint="run the command again"
    )


def remove(client: RegistryClient, subject: str, digest: str) -> None:
    """Take the manifest ``digest`` off the list for ``subject``, if there is one. Raises RemoteError."""
    _change(client, subject, lambda listed: [item for item in listed if item.get("digest") != digest])


def _ask(client: RegistryClient, subject: str, artifact_type: str) -> list[Descriptor] | None:
    """What the API says, None where there is none."""
    found: list[Descriptor] = []
    what = f"list of what refers to {subject}"
    try:
        for data, response in client.pages(f"referrers/{subject}?artifactType={quote(artifact_type, safe='')}", what):
            if response.headers.get("Content-Type", "").partition(";")[0].strip() != OCI_INDEX:
                return None  # the page with which a web server answers everything
            found += msgspec.convert(layout.parse(data, what=what)["manifests"], list[Descriptor])
    except NotFoundError:
        return None
    return found


def _tag(subject: str) -> str:
    """The tag of a subject's list: the algorithm's first 32 characters, the digest's first 64."""
    algorithm, _, encoded = subject.partition(":")
    return f"{algorithm[:32]}-{encoded[:64]}"


def _read(client: RegistryClient, tag: str) -> layout.Index:
    try:
        return layout.parse(client.manifest(tag)[1], what=f"list {tag}")
    except NotFoundError:
        return layout.empty()


def _change(
    client: RegistryClient, subject: str, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]
) -> bool:
    """Write the list as ``change`` wants it; whether that made a difference."""
    tag = _tag(subject)
    index = _read(client, tag)
    listed = change(index["manifests"])
    if listed == index["manifests"]:
        return False
    client.put_manifest(tag, OCI_INDEX, msgspec.json.encode({**index, "manifests": listed}))
    return True


def _with(client: RegistryClient, listed: list[dict[str, Any]], referrer: Descriptor) -> list[dict[str, Any]]:
    """The list with ``referrer``, without what is gone: a registry may refuse a list that names it."""
    if any(item["digest"] == referrer.digest for item in listed):
        return listed
    there = [
        item for item in listed if client.status("HEAD", f"manifests/{item['digest']}", "referrer", (200, 404)) == 200
    ]
    return [*there, msgspec.to_builtins(referrer)]
