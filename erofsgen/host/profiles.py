"""The profiles of one host: what its own runs touched, what stores said, and the last run of each command in detail.

::

    ROOT/profiles/
    ├── lock                              exclusive: a change of anything below
    └── <hex of the image's manifest>/
        ├── recorded-<key>.profile        this host's runs of a command, merged; erofsgen.profile.naming.key
        ├── fetched-<key>.profile         what lay beside the image in a store
        ├── fetched                       the digest of the store's manifest that those were named by
        └── trace-<key>.trace             the last run of a command

Files are replaced by rename. ``fetched`` is removed before its profiles change and written after: whoever is
interrupted fetches anew. A file that power took is not readable, and counts as missing. All of it is a hint, bounded by
numbers (32 commands an image, those that ran last) and not counted against the cache's limit. It outlives its image in
the cache, which may come back; :func:`drop_lonely` ends that.

What reads profiles is imported where it is used: a mount of an image that is here must take milliseconds.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Final, TypeVar

from erofsgen.errors import ErofsgenError, FormatError
from erofsgen.files import replace_file
from erofsgen.host.cache.part import storage
from erofsgen.store import profiles as kept
from erofsgen.store.keys import BLOBS, blob

if TYPE_CHECKING:
    from erofsgen.profile.profile import Profile
    from erofsgen.profile.trace import Trace
    from erofsgen.store.base import Store
    from erofsgen.store.image import Image

T = TypeVar("T")

COUNT: Final = kept.COUNT
"""Commands of an image that are remembered at most."""

_TRACE_LIMIT: Final = 16 << 20
"""Bytes of a trace at most; a larger one is not kept."""

_logger: Final = logging.getLogger(__name__)


class HostProfiles:
    """Those below ``root``. Threads and processes may share them. ``digest`` is always that of an image's manifest.

    Raises StorageError where the directory cannot be used, FormatError for what is no digest.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.absolute() / "profiles"

    def digests(self) -> list[str]:
        """The images of which there is anything."""
        with suppress(FileNotFoundError):
            return sorted(f"sha256:{path.name}" for path in self.root.iterdir() if len(path.name) == 64)
        return []

    def recorded(self, digest: str) -> list[Profile]:
        """What this host's runs touched, a profile for each command, the last one that ran first."""
        return self._profiles(digest, "recorded")

    def fetched(self, digest: str) -> list[Profile]:
        """What lay beside the image in a store when it was asked last."""
        return self._profiles(digest, "fetched")

    def all(self, digest: str) -> list[Profile]:
        """Recorded merged with fetched, a profile for each command; this host's own first."""
        found: dict[str, Profile] = {}
        for profile in (*self.recorded(digest), *self.fetched(digest)):
            found[profile.command] = _merged(found.get(profile.command), profile)
        return list(found.values())

    def find(self, digest: str, command: str) -> Profile | None:
        """Recorded merged with fetched, of exactly this command."""
        recorded, fetched = (self._profile(self._file(digest, kind, command)) for kind in ("recorded", "fetched"))
        return recorded if fetched is None else _merged(recorded, fetched)

    def best(self, digest: str, command: str) -> Profile | None:
        """The one to replay for a command: its own, else what :func:`erofsgen.profile.naming.best` takes for it."""
        from erofsgen.profile.naming import best, short

        found = self.find(digest, command)
        return found if found is not None and found.recorded else best(self.all(digest), short(command))

    def add(self, digest: str, profile: Profile) -> Profile:
        """Merge a run into what is recorded of its command; returns that. Beyond :data:`COUNT` commands the one that
        ran longest ago is forgotten. A long command is made short, here and wherever one is asked for."""
        from erofsgen.profile import beside
        from erofsgen.profile.naming import short

        profile = replace(profile, command=short(profile.command))
        path = self._file(digest, "recorded", profile.command)
        with self._locked(path.parent):
            merged = beside.merged(self._profile(path), profile)
            replace_file(path, merged.encode())
            self._bound(digest, "recorded")
        return merged

    def keep(self, digest: str, profiles: Sequence[Profile], *, manifest: str = "") -> None:
        """Replace the fetched ones; ``manifest`` is the digest of what named them."""
        mark = self._directory(digest) / "fetched"
        if not profiles and not mark.parent.exists():
            return
        with self._locked(mark.parent):
            self._keep(mark, digest, profiles, manifest)

    def _keep(self, mark: Path, digest: str, profiles: Sequence[Profile], manifest: str) -> None:
        mark.unlink(missing_ok=True)
        wanted = {self._file(digest, "fetched", profile.command): profile for profile in profiles}
        for path in self._files(digest, "fetched"):
            if path not in wanted:
                path.unlink(missing_ok=True)
        for path, profile in reversed(wanted.items()):  # so that the first is the youngest
            replace_file(path, profile.encode())
        if profiles and manifest:
            replace_file(mark, manifest.encode())

    def pushed(self, digest: str, taken: Sequence[Profile], there: Sequence[Profile], *, manifest: str = "") -> None:
        """Let ``taken``, which were recorded here, count as fetched: they are among ``there``, what the store has now.

        One that another run was merged into meanwhile stays recorded, with the runs that were pushed in it.
        """
        mark = self._directory(digest) / "fetched"
        with self._locked(mark.parent):
            for profile in taken:
                path = self._file(digest, "recorded", profile.command)
                with suppress(FileNotFoundError):
                    if path.read_bytes() == profile.encode():
                        path.unlink()
            self._keep(mark, digest, there, manifest)

    def refresh(self, store: Store, digest: str) -> None:
        """Fetch what lies beside the image in ``store``, unless it is what is here. One request where nothing does.

        Raises what reading the store raises, FormatError (damaged).
        """
        current = store.profiles(digest)
        if current is None:
            self.keep(digest, [])
            return
        mark = self._directory(digest) / "fetched"
        with suppress(OSError):
            if mark.read_bytes() == current.digest.encode():
                return
        from erofsgen.profile import beside

        found = kept.open_manifest(store, digest, current)
        self.keep(digest, beside.read(store, digest, found), manifest=current.digest)

    def put_trace(self, trace: Trace) -> None:
        """Keep a run as its command's last one. A very large one is not kept."""
        from erofsgen.profile.naming import short

        data = replace(trace, command=short(trace.command)).encode()
        if len(data) > _TRACE_LIMIT:
            _logger.warning("%s: a trace of %d bytes is not kept", trace.image, len(data))
            return
        path = self._file(trace.image, "trace", trace.command)
        with self._locked(path.parent):
            replace_file(path, data)
            self._bound(trace.image, "trace")

    def trace(self, digest: str, command: str) -> Trace | None:
        """The last run of a command."""
        from erofsgen.profile.trace import decode

        return _read(self._file(digest, "trace", command), decode)

    def traces(self, digest: str) -> list[Trace]:
        """The last run of each command, the latest first."""
        from erofsgen.profile.trace import decode

        found = (_read(path, decode) for path in self._files(digest, "trace"))
        return [trace for trace in found if trace is not None]

    def remove(self, digest: str, command: str | None = None) -> None:
        """Forget an image, or one command of it: runs, traces, and what was fetched."""
        directory = self._directory(digest)
        if not directory.exists():
            return
        with self._locked(self.root):
            if command is None:
                shutil.rmtree(directory, ignore_errors=True)
                return
            (directory / "fetched").unlink(missing_ok=True)
            for kind in ("recorded", "fetched", "trace"):
                self._file(digest, kind, command).unlink(missing_ok=True)

    # --- files -------------------------------------------------------------------------------------------------------

    def _directory(self, digest: str) -> Path:
        return self.root / blob(digest).removeprefix(BLOBS)

    def _file(self, digest: str, kind: str, command: str) -> Path:
        from erofsgen.profile.naming import key, short

        suffix = "trace" if kind == "trace" else "profile"
        return self._directory(digest) / f"{kind}-{key(short(command))}.{suffix}"

    def _files(self, digest: str, kind: str) -> list[Path]:
        """Those of a kind, the one that was written last first."""
        found = []
        for path in self._directory(digest).glob(f"{kind}-*"):
            with suppress(FileNotFoundError):
                found.append((path.stat().st_mtime_ns, path))
        return [path for _, path in sorted(found, reverse=True)]

    def _profiles(self, digest: str, kind: str) -> list[Profile]:
        found = (self._profile(path) for path in self._files(digest, kind))
        return [profile for profile in found if profile is not None]

    def _profile(self, path: Path) -> Profile | None:
        from erofsgen.profile.profile import decode

        return _read(path, decode)

    def _bound(self, digest: str, kind: str) -> None:
        for path in self._files(digest, kind)[COUNT:]:
            path.unlink(missing_ok=True)

    @contextmanager
    def _locked(self, directory: Path) -> Iterator[None]:
        """Change something in ``directory``, which is made where it is missing."""
        with storage(self.root):
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                directory.mkdir(mode=0o700, exist_ok=True)
                yield
            finally:
                os.close(descriptor)


