"""What commands are called, and which profile is taken for one."""

from __future__ import annotations

import shlex

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from profilekit import profile_of

from erofsgen.profile.naming import best, command_name, key, short

word = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=40)


@settings(max_examples=40, deadline=None)
@given(st.lists(word, max_size=12))
def test_a_command_is_a_line_for_a_shell(argv: list[str]):
    name = command_name(argv)
    assert len(name) <= 200
    if len(shlex.join(argv)) <= 200:
        assert shlex.split(name) == argv
    assert command_name(argv) == name
    assert len(key(name)) == 32
    assert key(name).isalnum()


@settings(max_examples=40, deadline=None)
@given(st.lists(word, max_size=4), st.lists(word, max_size=4), st.sampled_from(["", "x" * 300]))
def test_different_commands_stay_different(one: list[str], other: list[str], before: str):
    names = {command_name([before, *argv]) for argv in (one, other)}
    assert len(names) == (1 if one == other else 2)
    assert len(set(map(key, names))) == len(names)


def test_bytes_that_are_no_text():
    one, other, text = "cat \udcff", "cat \udcfe", r"cat \xff"
    assert len({short(one), short(other), short(text)}) == 3
    for name in (short(one), short(other)):
        name.encode()
    assert command_name([]) == short("") == ""


def test_an_exact_command_is_taken_first():
    profiles = [profile_of([], command=command) for command in ("serve --port 1", "serve --port 2", "train")]
    assert best(profiles, "serve --port 2") is profiles[1]
    assert best(profiles, "train") is profiles[2]
    assert best([], "train") is None
    assert best(profiles, "") is None


def test_a_run_comes_before_a_guess():
    guessed, alike = profile_of([], command="serve 1", runs=0), profile_of([], command="serve 2")
    exact = profile_of([], command="serve 1")
    assert best([guessed], "serve 1") is guessed
    assert best([guessed], "serve 3") is None
    assert best([guessed, alike], "serve 1") is alike
    assert best([alike, exact], "serve 1") is exact


@pytest.mark.parametrize(
    ("known", "wanted"),
    [
        ("serve --port 8000", "serve --port 80"),
        ("train --seed=1 --lr=0.1", "train --seed=22 --lr=1.5"),
        ("worker 3", "worker 4"),
    ],
)
def test_numbers_make_no_other_command(known: str, wanted: str):
    few, many = profile_of([], command=known, runs=1), profile_of([], command=known, runs=5)
    assert best([few, many], wanted) is many


@pytest.mark.parametrize(
    ("known", "wanted"),
    [
        ("python train.py", "python serve.py"),
        ("serve", "serve --port 1"),
        ("load model-7b", "load model-70b"),
        ("sh -c 'sleep 1'", "sh -c 'sleep 2'"),
        ("load /models/7", "load /models/8"),
        ("a 'unfinished", "a 'unfinished too"),
        ("", "7"),
        ("7", ""),
    ],
)
def test_nothing_else_is_guessed(known: str, wanted: str):
    assert best([profile_of([], command=known)], wanted) is None
