"""ELF files and the loader's search: what readelf(1) and the loader itself say of this machine's, and damaged ones."""

from __future__ import annotations

import contextlib
import os
import random
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from guesskit import World
from hypothesis import given
from hypothesis import strategies as st

from erofsgen.errors import FormatError
from erofsgen.profile.guess import elf
from erofsgen.profile.guess.constructors import called, code_at, constructors, pointers
from erofsgen.profile.guess.elf import Span
from erofsgen.profile.guess.libraries import parse_cache
from erofsgen.profile.guess.loading import covers, merged, touched

PROGRAM = os.path.realpath(sys.executable)


def loaded(program: str) -> list[str]:
    """The libraries that the loader says it would load, by the names of their files."""
    said = subprocess.run(["ldd", program], check=True, capture_output=True, text=True).stdout
    return re.findall(r"=> (/\S+)", said) + re.findall(r"^\s+(/\S+) \(", said, re.MULTILINE)


def host_world(*programs: str, **more: bytes | str) -> World:
    """An image with programs of this machine and what they load, links included, and the loader's cache."""
    files: dict[str, bytes | str] = dict(more)
    waiting = ["/etc/ld.so.cache", *programs, *(path for program in programs for path in loaded(program))]
    while waiting:
        path = waiting.pop()
        above = os.path.dirname(path)
        if os.path.realpath(above) != above:  # /lib is a link
            link = next(each for each in (above, *map(str, Path(above).parents)) if os.path.islink(each))
            files[link[1:]] = os.readlink(link)
            waiting.append(os.path.join(os.path.realpath(above), os.path.basename(path)))
        elif os.path.islink(path):
            files[path[1:]] = os.readlink(path)
            waiting.append(os.path.join(above, os.readlink(path)))
        else:
            files[path[1:]] = Path(path).read_bytes()
    return World(files)


def test_what_the_loader_loads() -> None:
    world = host_world(PROGRAM)
    guesses = world.guess(PROGRAM, "-S", "-c", "pass", LD_LIBRARY_PATH=os.environ.get("LD_LIBRARY_PATH", ""))
    expected = {os.path.realpath(path)[1:] for path in loaded(PROGRAM)}
    found = [each.path.decode() for each in guesses]
    assert expected <= set(found)
    assert found[0] == PROGRAM[1:]
    assert "ld-" in found[1]
    assert found[2] == "etc/ld.so.cache"
    assert {each.reason for each in guesses} == {"program", "loader", "libraries"}


def test_whole_files_unless_they_are_large() -> None:
    world = host_world(PROGRAM)
    sizes = {each.path: 0 for each in world.guess(PROGRAM)}
    for each in world.guess(PROGRAM):
        sizes[each.path] += each.length
    for path, taken in sizes.items():
        size = world.index.lookup(path).size
        assert taken == size if size <= 4 << 20 else taken <= size


def test_tables_are_where_readelf_sees_them() -> None:
    path = loaded(PROGRAM)[0]
    data = Path(path).read_bytes()
    parsed = elf.parse(data)
    dynamic = parsed.first(elf.PT_DYNAMIC)
    assert dynamic is not None
    parsed.read_dynamic(data[dynamic.offset : dynamic.offset + dynamic.length])
    strings = parsed.table(elf.DT_STRTAB, elf.DT_STRSZ)
    assert strings is not None
    needed = [elf.text_at(data, strings.offset + place).decode() for place in parsed.names.get(elf.DT_NEEDED, [])]
    said = subprocess.run(["readelf", "-dW", path], check=True, capture_output=True, text=True).stdout
    assert needed == re.findall(r"NEEDED.*\[(.*)\]", said)
    sections = subprocess.run(["readelf", "-SW", path], check=True, capture_output=True, text=True).stdout
    spans = parsed.tables()
    for name in (".dynsym", ".dynstr", ".rela.dyn", ".gnu.hash", ".gnu.version"):
        found = re.search(rf"{re.escape(name)}\s+\S+\s+\w+ (\w+) (\w+)", sections)
        if found:
            start, size = int(found[1], 16), int(found[2], 16)
            assert covers(merged(spans, len(data)), Span(start, size), len(data)), name


