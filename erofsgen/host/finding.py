"""An image of a store into the host cache, as far as a mount needs it, by whoever is quickest at that.

A daemon that runs is asked at once where the store is remote: its worker has that open, and has imported what reads
indexes and tables. Either takes as long as a small container's start. Where none runs, or it fails, this process does
it: it may know more than the daemon, whose environment is another, and tries longer. A directory is open at once.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from erofsgen.errors import ErofsgenError
from erofsgen.host.daemon.client import Client
from erofsgen.progress import SILENT, Progress
from erofsgen.store.open import absolute

if TYPE_CHECKING:
    from erofsgen.host.cache.cache import CachedImage, HostCache
    from erofsgen.store.image import Image


class Finding:
    """The image called ``name`` in the store ``url``, on its way into the host cache below ``root``.

    What takes its time can be done, or imported, before :meth:`image` waits for it. Who does not must :meth:`close` it.
    """

    def __init__(self, root: Path, url: str, name: str) -> None:
        self._url, self._name = absolute(url), name  # the daemon has another working directory
        self._client: Client | None = None
        if "://" not in self._url:
            return
        with suppress(ErofsgenError):
            self._client = Client.connect(root)
            if self._client is not None:
                self._client.tell_worker("add", store=self._url, name=name)

    def image(self, cache: HostCache, progress: Progress = SILENT) -> Image | CachedImage:
        """The image. Raises as :func:`erofsgen.host.pull.find` does."""
        from erofsgen.host.pull import Shown, find

        if self._client is not None:
            with self._client, Shown(progress) as shown, suppress(ErofsgenError):
                added = self._client.answer(shown.show)
                return cache.open_image(str(added["digest"]), str(added["name"]))
        return find(cache, self._url, self._name)

    def close(self) -> None:
        """Nobody waits for it any more."""
        if self._client is not None:
            self._client.close()
