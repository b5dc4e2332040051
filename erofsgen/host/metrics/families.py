"""The table of all metrics: what they are called, what they say, and where their values come from.

Names begin with ``erofsgen_``, counters end in ``_total``, units are seconds and bytes. Whoever starts anew begins at
0: the worker with what ``erofsgen_engine_``, ``erofsgen_demand_``, ``erofsgen_source_`` and ``erofsgen_prefetch_``
count, the supervisor with the rest. Labels are few and bounded: priorities, processes, reasons, planes, tiers and
stores, and at most 100 images; what others do is summed up under the image ``other``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final, Literal, NamedTuple

from erofsgen.host.metrics.gather import Facts

Value = float | Mapping[str, Any]
"""A histogram's is a :class:`erofsgen.host.fill.histogram.Counts`."""
Samples = Iterable[tuple[tuple[str, ...], Value]]

ORIGIN: Final = "origin"
"""The level of stores of images."""
STATES: Final = ("ok", "resting", "full")


class Family(NamedTuple):
    """One metric. ``samples``: values of its labels, and its value, for what is known now."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    labels: tuple[str, ...]
    help: str
    samples: Callable[[Facts], Samples]


def _engine(key: str) -> Callable[[Facts], Samples]:
    return lambda facts: [((), facts.engine[key])]


def _sources(key: str) -> Callable[[Facts], Samples]:
    return lambda facts: [(_source(name, source), source[key]) for name, source in facts.engine["sources"].items()]


def _source(name: str, source: Mapping[str, Any]) -> tuple[str, str]:
    return name, ORIGIN if source["level"] is None else str(source["level"])


def _states(facts: Facts) -> Samples:
    for name, source in facts.engine["sources"].items():
        for state in STATES:
            yield (*_source(name, source), state), float(source["state"] == state)


def _supervisor(key: str) -> Callable[[Facts], Samples]:
    """A number of the supervisor's status; nothing where it does not answer, or its plane has no such number."""
    return lambda facts: [((), facts.supervisor[key])] if facts.supervisor.get(key) is not None else []


def _images(key: str) -> Callable[[Facts], Samples]:
    """A counter of all mounts of an image together, those that are gone included."""

    def samples(facts: Facts) -> Iterator[tuple[tuple[str, ...], float]]:
        total: Counter[str] = Counter()
        for mount in facts.supervisor.get("mounts", {}).values():
            total[facts.label(mount["image"])] += mount[key]
        for image, gone in facts.supervisor.get("unmounted", {}).items():
            total[facts.label(image)] += gone[key]
        for image, value in total.items():
            yield (image,), value

    return samples


def _prefetch(*keys: str) -> Callable[[Facts], Samples]:
    """What reasons have; of two keys the first less the second."""

    def samples(facts: Facts) -> Iterator[tuple[tuple[str, ...], float]]:
        for reason, numbers in facts.prefetch.get("reasons", {}).items():
            first, *less = (float(numbers.get(key, 0)) for key in keys)
            yield (reason,), max(0.0, first - sum(less))

    return samples


def _pending(facts: Facts) -> Samples:
    mounts = facts.prefetch.get("mounts", {}).values()
    return [((), sum(max(0, mount.get("of", 0) - mount.get("bytes", 0)) for mount in mounts))]


def _mounted(facts: Facts) -> Samples:
    return [((plane,), number) for plane, number in sorted(facts.mounts.items())]


def _cache(key: str) -> Callable[[Facts], Samples]:
    def samples(facts: Facts) -> Samples:
        value = facts.cache.get(key)
        return [] if value is None else [((), value)]

    return samples


def _processes(key: str) -> Callable[[Facts], Samples]:
    return lambda facts: [((name,), process[key]) for name, process in facts.processes.items()]


def _build(facts: Facts) -> Samples:
    return [((facts.version, facts.supervisor.get("plane", "")), 1.0)]


_SOURCE: Final = ("source", "level")