def search_world(tmp_path: Path, **flags: str) -> World:
    """A program that needs liba.so, which needs libb.so; libb.so is in several places."""
    (tmp_path / "b.c").write_text("int b(void) { return 1; }")
    (tmp_path / "a.c").write_text("int b(void); int a(void) { return b(); }")
    (tmp_path / "p.c").write_text("int a(void); int main(void) { return a(); }")
    tags = "-Wl,--disable-new-dtags" if flags.pop("old", "") else "-Wl,--enable-new-dtags"
    run = ["cc", tags, "-nostdlib", "-nostartfiles", "-Wl,--unresolved-symbols=ignore-all"]
    library = [*run, "-shared", "-fPIC"]
    subprocess.run([*library, "b.c", "-o", "libb.so", "-Wl,-soname,libb.so"], cwd=tmp_path, check=True)
    rpath = [f"-Wl,-rpath,{flags['library']}"] if "library" in flags else []
    subprocess.run(
        [*library, "a.c", "-o", "liba.so", "-Wl,-soname,liba.so", "-L.", "-lb", *rpath], cwd=tmp_path, check=True
    )
    rpath = [f"-Wl,-rpath,{flags['program']}"] if "program" in flags else []
    command = [*run, "p.c", "-o", "p", "-L.", "-la", "-Wl,-rpath-link,.", "-Wl,-e,main", *rpath]
    subprocess.run(command, cwd=tmp_path, check=True)
    a, b, p = ((tmp_path / name).read_bytes() for name in ("liba.so", "libb.so", "p"))
    return World({
        "opt/p": p, "opt/lib/liba.so": a, "opt/own/libb.so": b, "opt/lib/libb.so": b, "usr/lib/libb.so": b,
        "usr/lib/liba.so": a, "env/libb.so": b,
    })  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "environment", "expected"),
    [
        ({}, {}, ["usr/lib/liba.so", "usr/lib/libb.so"]),
        ({"program": "$ORIGIN/lib"}, {}, ["opt/lib/liba.so", "usr/lib/libb.so"]),
        ({"program": "$ORIGIN/lib", "library": "${ORIGIN}/../own"}, {}, ["opt/lib/liba.so", "opt/own/libb.so"]),
        ({"program": "/opt/lib", "old": "yes"}, {}, ["opt/lib/liba.so", "opt/lib/libb.so"]),
        ({"program": "/opt/lib"}, {"LD_LIBRARY_PATH": "/env"}, ["opt/lib/liba.so", "env/libb.so"]),
        ({"program": "/opt/lib", "old": "yes"}, {"LD_LIBRARY_PATH": "/env"}, ["opt/lib/liba.so", "opt/lib/libb.so"]),
        ({"program": "$ORIGIN/../../../../opt/lib"}, {}, ["opt/lib/liba.so", "usr/lib/libb.so"]),
    ],
)
def test_the_order_of_the_search(tmp_path: Path, flags, environment, expected) -> None:
    world = search_world(tmp_path, **flags)
    assert world.paths("/opt/p", **environment)[1:] == expected


def test_the_cache_of_this_machine() -> None:
    found = parse_cache(Path("/etc/ld.so.cache").read_bytes())
    assert os.path.realpath(os.fsdecode(found[b"libc.so.6"][0])) == os.path.realpath(
        next(path for path in loaded(PROGRAM) if "/libc.so" in path)
    )


@given(st.binary(max_size=200), st.booleans())
def test_any_cache(data: bytes, magic: bool) -> None:
    parse_cache(b"glibc-ld.so.cache1.1" + data if magic else data)


# --- large files: made, since this machine's libraries are small


def made_elf(text: int, functions: list[int], *, relocated: bool = True, machine: int = 62) -> bytes:
    """A library with ``text`` bytes of code at 0x100000, whose constructors are at these offsets in it."""
    base, data_at = 0x100000, 0x100000 + text
    header = struct.pack("<4sBBB9xHHIQQQIHHHHHH", b"\x7fELF", 2, 1, 1, 3, machine, 1, 0, 64, 0, 0, 64, 56, 3, 0, 0, 0)
    table = b"".join(struct.pack("<QQq", data_at + 8 * n, 8, base + at) for n, at in enumerate(functions))
    tags = [(25, data_at), (27, 8 * len(functions)), (7, 0x1000), (8, len(table) if relocated else 0), (0, 0)]
    dynamic = b"".join(struct.pack("<QQ", *tag) for tag in tags)
    array = b"".join(struct.pack("<Q", 0 if relocated else base + at) for at in functions)
    segments = [
        (1, 4, 0, 0, 0x1000 + len(table)),
        (1, 5, base, base, text),
        (1, 6, data_at, data_at, len(array) + len(dynamic)),
        (2, 6, data_at + len(array), data_at + len(array), len(dynamic)),
    ]
    head = bytearray(data_at)
    head[: len(header)] = header[:56] + struct.pack("<H", len(segments)) + header[58:]
    for number, (kind, flags, offset, address, length) in enumerate(segments):
        struct.pack_into("<IIQQQQQQ", head, 64 + 56 * number, kind, flags, offset, address, 0, length, length, 4096)
    head[0x1000 : 0x1000 + len(table)] = table
    return bytes(head) + array + dynamic + bytes(2 << 20)  # symbols for debuggers


