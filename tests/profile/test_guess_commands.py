"""From a command to the files it will read, over small images; nothing that an image says makes it fail."""

from __future__ import annotations

import os
import struct
import sys
from importlib.util import MAGIC_NUMBER

import pytest
from guesskit import MTIME, PROGRAM, World, python
from hypothesis import given
from hypothesis import strategies as st

from erofsgen.erofs.tree import BLOCK
from erofsgen.profile.chunks import Chunks
from erofsgen.profile.guess import words
from erofsgen.profile.guess.command import Command
from erofsgen.profile.guess.guess import REASONS, Guess, guess, guessed_profile
from erofsgen.profile.guess.python import Invocation, invocation

SITE = "usr/lib/python3.11/site-packages"
START = [
    "usr/bin/python3.11",
    "usr/lib/python3.11/encodings/__init__.py",
    "usr/lib/python3.11/encodings/aliases.py",
    "usr/lib/python3.11/encodings/utf_8.py",
]


def files(*names: str, **contents: bytes | str) -> dict[str, bytes | str]:
    """Files whose names matter, and some whose contents do; two underscores are a slash, a final one is ``.py``."""
    return {**dict.fromkeys(names, b"#\n"), **{name.replace("__", "/"): data for name, data in contents.items()}}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["-c", "code", "x"], Invocation("", "code", "code", ("x",))),
        (["-ccode", "x"], Invocation("", "code", "code", ("x",))),
        (["-Iuc", "code"], Invocation("Iu", "code", "code", ())),
        (["-m", "pkg.mod", "-x"], Invocation("", "module", "pkg.mod", ("-x",))),
        (["-W", "error", "-Xdev", "-X", "utf8", "-O", "a.py", "-c"], Invocation("O", "script", "a.py", ("-c",))),
        (["--check-hash-based-pycs", "always", "a.py"], Invocation("", "script", "a.py", ())),
        (["-"], Invocation("", "script", "-", ())),
        (["-c"], Invocation("", "code", "", ())),
        ([], Invocation("", "shell", "", ())),
    ],
)
def test_command_lines_of_python(arguments: list[str], expected: Invocation) -> None:
    assert invocation(arguments) == expected


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["tini", "--", "a", "b"], ["a", "b"]),
        (["/usr/bin/tini-static", "-g", "-e", "143", "a"], ["a"]),
        (["env", "-i", "-u", "X", "A=1", "B=2", "a"], ["a"]),
        (["env", "-S", "a -b 'c d'", "e"], ["a", "-b", "c d", "e"]),
        (["gosu", "user", "a"], ["a"]),
        (["timeout", "-k", "5", "10", "a"], ["a"]),
        (["uv", "run", "a"], ["a"]),
        (["nice", "-n", "5", "a"], ["a"]),
    ],
)
def test_wrappers(argv: list[str], expected: list[str]) -> None:
    found = words.wrapped(argv)
    assert found is not None
    assert found[0] == expected


def test_no_wrappers() -> None:
    assert words.wrapped(["python3", "x"]) is None
    assert words.wrapped(["env"]) is None


def test_shell_scripts() -> None:
    script = (
        '#!/bin/sh\nset -e # no\nif [ -f x ]; then\n  A=1 b \\\n c && exec d "$@"\nfi\necho \'a;b\' | e\nf "unclosed\n'
    )
    assert list(words.commands(script)) == [
        ["set", "-e"], ["[", "-f", "x", "]"], ["A=1", "b", "c"], ["exec", "d", "$@"], ["echo", "a;b"], ["e"],
    ]  # fmt: skip
    assert words.expanded("${A:-x}/$B/${C}", {"B": "y"}) == "x/y/"


