from __future__ import annotations

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from erofsgen.errors import UsageError
from erofsgen.oci.reference import Reference, is_digest, is_loopback, ref_name

HEX = "0123456789abcdef" * 4
DIGEST = f"sha256:{HEX}"
LONGEST_TAG = "t" * 128


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("python", "docker.io/library/python:latest"),
        ("python:3.11-slim", "docker.io/library/python:3.11-slim"),
        ("docker.io/python", "docker.io/library/python:latest"),
        ("index.docker.io/python", "docker.io/library/python:latest"),
        ("docker.io/library/python", "docker.io/library/python:latest"),
        ("user/app:1", "docker.io/user/app:1"),
        ("user/team/app:1", "docker.io/user/team/app:1"),
        ("quay.io/app", "quay.io/app:latest"),
        ("quay.io/a/b/c:v1", "quay.io/a/b/c:v1"),
        ("localhost/app", "localhost/app:latest"),
        ("localhost:5000/app", "localhost:5000/app:latest"),
        ("host:5000/app:1", "host:5000/app:1"),
        ("UPPER/app", "UPPER/app:latest"),
        ("127.0.0.1:5000/app", "127.0.0.1:5000/app:latest"),
        ("[::1]:5000/app:1", "[::1]:5000/app:1"),
        ("[2001:db8::1]/app", "[2001:db8::1]/app:latest"),
        ("a__b/c---d.e_f", "docker.io/a__b/c---d.e_f:latest"),
        ("app:_x.Y-z", "docker.io/library/app:_x.Y-z"),
        (f"app:{LONGEST_TAG}", f"docker.io/library/app:{LONGEST_TAG}"),
        (f"app@{DIGEST}", f"docker.io/library/app@{DIGEST}"),
        (f"quay.io/app:1@{DIGEST}", f"quay.io/app:1@{DIGEST}"),
        (f"app@sha512:{HEX * 2}", f"docker.io/library/app@sha512:{HEX * 2}"),
        (f"user/{HEX}", f"docker.io/user/{HEX}:latest"),
        ("xn--n3h.com/app", "xn--n3h.com/app:latest"),
    ],
)
def test_references_are_completed_as_docker_does(text, canonical):
    reference = Reference.parse(text)
    assert str(reference) == canonical
    assert Reference.parse(canonical) == reference


@pytest.mark.parametrize(
    "text",
    [
        "", ":", ":tag", "@", "/", "//", "app:", "app::1", "app:1:2", "/app", "app/", "a//b", "App", "user/App",
        "quay.io/", "quay.io/App", "-app", "app-", "app_", "a___b", "a..b", "a._b", "app:-x", "app:.x", "app: x",
        " app", "app\n", "app:1\n", "app:ü", "äpp", "./app", "../app", ".hidden/app", "-host.com/app", "host-.com/app",
        "host..com/app", "host.com:port/app", "host.com:/app", "[::1/app", "[::g]/app", "http://host.com/app", HEX,
        "app@", "app@sha256", "app@sha256:", f"app@sha256:{HEX[1:]}", f"app@sha256:{HEX.upper()}", f"app@md5:{HEX}",
        f"app@{DIGEST}@{DIGEST}", f"app@sha512:{HEX}", f"app:{LONGEST_TAG}t", "a" * 2000, f"quay.io/{'a' * 256}",
    ],
)  # fmt: skip
def test_malformed_references_are_refused(text):
    with pytest.raises(UsageError) as caught:
        Reference.parse(text)
    assert "\n" not in str(caught.value)


def test_upper_case_is_explained():
    with pytest.raises(UsageError, match="repository names are lower case"):
        Reference.parse("quay.io/team/App")


@pytest.mark.parametrize(
    ("text", "host"),
    [("python", "registry-1.docker.io"), ("quay.io/a", "quay.io"), ("localhost:5000/a", "localhost:5000")],
)
def test_api_hosts(text, host):
    assert Reference.parse(text).host == host


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("localhost", True), ("localhost:5000", True), ("127.0.0.1", True), ("127.8.9.1:80", True), ("[::1]", True),
        ("[::1]:5000", True), ("localhost.com", False), ("128.0.0.1", False), ("[2001:db8::1]:5000", False),
        ("127.0.0.1.example.com", False), ("quay.io:443", False), ("", False),
    ],
)  # fmt: skip
def test_loopback(host, loopback):
    assert is_loopback(host) is loopback


@pytest.mark.parametrize(
    ("text", "good"),
    [(DIGEST, True), (f"sha512:{HEX * 2}", True), (f"sha256:{HEX}\n", False), (f"../{DIGEST}", False), ("", False)],
)
def test_digests(text, good):
    assert is_digest(text) is good


# The grammar of the OCI image specification 1.1, annotations: org.opencontainers.image.ref.name
OCI_REF = re.compile(
    r"(?:[A-Za-z0-9]+(?:(?:[-._:@+]|--)[A-Za-z0-9]+)*)(?:/(?:[A-Za-z0-9]+(?:(?:[-._:@+]|--)[A-Za-z0-9]+)*))*"
)


@pytest.mark.parametrize("text", ["docker.io/library/python:3.11-slim", f"quay.io/a/b@{DIGEST}", "v1", "a--b"])
def test_valid_names_stay(text):
    assert ref_name(text) == text


@given(st.text())
@example("docker.io/a__b/c:1")
@example("/")
@example("my image (1)")
@example("..")
@example("a/-/b")
def test_any_name_becomes_valid(text):
    assert OCI_REF.fullmatch(ref_name(text))


@pytest.mark.parametrize(("one", "other"), [("a__b", "a_b"), ("a b", "a-b"), ("ä", "ö"), ("a__b", "a_b-")])
def test_different_names_stay_different(one, other):
    assert ref_name(one) != ref_name(other)


@given(
    st.from_regex(r"[a-z0-9]{1,10}(\.[a-z]{2,5}|:[0-9]{2,5})/[a-z0-9]{1,9}(/[a-z0-9]{1,9}){0,3}", fullmatch=True),
    st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,20}", fullmatch=True),
)
def test_parsing_is_the_inverse_of_printing(name, tag):
    reference = Reference.parse(f"{name}:{tag}")
    assert (reference.registry, reference.repository) == tuple(name.split("/", 1))
    assert reference.tag == tag
    assert Reference.parse(str(reference)) == reference
