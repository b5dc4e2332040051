"""The profiles that lie beside an image, as a store keeps them: a manifest under a reserved name, a blob per command.

::

    sha256-<hex of the image's manifest>.profile
      └─ manifest     artifactType TYPE, subject: the image's manifest, config: the empty JSON object
           ├─ layer   an encoded profile (erofsgen.profile.profile), of media type TYPE, annotated with its command and
           └─ …       the number of its runs; the one that was changed last comes first. Small ones are in ``data``, too

The name is that of cosign's scheme for attachments, so it is possible in every kind of store, and one request finds it
or finds that there is none. A registry lists the manifest among the image's referrers, too.

A profile is a hint. Whoever changes one reads what is there and replaces it, without a lock: of two at the same time
the last one wins and the other's run is lost. What is there is always whole, since blobs are written before the
manifest that names them, and that before it is named. Images do not refer to their profiles: the same image has the
same digest whatever was learnt of it.

Everything read is hostile: sizes and numbers are limited before anything is fetched, and bytes are checked against
their digests.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from contextlib import suppress
from typing import Final, NamedTuple

import msgspec

from erofsgen.errors import FormatError, IntegrityError, NotFoundError
from erofsgen.store.base import Descriptor, Store
from erofsgen.store.manifest import MANIFEST_TYPE, Manifest

TYPE: Final = "application/vnd.erofsgen.profile.v1"
"""Of the manifest as an artifact, and of an encoded profile."""

COMMAND: Final = "org.erofsgen.profile.command"
"""On a layer: whose profile it is."""
RUNS: Final = "org.erofsgen.profile.runs"
"""On a layer: how many runs stand behind it."""

COUNT: Final = 32
"""Profiles beside an image at most: those that were changed last stay."""
LIMIT: Final = 64 << 20
"""Bytes of all of them at most."""
COMMAND_LIMIT: Final = 200
"""Characters of a command at most."""

_MANIFEST_LIMIT: Final = 1 << 20
_EMBEDDABLE: Final = 40 << 10
"""Bytes of all profiles that are in the manifest, too: with it they are at most as many as a reference can have."""
_EMPTY: Final = b"{}"
_EMPTY_TYPE: Final = "application/vnd.oci.empty.v1+json"


class Beside(NamedTuple):
    """What lies beside an image: the manifest, and a layer for each command, the one that was changed last first."""

    manifest: Descriptor
    layers: list[Descriptor]


def find(store: Store, image: str) -> Beside | None:
    """What lies beside the image with the manifest digest ``image``; None, after one request, where nothing does.

    Raises FormatError, IntegrityError, NotFoundError (damaged), RemoteError, StorageError.
    """
    manifest = store.profiles(image)
    return None if manifest is None else open_manifest(store, image, manifest)


def open_manifest(store: Store, image: str, descriptor: Descriptor) -> Beside:
    """As :func:`find`, where the manifest is known already."""
    what = f"profiles of {image}"
    data = _read(store, descriptor, _MANIFEST_LIMIT, what)
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except msgspec.MsgspecError as error:
        raise FormatError(f"{what}: manifest {descriptor.digest}: {error}") from None
    if manifest.artifact_type != TYPE or manifest.subject is None or manifest.subject.digest != image:
        raise FormatError(f"{what}: manifest {descriptor.digest} is not about them")
    layers = manifest.layers
    if len(layers) > COUNT or any(layer.size < 0 for layer in layers) or sum(layer.size for layer in layers) > LIMIT:
        raise FormatError(f"{what}: more than {COUNT} or more than {LIMIT} bytes")
    for layer in layers:
        if layer.media_type != TYPE or COMMAND not in layer.annotations:
            raise FormatError(f"{what}: blob {layer.digest} is none")
        _ = runs_of(layer), command_of(layer)
    if len({command_of(layer) for layer in layers}) != len(layers):
        raise FormatError(f"{what}: two are of the same command")
    return Beside(descriptor, layers)


def command_of(layer: Descriptor) -> str:
    """Whose profile a layer is. Raises FormatError."""
    command = layer.annotations[COMMAND]
    if len(command) > COMMAND_LIMIT:
        raise FormatError(f"blob {layer.digest}: a command of {len(command)} characters")
    return command


def runs_of(layer: Descriptor) -> int:
    """How many runs stand behind a layer. Raises FormatError."""
    text = layer.annotations.get(RUNS, "")
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise FormatError(f"blob {layer.digest}: no usable {RUNS} annotation")
    return int(text)


def read(store: Store, layer: Descriptor) -> bytes:
    """A layer's encoded profile. Raises as :func:`find`."""
    return _read(store, layer, LIMIT, "a profile")


