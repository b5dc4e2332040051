"""One image of a batch: what is to be done, what became of it, and the function in between.

Jobs and outcomes are plain data, and :func:`build_one` needs nothing but the job: it may run in another process or on
another machine. A job that is run twice does no harm.
"""

from __future__ import annotations

import time
import traceback
from contextlib import closing
from typing import Final, Literal

import msgspec

from erofsgen.build.existing import existing
from erofsgen.build.options import BuildOptions
from erofsgen.build.pipeline import build_image
from erofsgen.errors import BusyError, RemoteError, explain
from erofsgen.oci.images import open_image
from erofsgen.progress import SILENT, Progress
from erofsgen.store.open import open_store

MEMORY_HINT: Final = "if memory ran out, use fewer --jobs"
"""For workers that died; the kernel does not say why it killed one."""

Status = Literal["built", "unchanged", "failed"]


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """An image to build.

    ``image``, ``platform``, ``tls_verify``, ``authfile``  as :func:`erofsgen.oci.images.open_image` takes them
    ``name``   of the result; no two jobs of a batch share one
    ``store``  URL; relative paths would mean another place elsewhere
    ``force``  build what is there already, too
    ``trace``  failures carry a traceback
    """

    image: str
    name: str
    store: str
    platform: str | None = None
    options: BuildOptions = BuildOptions()
    tls_verify: bool = True
    authfile: str | None = None
    force: bool = False
    trace: bool = False


class Failure(msgspec.Struct, frozen=True):
    """Why there is no image. ``may_pass``: trying again may help."""

    message: str
    hint: str | None
    exit_code: int
    may_pass: bool
    traceback: str | None = None


class Outcome(msgspec.Struct, frozen=True):
    """What became of a job. ``digest`` is the manifest's; ``seconds`` are the last attempt's."""

    image: str
    name: str
    status: Status
    digest: str | None = None
    seconds: float = 0.0
    attempts: int = 1
    error: Failure | None = None


def build_one(job: Job, progress: Progress = SILENT) -> Outcome:
    """Build the image, or find that it is there. Whatever goes wrong is in the outcome."""
    started = time.monotonic()
    digest = failure = None
    status: Status
    try:
        status, digest = _build(job, progress)
    except Exception as error:  # noqa: BLE001  (one image is no reason to stop the others)
        message, hint, exit_code = explain(error)
        trace = traceback.format_exc() if job.trace else None
        may_pass = exit_code in (RemoteError.exit_code, BusyError.exit_code)
        status, failure = "failed", Failure(message, hint, exit_code, may_pass, trace)
    return Outcome(job.image, job.name, status, digest, time.monotonic() - started, error=failure)


def _build(job: Job, progress: Progress) -> tuple[Status, str]:
    with (
        closing(open_store(job.store, create=True)) as store,
        open_image(
            job.image,
            platform=job.platform,
            tls_verify=job.tls_verify,
            authfile=job.authfile,
            downloads=store.downloads,
            progress=progress,
        ) as source,
    ):
        found = None if job.force else existing(source, store, job.name, job.options)
        if found is not None:
            return "unchanged", found
        return "built", build_image(source, store, tag=job.name, options=job.options, progress=progress).digest
