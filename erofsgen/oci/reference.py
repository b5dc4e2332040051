"""Image references as Docker writes them, and names an OCI layout accepts.

``python:3.11-slim`` means ``docker.io/library/python:3.11-slim``: the grammar and the defaults are those of the
distribution project's reference format. A reference's ``str()`` is its canonical form.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
from collections.abc import Container
from dataclasses import dataclass
from typing import Final

from erofsgen.errors import UsageError

DEFAULT_REGISTRY: Final = "docker.io"
DEFAULT_TAG: Final = "latest"

_DIGEST_LENGTHS: Final = {"sha256": 64, "sha512": 128}
_DIGEST: Final = re.compile(r"(sha256|sha512):([0-9a-f]+)", re.ASCII)
_LABEL: Final = r"[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?"
_REGISTRY: Final = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[0-9a-fA-F:]+\])(?::[0-9]+)?")
_REPOSITORY: Final = re.compile(r"[a-z0-9]+(?:(?:\.|__?|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|__?|-+)[a-z0-9]+)*)*")
_TAG: Final = re.compile(r"\w[\w.-]{0,127}", re.ASCII)
_IMAGE_ID: Final = re.compile(r"[0-9a-f]{64}")
_NAME_LIMIT: Final = 255
_TEXT_LIMIT: Final = 1024

_REF_COMPONENT: Final = r"[A-Za-z0-9]+(?:(?:[-._:@+]|--)[A-Za-z0-9]+)*"
_REF_NAME: Final = re.compile(rf"{_REF_COMPONENT}(?:/{_REF_COMPONENT})*")


@dataclass(frozen=True)
class Reference:
    """An image in a registry. At least one of ``tag`` and ``digest`` is set; ``digest`` decides where both are."""

    registry: str
    repository: str
    tag: str | None = None
    digest: str | None = None

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Read ``[HOST[:PORT]/]REPOSITORY[:TAG][@DIGEST]``.

        Raises UsageError (malformed).
        """
        if len(text) > _TEXT_LIMIT:
            raise UsageError(f"image reference of {len(text)} characters is too long")
        rest, at, digest = text.partition("@")
        if at and not is_digest(digest):
            raise _malformed(text, f"{digest!a} is no sha256 or sha512 digest")
        slash, colon = rest.rfind("/"), rest.rfind(":")
        name, tag = (rest[:colon], rest[colon + 1 :]) if colon > slash else (rest, None)
        if tag is not None and not _TAG.fullmatch(tag):
            raise _malformed(text, f"{tag!a} is no tag")
        registry, repository = _split_registry(name)
        if not _REGISTRY.fullmatch(registry):
            raise _malformed(text, f"{registry!a} is no registry host")
        if registry == DEFAULT_REGISTRY and repository and "/" not in repository:
            if _IMAGE_ID.fullmatch(repository):
                raise _malformed(text, "64 hexadecimal digits are an image ID, not a name")
            repository = f"library/{repository}"
        if not _REPOSITORY.fullmatch(repository):
            lower = repository != repository.lower() and _REPOSITORY.fullmatch(repository.lower())
            raise _malformed(text, "repository names are lower case" if lower else f"{repository!a} is no repository")
        if len(repository) > _NAME_LIMIT:
            raise _malformed(text, f"the repository name has more than {_NAME_LIMIT} characters")
        return cls(registry, repository, tag if tag or at else DEFAULT_TAG, digest if at else None)

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        return f"{self.registry}/{self.repository}{tag}" + (f"@{self.digest}" if self.digest else "")

    @property
    def host(self) -> str:
        """Where the registry's API is, ``HOST[:PORT]``."""
        return "registry-1.docker.io" if self.registry == DEFAULT_REGISTRY else self.registry


def is_digest(text: str) -> bool:
    """Whether ``text`` is a well-formed digest of an algorithm that is understood here."""
    match = _DIGEST.fullmatch(text)
    return match is not None and len(match[2]) == _DIGEST_LENGTHS[match[1]]


def is_tag(text: str) -> bool:
    """Whether ``text`` can be a tag of a repository."""
    return _TAG.fullmatch(text) is not None


def is_loopback(host: str) -> bool:
    """Whether ``HOST[:PORT]`` can only be this machine."""
    name = host[1:].partition("]")[0] if host.startswith("[") else host.rpartition(":")[0] or host
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def ref_name(text: str) -> str:
    """``text`` where it is valid as an ``org.opencontainers.image.ref.name``, else the nearest name that is.

    The grammar is the annotation's in the OCI image layout specification. A changed name carries eight hexadecimal
    digits of the original's SHA-256, so that two names never become one.
    """
    if _REF_NAME.fullmatch(text):
        return text
    mark = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    parts = (
        re.sub(r"[^A-Za-z0-9]*([^A-Za-z0-9])", r"\1", part)
        for part in re.sub(r"[^A-Za-z0-9_.:@+/-]", "-", text).split("/")
    )
    clean = "/".join(part for part in (re.sub(r"^[^A-Za-z0-9]+|[^A-Za-z0-9]+$", "", part) for part in parts) if part)
    return f"{clean}-{mark}" if _REF_NAME.fullmatch(clean) else f"image-{mark}"


def _split_registry(name: str) -> tuple[str, str]:
    """Docker's rule: the first component is a host where it could not be the name of a Docker Hub user."""
    first, slash, rest = name.partition("/")
    if not slash or not (set(first) & set(".:") or first == "localhost" or first != first.lower()):
        return DEFAULT_REGISTRY, name
    return (DEFAULT_REGISTRY if first == "index.docker.io" else first), rest


def _malformed(text: str, why: str) -> UsageError:
    return UsageError(f"image reference {text!a} is malformed: {why}", hint="write [HOST[:PORT]/]NAME[:TAG][@DIGEST]")


def spellings(name: str) -> tuple[str, ...]:
    """``name`` and, where it has another, its canonical form: ``python:3`` is how Docker Hub's image was asked for and
    ``docker.io/library/python:3`` how it is called."""
    try:
        canonical = str(Reference.parse(name.removeprefix("docker://")))
    except UsageError:
        return (name,)
    return (name,) if canonical == name else (name, canonical)


def known_name(name: str, names: Container[str]) -> str:
    """The first of the ``spellings`` of ``name`` that is among ``names``, else ``name``."""
    return next((spelling for spelling in spellings(name) if spelling in names), name)
