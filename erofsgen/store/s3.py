"""Stores in S3, or in what speaks its protocol.

::

    s3://BUCKET[/PREFIX][?OPTION=VALUE[&…]]

    endpoint=URL            the service, where it is not AWS
    region=NAME             the bucket's
    profile=NAME            of ~/.aws/config and ~/.aws/credentials
    path-style=true|false   the bucket's name in the path, not in the host's name
    anonymous=true          no credentials
    sse=AES256|aws:kms[:KEY]   how the service encrypts what is written
    requester-pays=true     this account pays for requests
    client=http|boto3       who reads ranges, see below
    source-address=IP[,IP]  addresses of this machine that connections for ranges come from, in turn

What is not given comes from boto3's own configuration: AWS_* variables, the profile, the machine's role.

boto3 makes all requests but one: ranges are read over :class:`~erofsgen.store.transport.Transport` from presigned URLs.
A range is no part of what is signed, so one URL serves all ranges of a blob for an hour. ``client=boto3`` reads them
with boto3, too.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Callable, Iterable
from functools import partial
from typing import IO, Any, Final, TypeVar

from botocore.exceptions import BotoCoreError, ClientError

from erofsgen.errors import IntegrityError, RemoteError, UsageError
from erofsgen.oci.patience import Policy, Transient, patiently, printable
from erofsgen.oci.tls import tls_context
from erofsgen.store.base import Speed, scratch
from erofsgen.store.locks import Times
from erofsgen.store.objects import Object, Objects, ObjectStore
from erofsgen.store.open import Options
from erofsgen.store.s3client import S3Client, Settings
from erofsgen.store.s3errors import code_of, refused, status_of, translated
from erofsgen.store.transport import Location, Refusal, Transport, s3_error

T = TypeVar("T")

_KEY: Final = 1024
"""Bytes of a key at most, whoever serves it."""
_PART: Final = 16 << 20
_UPLOADS: Final = 8
"""Parts of a blob on their way at a time."""
_BUCKET: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}", re.ASCII)


def parse(place: str, options: Options) -> Settings:
    """The settings of ``s3://BUCKET[/PREFIX]`` with options. Raises UsageError."""
    bucket, _, prefix = place.removeprefix("s3://").partition("/")
    if not _BUCKET.fullmatch(bucket):
        raise UsageError(f"{place}: not the name of a bucket: {bucket!r}", hint="write s3://BUCKET/PREFIX")
    path_style = options.text("path-style")
    if path_style not in (None, "true", "false"):
        raise UsageError(f"{place}: path-style is true or false, not {path_style!r}")
    encryption = options.text("sse")
    if encryption is not None and not re.fullmatch(r"AES256|aws:kms(:.+)?", encryption):
        raise UsageError(f"{place}: sse is AES256, aws:kms or aws:kms:KEY, not {encryption!r}")
    client = options.text("client") or "http"
    if client not in ("http", "boto3"):
        raise UsageError(f"{place}: client is http or boto3, not {client!r}")
    return Settings(
        bucket=bucket,
        prefix=f"{prefix.strip('/')}/" if prefix.strip("/") else "",
        endpoint=options.text("endpoint"),
        region=options.text("region"),
        profile=options.text("profile"),
        path_style=None if path_style is None else path_style == "true",
        anonymous=options.flag("anonymous"),
        encryption=encryption,
        requester_pays=options.flag("requester-pays"),
        client=client,
        sources=tuple(filter(None, (options.text("source-address") or "").split(","))),
    )


def open_s3(
    place: str,
    options: Options,
    *,
    policy: Policy,
    create: bool = False,
    proxy: str | None = None,
    times: Times | None = None,
) -> ObjectStore:
    """The store at ``place``; ``create`` makes the bucket where it is missing. ``proxy``: for reads of ranges.

    Raises UsageError, RemoteError.
    """
    settings = parse(place, options)
    objects = S3Objects(settings, policy=policy, proxy=proxy)
    if create:
        objects.make_bucket()
    directory = scratch(f"{objects.endpoint}/{settings.bucket}/{settings.prefix}")
    return ObjectStore(place, objects, directory, times=times)


