"""Serves metrics over HTTP: ``GET /metrics``, as text for Prometheus, or OpenMetrics where the client asks for it."""

from __future__ import annotations

import logging
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any, Final

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from erofsgen.errors import ErofsgenError
from erofsgen.host.metrics.address import Address

_logger: Final = logging.getLogger(__name__)

_PATHS: Final = ("/metrics", "/")
_SCRAPES: Final = 4
"""At a time; more wait."""
_PATIENCE: Final = 10.0
"""Seconds that a client has to ask, and to take a piece of the answer."""
_AGAIN: Final = 5.0
"""Seconds until an address that cannot be had is tried again."""


class MetricsServer:
    """Serves what ``collector`` finds at ``address`` for as long as the process lives."""

    def __init__(self, address: Address, collector: Collector) -> None:
        self._address = address
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(collector)

    def start(self) -> None:
        """Begin, now or when the address can be had."""
        threading.Thread(target=self._run, name="metrics", daemon=True).start()

    def _run(self) -> None:
        listening = self._listen()
        with _Server(listening, self._registry) as server:
            _logger.info("metrics at %s", self._address, extra={"metrics": str(self._address)})
            server.serve_forever(poll_interval=3600.0)

    def _listen(self) -> socket.socket:
        said = False
        while True:
            try:
                return self._address.listen()
            except ErofsgenError as error:
                if not said:
                    _logger.error("no metrics: %s; trying again", error, extra={"metrics": str(self._address)})
                    said = True
            time.sleep(_AGAIN)


class _Server(HTTPServer):
    def __init__(self, listening: socket.socket, registry: CollectorRegistry) -> None:
        super().__init__(("", 0), _Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listening
        self.registry = registry
        self._pool = ThreadPoolExecutor(_SCRAPES, "metrics")

    def process_request(self, request: Any, client_address: Any) -> None:  # noqa: ANN401  (socketserver's)
        self._pool.submit(self._serve, request, client_address)

    def _serve(self, request: Any, client_address: Any) -> None:  # noqa: ANN401
        try:
            self.finish_request(request, client_address)
        except OSError as error:  # the client has gone
            _logger.debug("%s", error)
        except Exception:
            _logger.exception("a scrape failed")
        finally:
            self.shutdown_request(request)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = _PATIENCE
    server_version = "erofsgen"
    sys_version = ""

    def do_GET(self) -> None:
        if self.path.partition("?")[0] not in _PATHS:
            self.send_error(404)
            return
        encode, kind = choose_encoder(self.headers.get("Accept", ""))
        try:
            data = encode(self.server.registry)
        except Exception:
            self.send_error(500)
            raise
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_HEAD = do_GET  # noqa: N815  (http.server's name)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002, ANN401
        _logger.debug(format, *args)
