"""Tokens: the challenge, the token server, and tokens that expire in the middle of a pull."""

from __future__ import annotations

import base64
import json
import random
import threading
import time
from urllib.parse import parse_qs, urlsplit

import pytest
import servers
from servers import body, status

from erofsgen.errors import RemoteError

pytestmark = [pytest.mark.server, pytest.mark.timeout(60)]

LAYER = random.Random(7).randbytes(100_000)
DIGEST = servers.digest_of(LAYER)
BLOB = f"/blobs/{DIGEST}$"
SECRET = "hunter2-secret"


@pytest.fixture
def guarded(faulty):
    """A registry that lets in who has a token, with an image of one layer."""
    faulty.tokens = set()
    faulty.add_image(LAYER)
    return faulty


@pytest.fixture
def know(tmp_path):
    """know(registry, **entry): an auth file with this entry; its path."""

    def write(registry, **entry):
        path = tmp_path / "auth.json"
        path.write_text(json.dumps({"auths": {registry.host: entry}}))
        return str(path)

    return write


def basic(user="me", password=SECRET):
    return base64.b64encode(f"{user}:{password}".encode()).decode()


def pulled(pull, registry, read_layers, **options):
    with pull(registry, **options) as opened:
        return read_layers(opened)


def queries(registry):
    return [parse_qs(urlsplit(request.path).query) for request in registry.seen("^/token")]


def test_an_anonymous_token(guarded, pull, read_layers):
    assert pulled(pull, guarded, read_layers) == [LAYER]
    assert queries(guarded) == [{"service": ["faulty"], "scope": ["repository:team/app:pull"]}]
    assert "Authorization" not in guarded.seen("^/token")[0].headers
    used = [request.headers.get("Authorization") for request in guarded.seen("/manifests/|/blobs/")]
    assert used == [None, "Bearer token-1", "Bearer token-1", "Bearer token-1"]


def test_a_token_for_a_name_and_password(guarded, pull, read_layers, know):
    assert pulled(pull, guarded, read_layers, authfile=know(guarded, auth=basic())) == [LAYER]
    assert guarded.seen("^/token")[0].headers["Authorization"] == f"Basic {basic()}"
    assert not any(basic() in str(request.headers) for request in guarded.seen("^/v2/"))


def test_a_token_for_an_identity_token(guarded, pull, read_layers, know):
    assert pulled(pull, guarded, read_layers, authfile=know(guarded, identitytoken=SECRET)) == [LAYER]
    (request,) = guarded.seen("^/token")
    assert request.method == "POST"
    assert request.path == "/token"
    assert parse_qs(request.body.decode()) == {
        "grant_type": ["refresh_token"],
        "refresh_token": [SECRET],
        "client_id": ["erofsgen"],
        "service": ["faulty"],
        "scope": ["repository:team/app:pull"],
    }


def test_a_ready_token(guarded, pull, read_layers, know):
    guarded.tokens.add("ready")
    assert pulled(pull, guarded, read_layers, authfile=know(guarded, registrytoken="ready")) == [LAYER]
    assert guarded.seen("^/token") == []


@pytest.mark.parametrize(
    "answer",
    [{"access_token": "other"}, {"token": "other", "access_token": "x"}, {"token": "other", "expires_in": "60"}],
)
def test_forms_of_a_token(answer, guarded, pull, read_layers):
    guarded.tokens.add("other")
    guarded.fault("^/token", body(json.dumps(answer).encode()))
    assert pulled(pull, guarded, read_layers) == [LAYER]


@pytest.mark.parametrize("refusal", [401, 400, 403])
def test_a_token_that_expires_in_the_middle(refusal, guarded, pull, read_layers):
    guarded.refusal = refusal
    with pull(guarded) as opened:
        guarded.expire_tokens()
        assert read_layers(opened) == [LAYER]
    used = [request.headers["Authorization"] for request in guarded.seen(BLOB)]
    assert used == ["Bearer token-1", "Bearer token-2"]


def test_a_token_that_expires_between_two_pieces(guarded, pull, read_layers):
    with pull(guarded) as opened:
        guarded.fault(BLOB, servers.cut(40_000))

        def expire_then_behave(handler):
            guarded.expire_tokens()
            handler.behave()

        guarded.fault(BLOB, expire_then_behave)
        assert read_layers(opened) == [LAYER]
    used = [(request.headers["Authorization"], "Range" in request.headers) for request in guarded.seen(BLOB)]
    assert used == [("Bearer token-1", False), ("Bearer token-1", True), ("Bearer token-2", True)]


def test_a_refused_token_is_renewed_once(guarded, pull, read_layers):
    with pull(guarded) as opened:
        guarded.fault(BLOB, status(401, WWW_Authenticate=f'Bearer realm="http://{guarded.host}/token"'), times=99)
        with pytest.raises(RemoteError, match=f"answered 401 for blob {DIGEST}"):
            read_layers(opened)
    assert len(guarded.seen(BLOB)) == 2
    assert guarded.issued == 2


