"""Batches in worker processes: what they build, leave alone, try again and give up on."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from contextlib import suppress
from pathlib import Path

import pytest
from batchkit import descendants, layer, write_layout
from servers import faulty_registry, status

from erofsgen.build.batch import run_batch
from erofsgen.build.job import Job, Outcome, build_one
from erofsgen.build.options import BuildOptions
from erofsgen.build.pipeline import build_image
from erofsgen.build.processes import ProcessPool
from erofsgen.oci.images import open_image
from erofsgen.store.check import check
from erofsgen.store.directory import DirectoryStore
from erofsgen.store.image import Image

pytestmark = [pytest.mark.server, pytest.mark.timeout(60)]


@pytest.fixture
def registry():
    """A registry with the images ``one`` and ``two``, which share a layer."""
    with faulty_registry() as registry:
        for tag in ("one", "two"):
            registry.add_image(layer("base"), layer(tag), tag=tag)
        yield registry


@pytest.fixture(scope="module")
def lasting_pool():
    """Workers that are still warm from the test before. Kill none!"""
    with ProcessPool() as pool:
        yield pool


@pytest.fixture
def job(registry, store_dir):
    """job(tag, **more) -> the job to build that image of the registry"""

    def make(tag: str, **more) -> Job:
        image = f"docker://{registry.host}/team/app:{tag}"
        return Job(**{"image": image, "name": tag, "store": str(store_dir), "options": BuildOptions(threads=1), **more})

    return make


@pytest.fixture
def batch(job, lasting_pool):
    """batch(tag, …, at_once=1, **options) -> outcomes, of images of the registry in worker processes"""

    def run(*tags: str, at_once: int = 1, pool: ProcessPool = lasting_pool, **options) -> list[Outcome]:
        return run_batch([job(tag) for tag in tags], pool, at_once=at_once, pause=0.01, **options)

    return run


def names(store_dir) -> set[str]:
    return set(DirectoryStore(store_dir).references())


def summary(outcomes: list[Outcome]) -> list[tuple[str, str, int]]:
    return [(outcome.name, outcome.status, outcome.attempts) for outcome in outcomes]


def layers_asked_for(registry) -> int:
    blobs = [request.path.rpartition("/")[2] for request in registry.seen("/blobs/")]
    return sum(len(registry.blobs[blob]) > 1000 for blob in blobs)


# --- what is built ---------------------------------------------------------------------------------------------------


def test_three_workers_make_what_one_build_after_another_makes(tmp_path, lasting_pool):
    """Six images, of which each shares a layer with all others and one with half of them."""
    for number in range(6):
        write_layout(tmp_path / str(number), layer("base"), layer(f"half-{number % 2}"), layer(f"own-{number}"))
    images = [f"oci:{tmp_path / str(number)}:latest" for number in range(6)]

    jobs = [Job(image=image, name=image[-8:-7], store=str(tmp_path / "many")) for image in images]
    outcomes = run_batch(jobs, lasting_pool, at_once=3)
    assert [(outcome.image, outcome.status) for outcome in outcomes] == [(image, "built") for image in images]

    alone = DirectoryStore(tmp_path / "alone")
    for image, outcome in zip(images, outcomes, strict=True):
        with open_image(image) as source:
            assert build_image(source, alone, tag=outcome.name).digest == outcome.digest
    many = DirectoryStore(tmp_path / "many")
    assert many.references() == alone.references()
    report = check(many)
    assert (report.problems, report.images) == ([], 6)


def test_a_second_run_downloads_nothing(batch, registry, store_dir):
    first = batch("one", "two", at_once=2)
    assert [outcome.status for outcome in first] == ["built", "built"]
    assert layers_asked_for(registry) >= 3
    registry.requests.clear()
    second = batch("one", "two", at_once=2)
    assert summary(second) == [("one", "unchanged", 1), ("two", "unchanged", 1)]
    assert [outcome.digest for outcome in second] == [outcome.digest for outcome in first]
    assert len(registry.seen("/manifests/")) == 2
    assert layers_asked_for(registry) == 0


def test_what_makes_an_image_another_one_is_built(job, registry):
    def again(**more) -> str:
        return build_one(job("one", **more)).status

    assert again() == "built"
    assert again() == "unchanged"
    assert again(force=True) == "built"
    for options in (
        BuildOptions(chunk_size=64 << 10),
        BuildOptions(chunk_size=64 << 10, compression_level=9),
        BuildOptions(chunk_size=64 << 10, compression_level=9, share_pages=True),
    ):
        assert again(options=options) == "built"
        assert again(options=options) == "unchanged"
    assert again() == "built"
    registry.add_image(layer("newer"), tag="one")
    assert again() == "built"
    assert again() == "unchanged"


@pytest.mark.parametrize("which", ["manifest", "config", "index", "pack"])
def test_what_is_missing_is_built_again(job, store_dir, which):
    build_one(job("one"))
    store = DirectoryStore(store_dir)
    image = Image.open(store, "one")
    blobs = {
        "manifest": image.digest,
        "config": image.manifest.config.digest,
        "index": image.index_descriptor.digest,
        "pack": image.packs[0].digest,
    }
    store.delete(blobs[which])
    assert build_one(job("one")).status == "built"
    assert check(store).problems == []


def test_images_without_a_manifest_are_always_built(tmp_path, job):
    (tmp_path / "one.tar").write_bytes(layer("one"))
    outcomes = [build_one(job("one", image=f"tar:{tmp_path / 'one.tar'}")) for _ in range(2)]
    assert [outcome.status for outcome in outcomes] == ["built", "built"]
    assert outcomes[0].digest == outcomes[1].digest


# --- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("failures", "expected"), [(2, ("built", 3)), (3, ("failed", 3))])
def test_what_may_pass_is_tried_again(batch, registry, failures, expected):
    registry.fault("/manifests/one", status(403), times=failures)
    (outcome,) = batch("one")
    assert (outcome.status, outcome.attempts) == expected
    assert len(registry.seen("/manifests/one")) == 3
    assert (outcome.error is None) == (expected[0] == "built")


def test_no_retries(batch, registry):
    registry.fault("/manifests/one", status(403))
    (outcome,) = batch("one", retries=0)
    assert (outcome.status, outcome.attempts, outcome.error.exit_code) == ("failed", 1, 6)


def test_what_cannot_pass_is_not_tried_again_and_stops_nobody(batch, registry, store_dir):
    outcomes = batch("missing", "one")
    assert summary(outcomes) == [("missing", "failed", 1), ("one", "built", 1)]
    assert outcomes[0].error.exit_code == 3
    assert outcomes[0].error.traceback is None
    assert names(store_dir) == {"one"}


def test_failing_fast(batch, registry, store_dir):
    assert summary(batch("missing", "one", fail_fast=True)) == [("missing", "failed", 1)]
    assert names(store_dir) == set()


def test_a_traceback_where_it_is_asked_for(job):
    assert "NotFoundError" in build_one(job("missing", trace=True)).error.traceback


# --- workers that die ------------------------------------------------------------------------------------------------


@pytest.fixture
def own_pool(lasting_pool):
    before = set(multiprocessing.active_children())
    with ProcessPool() as pool:
        yield pool
    assert set(multiprocessing.active_children()) <= before


@pytest.fixture
def kill_first(own_pool):
    """Kills the worker of the own pool that was started first of those that are left; an action of the registry's."""
    before = set(descendants(os.getpid()))

    def kill(handler=None) -> None:
        first = next(pid for pid in descendants(os.getpid()) if pid not in before and is_worker(pid))
        os.kill(first, signal.SIGKILL)
        with suppress(ChildProcessError):  # the pool was faster
            os.waitid(os.P_PID, first, os.WEXITED | os.WNOWAIT)

    return kill


