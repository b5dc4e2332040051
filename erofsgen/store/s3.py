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
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from typing import IO, Any, Final, NamedTuple

import boto3
import botocore.session
from boto3.s3.transfer import TransferConfig
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from erofsgen import __version__
from erofsgen.errors import IntegrityError, RemoteError, UsageError
from erofsgen.oci.patience import Patience, Policy, Transient, printable
from erofsgen.oci.tls import tls_context
from erofsgen.store.base import Speed, scratch
from erofsgen.store.objects import Object, Objects, ObjectStore
from erofsgen.store.open import Options
from erofsgen.store.s3errors import code_of, refused, status_of, translated
from erofsgen.store.transport import Location, Refusal, Transport

_VALID: Final = 3600
"""Seconds that a presigned URL is valid."""
_KEPT: Final = _VALID - 600.0
_URLS: Final = 4096
_PART: Final = 16 << 20
_CONNECTIONS: Final = 32
_RENEWAL: Final = 30.0
"""Seconds between two times that credentials which the service refuses are looked for anew."""
_ABSENT: Final = frozenset({"404", "NoSuchKey"})
_XML: Final = re.compile(r"<Code>([^<]*)</Code>.*?(?:<Message>([^<]*)</Message>|$)", re.DOTALL)
_BUCKET: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}", re.ASCII)


class Settings(NamedTuple):
    """What a store's URL says, see the module."""

    bucket: str
    prefix: str = ""
    endpoint: str | None = None
    region: str | None = None
    profile: str | None = None
    path_style: bool | None = None
    anonymous: bool = False
    encryption: str | None = None
    requester_pays: bool = False
    client: str = "http"
    sources: tuple[str, ...] = ()


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
    place: str, options: Options, *, policy: Policy, create: bool = False, proxy: str | None = None
) -> ObjectStore:
    """The store at ``place``; ``create`` makes the bucket where it is missing. ``proxy``: for reads of ranges.

    Raises UsageError, RemoteError.
    """
    settings = parse(place, options)
    objects = S3Objects(settings, policy=policy, proxy=proxy)
    if create:
        objects.make_bucket()
    return ObjectStore(place, objects, scratch(f"{objects.endpoint}/{settings.bucket}/{settings.prefix}"))


