from __future__ import annotations

import base64
import json
import os
import stat
import sys

import pytest

from erofsgen.errors import FormatError, NotFoundError, RemoteError, StorageError
from erofsgen.oci.auth import Credentials, find_credentials
from erofsgen.oci.bearer import Challenge, parse_challenges

SECRET = "hunter2-secret"
HUB = "https://index.docker.io/v1/"


def entry(user, password=SECRET):
    return {"auth": base64.b64encode(f"{user}:{password}".encode()).decode()}


@pytest.fixture
def places(tmp_path):
    """Every file that is looked at, in podman's order."""
    return {
        "runtime": tmp_path / "run/containers/auth.json",
        "config": tmp_path / "home/.config/containers/auth.json",
        "docker": tmp_path / "home/.docker/config.json",
    }


def write(path, **content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def user(registry="quay.io", repository="team/app", authfile=None):
    found = find_credentials(registry, repository, authfile)
    return found.username if found else None


@pytest.fixture
def helper(tmp_path, monkeypatch):
    """helper(name, body): a docker-credential-NAME program in Python. It gets the server's name as ``server``."""
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")

    def make(name, body):
        path = programs / f"docker-credential-{name}"
        path.write_text(
            f"#!{sys.executable}\nimport sys, json\nassert sys.argv[1:] == ['get']\nserver = sys.stdin.read()\n{body}\n"
        )
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return path

    return make


def answer(user="helped", secret=SECRET):
    return f"print(json.dumps({{'ServerURL': server, 'Username': {user!r}, 'Secret': {secret!r}}}))"


# --- files -----------------------------------------------------------------------------------------------------------


def test_nothing_is_known():
    assert find_credentials("quay.io", "a") is None


@pytest.mark.parametrize("present", [["runtime", "config", "docker"], ["config", "docker"], ["docker"]])
def test_files_are_looked_at_in_podmans_order(present, places):
    for name in present:
        write(places[name], auths={"quay.io": entry(name)})
    assert user() == present[0]


def test_a_file_that_does_not_know_the_registry_is_passed_over(places):
    write(places["runtime"], auths={"other.io": entry("runtime")})
    write(places["docker"], auths={"quay.io": entry("docker")})
    assert user() == "docker"


def test_the_option_beats_the_environment_and_both_beat_the_rest(places, tmp_path, monkeypatch):
    write(places["runtime"], auths={"quay.io": entry("runtime")})
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(write(tmp_path / "env.json", auths={"quay.io": entry("env")})))
    option = write(tmp_path / "option.json", auths={"quay.io": entry("option")})
    assert user() == "env"
    assert user(authfile=str(option)) == "option"


def test_a_chosen_file_is_the_only_one(places, tmp_path):
    write(places["runtime"], auths={"quay.io": entry("runtime")})
    assert user(authfile=str(write(tmp_path / "empty.json"))) is None


def test_a_chosen_file_must_exist(tmp_path, monkeypatch):
    with pytest.raises(NotFoundError, match=r"nowhere\.json does not exist"):
        find_credentials("quay.io", "a", str(tmp_path / "nowhere.json"))
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(tmp_path / "env.json"))
    with pytest.raises(NotFoundError):
        find_credentials("quay.io", "a")


@pytest.mark.parametrize(
    ("variable", "path"),
    [
        ("XDG_CONFIG_HOME", "containers/auth.json"),
        ("XDG_RUNTIME_DIR", "containers/auth.json"),
        ("DOCKER_CONFIG", "config.json"),
    ],
)
def test_variables_move_files(variable, path, tmp_path, monkeypatch):
    monkeypatch.setenv(variable, str(tmp_path / "moved"))
    write(tmp_path / "moved" / path, auths={"quay.io": entry("moved")})
    assert user() == "moved"


def test_a_file_that_cannot_be_read(places):
    places["docker"].mkdir(parents=True)
    with pytest.raises(StorageError, match="cannot read credentials file"):
        find_credentials("quay.io", "a")


