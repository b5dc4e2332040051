"""Manifests, indexes and configs: OCI image specification 1.1 and Docker's schema 2.

:func:`resolve` goes from the descriptor of an image, or of an index of images, to what the builder needs. It reads
through a callback, so a registry, a directory and an archive share it. Everything here may come from somebody hostile:
documents have a size limit, are checked against their digest and length before they are parsed, and nested indexes are
followed only so far.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Final, TypeVar

import msgspec

from erofsgen.errors import FormatError, IntegrityError, NotFoundError, UnsupportedError
from erofsgen.oci.platforms import Platform
from erofsgen.oci.reference import is_digest
from erofsgen.oci.source import Layer, Subject

DOCUMENT_LIMIT: Final = 4 << 20
"""Bytes of a manifest, an index or a config. The OCI distribution specification asks registries for 4 MiB."""

OCI_INDEX: Final = "application/vnd.oci.image.index.v1+json"
OCI_MANIFEST: Final = "application/vnd.oci.image.manifest.v1+json"
DOCKER_LIST: Final = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST: Final = "application/vnd.docker.distribution.manifest.v2+json"
INDEX_TYPES: Final = frozenset({OCI_INDEX, DOCKER_LIST})
MANIFEST_TYPES: Final = frozenset({OCI_MANIFEST, DOCKER_MANIFEST})
CONFIG_TYPES: Final = frozenset(
    {"application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json"}
)
OCI_LAYER: Final = "application/vnd.oci.image.layer.v1.tar"
FOREIGN_TYPES: Final = frozenset(
    {
        "application/vnd.oci.image.layer.nondistributable.v1.tar",
        "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
        "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd",
        "application/vnd.docker.image.rootfs.foreign.diff.tar",
        "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
    }
)
"""Layers that may be kept out of registries and fetched from their descriptor's ``urls``."""
LAYER_TYPES: Final = FOREIGN_TYPES | {
    OCI_LAYER,
    f"{OCI_LAYER}+gzip",
    f"{OCI_LAYER}+zstd",
    "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.docker.image.rootfs.diff.tar.gzip",
    "application/vnd.docker.image.rootfs.diff.tar.zstd",
}

_NESTING: Final = 4
_INDEXES: Final = 32
_SCHEMA1: Final = "application/vnd.docker.distribution.manifest.v1+json"
_UNNAMED_TYPES: Final = frozenset({"", "application/json", "application/octet-stream", "text/plain"})
"""Content types that servers give documents they know nothing about."""


class PlatformFields(msgspec.Struct, frozen=True):
    """The ``platform`` of a descriptor."""

    architecture: str = ""
    os: str = ""
    variant: str | None = None


class Descriptor(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """A reference to a blob: its type, digest and size in bytes."""

    media_type: str = ""
    digest: str
    size: Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]
    urls: tuple[str, ...] | None = None
    annotations: dict[str, str] | None = None
    platform: PlatformFields | None = None


class _Document(msgspec.Struct, kw_only=True, rename="camel"):
    """The fields that tell an index from a manifest, and their content."""

    media_type: str = ""
    config: Descriptor | None = None
    layers: tuple[Descriptor, ...] | None = None
    manifests: tuple[Descriptor, ...] | None = None
    fs_layers: Any = None


class _RootFS(msgspec.Struct):
    diff_ids: tuple[str, ...] | None = None


class _Config(msgspec.Struct):
    architecture: str = ""
    os: str = ""
    variant: str | None = None
    rootfs: _RootFS | None = None


@dataclass(frozen=True)
class Index:
    """A list of manifests, for several platforms as a rule."""

    manifests: tuple[Descriptor, ...]


@dataclass(frozen=True)
class Manifest:
    """One image: its config and its layers, bottom first."""

    config: Descriptor
    layers: tuple[Descriptor, ...]


@dataclass(frozen=True)
class Resolved:
    """One image, chosen and checked. ``blobs`` are the layers' descriptors, in the order of ``layers``."""

    subject: Subject
    config: bytes
    layers: tuple[Layer, ...]
    blobs: tuple[Descriptor, ...]


T = TypeVar("T")
Read = Callable[[Descriptor], bytes]


def decode(data: bytes, kind: type[T], what: str) -> T:
    """JSON to ``kind``. ``what`` names the document in messages.

    Raises FormatError (malformed, too deep, too long).
    """
    if len(data) > DOCUMENT_LIMIT:
        raise FormatError(f"{what} is longer than {DOCUMENT_LIMIT} bytes")
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise FormatError(f"{what} is malformed: {str(error).splitlines()[0]}") from error
    except RecursionError as error:
        raise FormatError(f"{what} is malformed: nested too deeply") from error


