"""The worker: brings what the supervisor asks for. It may be killed at any moment, and started again.

::

    supervisor ── pack fds, ranges ──► main thread ──► fill engine ──► data files, maps
               ◄── done, complete ───┘     │
    command  ◄── facts, progress ──────── a thread each (:mod:`.tasks`)
                                        housekeeping thread (:mod:`.housekeeping`)

It owns nothing that is not on disk or told to it again: packs are opened when they are first asked for, with the
descriptor that the supervisor hands over, because writing through another would make this process wait for itself.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from erofsgen.errors import ErofsgenError, NotFoundError, StorageError
from erofsgen.host import logs
from erofsgen.host.cache.cache import CachedImage, HostCache
from erofsgen.host.cache.objectfile import ObjectFile
from erofsgen.host.cache.packfile import PackFile
from erofsgen.host.config import Config, load
from erofsgen.host.daemon.channel import Channel, Message
from erofsgen.host.daemon.feeder import Feeder
from erofsgen.host.daemon.housekeeping import Housekeeping
from erofsgen.host.daemon.prefetching import Prefetching
from erofsgen.host.daemon.scrub import Scrubber
from erofsgen.host.daemon.tasks import Tasks
from erofsgen.host.fill.chain import add_chains
from erofsgen.host.fill.engine import Engine, Priority
from erofsgen.host.fill.sources import UrlSource, describe
from erofsgen.host.metrics.address import VARIABLE, Address
from erofsgen.host.profiles import HostProfiles
from erofsgen.store.base import Store
from erofsgen.store.manifest import Pack

_logger: Final = logging.getLogger(__name__)

_PATIENCE: Final = 60.0
"""Seconds to wait for the supervisor's marks."""

_RETRIES: Final = 10
"""Rounds after the first: with the engine's pauses some 20 s, within which most of what fails is well again."""

_RECOVERERS: Final = 2
"""Threads that compare bytes of an earlier boot with their digests."""


