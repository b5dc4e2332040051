"""Registry credentials where podman and Docker keep them.

Files are looked at in podman's order; the first that knows the registry decides::

    --authfile, else $REGISTRY_AUTH_FILE              only this one
    ${XDG_RUNTIME_DIR}/containers/auth.json           without that variable: /run/containers/UID/auth.json
    ${XDG_CONFIG_HOME:-~/.config}/containers/auth.json
    ${DOCKER_CONFIG:-~/.docker}/config.json

In a file, ``credHelpers`` of the host come first, then ``auths``, the longest matching ``HOST/NAMESPACE`` before
``HOST``, then ``credsStore``. Helpers are the ``docker-credential-*`` programs: JSON over standard input and output.
No message of this module contains a secret.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec

from erofsgen.errors import FormatError, NotFoundError, RemoteError, StorageError
from erofsgen.oci.basic import basic
from erofsgen.oci.reference import DEFAULT_REGISTRY

_DOCKER_HUB: Final = "https://index.docker.io/v1/"
"""Docker Hub's name in Docker's files and helpers."""
_FILE_LIMIT: Final = 4 << 20
_HELPER: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*", re.ASCII)
_HELPER_TIMEOUT: Final = 60.0
_TOKEN_USER: Final = "<token>"  # noqa: S105  (the user name by which helpers say that the secret is an identity token)


@dataclass(frozen=True)
class Credentials:
    """What a registry knows us by: a name and password, an identity token, or a ready bearer token."""

    username: str = ""
    password: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)
    registry_token: str = field(default="", repr=False)

    @property
    def basic(self) -> str | None:
        """The value of a Basic ``Authorization`` header, None without a user name."""
        if not self.username:
            return None
        return basic(self.username, self.password)


class _Auth(msgspec.Struct):
    auth: str | None = None
    username: str | None = None
    password: str | None = None
    identitytoken: str | None = None
    registrytoken: str | None = None


class _File(msgspec.Struct, rename="camel"):
    auths: dict[str, _Auth | None] | None = None
    cred_helpers: dict[str, str] | None = None
    creds_store: str | None = None


class _HelperAnswer(msgspec.Struct, rename="pascal"):
    username: str = ""
    secret: str = ""


def find_credentials(registry: str, repository: str, authfile: str | None = None) -> Credentials | None:
    """What is kept for ``registry/repository``, None where nothing is.

    Raises NotFoundError (``authfile`` does not exist), FormatError (a file is malformed), StorageError (a file cannot
    be read), RemoteError (a helper failed).
    """
    for path, required in _files(authfile):
        content = _read(path, required=required)
        if content is not None and (found := _search(content, path, registry, repository)):
            return found
    return None


def _files(authfile: str | None) -> Iterator[tuple[Path, bool]]:
    if authfile:
        yield Path(authfile), True
    elif chosen := os.environ.get("REGISTRY_AUTH_FILE"):
        yield Path(chosen), True
    else:
        runtime = os.environ.get("XDG_RUNTIME_DIR")
        yield Path(f"{runtime}/containers" if runtime else f"/run/containers/{os.getuid()}", "auth.json"), False
        yield Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config", "containers/auth.json").expanduser(), False
        yield Path(os.environ.get("DOCKER_CONFIG") or "~/.docker", "config.json").expanduser(), False


def _read(path: Path, *, required: bool) -> _File | None:
    try:
        with path.open("rb") as file:
            data = file.read(_FILE_LIMIT)
    except (FileNotFoundError, NotADirectoryError):
        if required:
            raise NotFoundError(f"credentials file {path} does not exist") from None
        return None
    except OSError as error:
        raise StorageError(f"cannot read credentials file {path}: {error.strerror}") from error
    try:
        return msgspec.json.decode(data or b"{}", type=_File)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        # the parser's own message is left out: it may quote the file
        raise FormatError(f"credentials file {path} is malformed", hint="log in again to write it anew") from None


def _search(content: _File, path: Path, registry: str, repository: str) -> Credentials | None:
    names = _names(registry)
    helpers = {_host(key): helper for key, helper in (content.cred_helpers or {}).items()}
    if helper := helpers.get(_host(registry)):
        return _ask_helper(helper, registry)
    auths = content.auths or {}
    parts = f"{registry}/{repository}".split("/")
    keys = ["/".join(parts[:length]) for length in range(len(parts), 1, -1)] + names
    for key in keys:
        if found := _decode(auths.get(key), key, path):
            return found
    for key, entry in auths.items():  # Docker's older spellings: https://HOST, https://HOST/v1/
        if _host(key) == _host(registry) and "://" in key and (found := _decode(entry, key, path)):
            return found
    return _ask_helper(content.creds_store, registry) if content.creds_store else None


def _names(registry: str) -> list[str]:
    return [registry, _DOCKER_HUB, "index.docker.io"] if registry == DEFAULT_REGISTRY else [registry]


def _host(key: str) -> str:
    """``https://HOST/v1/`` and ``HOST`` to ``HOST``; Docker Hub's names to one."""
    host = key.partition("://")[2] or key
    host = host.partition("/")[0]
    return DEFAULT_REGISTRY if host in ("index.docker.io", "registry-1.docker.io") else host


def _decode(entry: _Auth | None, key: str, path: Path) -> Credentials | None:
    if entry is None:
        return None
    username, password = entry.username or "", entry.password or ""
    if entry.auth:
        try:
            username, colon, password = base64.b64decode(entry.auth, validate=True).decode().partition(":")
        except (binascii.Error, ValueError):
            raise FormatError(f"the entry {key!a} of credentials file {path} is malformed") from None
        if not colon:
            raise FormatError(f"the entry {key!a} of credentials file {path} is malformed")
        password = password.rstrip("\0")
    if not (entry.identitytoken or entry.registrytoken or (username and password)):
        return None  # an empty entry says that credsStore has it
    return Credentials(username, password, entry.identitytoken or "", entry.registrytoken or "")


def _ask_helper(helper: str, registry: str) -> Credentials | None:
    program = f"docker-credential-{helper}"
    if not _HELPER.fullmatch(helper):
        raise FormatError(f"credential helper {helper[:80]!a} is no program's name")
    server = _DOCKER_HUB if registry == DEFAULT_REGISTRY else registry
    failed = f"{program} failed for {registry}"
    try:
        done = subprocess.run([program, "get"], input=server.encode(), capture_output=True, timeout=_HELPER_TIMEOUT)
    except FileNotFoundError:
        raise RemoteError(f"{failed}: it is not installed", hint=f"put {program} into a directory of PATH") from None
    except subprocess.TimeoutExpired:
        raise RemoteError(f"{failed}: no answer in {_HELPER_TIMEOUT:.0f} s") from None
    except OSError as error:
        raise RemoteError(f"{failed}: {error.strerror}") from None
    if done.returncode:
        said = done.stdout.decode("utf-8", "replace").strip().splitlines() or [f"exit status {done.returncode}"]
        if "credentials not found" in said[0]:
            return None
        words = "".join(char for char in said[0] if char.isprintable())
        raise RemoteError(f"{failed}: {words[:200]}", hint="log in again")
    try:
        answer = msgspec.json.decode(done.stdout, type=_HelperAnswer)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise RemoteError(f"{failed}: its answer is malformed") from None
    if answer.username == _TOKEN_USER:
        return Credentials(identity_token=answer.secret)
    return Credentials(answer.username, answer.secret) if answer.secret else None
