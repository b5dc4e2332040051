"""Objects of an earlier boot, before the kernel gets them again: what is in them is compared with its digests.

What was made durable needs no look; after a crash of the machine that leaves what came within some seconds before.
``python -m fscache_daemon.recover ROOT`` does it in a process of its own, for what it takes to verify would stay in the
supervisor's memory.
"""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from erofsgen.errors import ErofsgenError, StorageError
from erofsgen.host import linux, logs
from erofsgen.host.cache.objects import Objects, Stored
from erofsgen.host.cache.presence import Presence

if TYPE_CHECKING:
    from erofsgen.host.cache.cache import HostCache
    from erofsgen.pack.toc import Toc
    from fscache_daemon.opened import OpenPack

_logger: Final = logging.getLogger(__name__)
_PIECE: Final = 1 << 20


def settle(objects: Objects, packs: Iterable[OpenPack]) -> None:
    """Make durable what closed objects have. From any thread; an error is logged, and means a look at the next boot."""
    for pack in packs:
        file = objects.find(pack.key)
        if file is None:
            continue  # the kernel has thrown it away
        try:
            with file.open("r+b") as data, Presence.open(pack.map, len(pack.starts) - 1) as presence:
                presence.make_durable(lambda data=data: os.fdatasync(data.fileno()))  # type: ignore[misc]
        except (ErofsgenError, OSError) as error:
            _logger.error("%s: %s", file, error)


def recovered(root: Path, objects: Objects) -> None:
    """See to it that objects hold nothing but what their records say. Raises StorageError."""
    if any(_is_suspect(objects, stored) for stored in objects.all()):
        command = [sys.executable, "-m", "fscache_daemon.recover", os.fspath(root)]
        if subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode:
            raise StorageError(f"{objects.directory}: objects of an earlier boot could not be verified")


def recover(cache: HostCache) -> None:
    """Verify what is not durable and of another boot; drop what is wrong. Raises StorageError."""
    from erofsgen.host.cache.manage import packs_of
    from erofsgen.pack.toc import Toc

    objects = Objects(cache.layout)
    packs = {pack.hex: pack for pack in packs_of(cache.images())}
    for stored in objects.all():
        if not _is_suspect(objects, stored):
            continue
        try:
            if stored.of.startswith("sha256:"):
                _recover_index(cache, objects, stored)
            elif stored.of in packs:
                toc = cache.files(stored.of).toc.read_bytes()
                _recover_pack(objects, stored, Toc(toc, packs[stored.of].toc, what=f"pack {stored.of}"))
            else:
                _drop(objects, stored, "no image of the cache has this pack")
        except (ErofsgenError, OSError) as error:
            _drop(objects, stored, str(error))


def _is_suspect(objects: Objects, stored: Stored) -> bool:
    if stored.of.startswith("sha256:"):
        return not objects.vouched(stored.key)
    frames = Presence.frames_of(objects.map(stored.key))
    if not frames:
        return True  # a damaged map
    with Presence.open(objects.map(stored.key), frames) as presence:
        return bool(presence.suspects())


def _recover_pack(objects: Objects, stored: Stored, toc: Toc) -> None:
    from blake3 import blake3

    with stored.file.open("r+b") as file, Presence.open(objects.map(stored.key), len(toc)) as presence:
        wrong = []
        for frame in presence.suspects():
            data = os.pread(file.fileno(), int(toc.device_sizes[frame]), int(toc.device_offsets[frame]))
            if blake3(data).digest() == toc.digest(frame):
                presence.mark_written(frame)
            else:
                wrong.append(frame)
        presence.mark_absent(wrong)
        for frame in presence.missing(range(len(toc))):  # what is not counted must not be there
            linux.punch_hole(file.fileno(), int(toc.device_offsets[frame]), int(toc.device_sizes[frame]))
        presence.make_durable(lambda: os.fdatasync(file.fileno()))
    if wrong:
        _logger.warning(
            "%s: %d frames of an earlier boot are not right; they come anew", stored.file, len(wrong),
            extra={"pack": stored.of},
        )  # fmt: skip


def _recover_index(cache: HostCache, objects: Objects, stored: Stored) -> None:
    index = cache.image_path(stored.of, "erofs")
    with stored.file.open("rb") as file, index.open("rb") as right:
        at = 0
        while (start := _data(file.fileno(), at)) is not None:
            if os.pread(file.fileno(), _PIECE, start) != os.pread(right.fileno(), _PIECE, start):
                # holes within the piece, or worse: it comes anew, and quickly
                _drop(objects, stored, "the index is not as it should be")
                return
            at = start + _PIECE
    objects.vouch(stored.key, stored.of)


def _data(descriptor: int, at: int) -> int | None:
    """Where the next data begins, down to the piece; None behind the last."""
    try:
        return os.lseek(descriptor, at, os.SEEK_DATA) // _PIECE * _PIECE
    except OSError as error:
        if error.errno == errno.ENXIO:
            return None
        raise


def _drop(objects: Objects, stored: Stored, why: str) -> None:
    _logger.warning("%s: removed: %s", stored.file, why)
    stored.file.unlink(missing_ok=True)
    objects.forget(stored.key)


def main() -> None:
    """See the module."""
    from erofsgen.host.cache.cache import HostCache

    logs.set_up()
    recover(HostCache(Path(sys.argv[1])))


if __name__ == "__main__":
    main()
