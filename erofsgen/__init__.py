"""erofsgen: container images as EROFS indexes and content-addressed packs, read lazily by the kernel."""

from __future__ import annotations

__version__ = "0.1.0"
