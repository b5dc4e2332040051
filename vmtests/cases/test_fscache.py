"""What is fscache's alone: mounting by hand, what it refuses, its device, its disk."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import time
from pathlib import Path

import crc32c
import pytest
from handmade import CHUNK, chunks_of, contents, read_tree
from lazykit import Host, Reader, eventually, processes
from sites import Site, drop_caches

from erofsgen.errors import BusyError, ErofsgenError, StorageError
from erofsgen.host import probes
from erofsgen.host.cache.cache import HostCache
from erofsgen.host.cache.objects import Objects
from erofsgen.host.daemon.client import Client
from erofsgen.host.doctor import plane_works

SHARE = Path(os.environ.get("EROFSGEN_VM_SHARE", "/nonexistent"))


@pytest.fixture
def plane():
    finding = plane_works(Path(os.environ["EROFSGEN_VM_EXT4"]), "fscache")
    if not finding.ok:
        pytest.skip(finding.detail)
    return "fscache"


@pytest.fixture
def daemon(site, wide):
    """The site's daemon, and the image in its cache."""
    HostCache(site.host.root).add(wide.image)
    site.start()
    return site.host


def by_hand(site, fsid, name="mnt", domain="erofsgen"):
    """What ``mount -t erofs none DIR -o fsid=…`` gives."""
    target = site.place / name
    target.mkdir(exist_ok=True)
    options = f"fsid={fsid}" + (f",domain_id={domain}" if domain else "")
    subprocess.run(["mount", "-t", "erofs", "none", target, "-o", options], check=True, capture_output=True, timeout=60)
    return target


def write_all(path):
    with path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 20))


def umount(target):
    subprocess.run(["umount", target], check=True)


def is_eio(result):
    return isinstance(result, OSError) and result.errno == errno.EIO


@pytest.mark.case("mount(8) by hand", plane="fscache")
def test_by_name_by_digest_and_without_a_domain(site, wide, daemon):
    digest = wide.image.digest.removeprefix("sha256:")
    for fsid, domain in (("wide", "erofsgen"), (digest, "erofsgen"), (digest[:12], "erofsgen"), ("wide", None)):
        target = by_hand(site, fsid, domain=domain)
        assert read_tree(target) == wide.files
        with pytest.raises(BusyError, match="by hand"):
            daemon.call("stop")
        umount(target)
    eventually(site.idle)
    assert site.frames() == 2 * 61, "once in the domain, once without"


@pytest.mark.case("an fsid nobody pulled", plane="fscache")
def test_an_unknown_fsid_is_refused(site, wide, daemon):
    for fsid in ("nothing", "0" * 64, "a/b"):
        with pytest.raises(subprocess.CalledProcessError):
            by_hand(site, fsid)
    assert "no image of the cache" in site.host.status()["errors"][0]["error"]
    assert read_tree(by_hand(site, "wide")) == wide.files


@pytest.mark.case("holes before data are refused", plane="fscache")
def test_an_image_the_kernel_would_misread_is_refused(site, daemon):
    content = contents(5, 3 * CHUNK)[0]
    pack = site.maker.pack(chunks_of(content))
    files = {"file": content[:CHUNK] + bytes(2 * CHUNK) + content[CHUNK:]}
    with pytest.raises(ErofsgenError):
        site.mount(site.maker.image("holes", files, [pack]))
    assert "holes before data" in site.host.status()["errors"][-1]["error"]


