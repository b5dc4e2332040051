"""PAX extended headers: ``length key=value\\n`` records (POSIX.1-2017, pax, "pax Interchange Format").

Values are bytes throughout: names need not be UTF-8, whatever ``hdrcharset`` says, and extended attributes are binary.
"""

from __future__ import annotations

import re
from typing import Final

from erofsgen.errors import FormatError
from erofsgen.oci.xattrs import Xattrs, collect

Records = dict[bytes, bytes]

XATTR: Final = b"SCHILY.xattr."
"""Prefix of the keys that carry extended attributes; star, GNU tar, libarchive and Go agree on it."""
SPARSE_MAP: Final = b"GNU.sparse.map"
SPARSE_OFFSET: Final = b"GNU.sparse.offset"
SPARSE_LENGTH: Final = b"GNU.sparse.numbytes"

_TIME = re.compile(rb"-?[0-9]{1,20}(?:\.[0-9]*)?")
_NUMBER = re.compile(rb"[0-9]{1,20}")


def parse(data: bytes) -> Records:
    """The records of one extended header; of equal keys the last counts.

    The repeated offset and length records of the GNU sparse format 0.0 are joined into one ``GNU.sparse.map``, as
    format 0.1 has it. Raises FormatError.
    """
    records: Records = {}
    sparse: list[bytes] = []
    start, end = 0, len(data)
    while start < end:
        space = data.find(b" ", start, start + 20)
        digits = data[start:space]
        if space < 0 or not digits.isdigit():
            raise FormatError("bad PAX header: a record has no length")
        stop = start + int(digits)
        if stop > end or stop <= space or data[stop - 1] != 10:
            raise FormatError("bad PAX header: a record's length is wrong")
        key, equals, value = data[space + 1 : stop - 1].partition(b"=")
        if not equals or not key or b"\0" in key:
            raise FormatError("bad PAX header: a record has no key")
        start = stop
        if key in (SPARSE_OFFSET, SPARSE_LENGTH):
            if (key == SPARSE_OFFSET) != (len(sparse) % 2 == 0) or b"," in value:
                raise FormatError("bad PAX header: sparse offsets and lengths do not alternate")
            sparse.append(value)
        else:
            records[key] = value
    if sparse:
        records[SPARSE_MAP] = b",".join(sparse)
    return records


def number(key: bytes, value: bytes) -> int:
    """A decimal record such as ``size``. Raises FormatError."""
    if not _NUMBER.fullmatch(value):
        raise FormatError(f"bad PAX header: {key.decode('ascii', 'backslashreplace')} is not a number")
    return int(value)


def nanoseconds(value: bytes) -> int:
    """A time record, ``[-]seconds[.fraction]``, exactly; digits below a nanosecond are dropped. Raises FormatError."""
    match = _TIME.fullmatch(value)
    if not match:
        raise FormatError("bad PAX header: a time is not a number")
    seconds, _, fraction = value.partition(b".")
    # every digit is a digit: the two parts are one number of nanoseconds once the fraction has nine
    return int(seconds + fraction[:9].ljust(9, b"0"))


def xattrs(records: Records) -> Xattrs:
    """The extended attributes among ``records``. Raises FormatError."""
    return collect([(key[len(XATTR) :], value) for key, value in records.items() if key.startswith(XATTR)])
