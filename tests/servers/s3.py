"""What the tests know of an S3 service on loopback, whichever it is."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

_numbers = itertools.count(1)


@dataclass(frozen=True)
class S3Server:
    """Where an S3 service is and who may use it. ``dataclasses.replace(server, endpoint=proxy.url)`` is the same
    service behind a proxy."""

    endpoint: str
    """``http://127.0.0.1:PORT``."""
    access_key: str
    secret_key: str
    region: str

    def environment(self) -> dict[str, str]:
        """The variables that make any AWS client use this service."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_DEFAULT_REGION": self.region,
        }

    def client(self) -> Any:
        """A boto3 client that leaves out the checksums older services do not know."""
        import boto3  # takes a third of a second, which most test runs need not spend
        from botocore.config import Config

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name=self.region,
            config=Config(request_checksum_calculation="when_required", response_checksum_validation="when_required"),
        )

    def bucket(self) -> str:
        """Create a bucket nobody else uses; its name."""
        name = f"bucket-{next(_numbers)}"
        self.client().create_bucket(Bucket=name)
        return name
