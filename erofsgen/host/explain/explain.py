"""Puts together what is known of a file: where its chunks are, who could bring them, who has them, too."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from erofsgen.erofs.reader import Index
from erofsgen.errors import ErofsgenError, NotFoundError
from erofsgen.host import config
from erofsgen.host.cache.cache import CachedImage, HostCache
from erofsgen.host.explain import facts
from erofsgen.host.explain.local import Local, mounted
from erofsgen.host.explain.sharing import Sharing, open_index, users
from erofsgen.host.explain.sources import sources
from erofsgen.host.explain.subject import Subject
from erofsgen.host.explain.tables import Tables
from erofsgen.host.mount.mounts import mounts
from erofsgen.pack.format import BLOCK
from erofsgen.pack.toc import Toc
from erofsgen.store.base import Store
from erofsgen.store.image import Image
from erofsgen.store.manifest import Pack
from erofsgen.store.open import absolute, open_store
from erofsgen.store.paths import resolve

_ALSO: Final = 20
"""Other files of the image that are named."""
_ATTEMPTS: Final = 2
"""Times that a store is asked for what only it knows."""


def explain(
    root: Path, url: str, name: str, path: bytes, *, remote: bool = True, timeout: float = 5.0
) -> facts.Explanation:
    """Explain ``path`` of the image ``name``, of the store ``url`` or of the host cache below ``root``.

    Links are followed inside the image. Without ``remote`` nothing is asked of any server, which an image of the cache
    does not need; tiers have ``timeout`` seconds to answer. What cannot be found out is among the ``problems``.

    Raises NotFoundError (no such image or path), FormatError, IntegrityError, StorageError, and what keeps the store
    from answering where the cache does not have the image.
    """
    found = _Found(root, url, name, remote=remote, timeout=timeout)
    try:
        return _Explainer(found, root, remote=remote, timeout=timeout).explain(path)
    finally:
        for store in found.stores:
            store.close()


class _Found:
    """The image ``name``, in the host cache or its store, or both, and the stores that can be asked for it."""

    def __init__(self, root: Path, url: str, name: str, *, remote: bool, timeout: float) -> None:
        url = absolute(url)
        self.cache = HostCache(root) if root.is_dir() else None
        self._timeout = timeout
        self.problems: list[str] = []
        self.stores: list[Store] = []
        self.urls = [url]
        self.cached: CachedImage | None = None
        self.image: Image | None = None
        error: ErofsgenError = NotFoundError(
            f"{root}: no image {name!r} of {url}", hint="run `erofsgen pull`, or ask the store"
        )
        if remote or "://" not in url:
            try:
                self.stores.append(self._open(url))
                self.image = Image.open(self.stores[0], name)
            except ErofsgenError as raised:
                error = raised
                self.problems.append(f"store: {raised}")
        if self.cache is not None:
            try:
                self.cached = self.cache.image(name if self.image is None else self.image.digest, url)
            except NotFoundError:
                pass
            else:
                self.urls = [*dict.fromkeys([url, *self.cached.stores])]
        if self.image is None and self.cached is None:
            raise error
        for other in self.urls[1:]:
            if remote or "://" not in other:
                try:
                    self.stores.append(self._open(other))
                except ErofsgenError as raised:
                    self.problems.append(f"store: {raised}")

    def _open(self, url: str) -> Store:
        return open_store(url, attempts=_ATTEMPTS, timeout=self._timeout)

    @property
    def name(self) -> str:
        return self.image.name if self.image is not None else self._cached.name

    @property
    def digest(self) -> str:
        return self.image.digest if self.image is not None else self._cached.digest

    @property
    def packs(self) -> Sequence[Pack]:
        return self.image.packs if self.image is not None else self._cached.packs

    def index(self) -> Index:
        return open_index(self.cached) if self.cached is not None else self._of_store()

    @property
    def _cached(self) -> CachedImage:
        assert self.cached is not None
        return self.cached

    def _of_store(self) -> Index:
        assert self.image is not None
        return self.image.index


class _Explainer:
    """Explains what is in an image that was found."""

    def __init__(self, found: _Found, root: Path, *, remote: bool, timeout: float) -> None:
        self._found = found
        self._root = root
        self._remote = remote
        self._timeout = timeout
        self._problems = found.problems
        self._local = Local(found.cache)
        self._tables = Tables(found.cache, found.stores, self._problems)
        self._tocs: dict[int, Toc | None] = {}
        self._frames: dict[tuple[int, int], facts.Frame] = {}

    def explain(self, path: bytes) -> facts.Explanation:
        found = self._found
        index = found.index()
        place, node = resolve(index, path)
        subject = Subject(place, node)
        used = {pack.slot: pack for pack in found.packs if pack.slot in subject.runs}
        for slot, pack in used.items():
            self._look_at_frames(pack, subject.runs[slot])
        by_pack = {used[slot].hex: blocks for slot, blocks in subject.chunks.items() if slot in used}
        sharing = Sharing(found.digest, by_pack, self._problems)
        if by_pack:
            if found.cache is not None:
                sharing.look_in_cache(found.cache)
            for store in found.stores:
                sharing.look_in(store)
        also = users(index, by_pack, but=subject.nids) if node.nid in subject.nids else []
        all_mounts = mounts(self._root) if found.cache is not None else []
        return facts.Explanation(
            image=found.name,
            digest=found.digest,
            cached=found.cached is not None,
            inode=subject.inode,
            content=self._content(subject),
            chunks=self._chunks(subject, used, sharing),
            frames=list(self._frames.values()),
            packs=[self._pack(pack, subject) for pack in used.values()],
            sources=self._sources(list(used.values())),
            shared=sharing.found(all_mounts),
            also=also[:_ALSO],
            also_files=len(also),
            mounts=[
                mounted(mount, place, subject.inode.size if subject.pieces else 0)
                for mount in all_mounts
                if mount.digest == found.digest
            ],
            problems=self._problems,
        )

    def _look_at_frames(self, pack: Pack, runs: Sequence[tuple[int, int]]) -> None:
        toc = self._tocs[pack.slot] = self._tables.toc(pack)
        if toc is None:
            return
        wanted: defaultdict[int, int] = defaultdict(int)
        for start, length in runs:
            for frame in toc.frames(start, length):
                first = int(toc.device_offsets[frame])
                last = first + int(toc.device_sizes[frame])
                wanted[frame] += min(last, start + length) - max(first, start)
        for found in self._local.frames(pack.hex, pack.slot, toc, wanted):
            self._frames[pack.slot, found.frame] = found

    def _content(self, subject: Subject) -> facts.Content:
        mapped = sum(length for runs in subject.runs.values() for _, length in runs)
        return facts.Content(
            files=subject.files,
            bytes=subject.bytes,
            inline=subject.inline,
            holes=subject.holes,
            mapped=mapped,
            here=sum(frame.bytes for frame in self._frames.values() if frame.here),
            chunks=sum(map(len, subject.chunks.values())),
            frames=len(self._frames),
        )

    def _chunks(self, subject: Subject, used: dict[int, Pack], sharing: Sharing) -> list[facts.Chunk]:
        """A file's chunks and holes, in order."""
        digests: dict[int, dict[int, str]] = {}
        pages: dict[tuple[int, int], int | None] = {}
        shared: dict[tuple[int, int], int] = {}
        blocks = subject.chunks if subject.pieces else {}
        for number, starts in blocks.items():
            pack, toc = used[number], self._tocs[number]
            digests[number] = {} if toc is None else self._tables.digests(pack, toc, starts)
            ranges = [(piece.start, piece.length) for piece in subject.pieces if piece.slot == number]
            cached = self._local.cached_pages(pack.hex, ranges)
            pages |= {(number, start): size for (start, _), size in zip(ranges, cached, strict=True)}
            count = sharing.users_of(pack.hex, starts).tolist()
            shared |= {(number, block): times for block, times in zip(starts.tolist(), count, strict=True)}
        rows = []
        for offset, length, slot, start in subject.pieces:
            toc = None if slot is None else self._tocs[slot]
            rows.append(
                facts.Chunk(
                    offset=offset,
                    length=length,
                    slot=slot,
                    device_offset=start,
                    frame=None if toc is None else toc.frames(start, 1)[0],
                    digest=None if slot is None else digests[slot].get(start // BLOCK),
                    page_cache=None if slot is None else pages[slot, start],
                    shared=0 if slot is None else shared[slot, start // BLOCK],
                )
            )
        return rows

    def _pack(self, pack: Pack, subject: Subject) -> facts.Pack:
        mine = [frame for (slot, _), frame in self._frames.items() if slot == pack.slot]
        data = self._local.data(pack.hex)
        return facts.Pack(
            slot=pack.slot,
            digest=pack.digest,
            kind="raw" if pack.raw else "zstd",
            stored=pack.size,
            device_size=pack.device_size,
            data=None if data is None else str(data),
            objects=self._local.objects(pack.hex),
            bytes=sum(length for _, length in subject.runs[pack.slot]),
            frames=None if self._tocs[pack.slot] is None else len(mine),
            here=sum(frame.here for frame in mine),
        )

    def _sources(self, packs: Sequence[Pack]) -> list[facts.Source]:
        """Who could bring ``packs``; nothing where there are none."""
        if not packs:
            return []
        try:
            chain = config.load()
        except ErofsgenError as error:
            self._problems.append(f"configuration: {error}")
            chain = config.Config()
        digests = [pack.digest for pack in packs]
        return sources(chain, self._found.urls, digests, remote=self._remote, timeout=self._timeout)