@pytest.mark.parametrize(
    ("argv", "more"),
    [
        (["python3", "-c", "import app"], []),
        (["python", "/srv/run.py"], ["srv/run.py"]),
        (["/srv/run.py"], ["srv/run.py"]),
        (["run.py"], ["srv/run.py"]),
        (["./current"], ["srv/run.py"]),
        (["python3", "-m", "app"], ["srv/app/__main__.py"]),
        (["sh", "-c", "cd / && exec python3 -u srv/run.py"], ["srv/run.py"]),
        (["sh", "-ec", "export X=1; NAME=run; python3 $NAME.py || exit 1"], ["srv/run.py"]),
        (["entry.sh", "python3", "run.py"], ["srv/entry.sh", "srv/run.py"]),
        (["tini", "--", "env", "A=b", "python3", "run.py"], ["srv/run.py"]),
        (["server", "app:create()"], ["usr/bin/server"]),
        (["server", "--bind=:80", "--app=app.main:x"], ["usr/bin/server", "srv/app/main.py"]),
        (["server", "app"], ["usr/bin/server"]),
        (["server", "run.py"], ["usr/bin/server", "srv/run.py"]),
    ],
)
def test_ways_to_run_an_application(argv: list[str], more: list[str]) -> None:
    world = World({
        **python(),
        "usr/bin/python": "python3",
        "usr/bin/sh": PROGRAM, "usr/bin/env": PROGRAM, "usr/bin/tini": PROGRAM,
        "usr/bin/server": b"#!/usr/bin/python3\nimport serving\n",
        f"{SITE}/serving.py": b"#\n",
        "srv/run.py": b"#!/usr/bin/env python3\nimport app\n",
        "srv/current": "run.py",
        "srv/entry.sh": b'#!/bin/sh\nset -e\nmkdir -p /x\nexec "$@"\n',
        "bin": "usr/bin",
        "srv/app/__init__.py": b"from . import part\n",
        "srv/app/__main__.py": b"import app.part\n",
        "srv/app/main.py": b"#\n",
        "srv/app/part.py": b"import json, missing\ndef f():\n  import never\n",
        "srv/never.py": b"#\n",
    })  # fmt: skip
    found = world.paths(*argv, cwd="/srv", PATH="/usr/bin:/srv")
    wanted = [*START, "srv/app/__init__.py", "srv/app/part.py", "usr/lib/python3.11/json/__init__.py"]
    assert {*wanted, *more} <= set(found)
    assert "srv/never.py" not in found
    places = [found.index(path) for path in wanted]
    assert places == sorted(places)
    for each in world.guess(*argv, cwd="/srv", PATH="/usr/bin:/srv"):
        assert each.reason in REASONS


def test_the_image_says_what_it_runs() -> None:
    config = {"config": {"Entrypoint": ["a"], "Cmd": ["b"], "Env": ["PATH=/x", "Y", "Z=1=2"], "WorkingDir": "/w/."}}
    assert Command.of(config) == Command(("a", "b"), {"PATH": "/x", "HOME": "/root", "Y": "", "Z": "1=2"}, "/w")
    assert Command.of(config, ["c"]).argv == ("c",)
    for odd in ({}, {"config": None}, {"config": {"Cmd": "sh", "Env": [1, None], "WorkingDir": 3}}):
        assert Command.of(odd).argv == ()
        assert World({"x": b"y"}).guess() == []


def test_virtual_environments() -> None:
    world = World({
        **python("usr/local/lib/python3.12", "usr/local/bin/python3.12"),
        "venv/pyvenv.cfg": b"home = /usr/local/bin\ninclude-system-site-packages = false\n",
        "venv/bin/python": "/usr/local/bin/python3",
        "venv/bin/tool": b"#!/venv/bin/python\nfrom tool import main\n",
        "venv/lib/python3.12/site-packages/tool.py": b"import added, hooked, outside\n",
        "venv/lib/python3.12/site-packages/more.pth": b"# a comment\n../../../more\nimport hook; hook.on()\n/nowhere\n",
        "venv/lib/python3.12/site-packages/hook.py": b"#\n",
        "venv/more/added.py": b"#\n",
        "usr/local/lib/python3.12/site-packages/outside.py": b"#\n",
    })  # fmt: skip
    found = world.paths("/venv/bin/tool")
    assert found[:3] == ["venv/bin/tool", "usr/local/bin/python3.12", "venv/pyvenv.cfg"]
    site = "venv/lib/python3.12/site-packages"
    hooks = [f"{site}/more.pth", f"{site}/hook.py"]
    assert found[-4:] == [*hooks, f"{site}/tool.py", "venv/more/added.py"]


def cached(source: bytes, *, age: int = 0, flags: int = 0) -> bytes:
    body = __import__("marshal").dumps(compile(source, "m.py", "exec"))
    return struct.pack("<4sIII", MAGIC_NUMBER, flags, MTIME - age, len(source)) + body