class Worker:
    """Fills packs of ``cache`` on behalf of the supervisor at the other end of ``channel``."""

    def __init__(self, cache: HostCache, channel: Channel, options: argparse.Namespace) -> None:
        self.cache = cache
        self.config = _config()
        self.prefetching = Prefetching(self, HostProfiles(cache.root))
        self.engine = Engine(
            [], threads=options.threads, memory=options.memory, retries=_RETRIES, brought=self.prefetching.brought
        )
        self._channel = channel
        self._introduced: dict[str, tuple[Message, int]] = {}  # descriptors to write with, and what is to be known
        self._packs: dict[str, PackFile | ObjectFile] = {}
        self._known: dict[str, Pack] = {}
        self._lock = threading.Lock()  # over the three above
        self._wanted: dict[str, Future[str | None]] = {}
        self._named: dict[str, Future[list[str | None] | None]] = {}
        self._recover = ThreadPoolExecutor(_RECOVERERS, "recover")
        self._housekeeping = Housekeeping(self, complete_at=options.complete_at)
        self._tasks = Tasks(self)
        self._scrub = options.scrub
        self._metrics = _metrics_address()
        self._culls: dict[str, Future[int]] = {}
        cache.cull = self._cull

    def run(self) -> None:
        """Until the supervisor goes."""
        self._housekeeping.start()
        self.prefetching.start()
        if any(tier.feed for tier in self.config.tier):
            Feeder(self.engine, lambda name: self._find(name).size).start()
        if self._scrub:
            Scrubber(self, self._scrub).start()
        if self._metrics is not None:
            self._serve_metrics(self._metrics)
        while (received := self._channel.receive()) is not None:
            message, descriptors = received
            try:
                self._handle(message, descriptors)
            except ErofsgenError as error:
                _logger.error("%s", error)

    def _handle(self, message: Message, descriptors: list[int]) -> None:
        match message["do"]:
            case "pack":
                self._introduce(message, descriptors[0])
            case "fill":
                self._bring(message, Priority.DEMAND, message["deadline"], lambda error: self._done(message, error))
            case "ahead":
                self._bring(message, Priority.READ_AROUND, None, lambda _: None)
            case "forget":
                self._forget(message["pack"])
            case "wanted":
                self._wanted[message["token"]].set_result(message["error"])
            case "named":
                self._named[message["token"]].set_result(message["names"])
            case "prefetch":
                self.prefetching.begin(message)
            case "no prefetch":
                self.prefetching.stop(message["mount"])
            case "recorded":
                self.prefetching.recorded()
            case "freed":
                self._freed(message)
            case "client":
                self._tasks.start(message["command"], socket.socket(fileno=descriptors[0]))

    def status(self) -> dict[str, Any]:
        """For ``status``, and for metrics. From any thread."""
        return {
            "engine": self.engine.stats(),
            "prefetch": self.prefetching.status(),
            "metrics": None if self._metrics is None else str(self._metrics),
        }

    def _serve_metrics(self, address: Address) -> None:
        from erofsgen.host.metrics.collector import TableCollector
        from erofsgen.host.metrics.gather import Gatherer
        from erofsgen.host.metrics.server import MetricsServer

        MetricsServer(address, TableCollector(Gatherer(self.cache, self.status).gather)).start()

    def tell(self, message: Message) -> None:
        """Say something to the supervisor, unless it has gone."""
        with suppress(OSError):
            self._channel.send(message)

    # --- ranges ------------------------------------------------------------------------------------------------------

    def _bring(
        self, message: Message, priority: Priority, deadline: float | None, done: Callable[[BaseException | None], None]
    ) -> None:
        """Have the engine bring a range; ``done`` is called, from any thread, when it is there or cannot be."""
        offset, length = message["offset"], message["length"]
        try:
            pack = self.pack(message["pack"])
            suspects = pack.suspects(offset, length)
        except ErofsgenError as error:
            done(error)
            return

        def request() -> None:
            future = self.engine.request(pack, offset, length, priority=priority, deadline=deadline)
            future.add_done_callback(lambda ended: done(ended.exception()))

        if suspects:
            recovered = self._recover.submit(pack.recover, suspects)
            recovered.add_done_callback(lambda ended: _after(ended, request, done))
        else:
            request()
        self._housekeeping.touched(pack)

    def _done(self, fill: Message, error: BaseException | None) -> None:
        reason = None if error is None else describe(error)
        self.tell({"do": "done", "key": fill["key"], "serial": fill["serial"], "error": reason})

    # --- room --------------------------------------------------------------------------------------------------------

    def _cull(self, wanted: int | None, keep: Collection[str] | None) -> int:
        """Have the plane free what the kernel keeps by itself. Any thread but the main one, which hears the answer."""
        token = secrets.token_hex(8)
        culled = self._culls[token] = Future[int]()
        self.tell({
            "do": "cull", "token": token, "wanted": wanted, "keep": None if keep is None else sorted(keep),
        })  # fmt: skip
        try:
            return culled.result(_PATIENCE)  # the room is given back by then
        except TimeoutError:
            return 0
        finally:
            del self._culls[token]

    def _freed(self, message: Message) -> None:
        self.cache.room.give_back(message["bytes"])
        culled = self._culls.get(message.get("token", ""))
        if culled is not None:
            culled.set_result(message["bytes"])

    # --- packs -------------------------------------------------------------------------------------------------------

    def pack(self, name: str) -> PackFile | ObjectFile:
        """The pack with this SHA-256, or what the plane calls one of its objects, opened.

        Raises NotFoundError, and what :meth:`HostCache.open_pack` does.
        """
        with self._lock:
            opened = self._packs.get(name)
            if opened is None:
                facts, descriptor = self._introduced.pop(name, ({}, None))
                pack = self._find(facts.get("of", name))
                if "map" in facts and descriptor is not None:
                    opened = self.cache.open_object(pack, Path(facts["map"]), descriptor)
                else:
                    opened = self.cache.open_pack(pack, descriptor=descriptor)
                self._packs[name] = opened
            return opened

    def pack_file(self, name: str) -> PackFile:
        """The pack of the host cache with this SHA-256, opened; raises as :meth:`pack` does."""
        opened = self.pack(name)
        assert isinstance(opened, PackFile)
        return opened

    @contextmanager
    def wanting(self, names: Sequence[str]) -> Iterator[list[PackFile]]:
        """Packs to write to, in the order of their SHA-256, whether somebody has mounted them or not."""
        token = f"worker {secrets.token_hex(8)}"
        wanted = self._wanted[token] = Future[str | None]()
        paths = [os.fspath(self.cache.files(name).data) for name in names]
        self.tell({"do": "want", "token": token, "packs": paths})
        try:
            error = wanted.result(_PATIENCE)
            if error is not None:
                raise StorageError(error)
            yield [self.pack_file(name) for name in names]
        finally:
            del self._wanted[token]
            self.tell({"do": "leave", "token": token})

    def through(self, names: Sequence[str]) -> list[str | None] | None:
        """What :meth:`pack` knows the mounted of these packs by, None for those that nobody has mounted.

        None: they have no names of their own, and :meth:`wanting` is how to write to them. Any thread but the main one.
        """
        token = secrets.token_hex(8)
        named = self._named[token] = Future[list[str | None] | None]()
        self.tell({"do": "through", "token": token, "packs": list(names)})
        try:
            return named.result(_PATIENCE)
        finally:
            del self._named[token]

    def look_after(self, packs: Iterable[PackFile | ObjectFile]) -> None:
        """Something of these packs was brought."""
        for pack in packs:
            self._housekeeping.touched(pack)

    @contextmanager
    def opened(self, pack: Pack) -> Iterator[PackFile]:
        """One pack to write to, for :func:`~erofsgen.host.cache.verify.verify`."""
        with self.wanting([pack.hex]) as files:
            yield files[0]

    def packs(self) -> list[PackFile | ObjectFile]:
        """Those that are open."""
        with self._lock:
            return list(self._packs.values())

    def _find(self, name: str) -> Pack:
        """What a manifest of the cache says of a pack; the stores of its images become sources."""
        if name not in self._known:
            for image in self.images():
                for pack in image.packs:
                    self._known[pack.hex] = pack
        if name not in self._known:
            raise NotFoundError(f"pack {name}: no image of the cache has it", hint="run `erofsgen pull` again")
        return self._known[name]

    def images(self) -> list[CachedImage]:
        """The images of the cache; their stores are sources from now on."""
        images = self.cache.images()
        for image in images:
            self.add_stores(image)
        return images

    def add_stores(self, image: CachedImage) -> None:
        """Let the stores that are known to have an image, and the tiers before them, be sources of its packs."""
        add_chains(self.engine, self.config, image.stores, [pack.hex for pack in image.packs])

    def store(self, url: str) -> Store:
        """The store ``url``, as packs are fetched from it. Raises what opening it raises."""
        add_chains(self.engine, self.config, [url], [])
        source = self.engine.source(url)
        assert isinstance(source, UrlSource)
        return source.store()

    def expect(self, store: str) -> None:
        """Open ``store``, and what stands before it: what that needs is imported before the first read waits for it."""
        add_chains(self.engine, self.config, [store], [])
        self.engine.open_sources()

    def _introduce(self, message: Message, descriptor: int) -> None:
        name = message["pack"]
        with self._lock:
            opened = self._packs.pop(name, None)  # read only, by a command: it was complete
            self._introduced[name] = message, descriptor
        if opened is not None:
            self._close(opened)

    def _forget(self, name: str) -> None:
        with self._lock:
            opened = self._packs.pop(name, None)
            _, descriptor = self._introduced.pop(name, (None, None))
        if descriptor is not None:
            os.close(descriptor)
        if opened is not None:
            self._close(opened)

    def _close(self, pack: PackFile | ObjectFile) -> None:
        self.engine.forget(pack)
        pack.close()


