"""Imports out of compiled Python modules, of CPython 3.8 to 3.14.

::

    magic u16 │ "\\r\\n" │ flags u32 │ mtime u32, size u32 (or the source's hash, with flag 1) │ marshal: a code object

A start reads these bytes anyway, and the compiler has told module level, class bodies and function bodies apart. The
marshal module itself must not see foreign bytes; here they are walked over, most of them skipped: 30 MB in 1,133
modules take 0.3 s, where ``ast.parse`` takes 5 s for their sources.

The layout is that of CPython's Python/marshal.c; opcodes are those of Lib/opcode.py and Lib/_opcode_metadata.py.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

from erofsgen.errors import FormatError
from erofsgen.profile.guess.request import Code, Request


class _Dialect(NamedTuple):
    """A version's byte code. ``fields``: signed words before a code object's first object; ``flags``: which of them is
    co_flags; ``objects``: objects before the word co_firstlineno; ``jump``: what POP_JUMP_IF_FALSE counts, bytes or
    units from the beginning, or units forward from behind its caches; ``shift``: bits of LOAD_ATTR's argument below
    its name's number."""

    fields: int
    flags: int
    objects: int
    jump: str
    load_const: int
    load_name: int
    load_attr: int
    import_name: int
    extended: int
    jump_if_false: int
    compare: int
    shift: int = 0
    to_bool: int = 0
    jump_caches: int = 0
    small_int: int = -1


_OLD: Final = _Dialect(6, 5, 8, "byte", 100, 101, 106, 108, 144, 114, 107)
_DIALECTS: Final = {
    3413: _OLD,  # 3.8
    3425: _OLD,  # 3.9
    3439: _OLD._replace(jump="unit"),  # 3.10
    3495: _Dialect(5, 4, 8, "forward", 100, 101, 106, 108, 144, 114, 107),  # 3.11
    3531: _Dialect(5, 4, 8, "forward", 100, 101, 106, 108, 144, 114, 107, shift=1),  # 3.12
    3571: _Dialect(5, 4, 8, "forward", 83, 92, 82, 75, 71, 97, 58, shift=1, to_bool=40, jump_caches=1),  # 3.13
    3627: _Dialect(
        5, 4, 8, "forward", 82, 93, 80, 73, 69, 100, 56, shift=1, to_bool=39, jump_caches=1, small_int=94
    ),  # 3.14
}

HEADER: Final = 16
HASHED: Final = 1
CHECKED: Final = 2

_CO_OPTIMIZED: Final = 1
_NESTED: Final = 16
"""Class bodies in class bodies that are followed."""
_TEXT_MAX: Final = 1024
"""Bytes of a string that can be a module's name or a path."""
_DEAD_MAX: Final = 64

# how many bytes the objects take that have no length of their own, by type
_SIZES: Final = [0] * 128
for _types, _size in (("0NFTS.", 1), ("ir", 5), ("Ig", 9), ("y", 17)):
    for _type in _types:
        _SIZES[ord(_type)] = _size
_SHORT: Final = frozenset(b"zZ")
_LONG: Final = frozenset(b"stuaA")
_TEXT: Final = frozenset(b"zZtuaA")
_COLLECTIONS: Final = frozenset(b"([<>")
_SMALL_TUPLE, _TUPLE, _CODE, _BIG, _SLICE, _REFERENCE = b")(cl:r"


def is_valid(data: bytes, mtime: int, size: int) -> bool:
    """Whether Python takes these bytes for what the source says, which was changed at ``mtime`` (seconds) and has
    ``size`` bytes. What is checked by the source's hash counts as valid."""
    if len(data) < HEADER:
        return False
    flags, at, length = struct.unpack_from("<III", data, 4)
    return bool(flags & HASHED) or (not flags and at == mtime & 0xFFFFFFFF and length == size & 0xFFFFFFFF)


def is_checked(data: bytes) -> bool:
    """Whether Python reads the source for its hash although the byte code is valid."""
    return len(data) >= HEADER and data[4] & (HASHED | CHECKED) == HASHED | CHECKED