@pytest.mark.parametrize("code", [400, 403])
def test_a_refusal_that_is_not_about_age(code, guarded, pull, read_layers):
    with pull(guarded) as opened:
        guarded.fault(BLOB, status(code, b'{"errors":[{"code":"DENIED","message":"not for you"}]}'), times=99)
        with pytest.raises(RemoteError, match="not for you"):
            read_layers(opened)
    assert guarded.issued == 1


def test_a_token_is_renewed_before_it_expires(guarded, pull, read_layers):
    guarded.expires_in = 1
    with pull(guarded) as opened:
        time.sleep(1)
        assert read_layers(opened) == [LAYER]
    assert [request.headers["Authorization"] for request in guarded.seen(BLOB)] == ["Bearer token-2"]


def test_a_lifetime_of_nothing_is_a_minute(guarded, pull, read_layers):
    guarded.expires_in = 0
    assert pulled(pull, guarded, read_layers) == [LAYER]
    assert guarded.issued == 1


def test_threads_share_a_renewal(guarded, pull, read_layers):
    layers = [bytes([number]) * 1000 for number in range(4)]
    guarded.add_image(*layers)
    barrier = threading.Barrier(4, timeout=10)

    def refuse_together(handler):
        barrier.wait()
        handler.behave()

    with pull(guarded) as opened:
        guarded.expire_tokens()
        guarded.fault("/blobs/", refuse_together, times=4)
        assert read_layers(opened) == layers
    assert guarded.issued == 2


def test_a_token_server_that_is_down_for_a_moment(guarded, pull, read_layers):
    guarded.fault("^/token", status(503))
    guarded.fault("^/token", status(429))
    assert pulled(pull, guarded, read_layers) == [LAYER]
    assert len(guarded.seen("^/token")) == 3


def test_a_token_server_that_is_down(guarded, pull):
    guarded.fault("^/token", status(503), times=99)
    with pytest.raises(RemoteError, match="answered 503 for a token"):
        pull(guarded)


@pytest.mark.parametrize("code", [400, 401, 403])
@pytest.mark.parametrize("known", [True, False])
def test_a_token_server_that_refuses(code, known, guarded, pull, know):
    guarded.fault("^/token", status(code, f'{{"errors":[{{"message":"{SECRET}"}}]}}'.encode()), times=99)
    with pytest.raises(RemoteError, match="refused the credentials" if known else "refused anonymous access") as caught:
        pull(guarded, authfile=know(guarded, auth=basic()) if known else None)
    assert f"skopeo login {guarded.host}" in caught.value.hint
    assert SECRET not in str(caught.value)
    assert len(guarded.seen("^/token")) == 1


@pytest.mark.parametrize(
    "answer",
    [b"", b"{", b"[]", b"{}", b'{"token": ""}', b'{"token": null}', b'{"token": 7}', b'{"token": "a\\r\\nX-Evil: 1"}',
     b'{"token": "\\u00e4"}', b'{"token": "a b"}', b'{"token":' * 50_000],
    ids=range(11),
)  # fmt: skip
def test_malformed_tokens(answer, guarded, pull):
    guarded.fault("^/token", body(answer), times=99)
    with pytest.raises(RemoteError, match="malformed"):
        pull(guarded)


@pytest.mark.parametrize(
    ("challenge", "message"),
    [
        ("Bearer", "names no token server"),
        ('Bearer realm=""', "names no token server"),
        ('Bearer realm="/token"', "names no token server"),
        ('Bearer realm="file:///etc/passwd"', "names no token server"),
        ('Bearer realm="http://a:b/"', "names no token server"),
        ('Bearer realm="http://tokens.invalid/"', "names a token server without TLS: tokens.invalid"),
        ('Basic realm="x"', "asks for credentials"),
        ("Negotiate", "answered 401"),
        ("", "answered 401"),
    ],
)
def test_challenges_that_lead_nowhere(challenge, message, guarded, pull):
    guarded.fault("/manifests/", status(401, WWW_Authenticate=challenge), times=99)
    with pytest.raises(RemoteError, match=message):
        pull(guarded)


def test_a_password_goes_to_a_basic_challenge(guarded, pull, read_layers, know):
    guarded.tokens = None
    guarded.fault("/manifests/", status(401, WWW_Authenticate='Basic realm="x"'))
    assert pulled(pull, guarded, read_layers, authfile=know(guarded, auth=basic())) == [LAYER]
    used = [request.headers.get("Authorization") for request in guarded.seen("/v2/team")]
    assert used == [None, *[f"Basic {basic()}"] * 3]


def test_no_secret_follows_a_redirect_of_the_token_server(guarded, elsewhere, pull, know):
    elsewhere.fault("", body(b'{"token": "x"}'), times=9)
    guarded.fault("^/token", servers.redirect(f"http://{elsewhere.host}/token"), times=9)
    for entry in ({"auth": basic()}, {"identitytoken": SECRET}):
        with pytest.raises(RemoteError):
            pull(guarded, authfile=know(guarded, **entry))
    assert elsewhere.requests
    assert not any(SECRET in str(request) or basic() in str(request) for request in elsewhere.requests)
