"""The code of large libraries that runs while they are loaded: constructors, and what those call or refer to.

Of the 434 MB of libtorch_cpu.so, 114 lie in MBs that ``import torch`` touches. Tables and data are 22 of them; the code
is that of constructors, which register operators, and of the functions they name. The constructors' addresses stand in
the relocations of .init_array, and their calls can be read off their code.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from erofsgen.profile.guess.elf import DT_INIT_ARRAY, DT_INIT_ARRAYSZ, PF_X, PT_LOAD, Elf, Segment, Span

X86_64: Final = 62
AARCH64: Final = 183

ADDRESSES_MAX: Final = 100_000

Addresses = npt.NDArray[np.int64]


def constructors(elf: Elf, relocations: bytes) -> Addresses:
    """The addresses of constructors, sorted, as relocations with addends say (DT_RELA's table); none where they do not.

    Other files have them in .init_array itself: :func:`pointers`.
    """
    start, size = elf.tags.get(DT_INIT_ARRAY, 0), elf.tags.get(DT_INIT_ARRAYSZ, 0)
    word = "i8" if elf.wide else "i4"
    kind = np.dtype([(name, elf.order + word) for name in ("offset", "info", "addend")])
    table = np.frombuffer(relocations[: len(relocations) // kind.itemsize * kind.itemsize], kind)
    place = table["offset"].astype(np.int64)
    return _code(elf, table["addend"][(place >= start) & (place < start + size)])


def pointers(elf: Elf, data: bytes) -> Addresses:
    """The addresses of code that words of ``data`` are, sorted."""
    kind = np.dtype(elf.order + ("i8" if elf.wide else "i4"))
    return _code(elf, np.frombuffer(data[: len(data) // kind.itemsize * kind.itemsize], kind))


def called(elf: Elf, code: bytes, address: int) -> Addresses:
    """The addresses, sorted, of functions that machine code at ``address`` calls, or whose address it takes. What is
    not at a multiple of 16, as compilers lay functions, is none. Empty for other processors than x86-64 and AArch64."""
    data = np.frombuffer(code, np.uint8)
    if elf.machine == X86_64 and len(data) > 8:
        found = _called_x86(data, address)
    elif elf.machine == AARCH64 and elf.order == "<":
        words = np.frombuffer(code[: len(code) // 4 * 4], "<u4").astype(np.int64)
        calls = np.flatnonzero(words >> 26 == 0b100101)  # bl: a signed 26-bit count of words
        distance = ((words[calls] & 0x3FFFFFF) ^ 0x2000000) - 0x2000000
        found = address + 4 * (calls + distance)
    else:
        found = np.zeros(0, np.int64)
    return _code(elf, found[found % 16 == 0])


def _called_x86(data: npt.NDArray[np.uint8], address: int) -> Addresses:
    last = len(data) - 7
    words = np.zeros(len(data) - 3, np.uint32)
    for place in range(4):
        words |= data[place : len(data) - 3 + place].astype(np.uint32) << np.uint32(8 * place)
    relative = words.view(np.int32).astype(np.int64)
    calls = np.flatnonzero(data[:last] == 0xE8)
    # lea with a 64-bit register, relative to the instruction pointer
    taken = (data[:last] & 0xFB == 0x48) & (data[1 : last + 1] == 0x8D) & (data[2 : last + 2] & 0xC7 == 0x05)
    takes = np.flatnonzero(taken)
    return np.concatenate((address + calls + 5 + relative[calls + 1], address + takes + 7 + relative[takes + 3]))


def _code(elf: Elf, addresses: npt.ArrayLike) -> Addresses:
    """Those that lie in code, sorted, each once."""
    found = np.unique(np.asarray(addresses, np.int64))
    inside = np.zeros(len(found), bool)
    for segment in executable(elf):
        inside |= (found >= segment.address) & (found < segment.address + segment.length)
    return found[inside][:ADDRESSES_MAX]


def code_at(elf: Elf, addresses: Addresses, reach: int = 16 << 10) -> list[Span]:
    """The pages of the file that hold functions at these sorted addresses, each as far as the next but at most
    ``reach`` bytes; in order, those that touch joined."""
    ends = np.minimum(addresses + reach, np.append(addresses[1:], np.iinfo(np.int64).max))
    spans: list[Span] = []
    for segment in executable(elf):
        inside = (addresses >= segment.address) & (addresses < segment.address + segment.length)
        shift = segment.offset - segment.address
        starts, stops = (addresses[inside] + shift) & -4096, (ends[inside] + shift + 4095) & -4096
        if len(starts):
            breaks = np.flatnonzero(starts[1:] > np.maximum.accumulate(stops)[:-1]) + 1
            first, last = np.append(0, breaks), np.append(breaks, len(starts)) - 1
            pairs = zip(starts[first].tolist(), np.maximum.accumulate(stops)[last].tolist(), strict=True)
            spans += [Span(start, stop - start) for start, stop in pairs]
    return sorted(spans)


def executable(elf: Elf) -> list[Segment]:
    """The segments that hold code."""
    return [segment for segment in elf.segments if segment.kind == PT_LOAD and segment.flags & PF_X]
