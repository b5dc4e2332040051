"""Images for batches: small, with layers that several of them share; and who works on them."""

from __future__ import annotations

import io
import json
import random
import tarfile
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from servers import OCI_MANIFEST, FaultyRegistry


def layer(name: str, size: int = 300_000) -> bytes:
    """A tar of two files that no layer with another name has: noise and text."""
    buffer = io.BytesIO()
    contents = {"noise": random.Random(name).randbytes(size), "text": f"{name}\n".encode() * 5000}
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for kind, data in contents.items():
            member = tarfile.TarInfo(f"{name}.{kind}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def write_layout(place: Path, *layers: bytes) -> Path:
    """An OCI image layout of one image, ``latest``."""
    content = FaultyRegistry()
    digest = content.add_image(*layers)
    manifest = content.manifests[digest][1]
    blobs = place / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    for name, data in {**content.blobs, digest: manifest}.items():
        (blobs / name.removeprefix("sha256:")).write_bytes(data)
    entry = {
        "mediaType": OCI_MANIFEST,
        "digest": digest,
        "size": len(manifest),
        "annotations": {"org.opencontainers.image.ref.name": "latest"},
    }
    (place / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    (place / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))
    return place


def write_list(place: Path, *lines: str) -> Path:
    """A list for ``build-many``."""
    place.write_text("".join(f"{line}\n" for line in lines))
    return place


class Process(NamedTuple):
    """A line of /proc/PID/stat. Looking there collects no exit code, unlike multiprocessing's own ways."""

    started: int
    pid: int
    state: str
    parent: int
    group: int


def processes() -> list[Process]:
    """All that live, those started first in front; zombies are left out."""
    found = []
    for place in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # gone meanwhile
            fields = place.read_text().rpartition(")")[2].split()
            found.append(Process(int(fields[19]), int(place.parent.name), fields[0], int(fields[1]), int(fields[2])))
    return sorted(process for process in found if process.state not in "ZX")


def descendants(pid: int) -> list[int]:
    """The processes that ``pid`` has started, directly or not."""
    everything = processes()
    family = [pid]
    for member in family:  # which grows
        family += [process.pid for process in everything if process.parent == member]
    return family[1:]