@pytest.mark.parametrize(
    "text", ["{", '{"auths": []}', f'{{"auths": {{"quay.io": "{SECRET}"}}}}', '{"auths":' * 50_000]
)
def test_malformed_files_are_named_and_not_quoted(text, places):
    write(places["docker"])
    places["docker"].write_text(text)
    with pytest.raises(FormatError, match=r"config\.json is malformed") as caught:
        find_credentials("quay.io", "a")
    assert SECRET not in str(caught.value)


def test_an_empty_file(places):
    write(places["runtime"])
    places["runtime"].write_text("")
    assert user() is None


# --- entries ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("repository", "expected"),
    [("team/app/sub", "app"), ("team/app", "app"), ("team/other", "team"), ("team", "team"), ("x/team", "host")],
)
def test_the_longest_namespace_wins(repository, expected, places):
    auths = {"quay.io": entry("host"), "quay.io/team": entry("team"), "quay.io/team/app": entry("app")}
    write(places["runtime"], auths=auths)
    assert user(repository=repository) == expected


def test_a_namespace_ends_at_a_slash(places):
    write(places["runtime"], auths={"quay.io/te": entry("wrong")})
    assert user() is None


@pytest.mark.parametrize(
    "key", [HUB, "docker.io", "index.docker.io", "https://index.docker.io/v1", "https://docker.io"]
)
def test_docker_hubs_names(key, places):
    write(places["docker"], auths={key: entry("hub")})
    assert user("docker.io", "library/python") == "hub"
    assert user("quay.io") is None


@pytest.mark.parametrize("key", ["https://quay.io", "http://quay.io/v1/", "https://quay.io/v2/"])
def test_older_spellings_of_a_host(key, places):
    write(places["docker"], auths={key: entry("old")})
    assert user() == "old"
    assert user("quay.io:5000") is None


def test_a_host_with_port(places):
    write(places["runtime"], auths={"localhost:5000": entry("ported"), "localhost": entry("plain")})
    assert user("localhost:5000") == "ported"
    assert user("localhost") == "plain"
    assert user("localhost:5001") is None


def test_passwords_with_colons_and_padding(places):
    write(places["runtime"], auths={"quay.io": {"auth": base64.b64encode(b"me:a:b\xc3\xa4\0\0").decode()}})
    found = find_credentials("quay.io", "a")
    assert (found.username, found.password) == ("me", "a:bä")
    assert found.basic == "Basic " + base64.b64encode("me:a:bä".encode()).decode()


def test_identity_and_registry_tokens(places):
    write(
        places["docker"],
        auths={"quay.io": {**entry("me", ""), "identitytoken": "id"}, "b.io": {"registrytoken": "reg"}},
    )
    assert find_credentials("quay.io", "a").identity_token == "id"
    assert find_credentials("b.io", "a").registry_token == "reg"


@pytest.mark.parametrize(
    "auth", ["%%%", base64.b64encode(SECRET.encode()).decode(), base64.b64encode(b"\xff:\xff").decode()]
)
def test_malformed_entries_are_named_and_not_quoted(auth, places):
    write(places["runtime"], auths={"quay.io": {"auth": auth}})
    with pytest.raises(FormatError, match=r"entry 'quay\.io' of credentials file") as caught:
        find_credentials("quay.io", "a")
    assert SECRET not in str(caught.value)
    assert auth not in str(caught.value)


@pytest.mark.parametrize("empty", [{}, None, {"auth": ""}, {"auth": None}])
def test_empty_entries_are_no_credentials(empty, places):
    write(places["runtime"], auths={"quay.io": empty})
    write(places["docker"], auths={"quay.io": entry("docker")})
    assert user() == "docker"


def test_secrets_do_not_show():
    shown = repr(Credentials("me", SECRET, identity_token=SECRET, registry_token=SECRET))
    assert SECRET not in shown


# --- helpers ---------------------------------------------------------------------------------------------------------


def test_a_helper_for_one_registry(helper, places):
    helper("one", answer())
    write(places["docker"], credHelpers={"quay.io": "one"}, auths={"quay.io": entry("file")})
    found = find_credentials("quay.io", "a")
    assert (found.username, found.password) == ("helped", SECRET)
    assert user("other.io") is None


def test_a_helper_for_all_registries(helper, places):
    helper("all", answer())
    write(places["docker"], credsStore="all", auths={"quay.io": {}, "file.io": entry("file")})
    assert user() == "helped"
    assert user("file.io") == "file"


