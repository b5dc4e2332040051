"""The FUSE servers that ours are compared with: where they come from, and running them.

==============  =======================================================================================================
erofsfuse       erofs-utils' own server, from a newer Debian; see packaging/fetch-erofs-utils
passthrough_ll  libfuse's example, built from Debian's source package: hands on what another directory has
resident        bench/resident.py: replies from memory
==============  =======================================================================================================

All are made on first use and kept in ``.cache``. A program that cannot be had is None, and why is said once.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from measure import REPOSITORY

from erofsgen.errors import ErofsgenError
from erofsgen.host import linux
from vmtests.debian import Apt
from vmtests.places import locked, run

CACHE = REPOSITORY / ".cache" / "peers"
RESIDENT = (sys.executable, Path(__file__).with_name("resident.py"))
_SUITE = "bookworm"
_PATIENCE = 20.0

Provider = Callable[[], Path]


def _optional(provide: Provider) -> Callable[[], Path | None]:
    """A provider that says why it fails, and is asked once."""

    @functools.cache
    def provided() -> Path | None:
        try:
            return provide()
        except (ErofsgenError, subprocess.CalledProcessError, OSError) as error:
            _say(f"{provide.__name__} cannot be had: {error}")
            return None

    return provided


def _say(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


@_optional
def erofsfuse() -> Path:
    """The program, which runs with the libraries of its own release."""
    program = REPOSITORY / ".cache" / "erofs-utils" / "trixie" / "erofsfuse"
    if not program.exists():
        _say("fetching erofsfuse")
        script = REPOSITORY / "packaging" / "fetch-erofs-utils"
        run(script, "erofsfuse", environment={"SUITE": "trixie"})
    return program


@_optional
def passthrough() -> Path:
    """The program, built for this machine's libfuse."""
    program = CACHE / "passthrough_ll"
    with locked(CACHE / "lock"):
        if not program.exists():
            _say("fetching libfuse's source and building passthrough_ll")
            with tempfile.TemporaryDirectory(dir=CACHE) as work:
                _build_passthrough(Path(work)).rename(program)
    return program


def _build_passthrough(work: Path) -> Path:
    apt = Apt(work / "apt", suites=(), sources=(_SUITE,))
    apt.update()
    with tarfile.open(apt.download_source("fuse3", work)) as archive:
        archive.extractall(work, filter="data")
    (source,) = work.glob("*/example/passthrough_ll.c")
    flags = run("pkg-config", "fuse3", "--cflags", "--libs").split()
    run("gcc", "-O2", "-o", work / "passthrough_ll", source, *flags)
    return work / "passthrough_ll"


@contextmanager
def served(command: Sequence[str | Path], target: Path) -> Iterator[Path]:
    """What ``command`` mounts on ``target``, which is made; it stays in the foreground, and ends with the mount.

    Raises SystemExit with what it printed if it mounts nothing.
    """
    target.mkdir(parents=True)
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        try:
            until = time.monotonic() + _PATIENCE
            while not _is_mounted(target):
                if process.poll() is not None or time.monotonic() > until:
                    output.seek(0)
                    raise SystemExit(f"bench: {command[0]}: {output.read().decode(errors='replace').strip()}")
                time.sleep(0.01)
            yield target
        finally:
            subprocess.run(["umount", "--lazy", target], check=False, stderr=subprocess.DEVNULL)
            with suppress(subprocess.TimeoutExpired):
                process.wait(_PATIENCE)
            process.kill()
            process.wait()


def _is_mounted(target: Path) -> bool:
    path = os.path.realpath(target)
    return any(point.target == path for point in linux.mount_points())
