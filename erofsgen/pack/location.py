"""Where a pack's table of contents is. Apart from its reader, which needs numpy: a mount only passes this on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TocLocation:
    """Where a pack's TOC is and how to know it: byte range within the pack, and BLAKE3 of those bytes in hex."""

    offset: int
    size: int
    digest: str