@pytest.mark.parametrize("relocated", [True, False])
def test_constructors_of_large_libraries(relocated: bool) -> None:
    functions = [0x2010, 0x2100, 20 << 20]
    data = bytearray(made_elf(24 << 20, functions, relocated=relocated))
    # the second calls a function at 8 MiB and takes the address of one at 12 MiB
    at = 0x100000 + 0x2100
    data[at : at + 5] = b"\xe8" + struct.pack("<i", (8 << 20) - 0x2105)
    data[at + 5 : at + 12] = b"\x48\x8d\x3d" + struct.pack("<i", (12 << 20) - 0x210C)
    world = World({"lib/libbig.so": bytes(data), "bin/p": small_program()})
    taken = [each for each in world.guess("/bin/p") if each.path == b"lib/libbig.so"]
    code = 0x100000
    for offset in (0, 0x1000, code + 0x2010, code + (8 << 20), code + (12 << 20), code + (20 << 20), code + (24 << 20)):
        assert any(each.offset <= offset < each.offset + each.length for each in taken), hex(offset)
    assert sum(each.length for each in taken) < 2 << 20
    assert not any(each.offset + each.length > code + (24 << 20) + (128 << 10) for each in taken)


def small_program() -> bytes:
    """A program that needs libbig.so, nothing else."""
    strings = b"\0libbig.so\0"
    dynamic = b"".join(struct.pack("<QQ", *tag) for tag in [(1, 1), (5, 0x200), (10, len(strings)), (0, 0)])
    header = struct.pack("<4sBBB9xHHIQQQIHHHHHH", b"\x7fELF", 2, 1, 1, 3, 62, 1, 0, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    data = bytearray(0x400)
    data[:64] = header
    struct.pack_into("<IIQQQQQQ", data, 64, 1, 4, 0, 0, 0, 0x400, 0x400, 4096)
    struct.pack_into("<IIQQQQQQ", data, 120, 2, 4, 0x300, 0x300, 0, len(dynamic), len(dynamic), 8)
    data[0x200 : 0x200 + len(strings)] = strings
    data[0x300 : 0x300 + len(dynamic)] = dynamic
    return bytes(data)


def test_calls_of_other_processors() -> None:
    data = made_elf(1 << 20, [0], machine=183)
    parsed = elf.parse(data)
    forward, back = 0x94000004, 0x97FFFFFC
    code = struct.pack("<IIII", forward, 0xD503201F, 0xD503201F, 0xD503201F) + struct.pack("<I", back)
    assert called(parsed, code, 0x100000).tolist() == [0x100000, 0x100010]
    parsed = elf.parse(made_elf(1 << 20, [0], machine=243))
    assert called(parsed, code, 0x100000).tolist() == []


@given(st.binary(max_size=300), st.booleans(), st.integers(0, 1 << 64))
def test_any_elf(tail: bytes, wide: bool, address: int) -> None:
    data = b"\x7fELF" + bytes([1 + wide, 1, 1]) + tail
    with contextlib.suppress(FormatError):
        parsed = elf.parse(data)
        parsed.read_dynamic(tail)
        parsed.tables()
        parsed.table(elf.DT_STRTAB, elf.DT_STRSZ)
        touched(parsed, len(data) << 20, runs=wide)
        found = constructors(parsed, tail)
        code_at(parsed, found)
        pointers(parsed, tail)
        code_at(parsed, called(parsed, tail, address))


def test_damaged_programs_and_libraries() -> None:
    generator = random.Random(3)
    program = small_program()
    library = made_elf(1 << 16, [0x100])[: (1 << 20) + (1 << 16) + 400]
    for _ in range(150):
        broken = [bytearray(program), bytearray(library)]
        for data, places in zip(broken, (0x400, 0x1100), strict=True):
            for _ in range(generator.randrange(6)):
                data[generator.randrange(places)] = generator.randrange(256)
        World({"bin/p": bytes(broken[0]), "lib/libbig.so": bytes(broken[1])}).guess("/bin/p")