def test_helpers_know_docker_hub_by_its_old_name(helper, places):
    helper("hub", f"assert server == {HUB!r}, server\n{answer()}")
    write(places["docker"], credsStore="hub")
    assert user("docker.io") == "helped"


def test_helpers_get_the_host(helper, places):
    helper("host", f"assert server == 'localhost:5000', server\n{answer()}")
    write(places["docker"], credsStore="host")
    assert user("localhost:5000") == "helped"


def test_a_helper_with_an_identity_token(helper, places):
    helper("token", answer("<token>", "id"))
    write(places["docker"], credsStore="token")
    assert find_credentials("quay.io", "a") == Credentials(identity_token="id")


def test_a_helper_that_knows_nothing(helper, places):
    helper("none", "print('credentials not found in native keychain'); sys.exit(1)")
    write(places["runtime"], credsStore="none")
    write(places["docker"], auths={"quay.io": entry("docker")})
    assert user() == "docker"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("print('the vault is sealed\\nmore'); sys.exit(1)", "the vault is sealed"),
        ("print('\\x1b[31mred'); sys.exit(1)", r"\[31mred"),
        ("sys.exit(3)", "exit status 3"),
        (f"print('not json {SECRET}')", "its answer is malformed"),
        (f"print(json.dumps(['{SECRET}']))", "its answer is malformed"),
        (f"print('{SECRET}', file=sys.stderr); sys.exit(1)", "exit status 1"),
    ],
)
def test_a_helper_that_fails(body, said, helper, places):
    helper("bad", body)
    write(places["docker"], credsStore="bad")
    with pytest.raises(RemoteError, match=rf"docker-credential-bad failed for quay\.io: {said}$") as caught:
        find_credentials("quay.io", "a")
    assert str(caught.value).isprintable()
    assert SECRET not in str(caught.value)


def test_a_helper_that_hangs(helper, places, monkeypatch):
    monkeypatch.setattr("erofsgen.oci.auth._HELPER_TIMEOUT", 0.2)
    helper("slow", "import time; time.sleep(30)")
    write(places["docker"], credsStore="slow")
    with pytest.raises(RemoteError, match="no answer in"):
        find_credentials("quay.io", "a")


def test_a_helper_that_is_not_installed(places):
    write(places["docker"], credsStore="nowhere")
    with pytest.raises(RemoteError, match="it is not installed"):
        find_credentials("quay.io", "a")


@pytest.mark.parametrize("name", ["../../bin/sh", "a/b", "-x", "a b", "a\nb"])
def test_a_helper_is_a_name_not_a_path(name, places):
    write(places["docker"], credsStore=name)
    with pytest.raises(FormatError, match="is no program's name"):
        find_credentials("quay.io", "a")


# --- challenges ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "challenges"),
    [
        (["Basic"], [Challenge("basic", {})]),
        (['Basic realm="a b"'], [Challenge("basic", {"realm": "a b"})]),
        (
            ['Bearer realm="https://a/t?x=1,2",service="s",scope="repository:a/b:pull,push"'],
            [Challenge("bearer", {"realm": "https://a/t?x=1,2", "service": "s", "scope": "repository:a/b:pull,push"})],
        ),
        (["bearer REALM=https://a/t , service = s"], [Challenge("bearer", {"realm": "https://a/t", "service": "s"})]),
        (
            ['Bearer realm="a", Basic realm="b"'],
            [Challenge("bearer", {"realm": "a"}), Challenge("basic", {"realm": "b"})],
        ),
        (["Negotiate", 'Basic realm="b"'], [Challenge("negotiate", {}), Challenge("basic", {"realm": "b"})]),
        ([r'Bearer realm="a\"b\\c"'], [Challenge("bearer", {"realm": 'a"b\\c'})]),
        ([""], []),
        (["!!!"], []),
        (['Bearer realm="unclosed'], [Challenge("bearer", {})]),
    ],
)
def test_challenges(values, challenges):
    assert parse_challenges(values) == challenges


def test_long_challenges_take_no_time():
    assert len(parse_challenges(['Bearer realm="' + "\\" * 100_000, "a" * 100_000, " ," * 100_000])) == 2