def check(data: bytes, digest: str, size: int, what: str) -> None:
    """Raises IntegrityError where ``data`` is not the blob of that digest and size."""
    if len(data) != size:
        raise IntegrityError(f"{what} has {len(data)} bytes instead of {size}")
    algorithm, _, expected = digest.partition(":")
    if hashlib.new(algorithm, data).hexdigest() != expected:
        raise IntegrityError(f"{what} does not have its digest: the content was changed or damaged")


def check_descriptor(blob: Descriptor, what: str, limit: int | None = None) -> None:
    """Raises FormatError where a descriptor's digest is malformed or its size beyond ``limit`` bytes."""
    if not is_digest(blob.digest):
        raise FormatError(f"{what} has a malformed digest {blob.digest[:160]!a}")
    if limit is not None and blob.size > limit:
        raise FormatError(f"{what} claims {blob.size} bytes, more than the {limit} allowed")


def parse(data: bytes, media_type: str, what: str) -> tuple[str, Index | Manifest]:
    """The media type and the content of an index or a manifest.

    ``media_type`` is what its descriptor or its server says; where that is empty or generic, the document's own word
    counts. Raises FormatError (malformed, or two types at once), UnsupportedError (no image).
    """
    media_type = media_type.partition(";")[0].strip().lower()
    _check_media_type(media_type, _UNNAMED_TYPES, what)
    document = decode(data, _Document, what)
    if document.fs_layers is not None:
        _check_media_type(_SCHEMA1, frozenset(), what)
    if media_type in _UNNAMED_TYPES:
        media_type = document.media_type or (OCI_MANIFEST if document.manifests is None else OCI_INDEX)
        _check_media_type(media_type, frozenset(), what)
    if document.media_type and document.media_type != media_type:
        raise FormatError(f"{what} is served as {media_type!a} but calls itself {document.media_type!a}")
    if document.manifests is not None and (document.layers is not None or document.config is not None):
        raise FormatError(f"{what} is an index and a manifest at once")
    if media_type in INDEX_TYPES and document.config is None and document.layers is None:
        return media_type, Index(document.manifests or ())
    if media_type in MANIFEST_TYPES and document.config is not None:
        return media_type, Manifest(document.config, document.layers or ())
    raise FormatError(f"{what} is not what its media type {media_type!a} says")


def resolve(roots: Iterable[Descriptor], read: Read, platform: str | None, where: str) -> Resolved:
    """Choose the image for ``platform`` (this machine's where None) among ``roots`` and read its config.

    ``read`` returns a blob as it is, at most :data:`DOCUMENT_LIMIT` bytes; it is verified here. ``where`` is the
    image's name for messages. A single image is taken whatever its platform, unless one was asked for.

    Raises NotFoundError (no such platform; the message lists those there are), FormatError, IntegrityError,
    UnsupportedError, and what ``read`` raises.
    """
    wanted = Platform.parse(platform) if platform else Platform.host()

    def load(blob: Descriptor, kind: str) -> tuple[bytes, str]:
        what = f"{kind} {blob.digest} of {where}"
        check_descriptor(blob, what, DOCUMENT_LIMIT)
        data = read(blob)
        check(data, blob.digest, blob.size, what)
        return data, what

    tops = tuple(roots)
    candidates = _flatten(tops, load, where)
    if len(candidates) == 1 and candidates[0] in tops and not platform:
        blob = candidates[0]
    else:
        blob = _choose(candidates, wanted, where)
    data, what = load(blob, "manifest")
    media_type, manifest = parse(data, blob.media_type, what)
    if isinstance(manifest, Index):  # indexes are followed by their descriptor's type, and this one had none
        raise FormatError(f"{what} is an index, which its descriptor does not say")
    if manifest.config.media_type not in CONFIG_TYPES:
        raise UnsupportedError(
            f"config {manifest.config.digest[:160]!a} of {where} has the media type {manifest.config.media_type!a}",
            hint="this is an artifact, not a container image",
        )
    config, what_config = load(manifest.config, "config")
    fields = decode(config, _Config, what_config)
    if platform and fields.os and fields.architecture:
        built_for = Platform.of(fields.os, fields.architecture, fields.variant or "")
        if len(candidates) == 1 and built_for not in wanted.runnable():
            raise NotFoundError(f"{where} is not for {wanted}", hint=f"it is for {str(built_for)[:80]!a} only")
    subject = Subject(blob.digest, blob.size, media_type)
    layers = _layers(manifest.layers, diff_ids(fields, len(manifest.layers), what_config), where)
    return Resolved(subject, config, layers, manifest.layers)


