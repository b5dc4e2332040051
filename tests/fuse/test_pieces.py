"""Where bytes of files and of flat files lie, against a plain model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from erofsgen.erofs.flatten import Flat
from erofsgen.erofs.node import Extent
from erofsgen.erofs.tree import BLOCK
from fusefallback.content import Piece, pieces_of
from fusefallback.flatpacks import FLAT, flat_file, pack_files


@st.composite
def mappings(draw: st.DrawFn) -> list[Extent]:
    extents, offset = [], 0
    for _ in range(draw(st.integers(1, 12))):
        length = draw(st.integers(1, 40))
        device = draw(st.sampled_from([None, 0, 1, 2]))
        start = draw(st.integers(0, 1000)) if device is not None else 0
        extents.append(Extent(offset, length, device, start))
        offset += length
    return extents


def each_byte(extents: list[Any]) -> list[tuple[int | None, int]]:
    """(device, place) of every byte; those of holes are alike."""
    return [
        (device, 0 if device is None else start + number)
        for *_, length, device, start in extents
        for number in range(length)
    ]


@given(mappings(), st.data())
def test_pieces_are_the_bytes_that_were_asked_for(extents: list[Extent], data: st.DataObject) -> None:
    total = extents[-1].offset + extents[-1].length
    offset = data.draw(st.integers(0, total))
    length = data.draw(st.integers(0, total - offset))
    pieces = pieces_of(extents, offset, length)
    assert all(piece.length > 0 for piece in pieces)
    found = each_byte([(piece.length, piece.device, piece.start) for piece in pieces])
    assert found == each_byte(extents)[offset : offset + length]


@pytest.mark.parametrize(("offset", "length"), [(10, 0), (10, -1), (11, -5), (0, 0)])
def test_there_is_nothing_behind_the_end(offset: int, length: int) -> None:
    """A read behind the end comes with no bytes left to read."""
    assert pieces_of([Extent(0, 10, 1, 0)], offset, length) == []
    assert pieces_of([], 0, length) == []


def pack(letter: str, blocks: int) -> Any:
    return SimpleNamespace(hex=letter * 64, device_size=blocks * BLOCK)


def test_packs_are_files_by_their_sha256() -> None:
    files = pack_files([pack("b", 3), pack("a", 5)])
    assert [(file.name, file.size) for file in files] == [(b"b" * 64, 3 * BLOCK), (b"a" * 64, 5 * BLOCK)]
    assert pieces_of(files[1].extents, BLOCK, BLOCK) == [Piece(2, BLOCK, BLOCK)]


@given(st.permutations([3, 1, 5, 2]), st.lists(st.integers(0, 4), min_size=4, max_size=4), st.integers(1, 3))
def test_the_flat_file_has_everything_in_its_place(order: list[int], gaps: list[int], index: int) -> None:
    """Whatever the order of devices in the unified address space, and what is between them."""
    packs = [pack(letter, blocks) for letter, blocks in zip("abcd", (3, 1, 5, 2), strict=True)]
    starts = [0] * 4
    at = index
    for blocks, gap in zip(order, gaps, strict=True):
        at += gap
        starts[(3, 1, 5, 2).index(blocks)] = at
        at += blocks
    file = flat_file(cast(Flat, SimpleNamespace(index=bytes(index * BLOCK), starts=starts)), packs)
    assert file.name == FLAT.encode()
    assert file.size == at * BLOCK
    ends = [0]
    for extent in file.extents:
        assert extent.offset == ends[-1], "without gaps"
        ends.append(extent.offset + extent.length)
    assert pieces_of(file.extents, 0, index * BLOCK) == [Piece(0, 0, index * BLOCK)]
    for slot, (start, made) in enumerate(zip(starts, packs, strict=True), 1):
        assert pieces_of(file.extents, start * BLOCK, made.device_size) == [Piece(slot, 0, made.device_size)]
