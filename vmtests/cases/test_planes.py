"""Each kernel has the planes it is in the catalogue for, and ``doctor`` says why it has no others."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from handmade import make_wide, read_tree
from sites import Site

from erofsgen.host import linux, probes
from erofsgen.host.daemon.planes import LAZY
from erofsgen.host.doctor import examine
from erofsgen.host.mount.mounts import choose

KERNEL = os.environ.get("EROFSGEN_VM_KERNEL", "")
EXT4 = Path(os.environ.get("EROFSGEN_VM_EXT4", "/nonexistent"))
XFS = Path(os.environ.get("EROFSGEN_VM_XFS", "/nonexistent"))
EXPECTED = {
    "6.1-ondemand": ("fscache", "blockfuse", "fuse", "eager"),
    "6.12-ondemand": ("fscache", "blockfuse", "fuse", "eager"),
    "6.1": ("blockfuse", "fuse", "eager"),
    "6.12": ("blockfuse", "fuse", "eager"),
    "6.x": ("fanotify", "blockfuse", "fuse", "eager"),
    "7.x": ("fanotify", "blockfuse", "fuse", "eager"),
}


@pytest.mark.parametrize("disk", [EXT4, XFS], ids=["ext4", "xfs"])
def test_the_planes_are_those_of_the_catalogue(disk):
    found = examine([disk])
    working = [plane.plane for plane in found.planes if plane.works]
    assert sorted(working) == sorted(EXPECTED[KERNEL])
    assert found.auto == EXPECTED[KERNEL][0]


def test_doctor_says_why_there_is_no_fscache():
    finding = probes.fscache(EXT4)
    if "fscache" in EXPECTED[KERNEL]:
        assert finding.ok
    elif linux.kernel_version() >= (7, 2):
        assert "no option fsid" in finding.detail
    else:
        assert "CONFIG_EROFS_FS_ONDEMAND" in finding.detail or "CONFIG_CACHEFILES_ONDEMAND" in finding.detail


def test_auto_is_the_first_lazy_plane_and_says_what_others_lack(tmp_path):
    plane, reasons = choose("auto", tmp_path)
    assert plane == EXPECTED[KERNEL][0]
    assert [reason.partition(":")[0] for reason in reasons] == list(LAZY[: LAZY.index(plane)])


@pytest.mark.case("cache on xfs")
def test_the_cache_on_xfs(plane):
    place = XFS / f"site-{plane}"
    place.mkdir()
    site = Site(place, plane)
    try:
        wide = make_wide(site.maker)
        mounted = site.mount(wide.image)
        assert read_tree(mounted) == wide.files
        site.unmount(mounted)
        assert read_tree(site.mount(wide.image)) == wide.files
        assert site.frames() == (0 if plane == "eager" else 61)
    finally:
        site.end()