@pytest.mark.case("a tag that is no digest", plane="fscache")
def test_a_device_of_no_known_name_is_refused(site, wide, daemon):
    """An index that names a pack that is not in the cache; nothing but the plane looks at it in a mount by hand."""
    index = HostCache(site.host.root).image_path(wide.image.digest, "erofs")
    data = bytearray(index.read_bytes())
    at = data.index(wide.packs[0].hex.encode())
    data[at : at + 64] = b"no digest at all".ljust(64, b".")
    data[1028:1032] = bytes(4)
    data[1028:1032] = (crc32c.crc32c(bytes(data[1024:4096])) ^ 0xFFFFFFFF).to_bytes(4, "little")
    right = index.read_bytes()
    index.write_bytes(data)
    target = by_hand(site, "wide")
    assert isinstance(Reader(target / "one").get(), OSError)
    assert Reader(target / "two").get() == wide.files["two"][:4096]
    umount(target)
    index.write_bytes(right)
    assert "no digest at all" in site.host.status()["errors"][-1]["error"]
    eventually(site.idle)


@pytest.mark.case("another name, another image", plane="fscache")
def test_a_name_that_means_another_image_now(site, wide, daemon):
    """The kernel has the old index, of the same size: it must not be used."""
    assert read_tree(by_hand(site, "wide")) == wide.files
    umount(site.place / "mnt")
    eventually(site.idle)
    files = {**wide.files, "one": wide.files["two"], "two": wide.files["one"]}
    HostCache(site.host.root).add(site.maker.image("wide", files, wide.packs))
    assert read_tree(by_hand(site, "wide")) == files


@pytest.mark.case("a second daemon", plane="fscache")
def test_one_daemon_for_a_machine(site, daemon):
    other = Host(site.place / "other", "fscache")
    with pytest.raises(BusyError, match="another daemon has it"):
        other.start()
    assert "another daemon" in probes.fscache(other.root).detail
    assert "this root" in probes.fscache(site.host.root).detail
    assert site.host.status()["plane"] == "fscache"


@pytest.mark.case("a cache on an unfit file system", plane="fscache")
@pytest.mark.parametrize("place", [Path("/usr"), SHARE], ids=["read-only", "without O_TMPFILE"])
def test_a_file_system_that_is_unfit(site, place):
    finding = probes.fscache(place)
    assert finding.result == "missing"
    assert "unfit" in finding.detail
    assert probes.fscache(site.place).ok, "the device was given back"


