"""Ceph's S3 service on loopback: one monitor, one OSD in memory and one RADOS gateway, without systemd."""

from __future__ import annotations

import base64
import contextlib
import secrets
import struct
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from servers.process import daemon, free_port, wait_for_port
from servers.s3 import S3Server

# cephx is needed: with auth "none" radosgw never connects. The proposal intervals, 1 s and 50 ms otherwise, are what
# starting takes: every new pool waits for several proposals. Without tcp_nodelay a small range takes 40 ms longer.
# Sockets have paths of 107 bytes at most, which a test's directory may exceed: none is made.
_CONFIG = """\
[global]
fsid = {fsid}
keyring = {root}/keyring
mon host = [v2:127.0.0.1:{mon_port}/0]
mon initial members = a
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
paxos propose interval = 0.02
paxos min wait = 0.01
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pgp num = 8
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon max pg per osd = 1000
mon data avail crit = 0
public addr = 127.0.0.1
cluster addr = 127.0.0.1
ms bind ipv6 = false
admin socket =
log file = {root}/log/$name.log
[mon.a]
mon data = {root}/mon
[osd.0]
osd data = {root}/osd
osd objectstore = memstore
memstore device bytes = 4294967296
[client.rgw]
rgw data = {root}/rgw
rgw frontends = beast endpoint=127.0.0.1:{port} tcp_nodelay=1
"""


@contextlib.contextmanager
def ceph_rgw(root: Path) -> Iterator[S3Server]:
    """A one-node Ceph with everything but the objects, which are in memory, below ``root``. Up in about 1 s."""
    for directory in ("log", "mon", "osd", "rgw"):
        (root / directory).mkdir(parents=True)
    fsid, osd, mon_port, port = str(uuid.uuid4()), str(uuid.uuid4()), free_port(), free_port()
    config = root / "ceph.conf"
    config.write_text(_CONFIG.format(root=root, fsid=fsid, mon_port=mon_port, port=port))
    server = S3Server(f"http://127.0.0.1:{port}", secrets.token_hex(10), secrets.token_hex(20), "us-east-1")
    (root / "keyring").write_text(
        _key("mon.", mon="allow *")
        + _key("client.admin", mon="allow *", osd="allow *", mgr="allow *")
        + _key("osd.0", mon="allow profile osd", osd="allow *")
        + _key("client.rgw", mon="allow rwx", osd="allow rwx")
    )

    def run(tool: str, *arguments: str | Path) -> None:
        with open(root / "log" / "setup.log", "ab") as log:
            subprocess.run([tool, "-c", config, *arguments], check=True, stdout=log, stderr=log, timeout=60)

    def start(tool: str, *arguments: str) -> contextlib.AbstractContextManager[subprocess.Popen[bytes]]:
        return daemon([tool, "-f", "-c", config, *arguments], root / "log" / f"{tool}.out")

    run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", f"[v2:127.0.0.1:{mon_port}]", root / "monmap")
    run("ceph-mon", "-i", "a", "--mkfs", "--monmap", root / "monmap", "--keyring", root / "keyring")
    with start("ceph-mon", "-i", "a"):
        run("ceph", "osd", "new", osd)
        run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
        with start("ceph-osd", "-i", "0"):
            # It makes the zone and its pools, which a gateway started at the same time would trip over.
            run(
                "radosgw-admin", "user", "create", "--uid=tests", "--display-name=tests",
                f"--access-key={server.access_key}", f"--secret-key={server.secret_key}",
            )  # fmt: skip
            with start("radosgw", "-n", "client.rgw") as gateway:
                wait_for_port(gateway, port, root / "log" / "radosgw.out", timeout=60)
                yield server


def _key(name: str, **capabilities: str) -> str:
    """A keyring's entry. A key is its type (1: AES), its time in seconds and nanoseconds, its length, its bytes."""
    key = struct.pack("<HIIH16s", 1, int(time.time()), 0, 16, secrets.token_bytes(16))
    lines = [f"[{name}]", f"key = {base64.b64encode(key).decode()}"]
    return "\n".join([*lines, *(f'caps {part} = "{what}"' for part, what in capabilities.items())]) + "\n"
