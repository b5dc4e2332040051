"""Whether KVM works here. The device may be there, and a guest on it still hang: one is booted to find out."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from vmtests.guest import End, Guest
from vmtests.kernels import Kernel
from vmtests.places import RUNS

SECONDS = 40
"""How long the probe's guest may take; with KVM it needs a few."""

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def kvm_works(kernel: Kernel) -> bool:
    """Whether ``kernel`` boots with KVM. The answer is kept until this machine boots again."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return False
    known = RUNS / "kvm"
    this_boot = _BOOT_ID.read_text().strip()
    if known.exists() and (words := known.read_text().split())[:1] == [this_boot]:
        return words[1] == "works"
    RUNS.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=RUNS) as directory,
        Guest(kernel, Path(directory, "share"), Path(directory, "console"), {}, "true", {}, kvm=True) as guest,
    ):
        works = guest.wait(SECONDS).end is End.DONE
    known.write_text(f"{this_boot} {'works' if works else 'hangs'}\n")
    return works
