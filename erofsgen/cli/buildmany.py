"""``erofsgen build-many``: a list of container images into the store."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from typing import TYPE_CHECKING, TextIO

import click

from erofsgen.cli.shared import Settings, build_options, chosen_options, verb

if TYPE_CHECKING:
    from erofsgen.build.batch import Executor
    from erofsgen.build.job import Outcome


@verb(json=True, name="build-many")
@click.argument("images", metavar="LIST", type=click.File(encoding="utf-8", errors="surrogateescape"))
@click.option("--jobs", type=click.IntRange(1), metavar="N", help="Images at the same time; default: one per core.")
@click.option(
    "--retries", type=click.IntRange(0), metavar="N", default=2, help="Further attempts where one may help; default: 2."
)
@click.option("--fail-fast", is_flag=True, help="Start nothing more once an image has failed.")
@click.option("--force", is_flag=True, help="Build images that are there already, too.")
@click.option(
    "--cluster",
    is_flag=False,
    flag_value="local",
    metavar="[ADDRESS]",
    help="Build on a Ray cluster (extra `cluster`); without ADDRESS, which must be behind LIST, on one of its own.",
)
@build_options
def command(
    settings: Settings,
    images: TextIO,
    jobs: int | None,
    retries: int,
    fail_fast: bool,
    force: bool,
    cluster: str | None,
    tls_verify: bool,
    authfile: str | None,
    **options: int | None,
) -> None:
    """Turn many container images into erofsgen images.

    LIST is a file, or - for standard input: one image per line, as `erofsgen build` takes it, and behind it perhaps
    tag=NAME and platform=OS/ARCH. Empty lines and what stands behind a # are left out.

    An image that was built from the same source with the same options is left alone: an interrupted batch goes on
    where it was, and one that is complete costs a look at each manifest.
    """
    import msgspec

    from erofsgen.build.batch import run_batch
    from erofsgen.build.job import Job
    from erofsgen.build.joblist import read_list
    from erofsgen.cli import output
    from erofsgen.store.open import absolute

    chosen = chosen_options(options)
    with closing(settings.open_store(create=True)) as store:  # what is wrong with it is said once
        requests = read_list(images, store, of=images.name)
    started = time.monotonic()
    with settings.progress() as progress, _executor(cluster) as executor:
        at_once = max(min(jobs or executor.cores, len(requests)), 1)
        threads = chosen.threads or max(executor.cores // at_once, 1)
        outcomes = run_batch(
            [
                Job(
                    image=request.image,
                    name=request.name,
                    platform=request.platform,
                    store=absolute(settings.store),
                    options=msgspec.structs.replace(chosen, threads=threads),
                    tls_verify=tls_verify,
                    authfile=os.path.abspath(authfile) if authfile else None,
                    force=force,
                    trace=settings.debug,
                )
                for request in requests
            ],
            executor,
            at_once=at_once,
            retries=retries,
            fail_fast=fail_fast,
            progress=progress,
        )
    if settings.json:
        output.document(outcomes)
    else:
        _print(outcomes, len(requests), time.monotonic() - started)
    _raise_failure(outcomes, len(requests))


def _executor(cluster: str | None) -> Executor:
    if cluster is None:
        from erofsgen.build.processes import ProcessPool

        return ProcessPool()
    from erofsgen.build.cluster import RayCluster

    return RayCluster(cluster)


def _print(outcomes: Sequence[Outcome], wanted: int, seconds: float) -> None:
    from erofsgen.cli import output

    done = [
        (output.printable(one.name), one.status, one.digest.removeprefix("sha256:")[:12], f"{one.seconds:.2f}")
        for one in outcomes
        if one.digest
    ]
    failed = [
        (output.printable(one.name), str(one.attempts), output.one_line(one.error.message), one.error.hint or "")
        for one in outcomes
        if one.error
    ]
    if done:
        output.table(["IMAGE", "STATUS", "DIGEST", "SECONDS"], done, right=(3,))
    if failed:
        output.table(["FAILED", "ATTEMPTS", "ERROR", "HINT"], failed, right=(1,))
    counts = Counter(outcome.status for outcome in outcomes)
    parts = [f"{counts[status]} {status}" for status in ("built", "unchanged", "failed")]
    if len(outcomes) < wanted:
        parts.append(f"{wanted - len(outcomes)} not started")
    output.line(f"{', '.join(parts)} in {seconds:.1f} s")


def _raise_failure(outcomes: Sequence[Outcome], wanted: int) -> None:
    """Raises an ErofsgenError where an image failed. Its exit code is theirs where all failed for the same reason."""
    from erofsgen.errors import ErofsgenError

    failures = [outcome.error for outcome in outcomes if outcome.error]
    for failure in failures:
        if failure.traceback:
            click.echo(failure.traceback, err=True)
    if failures:
        error = ErofsgenError(
            f"{len(failures)} of {wanted} images failed",
            hint="run the command again when the reasons are gone: it leaves alone what is built",
        )
        codes = {failure.exit_code for failure in failures}
        error.exit_code = codes.pop() if len(codes) == 1 else ErofsgenError.exit_code
        raise error
