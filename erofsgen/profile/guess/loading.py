"""Which bytes of a program or library its loading touches.

Measured on what ``import torch`` and ``import pandas`` load (docs/decisions.md): of libraries of up to 4 MB nearly
every MB is touched, so they are wanted whole. Of larger ones the loader reads the tables for symbols and relocations
and all data that is written to; their code is touched here and there. Debug symbols behind the segments are never read.
"""

from __future__ import annotations

from typing import Final

from erofsgen.profile.guess.elf import PF_W, PF_X, PT_LOAD, Elf, Span

WHOLE: Final = 4 << 20
"""A file or a read-only segment up to this size is wanted whole."""

CODE: Final = 16 << 20
"""Code of programs and Python modules is wanted whole up to this size."""

HEAD: Final = 64 << 10
"""From a large file's first byte: headers, notes, hash tables."""


def touched(elf: Elf, size: int, *, runs: bool) -> list[Span]:
    """The bytes that loading a file of ``size`` bytes touches, in order.

    ``runs``: its own code is what a start is about: a program or a Python module, not a library of theirs.
    """
    if size <= WHOLE:
        return [Span(0, size)]
    spans = [Span(0, HEAD), *elf.tables()]
    for segment in elf.segments:
        if segment.kind == PT_LOAD:
            limit = CODE if runs and segment.flags & PF_X else WHOLE
            if segment.flags & PF_W or segment.length <= limit:
                spans.append(segment.span)
    return merged(spans, size)


def covers(spans: list[Span], span: Span, size: int) -> bool:
    """Whether merged ``spans`` hold all of ``span`` that is in a file of ``size`` bytes."""
    end = min(span.end, size)
    return span.offset >= end or any(each.offset <= span.offset and end <= each.end for each in spans)


def merged(spans: list[Span], size: int) -> list[Span]:
    """The same bytes, in order, none twice and none behind ``size``."""
    result: list[Span] = []
    for start, length in sorted(spans):
        end = min(start + length, size)
        if start >= end:
            continue
        if result and start <= result[-1].end:
            result[-1] = Span(result[-1].offset, max(end, result[-1].end) - result[-1].offset)
        else:
            result.append(Span(start, end - start))
    return result
