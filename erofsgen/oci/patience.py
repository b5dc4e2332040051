"""How often and how long a server is asked for what it fails to give."""

from __future__ import annotations

import email.utils
import random
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from erofsgen.errors import RemoteError

T = TypeVar("T")


@dataclass(frozen=True)
class Policy:
    """How patient the client is. Times in seconds."""

    parallel: int = 4
    """Layers downloaded at the same time."""
    attempts: int = 6
    """Failures in a row, without progress in between, that end a request."""
    backoff: float = 0.5
    """Pause after the first failure; doubled for each one more, with jitter."""
    max_backoff: float = 20.0
    max_retry_after: float = 120.0
    """A server that asks for a longer pause is reported instead."""
    connect_timeout: float = 10.0
    read_timeout: float = 30.0
    """Silence that breaks a connection."""
    document_timeout: float = 60.0
    """For the whole of a manifest, a config or a token."""
    upload_timeout: float = 300.0
    """Silence behind a body that was sent: a registry verifies a blob and puts it in its place before it answers."""
    min_rate: int = 1024
    """Bytes per second, averaged over ``read_timeout``, below which a connection is broken."""


class Transient(Exception):  # noqa: N818  (it is a wrapped error, never shown itself)
    """A failure that may pass. ``error`` is what to raise once patience is at an end."""

    def __init__(self, error: RemoteError, retry_after: float | None = None) -> None:
        super().__init__(str(error))
        self.error = error
        self.retry_after = error.retry_after = retry_after


class Patience:
    """Counts the failures of one operation and sleeps between its attempts."""

    def __init__(self, policy: Policy, stop: threading.Event) -> None:
        self._policy = policy
        self._stop = stop
        self._failures = 0

    def progressed(self) -> None:
        """What failed before counts no more."""
        self._failures = 0

    def pause(self, failure: Transient) -> None:
        """Sleep before the next attempt.

        Raises RemoteError (patience is at an end, or the server asks for a pause too long, or the client was closed).
        """
        self._failures += 1
        wait = failure.retry_after
        if wait is not None and wait > self._policy.max_retry_after:
            raise RemoteError(str(failure.error), hint=f"the server asks to wait {wait:.0f} s") from failure
        if self._failures >= self._policy.attempts:
            raise failure.error from failure
        if wait is None:
            wait = min(self._policy.backoff * 2 ** (self._failures - 1), self._policy.max_backoff)
            wait *= random.uniform(0.5, 1.0)  # so that many hosts do not come back at once
        if self._stop.wait(wait):
            raise RemoteError("the download was given up") from failure


def patiently(policy: Policy, stop: threading.Event, attempt: Callable[[], T]) -> T:
    """What ``attempt`` returns, made again when it raises :class:`Transient`, as often as the policy allows.

    Raises RemoteError, see :meth:`Patience.pause`, and what ``attempt`` raises.
    """
    patience = Patience(policy, stop)
    while True:
        try:
            return attempt()
        except Transient as failure:
            patience.pause(failure)


def retry_after(value: str) -> float | None:
    """Seconds a server asks us to wait with its ``Retry-After`` header, None where it does not."""
    value = value.strip()
    if re.fullmatch(r"[0-9]{1,9}", value, re.ASCII):
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def printable(text: str, limit: int = 200) -> str:
    """A server's words made fit for a terminal and for one line."""
    line = " ".join("".join(char if char.isprintable() else " " for char in text[: 4 * limit]).split())
    return line if len(line) <= limit else f"{line[: limit - 1]}…"
