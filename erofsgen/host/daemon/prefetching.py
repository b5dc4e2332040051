"""The worker's prefetching: a thread for each mount that replays its profile, and the taking in of recordings.

::

    supervisor ── prefetch, no prefetch ──► Replay of the mount ──► fill engine
               ── recorded ──► ROOT/recordings ──► trace, profile of the host (erofsgen.host.profiles)

Which frames came from where is remembered for as long as a recording may need it. All of it is a hint: what fails is
logged, and readers get on without.

What only recordings and heuristics need is imported for them: readers wait for a worker that starts.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from erofsgen.errors import ErofsgenError
from erofsgen.host.cache.cache import CachedImage
from erofsgen.host.cache.objectfile import ObjectFile
from erofsgen.host.cache.packfile import PackFile
from erofsgen.host.daemon.channel import Message
from erofsgen.host.daemon.recorder import DIRECTORY, SECONDS, SUFFIX
from erofsgen.host.fill.sources import describe
from erofsgen.host.fill.work import Priority, Target
from erofsgen.host.prefetch.arrivals import Arrival
from erofsgen.host.prefetch.plan import HOT_PACK, Step, plan, plan_hot
from erofsgen.host.prefetch.replay import Budget, Replay
from erofsgen.host.profiles import HostProfiles
from erofsgen.pack.toc import Toc
from erofsgen.profile.profile import Profile
from erofsgen.profile.trace import Trace

if TYPE_CHECKING:
    from erofsgen.host.daemon.worker import Worker
    from erofsgen.host.prefetch.recording import Recording

_logger: Final = logging.getLogger(__name__)

_ARRIVALS: Final = 1 << 17
"""Frames whose arrival is remembered: at a megabyte each far more than a start brings."""
_PACKS: Final = 1024
"""Packs of an image that heuristics look into at most."""
_GUESSED: Final = 1 << 30
"""Bytes that heuristics guess at most, where the configuration does not say."""
_TAKEN: Final = 64
"""Recordings whose facts are kept for whoever wanted them."""
_KEPT: Final = 2 * SECONDS
"""Seconds for which a mount's prefetch is remembered, for its recording to come."""


@dataclass
class _Judged:
    """Prefetch for one reason: frames and device bytes brought; used; and of which that is known."""

    frames: int = 0
    bytes: int = 0
    used_frames: int = 0
    used_bytes: int = 0
    judged_bytes: int = 0


@dataclass
class _Started:
    """A mount's prefetch."""

    command: str
    why: str
    at: float
    replay: Replay | None = None
    state: str = "planning"


