"""Extended attributes: names as prefix index and rest, entries, the shared area, the name filter.

An inode's attributes follow it as an *ibody*: header, ids of shared entries, entries of its own. A shared entry
stands once in the shared area, and its id is its offset there in 4-byte units.

::

    inode │ header 12 B │ id id … │ entry │ entry │ …        entry: name_len, index, value_size │ name │ value │ pad
                          └──► shared area: entry │ entry │ …

POSIX ACLs are stored as the kernel's xattr interface has them (struct posix_acl_xattr_header), under an index of
their own and with an empty name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

import xxhash

from erofsgen.erofs.format import (
    XATTR_ENTRY,
    XATTR_FILTER_BITS,
    XATTR_FILTER_DEFAULT,
    XATTR_FILTER_SEED,
    XATTR_IBODY_HEADER,
    XATTR_LONG_PREFIX,
    XATTR_LONG_PREFIX_HEAD,
    XATTR_NAME_MAX,
    XATTR_VALUE_MAX,
    align,
)
from erofsgen.errors import FormatError, UnsupportedError

Xattrs = Sequence[tuple[bytes, bytes]]
"""Full names and values."""

USER: Final = 1
POSIX_ACL_ACCESS: Final = 2
POSIX_ACL_DEFAULT: Final = 3
TRUSTED: Final = 4
SECURITY: Final = 6

PREFIXES: Final = {
    USER: b"user.",
    POSIX_ACL_ACCESS: b"system.posix_acl_access",
    POSIX_ACL_DEFAULT: b"system.posix_acl_default",
    TRUSTED: b"trusted.",
    SECURITY: b"security.",
}
"""e_name_index to the prefix it stands for. An ACL's is its whole name."""

_ACLS: Final = {PREFIXES[POSIX_ACL_ACCESS]: POSIX_ACL_ACCESS, PREFIXES[POSIX_ACL_DEFAULT]: POSIX_ACL_DEFAULT}

FINGERPRINT: Final = b"trusted.erofs.fingerprint.v1"
"""The attribute that tells Linux 7.0 and later, mounting with ``inode_share``, which files have equal content."""

_ICOUNT_MAX: Final = 0xFFFF
_SHARED_MAX: Final = 0xFF
"""Shared ids per inode: h_shared_count has 8 bits."""


class LongPrefix(NamedTuple):
    """An entry of the long prefix table: a built-in prefix and what follows it."""

    base_index: int
    infix: bytes


FINGERPRINT_PREFIX: Final = LongPrefix(TRUSTED, FINGERPRINT.removeprefix(PREFIXES[TRUSTED]))
"""The whole name as a prefix, so that the entries' own names are empty."""


def split_name(name: bytes) -> tuple[int, bytes] | None:
    """``(index, rest)`` of a full name, None where EROFS cannot store it."""
    if name in _ACLS:
        return _ACLS[name], b""
    namespace, dot, rest = name.partition(b".")
    index = _NAMESPACES.get(namespace + dot)
    if index is None or not rest or b"\0" in rest or len(name) > XATTR_NAME_MAX:
        return None
    return index, rest


_NAMESPACES: Final = {prefix: index for index, prefix in PREFIXES.items() if prefix.endswith(b".")}


def join_name(index: int, rest: bytes, prefixes: Sequence[LongPrefix]) -> bytes | None:
    """The full name of an entry, None for an index that no kernel knows (it hides such entries)."""
    if index & XATTR_LONG_PREFIX:
        number = index & ~XATTR_LONG_PREFIX
        if number >= len(prefixes):
            return None
        index, rest = prefixes[number].base_index, prefixes[number].infix + rest
    prefix = PREFIXES.get(index)
    return None if prefix is None else prefix + rest


def filter_bit(index: int, rest: bytes) -> int:
    """The bit of h_name_filter that a name clears. ``index`` is a built-in one, ``rest`` includes any infix."""
    return 1 << (xxhash.xxh32_intdigest(rest, XATTR_FILTER_SEED + index) % XATTR_FILTER_BITS)


def entry_size(name_len: int, value_size: int) -> int:
    """Bytes of an entry, padding included."""
    return align(XATTR_ENTRY.size + name_len + value_size, 4)


