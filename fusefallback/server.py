"""The process that answers for one mount: ``python -m fusefallback.server``; :mod:`erofsgen.host.mount.fuse` starts it.

It ends when the mount is gone. When it dies before, nobody can take its place: readers get ENOTCONN.
"""

from __future__ import annotations

import argparse
import gc
import logging
import mmap
import os
import resource
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Final

import pyfuse3
import trio

from erofsgen.erofs.flatten import flatten
from erofsgen.erofs.reader import Index
from erofsgen.errors import ErofsgenError, StorageError
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


async def _serve(session: Session, link: Link) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(link.run)
        await session.run()
        nursery.cancel_scope.cancel()


def _detach() -> None:
    """Go on as a process of nobody's; whoever waits is told its number."""
    pid = os.fork()
    if pid:
        os.write(1, b"%d\n" % pid)
        os._exit(0)
    os.setsid()
    os.dup2(2, 1)


def _raise_limit() -> None:
    """Two files for every pack."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def main() -> None:
    """Serve, in the background once everything is ready."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--plane", choices=["fuse", "blockfuse"], required=True)
    parser.add_argument("--mount", required=True, help="the mount's id")
    parser.add_argument("--image", required=True, help="digest of its manifest")
    parser.add_argument("--flat", action="store_true")
    parser.add_argument("device", type=int, help="descriptor of /dev/fuse that the mount uses")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%Y-%m-%dT%H:%M:%S")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.set_inheritable(options.device, False)
    _raise_limit()
    try:
        tuning = Tuning.from_environment()
        link = Link(options.root, options.mount)
        trio.run(link.connect)
        image = HostCache(options.root).image(options.image, "")
        operations = _operations(options.plane, image, link, tuning, flat=options.flat)
        session = Session(operations, options.device, tuning)
    except ErofsgenError as error:
        sys.stderr.write(f"error: {error}\n" + (f"hint: {error.hint}\n" if error.hint else ""))
        sys.exit(error.exit_code)
    except OSError as error:
        sys.stderr.write(f"error: the kernel does not answer: {error.strerror}\n")
        sys.exit(StorageError.exit_code)
    _detach()
    if not tuning.collect:
        gc.collect()
        gc.freeze()
    _logger.info("server %d of %s: %s", os.getpid(), options.mount, options.plane)
    trio.run(_serve, session, link)


if __name__ == "__main__":
    main()
