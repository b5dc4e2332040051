"""The list of images that a batch builds: one a line, as ``erofsgen build`` takes it.

::

    # what stands behind a '#' is left out
    python:3.11-slim
    docker.io/library/nginx:1.27   tag=web platform=linux/arm64
    "oci:/srv/with a space:tag"

Words are quoted as a shell's. Line numbers in messages count from 1.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from itertools import takewhile

import msgspec

from erofsgen.errors import UnsupportedError, UsageError
from erofsgen.oci.images import own_name
from erofsgen.oci.platforms import Platform
from erofsgen.store.base import Store

_HINT = "write IMAGE [tag=NAME] [platform=OS/ARCH[/VARIANT]]"


class Request(msgspec.Struct, frozen=True):
    """One line: which image, what the result is called, which platform's (this machine's by default)."""

    image: str
    name: str
    platform: str | None = None


def read_list(lines: Iterable[str], store: Store, *, of: str) -> list[Request]:
    """The images that ``lines`` ask for, as ``store`` would call them.

    Raises UsageError naming ``of`` and the line: it is malformed, or its image's name is another one's, too.
    """
    requests = []
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        try:
            request = _read(line, store)
        except (UsageError, UnsupportedError) as error:
            raise UsageError(f"{of}, line {number}: {error}", hint=error.hint or _HINT) from None
        if request is None:
            continue
        first = seen.setdefault(request.name, number)
        if first != number:
            raise UsageError(
                f"{of}, line {number}: {request.image} becomes {request.name}, as the image of line {first} does",
                hint="give one of them another name with tag=NAME",
            )
        requests.append(request)
    return requests


def _read(line: str, store: Store) -> Request | None:
    try:
        words = list(takewhile(lambda word: not word.startswith("#"), shlex.split(line)))
    except ValueError as error:
        raise UsageError(str(error).lower(), hint="close the quotation") from None
    if not words:
        return None
    image, *settings = words
    given: dict[str, str] = {}
    for word in settings:
        key, _, value = word.partition("=")
        if key not in ("tag", "platform") or not value:
            raise UsageError(f"{word!a} is neither tag=NAME nor platform=OS/ARCH")
        if key in given:
            raise UsageError(f"{key} is given twice")
        given[key] = value
    platform = given.get("platform")
    if platform is not None:
        Platform.parse(platform)
    own = store.called(own_name(image))
    name = given.get("tag", own)
    store.check_name(name)
    return Request(image, name, platform)
