"""The ``Authorization`` header of one repository, kept fresh.

Registries answer 401 with a challenge (RFC 9110 section 11): Basic, or Bearer with the address of a token server, as
the distribution project's token specifications describe it. A token is used until it expires or is refused.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

import httpx
import msgspec

from erofsgen.errors import RemoteError
from erofsgen.oci.auth import Credentials
from erofsgen.oci.httpclient import HttpClient, failure
from erofsgen.oci.patience import printable

_TOKEN_LIMIT: Final = 1 << 20
_TOKEN: Final = re.compile(r"[\x21-\x7e]+")
_LIFETIME: Final = 60.0
"""Seconds a token lives where its server does not say; the specification's default."""
_PARAMETER: Final = re.compile(
    r'\s*([\w!#$%&\'*+.^`|~-]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]*))\s*(?:,|$)', re.ASCII
)
_SCHEME: Final = re.compile(r"[\s,]*([A-Za-z][\w-]*)(?=\s|,|$)", re.ASCII)


@dataclass(frozen=True)
class Challenge:
    """One challenge of a ``WWW-Authenticate`` header. ``scheme`` and the parameters' names are in lower case."""

    scheme: str
    parameters: dict[str, str]


def parse_challenges(values: Iterable[str]) -> list[Challenge]:
    """Every challenge of the header's values. What cannot be understood is left out."""
    found = []
    for value in values:
        position = 0
        while match := _SCHEME.match(value, position):
            position = match.end()
            parameters = {}
            while parameter := _PARAMETER.match(value, position):
                position = parameter.end()
                name, quoted, plain = parameter.groups()
                parameters[name.lower()] = re.sub(r"\\(.)", r"\1", quoted) if quoted is not None else plain
            found.append(Challenge(match[1].lower(), parameters))
    return found


class _Token(msgspec.Struct):
    token: str | None = None
    access_token: str | None = None
    expires_in: float | None = None


class Authorizer:
    """Answers challenges. Thread-safe; several threads that meet the same refusal make one renewal.

    ``credentials`` is asked anew for each renewal: helpers hand out secrets that expire.
    """

    def __init__(
        self, registry: str, repository: str, http: HttpClient, credentials: Callable[[], Credentials | None]
    ) -> None:
        self._registry = registry
        self._repository = repository
        self._http = http
        self._credentials = credentials
        self._lock = threading.Lock()
        self._challenge: Challenge | None = None
        self._value: str | None = None
        self._expires = float("inf")
        self._generation = 0

    def current(self) -> tuple[str | None, int]:
        """The header's value, None as long as nobody asked for one, and its generation.

        Raises Transient, RemoteError (a renewal that was due failed).
        """
        with self._lock:
            if time.monotonic() >= self._expires:
                self._renew(self._challenge)
            return self._value, self._generation

    def renew(self, generation: int, challenges: Iterable[str]) -> bool:
        """The value of ``generation`` was refused, with these ``WWW-Authenticate`` headers: get another.

        False where nothing is known that could help. Raises Transient, RemoteError.
        """
        with self._lock:
            offered = {challenge.scheme: challenge for challenge in reversed(parse_challenges(challenges))}
            challenge = offered.get("bearer") or offered.get("basic") or self._challenge
            if challenge is None:
                return False
            challenge = _with_scope_of(self._challenge, challenge)
            if generation == self._generation or challenge != self._challenge:  # else another thread was faster
                self._renew(challenge)
                self._challenge = challenge
            return True

    def _renew(self, challenge: Challenge | None) -> None:
        credentials = self._credentials()
        if challenge is not None and challenge.scheme == "bearer":
            value, lifetime = self._bearer(challenge.parameters, credentials)
        elif credentials is not None and credentials.basic:
            value, lifetime = credentials.basic, float("inf")
        else:
            raise RemoteError(f"{self._registry} asks for credentials", hint=login_hint(self._registry))
        self._value, self._generation = value, self._generation + 1
        # renewed a little early, so that it does not expire on its way
        self._expires = time.monotonic() + lifetime - min(10.0, lifetime / 10) if lifetime < 1e9 else float("inf")

    def _bearer(self, parameters: dict[str, str], credentials: Credentials | None) -> tuple[str, float]:
        if credentials is not None and credentials.registry_token:
            return f"Bearer {_checked(credentials.registry_token, self._registry)}", float("inf")
        realm = self._realm(parameters.get("realm", ""))
        query = {"scope": parameters.get("scope") or f"repository:{self._repository}:pull"}
        if parameters.get("service"):
            query["service"] = parameters["service"]
        headers: dict[str, str] = {}
        if credentials is not None and credentials.identity_token:
            form = query | {
                "grant_type": "refresh_token",
                "refresh_token": credentials.identity_token,
                "client_id": "erofsgen",
            }
            request = self._http.stream("POST", realm, headers, form=form)
        else:
            if credentials is not None and credentials.basic:
                headers["Authorization"] = credentials.basic
            request = self._http.stream("GET", realm.copy_merge_params(query), headers)
        with request as response:
            if response.status_code != 200:
                raise self._refused(response, known=credentials is not None)
            data = self._http.body(response, _TOKEN_LIMIT, "a token")
        try:
            token = msgspec.json.decode(data, type=_Token, strict=False)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            raise RemoteError(f"{realm.host} sent a malformed token for {self._registry}") from None
        lifetime = token.expires_in if token.expires_in and token.expires_in > 0 else _LIFETIME
        return f"Bearer {_checked(token.token or token.access_token or '', self._registry)}", lifetime

    def _realm(self, text: str) -> httpx.URL:
        """Where to ask for a token. Our credentials go there, so it must be a safe place."""
        try:
            realm = httpx.URL(text)
        except httpx.InvalidURL:
            realm = httpx.URL("")
        if not realm.host or realm.scheme not in ("http", "https"):
            raise RemoteError(f"{self._registry} names no token server: {printable(text)!a}")
        if not self._http.may_use(realm):
            raise RemoteError(f"{self._registry} names a token server without TLS: {realm.host}")
        return realm

    def _refused(self, response: httpx.Response, *, known: bool) -> Exception:
        if response.status_code in (400, 401, 403):
            refused = f"{response.url.host} refused {'the credentials' if known else 'anonymous access'}"
            return RemoteError(f"{refused} for {self._registry}/{self._repository}", hint=login_hint(self._registry))
        return failure(response, f"a token for {self._registry}", self._http.error_text(response))


def _with_scope_of(old: Challenge | None, new: Challenge) -> Challenge:
    """``new``, for what either asks for: threads that read must not take from those that write what they may do."""
    if old is None or new.scheme != "bearer" or old.scheme != "bearer":
        return new
    scope: dict[str, dict[str, None]] = {}
    for challenge in (old, new):
        for part in challenge.parameters.get("scope", "").split():
            resource, _, actions = part.rpartition(":")
            scope.setdefault(resource, {}).update(dict.fromkeys(actions.split(",")))
    text = " ".join(f"{resource}:{','.join(actions)}" for resource, actions in scope.items())
    return Challenge(new.scheme, {**new.parameters, "scope": text} if text else new.parameters)


def login_hint(registry: str) -> str:
    """What to do when a registry wants to know who asks."""
    return f"log in with `podman login {registry}`, `skopeo login {registry}` or `docker login {registry}`"


def _checked(token: str, registry: str) -> str:
    if not _TOKEN.fullmatch(token):
        raise RemoteError(f"the token for {registry} is empty or malformed")
    return token
