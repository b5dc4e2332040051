"""``index.json`` of an OCI image layout: the references of a directory store, wherever it is read."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from erofsgen.errors import FormatError
from erofsgen.store import keys
from erofsgen.store.base import Descriptor

REF_NAME: Final = "org.opencontainers.image.ref.name"

Index = dict[str, Any]
"""The document as it is: what other tools wrote into it stays."""


def empty() -> Index:
    """An index without references."""
    return {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": []}


def parse(data: bytes, *, what: str) -> Index:
    """The document. Raises FormatError naming ``what``."""
    try:
        index = msgspec.json.decode(data, type=dict[str, Any])
        msgspec.convert(index.setdefault("manifests", []), list[Descriptor])
    except msgspec.MsgspecError as error:
        raise FormatError(f"{what}: {error}") from None
    return index


def references(index: Index) -> dict[str, Descriptor]:
    """Every name with its manifest's descriptor."""
    manifests = msgspec.convert(index["manifests"], list[Descriptor])
    return {name: item for item in manifests if (name := item.annotations.get(REF_NAME)) is not None}


def images(index: Index) -> dict[str, Descriptor]:
    """Every image's name with its manifest's descriptor."""
    found = references(index)
    return {name: found[name] for name in keys.images(found)}


def put(index: Index, name: str, manifest: Descriptor) -> None:
    """Let ``name`` mean ``manifest``."""
    remove(index, name)
    named = msgspec.structs.replace(manifest, annotations={**manifest.annotations, REF_NAME: name}, data=None)
    index["manifests"].append(msgspec.to_builtins(named))


def remove(index: Index, name: str) -> bool:
    """Drop a name; whether it was there."""
    manifests = index["manifests"]
    index["manifests"] = [item for item in manifests if (item.get("annotations") or {}).get(REF_NAME) != name]
    return len(index["manifests"]) != len(manifests)