def _metrics_address() -> Address | None:
    """Where metrics are wanted; readers get on without them."""
    try:
        wanted = os.environ.get(VARIABLE)
        return Address.parse(wanted) if wanted else None
    except ErofsgenError as error:
        _logger.error("no metrics: %s: %s", VARIABLE, error)
        return None


def _config() -> Config:
    """The configuration; readers get on without it if it was broken since the daemon was started."""
    try:
        return load()
    except ErofsgenError as error:
        _logger.error("%s; going on without tiers", error)
        return Config()


def _after(ended: Future[None], call: Callable[[], None], failed: Callable[[BaseException | None], None]) -> None:
    error = ended.exception()
    if error is None:
        call()
    else:
        failed(error)


def main() -> None:
    """``python -m erofsgen.host.daemon.worker … CHANNEL``; the supervisor starts it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=48)
    parser.add_argument("--memory", type=int, default=48 << 20)
    parser.add_argument("--complete-at", type=float, default=0.75)
    parser.add_argument("--scrub", type=int, default=0)
    parser.add_argument("channel", type=int)
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logs.set_up()
    gc.freeze()  # what is imported stays; to look through it again and again is a tenth of opening an S3 store
    try:
        end = socket.socket(fileno=options.channel)
        end.set_inheritable(False)
        Worker(HostCache(options.root), Channel(end), options).run()
    except ErofsgenError as error:
        _logger.error("%s", error)
        sys.exit(error.exit_code)
    os._exit(0)  # threads may be in the middle of a fetch that nobody wants any more


if __name__ == "__main__":
    main()
