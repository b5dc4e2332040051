"""What is left after the machine was switched off, properly and not."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
from handmade import make_wide, read_tree
from lazykit import eventually
from sites import PLANES, Site

from erofsgen.errors import ErofsgenError
from erofsgen.host.cache.cache import HostCache
from erofsgen.host.doctor import plane_works
from erofsgen.host.mount.mounts import mounts

DISK = Path(os.environ.get("EROFSGEN_VM_EXT4", "/nonexistent"))
SETTLED = 61.0
SHARE = Path(os.environ.get("EROFSGEN_VM_SHARE", "/nonexistent"))


def kept(name, plane):
    """A site that outlives the guest, and its image, which is the same each time."""
    place = DISK / name / plane
    place.mkdir(parents=True, exist_ok=True)
    site = Site(place, plane)
    return site, make_wide(site.maker)


def test_an_image_is_left_in_the_cache(plane):
    """Read in full, unmounted, the daemon ended: what the next boot finds."""
    site, wide = kept("kept", plane)
    try:
        mounted = site.mount(wide.image)
        assert read_tree(mounted) == wide.files
        if mounts(site.host.root)[0].how == "loop":
            time.sleep(SETTLED)  # a flat image younger than that is not waited for, and compared with the store's
        site.unmount(mounted)
        if plane != "eager":
            eventually(site.idle)
    finally:
        site.end()


@pytest.mark.phase("reboot")
@pytest.mark.case("remount after reboot")
def test_a_cached_image_needs_no_store_after_a_reboot(plane):
    site, wide = kept("kept", plane)
    site.store.rename(site.place / "away")
    try:
        cached = HostCache(site.host.root).image(wide.image.digest, "")
        assert read_tree(site.mount(cached)) == wide.files
        assert site.frames() == 0
    finally:
        site.end()


@pytest.mark.phase("reboot")
def test_the_power_goes_in_mid_fill():
    """The last case of its boot. Planes are filling when the host sees the file and ends the guest."""
    sites = []
    for plane in cut_in_mid_fill():
        site, wide = kept("cut", plane)
        sites.append(site)
        threading.Thread(target=fill, args=(site, wide), daemon=True).start()
        if plane != "eager":
            eventually(lambda site=site: site.started and site.frames() > 3)
    (SHARE / "power-cut").touch()
    time.sleep(60)
    pytest.fail("the power is still on")


def cut_in_mid_fill():
    """The eager plane and the first lazy one that works: a guest without KVM is too slow for several at a time."""
    working = [plane for plane in PLANES if plane_works(DISK, plane).ok]
    return [*[plane for plane in working if plane != "eager"][:1], "eager"]


def fill(site, wide):
    """Read it all, forever: unmounted and mounted again, the cache emptied."""
    while True:
        try:
            mounted = site.mount(wide.image)
            read_tree(mounted)
            site.unmount(mounted)
            if site.plane == "eager":
                for path in (site.host.root / "packs").iterdir():
                    path.unlink()
        except (ErofsgenError, OSError):
            time.sleep(0.1)


@pytest.mark.phase("aftercut")
@pytest.mark.case("power cut in mid-fill")
def test_what_a_power_cut_leaves_is_right_or_fetched_anew(plane):
    if plane not in cut_in_mid_fill():
        pytest.skip("another lazy plane was filling when the power went")
    site, wide = kept("cut", plane)
    try:
        assert read_tree(site.mount(wide.image)) == wide.files
    finally:
        site.end()
