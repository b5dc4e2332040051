"""What the operations of both planes share: a handler's errors, and how long the kernel may remember answers."""

from __future__ import annotations

import errno
import functools
import logging
from collections.abc import Callable, Coroutine
from typing import Any, Final, ParamSpec, TypeVar

import pyfuse3

from erofsgen.errors import ErofsgenError

_logger: Final = logging.getLogger(__name__)

FOREVER: Final = 1 << 30
"""Seconds; nothing of an image changes."""

P = ParamSpec("P")
R = TypeVar("R")


def answering(handler: Callable[P, Coroutine[Any, Any, R]]) -> Callable[P, Coroutine[Any, Any, R]]:
    """A handler of which nothing comes but FUSEError: anything else would end the session, and with it the mount."""

    @functools.wraps(handler)
    async def guarded(*arguments: P.args, **more: P.kwargs) -> R:
        try:
            return await handler(*arguments, **more)
        except pyfuse3.FUSEError:
            raise
        except ErofsgenError as error:
            _logger.error("%s failed: %s", handler.__name__, error)
        except Exception:
            _logger.exception("%s failed", handler.__name__)
        raise pyfuse3.FUSEError(errno.EIO)

    return guarded
