"""Trees to write, with the devices their files lie on, and what a reader must find in them."""

from __future__ import annotations

import os
import random
import stat
import struct

import numpy as np

from erofsgen.erofs.tree import BLOCK, CHUNK_DTYPE, Device, Inode, walk
from erofsgen.erofs.writer import write_index

CHUNK = 64 << 10

CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 10, 0, 0, 0)
"""struct vfs_ns_cap_data, revision 2: cap_net_bind_service, effective."""


def acl(*entries: tuple[int, int, int]) -> bytes:
    """An ACL as the kernel's xattr interface has it: (tag, permissions, id)."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER = 1, 2, 4, 8, 16, 32
NOBODY = 0xFFFFFFFF
ACCESS_ACL = acl(
    (USER_OBJ, 6, NOBODY),
    (USER, 4, 1234),
    (GROUP_OBJ, 4, NOBODY),
    (GROUP, 6, 99),
    (MASK, 6, NOBODY),
    (OTHER, 0, NOBODY),
)
DEFAULT_ACL = acl((USER_OBJ, 7, NOBODY), (GROUP_OBJ, 5, NOBODY), (OTHER, 0, NOBODY))


def directory(children: dict[bytes, Inode] | None = None, mode: int = 0o755, **fields) -> Inode:
    return Inode(stat.S_IFDIR | mode, children=children if children is not None else {}, **fields)


def symlink(target: bytes, **fields) -> Inode:
    return Inode(stat.S_IFLNK | 0o777, data=target, **fields)


def small(content: bytes, mode: int = 0o644, **fields) -> Inode:
    return Inode(stat.S_IFREG | mode, size=len(content), data=content, **fields)


def special(kind: int, major: int = 0, minor: int = 0, **fields) -> Inode:
    return Inode(kind | 0o600, rdev=os.makedev(major, minor), **fields)


class Disks:
    """Devices with random bytes, and the chunk table of files on them."""

    def __init__(self, *blocks: int, chunk_size: int = CHUNK, seed: int = 1) -> None:
        self.random = random.Random(seed)
        self.bytes = [self.random.randbytes(count * BLOCK) for count in blocks]
        self.devices = [Device(f"{number:064x}", count) for number, count in enumerate(blocks, 1)]
        self.chunk_size = chunk_size
        self._table = [(0, 0)]

    def chunk(self, device: int, block: int) -> int:
        """The number of a chunk at a place."""
        self._table.append((device, block))
        return len(self._table) - 1

    def file(self, size: int, *places: tuple[int, int] | None, mode: int = 0o644, **fields) -> Inode:
        """A file whose chunks are at these places, None for a hole."""
        chunks = tuple(0 if place is None else self.chunk(*place) for place in places)
        return Inode(stat.S_IFREG | mode, size=size, chunks=chunks, **fields)

    @property
    def table(self) -> np.ndarray:
        return np.array(self._table, CHUNK_DTYPE)

    def content(self, inode: Inode) -> bytes:
        """What a file's bytes must read as."""
        if not inode.chunks:
            return inode.data
        pieces = []
        for number in inode.chunks:
            device, block = self._table[number]
            piece = self.bytes[device - 1][block * BLOCK :][: self.chunk_size] if number else b""
            pieces.append(piece.ljust(self.chunk_size, b"\0"))
        return b"".join(pieces)[: inode.size]

    def write(self, root: Inode, **options) -> bytes:
        return bytes(write_index(root, self.table, self.devices, chunk_size=self.chunk_size, **options))


def nlinks(root: Inode) -> dict[int, int]:
    """Links of each inode, by ``id``."""
    links: dict[int, int] = {}
    for _, inode in walk(root):
        if inode.is_dir:
            links[id(inode)] = 2 + sum(child.is_dir for child in (inode.children or {}).values())
        else:
            links[id(inode)] = links.get(id(inode), 0) + 1
    return links


def size_of(inode: Inode) -> int:
    """st_size, of what is no directory."""
    return len(inode.data) if stat.S_ISLNK(inode.mode) else inode.size


HUGE_SIZE = (5 << 30) + 123
"""Bytes of the sample's sparse file: its end does not fit 32 bits, and its chunks are holes but the last."""


