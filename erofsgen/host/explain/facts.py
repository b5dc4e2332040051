"""What ``erofsgen explain`` says. Sizes and offsets are in bytes, times in nanoseconds since 1970."""

from __future__ import annotations

from typing import Literal

import msgspec

Kind = Literal[
    "regular file", "directory", "symbolic link", "character device", "block device", "fifo", "socket", "other"
]
State = Literal["absent", "present", "durable", "suspect"]
"""Of a frame on this host. ``present``: it counts until the machine goes down; ``suspect``: of an earlier boot, to be
compared with its digest before it counts."""


class Inode(msgspec.Struct, frozen=True, kw_only=True):
    """The inode itself. ``path`` has no links in it and no leading slash. ``chunk_size``: None without chunks."""

    path: bytes
    kind: Kind
    nid: int
    mode: int
    uid: int
    gid: int
    nlink: int
    size: int
    mtime: int
    chunk_size: int | None


class Content(msgspec.Struct, frozen=True, kw_only=True):
    """What a file holds, or all files below a directory, hard links once.

    Of ``bytes`` are ``mapped`` in packs, ``inline`` in the index, ``holes`` nowhere; ``here`` counts those of them that
    can be read without a store. ``chunks`` and ``frames`` are distinct ones.
    """

    files: int
    bytes: int
    inline: int
    holes: int
    mapped: int
    here: int
    chunks: int
    frames: int


class Chunk(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of a file: a chunk, or a hole, which has no ``slot``.

    ``device_offset`` is in the device of ``slot``, ``frame`` the number there; None where the pack's table of contents
    is not at hand. ``digest``: BLAKE3 in hex, where the pack's chunk dictionary is. ``page_cache``: bytes of it in the
    page cache, by the pack's data file; None where the kernel does not tell. ``shared``: how many other images use it.
    """

    offset: int
    length: int
    slot: int | None
    device_offset: int
    frame: int | None
    digest: str | None
    page_cache: int | None
    shared: int


class Frame(msgspec.Struct, frozen=True, kw_only=True):
    """A frame that holds any of it. ``offset`` and ``stored`` are in the pack; ``used``: when it was read last, in
    seconds since 1970, None where it was not. ``fscache``: what the kernel's own cache has; None: it has no such pack.
    ``bytes``: of the subject in it."""

    slot: int
    frame: int
    device_offset: int
    device_size: int
    offset: int
    stored: int
    digest: str
    bytes: int
    host_cache: State
    used: int | None
    fscache: State | None

    @property
    def here(self) -> bool:
        """Whether it can be read without a store."""
        return any(state in ("present", "durable") for state in (self.host_cache, self.fscache))


class Pack(msgspec.Struct, frozen=True, kw_only=True):
    """A pack that holds any of it. ``data``: its data file in the host cache. ``objects``: its objects in fscache.
    ``frames``: those needed, None where its table of contents is not at hand; ``here``: those of them on this host."""

    slot: int
    digest: str
    kind: Literal["zstd", "raw"]
    stored: int
    device_size: int
    data: str | None
    objects: list[str]
    bytes: int
    frames: int | None
    here: int


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """A tier or a store, nearest first. ``packs``: whether it has each, by digest; those missing were not asked for.

    ``asked`` is false where nothing was asked, since it is remote. ``latency``: seconds until the first answer.
    ``proxy``: it keeps what passes through it, which cannot be asked.
    """

    name: str
    level: int | None
    url: str
    proxy: bool
    asked: bool
    latency: float | None
    packs: dict[str, bool]
    error: str | None


class Sharer(msgspec.Struct, frozen=True, kw_only=True):
    """Another image that uses ``chunks`` of these chunks. ``known``: where that was found."""

    digest: str
    names: list[str]
    known: list[Literal["host cache", "store"]]
    chunks: int
    mounts: list[str]


class Mounted(msgspec.Struct, frozen=True, kw_only=True):
    """A mount of the image itself. ``page_cache``: bytes of the file that it has there; None where that is not told,
    or ``target`` covers the file with changes."""

    target: str
    plane: str
    page_cache: int | None


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """All of it. ``chunks`` is for files only. ``also``: other files of the image with any of the chunks, the first of
    ``also_files``. ``problems``: what could not be found out, and why."""

    image: str
    digest: str
    cached: bool
    inode: Inode
    content: Content
    chunks: list[Chunk]
    frames: list[Frame]
    packs: list[Pack]
    sources: list[Source]
    shared: list[Sharer]
    also: list[bytes]
    also_files: int
    mounts: list[Mounted]
    problems: list[str]
