"""boto3's client for one store: made from what the user says, made anew when its credentials end; presigned URLs."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple, TypeVar

import botocore.session
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import ClientError

from erofsgen import __version__
from erofsgen.errors import UsageError
from erofsgen.oci.patience import Policy, printable
from erofsgen.store.s3errors import code_of, translated

T = TypeVar("T")

_VALID: Final = 3600
"""Seconds that a presigned URL is valid."""
_KEPT: Final = _VALID - 600.0
_URLS: Final = 4096
_CONNECTIONS: Final = 32
_RENEWAL: Final = 30.0
"""Seconds between two times that credentials which the service refuses are looked for anew."""
_EXPIRED: Final = frozenset({"ExpiredToken", "InvalidAccessKeyId", "InvalidToken", "TokenRefreshRequired"})


class Settings(NamedTuple):
    """What a store's URL says, see :mod:`.s3`."""

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

    @property
    def where(self) -> str:
        """For messages."""
        return f"s3://{self.bucket}"


class S3Client:
    """Thread-safe. Raises UsageError or RemoteError where the settings are not good for a client."""

    def __init__(self, settings: Settings, policy: Policy) -> None:
        self._settings = settings
        self._policy = policy
        self._lock = threading.Lock()
        self._urls: OrderedDict[str, tuple[str, str | None, float]] = OrderedDict()
        self._renewed = -_RENEWAL
        self._connect()

    @property
    def endpoint(self) -> str:
        """The service's URL."""
        return str(self._client.meta.endpoint_url)

    @property
    def ca_bundle(self) -> str | None:
        """The file of authorities that boto3 was told to trust."""
        bundle: str | None = self._session.get_config_variable("ca_bundle")
        return bundle

    def ask(self, request: Callable[[Any], T]) -> T:
        """What ``request`` makes of boto3's client; made again, once, where the credentials turn out to have ended.

        Raises what botocore raises.
        """
        client = self._client
        try:
            return request(client)
        except ClientError as error:
            if code_of(error) not in _EXPIRED:
                raise
            self.renew()
            if self._client is client:
                raise
            return request(self._client)

    def url(self, key: str, parameters: Mapping[str, str], *, anew: bool) -> str:
        """A presigned URL to get ``key``, signed anew or one that is still good. Raises what botocore raises."""
        credentials = None if self._settings.anonymous else self._session.get_credentials()
        owner = None if credentials is None else credentials.access_key
        now = time.monotonic()
        with self._lock:
            url, signed_by, until = self._urls.get(key, ("", None, 0.0))
            if url and not anew and signed_by == owner and now < until:
                self._urls.move_to_end(key)
                return url
            client = self._client
        url = str(client.generate_presigned_url("get_object", Params=parameters, ExpiresIn=_VALID))
        with self._lock:
            self._urls[key] = url, owner, now + _KEPT
            self._urls.move_to_end(key)
            if len(self._urls) > _URLS:
                self._urls.popitem(last=False)
        return url

    def renew(self) -> None:
        """Look for credentials anew: files and variables may have changed, roles have others by now."""
        with self._lock:
            if time.monotonic() - self._renewed >= _RENEWAL:
                self._renewed = time.monotonic()
                self._connect()

    def close(self) -> None:
        """Close idle connections."""
        self._client.close()

    def _connect(self) -> None:
        settings, policy = self._settings, self._policy
        optional: dict[str, Any] = {}
        if settings.path_style is not None:
            optional["s3"] = {"addressing_style": "path" if settings.path_style else "virtual"}
        config = Config(
            signature_version=UNSIGNED if settings.anonymous else "s3v4",  # presigned URLs would be of version 2
            retries={"mode": "standard", "total_max_attempts": policy.attempts},
            connect_timeout=policy.connect_timeout,
            read_timeout=policy.read_timeout,
            max_pool_connections=_CONNECTIONS,
            request_checksum_calculation="when_required",  # blobs have digests, and older services know no others
            response_checksum_validation="when_required",
            user_agent_extra=f"erofsgen/{__version__}",
            **optional,
        )
        with translated(settings.where):
            self._session = botocore.session.Session(profile=settings.profile)
            try:
                # as boto3 does, whose own import would take as long again
                self._client = self._session.create_client(
                    "s3", region_name=settings.region, endpoint_url=settings.endpoint, config=config
                )
            except ValueError as error:  # botocore's word for an endpoint that is no URL
                raise UsageError(f"{settings.where}: {printable(str(error))}", hint="endpoint=https://HOST") from error
