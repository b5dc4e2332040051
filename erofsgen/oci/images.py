"""One door for every image: transports are named as skopeo and podman name them.

=========================== ======================================================================================
``NAME[:TAG|@DIGEST]``      an image in a registry, completed as Docker does: ``docker.io/library/NAME:latest``
``docker://…``              the same
``oci:DIR[:TAG]``           an OCI image layout
``oci-archive:FILE[:TAG]``  an OCI image layout in a tar
``docker-archive:FILE[:REF]``  what ``docker save`` writes
``tar:FILE``                a root file system in a tar
``dir:DIR``                 a root file system in a directory
=========================== ======================================================================================

Archives may be compressed with gzip, zstd, xz or bzip2.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

from erofsgen.errors import UnsupportedError, UsageError
from erofsgen.oci.reference import Reference, ref_name
from erofsgen.oci.source import SourceImage
from erofsgen.oci.tarball import RootfsImage, TarImage
from erofsgen.progress import SILENT, Progress

__all__ = ["RootfsImage", "open_image"]

TRANSPORTS: Final = ("docker", "oci", "oci-archive", "docker-archive", "tar", "dir")
_FOREIGN: Final = frozenset({"atomic", "containers-storage", "docker-daemon", "ostree", "sif", "tarball"})
"""Transports of skopeo and podman that are not understood here."""
_SUFFIXES: Final = re.compile(r"(?:\.(?:oci|docker))?(?:\.(?:tar|tgz|txz|tbz2?|tzst))?(?:\.(?:gz|zst|xz|bz2))?$")


def open_image(
    name: str,
    *,
    platform: str | None = None,
    tls_verify: bool = True,
    authfile: str | None = None,
    downloads: Path | None = None,
    progress: Progress | None = None,
) -> SourceImage:
    """Open the image that ``name`` names, as the module's table says.

    ``platform`` is ``os/architecture[/variant]``, this machine's by default. ``tls_verify`` and ``authfile`` are for
    registries. ``downloads`` is where layers are kept while they are downloaded or unpacked, a temporary directory by
    default; in a named one an interrupted download is continued.

    Raises UsageError (malformed), NotFoundError (no such image, tag or platform), FormatError, IntegrityError,
    RemoteError, StorageError, UnsupportedError.
    """
    shown = progress or SILENT
    transport, colon, rest = name.partition(":")
    if colon and transport in _FOREIGN:
        raise UnsupportedError(f"cannot read {transport}: images", hint=f"`skopeo copy {name} oci:DIR` makes a layout")
    if not colon or transport not in TRANSPORTS or (transport == "docker" and not rest.startswith("//")):
        return _open_registry(name, platform, tls_verify, authfile, downloads, shown)
    if transport == "docker":
        return _open_registry(rest[2:], platform, tls_verify, authfile, downloads, shown)
    if not rest:
        raise UsageError(f"{name} names no file", hint=f"write {transport}:PATH")
    if transport == "tar":
        path = Path(rest)
        return TarImage(path, name=_base_name(path), platform=platform, downloads=downloads, progress=shown)
    if transport == "dir":
        return RootfsImage(Path(rest), name=_base_name(Path(rest)), platform=platform)
    path, tag = _split(rest)
    called = ref_name(tag) if tag and transport != "docker-archive" else _base_name(path)
    if transport == "oci":
        from erofsgen.oci.layout import open_layout

        return open_layout(path, tag, name=called, platform=platform)
    from erofsgen.oci.archive import open_docker_archive, open_oci_archive

    if transport == "oci-archive":
        return open_oci_archive(path, tag, name=called, platform=platform, downloads=downloads, progress=shown)
    return open_docker_archive(path, tag, name=called, platform=platform, downloads=downloads, progress=shown)


def _open_registry(
    text: str, platform: str | None, tls_verify: bool, authfile: str | None, downloads: Path | None, progress: Progress
) -> SourceImage:
    try:
        reference = Reference.parse(text)
    except UsageError as error:
        if os.path.exists(text):
            kind = "oci, dir" if os.path.isdir(text) else "oci-archive, docker-archive, tar"
            error.hint = f"for the path, say what it is: {', '.join(f'{one}:{text}' for one in kind.split(', '))}"
        raise
    from erofsgen.oci.registry import RegistryImage  # not at the top: httpx takes its time, and most images are local

    return RegistryImage(
        reference,
        platform=platform,
        tls_verify=tls_verify,
        authfile=authfile,
        downloads=downloads,
        progress=progress,
    )


def _split(text: str) -> tuple[Path, str | None]:
    """``PATH[:TAG]``, cut at the first colon, or at a later one where only that leaves a path that exists."""
    cuts = [match.start() for match in re.finditer(":", text)]
    for cut in [*cuts, len(text)]:
        if cut and os.path.exists(text[:cut]):
            return Path(text[:cut]), text[cut + 1 :] or None
    path, _, tag = text.partition(":")
    return Path(path), tag or None


def _base_name(path: Path) -> str:
    """What an image without a name of its own is called after."""
    return ref_name(_SUFFIXES.sub("", path.resolve().name) or "image")
