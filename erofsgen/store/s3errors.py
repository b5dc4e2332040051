"""What S3 services and botocore say went wrong, in this project's words."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Final

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    HTTPClientError,
    NoAuthTokenError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
    TokenRetrievalError,
)
from botocore.exceptions import ConnectionError as NotConnectedError

from erofsgen.errors import ErofsgenError, NotFoundError, RemoteError
from erofsgen.oci.patience import printable

_NO_CREDENTIALS: Final = (
    NoCredentialsError,
    PartialCredentialsError,
    CredentialRetrievalError,
    ProfileNotFound,
    NoAuthTokenError,
    TokenRetrievalError,
)
_CREDENTIALS: Final = "check the credentials and what they allow"
_REGION: Final = "name the bucket's region: ?region=REGION"
_LATER: Final = "try again later"

_HINTS: Final[Mapping[str, str]] = {
    "AuthorizationHeaderMalformed": _REGION,
    "ExpiredToken": "renew the credentials",
    "IllegalLocationConstraintException": _REGION,
    "KeyTooLongError": "choose a shorter name",
    "NoSuchBucket": "`erofsgen build` makes it, or name another --store",
    "PermanentRedirect": _REGION,
    "QuotaExceeded": "free some space with `erofsgen gc`, or ask for more",
    "RequestTimeTooSkewed": "set this machine's clock",
    "SlowDown": "the service limits our rate",
}


def code_of(error: ClientError) -> str:
    """The code, which is the status where the answer had no body."""
    return str(error.response.get("Error", {}).get("Code", ""))


def status_of(error: ClientError) -> int:
    """The HTTP status, 0 where there is none."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def refused(where: str, status: int, code: str, message: str) -> ErofsgenError:
    """What to raise for an answer that is no success. ``code`` and ``message`` are S3's own, or empty."""
    said = ": ".join(part for part in (code if code != str(status) else "", message) if part)
    text = f"{where}: the service answered {status}" + (f", {printable(said)}" if said else "")
    if status == 404:
        return NotFoundError(text, hint=_HINTS.get(code))
    by_status = _LATER if status >= 500 or status == 429 else _CREDENTIALS if status in (401, 403) else None
    return RemoteError(text, hint=_HINTS.get(code, by_status))


@contextmanager
def translated(where: str) -> Iterator[None]:
    """Raises RemoteError or NotFoundError, naming ``where``, for what botocore raises."""
    try:
        yield
    except ClientError as error:
        message: str | None = error.response.get("Error", {}).get("Message")
        raise refused(where, status_of(error), code_of(error), message or "") from error
    except _NO_CREDENTIALS as error:
        hint = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, name a profile, or say anonymous=true"
        raise RemoteError(f"{where}: {printable(str(error))}", hint=hint) from error
    except (HTTPClientError, NotConnectedError) as error:
        said = re.sub(r"\?[^\s\"]*", "", str(error))  # URLs' queries, which say little
        raise RemoteError(f"{where}: {printable(said)}", hint="check the network and the endpoint") from error
    except BotoCoreError as error:
        raise RemoteError(f"{where}: {printable(str(error))}") from error
