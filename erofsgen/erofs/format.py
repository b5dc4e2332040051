"""The EROFS on-disk format: every structure, flag and limit that erofsgen writes or reads, and nothing else.

Little endian throughout. Names and field order are those of the kernel's ``fs/erofs/erofs_fs.h`` (Linux 7.3), the
C name of a structure stands above it. Each structure is declared once, as a numpy dtype; the ``struct.Struct`` beside
it, for single records, is made from the dtype.

What erofsgen writes mounts with Linux 5.16: block addresses have 32 bits, "." and ".." are stored, compact inodes
take their mtime from the superblock alone.
"""

from __future__ import annotations

import stat
import struct
from typing import Final, NamedTuple

import numpy as np
from crc32c import crc32c

BLOCK_BITS: Final = 12
BLOCK_SIZE: Final = 1 << BLOCK_BITS
"""Bytes per block of the images erofsgen writes, the page size of every architecture it serves."""

MIN_BLOCK_BITS: Final = 9
MAX_BLOCK_BITS: Final = 16
"""Block sizes readers accept: 512 bytes up to the largest page size (EROFS_MAX_BLOCK_SIZE of erofs-utils)."""

SUPER_OFFSET: Final = 1024
SUPER_MAGIC: Final = 0xE0F5E1E2

COMPAT_SB_CHKSUM: Final = 0x01
COMPAT_MTIME: Final = 0x02
COMPAT_XATTR_FILTER: Final = 0x04
COMPAT_SHARED_EA_IN_METABOX: Final = 0x08
COMPAT_PLAIN_XATTR_PFX: Final = 0x10
COMPAT_ISHARE_XATTRS: Final = 0x20

INCOMPAT_ZERO_PADDING: Final = 0x01
INCOMPAT_COMPR_CFGS: Final = 0x02
INCOMPAT_CHUNKED_FILE: Final = 0x04
INCOMPAT_DEVICE_TABLE: Final = 0x08
INCOMPAT_ZTAILPACKING: Final = 0x10
INCOMPAT_FRAGMENTS: Final = 0x20
INCOMPAT_XATTR_PREFIXES: Final = 0x40
INCOMPAT_48BIT: Final = 0x80
INCOMPAT_METABOX: Final = 0x100

READABLE_INCOMPAT: Final = (
    INCOMPAT_ZERO_PADDING | INCOMPAT_CHUNKED_FILE | INCOMPAT_DEVICE_TABLE | INCOMPAT_XATTR_PREFIXES
)
"""Features the reader knows. ZERO_PADDING is about compressed data only, and older mkfs.erofs sets it always."""

NULL_ADDR: Final = 0xFFFFFFFF
"""No block: a hole in a chunk table, a flat inode without blocks (EROFS_NULL_ADDR)."""

MAX_DEVICES: Final = 0xFFFF
"""Device ids are 16 bits, and 0 is the image itself."""

NAME_MAX: Final = 255
SYMLINK_MAX: Final = 4095
"""Bytes a symlink target may have: PATH_MAX without its NUL."""

PATH_LIMIT: Final = 1 << 16
"""Bytes a path may have. Not the format's limit but erofsgen's: or a small image could name petabytes of paths."""

XATTR_NAME_MAX: Final = 255
XATTR_VALUE_MAX: Final = 0xFFFF

ISLOT_BITS: Final = 5
ISLOT_SIZE: Final = 1 << ISLOT_BITS
"""Inode numbers (nids) count these from the start of the metadata area."""

# enum, datalayout of i_format
FLAT_PLAIN: Final = 0
COMPRESSED_FULL: Final = 1
FLAT_INLINE: Final = 2
COMPRESSED_COMPACT: Final = 3
CHUNK_BASED: Final = 4

I_VERSION_MASK: Final = 0x01
I_DATALAYOUT_BIT: Final = 1
I_DATALAYOUT_MASK: Final = 0x07
I_ALL: Final = 0x0F
"""Bits of i_format that may be set before 48BIT."""

CHUNK_FORMAT_BLKBITS_MASK: Final = 0x1F
CHUNK_FORMAT_INDEXES: Final = 0x20
CHUNK_FORMAT_ALL: Final = CHUNK_FORMAT_BLKBITS_MASK | CHUNK_FORMAT_INDEXES