def test_byte_code_is_read_where_it_is_valid() -> None:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    tag = version.replace(".", "")
    library = f"usr/lib/python{version}"
    text = b"import after\n"
    padded = text + b"#" * 200
    site = f"{library}/site-packages"
    world = World({
        **python(library, f"usr/bin/python{version}"),
        **{f"{site}/{name}.py": padded for name in ("fresh", "old", "checked", "unchecked", "optimized")},
        f"{site}/after.py": b"#\n",
        f"{site}/__pycache__/fresh.cpython-{tag}.pyc": cached(padded),
        f"{site}/__pycache__/old.cpython-{tag}.pyc": cached(padded, age=1),
        f"{site}/__pycache__/checked.cpython-{tag}.pyc": cached(padded, flags=3),
        f"{site}/__pycache__/unchecked.cpython-{tag}.pyc": cached(padded, flags=1),
        f"{site}/__pycache__/optimized.cpython-{tag}.opt-2.pyc": cached(padded),
        f"{site}/only.pyc": cached(padded),
    })  # fmt: skip

    def read(module: str, *options: str) -> list[str]:
        found = [path for path in world.paths(f"python{version}", *options, "-c", f"import {module}") if site in path]
        assert found[-1] == f"{site}/after.py"
        return [os.path.basename(path) for path in found[:-1]]

    assert read("fresh") == [f"fresh.cpython-{tag}.pyc"]
    assert read("old") == [f"old.cpython-{tag}.pyc", "old.py"]
    assert read("checked") == [f"checked.cpython-{tag}.pyc", "checked.py"]
    assert read("unchecked") == [f"unchecked.cpython-{tag}.pyc"]
    assert read("optimized") == ["optimized.py"]
    assert read("optimized", "-OO") == [f"optimized.cpython-{tag}.opt-2.pyc"]
    assert read("only") == ["only.pyc"]


def test_packages_of_every_kind() -> None:
    world = World({
        **python(),
        f"{SITE}/first/a.py": b"#\n",  # two portions of a namespace package
        "srv/first/b.py": b"#\n",
        f"{SITE}/both.py": b"#\n",
        f"{SITE}/both/__init__.py": b"#\n",
        f"{SITE}/fast.py": b"#\n",
        f"{SITE}/fast.abi3.so": PROGRAM,
        f"{SITE}/quick.cpython-311-x86_64-linux-gnu.so": PROGRAM,
        f"{SITE}/quick.abi3.so": PROGRAM,
        f"{SITE}/deep/__init__.py": b"from ..beyond import x\nfrom .inner import y\nfrom .inner.leaf import z\n",
        f"{SITE}/deep/inner/__init__.py": b"from .. import side\nfrom . import leaf as l\n",
        f"{SITE}/deep/inner/leaf.py": b"import deep\n",
        f"{SITE}/deep/side.py": b"from .inner import leaf\n",
    })  # fmt: skip
    code = "import first.a, first.b, both, fast, quick, deep, _fast"
    found = [path for path in world.paths("python3", "-c", code, cwd="/srv") if path not in START]
    assert found == [
        f"{SITE}/first/a.py",
        "srv/first/b.py",
        f"{SITE}/both/__init__.py",
        f"{SITE}/fast.abi3.so",
        f"{SITE}/quick.cpython-311-x86_64-linux-gnu.so",
        f"{SITE}/deep/__init__.py",
        f"{SITE}/deep/inner/__init__.py",
        f"{SITE}/deep/side.py",
        f"{SITE}/deep/inner/leaf.py",
        "usr/lib/python3.11/lib-dynload/_fast.cpython-311-x86_64-linux-gnu.so",
    ]


def test_a_level_of_the_graph_is_one_round() -> None:
    chain = {}
    for number in range(40):
        below = b", ".join(b"m%d" % other for other in range(5 * number + 1, 5 * number + 6))
        chain[f"{SITE}/m{number}.py"] = b"import " + below
    chain |= {f"{SITE}/m{n}.py": b"#" * 100 for n in range(40, 210)}
    world = World({**python(), **{path: text + b"\n" + b"#" * 100 for path, text in chain.items()}})
    found = world.paths("python3", "-c", "import m0")
    assert set(chain) <= set(found) | {f"{SITE}/m{n}.py" for n in range(200, 210)}
    assert len(world.rounds) < 10


