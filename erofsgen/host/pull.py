"""Images into the host cache: what a lazy mount needs, or all of them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any, TypeVar

from erofsgen.errors import BusyError, ErofsgenError, NotFoundError, RemoteError
from erofsgen.host.cache.cache import CachedImage, HostCache
from erofsgen.host.cache.part import settle
from erofsgen.host.daemon.client import Client
from erofsgen.progress import SILENT, Progress, Task
from erofsgen.store.image import Image
from erofsgen.store.open import absolute, open_store

T = TypeVar("T")


def find(cache: HostCache, url: str, name: str) -> Image | CachedImage:
    """The image called ``name`` in the store ``url``; as the cache remembers it where the store cannot be reached.

    Raises NotFoundError (neither has it), and what kept the store from answering.
    """
    url = absolute(url)  # the daemon has another working directory
    _expect(cache, url)
    try:
        store = open_store(url)
    except ErofsgenError as error:
        unreachable = error
    else:
        try:
            return Image.open(store, name)
        except RemoteError as error:
            unreachable = error
    try:
        return cache.image(name, url)
    except NotFoundError:
        pass
    raise unreachable


def _expect(cache: HostCache, url: str) -> None:
    """Have a daemon that runs open the store, too, while this process does: that can take half a second."""
    with suppress(ErofsgenError):
        client = Client.connect(cache.root)
        if client is not None:
            with client:
                client.tell_worker("expect", store=url)


def complete(cache: HostCache, cached: CachedImage, image: Image | None, progress: Progress = SILENT) -> None:
    """Have all frames of an image in the cache; a running daemon brings them, otherwise this process does.

    ``image``: where it comes from, if that is open already. Raises what :meth:`HostCache.fill` raises.
    """
    if not cache.is_complete(cached):
        carry_out(
            cache,
            "complete",
            {"image": cached.digest},
            lambda: cache.fill(cached, lambda: (image or cached.open()).store, progress),
            progress,
        )
    settle([cached.index])


def carry_out(
    cache: HostCache, do: str, arguments: dict[str, Any], here: Callable[[], T], progress: Progress
) -> T | dict[str, Any]:
    """Have a running daemon do something, which replies with facts, or do it ``here``, as the one that fills."""
    while True:
        client = Client.connect(cache.root)
        if client is not None:
            with client, Shown(progress) as shown:
                return client.worker(do, shown.show, **arguments)
        try:
            with cache.filling():
                return here()
        except BusyError:
            continue  # a daemon was started meanwhile


class Shown:
    """What the daemon says of its progress, as a task of ours."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, tuple[Task, int]] = {}
        self._open = ExitStack()

    def show(self, facts: dict[str, Any]) -> None:
        label, done = str(facts["label"]), int(facts["done"])
        if label not in self._tasks:
            self._tasks[label] = (self._open.enter_context(self._progress.task(label, facts["total"])), 0)
        task, before = self._tasks[label]
        task.advance(done - before)
        self._tasks[label] = (task, done)

    def __enter__(self) -> Shown:
        return self

    def __exit__(self, *exc: object) -> None:
        self._open.close()