XATTR_LONG_PREFIX: Final = 0x80
XATTR_LONG_PREFIX_MASK: Final = 0x7F
XATTR_FILTER_BITS: Final = 32
XATTR_FILTER_DEFAULT: Final = 0xFFFFFFFF
XATTR_FILTER_SEED: Final = 0x25BBE08F

FILE_TYPES: Final = {
    stat.S_IFREG: 1,
    stat.S_IFDIR: 2,
    stat.S_IFCHR: 3,
    stat.S_IFBLK: 4,
    stat.S_IFIFO: 5,
    stat.S_IFSOCK: 6,
    stat.S_IFLNK: 7,
}
"""S_IFMT to file_type of a directory entry (FT_* of include/linux/fs_types.h)."""


def _struct(dtype: np.dtype[np.void], size: int) -> struct.Struct:
    codes = {"u1": "B", "u2": "H", "u4": "I", "u8": "Q", "i8": "q"}
    assert dtype.names is not None
    fields = [dtype[name] for name in dtype.names]
    layout = [f"{field.itemsize}s" if field.kind == "V" else codes[field.str[1:]] for field in fields]
    made = struct.Struct("<" + "".join(layout))
    assert made.size == dtype.itemsize == size
    return made


# struct erofs_super_block
SUPER_DTYPE: Final = np.dtype(
    [
        ("magic", "<u4"),
        ("checksum", "<u4"),  # crc32c of the block from SUPER_OFFSET on, this field zero
        ("feature_compat", "<u4"),
        ("blkszbits", "u1"),
        ("sb_extslots", "u1"),  # superblock size = 128 + sb_extslots * 16
        ("rootnid_2b", "<u2"),
        ("inos", "<u8"),  # number of inodes
        ("epoch", "<i8"),  # mtime of compact inodes, seconds
        ("fixed_nsec", "<u4"),  # mtime of compact inodes, nanoseconds
        ("blocks_lo", "<u4"),  # blocks of the image itself, devices not counted
        ("meta_blkaddr", "<u4"),
        ("xattr_blkaddr", "<u4"),
        ("uuid", "V16"),
        ("volume_name", "V16"),
        ("feature_incompat", "<u4"),
        ("available_compr_algs", "<u2"),
        ("extra_devices", "<u2"),
        ("devt_slotoff", "<u2"),  # in device slots, from the start of the image
        ("dirblkbits", "u1"),
        ("xattr_prefix_count", "u1"),
        ("xattr_prefix_start", "<u4"),  # in 4-byte units, from the start of the image
        ("packed_nid", "<u8"),
        ("xattr_filter_reserved", "u1"),
        ("ishare_xattr_prefix_id", "u1"),
        ("reserved", "<u2"),
        ("build_time", "<u4"),  # seconds after epoch
        ("rootnid_8b", "<u8"),
        ("reserved2", "<u8"),
    ]
)
SUPER: Final = _struct(SUPER_DTYPE, 128)


class Superblock(NamedTuple):
    """The fields of :data:`SUPER_DTYPE`, in its order."""

    magic: int = SUPER_MAGIC
    checksum: int = 0
    feature_compat: int = 0
    blkszbits: int = BLOCK_BITS
    sb_extslots: int = 0
    rootnid_2b: int = 0
    inos: int = 0
    epoch: int = 0
    fixed_nsec: int = 0
    blocks_lo: int = 0
    meta_blkaddr: int = 0
    xattr_blkaddr: int = 0
    uuid: bytes = b""
    volume_name: bytes = b""
    feature_incompat: int = 0
    available_compr_algs: int = 0
    extra_devices: int = 0
    devt_slotoff: int = 0
    dirblkbits: int = 0
    xattr_prefix_count: int = 0
    xattr_prefix_start: int = 0
    packed_nid: int = 0
    xattr_filter_reserved: int = 0
    ishare_xattr_prefix_id: int = 0
    reserved: int = 0
    build_time: int = 0
    rootnid_8b: int = 0
    reserved2: int = 0


assert Superblock._fields == SUPER_DTYPE.names

# struct erofs_deviceslot
DEVICE_SLOT_DTYPE: Final = np.dtype(
    [
        ("tag", "V64"),  # erofsgen: the pack's sha256 in hex
        ("blocks_lo", "<u4"),
        ("uniaddr_lo", "<u4"),  # first block in the unified address space; mapped_blkaddr before 6.15
        ("reserved", "V56"),
    ]
)
DEVICE_SLOT: Final = _struct(DEVICE_SLOT_DTYPE, 128)