def is_worker(pid: int) -> bool:
    """Multiprocessing has another process beside them, which counts semaphores."""
    return b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()


def blob_of(registry, tag: str) -> str:
    """What a request for the image's own layer looks like."""
    return next(digest for digest, data in registry.blobs.items() if data == layer(tag)).removeprefix("sha256:")


def test_a_worker_that_is_killed_in_a_build_is_replaced(batch, registry, store_dir, own_pool, kill_first):
    registry.fault(blob_of(registry, "one"), kill_first)
    assert summary(batch("one", "two", pool=own_pool)) == [("one", "built", 2), ("two", "built", 1)]
    assert check(DirectoryStore(store_dir)).problems == []


def test_a_worker_that_is_killed_between_two_builds_is_replaced(batch, own_pool, kill_first):
    batch("one", pool=own_pool)
    kill_first()
    assert summary(batch("two", pool=own_pool)) == [("two", "built", 1)]


def test_an_image_that_kills_every_worker_fails_alone(batch, registry, store_dir, own_pool, kill_first):
    registry.fault(blob_of(registry, "one"), kill_first, times=99)
    one, two = batch("one", "two", pool=own_pool)
    assert (one.status, one.attempts) == ("failed", 3)
    assert "killed by SIGKILL" in one.error.message
    assert (two.status, two.attempts) == ("built", 1)
    assert names(store_dir) == {"two"}


def test_a_death_costs_nobody_else_an_attempt(batch, registry, own_pool, kill_first):
    """The second image is on its way while the first one's worker dies."""
    under_way, dead = threading.Event(), threading.Event()

    def die(handler) -> None:
        assert under_way.wait(20)
        kill_first()
        dead.set()

    def dawdle(handler) -> None:
        under_way.set()
        assert dead.wait(20)
        handler.behave()

    registry.fault(blob_of(registry, "one"), die)
    registry.fault(blob_of(registry, "two"), dawdle)
    assert summary(batch("one", "two", at_once=2, pool=own_pool)) == [("one", "built", 2), ("two", "built", 1)]


def test_leaving_early_ends_the_workers(batch, registry, store_dir):
    """Ctrl-C while a layer is on its way; later, the batch goes on where it was."""
    before = set(multiprocessing.active_children())
    loop = threading.main_thread().ident
    registry.fault(blob_of(registry, "two"), lambda handler: signal.pthread_kill(loop, signal.SIGINT))
    with pytest.raises(KeyboardInterrupt), ProcessPool() as pool:
        batch("one", "two", pool=pool)
    assert set(multiprocessing.active_children()) <= before
    assert names(store_dir) == {"one"}
    assert list((store_dir / "erofsgen" / "tmp").iterdir()) == []
    assert summary(batch("one", "two")) == [("one", "unchanged", 1), ("two", "built", 1)]