class Prefetching:
    """Of ``worker``, whose profiles are those of ``profiles``."""

    def __init__(self, worker: Worker, profiles: HostProfiles) -> None:
        self._worker = worker
        self._profiles = profiles
        self._config = worker.config.prefetch
        self._directory = worker.cache.root / DIRECTORY
        self._started: dict[str, _Started] = {}
        self._arrivals: OrderedDict[tuple[str, int], Arrival] = OrderedDict()
        self._judged: dict[str, _Judged] = {}
        self._lock = threading.Lock()  # over the three above
        self._taking_in = threading.Lock()
        self._taken: deque[dict[str, Any]] = deque(maxlen=_TAKEN)  # what somebody will ask for
        self._wake = threading.Event()

    def start(self) -> None:
        """Take in what is recorded from now on, and what a dead worker has not; ends with the process."""
        threading.Thread(target=self._run, name="recordings", daemon=True).start()
        self._wake.set()

    # --- replay ------------------------------------------------------------------------------------------------------

    def begin(self, message: Message) -> None:
        """The supervisor has made a mount, and somebody is about to start in it."""
        threading.Thread(target=self._prefetch, args=(message,), name="prefetch", daemon=True).start()

    def stop(self, mount: str) -> None:
        """The mount is gone."""
        with self._lock:
            started = self._started.get(mount)
        if started is not None and started.replay is not None:
            started.replay.stop()

    @property
    def active(self) -> bool:
        """Whether anything is being prefetched."""
        with self._lock:
            return any(map(_goes_on, self._started.values()))

    def brought(self, target: Target, frame: int, source: str, priority: Priority) -> None:
        """A frame came. In the fill engine's threads."""
        with self._lock:
            self._arrivals[target.name, frame] = Arrival(time.monotonic(), source, priority is Priority.PREFETCH)
            if len(self._arrivals) > _ARRIVALS:
                self._arrivals.popitem(last=False)

    def _prefetch(self, message: Message) -> None:
        mount = str(message["mount"])
        started = _Started(str(message["command"]), "", time.monotonic())
        with self._lock:
            self._forget_old()
            self._started[mount] = started
        try:
            self._replay(message, started)
        except ErofsgenError as error:
            _logger.warning("%s: no prefetch: %s", mount, error, extra={"mount": mount})
        except Exception as error:  # the thread's end must not be the worker's
            _logger.exception("%s: no prefetch: %s", mount, describe(error), extra={"mount": mount})
        finally:
            started.state = started.replay.state if started.replay is not None else "nothing to do"
            self._worker.tell({"do": "prefetched", "mount": mount})

    def _replay(self, message: Message, started: _Started) -> None:
        image = self._worker.cache.open_image(str(message["image"]))
        self._worker.add_stores(image)
        profile = self._profile(image, message)
        hot = {pack.hex: pack.hot for pack in image.packs if pack.hot}
        if profile is not None and len(profile.rows):
            started.why = "profile" if profile.recorded else "heuristics"
            packs = [pack for pack in dict.fromkeys(profile.packs) if pack in {pack.hex for pack in image.packs}]
        elif hot:
            started.why, packs = HOT_PACK, list(hot)
        else:
            return
        with self._targets(packs) as targets:
            tocs = {pack: target.toc for pack, target in targets.items()}
            if started.why == HOT_PACK:
                steps = [step for pack, toc in tocs.items() for step in plan_hot(pack, toc, hot[pack])]
            else:
                assert profile is not None
                steps = plan(profile, tocs, confidence=self._config.confidence)
            budget = Budget(self._config.bytes, self._config.seconds, self._config.bandwidth)
            started.replay = Replay(self._worker.engine, str(message["mount"]), steps, targets.__getitem__, budget)
            started.state = "running"
            _recover(targets, steps)
            started.replay.run()
        self._worker.look_after(targets.values())

    def _profile(self, image: CachedImage, message: Message) -> Profile | None:
        """What is known of the command, by the mode that the user has chosen."""
        mode, name = str(message["mode"]), str(message["command"])
        if mode in ("auto", "profile"):
            found = self._profiles.best(image.digest, name)
            if found is not None and found.recorded:
                return found
        if mode == "profile" or not message["argv"]:
            return None
        stored = next((guess for guess in self._profiles.fetched(image.digest) if guess.command == name), None)
        return stored if stored is not None and not stored.recorded else self._guess(image, name, message)

    def _guess(self, image: CachedImage, name: str, message: Message) -> Profile | None:
        """Heuristics, where no builder has guessed yet what this command will read."""
        if len(image.packs) > _PACKS:
            _logger.info("%s: %d packs are too many for heuristics", image.name, len(image.packs))
            return None
        from erofsgen.host.prefetch.guessing import Reader, guess_profile
        from erofsgen.profile.guess.command import Command

        command = Command(tuple(message["argv"]), message["environment"], str(message["cwd"]))
        with self._worker.wanting([pack.hex for pack in image.packs]) as files:
            reader = Reader(self._worker.engine, files)
            return guess_profile(image, command, name, reader, budget=self._config.bytes or _GUESSED)

    @contextmanager
    def _targets(self, packs: list[str]) -> Iterator[dict[str, PackFile | ObjectFile]]:
        """What to write the packs of a mount to; packs that it has not opened are left out."""
        names = self._worker.through(packs)
        if names is None:
            with self._worker.wanting(packs) as files:
                yield dict(zip(packs, files, strict=True))
        else:
            opened = zip(packs, names, strict=True)
            yield {pack: self._worker.pack(name) for pack, name in opened if name is not None}

    # --- recordings --------------------------------------------------------------------------------------------------

    def recorded(self) -> None:
        """The supervisor has left a recording."""
        self._wake.set()

    def take_in(self, token: str = "") -> list[dict[str, Any]]:
        """Take in all recordings there are. Returns facts of those that have ``token``, also of earlier ones, once."""
        from erofsgen.host.prefetch.recording import read

        with self._taking_in:
            for path in sorted(self._directory.glob(f"*{SUFFIX}")):
                try:
                    facts = self._take_in(read(path))
                except (ErofsgenError, OSError) as error:
                    _logger.warning("%s: not taken in: %s", path.name, describe(error))
                    facts = None
                with suppress(OSError):
                    path.unlink()
                if facts is not None and facts["token"]:
                    self._taken.append(facts)
            taken = [facts for facts in self._taken if facts["token"] == token]
            self._taken = deque((facts for facts in self._taken if facts["token"] != token), _TAKEN)
        return taken

    def _run(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            try:
                self.take_in()
            except Exception as error:  # the thread must live on
                _logger.exception("recordings: %s", describe(error))

    def _take_in(self, recording: Recording) -> dict[str, Any] | None:
        from erofsgen.erofs.reader import Index
        from erofsgen.host.prefetch.recording import run_of, trace_of
        from erofsgen.profile.chunks import Chunks

        header = recording.header
        image = self._worker.cache.open_image(header.image)
        tocs = self._tocs(image)
        with self._lock:
            started = self._started.pop(header.mount, None)
            arrivals = dict(self._arrivals)
        steps = started.replay.asked if started is not None and started.replay is not None else []
        trace = trace_of(recording, tocs, arrivals, {(step.pack, step.frame): step.reason for step in steps})
        self._judge(trace)
        if not len(trace.touches):
            return None
        self._profiles.put_trace(trace)
        chunks = Chunks(Index(image.index.read_bytes()))
        before = self._profiles.find(header.image, header.command)
        run = run_of(recording, chunks, before)
        profile = self._profiles.add(header.image, run)
        _logger.info(
            "%s: recorded %r: %d chunks, %d bytes", image.name, header.command, len(run.rows), run.size,
            extra={"mount": header.mount, "digest": header.image, "command": header.command},
        )  # fmt: skip
        return {
            "token": header.token,
            "image": header.image,
            "command": header.command,
            "complete": header.complete,
            "touches": len(trace.touches),
            "waited": float(trace.touches["waited"].sum()) / 1e6,
            "chunks": len(run.rows),
            "bytes": run.size,
            "runs": profile.runs,
        }

    def _tocs(self, image: CachedImage) -> dict[str, Toc]:
        found = {}
        for pack in image.packs:
            with suppress(ErofsgenError):
                found[pack.hex] = self._worker.cache.toc(pack)
        return found

    def _judge(self, trace: Trace) -> None:
        """Count what of a mount's prefetch was of use, as far as anybody could see."""
        with self._lock:
            for row in trace.brought:
                judged = self._judged.setdefault(trace.reasons[row["reason"]], _Judged())
                size, used = int(row["length"]), bool(row["used"] and row["judged"])
                judged.frames += 1
                judged.bytes += size
                judged.used_frames += used
                judged.used_bytes += used * size
                judged.judged_bytes += bool(row["judged"]) * size

    # --- for the user ------------------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """What is and was prefetched, for ``status``."""
        with self._lock:
            mounts = {
                mount: {
                    "command": started.command,
                    "reason": started.why,
                    "bytes": started.replay.bytes if started.replay is not None else 0,
                    "of": started.replay.of if started.replay is not None else 0,
                    "state": started.state,
                }
                for mount, started in self._started.items()
            }
            return {"mounts": mounts, "reasons": {reason: vars(judged) for reason, judged in self._judged.items()}}

    def _forget_old(self) -> None:
        now = time.monotonic()
        over = [mount for mount, started in self._started.items() if now - started.at > _KEPT and not _goes_on(started)]
        for mount in over:
            del self._started[mount]


def _recover(targets: Mapping[str, PackFile | ObjectFile], steps: Sequence[Step]) -> None:
    """What is on this host already, from an earlier boot or in another cache, is compared and not fetched."""
    for pack, frame, size, _ in steps:
        target = targets[pack]
        if suspects := target.suspects(int(target.toc.device_offsets[frame]), size):
            target.recover(suspects)


def _goes_on(started: _Started) -> bool:
    return started.state in ("planning", "running")
