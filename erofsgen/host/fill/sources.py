"""Where frames come from: one source of the chain of tiers, and what is known of it beforehand."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from contextlib import suppress
from typing import Final

from erofsgen.errors import ErofsgenError, NotFoundError, RemoteError
from erofsgen.store.base import Speed, Store
from erofsgen.store.open import open_store

_LOCAL_READS: Final = 8
"""Of a local directory at a time: what waits behind them would come no sooner."""
_LOCAL_RETRIES: Final = 2
"""A directory that fails is asked so often again, and not as long as a server that may come back."""


class Source(ABC):
    """One tier, or the store of an image."""

    name: str
    """Tells the user which."""

    level: int | None = None
    """Less is nearer. Sources of one level share the load by ``weight``; None: behind all that have one, as added."""

    weight: int = 1

    timeout: float | None = None
    """Seconds that a read may take before the next source is asked as well; None: what the engine says."""

    concurrency: int | None = None
    """Reads at a time; None: as many as there are threads."""

    retries: int | None = None
    """Rounds after the first in which it is asked; None: what the engine says, which is the most."""

    hedged: bool = False
    """Whether a demand that takes longer than most is asked for a second time."""

    @property
    def speed(self) -> Speed | None:
        """What one connection does, if that was measured."""
        return None

    @abstractmethod
    def read_into(self, digest: str, offset: int, buffer: memoryview, /) -> None:
        """Fill ``buffer`` with the bytes at ``offset`` of the blob ``digest``; whatever it raises, it failed.

        Called by several threads at once. It must come back some day: threads cannot be interrupted.
        """

    def ready(self) -> None:  # noqa: B027  (most are)
        """Get ready to be read. Raises nothing."""

    def doubt(self) -> None:  # noqa: B027  (most learn nothing)
        """Bytes that it brought were wrong."""

    def close(self) -> None:  # noqa: B027  (most have nothing to close)
        """Let go of connections; nobody reads any more."""


class StoreSource(Source):
    """A store as a source."""

    def __init__(self, store: Store) -> None:
        self.name = store.url
        self._store = store

    @property
    def speed(self) -> Speed | None:
        return self._store.speed

    def read_into(self, digest: str, offset: int, buffer: memoryview, /) -> None:
        self._store.read_into(digest, offset, buffer)

    def doubt(self) -> None:
        self._store.doubt()


class UrlSource(Source):
    """A store as a source, opened when it is read first, again and again until that succeeds.

    ``proxy``: an HTTP proxy that is asked for all of it. ``create``: make it where it is missing. The rest is
    :class:`Source`'s. A failure is the engine's to try again, so the store does not.
    """

    def __init__(
        self,
        url: str,
        *,
        name: str | None = None,
        proxy: str | None = None,
        level: int | None = None,
        weight: int = 1,
        timeout: float | None = None,
        concurrency: int | None = None,
        hedge: bool = True,
        create: bool = False,
    ) -> None:
        local = "://" not in url
        self.url = url
        self.name = name or url
        self.level = level
        self.weight = weight
        self.timeout = timeout
        self.concurrency = concurrency or (_LOCAL_READS if local else None)
        self.retries = _LOCAL_RETRIES if local else None
        self.hedged = hedge and not local
        self.feed = create
        self.proxy = proxy
        self._lock = threading.Lock()  # one thread opens, others wait for that
        self._store: Store | None = None

    @property
    def speed(self) -> Speed | None:
        return None if self._store is None else self._store.speed

    def store(self) -> Store:
        """The store. Raises RemoteError where there is none, and what :func:`open_store` does."""
        with self._lock:
            if self._store is None:
                try:
                    self._store = open_store(
                        self.url, create=self.feed, attempts=1, timeout=self.timeout, proxy=self.proxy
                    )
                except NotFoundError as error:  # a store that is not there does not lack this blob alone
                    raise RemoteError(str(error), hint=error.hint) from error
            return self._store

    def opened(self, timeout: float) -> Store:
        """The store, opened for somebody else, who closes it; nothing is made. Raises as :func:`open_store`."""
        return open_store(self.url, attempts=1, timeout=timeout, proxy=self.proxy)

    def ready(self) -> None:
        with suppress(Exception):  # the first read says what is wrong
            self.store()

    def doubt(self) -> None:
        if self._store is not None:
            self._store.doubt()

    def close(self) -> None:
        with self._lock:
            if self._store is not None:
                self._store.close()

    def read_into(self, digest: str, offset: int, buffer: memoryview, /) -> None:
        (self._store or self.store()).read_into(digest, offset, buffer)


def describe(error: BaseException) -> str:
    """An error as part of one line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, ErofsgenError) and text else f"{type(error).__name__}: {text}".removesuffix(": ")
