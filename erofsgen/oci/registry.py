"""Images in registries: ``docker://``, after the OCI distribution specification 1.1."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, Self

from erofsgen.oci.download import Downloads
from erofsgen.oci.manifest import Descriptor, resolve
from erofsgen.oci.patience import Policy
from erofsgen.oci.reference import Reference, ref_name
from erofsgen.oci.registryclient import RegistryClient
from erofsgen.oci.source import Layer, Subject
from erofsgen.progress import Progress


class RegistryImage:
    """A :class:`~erofsgen.oci.source.SourceImage` in a registry.

    Layers are downloaded whole before they are opened, several at a time.
    Without ``downloads`` they go to a temporary directory. With it, an interrupted download is continued by a later
    run; when the ``with`` block ends without an exception, the files are dropped.
    """

    def __init__(
        self,
        reference: Reference,
        *,
        platform: str | None = None,
        tls_verify: bool = True,
        authfile: str | None = None,
        downloads: Path | None = None,
        progress: Progress | None = None,
        policy: Policy | None = None,
    ) -> None:
        self.name = ref_name(str(reference))
        self._client = RegistryClient(reference, tls_verify=tls_verify, authfile=authfile, policy=policy)
        try:
            root, data = self._client.manifest(reference.digest or reference.tag or "")

            def read(blob: Descriptor) -> bytes:
                return data if blob.digest == root.digest else self._client.document(blob)

            resolved = resolve([root], read, platform, str(reference))
            self._blobs = resolved.blobs
            self.subject: Subject | None = resolved.subject
            self.config = resolved.config
            self.layers: tuple[Layer, ...] = resolved.layers
            self._downloads = Downloads(
                self._client.open_blob, self._client.http, downloads, where=str(reference), progress=progress
            )
        except BaseException:
            self._client.http.dispose()
            raise

    def fetch(self, indices: Iterable[int]) -> None:
        """Start to download these layers."""
        for index in indices:
            self._downloads.start(self._blobs[index])

    def open_layer(self, index: int) -> BinaryIO:
        """The verified blob; waits until it has arrived.

        Raises NotFoundError, IntegrityError, RemoteError, StorageError.
        """
        return self._downloads.open(self._blobs[index])

    def close(self, *, keep: bool = False) -> None:
        """Stop downloads and drop their files; with ``keep``, leave what a later run can use."""
        self._downloads.close(keep=keep)
        self._client.http.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close(keep=exc[0] is not None)