class S3Objects(Objects):
    """The objects of a bucket whose keys begin with a prefix."""

    def __init__(self, settings: Settings, *, policy: Policy, proxy: str | None = None) -> None:
        self._settings = settings
        self._policy = policy
        self.key_limit = _KEY - len(settings.prefix.encode())
        self._payer = {"RequestPayer": "requester"} if settings.requester_pays else {}
        self._encryption = _encryption(settings.encryption)
        self._client = S3Client(settings, policy)
        self.endpoint = self._client.endpoint
        tls = _tls(self._client.ca_bundle) if self.endpoint.startswith("https:") else None
        self._transport = Transport(policy=policy, tls=tls, proxy=proxy, sources=settings.sources)

    @property
    def speed(self) -> Speed | None:  # type: ignore[override]
        return self._transport.speed

    def make_bucket(self) -> None:
        """Make the bucket where it is missing. Raises RemoteError."""

        def make(s3: Any) -> None:  # noqa: ANN401  (boto3's clients have no types)
            bucket = self._settings.bucket
            try:
                s3.head_bucket(Bucket=bucket)
            except ClientError as error:
                if status_of(error) != 404:
                    return  # it is there; who may not look may write yet
                region = s3.meta.region_name
                elsewhere = ".amazonaws.com" in self.endpoint and region != "us-east-1"
                place = {"CreateBucketConfiguration": {"LocationConstraint": region}} if elsewhere else {}
                try:
                    s3.create_bucket(Bucket=bucket, **place)
                except ClientError as failed:
                    if code_of(failed) != "BucketAlreadyOwnedByYou":  # somebody was quicker
                        raise

        self._ask("", make)

    def get(self, key: str, limit: int) -> bytes | None:
        def read(s3: Any) -> bytes | None:  # noqa: ANN401
            try:
                answer = s3.get_object(**self._named(key))
            except ClientError as error:
                # what is not there is denied to those who may not list
                if code_of(error) in ("NoSuchKey", "AccessDenied"):
                    return None
                raise
            with answer["Body"] as body:
                data: bytes = body.read(limit + 1)
                return data

        data = self._ask(key, read)
        if data is not None and len(data) > limit:
            raise RemoteError(f"{self._where(key)}: more than {limit} bytes")
        return data

    def size(self, key: str) -> int | None:
        def head(s3: Any) -> int | None:  # noqa: ANN401
            try:
                return int(s3.head_object(**self._named(key))["ContentLength"])
            except ClientError as error:
                if status_of(error) == 404:
                    return None
                raise

        return self._ask(key, head)

    def put(self, key: str, data: bytes) -> None:
        self._ask(key, lambda s3: s3.put_object(**self._named(key), Body=data, **self._encryption))

    def put_file(self, key: str, file: IO[bytes], size: int) -> None:
        if size <= _PART:
            self.put(key, file.read())
            return
        from boto3.s3.transfer import TransferConfig, create_transfer_manager  # which hosts do without

        place, begin = self._place(key), file.tell()
        config = TransferConfig(
            multipart_threshold=_PART,
            multipart_chunksize=_PART,
            max_concurrency=_UPLOADS,
            preferred_transfer_client="classic",
        )

        def upload(s3: Any) -> None:  # noqa: ANN401
            file.seek(begin)
            with create_transfer_manager(s3, config) as manager:
                extra = {**self._payer, **self._encryption}
                manager.upload(file, place["Bucket"], place["Key"], extra_args=extra).result()

        self._ask(key, upload)

    def list(self, prefix: str) -> Iterable[Object]:
        skip = len(self._settings.prefix)
        return self._ask(
            prefix,
            lambda s3: [
                Object(found["Key"][skip:], found["Size"], found["LastModified"].timestamp())
                for page in s3.get_paginator("list_objects_v2").paginate(**self._below(prefix))
                for found in page.get("Contents", ())
            ],
        )

    def delete(self, key: str) -> None:
        self._ask(key, lambda s3: s3.delete_object(**self._named(key)))

    def sweep(self, prefix: str) -> None:
        """Abort uploads in parts: their parts are kept, and paid for, until somebody does."""

        def abort(s3: Any) -> None:  # noqa: ANN401
            pages = list(s3.get_paginator("list_multipart_uploads").paginate(**self._below(prefix)))
            for upload in [upload for page in pages for upload in page.get("Uploads", ())]:
                s3.abort_multipart_upload(
                    Bucket=self._settings.bucket, Key=upload["Key"], UploadId=upload["UploadId"], **self._payer
                )

        self._ask(prefix, abort)

    def doubt(self) -> None:
        self._transport.doubt()

    def close(self) -> None:
        self._transport.close()
        self._client.close()

    # --- ranges ------------------------------------------------------------------------------------------------------

    def read_into(self, key: str, offset: int, buffer: memoryview, what: str) -> None:
        if self._settings.client == "http":
            self._transport.read_into(lambda refusal: self._locate(key, refusal), offset, buffer, what)
        elif len(buffer):
            attempt = partial(self._read_with_boto3, key, offset, buffer, what)
            patiently(self._policy, self._transport.stop, attempt)

    def _read_with_boto3(self, key: str, offset: int, buffer: memoryview, what: str) -> None:
        where, end = self._where(what), offset + len(buffer)

        def get(s3: Any) -> Any:  # noqa: ANN401
            try:
                return s3.get_object(**self._named(key), Range=f"bytes={offset}-{end - 1}")
            except ClientError as error:
                if code_of(error) == "InvalidRange":
                    raise IntegrityError(f"{where} ends before byte {end}") from error
                raise

        answer = self._ask(what, get)
        with answer["Body"] as body:
            if not answer.get("ContentRange", "").startswith(f"bytes {offset}-"):
                raise RemoteError(f"{where}: the service answers with another range")
            if answer["ContentLength"] != len(buffer):
                raise IntegrityError(f"{where}: {answer['ContentLength']} bytes at {offset}, {len(buffer)} expected")
            done = 0
            try:
                while done < len(buffer) and (count := body.readinto(buffer[done:])):
                    done += count
            except BotoCoreError as error:
                raise Transient(RemoteError(f"{where}: {printable(str(error))}")) from error
        if done < len(buffer):
            raise Transient(RemoteError(f"{where} ended after {done} of {len(buffer)} bytes"))

    def _locate(self, key: str, refusal: Refusal | None) -> Location:
        """A URL for an object; with a refusal, one that is signed anew."""
        if refusal is not None:
            code, message = s3_error(refusal.body)
            if self._settings.anonymous or code in ("NoSuchBucket", "RequestTimeTooSkewed"):
                raise refused(self._where(key), refusal.status, code, message)
            self._client.renew()
        with translated(self._where(key)):
            url = self._client.url(key, self._named(key), anew=refusal is not None)
        return Location(url, {"x-amz-request-payer": "requester"} if self._payer else {})  # signed as a header

    # --- requests ----------------------------------------------------------------------------------------------------

    def _ask(self, what: str, request: Callable[[Any], T]) -> T:
        with translated(self._where(what)):
            return self._client.ask(request)

    def _where(self, what: str) -> str:
        return f"{self._settings.where}: {what}" if what else self._settings.where

    def _place(self, key: str) -> dict[str, str]:
        return {"Bucket": self._settings.bucket, "Key": self._settings.prefix + key}

    def _named(self, key: str) -> dict[str, str]:
        return {**self._place(key), **self._payer}

    def _below(self, prefix: str) -> dict[str, str]:
        return {"Bucket": self._settings.bucket, "Prefix": self._settings.prefix + prefix, **self._payer}


def _encryption(option: str | None) -> dict[str, str]:
    if option is None or option == "AES256":
        return {} if option is None else {"ServerSideEncryption": "AES256"}
    key = option.removeprefix("aws:kms").removeprefix(":")
    return {"ServerSideEncryption": "aws:kms", **({"SSEKMSKeyId": key} if key else {})}


def _tls(bundle: str | None) -> ssl.SSLContext:
    """Whom TLS trusts: what boto3 was told to trust, or whom the rest of this program does."""
    context = tls_context(None, verify=True)
    if bundle:
        context.load_verify_locations(bundle)
    return context
