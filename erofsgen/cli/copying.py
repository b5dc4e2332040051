"""What ``copy``, ``push`` and ``pull --from`` share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import msgspec

from erofsgen.cli import output
from erofsgen.cli.shared import Settings
from erofsgen.errors import UsageError
from erofsgen.store.base import Store
from erofsgen.store.copy import CopyResult, copy_image
from erofsgen.store.image import Image


def destination_of(url: str) -> tuple[str, str | None]:
    """A store's URL and, where ``docker://HOST/REPOSITORY:TAG`` has one, the tag."""
    place, question, query = url.partition("?")
    slash, colon = place.rfind("/"), place.rfind(":")
    if not place.startswith("docker://") or colon < slash or slash < len("docker://"):
        return url, None
    return place[:colon] + question + query, place[colon + 1 :]


def copy(
    settings: Settings, source: Store, destination: Store, names: Sequence[str], new_name: str | None, jobs: int
) -> None:
    """Copy images one by one, and say what was done. Raises UsageError (one name for several images)."""
    called = Counter(new_name or destination.called(name) for name in names)
    name, count = max(called.items(), key=lambda item: item[1], default=("", 0))
    if count > 1:
        raise UsageError(f"{count} images cannot all be called {name!r}", hint="copy them one by one, with --as")
    results: list[CopyResult] = []
    with settings.progress() as progress:
        for name in names:
            image = Image.open(source, name)
            results.append(copy_image(image, destination, new_name, jobs=jobs, progress=progress))
            if not settings.json:
                _tell(results[-1])
    if settings.json:
        output.document([msgspec.to_builtins(result) for result in results])


def _tell(result: CopyResult) -> None:
    output.line(
        f"{output.printable(result.name)}: copied {output.counted(result.blobs, 'blob')}, {output.size(result.bytes)}; "
        f"{output.counted(result.kept_blobs, 'blob')}, {output.size(result.kept_bytes)} were there; "
        f"{result.seconds:.1f} s"
    )
