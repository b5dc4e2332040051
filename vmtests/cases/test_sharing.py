"""Equal files of two images, once in memory: Linux 7.0 and later, for images built with ``--share-pages``."""

from __future__ import annotations

import ctypes
import io
import mmap
import os
import random
import tarfile

import pytest
from sites import drop_caches

from erofsgen.build.options import BuildOptions
from erofsgen.build.pipeline import build_image
from erofsgen.host import linux
from erofsgen.host.cache.cache import HostCache
from erofsgen.host.probes import page_sharing
from erofsgen.oci.images import open_image
from erofsgen.store.directory import DirectoryStore
from erofsgen.store.image import Image

SIZE = 2 << 20


def mounted(index, devices, target, *flags):
    target.mkdir()
    context = linux.fsopen("erofs")
    try:
        linux.fsconfig_string(context, "source", str(index))
        for device in devices:
            linux.fsconfig_string(context, "device", str(device))
        for flag in (*flags, "ro"):
            if "=" in flag:
                linux.fsconfig_string(context, *flag.split("="))
            else:
                linux.fsconfig_flag(context, flag)
        linux.fsconfig_create(context)
        mount = linux.fsmount(context, linux.MOUNT_ATTR_RDONLY)
    finally:
        os.close(context)
    place = os.open(target, os.O_PATH)
    linux.move_mount(mount, place)
    os.close(place)
    os.close(mount)
    return target


def resident(path):
    """Pages of a file that are in memory (mincore(2))."""
    pages = -(-path.stat().st_size // mmap.PAGESIZE)
    found = (ctypes.c_ubyte * pages)()
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
    libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    with open(path, "rb") as file:
        address = libc.mmap(None, pages * mmap.PAGESIZE, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
    assert libc.mincore(address, pages * mmap.PAGESIZE, found) == 0
    libc.munmap(address, pages * mmap.PAGESIZE)
    return sum(page & 1 for page in found)


@pytest.mark.case("page-cache sharing", plane="eager")
def test_equal_files_of_two_images_share_their_pages(tmp_path):
    finding = page_sharing(tmp_path)
    if finding.result == "missing":  # "unknown" is a kernel whose configuration cannot be read: try
        pytest.skip(finding.detail)
    store, cache = DirectoryStore(tmp_path / "store"), HostCache(tmp_path / "root")
    content = random.Random(8).randbytes(SIZE)
    places = {}
    for name in ("one", "two"):
        path = tmp_path / f"{name}.tar"
        with tarfile.open(path, "w") as archive:
            for member, data in ((f"in-{name}", content), ("own", name.encode() * 1000)):
                entry = tarfile.TarInfo(member)
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
        with open_image(f"tar:{path}") as source:
            build_image(source, store, tag=name, options=BuildOptions(share_pages=True))
        places[name] = cache.materialise(Image.open(store, name))
    targets = []
    try:
        for flags, name in (((), "apart"), (("inode_share", "domain_id=test"), "shared")):
            for image, (index, devices) in places.items():
                targets.append(mounted(index, devices, tmp_path / f"{name}-{image}", *flags))
            drop_caches()
            assert (tmp_path / f"{name}-one" / "in-one").read_bytes() == content
            pages = resident(tmp_path / f"{name}-two" / "in-two")
            assert pages == (0 if name == "apart" else SIZE // mmap.PAGESIZE), name
            assert (tmp_path / f"{name}-two" / "in-two").read_bytes() == content
            assert (tmp_path / f"{name}-two" / "own").read_bytes() == b"two" * 1000
    finally:
        for target in targets:
            linux.umount(target, linux.MNT_DETACH)
