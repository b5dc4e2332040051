"""The kernels there are tests for, and where to get them.

On disk, ``.cache/kernels``::

    lock                                     held while one is being made
    <name>_<version>[_<fragment>]/           appears finished, by rename
        boot/vmlinuz-<release>, boot/config-<release>
        lib/modules/<release>/               stock kernels only
    *.part/                                  left by a run that was killed; the next one removes it

``<fragment>`` is the beginning of :func:`vmtests.build.fragment_digest`: other options, another kernel.
``$EROFSGEN_KERNEL_CACHE`` may name a directory of kernels somebody built before: ``bzImage-<version>-ondemand``,
``config-<version>-ondemand`` and the ``fragment.config`` they were built from. One is used if fragment and source
version are ours.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from erofsgen.errors import NotFoundError, UsageError
from vmtests import build
from vmtests.debian import ORDER, Apt, Package
from vmtests.places import KERNELS, locked, run

Say = Callable[[str], None]


@dataclass(frozen=True)
class Entry:
    """A kernel of the catalogue. ``series`` selects Debian's packages; ``ondemand`` kernels are built here."""

    name: str
    series: str
    ondemand: bool
    what: str


CATALOGUE = {
    entry.name: entry
    for entry in (
        Entry("6.1-ondemand", "6.1", True, "Debian's 6.1 source with cachefiles' on-demand mode"),
        Entry("6.12-ondemand", "6.12", True, "Debian's 6.12 source with cachefiles' on-demand mode"),
        Entry("6.1", "6.1", False, "Debian 12's kernel"),
        Entry("6.12", "6.12", False, "Debian 13's kernel"),
        Entry("6.x", "6.x", False, "the newest 6.x in Debian's suites"),
        Entry("7.x", "7.x", False, "the newest 7.x in Debian's suites"),
    )
}

QUICK = {
    "6.12-ondemand": "not [blockfuse and not [fuse and not [eager and not test_speed",
    "6.12": "not [fuse and not [eager and not test_demo and not 100_mounts and not test_speed and not test_power",
}
"""What ``make vmtest`` runs: kernels, and which cases on each. What these leave out the suite tests on this machine."""


@dataclass(frozen=True)
class Kernel:
    """A kernel's files. ``modules`` is the directory of its modules, None where everything is built in."""

    name: str
    release: str
    image: Path
    config: Path
    modules: Path | None


def provide(name: str, say: Say, *, update: bool = False) -> Kernel:
    """The kernel ``name``, downloaded or built if it is not in the cache.

    With ``update`` the packages are looked up even so, and a newer one is taken. Raises UsageError, NotFoundError,
    RemoteError, and ErofsgenError where building fails.
    """
    if name not in CATALOGUE:
        raise UsageError(f"there is no kernel {name!r}", hint=f"there are {', '.join(CATALOGUE)}")
    entry = CATALOGUE[name]
    if not update and (cached := _cached(entry)):
        return cached
    with locked(KERNELS / "lock"):
        if not update and (cached := _cached(entry)):  # somebody else was faster
            return cached
        for left in KERNELS.glob("*.part"):
            shutil.rmtree(left)
        apt = Apt()
        say(f"{name}: looking into Debian's suites")
        apt.update()
        packages = [apt.source(entry.series)] if entry.ondemand else apt.stock(entry.series)
        place = KERNELS / _directory(entry, packages[0].version)
        if not place.exists():
            _make(entry, packages, place, apt, say)
        return _read(entry, place)


def _directory(entry: Entry, version: str) -> str:
    return "_".join([entry.name, version, *([build.fragment_digest()[:16]] if entry.ondemand else [])])


def _cached(entry: Entry) -> Kernel | None:
    """The newest finished kernel of this name, built from the fragment as it is now."""
    versions = [path.name.split("_")[1] for path in KERNELS.glob(f"{entry.name}_*")]
    finished = [version for version in versions if (KERNELS / _directory(entry, version)).is_dir()]
    return _read(entry, KERNELS / _directory(entry, max(finished, key=ORDER))) if finished else None


def _read(entry: Entry, place: Path) -> Kernel:
    (image,) = place.glob("boot/vmlinuz-*")
    release = image.name.removeprefix("vmlinuz-")
    modules = place / "lib/modules" / release
    config = place / "boot" / f"config-{release}"
    return Kernel(entry.name, release, image, config, modules if modules.is_dir() else None)


def _make(entry: Entry, packages: list[Package], place: Path, apt: Apt, say: Say) -> None:
    work = place.with_name(place.name + ".part")
    tree = work / "tree"
    (tree / "boot").mkdir(parents=True)
    if entry.ondemand:
        image, config, release = _ondemand(entry, packages[0], work, apt, say)
        shutil.copyfile(image, tree / "boot" / f"vmlinuz-{release}")
        shutil.copyfile(config, tree / "boot" / f"config-{release}")
    else:
        for package in packages:
            say(f"{entry.name}: fetching {package.name} {package.version}")
            run("dpkg", "-x", apt.download(package, work), work / "unpacked")
        arrange(work / "unpacked", tree, packages[0].release)
    os.rename(tree, place)
    shutil.rmtree(work)


def _ondemand(entry: Entry, source: Package, work: Path, apt: Apt, say: Say) -> tuple[Path, Path, str]:
    if (found := prebuilt(source.upstream)) is not None:
        say(f"{entry.name}: taking {found[0]}")
        return *found, source.upstream
    say(f"{entry.name}: fetching {source.name} {source.version}")
    deb = apt.download(source, work)
    say(f"{entry.name}: building {source.upstream}, some ten minutes on two cores")
    built = build.build(deb, work)
    if built.lost:
        say(f"{entry.name}: {source.upstream} does not take {', '.join(built.lost)}")
    return built.image, built.config, built.release


def prebuilt(version: str) -> tuple[Path, Path] | None:
    """Image and configuration of an on-demand kernel in ``$EROFSGEN_KERNEL_CACHE``, if it is the one we would build."""
    directory = os.environ.get("EROFSGEN_KERNEL_CACHE")
    if not directory:
        return None
    fragment = Path(directory, "fragment.config")
    image, config = (Path(directory, f"{kind}-{version}-ondemand") for kind in ("bzImage", "config"))
    if not (fragment.exists() and image.exists() and config.exists()):
        return None
    return (image, config) if build.fragment_digest(fragment) == build.fragment_digest() else None


def arrange(unpacked: Path, tree: Path, release: str) -> None:
    """Bring a stock kernel's files from where its packages put them to where we want them. Raises NotFoundError.

    Older packages have the image in ``/boot`` and leave ``modules.dep`` to their installation script; newer ones keep
    the image with the modules, below ``/usr``.
    """
    modules = tree / "lib/modules" / release
    modules.parent.mkdir(parents=True)
    for there in (unpacked / "lib/modules" / release, unpacked / "usr/lib/modules" / release):
        if there.is_dir():
            os.rename(there, modules)
            break
    else:
        raise NotFoundError(f"the packages of {release} bring no modules")
    for kind in ("vmlinuz", "config"):
        places = (unpacked / "boot" / f"{kind}-{release}", modules / kind)
        found = next((path for path in places if path.exists()), None)
        if found is None:
            raise NotFoundError(f"the packages of {release} bring no {kind}")
        os.rename(found, tree / "boot" / f"{kind}-{release}")
    if not (modules / "modules.dep").exists():
        run("depmod", "-b", tree, release)
