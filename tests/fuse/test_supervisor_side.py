"""What servers say to the supervisor, and what others may say to it, which must harm nobody."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from fusekit import ONLY_FUSE, Site
from handmade import CHUNK, Sample, read_tree
from lazykit import WAIT, Reader, eventually

from erofsgen.host.daemon.control import address_of
from erofsgen.host.mount.mounts import mounts
from fusefallback.plane import SOCKET

pytestmark = [pytest.mark.mount, pytest.mark.usefixtures("require_root"), ONLY_FUSE]


@contextmanager
def connected(site: Site) -> Iterator[socket.socket]:
    if not site.daemon():
        site.start()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as end:
        with address_of(site.host.root, SOCKET) as address:
            end.connect(address)
        end.settimeout(WAIT)
        yield end


def ask(end: socket.socket, message: dict[str, Any]) -> dict[str, Any]:
    end.send(json.dumps(message).encode())
    return json.loads(end.recv(1 << 16))


def pulled(site: Site, wide: Sample) -> str:
    """A pack of an image that is in the cache, and of which nothing is there."""
    site.cache.add(wide.image)
    return wide.packs[0].hex


def test_a_range_is_brought(site: Site, wide: Sample) -> None:
    pack = pulled(site, wide)
    with connected(site) as end:
        greeting = ask(end, {"do": "hello", "mount": "m"})
        assert greeting == {"deadline": 30.0, "read_ahead": 0}
        assert site.host.status()["servers"] == 1
        wanted = {"do": "fill", "key": 7, "pack": pack, "offset": 5 * CHUNK, "length": CHUNK}
        assert ask(end, wanted) == {"key": 7, "error": None}
        with site.cache.files(pack).data.open("rb") as data:
            data.seek(5 * CHUNK)
            assert data.read(CHUNK) == wide.files["one"][5 * CHUNK : 6 * CHUNK]  # type: ignore[index]
        assert ask(end, {**wanted, "key": 8}) == {"key": 8, "error": None}, "it is there already"
        unknown = ask(end, {**wanted, "key": 9, "pack": "0" * 64})
        assert unknown == {"key": 9, "error": f"pack {'0' * 64}: not in the cache"}
    eventually(lambda: site.host.status()["servers"] == 0)


RANGE = {"pack": "0" * 64, "offset": 0, "length": 4096}
MALFORMED = {
    "no JSON": b"\xff\xfe not JSON",
    "half a message": b'{"do": "fill", "key"',
    "a list": b"[1, 2]",
    "a number": b"7",
    "null": b"null",
    "a string": b'"fill"',
    "nothing to do": b"{}",
    "unknown": {"do": "dance"},
    "unhashable": {"do": ["fill"]},
    "hello without a mount": {"do": "hello"},
    "fill without anything": {"do": "fill"},
    "fill without a key": {"do": "fill", **RANGE},
    "a key that is none": {"do": "fill", "key": ["x"], **RANGE},
    "a key of words": {"do": "fill", "key": "seven", **RANGE},
    "a pack that is none": {"do": "fill", "key": 1, **RANGE, "pack": 5},
    "a pack elsewhere": {"do": "fill", "key": 1, **RANGE, "pack": "../../etc/passwd"},
    "an offset of words": {"do": "fill", "key": 1, **RANGE, "offset": "0"},
    "half an offset": {"do": "fill", "key": 1, **RANGE, "offset": 0.5},
    "a negative offset": {"do": "fill", "key": 1, **RANGE, "offset": -1},
    "a negative length": {"do": "fill", "key": 1, **RANGE, "length": -4096},
    "beyond everything": {"do": "fill", "key": 1, **RANGE, "offset": 1 << 70},
    "no length": {"do": "ahead", "pack": "0" * 64, "offset": 0},
    "a length that is none": {"do": "ahead", **RANGE, "length": None},
    "truth": {"do": "ahead", **RANGE, "length": True},
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("message", MALFORMED)
def test_what_is_no_message_ends_the_connection_and_nothing_else(site: Site, message: str) -> None:
    with connected(site) as end, connected(site) as other:
        status = site.host.status()
        ask(end, {"do": "hello", "mount": "m"})
        said = MALFORMED[message]
        end.send(said if isinstance(said, bytes) else json.dumps(said).encode())
        assert end.recv(1 << 16) == b"", "it hangs up"
        assert "deadline" in ask(other, {"do": "hello", "mount": "n"}), "others are heard"
        after = site.host.status()
    assert (after["pid"], after["worker"]) == (status["pid"], status["worker"])


def test_ranges_that_no_pack_has(site: Site, wide: Sample) -> None:
    """Well formed, but senseless: an answer, and the worker lives."""
    pack = pulled(site, wide)
    with connected(site) as end:
        worker = site.host.status()["worker"]
        for number, (offset, length) in enumerate([(1 << 60, 4096), (0, 1 << 60), (0, 0), (96 * CHUNK, 1), (5, 1)]):
            end.send(json.dumps({"do": "ahead", "pack": pack, "offset": offset, "length": length}).encode())
            answer = ask(end, {"do": "fill", "key": number, "pack": pack, "offset": offset, "length": length})
            assert answer["key"] == number
        assert site.host.status()["worker"] == worker


def test_descriptors_that_nobody_wants_are_closed(site: Site) -> None:
    def held() -> int:
        return len(os.listdir(f"/proc/{site.host.status()['pid']}/fd"))

    with connected(site) as end:
        ask(end, {"do": "hello", "mount": "m"})
        before = held()
        for _ in range(20):
            socket.send_fds(end, [json.dumps({"do": "hello", "mount": "m"}).encode()], [0, 1, 2])
            end.recv(1 << 16)
        assert held() <= before + 2


def test_a_client_that_does_not_listen(site: Site, wide: Sample) -> None:
    """Its answers wait; others' do not."""
    pack = pulled(site, wide)
    with connected(site) as deaf:
        deaf.setblocking(False)
        message = json.dumps({"do": "fill", "key": 1, "pack": pack, "offset": 0, "length": 1}).encode()
        for _ in range(2000):
            with suppress(BlockingIOError):
                deaf.send(message)
        target = site.mount(wide.image, read_ahead=128)
        assert Reader(target / "three").get() == wide.files["three"][:4096]  # type: ignore[index]
    assert read_tree(target) == wide.files


def test_a_client_that_never_listens_is_hung_up_on(site: Site, wide: Sample) -> None:
    pack = pulled(site, wide)
    with connected(site) as deaf, suppress(ConnectionError):
        deaf.settimeout(20)
        for key in range(12_000):
            message = {"do": "fill", "key": key, "pack": pack, "offset": 0, "length": 1}
            deaf.send(json.dumps(message).encode())
        eventually(lambda: "does not listen" in site.host.log())
    assert "does not listen" in site.host.log()


def test_the_socket_is_the_owners_alone(site: Site, wide: Sample) -> None:
    site.mount(wide.image)
    for name in (SOCKET, "servers.sock"):
        assert (site.host.root / name).stat().st_mode & 0o777 == 0o600
    assert len(mounts(site.host.root)) == 1
