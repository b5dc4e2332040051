"""Tables of packs that say what is where: from the host cache, or from the first store that has them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from erofsgen.errors import ErofsgenError, NotFoundError
from erofsgen.host.cache.cache import HostCache
from erofsgen.host.cache.part import storage
from erofsgen.pack.toc import Toc, read_dictionary
from erofsgen.store.base import Store
from erofsgen.store.manifest import Pack


class Tables:
    """Tables of contents and chunk dictionaries, of ``cache``, if there is one, or of ``stores``."""

    def __init__(self, cache: HostCache | None, stores: Sequence[Store], problems: list[str]) -> None:
        self._cache = cache
        self._stores = stores
        self._problems = problems

    def toc(self, pack: Pack) -> Toc | None:
        """A pack's table of contents, if it is at hand."""
        files = None if self._cache is None else self._cache.layout.find(pack.hex)
        what = f"pack {pack.hex}"
        error: ErofsgenError | None = None
        if files is not None:
            try:
                with storage(files.toc):
                    return Toc(files.toc.read_bytes(), pack.toc, what=what)
            except ErofsgenError as raised:
                error = raised
        for store in self._stores:
            try:
                return Toc(store.read(pack.digest, pack.toc.offset, pack.toc.size), pack.toc, what=what)
            except ErofsgenError as raised:
                error = raised
        self._say(f"{what}: no table of contents", error)
        return None

    def digests(self, pack: Pack, toc: Toc, blocks: npt.NDArray[np.int64]) -> dict[int, str]:
        """BLAKE3 of the chunks that begin at ``blocks``, as far as the pack's dictionary is at hand and has them."""
        for store in self._stores:
            try:
                rows = read_dictionary(
                    lambda offset, length, store=store: store.read(pack.digest, offset, length),  # type: ignore[misc]
                    toc,
                    what=f"pack {pack.hex}",
                )
            except NotFoundError:
                continue
            except ErofsgenError as error:
                self._say(f"pack {pack.hex}: no chunk dictionary", error)
                continue
            rows = rows[np.isin(rows["block"], blocks)]
            return {int(row["block"]): row["digest"].tobytes().hex() for row in rows}
        return {}

    def _say(self, what: str, error: ErofsgenError | None) -> None:
        self._problems.append(what if error is None else f"{what}: {error}")
