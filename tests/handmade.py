"""Images made by hand, to the byte: which chunk lies in which pack is the test's choice."""

from __future__ import annotations

import os
import random
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import zstandard
from blake3 import blake3

from erofsgen.erofs.tree import BLOCK, CHUNK_DTYPE, Device, Inode
from erofsgen.erofs.writer import write_index
from erofsgen.host import linux
from erofsgen.pack.writer import PackWriter
from erofsgen.store.base import Descriptor
from erofsgen.store.directory import DirectoryStore
from erofsgen.store.image import Image
from erofsgen.store.manifest import (
    ARTIFACT_TYPE,
    DEVICE_SIZE,
    HOLES_AT_END,
    INDEX_HOLES,
    INDEX_SIZE,
    INDEX_TYPE,
    MANIFEST_TYPE,
    Manifest,
    pack_descriptor,
)

CHUNK = 64 << 10
FRAME_CHUNKS = 4


class PackMade(NamedTuple):
    descriptor: Descriptor
    places: dict[bytes, int]
    """BLAKE3 of a chunk to its block."""

    @property
    def hex(self) -> str:
        return self.descriptor.digest.removeprefix("sha256:")


def chunks_of(content: bytes) -> list[bytes]:
    return [content[start : start + CHUNK] for start in range(0, len(content), CHUNK)]


class ImageMaker:
    """Writes packs and images into a store. A path of ``files`` maps to bytes, to a symlink's target or to None,
    a directory."""

    def __init__(self, store: DirectoryStore) -> None:
        self.store = store

    def pack(self, chunks: Sequence[bytes], *, raw: bool = False) -> PackMade:
        places = {}
        with self.store.create() as blob:
            writer = PackWriter(blob, raw=raw)
            table = []
            for first in range(0, len(chunks), FRAME_CHUNKS):
                frame = b""
                for chunk in chunks[first : first + FRAME_CHUNKS]:
                    block = (writer.device_size + len(frame)) // BLOCK
                    digest = blake3(chunk).digest()
                    table.append((digest, block, len(chunk)))
                    places[digest] = block
                    frame += chunk + bytes(-len(chunk) % BLOCK)
                stored = frame if raw else zstandard.ZstdCompressor(1).compress(frame)
                writer.add_frame(stored, len(frame), blake3(frame).digest())
            toc = writer.finish(table)
            device_size = writer.device_size
            digest, size = blob.commit()
        return PackMade(pack_descriptor(digest, size, raw=raw, device_size=device_size, toc=toc), places)

    def image(self, name: str, files: dict[str, bytes | str | None], packs: Sequence[PackMade]) -> Image:
        where: dict[bytes, tuple[int, int]] = {}
        for slot, pack in enumerate(packs, 1):
            for digest, block in pack.places.items():
                where.setdefault(digest, (slot, block))
        table = [(0, 0)]
        holes_at_end = True
        root = Inode(stat.S_IFDIR | 0o751, uid=7, gid=8, mtime=10**18, children={})
        for path, content in files.items():
            *parents, leaf = os.fsencode(path).split(b"/")
            directory = root
            for parent in parents:
                assert directory.children is not None
                directory = directory.children.setdefault(parent, Inode(stat.S_IFDIR | 0o755, children={}))
            assert directory.children is not None
            if content is None:
                inode = Inode(stat.S_IFDIR | 0o700, children={})
            elif isinstance(content, str):
                inode = Inode(stat.S_IFLNK | 0o777, data=content.encode())
            elif len(content) < 512:
                inode = Inode(stat.S_IFREG | 0o644, size=len(content), data=content)
            else:
                numbers = []
                for chunk in chunks_of(content):
                    if not any(chunk):
                        numbers.append(0)
                        continue
                    holes_at_end &= 0 not in numbers
                    numbers.append(len(table))
                    table.append(where[blake3(chunk).digest()])
                inode = Inode(stat.S_IFREG | 0o640, mtime=123_456_789, size=len(content), chunks=tuple(numbers))
            directory.children[leaf] = inode
        places = np.zeros(len(table), CHUNK_DTYPE)
        places["device"], places["block"] = np.array(table).T
        return self.publish(name, root, places, packs, holes_at_end=holes_at_end)

    def publish(
        self,
        name: str,
        root: Inode,
        places: np.ndarray,
        packs: Sequence[PackMade],
        *,
        chunk_size: int = CHUNK,
        holes_at_end: bool = False,
    ) -> Image:
        """An image of any tree, whose chunks lie at ``places``."""
        devices = [Device(pack.hex, int(pack.descriptor.annotations[DEVICE_SIZE]) // BLOCK) for pack in packs]
        index = bytes(write_index(root, places, devices, chunk_size=chunk_size))
        digest, size = self.store.put(zstandard.ZstdCompressor(1).compress(index))
        holes = {INDEX_HOLES: HOLES_AT_END} if holes_at_end else {}
        config_digest, config_size = self.store.put(b"{}")
        manifest = Manifest(
            schema_version=2,
            media_type=MANIFEST_TYPE,
            artifact_type=ARTIFACT_TYPE,
            config=Descriptor("application/vnd.oci.image.config.v1+json", config_digest, config_size),
            layers=[
                Descriptor(INDEX_TYPE, digest, size, {INDEX_SIZE: str(len(index)), **holes}),
                *(pack.descriptor for pack in packs),
            ],
        )
        digest, size = self.store.put(msgspec.json.encode(manifest))
        self.store.tag(name, Descriptor(MANIFEST_TYPE, digest, size))
        return Image.open(self.store, name)


def contents(seed: int, *sizes: int) -> list[bytes]:
    generator = random.Random(seed)
    return [generator.randbytes(size) for size in sizes]


class Sample(NamedTuple):
    image: Image
    files: dict[str, bytes | str | None]
    packs: list[PackMade]


def make_wide(maker: ImageMaker, name: str = "wide", seed: int = 3) -> Sample:
    """Three packs of 24, 24 and 13 frames, one of them raw; ``all`` crosses all of them."""
    parts = contents(seed, *(size * CHUNK for size in (96, 96, 50)))
    packs = [maker.pack(chunks_of(part), raw=number == 1) for number, part in enumerate(parts)]
    files: dict[str, bytes | str | None] = {"one": parts[0], "two": parts[1], "three": parts[2], "all": b"".join(parts)}
    return Sample(maker.image(name, files, packs), files, packs)


def read_tree(top: Path) -> dict[str, bytes | str | None]:
    """What :meth:`ImageMaker.image` was given, read back: leaves only."""
    found: dict[str, bytes | str | None] = {}
    for directory, names, leaves in os.walk(top):
        base = Path(directory).relative_to(top)
        for name in names + leaves:
            path = Path(directory, name)
            if path.is_symlink():
                found[str(base / name)] = os.readlink(path)
            elif name in leaves:
                found[str(base / name)] = path.read_bytes()
            elif not os.listdir(path):
                found[str(base / name)] = None
    return found


def erofs_mounts_below(path: Path) -> list[linux.MountPoint]:
    """Our mounts on ``path`` and below it: EROFS, FUSE, and overlays by the source they show."""
    return [
        point
        for point in linux.mount_points()
        if (point.fstype in ("erofs", "fuse.erofsgen") or (point.fstype, point.source) == ("overlay", "erofsgen"))
        and Path(point.target).is_relative_to(path)
    ]


def loops_over(path: Path) -> list[str]:
    """Loop devices whose backing file is below ``path``."""
    found = []
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            name = backing.read_text().strip()
        except OSError:  # it was just cleared
            continue
        if name.startswith(str(path)):
            found.append(name)
    return found