@pytest.mark.case("less free space than bstop", plane="fscache")
def test_nothing_is_written_when_the_disk_is_to_be_left_alone(site, wide):
    """ENOBUFS for every write: readers get EIO, and the daemon lives."""
    HostCache(site.host.root).add(wide.image)
    disk = os.statvfs(site.place)
    free = min(disk.f_bavail * 100 // disk.f_blocks, 97)
    limits = [f"--plane-option=b{name}={free + more}" for name, more in (("run", 2), ("cull", 1), ("stop", 0))]
    site.start(*limits)
    target = by_hand(site, "wide")
    assert Reader(target / "one").get() == wide.files["one"][:4096]
    ballast = site.place / "ballast"
    with ballast.open("wb") as file:
        lacking = disk.f_bavail - disk.f_blocks * free // 100
        os.posix_fallocate(file.fileno(), 0, lacking * disk.f_frsize + (64 << 20))
    assert is_eio(Reader(target / "two").get())
    assert "No buffer space" in site.host.status()["errors"][-1]["error"]
    site.end()
    with pytest.raises(StorageError, match="less free space than --bstop"):
        site.start(*limits)
    ballast.unlink()
    site.start()
    assert read_tree(by_hand(site, "wide")) == wide.files


@pytest.mark.case("disk full", plane="fscache")
def test_a_full_disk(site, wide):
    """ENOSPC: on a small disk, with something else on it."""
    disk = site.place / "disk"
    image = site.place / "disk.img"
    with image.open("wb") as file:
        file.truncate(48 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
    disk.mkdir()
    subprocess.run(["mount", "-o", "loop", image, disk], check=True)
    small = Site(site.place / "small", "fscache")
    small.host.root = disk / "root"
    try:
        HostCache(small.host.root).add(wide.image)
        small.start("--plane-option=bstop=0")
        target = by_hand(small, "wide")
        ballast = disk / "ballast"
        with pytest.raises(OSError, match="No space"):
            write_all(ballast)
        assert is_eio(Reader(target / "all", 0, len(wide.files["all"])).get())
        assert small.host.status()["denied"] > 0
        ballast.unlink()
        eventually(lambda: Reader(target / "all", 0, len(wide.files["all"])).get() == wide.files["all"])
        umount(target)
    finally:
        small.end()
        subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.mark.case("objects are culled under pressure", plane="fscache")
def test_the_kernel_asks_for_room(site, wide):
    """Free space falls below brun: what is not in use goes, what is stays."""
    HostCache(site.host.root).add(wide.image)
    other = site.maker.image("other", {"copy": wide.files["one"]}, wide.packs[:1])
    HostCache(site.host.root).add(other)
    disk = os.statvfs(site.place)
    free = disk.f_bavail * 100 // disk.f_blocks
    site.start(f"--plane-option=brun={free}", f"--plane-option=bcull={free - 1}", "--plane-option=bstop=1")
    target = by_hand(site, "wide")
    assert read_tree(target) == wide.files
    umount(target)
    eventually(site.idle)
    used = by_hand(site, "other")
    ballast = site.place / "ballast"
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, disk.f_blocks * disk.f_frsize // 100 * 3)
    assert (used / "copy").read_bytes() == wide.files["one"]
    by_hand(site, wide.image.digest[7:27], "again")
    (site.place / "again" / "three").read_bytes()
    umount(site.place / "again")
    eventually(lambda: site.host.status()["culled_objects"] > 0)
    drop_caches()
    assert (used / "copy").read_bytes() == wide.files["one"]
    umount(used)


@pytest.mark.case("objects are forgotten by cache clear", plane="fscache")
def test_the_cache_is_cleared(site, wide, daemon):
    target = by_hand(site, "wide")
    assert read_tree(target) == wide.files
    objects = Objects(HostCache(site.host.root).layout)

    def clear():
        with Client.connect(site.host.root) as client:
            client.worker("clear")

    clear()
    assert read_tree(target) == wide.files
    umount(target)
    eventually(site.idle)
    eventually(lambda: len(list(objects.all())) == 4)
    clear()
    assert list(objects.all()) == []


@pytest.mark.case("killed in mid-read, restored", plane="fscache")
def test_kill_9_in_mid_read_with_restore(site, wide, daemon):
    """The supervisor dies again and again while somebody reads; the worker, too, so that all is opened anew."""
    target = by_hand(site, "wide")
    reader = Reader(target / "all", 0, len(wide.files["all"]))
    for _ in range(3):
        time.sleep(0.3)
        before = site.host.status()["pid"]
        site.host.kill("pid")
        eventually(lambda before=before: site.host.status()["pid"] != before)
    assert reader.get() == wide.files["all"]
    assert site.host.status()["errors"] == []
    umount(target)
    eventually(site.idle)


@pytest.mark.case("SIGTERM lets the kernel go", plane="fscache")
def test_an_ended_daemon_leaves_the_device(site, wide, daemon):
    with open(by_hand(site, "wide") / "one", "rb", buffering=0) as kept:
        assert kept.read(4096) == wide.files["one"][:4096]
        os.kill(site.host.status()["pid"], signal.SIGTERM)
        eventually(lambda: processes(site.host.root) == [])
        with pytest.raises(OSError, match=r"Input/output error|No buffer space"):
            os.pread(kept.fileno(), 4096, 40 * CHUNK)
    umount(site.place / "mnt")
    site.start()
    assert read_tree(by_hand(site, "wide")) == wide.files


@pytest.mark.case("what the host cache has is not fetched", plane="fscache")
def test_frames_of_the_host_cache_are_used(site, wide):
    cache = HostCache(site.host.root)
    cache.materialise(wide.image)
    site.start()
    site.store.rename(site.place / "away")
    assert read_tree(by_hand(site, "wide")) == wide.files
    assert site.frames() == 0
