"""Which planes a host can use, and why not: the checks as a table, and what follows from them for each plane.

``plane_works`` alone takes milliseconds and is what a mount asks; :func:`examine` tries everything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

import msgspec

from erofsgen.host import probes
from erofsgen.host.probes import Finding

Check = Callable[[Path], Finding]

CHECKS: Final[tuple[Check, ...]] = (
    probes.privilege,
    probes.erofs,
    probes.file_backed,
    probes.fanotify,
    probes.fanotify_limits,
    probes.descriptors,
    probes.reflink,
    probes.lease,
    probes.xattr,
    probes.overlay,
    probes.loop,
    probes.fscache,
    probes.fuse,
    probes.page_sharing,
    probes.runtimes,
    probes.cgroups,
    probes.mount_helper,
)
"""In the order they are reported."""

PLANES: Final[dict[str, tuple[tuple[Check, ...], ...]]] = {
    "fanotify": ((probes.privilege,), (probes.file_backed,), (probes.fanotify,)),
    "fscache": ((probes.privilege,), (probes.erofs,), (probes.fscache,)),
    "blockfuse": ((probes.privilege,), (probes.erofs,), (probes.fuse,), (probes.file_backed, probes.loop)),
    "fuse": ((probes.fuse,),),
    "eager": ((probes.privilege,), (probes.erofs,), (probes.file_backed, probes.loop)),
}
"""What each plane needs, in the order ``auto`` prefers them: one check of every group."""


class Plane(msgspec.Struct, frozen=True):
    """What is to be said about a plane. ``works``: the kernel and the host could; ``because``: what is in the way."""

    plane: str
    works: bool
    because: str | None


class Diagnosis(msgspec.Struct, frozen=True):
    """All that was found; ``auto`` is the plane that ``auto`` takes, None where there is none."""

    checks: list[Finding]
    planes: list[Plane]
    auto: str | None

    @property
    def lazy(self) -> bool:
        """Whether ``auto`` is a plane that fetches on demand."""
        return self.auto not in (None, "eager")


def plane_works(root: Path, plane: str = "fanotify") -> Finding:
    """Whether ``plane`` works with a host cache on ``root``'s file system; the first obstacle, if there is one.

    Nothing is remembered: a file system may be remounted, a module loaded.
    """
    return _weigh(plane, lambda check: check(root))


def examine(roots: Iterable[Path]) -> Diagnosis:
    """Try everything, with each of the host cache's directories; a check is as good as its worst directory."""
    places = list(roots)
    found = {check: min((check(place) for place in places), key=lambda f: f.ok) for check in CHECKS}
    planes = []
    for plane in PLANES:
        verdict = _weigh(plane, found.__getitem__)
        planes.append(Plane(plane, verdict.ok, None if verdict.ok else verdict.detail))
    auto = next((plane.plane for plane in planes if plane.works), None)
    return Diagnosis(list(found.values()), planes, auto)


def _weigh(plane: str, ask: Callable[[Check], Finding]) -> Finding:
    for group in PLANES[plane]:
        findings = [ask(check) for check in group]
        if not any(finding.ok for finding in findings):
            worst = findings[0]
            return Finding(plane, worst.result, f"{worst.check}: {worst.detail}", worst.advice)
    return Finding(plane, "ok", "works")
