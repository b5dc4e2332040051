"""Attributes of all inodes of a tree as arrays, checked to be what the format can carry."""

from __future__ import annotations

import os
import stat
from collections import Counter
from itertools import compress
from typing import Final

import numpy as np
import numpy.typing as npt

from erofsgen.erofs.format import FILE_TYPES, SYMLINK_MAX, encode_dev
from erofsgen.erofs.treetable import TreeTable
from erofsgen.errors import ErofsgenError, FormatError, UnsupportedError

Integers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

SECOND: Final = 1_000_000_000

_ID_MAX: Final = 0xFFFFFFFF
_MAJOR_MAX: Final = 0xFFF
_MINOR_MAX: Final = 0xFFFFF
_COMPACT_MAX: Final = 0xFFFF
_COMPACT_SIZE_MAX: Final = 0xFFFFFFFF


class Columns:
    """The arrays, by inode number.

    ``mtime`` and ``mtime_nsec`` are the two halves of an inode's mtime; ``epoch`` is the one, in nanoseconds, that
    most inodes share that could be compact, and ``compact`` says which are. ``size`` is right for directories and
    symlinks, too. ``rdev`` is encoded, by inode number, for devices only. ``contents`` holds the bytes of symlinks and
    of regular files that come with their bytes, ``mapped`` the numbers of regular files that have chunks.

    Raises FormatError (contradictory inodes), UnsupportedError (values beyond the format's fields).
    """

    def __init__(self, tree: TreeTable) -> None:
        self._tree = tree
        inodes = tree.inodes
        count = len(inodes)
        mtimes = [inode.mtime for inode in inodes]
        try:
            self.mode = np.fromiter([inode.mode for inode in inodes], np.int64, count)
            self.uid = np.fromiter([inode.uid for inode in inodes], np.int64, count)
            self.gid = np.fromiter([inode.gid for inode in inodes], np.int64, count)
            self.size = np.fromiter([inode.size for inode in inodes], np.int64, count)
            self.mtime = np.fromiter([mtime // SECOND for mtime in mtimes], np.int64, count)
        except OverflowError:
            raise self._overflow() from None
        self.mtime_nsec = np.fromiter([mtime % SECOND for mtime in mtimes], np.int64, count)
        self.nlink = np.array(tree.nlink, np.int64)
        types = np.zeros(16, np.int64)
        types[[mode >> 12 for mode in FILE_TYPES]] = list(FILE_TYPES.values())
        self._require((self.mode >= 0) & (self.mode <= 0xFFFF), "mode", self.mode, FormatError)
        self.file_type = types[self.mode >> 12]
        self._require(self.file_type > 0, "mode", self.mode, FormatError)
        self._require((self.uid >= 0) & (self.uid <= _ID_MAX), "uid", self.uid, UnsupportedError)
        self._require((self.gid >= 0) & (self.gid <= _ID_MAX), "gid", self.gid, UnsupportedError)
        self._read_data()
        self._require(self.size >= 0, "size", self.size, FormatError)

        small = (
            (self.uid <= _COMPACT_MAX)
            & (self.gid <= _COMPACT_MAX)
            & (self.nlink <= _COMPACT_MAX)
            & (self.size <= _COMPACT_SIZE_MAX)
        )
        often = Counter(mtimes if small.all() else compress(mtimes, small.tolist()))
        most = max(often.values(), default=0)
        self.epoch = min((mtime for mtime, inodes in often.items() if inodes == most), default=0)
        seconds, nanoseconds = divmod(self.epoch, SECOND)
        self.compact: Flags = small & (self.mtime == seconds) & (self.mtime_nsec == nanoseconds)

    def _read_data(self) -> None:
        """Sort out where each inode's data is."""
        inodes = self._tree.inodes
        kinds = self.mode & ~0o7777
        self.contents: dict[int, bytes] = {}
        self.mapped: list[int] = []
        self.rdev: dict[int, int] = {}
        for number in np.flatnonzero(kinds == stat.S_IFREG).tolist():
            inode = inodes[number]
            if inode.chunks:
                self.mapped.append(number)
                if inode.data:
                    raise FormatError(f"{self._tree.path(inode)}: both chunks and inlined bytes")
            elif len(inode.data) != inode.size:
                raise FormatError(f"{self._tree.path(inode)}: {len(inode.data)} of {inode.size} bytes are there")
            elif inode.size:
                self.contents[number] = inode.data
        self.size[kinds != stat.S_IFREG] = 0
        self.size[self._tree.directories] = self._tree.directory_sizes()
        for number in np.flatnonzero(kinds == stat.S_IFLNK).tolist():
            target = inodes[number].data
            if not 0 < len(target) <= SYMLINK_MAX or b"\0" in target:
                raise FormatError(
                    f"{self._tree.path(inodes[number])}: a symbolic link to {len(target)} bytes, 1 to {SYMLINK_MAX} "
                    "without NUL are possible"
                )
            self.contents[number] = target
            self.size[number] = len(target)
        for number in np.flatnonzero((kinds == stat.S_IFCHR) | (kinds == stat.S_IFBLK)).tolist():
            rdev = inodes[number].rdev
            major, minor = os.major(rdev), os.minor(rdev)
            if rdev < 0 or major > _MAJOR_MAX or minor > _MINOR_MAX:
                raise UnsupportedError(f"{self._tree.path(inodes[number])}: EROFS has no device {major}:{minor}")
            self.rdev[number] = encode_dev(major, minor)

    def _require(self, good: Flags, what: str, values: Integers, error: type[ErofsgenError]) -> None:
        if not good.all():
            number = int(np.argmin(good))
            raise error(f"{self._tree.path(self._tree.inodes[number])}: EROFS has no {what} {int(values[number])}")

    def _overflow(self) -> ErofsgenError:
        for inode in self._tree.inodes:
            values = {"mode": inode.mode, "uid": inode.uid, "gid": inode.gid, "size": inode.size}
            for what, value in (*values.items(), ("mtime in seconds", inode.mtime // SECOND)):
                if not -(1 << 63) <= value < 1 << 63:
                    return UnsupportedError(f"{self._tree.path(inode)}: EROFS has no {what} {value}")
        raise AssertionError("no column overflows")
