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

__all__ = ["RootfsImage", "open_image", "own_name"]

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
    transport, rest = _transport(name)
    if transport == "docker":
        from erofsgen.oci.registry import RegistryImage  # not at the top: httpx takes its time, most images are local

        return RegistryImage(
            _reference(rest),
            platform=platform,
            tls_verify=tls_verify,
            authfile=authfile,
            downloads=downloads,
            progress=shown,
        )
    called = own_name(name)
    if transport == "tar":
        return TarImage(Path(rest), name=called, platform=platform, downloads=downloads, progress=shown)
    if transport == "dir":
        return RootfsImage(Path(rest), name=called, platform=platform)
    path, tag = _split(rest)
    if transport == "oci":
        from erofsgen.oci.layout import open_layout

        return open_layout(path, tag, name=called, platform=platform)
    from erofsgen.oci.archive import open_docker_archive, open_oci_archive

    if transport == "oci-archive":
        return open_oci_archive(path, tag, name=called, platform=platform, downloads=downloads, progress=shown)
    return open_docker_archive(path, tag, name=called, platform=platform, downloads=downloads, progress=shown)


def own_name(name: str) -> str:
    """What the image that ``name`` names is called where nobody says otherwise: ``open_image(name).name``.

    It need not exist. Raises UsageError (malformed), UnsupportedError.
    """
    transport, rest = _transport(name)
    if transport == "docker":
        return ref_name(str(_reference(rest)))
    if transport in ("tar", "dir"):
        return _base_name(Path(rest))
    path, tag = _split(rest)
    return ref_name(tag) if tag and transport != "docker-archive" else _base_name(path)


def _transport(name: str) -> tuple[str, str]:
    """The transport, and what stands behind it. Raises UsageError, UnsupportedError."""
    transport, colon, rest = name.partition(":")
    if colon and transport in _FOREIGN:
        raise UnsupportedError(f"cannot read {transport}: images", hint=f"`skopeo copy {name} oci:DIR` makes a layout")
    if not colon or transport not in TRANSPORTS or (transport == "docker" and not rest.startswith("//")):
        return "docker", name
    if transport == "docker":
        return transport, rest[2:]
    if not rest:
        raise UsageError(f"{name} names no file", hint=f"write {transport}:PATH")
    return transport, rest


def _reference(text: str) -> Reference:
    """An image in a registry. Raises UsageError."""
    try:
        return Reference.parse(text)
    except UsageError as error:
        if os.path.exists(text):
            kind = "oci, dir" if os.path.isdir(text) else "oci-archive, docker-archive, tar"
            error.hint = f"for the path, say what it is: {', '.join(f'{one}:{text}' for one in kind.split(', '))}"
        raise


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