FAMILIES: Final = (
    Family("erofsgen_build_info", "gauge", ("version", "plane"), "1; the worker's version and the plane.", _build),
    # --- the fill engine
    Family("erofsgen_engine_frames_total", "counter", (), "Frames brought, verified and written.", _engine("frames")),
    Family(
        "erofsgen_engine_fetched_bytes_total", "counter", (), "Bytes of packs, as stored, that sources brought.",
        _engine("bytes_fetched"),
    ),
    Family(
        "erofsgen_engine_written_bytes_total", "counter", (), "Bytes of devices written to the host cache.",
        _engine("bytes_written"),
    ),
    Family("erofsgen_engine_reads_total", "counter", (), "Reads of sources that brought frames.", _engine("reads")),
    Family(
        "erofsgen_engine_coalesced_reads_total", "counter", (), "Those of them that brought several frames.",
        _engine("coalesced_reads"),
    ),
    Family(
        "erofsgen_engine_single_flight_hits_total", "counter", (), "Frames wanted that were on their way already.",
        _engine("single_flight_hits"),
    ),
    Family(
        "erofsgen_engine_retries_total", "counter", (), "Times that frames went on to the next source or round.",
        _engine("retries"),
    ),
    Family(
        "erofsgen_engine_overtaken_reads_total", "counter", (), "Reads that took too long, whose frames went on.",
        _engine("overtaken_reads"),
    ),
    Family("erofsgen_engine_hedges_total", "counter", (), "Slow demands asked for twice.", _engine("hedges")),
    Family(
        "erofsgen_engine_hedges_won_total", "counter", (), "Those of them where the second answer came first.",
        _engine("hedges_won"),
    ),
    Family(
        "erofsgen_engine_failed_requests_total", "counter", (), "Ranges that no source could bring.",
        _engine("failed_requests"),
    ),
    Family(
        "erofsgen_engine_expired_requests_total", "counter", (), "Ranges that did not come before their deadline.",
        _engine("expired_requests"),
    ),
    Family(
        "erofsgen_engine_queued_frames", "gauge", ("priority",), "Frames that wait to be read, by priority.",
        lambda facts: [((priority,), number) for priority, number in facts.engine["queued"].items()],
    ),
    Family(
        "erofsgen_engine_in_flight_bytes", "gauge", (), "Memory that holds what is on its way.", _engine("in_flight")
    ),
    Family(
        "erofsgen_engine_in_flight_peak_bytes", "gauge", (), "The most that this ever was.",
        _engine("in_flight_peak"),
    ),
    Family("erofsgen_engine_threads", "gauge", (), "Threads that read and open frames.", _engine("threads")),
    Family(
        "erofsgen_demand_seconds", "histogram", (), "Time from a demand that had to wait to its bytes being there.",
        _engine("demand_seconds"),
    ),
    # --- tiers and stores
    Family("erofsgen_source_reads_total", "counter", _SOURCE, "Reads that brought their bytes.", _sources("reads")),
    Family("erofsgen_source_read_bytes_total", "counter", _SOURCE, "Bytes that reads brought.", _sources("bytes")),
    Family(
        "erofsgen_source_failures_total", "counter", _SOURCE, "Reads that failed or took too long.",
        _sources("failed"),
    ),
    Family(
        "erofsgen_source_absent_total", "counter", _SOURCE, "Reads of packs that the source does not have.",
        _sources("absent"),
    ),
    Family(
        "erofsgen_source_bad_frames_total", "counter", _SOURCE, "Frames that were not what their digest says.",
        _sources("bad_frames"),
    ),
    Family(
        "erofsgen_source_hedges_total", "counter", _SOURCE, "Its demands that were slow and asked for twice.",
        _sources("hedges"),
    ),
    Family(
        "erofsgen_source_hedges_won_total", "counter", _SOURCE, "Those of them where the second answer came first.",
        _sources("hedges_won"),
    ),
    Family(
        "erofsgen_source_state", "gauge", (*_SOURCE, "state"),
        "1 for the state that the source is in: ok, resting (it failed), full (as many reads as may be).", _states,
    ),
    Family(
        "erofsgen_source_rest_seconds", "gauge", _SOURCE, "How long a source rests yet before it is tried again.",
        _sources("rests"),
    ),
    Family(
        "erofsgen_source_demand_seconds", "histogram", _SOURCE, "How long reads took that somebody waited for.",
        _sources("seconds"),
    ),
    # --- the supervisor and its mounts
    Family(
        "erofsgen_supervisor_up", "gauge", (), "Whether the supervisor answers.",
        lambda facts: [((), float(bool(facts.supervisor)))],
    ),
    Family("erofsgen_waiting_reads", "gauge", (), "Reads that wait for the worker.", _supervisor("waiting")),
    Family("erofsgen_denied_reads_total", "counter", (), "Reads that ended in an error.", _supervisor("denied")),
    Family(
        "erofsgen_worker_restarts_total", "counter", (), "Workers that died and were replaced.",
        _supervisor("worker_restarts"),
    ),
    Family("erofsgen_recordings", "gauge", (), "Mounts whose touches are recorded.", _supervisor("recordings")),
    Family(
        "erofsgen_marked_packs", "gauge", (), "Packs watched for reads of what is missing (fanotify).",
        _supervisor("marked_packs"),
    ),
    Family(
        "erofsgen_open_objects", "gauge", (), "Objects that the kernel has open (fscache).",
        _supervisor("open_objects"),
    ),
    Family(
        "erofsgen_culled_objects_total", "counter", (), "Objects removed to make room (fscache).",
        _supervisor("culled_objects"),
    ),
    Family(
        "erofsgen_fuse_servers", "gauge", (), "Servers of mounts that are connected (blockfuse, fuse).",
        _supervisor("servers"),
    ),
    Family("erofsgen_mounts", "gauge", ("plane",), "Lazy mounts.", _mounted),
    Family(
        "erofsgen_mount_touches_total", "counter", ("image",), "Reads that the plane was told of.", _images("touches")
    ),
    Family(
        "erofsgen_mount_touched_bytes_total", "counter", ("image",), "Bytes of these reads.",
        _images("touched_bytes"),
    ),
    Family(
        "erofsgen_mount_misses_total", "counter", ("image",), "Those of them that had to wait for bytes.",
        _images("misses"),
    ),
    Family(
        "erofsgen_mount_missed_bytes_total", "counter", ("image",), "Bytes of the reads that had to wait.",
        _images("missed_bytes"),
    ),
    Family(
        "erofsgen_mount_waited_seconds_total", "counter", ("image",), "How long readers waited for bytes.",
        _images("waited"),
    ),
    # --- the host cache
    Family("erofsgen_cache_used_bytes", "gauge", (), "What the host cache takes on disk.", _cache("used")),
    Family("erofsgen_cache_limit_bytes", "gauge", (), "What it may take; absent without a limit.", _cache("limit")),
    Family("erofsgen_cache_images", "gauge", (), "Images in the host cache.", _cache("images")),
    Family("erofsgen_cache_packs", "gauge", (), "Packs of which the host cache may have frames.", _cache("packs")),
    # --- prefetch
    Family(
        "erofsgen_prefetch_frames_total", "counter", ("reason",), "Frames prefetched, counted when a recording ends.",
        _prefetch("frames"),
    ),
    Family(
        "erofsgen_prefetch_bytes_total", "counter", ("reason",), "Bytes of devices in them.",
        _prefetch("bytes"),
    ),
    Family(
        "erofsgen_prefetch_used_bytes_total", "counter", ("reason",),
        "Bytes of them that were read.",
        _prefetch("used_bytes"),
    ),
    Family(
        "erofsgen_prefetch_wasted_bytes_total", "counter", ("reason",), "Bytes of them that nobody was seen to read.",
        _prefetch("judged_bytes", "used_bytes"),
    ),
    Family("erofsgen_prefetch_pending_bytes", "gauge", (), "Bytes that are still to be prefetched.", _pending),
    # --- processes
    Family(
        "erofsgen_process_resident_memory_bytes", "gauge", ("process",), "Memory of supervisor, standby and worker.",
        _processes("memory"),
    ),
    Family(
        "erofsgen_process_cpu_seconds_total", "counter", ("process",), "Processor time of user and system.",
        _processes("cpu"),
    ),
    Family("erofsgen_process_open_fds", "gauge", ("process",), "Open files.", _processes("descriptors")),
    Family(
        "erofsgen_process_start_time_seconds", "gauge", ("process",), "When it started, since 1970.",
        _processes("started"),
    ),
)  # fmt: skip
"""In the order they are served."""
