"""Clients of S3 that a lazy mount is compared with: each reads a whole object and throws it away."""

from __future__ import annotations

import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from erofsgen.store.base import Store
from erofsgen.store.transport import Location, Transport

MIB = 1 << 20
_PART = 8 * MIB

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))  # its servers


class Place(NamedTuple):
    """An object of an S3 service. ``server``: what ``tests/servers`` knows of it."""

    server: Any
    bucket: str
    key: str
    size: int

    @property
    def url(self) -> str:
        """Lets who has it read the object for an hour."""
        parameters = {"Bucket": self.bucket, "Key": self.key}
        signed: str = self.server.client().generate_presigned_url("get_object", Params=parameters, ExpiresIn=3600)
        return signed


@contextmanager
def s3_service(place: Path) -> Iterator[Any]:
    """Ceph's gateway on loopback, with its files below ``place`` and its objects in memory."""
    from servers.ceph import ceph_rgw

    with ceph_rgw(place) as server:
        yield server


def curl(place: Place, connections: int, part: int = _PART) -> None:
    """curl with as many transfers at a time, each of a range of ``part`` bytes."""
    url = place.url
    ranges = [f"{start}-{min(start + part, place.size) - 1}" for start in range(0, place.size, part)]
    transfers = "\nnext\n".join(f'url = "{url}"\nrange = "{wanted}"\noutput = "/dev/null"' for wanted in ranges)
    options = ["--silent", "--fail", "--parallel", "--parallel-immediate", f"--parallel-max={connections}"]
    command = ["curl", "--no-progress-meter", *(word for option in options for word in option.split("=")), "-K", "-"]
    subprocess.run(command, input=transfers.encode(), check=True)


def crt(place: Place) -> Callable[[], None] | None:
    """awscrt, which opens as many connections as it likes; None where it is not installed."""
    try:
        from awscrt.auth import AwsCredentialsProvider
        from awscrt.http import HttpHeaders, HttpRequest
        from awscrt.io import ClientBootstrap, DefaultHostResolver, EventLoopGroup
        from awscrt.s3 import S3Client, S3RequestTlsMode, S3RequestType, create_default_s3_signing_config
    except ImportError:
        return None
    server = place.server
    loops = EventLoopGroup()
    client = S3Client(
        bootstrap=ClientBootstrap(loops, DefaultHostResolver(loops)),
        region=server.region,
        tls_mode=S3RequestTlsMode.DISABLED,
        part_size=_PART,
        throughput_target_gbps=10,
        signing_config=create_default_s3_signing_config(
            region=server.region,
            credential_provider=AwsCredentialsProvider.new_static(server.access_key, server.secret_key),
        ),
    )

    def read() -> None:
        headers = HttpHeaders([("host", urlsplit(server.endpoint).netloc)])
        request = HttpRequest("GET", f"/{place.bucket}/{place.key}", headers)
        done = client.make_request(request=request, type=S3RequestType.GET_OBJECT, recv_filepath="/dev/null")
        done.finished_future.result(300)

    return read


def boto3_stream(place: Place) -> None:
    """boto3, one request on one connection."""
    body = place.server.client().get_object(Bucket=place.bucket, Key=place.key)["Body"]
    while body.read(MIB):
        pass


def boto3_ranges(place: Place) -> None:
    """boto3, one connection, a request for each MiB: what a reader does that misses again and again."""
    client = place.server.client()
    for start in range(0, place.size, MIB):
        wanted = f"bytes={start}-{start + MIB - 1}"
        client.get_object(Bucket=place.bucket, Key=place.key, Range=wanted)["Body"].read()


# --- requests alone --------------------------------------------------------------------------------------------------

Get = Callable[[int, memoryview], None]
"""Fills a buffer with the object's bytes at an offset."""


def getters(place: Place, stores: dict[str, tuple[Store, str]]) -> dict[str, Get]:
    """What reads a range of the object, by name; ``stores``: ours, with the digest of the same bytes."""
    client = place.server.client()

    def boto3_get(offset: int, buffer: memoryview) -> None:
        wanted = f"bytes={offset}-{offset + len(buffer) - 1}"
        buffer[:] = client.get_object(Bucket=place.bucket, Key=place.key, Range=wanted)["Body"].read()

    found: dict[str, Get] = {"boto3, alone": boto3_get}
    for name, (store, digest) in stores.items():
        found[name] = lambda offset, buffer, store=store, digest=digest: store.read_into(digest, offset, buffer)
    transport, url = Transport(), place.url
    location = Location(url)
    found["presigned URL, our transport alone"] = lambda offset, buffer: transport.read_into(
        lambda _: location, offset, buffer, "object"
    )
    urllib3_get = _urllib3(url)
    found["presigned URL, urllib3"] = urllib3_get
    try:
        from obstore import get_range
        from obstore.store import S3Store as Obstore
    except ImportError:
        return found
    server = place.server
    other = Obstore(
        place.bucket,
        endpoint=server.endpoint,
        access_key_id=server.access_key,
        secret_access_key=server.secret_key,
        region=server.region,
        virtual_hosted_style_request=False,
        client_options={"allow_http": True},
    )

    def obstore_get(offset: int, buffer: memoryview) -> None:
        buffer[:] = memoryview(get_range(other, place.key, start=offset, length=len(buffer)))

    found["obstore"] = obstore_get
    return found


def _urllib3(url: str) -> Get:
    import urllib3

    pool = urllib3.PoolManager(maxsize=64)

    def get(offset: int, buffer: memoryview) -> None:
        wanted = {"Range": f"bytes={offset}-{offset + len(buffer) - 1}", "Accept-Encoding": "identity"}
        response = pool.request("GET", url, headers=wanted, preload_content=False)
        buffer[:] = response.read()
        response.release_conn()

    return get


class Cost(NamedTuple):
    """Of one request: seconds of wall time with the others beside it, seconds of CPU of this process."""

    seconds: float
    cpu: float


def cost(get: Get, size: int, length: int, count: int, threads: int) -> Cost:
    """``count`` requests of ``length`` bytes by ``threads`` threads, all over an object of ``size`` bytes."""
    own = threading.local()

    def one(number: int) -> None:
        if not hasattr(own, "buffer"):
            own.buffer = memoryview(bytearray(length))
        get(number * 7919 * length % (size - length), own.buffer)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(one, range(threads)))  # connections are open now
        usage, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        list(pool.map(one, range(count)))
        seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime - usage.ru_utime + after.ru_stime - usage.ru_stime
    return Cost(seconds / count, cpu / count)