def test_weights_come_last_unless_they_are_named() -> None:
    script = (
        b"import json\nmodel = load('models/net')\nother = open('/data/labels.txt')\n"
        b"load(\"org/name\")\nx = '../x.bin'\n"
    )
    hub = "root/.cache/huggingface/hub/models--org--name/snapshots/1234"
    world = World({
        **python(),
        "srv/run.py": script,
        "x.bin": b"x" * 200,
        "data/labels.txt": b"y" * 100,
        "data/huge.gguf": b"z" * 300_000,
        "srv/models/net/config.json": b"{}" * 50,
        "srv/models/net/tokenizer.json": b"{}" * 50,
        "srv/models/net/model-2.safetensors": b"w" * 200,
        "srv/models/net/model-1.safetensors": b"v" * 200,
        "srv/models/net/pytorch_model.bin": b"u" * 200,
        "srv/models/net/README.md": b"t" * 200,
        f"{hub}/model.bin": "../../blobs/abc",
        "root/.cache/huggingface/hub/models--org--name/blobs/abc": b"s" * 200,
    })  # fmt: skip
    found = world.paths("python3", "run.py", "/data/huge.gguf", cwd="/srv")
    assert found[-8:] == [
        "data/huge.gguf",
        "srv/models/net/config.json",
        "srv/models/net/tokenizer.json",
        "srv/models/net/model-1.safetensors",
        "srv/models/net/model-2.safetensors",
        "data/labels.txt",
        "root/.cache/huggingface/hub/models--org--name/blobs/abc",
        "x.bin",
    ]
    assert "srv/models/net/pytorch_model.bin" not in found
    assert "srv/models/net/README.md" not in found
    reasons = {each.path.decode(): each.reason for each in world.guess("python3", "run.py", cwd="/srv")}
    assert reasons["srv/models/net/model-2.safetensors"] == "weights"
    assert "data/huge.gguf" not in reasons


def test_the_budget() -> None:
    world = World({**python(), "srv/run.py": b"open('/data/net.pt')\n", "data/net.pt": b"z" * 1_000_000})
    whole = world.guess("python3", "run.py", cwd="/srv")
    assert sum(each.length for each in whole) > 1_000_000
    part = world.guess("python3", "run.py", cwd="/srv", budget=100_000)
    assert sum(each.length for each in part) == 100_000
    assert part[:-1] == whole[: len(part) - 1]
    assert world.guess("python3", "run.py", cwd="/srv", budget=0) == []


def test_links_stay_inside_and_end() -> None:
    world = World({
        **python(),
        "usr/bin/up": "../../../../../../usr/bin/python3.11",
        "usr/bin/round": "round",
        "srv/run.py": "/../../srv/real.py",
        "srv/real.py": b"import loop, json\n",
        f"{SITE}/loop.py": "loop.py",
    })  # fmt: skip
    assert "srv/real.py" in world.paths("up", "run.py", cwd="/srv")
    assert world.paths("round") == []


def test_a_profile_of_guesses() -> None:
    world = World({**python(), "srv/run.py": b"import big\n", f"{SITE}/big.py": b"#" * 200_000})
    guesses = world.guess("python3", "run.py", cwd="/srv")
    chunks = Chunks(world.index)
    profile = guessed_profile([*guesses, Guess("weights", b"nowhere", 0, 5)], chunks, ["ab" * 32], "run")
    assert (profile.command, profile.runs, list(profile.packs)) == ("run", 0, ["ab" * 32])
    assert list(profile.rows["first"]) == list(range(len(profile.rows)))
    start = world.index.lookup(f"{SITE}/big.py".encode()).extents()[0].start // BLOCK
    blocks = profile.rows["block"].tolist()
    assert [blocks.index(start + n * 16) for n in range(4)] == list(range(len(blocks) - 4, len(blocks)))
    assert profile.reasons[profile.rows["reason"][-1]] == "imports"
    assert len(guessed_profile([], chunks, ["ab" * 32], "run").rows) == 0


@given(st.data())
def test_hostile_images(data: st.DataObject) -> None:
    """Whatever files hold, guessing ends and raises nothing."""
    some = st.binary(max_size=200)
    world = World({
        **python(),
        "usr/lib/python3.11/os.py": data.draw(some),
        "usr/lib/python3.11/encodings/__pycache__/__init__.cpython-311.pyc": b"\xa7\r\r\n" + data.draw(some),
        "usr/bin/python3.11": b"\x7fELF" + data.draw(some),
        f"{SITE}/x.pth": data.draw(some),
        f"{SITE}/x.py": data.draw(some),
        "usr/bin/pyvenv.cfg": data.draw(some),
        "etc/ld.so.cache": b"glibc-ld.so.cache1.1" + data.draw(some),
        "srv/run": b"#!" + data.draw(some),
        "bin/sh": PROGRAM,
    })  # fmt: skip
    argv = data.draw(st.sampled_from([["/srv/run"], ["python3", "-c", "import x"], ["sh", "/srv/run"]]))
    for each in world.guess(*argv, "ä\udcff", *data.draw(st.lists(st.text(max_size=20), max_size=3))):
        assert each.length > 0


def test_what_cannot_be_had() -> None:
    world = World({**python(), "srv/run.py": b"import json\n" + b"#" * 100})
    command = Command(("python3", "/srv/run.py"), {"PATH": "/usr/bin"}, "/")
    assert guess(world.index, lambda pieces: [None] * len(pieces), command) == []
