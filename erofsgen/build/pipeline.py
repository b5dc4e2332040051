"""The whole way of an image into a store: layers to records, records to an index and packs, a name at the end.

Nothing is visible under a name until everything it needs is durable. Profiles of an earlier build of the image, if any,
come last. A build that stops half-way leaves blobs that no reference reaches (``gc`` removes them) and the records of
the layers it finished, from which the next one goes on.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack

import msgspec

from erofsgen.build import guess, profiles
from erofsgen.build import record as records
from erofsgen.build.assemble import Assembler, write_manifest
from erofsgen.build.convert import Converter, Counts
from erofsgen.build.cycles import no_cycle_collection
from erofsgen.build.dictionary import Dictionary, stored
from erofsgen.build.options import BuildOptions
from erofsgen.build.packer import Packer
from erofsgen.build.record import LayerRecord
from erofsgen.oci.images import RootfsImage
from erofsgen.oci.layer import Entry, FileData
from erofsgen.oci.rootfs import RootfsReader
from erofsgen.oci.source import Layer, SourceImage
from erofsgen.oci.stream import open_stream
from erofsgen.oci.tar import TarReader
from erofsgen.progress import SILENT, Progress
from erofsgen.store.base import Descriptor, Store


class BuildResult(msgspec.Struct, frozen=True):
    """What a build did. Sizes in bytes, time in seconds.

    ``digest``              of the manifest
    ``inodes``              files of any type in the image, hard links counted once
    ``index_size``          the EROFS image; ``index_stored`` as it lies in the store
    ``packs``, ``new_packs``  devices of the image; packs this build added to the store
    ``pack_bytes``          stored size of the image's packs
    ``layers``, ``reused_layers``  layers of the source; how many came from layer records
    ``file_bytes``          file data read; ``new_bytes`` of it were new, ``deduplicated_bytes`` were in a pack already
    ``unique_bytes``        file data of the image, every chunk counted once
    ``profiles``            taken over from an earlier build of the image
    ``guessed``             whether what its own command will read was guessed
    """

    name: str
    digest: str
    inodes: int
    index_size: int
    index_stored: int
    packs: int
    new_packs: int
    pack_bytes: int
    layers: int
    reused_layers: int
    file_bytes: int
    new_bytes: int
    deduplicated_bytes: int
    unique_bytes: int
    seconds: float
    profiles: int = 0
    guessed: bool = False


def build_image(
    source: SourceImage,
    store: Store,
    *,
    tag: str | None = None,
    options: BuildOptions | None = None,
    progress: Progress = SILENT,
) -> BuildResult:
    """Convert ``source`` into ``store`` and name it ``tag`` (the source's own name by default).

    Raises what reading the source raises (FormatError, IntegrityError, RemoteError …) and StorageError; the store's
    references are unchanged then.
    """
    options = options or BuildOptions()
    started = time.monotonic()
    name = tag or store.called(source.name)
    store.check_name(name)
    with ExitStack() as stack:
        stack.enter_context(no_cycle_collection())
        stack.enter_context(store.building())
        there = stored(store)
        dictionary = None
        if options.dedup:
            dictionary = Dictionary(store.dictionary, store, there)
            stack.callback(dictionary.close)
        packer = stack.enter_context(
            Packer(
                store,
                level=options.compression_level,
                threads=options.worker_threads,
                pack_size=options.pack_size,
                frame_size=max(options.chunk_size, 1 << 20),
            )
        )
        build = _Build(source, store, dictionary, packer, options, progress)
        assembler = Assembler(store, options)
        for converted in build.layers():
            assembler.add(converted)
        with progress.task("index"):
            assembled = assembler.finish(packer)
        subject = None
        if source.subject is not None:
            subject = Descriptor(source.subject.media_type, source.subject.digest, source.subject.size)
        manifest = write_manifest(store, assembled, source.config, subject, options)
        earlier = profiles.earlier(store, name)
        store.tag(name, manifest)
        inherited = profiles.inherit(store, earlier, manifest, assembled.places)
        guessed = options.guess and guess.lay_beside(store, name, manifest)
        counts = build.counts
        return BuildResult(
            name=name,
            digest=manifest.digest,
            inodes=assembled.inodes,
            index_size=assembled.index_size,
            index_stored=assembled.index.size,
            packs=len(assembled.packs),
            new_packs=sum(pack.digest not in there for pack in assembled.packs),
            pack_bytes=sum(pack.size for pack in assembled.packs),
            layers=len(source.layers),
            reused_layers=build.reused,
            file_bytes=counts.file_bytes,
            new_bytes=counts.new_bytes,
            deduplicated_bytes=counts.deduplicated_bytes,
            unique_bytes=assembled.unique_bytes,
            seconds=time.monotonic() - started,
            profiles=inherited,
            guessed=guessed,
        )


class _Build:
    def __init__(
        self,
        source: SourceImage,
        store: Store,
        dictionary: Dictionary | None,
        packer: Packer,
        options: BuildOptions,
        progress: Progress,
    ) -> None:
        self._source = source
        self._store = store
        self._options = options
        self._progress = progress
        self.counts = Counts()
        self.reused = 0
        self._converter = Converter(packer, dictionary, options, self.counts)

    def layers(self) -> Iterator[LayerRecord]:
        """The records of all layers, bottom first; layers without one are read and converted."""
        if isinstance(self._source, RootfsImage):
            yield self._convert(RootfsReader(self._source.rootfs), self._source.name)
            return
        layers = self._source.layers
        keys = [records.record_key(layer.digest, self._options) for layer in layers]
        reuse = self._options.reuse_layers
        usable = {key for key in keys if reuse and records.usable(self._store, key)}
        missing = {key: index for index, key in reversed(list(enumerate(keys))) if key not in usable}
        self._source.fetch(sorted(missing.values()))
        for index, (layer, key) in enumerate(zip(layers, keys, strict=True)):
            record = records.load(self._store, key) if missing.get(key) != index else None
            if record is not None:
                self.reused += 1
            else:
                record = self._layer(index, layer)
                self._store.put_record(key, records.encode(record))
            yield record

    def _layer(self, index: int, layer: Layer) -> LayerRecord:
        what = f"layer {layer.digest}"
        with open_stream(
            self._source.open_layer(index),
            media_type=layer.media_type,
            digest=layer.digest,
            size=layer.size,
            diff_id=layer.diff_id,
            what=what,
        ) as stream:
            return self._convert(TarReader(stream), what)

    def _convert(self, reader: Iterable[tuple[Entry, FileData | None]], what: str) -> LayerRecord:
        with self._progress.task(what) as task:
            return self._converter.convert(reader, task)