def put(store: Store, command: str, runs: int, encoded: bytes) -> Descriptor:
    """Write an encoded profile; its layer, of no manifest yet. Within :meth:`Store.building`. Raises FormatError for a
    command that nobody could read back."""
    if len(command) > COMMAND_LIMIT:
        raise FormatError(f"a profile of a command of {len(command)} characters, at most {COMMAND_LIMIT} are possible")
    digest, size = store.put(encoded)
    return Descriptor(TYPE, digest, size, {COMMAND: command, RUNS: str(runs)}, data=encoded)


def write(store: Store, image: Descriptor, layers: Iterable[Descriptor]) -> None:
    """Let these lie beside ``image``, and nothing else. Within :meth:`Store.building`.

    Those beyond :data:`COUNT` and :data:`LIMIT` are left out, from the end. Raises FormatError (one alone is too
    large), UnsupportedError (the store cannot be written to), RemoteError, StorageError.
    """
    kept: list[Descriptor] = []
    room, embeddable = LIMIT, _EMBEDDABLE
    for layer in list(layers)[:COUNT]:
        room -= layer.size
        if room < 0:
            break
        embedded = layer.data is not None and layer.size <= embeddable
        embeddable -= embedded * layer.size
        kept.append(layer if embedded else msgspec.structs.replace(layer, data=None))
    if not kept:
        if room < 0:
            raise FormatError(f"a profile of more than {LIMIT} bytes")
        forget(store, image.digest)
        return
    manifest = Manifest(
        schema_version=2,
        media_type=MANIFEST_TYPE,
        artifact_type=TYPE,
        config=Descriptor(_EMPTY_TYPE, *store.put(_EMPTY)),
        layers=kept,
        subject=Descriptor(MANIFEST_TYPE, image.digest, image.size),
    )
    data = msgspec.json.encode(manifest)
    digest, size = store.put(data)
    store.tag_profiles(image.digest, Descriptor(MANIFEST_TYPE, digest, size, artifact_type=TYPE, data=data))


def copy(source: Store, destination: Store, image: Descriptor) -> list[str]:
    """Copy what lies beside ``image``; the commands whose profiles changed. Within the destination's ``building()``.

    Where both have a profile of a command, the one with more runs behind it stays, the source's if they have as many:
    runs are not added up, so copying again changes nothing. Raises as :func:`find` and :func:`write` do.
    """
    theirs = find(source, image.digest)
    if theirs is None:
        return []
    ours: dict[str, Descriptor] = {}
    with suppress(FormatError, NotFoundError):  # damaged: nothing is lost
        found = find(destination, image.digest)
        ours = {command_of(layer): layer for layer in found.layers} if found else {}
    brought = []
    for layer in theirs.layers:
        here = ours.get(command_of(layer))
        if here is None or (here.digest != layer.digest and runs_of(here) <= runs_of(layer)):
            brought.append(put(destination, command_of(layer), runs_of(layer), read(source, layer)))
    if brought:
        commands = {command_of(layer) for layer in brought}
        write(destination, image, [*brought, *(layer for command, layer in ours.items() if command not in commands)])
    return [command_of(layer) for layer in brought]


def forget(store: Store, image: str) -> None:
    """Let nothing lie beside the image with the manifest digest ``image``; no error where nothing does."""
    with suppress(NotFoundError):
        store.untag_profiles(image)


def blobs(found: Beside) -> dict[str, int]:
    """Digests and sizes of all its blobs."""
    return {_digest(_EMPTY): len(_EMPTY)} | {blob.digest: blob.size for blob in (found.manifest, *found.layers)}


def _read(store: Store, blob: Descriptor, limit: int, what: str) -> bytes:
    """A small blob, checked. Unlike :func:`.image.read_blob` in one request: what lies behind it is of no interest."""
    if not 0 <= blob.size <= limit:
        raise FormatError(f"{what}: blob {blob.digest} claims {blob.size} bytes, at most {limit} are sensible")
    if blob.data is not None and _digest(blob.data) == blob.digest:
        return blob.data
    data = store.read(blob.digest, 0, blob.size)
    if _digest(data) != blob.digest:
        raise IntegrityError(f"{what}: blob {blob.digest} differs from its digest", hint="remove them and record anew")
    return data


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"