class S3Objects(Objects):
    """The objects of a bucket whose keys begin with a prefix."""

    def __init__(self, settings: Settings, *, policy: Policy, proxy: str | None = None) -> None:
        self._settings = settings
        self._policy = policy
        self._where = f"s3://{settings.bucket}"
        self._payer = {"RequestPayer": "requester"} if settings.requester_pays else {}
        self._encryption = _encryption(settings.encryption)
        self._lock = threading.Lock()
        self._urls: OrderedDict[str, tuple[str, str | None, float]] = OrderedDict()
        self._renewed = -_RENEWAL
        self._connect()
        bundle = self._session.get_config_variable("ca_bundle")
        self._transport = Transport(
            policy=policy, tls=_tls(bundle) if self.endpoint.startswith("https:") else None, proxy=proxy,
            sources=settings.sources,
        )  # fmt: skip

    @property
    def endpoint(self) -> str:
        """The service's URL."""
        return str(self._client.meta.endpoint_url)

    @property
    def speed(self) -> Speed | None:  # type: ignore[override]
        return self._transport.speed

    def make_bucket(self) -> None:
        """Make the bucket where it is missing. Raises RemoteError."""
        bucket = self._settings.bucket
        with translated(self._where):
            try:
                self._client.head_bucket(Bucket=bucket)
            except ClientError as error:
                if status_of(error) != 404:
                    return  # it is there; who may not look may write yet
                region = self._client.meta.region_name
                elsewhere = ".amazonaws.com" in self.endpoint and region != "us-east-1"
                place = {"CreateBucketConfiguration": {"LocationConstraint": region}} if elsewhere else {}
                try:
                    self._client.create_bucket(Bucket=bucket, **place)
                except ClientError as failed:
                    if code_of(failed) != "BucketAlreadyOwnedByYou":  # somebody was quicker
                        raise

    # --- objects -----------------------------------------------------------------------------------------------------

    def get(self, key: str, limit: int) -> bytes | None:
        where = f"{self._where}: {key}"
        with translated(where):
            try:
                answer = self._client.get_object(**self._object(key), **self._payer)
            except ClientError as error:
                # what is not there is denied to those who may not list
                if code_of(error) in ("NoSuchKey", "AccessDenied"):
                    return None
                raise
            with answer["Body"] as body:
                data: bytes = body.read(limit + 1)
        if len(data) > limit:
            raise RemoteError(f"{where}: more than {limit} bytes")
        return data

    def size(self, key: str) -> int | None:
        with translated(f"{self._where}: {key}"):
            try:
                return int(self._client.head_object(**self._object(key), **self._payer)["ContentLength"])
            except ClientError as error:
                if code_of(error) in _ABSENT:
                    return None
                raise

    def put(self, key: str, data: bytes) -> None:
        with translated(f"{self._where}: {key}"):
            self._client.put_object(**self._object(key), Body=data, **self._payer, **self._encryption)

    def put_file(self, key: str, file: IO[bytes], size: int) -> None:
        if size <= _PART:
            self.put(key, file.read())
            return
        config = TransferConfig(
            multipart_threshold=_PART, multipart_chunksize=_PART, max_concurrency=8, preferred_transfer_client="classic"
        )
        with translated(f"{self._where}: {key}"):
            self._client.upload_fileobj(
                file, **self._object(key), ExtraArgs={**self._payer, **self._encryption}, Config=config
            )

    def list(self, prefix: str) -> Iterator[Object]:
        skip = len(self._settings.prefix)
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self._settings.bucket, Prefix=self._settings.prefix + prefix, **self._payer
        )
        with translated(f"{self._where}: list of {prefix}"):
            for page in pages:
                for found in page.get("Contents", ()):
                    yield Object(found["Key"][skip:], found["Size"], found["LastModified"].timestamp())

    def delete(self, key: str) -> None:
        with translated(f"{self._where}: {key}"):
            self._client.delete_object(**self._object(key), **self._payer)

    def sweep(self, prefix: str) -> None:
        """Abort uploads in parts: their parts are kept, and paid for, until somebody does."""
        bucket = self._settings.bucket
        pages = self._client.get_paginator("list_multipart_uploads").paginate(
            Bucket=bucket, Prefix=self._settings.prefix + prefix, **self._payer
        )
        with translated(f"{self._where}: unfinished uploads"):
            for upload in [upload for page in pages for upload in page.get("Uploads", ())]:
                self._client.abort_multipart_upload(
                    Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"], **self._payer
                )

    def close(self) -> None:
        self._transport.close()
        self._client.close()

    # --- ranges ------------------------------------------------------------------------------------------------------

    def read_into(self, key: str, offset: int, buffer: memoryview, what: str) -> None:
        if self._settings.client == "http":
            self._transport.read_into(lambda refusal: self._locate(key, refusal), offset, buffer, what)
        elif len(buffer):
            patience = Patience(self._policy, self._transport.stop)
            while True:
                try:
                    self._read_with_boto3(key, offset, buffer, what)
                    return
                except Transient as failure:
                    patience.pause(failure)

    def _read_with_boto3(self, key: str, offset: int, buffer: memoryview, what: str) -> None:
        where = f"{self._where}: {what}"
        end = offset + len(buffer)
        with translated(where):
            try:
                answer = self._client.get_object(
                    **self._object(key), Range=f"bytes={offset}-{end - 1}", **self._payer
                )  # boto3 tries again by itself
            except ClientError as error:
                if code_of(error) == "InvalidRange":
                    raise IntegrityError(f"{where} ends before byte {end}") from error
                raise
        with answer["Body"] as body:
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
        where = f"{self._where}: {key}"
        if refusal is not None:
            match = _XML.search(refusal.body)
            code, message = (match[1], match[2] or "") if match else ("", "")
            if self._settings.anonymous or code in ("NoSuchBucket", "RequestTimeTooSkewed"):
                raise refused(where, refusal.status, code, message)
            self._renew()
        with translated(where):
            return Location(self._url(key, anew=refusal is not None), self._headers)

    @property
    def _headers(self) -> dict[str, str]:
        """What is signed as a header."""
        return {"x-amz-request-payer": "requester"} if self._payer else {}

    def _url(self, key: str, *, anew: bool) -> str:
        credentials = self._session.get_credentials() if not self._settings.anonymous else None
        owner = credentials.access_key if credentials is not None else None
        now = time.monotonic()
        with self._lock:
            url, signed_by, until = self._urls.get(key, ("", None, 0.0))
            if url and not anew and signed_by == owner and now < until:
                self._urls.move_to_end(key)
                return url
            client = self._client
        url = str(
            client.generate_presigned_url("get_object", Params={**self._object(key), **self._payer}, ExpiresIn=_VALID)
        )
        with self._lock:
            self._urls[key] = url, owner, now + _KEPT
            self._urls.move_to_end(key)
            if len(self._urls) > _URLS:
                self._urls.popitem(last=False)
        return url

    # --- the client --------------------------------------------------------------------------------------------------

    def _object(self, key: str) -> dict[str, str]:
        return {"Bucket": self._settings.bucket, "Key": self._settings.prefix + key}

    def _renew(self) -> None:
        """Look for credentials anew: files and variables may have changed, roles have others by now."""
        with self._lock:
            if time.monotonic() - self._renewed >= _RENEWAL:
                self._renewed = time.monotonic()
                self._connect()

    def _connect(self) -> None:
        settings, policy = self._settings, self._policy
        optional: dict[str, Any] = {}
        if settings.path_style is not None:
            optional["s3"] = {"addressing_style": "path" if settings.path_style else "virtual"}
        config = Config(
            signature_version=UNSIGNED if settings.anonymous else "s3v4",
            retries={"mode": "standard", "total_max_attempts": policy.attempts},
            connect_timeout=policy.connect_timeout,
            read_timeout=policy.read_timeout,
            max_pool_connections=_CONNECTIONS,
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            user_agent_extra=f"erofsgen/{__version__}",
            **optional,
        )
        with translated(self._where):
            self._session = botocore.session.Session(profile=settings.profile)
            try:
                self._client = boto3.Session(botocore_session=self._session).client(
                    "s3", region_name=settings.region, endpoint_url=settings.endpoint, config=config
                )
            except ValueError as error:  # botocore's word for an endpoint that is no URL
                raise UsageError(f"{self._where}: {printable(str(error))}", hint="endpoint=https://HOST") from error


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