def ibody_size(icount: int) -> int:
    """Bytes between an inode and what follows its attributes, from i_xattr_icount."""
    return XATTR_IBODY_HEADER.size + 4 * (icount - 1) if icount else 0


def ibody_icount(size: int) -> int:
    """i_xattr_icount for an ibody of ``size`` bytes."""
    return (size - XATTR_IBODY_HEADER.size) // 4 + 1 if size else 0


def long_prefix_table(prefixes: Iterable[LongPrefix]) -> bytes:
    """The long prefix table as it stands in an image."""
    table = b""
    for prefix in prefixes:
        item = XATTR_LONG_PREFIX_HEAD.pack(1 + len(prefix.infix), prefix.base_index) + prefix.infix
        table += item + bytes(-len(item) % 4)
    return table


class XattrPlan:
    """Every distinct set of attributes of an image, encoded: ``area`` is the shared area's bytes.

    ``sets`` maps each distinct set to the number of inodes that have it. An attribute goes to the shared area when
    that makes the image smaller. ``area_start`` is the area's offset in the address space that ids count in.

    Raises FormatError (an attribute twice), UnsupportedError (a name or size that EROFS cannot store).
    """

    def __init__(self, sets: Counter[Xattrs], *, area_start: int, prefixes: Sequence[LongPrefix]) -> None:
        self._prefixes = {
            (prefix.base_index, prefix.infix): number | XATTR_LONG_PREFIX for number, prefix in enumerate(prefixes)
        }
        uses: Counter[tuple[bytes, bytes]] = Counter()
        for xattrs, inodes in sets.items():
            for pair in xattrs:
                uses[pair] += inodes
        self._ids: dict[tuple[bytes, bytes], int] = {}
        area = bytearray()
        for pair in sorted(pair for pair, inodes in uses.items() if inodes > 1):
            entry = self._entry(*pair)
            if len(entry) + 4 * uses[pair] < len(entry) * uses[pair]:
                self._ids[pair] = (area_start + len(area)) // 4
                area += entry
        self.area = bytes(area)
        self._ibodies = {xattrs: self._encode(xattrs) for xattrs in sets}

    def ibody(self, xattrs: Xattrs) -> bytes:
        """What stands behind an inode with these attributes."""
        return self._ibodies[xattrs]

    def _entry(self, name: bytes, value: bytes) -> bytes:
        index, rest = _storable(name)
        if len(value) > XATTR_VALUE_MAX:
            raise UnsupportedError(f"xattr {name!r} has {len(value)} bytes, EROFS stores at most {XATTR_VALUE_MAX}")
        long = self._prefixes.get((index, rest))
        if long is not None:
            index, rest = long, b""
        entry = XATTR_ENTRY.pack(len(rest), index, len(value)) + rest + value
        return entry + bytes(-len(entry) % 4)

    def _encode(self, xattrs: Xattrs) -> bytes:
        if not xattrs:
            return b""
        absent = XATTR_FILTER_DEFAULT
        ids: list[int] = []
        entries: list[bytes] = []
        names = set()
        for name, value in sorted(xattrs):
            if name in names:
                raise FormatError(f"xattr {name!r} is there twice")
            names.add(name)
            absent &= ~filter_bit(*_storable(name))
            shared = self._ids.get((name, value))
            if shared is not None and len(ids) < _SHARED_MAX:
                ids.append(shared)
            else:
                entries.append(self._entry(name, value))
        ibody = b"".join(
            [
                XATTR_IBODY_HEADER.pack(absent, len(ids), bytes(7)),
                *(number.to_bytes(4, "little") for number in ids),
                *entries,
            ]
        )
        if ibody_icount(len(ibody)) > _ICOUNT_MAX:
            raise UnsupportedError(f"xattrs of one file take {len(ibody)} bytes, EROFS stores 262,152 at most")
        return ibody


def _storable(name: bytes) -> tuple[int, bytes]:
    split = split_name(name)
    if split is None:
        raise UnsupportedError(f"EROFS cannot store an xattr named {name!r}")
    return split
