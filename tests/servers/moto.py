"""moto's S3 in this process: starts at once, but checks no signatures. For tests of code, not of protocol."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from servers.s3 import S3Server


@contextlib.contextmanager
def moto_s3() -> Iterator[S3Server]:
    """An S3 service that forgets everything when it stops; no two at a time."""
    from moto.server import ThreadedMotoServer  # takes half a second, which most test runs need not spend

    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # or it prints every request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield S3Server(f"http://{host}:{port}", "testaccesskey", "testsecretkey", "us-east-1")
    finally:
        server.stop()