class Refreshing:
    """:meth:`HostProfiles.refresh` in a thread, while the image's other parts are fetched. It never raises."""

    def __init__(self, root: Path, image: Image) -> None:
        self._profiles = HostProfiles(root)
        self._image = image
        # A store that does not answer any more must not keep the program from ending
        self._thread = Thread(target=self._run, name="profiles", daemon=True)
        self._thread.start()

    def wait(self, seconds: float) -> None:
        """Until it has ended, or for so many seconds: then it goes on, and its profiles are for the next mount."""
        self._thread.join(seconds)

    def _run(self) -> None:
        try:
            self._profiles.refresh(self._image.store, self._image.digest)
        except Exception as error:  # noqa: BLE001  (a hint; the store may be closed meanwhile)
            _logger.debug("%s: its profiles were not fetched: %s", self._image.name, error)


def drop_lonely(profiles: HostProfiles, images: Iterable[str], before: float, *, dry_run: bool) -> list[Path]:
    """Forget images other than ``images`` of which nothing was written since ``before``; their directories."""
    wanted = set(images)
    gone = []
    for digest in profiles.digests():
        directory = profiles.root / digest.removeprefix("sha256:")
        with suppress(FileNotFoundError):
            if digest not in wanted and directory.stat().st_mtime < before:
                gone.append(directory)
                if not dry_run:
                    profiles.remove(digest)
    return gone


def _merged(one: Profile | None, other: Profile) -> Profile:
    """Both as one; the first alone where they cannot be of one image: the other comes from elsewhere."""
    if one is None:
        return other
    try:
        return one.merged(other)
    except FormatError:
        return one


def _read(path: Path, decode: Callable[[bytes, str], T]) -> T | None:
    """None where there is no such file, or one that cannot be used."""
    try:
        return decode(path.read_bytes(), str(path))
    except FileNotFoundError:
        return None
    except (OSError, ErofsgenError) as error:
        _logger.debug("%s", error)
        return None