def diff_ids(config: bytes | _Config, count: int, what: str) -> tuple[str | None, ...]:
    """The digests of the ``count`` uncompressed layers, None for each where the config gives none at all.

    Raises FormatError (malformed, or another number of them).
    """
    fields = decode(config, _Config, what) if isinstance(config, bytes) else config
    ids = fields.rootfs.diff_ids if fields.rootfs else None
    if not ids:
        return (None,) * count
    if len(ids) != count:
        raise FormatError(f"{what} has {len(ids)} diff_ids for {count} layers")
    for diff_id in ids:
        if not is_digest(diff_id):
            raise FormatError(f"{what} has a malformed diff_id {diff_id[:160]!a}")
    return ids


def minimal_config(platform: str | None, ids: Iterable[str] = ()) -> bytes:
    """A config for a root file system that came without one: the platform, and nothing to run."""
    chosen = Platform.parse(platform) if platform else Platform.host()
    config: dict[str, Any] = {"architecture": chosen.architecture, "os": chosen.os}
    if chosen.variant and str(chosen).endswith(chosen.variant):
        config["variant"] = chosen.variant
    return msgspec.json.encode({**config, "config": {}, "rootfs": {"type": "layers", "diff_ids": list(ids)}})


def _flatten(
    roots: tuple[Descriptor, ...], load: Callable[[Descriptor, str], tuple[bytes, str]], where: str
) -> list[Descriptor]:
    """The image manifests below ``roots``, indexes replaced by what they list, in order."""
    found: list[Descriptor] = []
    indexes = 0
    pending = [(blob, 0) for blob in reversed(roots)]
    while pending:
        blob, depth = pending.pop()
        if _is_attestation(blob):
            continue
        if blob.media_type not in INDEX_TYPES:
            found.append(blob)
            continue
        indexes += 1
        if depth >= _NESTING or indexes > _INDEXES:
            raise FormatError(f"index {blob.digest[:160]!a} of {where} is nested too deeply")
        data, what = load(blob, "index")
        _, index = parse(data, blob.media_type, what)
        if isinstance(index, Index):
            pending.extend((child, depth + 1) for child in reversed(index.manifests))
    return found


def _is_attestation(blob: Descriptor) -> bool:
    """BuildKit's provenance and bills of materials ride in indexes as manifests for no platform."""
    if (blob.annotations or {}).get("vnd.docker.reference.type") == "attestation-manifest":
        return True
    return blob.platform is not None and (blob.platform.os, blob.platform.architecture) == ("unknown", "unknown")


def _platform(blob: Descriptor) -> Platform | None:
    fields = blob.platform
    if fields is None or not (fields.os and fields.architecture):
        return None
    return Platform.of(fields.os, fields.architecture, fields.variant or "")


def _choose(candidates: list[Descriptor], wanted: Platform, where: str) -> Descriptor:
    by_platform: dict[Platform | None, Descriptor] = {}
    for blob in candidates:
        by_platform.setdefault(_platform(blob), blob)  # as Docker: the first entry of a platform counts
    for platform in wanted.runnable():
        if platform in by_platform:
            return by_platform[platform]
    if len(candidates) == 1 and None in by_platform:
        return candidates[0]
    there = ", ".join(sorted({str(platform)[:80] for platform in by_platform if platform}))
    raise NotFoundError(
        f"{where} has no image for {wanted}",
        hint=f"choose with --platform: {ascii(there)[1:-1]}" if there else "it lists no image for any platform",
    )


def _layers(blobs: tuple[Descriptor, ...], ids: tuple[str | None, ...], where: str) -> tuple[Layer, ...]:
    for blob in blobs:
        check_descriptor(blob, f"a layer of {where}")
        if blob.media_type not in LAYER_TYPES:
            raise UnsupportedError(
                f"layer {blob.digest} of {where} has the media type {blob.media_type!a}",
                hint="encrypted layers must be decrypted first" if "encrypted" in blob.media_type else None,
            )
    return tuple(
        Layer(blob.digest, blob.size, blob.media_type, diff_id) for blob, diff_id in zip(blobs, ids, strict=True)
    )


def _check_media_type(media_type: str, others: frozenset[str], what: str) -> None:
    if media_type in (_SCHEMA1, _SCHEMA1.replace("json", "prettyjws")):
        hint = "push the image again with a current tool"
        raise UnsupportedError(f"{what} has Docker's schema 1, which registries gave up", hint=hint)
    if media_type not in INDEX_TYPES | MANIFEST_TYPES | others:
        raise UnsupportedError(f"{what} has the media type {media_type[:160]!a}, which is not an image's")