# struct erofs_inode_compact
INODE_COMPACT_DTYPE: Final = np.dtype(
    [
        ("i_format", "<u2"),
        ("i_xattr_icount", "<u2"),
        ("i_mode", "<u2"),
        ("i_nlink", "<u2"),
        ("i_size", "<u4"),
        ("i_mtime", "<u4"),  # seconds after epoch; reserved and ignored before 6.15
        ("i_u", "<u4"),  # union: startblk_lo, rdev, or the chunk format in the low half
        ("i_ino", "<u4"),
        ("i_uid", "<u2"),
        ("i_gid", "<u2"),
        ("i_reserved", "<u4"),
    ]
)
INODE_COMPACT: Final = _struct(INODE_COMPACT_DTYPE, 32)

# struct erofs_inode_extended
INODE_EXTENDED_DTYPE: Final = np.dtype(
    [
        ("i_format", "<u2"),
        ("i_xattr_icount", "<u2"),
        ("i_mode", "<u2"),
        ("i_nb", "<u2"),  # startblk_hi of 48BIT, else reserved
        ("i_size", "<u8"),
        ("i_u", "<u4"),
        ("i_ino", "<u4"),
        ("i_uid", "<u4"),
        ("i_gid", "<u4"),
        ("i_mtime", "<i8"),
        ("i_mtime_nsec", "<u4"),
        ("i_nlink", "<u4"),
        ("i_reserved2", "V16"),
    ]
)
INODE_EXTENDED: Final = _struct(INODE_EXTENDED_DTYPE, 64)

# struct erofs_xattr_ibody_header; followed by h_shared_count 32-bit ids, then entries
XATTR_IBODY_HEADER_DTYPE: Final = np.dtype(
    [
        ("h_name_filter", "<u4"),  # bit set: no attribute whose name hashes to it
        ("h_shared_count", "u1"),
        ("h_reserved2", "V7"),
    ]
)
XATTR_IBODY_HEADER: Final = _struct(XATTR_IBODY_HEADER_DTYPE, 12)

# struct erofs_xattr_entry; followed by the name without its prefix, then the value; padded to 4 bytes
XATTR_ENTRY_DTYPE: Final = np.dtype([("e_name_len", "u1"), ("e_name_index", "u1"), ("e_value_size", "<u2")])
XATTR_ENTRY: Final = _struct(XATTR_ENTRY_DTYPE, 4)

# a 16-bit length, then struct erofs_xattr_long_prefix; followed by the infix, which the length counts with base_index
XATTR_LONG_PREFIX_DTYPE: Final = np.dtype([("size", "<u2"), ("base_index", "u1")])
XATTR_LONG_PREFIX_HEAD: Final = _struct(XATTR_LONG_PREFIX_DTYPE, 3)

# struct erofs_inode_chunk_index
CHUNK_INDEX_DTYPE: Final = np.dtype([("startblk_hi", "<u2"), ("device_id", "<u2"), ("startblk_lo", "<u4")])
CHUNK_INDEX: Final = _struct(CHUNK_INDEX_DTYPE, 8)

# struct erofs_dirent
DIRENT_DTYPE: Final = np.dtype([("nid", "<u8"), ("nameoff", "<u2"), ("file_type", "u1"), ("reserved", "u1")])
DIRENT: Final = _struct(DIRENT_DTYPE, 12)


def encode_dev(major: int, minor: int) -> int:
    """A device number as i_u holds it (new_encode_dev of include/linux/kdev_t.h): 12 bits major, 20 bits minor."""
    return (minor & 0xFF) | (major << 8) | ((minor & ~0xFF) << 12)


def decode_dev(rdev: int) -> tuple[int, int]:
    """``(major, minor)`` of what :func:`encode_dev` made."""
    return (rdev >> 8) & 0xFFF, (rdev & 0xFF) | ((rdev >> 12) & 0xFFF00)


def align(offset: int, unit: int) -> int:
    """``offset`` rounded up to a multiple of ``unit``, a power of two."""
    return (offset + unit - 1) & -unit


def checksum(block: bytes | bytearray | memoryview) -> int:
    """The superblock's checksum. ``block`` goes from the superblock to the end of its block, the field being zero.

    The kernel's crc32c() neither starts from zero nor inverts at the end: this is the complement of the usual CRC.
    """
    return crc32c(block) ^ 0xFFFFFFFF
