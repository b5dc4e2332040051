"""Data files of the host cache that a plane lets its worker write to, where anybody may: who uses them."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterable
from pathlib import Path

from erofsgen.errors import StorageError
from erofsgen.host.daemon.planes import Done


class Writers:
    """Descriptors of packs' data files, by the packs' SHA-256, each for as long as it has users."""

    def __init__(self) -> None:
        self._descriptors: dict[str, int] = {}
        self._users: dict[str, set[Hashable]] = {}

    def use(self, user: Hashable, data: Path) -> None:
        """``user`` has bytes of a pack written, until :meth:`leave`. Raises StorageError."""
        pack = data.stem
        if pack not in self._descriptors:
            try:
                self._descriptors[pack] = os.open(data, os.O_RDWR | os.O_CLOEXEC)
            except OSError as error:
                raise StorageError(f"{data}: {error.strerror}", hint="run `erofsgen pull` again") from error
            self._users[pack] = set()
        self._users[pack].add(user)

    def arm(self, user: Hashable, datas: Iterable[Path], done: Done) -> None:
        """As :meth:`.planes.Plane.arm`: ``user`` has bytes of all these packs written."""
        try:
            for data in datas:
                self.use(user, data)
        except StorageError as error:
            done(error)
        else:
            done(None)

    def leave(self, user: Hashable) -> list[str]:
        """``user`` needs none any more. Returns the packs that nobody uses now; they are closed."""
        left = []
        for pack, users in list(self._users.items()):
            users.discard(user)
            if not users:
                del self._users[pack]
                os.close(self._descriptors.pop(pack))
                left.append(pack)
        return left

    def get(self, pack: str) -> int | None:
        """The descriptor of a pack that is used."""
        return self._descriptors.get(pack)
