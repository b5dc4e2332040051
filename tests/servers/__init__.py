"""Servers on loopback for tests, each stopped by the context manager that started it.

A real registry and one that misbehaves are offered here; one that also takes what is written (``fullregistry``), S3
(``ceph``, ``moto``), ``nginx`` and a proxy that makes any of them misbehave (``faultproxy``) are modules of their own.
"""

from __future__ import annotations

from servers.faultyregistry import (
    OCI_CONFIG,
    OCI_LAYER,
    OCI_MANIFEST,
    FaultyRegistry,
    body,
    chunked,
    cut,
    digest_of,
    endless,
    faulty_registry,
    ignore_range,
    redirect,
    silent,
    status,
)
from servers.registry import PASSWORD, USER, docker_registry, make_certificate

__all__ = [
    "OCI_CONFIG",
    "OCI_LAYER",
    "OCI_MANIFEST",
    "PASSWORD",
    "USER",
    "FaultyRegistry",
    "body",
    "chunked",
    "cut",
    "digest_of",
    "docker_registry",
    "endless",
    "faulty_registry",
    "ignore_range",
    "make_certificate",
    "redirect",
    "silent",
    "status",
]
