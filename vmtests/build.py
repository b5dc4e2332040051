"""Builds an on-demand kernel: Debian's source, ``make tinyconfig``, and the fragment beside this file.

Some ten minutes on two cores, and 2 GB of disk for that long.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from erofsgen.errors import ErofsgenError, IntegrityError
from vmtests.places import run

FRAGMENT = Path(__file__).with_name("ondemand.config")
NEEDED = {"CONFIG_CACHEFILES_ONDEMAND", "CONFIG_EROFS_FS_ONDEMAND", "CONFIG_9P_FS", "CONFIG_VIRTIO_BLK"}
"""Without these an on-demand kernel is of no use."""

_OPTION = re.compile(r"^(CONFIG_\w+)=(.*)$", re.MULTILINE)


@dataclass(frozen=True)
class Built:
    """A kernel that was built; ``lost`` are options it knows and did not take."""

    image: Path
    config: Path
    release: str
    lost: list[str]


def fragment_digest(fragment: Path = FRAGMENT) -> str:
    """What identifies a set of options: SHA-256 over the sorted option lines, in hexadecimal."""
    lines = sorted(f"{name}={value}\n" for name, value in _OPTION.findall(fragment.read_text()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def build(deb: Path, work: Path) -> Built:
    """Build the kernel of a ``linux-source`` package below ``work``.

    Raises ErofsgenError with the compiler's last lines, IntegrityError where the kernel cannot do what it is built for.
    """
    source = work / "source"
    source.mkdir()
    _unpack(deb, source)
    jobs = f"-j{len(os.sched_getaffinity(0))}"
    run("make", "-s", "tinyconfig", cwd=source)
    run("scripts/kconfig/merge_config.sh", "-m", ".config", FRAGMENT, cwd=source)
    run("make", "-s", "olddefconfig", cwd=source)
    lost = lost_options(source)
    run("nice", "make", "-s", jobs, "bzImage", cwd=source)
    release = run("make", "-s", "kernelrelease", cwd=source).strip()
    return Built(source / "arch/x86/boot/bzImage", source / ".config", release, lost)


def lost_options(source: Path, fragment: Path = FRAGMENT) -> list[str]:
    """The options that were wanted, that this kernel version knows, and that its configuration does not have.

    Some have no prompt of their own and follow from others. Raises IntegrityError where :data:`NEEDED` are among them.
    """
    got = dict(_OPTION.findall((source / ".config").read_text()))
    known = set()
    for path in source.rglob("Kconfig*"):
        known.update(re.findall(r"^\s*(?:menu)?config (\w+)", path.read_text(errors="replace"), re.MULTILINE))
    wanted = (name for name, value in _OPTION.findall(fragment.read_text()) if value == "y")
    lost = [name for name in wanted if name.removeprefix("CONFIG_") in known and got.get(name) != "y"]
    if missing := NEEDED.intersection(lost):
        raise IntegrityError(f"the kernel's configuration lacks {', '.join(sorted(missing))}")
    return lost


def _unpack(deb: Path, directory: Path) -> None:
    """The source tarball of the package, without its outer directory."""
    member = "./usr/src/linux-source-*.tar.xz"
    script = 'dpkg --fsys-tarfile "$1" | tar -xO --wildcards "$2" | tar -xJ -C "$3" --strip-components=1'
    command = ["bash", "-c", f"set -o pipefail; {script}", "unpack", str(deb), member, str(directory)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode or not (directory / "Kconfig").exists():
        shutil.rmtree(directory, ignore_errors=True)
        raise ErofsgenError(f"{deb.name} cannot be unpacked: {done.stderr.strip()[-200:]}")
