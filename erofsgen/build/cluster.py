"""Runs jobs on a Ray cluster: an existing one, or one that is started on this machine and lasts as long as the batch.

Ray lets whoever reaches its ports run code. The one started here listens on loopback only and asks for a token that
nobody else knows; of an existing one its owner has to take care.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import sys
import tempfile
from contextlib import ExitStack, redirect_stdout
from typing import Any, Final, Self

from erofsgen.build.job import MEMORY_HINT, Failure, Job, Outcome, build_one
from erofsgen.errors import ErofsgenError, RemoteError, UnsupportedError, explain
from erofsgen.oci.reference import is_loopback
from erofsgen.progress import Task

LOCAL: Final = "local"
"""The address that means a cluster of this machine's own."""

_CONNECT_TIMEOUT: Final = 10.0

_OWN: Final = {
    # Ray's switch for systems where it supports one machine only. It then listens on 127.0.0.1, which
    # _node_ip_address does not achieve on Linux: that is replaced by an address others can reach.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_AUTH_MODE": "token",
}


class RayCluster:
    """An :class:`~erofsgen.build.batch.Executor` on the cluster at ``address``, as ``ray.init`` takes it.

    Its machines need this package, the images' paths, the store and the credentials where this one has them.
    """

    def __init__(self, address: str = LOCAL) -> None:
        self._address = address
        self._running: dict[Any, Job] = {}

    def __enter__(self) -> Self:
        """Raises UnsupportedError (Ray is not installed), RemoteError (no such cluster)."""
        with ExitStack() as stack:
            self._start(stack)
            self._stack = stack.pop_all()
        return self

    def _start(self, stack: ExitStack) -> None:
        _set(stack, "RAY_USAGE_STATS_ENABLED", "0")
        options: dict[str, Any] = {}
        if self._address == LOCAL:
            for name, value in {**_OWN, "RAY_AUTH_TOKEN": secrets.token_hex(32)}.items():
                _set(stack, name, value)
            place = tempfile.TemporaryDirectory(prefix="erofsgen-ray-", ignore_cleanup_errors=True)
            options = {
                "num_cpus": len(os.sched_getaffinity(0)),
                "include_dashboard": False,
                "_temp_dir": os.path.join(stack.enter_context(place), "ray"),  # which Ray opens to everybody
            }
        try:
            import ray  # after the environment: Ray reads some of it when it is imported
        except ImportError:
            raise UnsupportedError("Ray is not installed", hint="pip install 'erofsgen[cluster]'") from None
        self._ray: Any = ray
        stack.enter_context(redirect_stdout(sys.stderr))  # Ray writes there about workers that died
        stack.callback(ray.shutdown)
        handler = signal.getsignal(signal.SIGTERM)
        try:
            _reach(self._address)
            ray.init(self._address, log_to_driver=False, configure_logging=False, **options)
        except (OSError, RuntimeError, ValueError, ImportError, ray.exceptions.RayError) as error:
            raise RemoteError(f"no Ray cluster at {self._address}: {error}", hint="see `ray status`") from error
        finally:
            signal.signal(signal.SIGTERM, handler)  # Ray takes it

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    @property
    def cores(self) -> int:
        return max(int(self._ray.cluster_resources().get("CPU", 0)), 1)

    def submit(self, job: Job, task: Task) -> None:  # noqa: ARG002  (how far a job is stays on its machine)
        most = max((node["Resources"].get("CPU", 0) for node in self._ray.nodes()), default=1)
        threads = min(job.options.worker_threads, most)  # more than any machine has would wait forever
        remote = self._ray.remote(num_cpus=threads, max_retries=0)(build_one)
        self._running[remote.remote(job)] = job

    def wait(self, timeout: float | None) -> list[tuple[Job, Outcome]]:
        done, _ = self._ray.wait(list(self._running), timeout=timeout)
        return [(job := self._running.pop(reference), self._outcome(job, reference)) for reference in done]

    def _outcome(self, job: Job, reference: Any) -> Outcome:  # noqa: ANN401  (Ray's)
        exceptions = self._ray.exceptions
        try:
            outcome = self._ray.get(reference)
            assert isinstance(outcome, Outcome)
        except exceptions.RayTaskError as error:  # build_one could not even be called
            message, hint, code = explain(error.cause)
            failure = Failure(message, hint, code, may_pass=False)
        except exceptions.RayError as error:
            message = str(error).partition("\n")[0]
            failure = Failure(message, MEMORY_HINT, ErofsgenError.exit_code, may_pass=True)
        else:
            return outcome
        return Outcome(job.image, job.name, "failed", error=failure)


def _reach(address: str) -> None:
    """Raises OSError where nobody listens at ``[ray://]HOST:PORT``: Ray would go on trying for minutes.

    Without ``ray://``, Ray takes loopback to mean another address of this machine, which it has to find itself.
    """
    place = address.removeprefix("ray://")
    host, _, port = place.rpartition(":")
    if port.isdigit() and (place != address or not is_loopback(place)):
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_TIMEOUT).close()


def _set(stack: ExitStack, name: str, value: str) -> None:
    """Set a variable of the environment, until the stack is left."""
    before = os.environ.get(name)
    os.environ[name] = value
    if before is None:
        stack.callback(os.environ.pop, name)
    else:
        stack.callback(os.environ.__setitem__, name, before)
