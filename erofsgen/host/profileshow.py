"""One profile in all detail: its files and chunks, what the last run of this host met, and a picture of it."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np

from erofsgen.erofs.reader import Index
from erofsgen.errors import ErofsgenError, NotFoundError, UsageError
from erofsgen.host.cache.cache import CachedImage, HostCache
from erofsgen.host.profiles import HostProfiles
from erofsgen.host.profilework import none
from erofsgen.profile.chunks import Chunks
from erofsgen.profile.naming import short
from erofsgen.profile.profile import Profile
from erofsgen.profile.touches import Totals, totals
from erofsgen.profile.trace import Trace
from erofsgen.profile.waterfall import Waterfall, of_profile, of_trace, profile_facts, run_facts
from erofsgen.store.image import Image
from erofsgen.text import quoted

_NAMED: Final = 8


class LastRun(msgspec.Struct, frozen=True):
    """The last run of a command on this host: when (seconds since 1970) and through which plane it was mounted, whether
    it was recorded to its end, and its numbers."""

    started: float
    plane: str
    complete: bool
    totals: Totals


class Look(NamedTuple):
    """A profile of the image ``name`` with the manifest ``digest``, and what there is besides. ``trace`` is None where
    no run of this host is remembered."""

    name: str
    digest: str
    profile: Profile
    chunks: Chunks
    trace: Trace | None

    def picture(self, limit: int) -> Waterfall:
        """The last run in at most ``limit`` rows; without one what the profile expects."""
        title = f"{self.name}: {quoted(self.profile.command)}"
        if self.trace is None:
            return of_profile(self.profile, self.chunks, title=title, limit=limit)
        return of_trace(self.trace, self.chunks, title=title, limit=limit)

    def facts(self) -> list[tuple[str, str]]:
        """What there is to say of the profile as a whole, and then of the last run."""
        facts = [("image", self.name), ("digest", self.digest), *profile_facts(self.profile)]
        if self.trace is None:
            return [*facts, ("last run", "none of this host is remembered")]
        return facts + [(f"last run: {word}", value) for word, value in run_facts(self.trace, totals(self.trace))]

    def document(self) -> dict[str, Any]:
        """All of this but files and chunks."""
        rows = self.profile.rows
        return {
            "image": self.name,
            "digest": self.digest,
            "command": self.profile.command,
            "runs": self.profile.runs,
            "bytes": self.profile.size,
            "reasons": [
                {"name": name, "chunks": int(mine.sum()), "bytes": int(rows["length"][mine].sum(dtype=np.int64))}
                for number, name in enumerate(self.profile.reasons)
                if (mine := rows["reason"] == number).any()
            ],
            "last_run": self._last_run(),
        }

    def _last_run(self) -> LastRun | None:
        if self.trace is None:
            return None
        return LastRun(self.trace.started, self.trace.plane, self.trace.complete, totals(self.trace))


def look(cache: HostCache, profiles: HostProfiles, image: Image | CachedImage, command: str | None) -> Look:
    """The profile of a command of ``image``; of its only one if that is None.

    What lies beside the image in its store counts, as far as that can be asked. Raises NotFoundError (no profile),
    UsageError (several, and none was named), and what reading the image's index raises.
    """
    if isinstance(image, Image):
        with suppress(ErofsgenError):
            profiles.refresh(image.store, image.digest)
    known = {profile.command: profile for profile in profiles.all(image.digest)}
    if command is None:
        if not known:
            raise none(image.name, hint="record one with `erofsgen profile record`")
        if len(known) > 1:
            names = ", ".join(quoted(name) for name in list(known)[:_NAMED])
            more = f" and {len(known) - _NAMED} more" if len(known) > _NAMED else ""
            raise UsageError(
                f"{image.name} has profiles of {len(known)} commands: {names}{more}", hint="choose one with --command"
            )
        (command,) = known
    profile = known.get(short(command))
    if profile is None:
        raise none(image.name, command)
    return Look(image.name, image.digest, profile, _chunks(cache, image), profiles.trace(image.digest, profile.command))


def _chunks(cache: HostCache, image: Image | CachedImage) -> Chunks:
    """By the index that is in the cache, or in the store."""
    path = cache.image_path(image.digest, "erofs")
    try:
        return Chunks(Index(path.read_bytes()))
    except FileNotFoundError:
        if isinstance(image, Image):
            return Chunks(image.index)
        raise NotFoundError(f"{image.name}: its index is not here", hint="run `erofsgen pull`") from None
