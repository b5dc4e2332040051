"""Checks a store: every manifest, index and pack, every digest, every reference from one to the other.

Packs are checked in parallel, since both hashes and zstd release the GIL. Whatever is damaged is named with its place,
and a damaged part of a pack with the files that would be read from it.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Final, TypeVar

import msgspec

from erofsgen.erofs.check import check_index
from erofsgen.errors import FormatError, NotFoundError, RemoteError, StorageError, UnsupportedError
from erofsgen.progress import SILENT, Progress, Task
from erofsgen.store import profiles
from erofsgen.store.base import Descriptor, Store
from erofsgen.store.image import Image, read_blob
from erofsgen.store.inspect import tags
from erofsgen.store.manifest import ARTIFACT_TYPE, MANIFEST_TYPE, Pack
from erofsgen.store.packcheck import PackReport, check_pack

T = TypeVar("T")
R = TypeVar("R")

_PIECE: Final = 4 << 20
_FILES_NAMED: Final = 5
"""Damaged files named per image and pack; the rest is counted."""


class Problem(msgspec.Struct, frozen=True, order=True):
    """Something wrong. ``image`` and ``blob`` say where, as far as one can (empty: unknown or several); ``what`` is one
    line."""

    image: str
    blob: str
    what: str

    def line(self) -> str:
        """For people."""
        return ": ".join(part for part in (self.image, self.blob, self.what) if part)


class Report(msgspec.Struct, frozen=True):
    """What was checked and what was found. ``bytes`` counts stored bytes read. ``unreferenced`` maps blobs that no
    image reaches to their sizes; they are no problem, and only looked for when the whole store is checked."""

    images: int
    packs: int
    frames: int
    chunks: int
    bytes: int
    problems: list[Problem]
    unreferenced: dict[str, int]


def check(
    store: Store, names: Sequence[str] | None = None, *, threads: int | None = None, progress: Progress = SILENT
) -> Report:
    """Check the images called ``names``, or everything in the store; keeps ``gc`` away meanwhile where it can.

    Raises NotFoundError (no such image), StorageError or RemoteError (the store cannot be read). Whatever is wrong with
    what is in it is in the report.
    """
    with ExitStack() as stack:
        with suppress(StorageError, RemoteError, UnsupportedError):  # whoever may only read cannot
            stack.enter_context(store.building())
        run = _Check(store, threads or len(os.sched_getaffinity(0)), progress)
        return run.everything() if names is None else run.named(names)


class _Check:
    def __init__(self, store: Store, threads: int, progress: Progress) -> None:
        self._store = store
        self._threads = threads
        self._progress = progress
        self._images: list[Image] = []
        self._manifests = 0
        self._reached: set[str] = set()
        self._packs: defaultdict[Pack, list[str]] = defaultdict(list)
        self._damage: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
        self._problems: set[Problem] = set()
        self._totals = PackReport()

    def named(self, names: Sequence[str]) -> Report:
        """Check some images."""
        references = self._store.references()
        chosen = {tag: references[tag] for name in names for tag in tags(self._store, name, references)}
        self._check(chosen)
        self._profiles({manifest.digest for manifest in chosen.values()})
        return self._report({})

    def everything(self) -> Report:
        """Check the whole store, as far as it lists what is in it."""
        blobs: dict[str, int] = {}
        with suppress(UnsupportedError):
            blobs.update(self._store.blobs())  # first: a build that ends now would seem to leave blobs unreferenced
        try:
            self._check(self._store.references())
            self._profiles(self._store.profiled() & self._reached)
        except FormatError as error:
            self._problem("", "", str(error))
            return self._report({})
        loose = {digest: size for digest, size in sorted(blobs.items()) if digest not in self._reached}
        with self._progress.task("checking unreferenced blobs", sum(loose.values())) as task:
            self._parallel(lambda blob: self._loose(*blob, task), list(loose.items()))
        return self._report(loose)

    def _report(self, unreferenced: dict[str, int]) -> Report:
        totals = self._totals
        return Report(
            images=self._manifests,
            packs=len({pack.digest for pack in self._packs}),
            frames=totals.frames,
            chunks=totals.chunks,
            bytes=totals.bytes,
            problems=sorted(self._problems),
            unreferenced=unreferenced,
        )

    def _check(self, references: dict[str, Descriptor]) -> None:
        manifests: dict[str, tuple[str, Descriptor]] = {}
        for name, descriptor in sorted(references.items()):
            known = manifests.setdefault(descriptor.digest, (name, descriptor))[1]
            if (known.size, known.media_type) != (descriptor.size, descriptor.media_type):
                self._problem(name, descriptor.digest, "the store's references disagree on its size or media type")
        self._manifests = len(manifests)
        with self._progress.task(f"checking indexes ({len(manifests)})") as task:
            for name, descriptor in manifests.values():
                with self._finding(name):
                    self._image(name, descriptor, task)
        with self._progress.task(
            f"checking packs ({len(self._packs)})", sum(pack.size for pack in self._packs)
        ) as task:
            reports = self._parallel(lambda pack: check_pack(self._store, pack, task), list(self._packs))
        for (pack, names), report in zip(self._packs.items(), reports, strict=True):
            self._add(pack, names, report)
        for image in self._images:
            with self._finding(image.name):
                self._damaged_files(image)

    def _image(self, name: str, descriptor: Descriptor, task: Task) -> None:
        """An image but for its packs, which are collected."""
        self._reached.add(descriptor.digest)
        if descriptor.media_type != MANIFEST_TYPE:
            self._problem(name, descriptor.digest, f"referred to as {descriptor.media_type!r}, not as a manifest")
        image = Image(self._store, name, descriptor)
        manifest = image.manifest
        types = (manifest.schema_version, manifest.media_type, manifest.artifact_type)
        if types != (2, MANIFEST_TYPE, ARTIFACT_TYPE):
            self._problem(name, descriptor.digest, f"manifest is of schema and types {types!r}")
        self._reached.update([manifest.config.digest, *(layer.digest for layer in manifest.layers)])
        if len({pack.digest for pack in image.packs}) != len(image.packs):
            self._problem(name, descriptor.digest, "manifest names a pack twice")
        for pack in image.packs:
            self._packs[replace(pack, slot=0)].append(name)
        self._totals.bytes += image.manifest_size
        with self._finding(name):
            self._totals.bytes += manifest.config.size if image.config is not None else 0
        with self._finding(name):
            self._index(image)
            self._images.append(image)
        task.advance(image.manifest_size + image.index_descriptor.size)

    def _profiles(self, images: Set[str]) -> None:
        """What lies beside images: that its blobs are what their digests say. Damage there harms no image."""
        with self._progress.task(f"checking profiles ({len(images)})") as task:
            for image in sorted(images):
                with self._finding(""):
                    found = profiles.find(self._store, image)
                    beside = profiles.blobs(found) if found else {}
                    for digest, size in beside.items():  # of the store itself, whatever came along with a name
                        task.advance(len(read_blob(self._store, digest, size, limit=profiles.LIMIT)))
                    self._reached.update(beside)
                    self._totals.bytes += sum(beside.values())

    def _index(self, image: Image) -> None:
        blob = image.index_descriptor.digest
        for what in check_index(image.index_bytes()):
            self._problem(image.name, blob, f"index: {what}")
        self._totals.bytes += image.index_descriptor.size
        sizes = {pack.slot: pack.device_size for pack in image.packs}
        for path, device, start, length in _mappings(image):
            if not 0 <= start <= start + length <= sizes.get(device, -1):
                where = f"bytes {start}+{length} of device {device}"
                self._problem(image.name, blob, f"index: /{os.fsdecode(path)} maps {where}, which do not exist")

    def _add(self, pack: Pack, names: list[str], report: PackReport) -> None:
        self._totals.frames += report.frames
        self._totals.chunks += report.chunks
        self._totals.bytes += report.bytes
        self._damage[pack.digest] += report.damaged
        for what in report.problems:
            self._problem(names[0] if len(names) == 1 else "", pack.digest, what)

    def _damaged_files(self, image: Image) -> None:
        damage = {pack.slot: self._damage[pack.digest] for pack in image.packs if self._damage[pack.digest]}
        if not damage:
            return
        hit: defaultdict[int, list[str]] = defaultdict(list)
        for path, device, start, length in _mappings(image):
            if any(at < start + length and start < at + size for at, size in damage.get(device, ())):
                file = f"/{os.fsdecode(path)}"
                if hit[device][-1:] != [file]:
                    hit[device].append(file)
        for device, files in hit.items():
            named = ", ".join(files[:_FILES_NAMED])
            more = f" and {len(files) - _FILES_NAMED} more" if len(files) > _FILES_NAMED else ""
            self._problem(image.name, image.packs[device - 1].digest, f"cannot be read for it: {named}{more}")

    def _loose(self, digest: str, size: int, task: Task) -> None:
        """Later builds may use a blob that nothing refers to now: it must be what its name says."""
        hasher = hashlib.sha256()
        with self._finding(""):
            for start in range(0, size, _PIECE):
                data = self._store.read(digest, start, min(_PIECE, size - start))
                hasher.update(data)
                task.advance(len(data))
            if f"sha256:{hasher.hexdigest()}" != digest:
                self._problem("", digest, "differs from its digest (no image needs it)")

    def _parallel(self, work: Callable[[T], R], items: list[T]) -> list[R]:
        with ThreadPoolExecutor(self._threads, "check") as pool:
            futures = [pool.submit(work, item) for item in items]
            try:
                return [future.result() for future in futures]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    @contextmanager
    def _finding(self, name: str) -> Iterator[None]:
        """What is being read turns out to be damaged or missing: a problem, and the check goes on."""
        try:
            yield
        except (FormatError, NotFoundError) as error:
            what = str(error)
            self._problem("" if what.startswith(f"{name}: ") else name, "", what)

    def _problem(self, image: str, blob: str, what: str) -> None:
        self._problems.add(Problem(image, blob, what))


def _mappings(image: Image) -> Iterator[tuple[bytes, int, int, int]]:
    """(path, device, device offset, length) of every extent, hard-linked files once."""
    seen: set[int] = set()
    for path, node in image.index.walk():
        if stat.S_ISREG(node.mode) and node.nid not in seen:
            seen.add(node.nid)
            for _, length, device, start in node.extents():
                if device is not None:
                    yield path, device, start, length