def sample() -> tuple[Inode, Disks]:
    """A tree with one of everything."""
    disks = Disks(300, 500, 64)
    file = disks.file
    linked = file(70_000, (2, 16), (2, 32), mtime=1_700_000_000_123_456_789, uid=1000, gid=1000)
    linked_small = small(b"two names", mode=0o4755)
    common = 1_600_000_000_000_000_001
    label = (b"security.selinux", b"system_u:object_r:usr_t:s0\0")
    names = directory(
        {
            b"n" * 255: small(b"longest name"),
            b"caf\xe9 \xff\xfe": small(b"not UTF-8"),
            b"\xc3\xa9": symlink(b"\xc3\xa9 target \xff"),
            b" leading space": small(b""),
            b"new\nline": small(b"x"),
            b"!before dots": small(b"0x21 sorts before 0x2e"),
            b"-": small(b"dash"),
            b"..three": small(b"behind two dots"),
            b"...": small(b"three dots"),
        }
    )
    deep = bottom = directory()
    for level in range(300):
        assert bottom.children is not None
        bottom.children[b"d%d" % level] = bottom = directory(mtime=common)
    assert bottom.children is not None
    bottom.children[b"bottom"] = small(b"here")
    many = directory({b"entry-%06d" % number: small(b"", mtime=common) for number in range(5000)}, mtime=common)
    xattrs = directory(
        {
            b"capability": file(5000, (1, 200), mode=0o755, xattrs=((b"security.capability", CAPABILITY),)),
            b"acl": small(b"acl", mode=0o660, xattrs=((b"system.posix_acl_access", ACCESS_ACL),)),
            b"both": directory(
                {},
                mode=0o770,
                xattrs=((b"system.posix_acl_access", ACCESS_ACL), (b"system.posix_acl_default", DEFAULT_ACL)),
            ),
            b"user": small(
                b"", xattrs=((b"user.a", b""), (b"user.binary", bytes(range(256))), (b"user.long", b"l" * 3000))
            ),
            b"huge": small(
                b"tail behind many xattrs", xattrs=tuple((b"user.x%02d" % n, b"v" * 1000) for n in range(9))
            ),
            b"trusted": symlink(b"elsewhere", xattrs=((b"trusted.note", b"1"),)),
            b"name255": small(b"", xattrs=((b"user." + b"k" * 250, b"v"),)),
            b"value65535": small(b"", xattrs=((b"user.big", b"V" * 65535),)),
        }
        | {b"labelled%d" % n: small(b"%d" % n, xattrs=(label, (b"user.own", b"%d" % n))) for n in range(20)}
    )
    root = directory(
        {
            b"one-chunk": file(5000, (1, 3)),
            b"full-chunk": file(CHUNK, (1, 32), mtime=common),
            b"run": linked,
            b"run-again": linked,
            b"run-to-end-of-device": file(CHUNK + 1, (3, 47), (3, 63)),
            b"adjacent-devices": file(2 * CHUNK, (1, 284), (2, 0)),
            b"scattered": file(3 * CHUNK + 100, (2, 300), None, (1, 64), (3, 0)),
            b"backwards": file(2 * CHUNK, (1, 80), (1, 64), mtime=common),
            b"hole-first": file(CHUNK + 10, None, (1, 100)),
            b"hole-last": file(CHUNK + 10, (1, 100), None),
            b"all-hole": file(10 << 30, *([None] * ((10 << 30) // CHUNK)), mtime=common),
            b"all-hole-small": file(100, None),
            b"huge": file(HUGE_SIZE, *([None] * (HUGE_SIZE // CHUNK)), (2, 400)),
            b"empty": file(0, uid=70_000),
            b"inlined": small(b"a few bytes\n", uid=0xFFFFFFFE, gid=0xFFFFFFFD),
            b"inlined-large": small(disks.random.randbytes(4000)),
            b"inlined-block": small(disks.random.randbytes(4096)),
            b"inlined-more": small(disks.random.randbytes(9000)),
            b"two-names": linked_small,
            b"sub": directory(
                {
                    b"two-names-too": linked_small,
                    b"run-third": linked,
                    b"link": symlink(b"../one-chunk"),
                    b"absolute": symlink(b"/" + b"t" * 4094),
                    b"setgid": directory({}, mode=0o2775),
                    b"sticky": directory({}, mode=0o1777),
                },
                mode=0o711,
                mtime=-1,
            ),
            b"devices": directory(
                {
                    b"null": special(stat.S_IFCHR, 1, 3),
                    b"wide": special(stat.S_IFCHR, 4095, 1048575),
                    b"disk": special(stat.S_IFBLK, 259, 70_000),
                    b"whiteout": special(stat.S_IFCHR),
                    b"fifo": Inode(stat.S_IFIFO | 0o644),
                    b"socket": Inode(stat.S_IFSOCK | 0o755),
                }
            ),
            b"times": directory(
                {
                    b"1969": small(b"", mtime=-1),
                    b"1901": small(b"", mtime=-(2**31) * 10**9 - 1),
                    b"2038": small(b"", mtime=2**31 * 10**9 + 999_999_999),
                    b"2446": small(b"", mtime=2**34 * 10**9 + 5),
                    b"far": small(b"", mtime=2**40 * 10**9 + 5),
                }
            ),
            b"names": names,
            b"deep": deep,
            b"many": many,
            b"xattrs": xattrs,
            b"none": directory({}, mode=0o000),
        },
        mode=0o755,
        uid=3,
        gid=4,
        mtime=common,
    )
    return root, disks
