"""A registry in this process with all of the distribution specification that a store uses, and faults on demand."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from servers.faultyregistry import FaultyRegistry, Handler, digest_of, serving

OCI_INDEX = "application/vnd.oci.image.index.v1+json"


@dataclass
class FullRegistry(FaultyRegistry):
    """Takes uploads, lists, deletes, and knows what refers to what. It has one repository, however that is called."""

    uploads: set[str] = field(default_factory=set)
    writers: set[str] = field(default_factory=set)
    """The tokens that may write, where tokens are asked for at all."""
    has_referrers: bool = True
    """Whether it has the referrers API."""
    filters: bool = True
    """Whether that filters by artifact type."""
    page: int = 1000
    """Entries of a list in one answer."""
    deletes: tuple[str, ...] = ("tags", "manifests", "blobs")

    def expire_tokens(self) -> None:
        super().expire_tokens()
        self.writers.clear()

    def tags(self) -> dict[str, bytes]:
        return {name: data for name, (_, data) in self.manifests.items() if ":" not in name}

    def sent(self, method: str, pattern: str) -> list[str]:
        """The paths of these requests, in order."""
        return [request.path for request in self.seen(pattern) if request.method == method]


def full_registry() -> contextlib.AbstractContextManager[FullRegistry]:
    return serving(FullRegistry(), _Handler)


class _Handler(Handler):
    registry: FullRegistry

    do_HEAD = do_PUT = do_DELETE = Handler.do_GET  # noqa: N815

    def behave(self, *, ranges: bool = True) -> None:
        registry = self.registry
        if self.path.startswith("/token"):
            super().behave()
            if "push" in unquote(self.path):
                registry.writers.add(f"token-{registry.issued}")
            return
        if registry.tokens is not None and not self._let_in():
            return
        url = urlsplit(self.path)
        match = re.fullmatch(r"/v2/.*?/(blobs/uploads|blobs|manifests|referrers|tags)/(.*)", url.path)
        if not match:
            super().behave()
            return
        what, name = match.groups()
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        getattr(self, f"_{self.command.lower()}_{what.replace('/', '_')}")(name, query)

    def answer(self, data: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        if self.command != "HEAD":
            super().answer(data, status, headers)
            return
        self.start(status, **{"Content-Length": str(len(data)), **(headers or {})})

    def _let_in(self) -> bool:
        writes = self.command in ("POST", "PUT", "DELETE")
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        good = self.registry.writers if writes else self.registry.tokens
        if token in (good or ()):
            return True
        if token and self.registry.refusal != 401 and token not in (self.registry.tokens or ()):
            message = b'{"errors":[{"code":"DENIED","message":"Your authorization token has expired."}]}'
            self.answer(message, self.registry.refusal)
            return False
        scope = f"repository:team/app:{'pull,push' if writes else 'pull'}"
        challenge = f'Bearer realm="http://{self.registry.host}/token",service="faulty",scope="{scope}"'
        self.answer(b"", 401, {"WWW-Authenticate": challenge})
        return False

    # --- what is there -----------------------------------------------------------------------------------------------

    def _get_blobs(self, name: str, query: dict[str, str]) -> None:
        data = self.registry.blobs.get(name)
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if data is None:
            self._unknown()
        elif not match:
            self.answer(data)
        elif int(match[1]) >= len(data):
            self.answer(b"", 416, {"Content-Range": f"bytes */{len(data)}"})
        else:
            start, end = int(match[1]), min(int(match[2]) + 1, len(data))
            self.answer(data[start:end], 206, {"Content-Range": f"bytes {start}-{end - 1}/{len(data)}"})

    def _get_manifests(self, name: str, query: dict[str, str]) -> None:
        if name not in self.registry.manifests:
            self._unknown()
            return
        media_type, data = self.registry.manifests[name]
        self.answer(data, headers={"Content-Type": media_type, "Docker-Content-Digest": digest_of(data)})

    _head_blobs, _head_manifests = _get_blobs, _get_manifests

    def _get_tags(self, name: str, query: dict[str, str]) -> None:
        self._list(sorted(self.registry.tags()), query, lambda page: {"name": "team/app", "tags": page}, {})

    def _get_referrers(self, name: str, query: dict[str, str]) -> None:
        if not self.registry.has_referrers:
            self._unknown()
            return
        found = []
        for digest, (media_type, data) in self.registry.manifests.items():
            document = json.loads(data)
            if ":" not in digest or document.get("subject", {}).get("digest") != name:
                continue
            found.append({"mediaType": media_type, "digest": digest, "size": len(data)})
            found[-1] |= {key: document[key] for key in ("artifactType", "annotations") if key in document}
        if self.registry.filters and "artifactType" in query:
            found = [item for item in found if item.get("artifactType") == query["artifactType"]]
        index = {"schemaVersion": 2, "mediaType": OCI_INDEX}
        self._list(found, query, lambda page: {**index, "manifests": page}, {"Content-Type": OCI_INDEX})

    def _list(
        self, items: list[Any], query: dict[str, str], document: Callable[[list[Any]], Any], headers: dict[str, str]
    ) -> None:
        start = int(query.pop("start", "0"))
        end = start + self.registry.page
        if end < len(items):
            more = "".join(f"&{key}={value}" for key, value in query.items())
            headers = {**headers, "Link": f'<{urlsplit(self.path).path}?start={end}{more}>; rel="next"'}
        self.answer(json.dumps(document(items[start:end])).encode(), headers=headers)

    # --- what is written ---------------------------------------------------------------------------------------------

    def _post_blobs_uploads(self, name: str, query: dict[str, str]) -> None:
        with self.registry.lock:
            upload = f"upload-{len(self.registry.uploads)}"
            self.registry.uploads.add(upload)
        self.answer(b"", 202, {"Location": f"/v2/team/app/blobs/uploads/{upload}?state=a%2Bb"})

    def _put_blobs_uploads(self, name: str, query: dict[str, str]) -> None:
        data = self.received
        if name not in self.registry.uploads or query["state"] != "a+b":
            self._unknown()
        elif digest_of(data) != query["digest"]:
            self.answer(b'{"errors":[{"code":"DIGEST_INVALID","message":"another digest"}]}', 400)
        else:
            self.registry.blobs[query["digest"]] = data
            self.answer(b"", 201)

    def _put_manifests(self, name: str, query: dict[str, str]) -> None:
        data = self.received
        document = json.loads(data)
        needed = [document[key] for key in ("config",) if key in document] + document.get("layers", [])
        there = all(item["digest"] in self.registry.blobs for item in needed)
        if not there or any(item["digest"] not in self.registry.manifests for item in document.get("manifests", [])):
            self.answer(b'{"errors":[{"code":"MANIFEST_BLOB_UNKNOWN","message":"blob unknown to registry"}]}', 400)
            return
        self.registry.add_manifest(data, name, self.headers["Content-Type"])
        subject = document.get("subject")
        self.answer(b"", 201, {"OCI-Subject": subject["digest"]} if subject and self.registry.has_referrers else {})

    def _delete_manifests(self, name: str, query: dict[str, str]) -> None:
        registry = self.registry
        if ("manifests" if ":" in name else "tags") not in registry.deletes:
            self.answer(b'{"errors":[{"code":"UNSUPPORTED","message":"The operation is unsupported."}]}', 405)
        elif name not in registry.manifests:
            self._unknown()
        else:
            _, data = registry.manifests.pop(name)
            if ":" in name:
                for tag, other in registry.tags().items():
                    if other == data:
                        del registry.manifests[tag]
            self.answer(b"", 202)

    def _delete_blobs(self, name: str, query: dict[str, str]) -> None:
        if "blobs" not in self.registry.deletes:
            self.answer(b'{"errors":[{"code":"UNSUPPORTED","message":"The operation is unsupported."}]}', 405)
        elif self.registry.blobs.pop(name, None) is None:
            self._unknown()
        else:
            self.answer(b"", 202)

    def _unknown(self) -> None:
        self.answer(b'{"errors":[{"code":"UNKNOWN","message":"unknown to registry"}]}', 404)
