"""What a process does that answers for one mount."""

from __future__ import annotations

import logging
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec
import pyfuse3
import trio

from erofsgen.erofs.flatten import flatten
from erofsgen.erofs.reader import Index
from erofsgen.errors import StorageError
from erofsgen.host.cache.cache import CachedImage, HostCache
from fusefallback.content import Content, ServedPack
from fusefallback.flatpacks import FlatPacks, flat_file, pack_files
from fusefallback.link import Link
from fusefallback.session import Session
from fusefallback.tree import Tree
from fusefallback.tuning import Tuning

_logger: Final = logging.getLogger(__name__)


def _operations(plane: str, image: CachedImage, link: Link, tuning: Tuning, *, flat: bool) -> pyfuse3.Operations:
    packs = [ServedPack(path, link.read_ahead) for path in image.devices()]
    try:
        with image.index.open("rb") as file:
            index = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise StorageError(f"{image.index}: {error.strerror}", hint="run `erofsgen pull` again") from error
    if plane == "fuse":
        return Tree(Index(index), Content(link, index, packs, tuning))
    if not flat:
        return FlatPacks(Content(link, index, packs, tuning), pack_files(packs), direct=tuning.direct)
    whole = flatten(bytes(index))
    content = Content(link, memoryview(whole.index), packs, tuning)
    return FlatPacks(content, [flat_file(whole, packs)], direct=tuning.direct)


class Order(msgspec.Struct, frozen=True):
    """What a server is to be for: the mount whose id is ``mount``, of the image with the manifest's digest ``image``.

    ``flat``: packs in one file. ``tuning``: as :data:`~erofsgen.host.mount.fuse.VARIABLE` in the environment has it.
    """

    root: str
    plane: str
    mount: str
    image: str
    flat: bool
    tuning: str


async def _serve(session: Session, link: Link) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(link.run)
        await session.run()
        nursery.cancel_scope.cancel()


def serve(order: Order, device: int, ready: Callable[[], None]) -> None:
    """Answer for the mount that uses ``device``, which is this process's own from now on, until the mount is gone.

    ``ready`` is called when everything is, but for the mount's first request; then nothing is raised any more. Before:
    what :meth:`Link.connect` does, NotFoundError, FormatError, StorageError, UsageError.
    """
    root = Path(order.root)
    tuning = Tuning.of(order.tuning)
    link = Link(root, order.mount)
    trio.run(link.connect)
    image = HostCache(root).open_image(order.image)
    operations = _operations(order.plane, image, link, tuning, flat=order.flat)
    try:
        session = Session(operations, device, tuning)
    except OSError as error:
        raise StorageError(f"the kernel does not answer: {error.strerror}") from error
    _logger.info(
        "server %d of %s: %s", os.getpid(), order.mount, order.plane,
        extra={"mount": order.mount, "digest": order.image, "plane": order.plane},
    )  # fmt: skip
    ready()
    trio.run(_serve, session, link)