def imports(data: bytes, *, everything: bool = False) -> Code | None:
    """What a compiled module imports, None for versions that are not known.

    ``everything``: also what its functions import and the block for ``__main__``, and all of its strings.
    Raises FormatError.
    """
    dialect = _DIALECTS.get(int.from_bytes(data[:2], "little"))
    if dialect is None or data[2:4] != b"\r\n":
        return None
    try:
        return _Walk(data, dialect, everything=everything).module()
    except (IndexError, ValueError, struct.error) as error:
        raise FormatError(f"not compiled Python: {error}") from None


class _Walk:
    def __init__(self, data: bytes, dialect: _Dialect, *, everything: bool) -> None:
        self._data = data
        self._dialect = dialect
        self._everything = everything
        self._flagged: list[int] = []
        """Where the objects lie that others refer to, by number."""
        self._texts: list[int] = []
        self._requests: list[Request] = []
        self._tuples: dict[int, tuple[str, ...]] = {}
        self._tests = b"TYPE_CHECKING" in data or (b"__main__" in data and not everything)
        """Whether there may be conditions that no import meets."""

    def module(self) -> Code:
        if self._data[HEADER] & 127 != _CODE:
            raise ValueError("no code object")
        self._code(HEADER, 0)
        texts = [text for text in map(self._text, self._texts) if text is not None] if self._everything else []
        return Code(self._requests, texts)

    def _code(self, at: int, depth: int) -> int:
        """Walk over a code object whose imports count; returns its end."""
        dialect = self._dialect
        if self._data[at] > 127:
            self._flagged.append(at)
        at += 1 + 4 * dialect.fields
        code, at = self._bytes(at)
        inner: dict[int, list[Request]] = {}
        constants, at = self._elements(at, inner, depth)
        names, at = self._elements(at)
        at = self._skip(at, dialect.objects - 3) + 4
        at = self._skip(at, 1 if dialect.fields == 6 else 2)
        self._decode(code, constants, names, inner)
        return at

    def _bytes(self, at: int) -> tuple[bytes, int]:
        kind = self._data[at]
        if kind & 127 == _REFERENCE:
            return self._bytes(self._referred(at))[0], at + 5
        if kind & 127 != 115:  # "s"
            raise ValueError("code that is no bytes")
        if kind > 127:
            self._flagged.append(at)
        end = at + 5 + self._word(at + 1)
        return self._data[at + 5 : end], end

    def _elements(
        self, at: int, inner: dict[int, list[Request]] | None = None, depth: int = 0
    ) -> tuple[list[int], int]:
        """(where a tuple's elements are, where it ends); what bodies among them import goes to ``inner``."""
        kind = self._data[at]
        if kind & 127 == _REFERENCE:
            return self._known_elements(self._referred(at)), at + 5
        if kind > 127:
            self._flagged.append(at)
        count, at = self._count(at)
        found: list[int] = []
        for number in range(count):
            found.append(at)
            if inner is not None and self._data[at] & 127 == _CODE and self._counts(at, depth):
                outer, self._requests = self._requests, []
                at = self._code(at, depth + 1)
                inner[number], self._requests = self._requests, outer
            else:
                at = self._skip(at, 1)
        return found, at

    def _count(self, at: int) -> tuple[int, int]:
        """(number of elements of the tuple at ``at``, where the first is)."""
        kind = self._data[at] & 127
        if kind == _SMALL_TUPLE:
            return self._data[at + 1], at + 2
        if kind != _TUPLE:
            raise ValueError("no tuple where one is due")
        return self._word(at + 1), at + 5

    def _counts(self, at: int, depth: int) -> bool:
        """Whether the imports of the code object at ``at`` do."""
        flags = self._data[at + 1 + 4 * self._dialect.flags]
        return depth < _NESTED and (self._everything or not flags & _CO_OPTIMIZED)

    def _known_elements(self, at: int) -> list[int]:
        """Where the elements are of a tuple that was walked over; only those before the first that is a collection."""
        count, at = self._count(at)
        found: list[int] = []
        for _ in range(count):
            kind = self._data[at] & 127
            found.append(at)
            if _SIZES[kind]:
                at += _SIZES[kind]
            elif kind in _SHORT:
                at += 2 + self._data[at + 1]
            elif kind in _LONG:
                at += 5 + self._word(at + 1)
            else:
                break
        return found

    def _word(self, at: int) -> int:
        return int.from_bytes(self._data[at : at + 4], "little", signed=True)

    def _skip(self, at: int, count: int) -> int:
        """Walk over ``count`` objects with what they hold; returns the end of the last."""
        if count <= 0:
            return at
        data, sizes, from_bytes = self._data, _SIZES, int.from_bytes
        flag, text = self._flagged.append, self._texts.append
        head = 1 + 4 * self._dialect.fields
        before, behind = self._dialect.objects, 1 if self._dialect.fields == 6 else 2
        left = count
        stack: list[int] = []  # code objects that are open: what is left behind them, and -1 or -2 for their part
        while True:
            kind = data[at]
            if kind > 127:
                flag(at)
                kind &= 127
            size = sizes[kind]
            if size:
                at += size
            elif kind in _SHORT:
                text(at)
                at += 2 + data[at + 1]
            elif kind in _LONG:
                text(at)
                at += 5 + from_bytes(data[at + 1 : at + 5], "little")
            elif kind == _SMALL_TUPLE:
                left += data[at + 1]
                at += 2
            elif kind == _CODE:
                stack += (left - 1, -1)
                at += head
                left = before
                continue
            elif kind in _COLLECTIONS:
                left += from_bytes(data[at + 1 : at + 5], "little")
                at += 5
            elif kind == _BIG:
                at += 5 + 2 * abs(from_bytes(data[at + 1 : at + 5], "little", signed=True))
            elif kind == _SLICE:
                left += 3
                at += 1
            else:
                raise ValueError(f"an object of type {kind}")
            left -= 1
            while not left:
                if not stack:
                    return at
                left = stack.pop()
                if left == -1:
                    at += 4
                    left = behind
                    stack.append(-2)
                elif left == -2:
                    left = stack.pop()

    def _referred(self, at: int) -> int:
        """Where the object is that the reference at ``at`` means; never another reference."""
        target = self._flagged[self._word(at + 1)]
        if self._data[target] & 127 == _REFERENCE:
            raise ValueError("a reference to a reference")
        return target

    def _text(self, at: int) -> str | None:
        """The string at ``at``, None if it is none."""
        kind = self._data[at] & 127
        if kind == _REFERENCE:
            at = self._referred(at)
            kind = self._data[at] & 127
        if kind not in _TEXT:
            return None
        start, length = (at + 2, self._data[at + 1]) if kind in _SHORT else (at + 5, self._word(at + 1))
        return self._data[start : start + length].decode("utf-8", "replace") if 0 <= length <= _TEXT_MAX else None

    def _names(self, at: int) -> tuple[str, ...]:
        """The strings of the tuple at ``at``; none if it is none."""
        if self._data[at] & 127 == _REFERENCE:
            at = self._referred(at)
        if self._data[at] & 127 not in (_SMALL_TUPLE, _TUPLE):
            return ()
        names = self._tuples.get(at)
        if names is None:
            texts = map(self._text, self._known_elements(at))
            names = self._tuples[at] = tuple(text for text in texts if text is not None)
        return names

    # --- byte code

    def _decode(self, code: bytes, constants: list[int], names: list[int], inner: dict[int, list[Request]]) -> None:
        """Add what ``code`` imports; ``inner`` is what the bodies among its constants do, by their numbers."""
        operations, arguments = code[::2], code[1::2]
        dead = self._dead(operations, arguments, constants, names) if self._tests else []
        found: list[tuple[int, list[Request]]] = []
        at = -1
        while (at := operations.find(self._dialect.import_name, at + 1)) >= 0:
            request = self._request(operations, arguments, constants, names, at)
            if request is not None:
                found.append((at, [request]))
        if any(inner.values()):
            at = -1
            while (at := operations.find(self._dialect.load_const, at + 1)) >= 0:
                found.append((at, inner.pop(self._argument(operations, arguments, at)[0], [])))
        for at, requests in sorted(found, key=lambda item: item[0]):
            if not any(start <= at < end for start, end in dead):
                self._requests += requests

    def _argument(self, operations: bytes, arguments: bytes, at: int) -> tuple[int, int]:
        """(the instruction's argument, where its prefixes begin)."""
        value, shift = arguments[at], 8
        while at and shift < 32 and operations[at - 1] == self._dialect.extended:
            at -= 1
            value |= arguments[at] << shift
            shift += 8
        return value, at

    def _request(
        self, operations: bytes, arguments: bytes, constants: list[int], names: list[int], at: int
    ) -> Request | None:
        """What the IMPORT_NAME at ``at`` asks for: two loads before it give its level and its names."""
        dialect = self._dialect
        name, at = self._argument(operations, arguments, at)
        if at < 2 or operations[at - 1] != dialect.load_const:
            return None
        wanted, at = self._argument(operations, arguments, at - 1)
        if not at or name >= len(names) or wanted >= len(constants):
            return None
        level, before = 0, operations[at - 1]
        if before == dialect.small_int:
            level = arguments[at - 1]
        elif before == dialect.load_const:
            number = self._argument(operations, arguments, at - 1)[0]
            level = self._integer(constants[number]) if number < len(constants) else 0
        text = self._text(names[name])
        if text is None or not 0 <= level <= 255:
            return None
        return Request(level, text, self._names(constants[wanted]))

    def _integer(self, at: int) -> int:
        if self._data[at] & 127 == _REFERENCE:
            at = self._referred(at)
        return self._word(at + 1) if self._data[at] & 127 == 105 else 0  # "i"

    def _dead(
        self, operations: bytes, arguments: bytes, constants: list[int], names: list[int]
    ) -> list[tuple[int, int]]:
        """Instructions that no import runs: below ``if TYPE_CHECKING`` and ``if __name__ == "__main__"``."""
        dialect = self._dialect
        texts = [self._text(name) for name in names]
        dead: list[tuple[int, int]] = []
        for text, load, shift in (
            ("TYPE_CHECKING", dialect.load_name, 0),
            ("TYPE_CHECKING", dialect.load_attr, dialect.shift),
            ("__name__", dialect.load_name, 0),
        ):
            if text not in texts or (text == "__name__" and self._everything):
                continue
            number = texts.index(text)
            at = -1
            while (at := operations.find(load, at + 1)) >= 0 and len(dead) < _DEAD_MAX:
                if self._argument(operations, arguments, at)[0] >> shift == number:
                    end = self._failing(operations, arguments, constants, at + 1, against_main=text == "__name__")
                    dead += [(at, end)] if end else []
        return dead

    def _failing(
        self, operations: bytes, arguments: bytes, constants: list[int], at: int, *, against_main: bool
    ) -> int:
        """Where it goes on if the test fails whose name was loaded before ``at``; 0 if there is no such test."""
        dialect = self._dialect
        between = {0, dialect.to_bool, dialect.extended}  # 0 is a cache
        if against_main:
            if operations[at] != dialect.load_const or arguments[at] >= len(constants):
                return 0
            if self._text(constants[arguments[at]]) != "__main__":
                return 0
            at += 1
            between.add(dialect.compare)
        while operations[at] in between:
            at += 1
        if operations[at] != dialect.jump_if_false:
            return 0
        value = self._argument(operations, arguments, at)[0]
        match dialect.jump:
            case "byte":
                return value // 2
            case "unit":
                return value
            case _:
                return at + 1 + dialect.jump_caches + value
