"""What heuristics make of a real image, against what its Python says that it loaded. Nothing is mounted."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from erofsgen.erofs.reader import Index
from erofsgen.profile.chunks import Chunks
from erofsgen.profile.guess.command import Command
from erofsgen.profile.guess.guess import Guess, guess, guessed_profile
from erofsgen.profile.guess.rounds import Piece
from erofsgen.store.directory import DirectoryStore
from erofsgen.store.image import Image
from erofsgen.store.paths import resolve

SHOW = """
import re, sys
for module in list(sys.modules.values()):
    spec = getattr(module, "__spec__", None)
    if spec and spec.has_location and not isinstance(spec.loader, type(None)):
        print(spec.origin)
for line in open("/proc/self/maps"):
    found = re.search(r" (/.*\\.so[.\\d]*)$", line)
    if found: print(found[1])
"""


@pytest.fixture(scope="module")
def image(demo_store: DirectoryStore) -> Image:
    return Image.open(demo_store, "demo")


@pytest.fixture(scope="module")
def guessed(image: Image, umoci_unpacked: Path) -> Callable[..., list[Guess]]:
    """Contents come from where another program has unpacked the image."""
    places = {node.nid: path for path, node in image.index.walk()}

    def read(pieces: Sequence[Piece]) -> list[bytes | None]:
        found: list[bytes | None] = []
        for node, offset, length in pieces:
            with (umoci_unpacked / places[node.nid].decode()).open("rb") as file:
                file.seek(offset)
                found.append(file.read(length))
        return found

    return lambda *argv: guess(image.index, read, Command.of(image.config, argv or None))


def loaded(root: Path, index: Index, code: str) -> set[bytes]:
    """The sources of the modules, and the libraries, that Python loads for ``code``: paths without links."""
    command = 'mount -t proc proc "$0/proc" && exec chroot "$0" python3 -B -c "$1"'
    said = subprocess.run(
        ["unshare", "--mount", "sh", "-c", command, root, code + SHOW], check=True, capture_output=True, text=True
    ).stdout
    return {resolve(index, line.encode())[0] for line in said.splitlines() if line.startswith("/")}


def source_of(path: bytes) -> bytes:
    """A module's source for its byte code."""
    directory, _, name = path.rpartition(b"/")
    return (
        directory.removesuffix(b"__pycache__") + name.split(b".cpython")[0] + b".py" if b"__pycache__" in path else path
    )


@pytest.mark.mount
@pytest.mark.parametrize("code", ["import numpy, scipy", "import scipy.optimize, scipy.sparse, requests"])
def test_what_python_loads_is_guessed(guessed, umoci_unpacked: Path, image: Image, code: str, require_root) -> None:
    real = loaded(umoci_unpacked, image.index, code)
    started = time.process_time()
    guesses = guessed("python3", "-c", code)
    assert time.process_time() - started < 5
    found = {source_of(each.path) for each in guesses}
    sizes = {path: image.index.lookup(path).size for path in real | {each.path for each in guesses}}
    missed = sum(sizes[path] for path in real - found)
    assert missed < sum(sizes[path] for path in real) * 0.02, sorted(real - found, key=sizes.__getitem__)[-5:]
    kinds = (b".pyc", b".py", b".so")
    idle = [each for each in guesses if each.path.endswith(kinds) and source_of(each.path) not in real]
    assert sum(each.length for each in idle) < sum(each.length for each in guesses) * 0.05
    assert [each.reason for each in guesses[:3]] == ["program", "loader", "loader"]


def test_the_application_as_the_image_has_it(guessed, image: Image) -> None:
    assert b"opt/app/main.py" in {each.path for each in guessed("python3", "/opt/app/current")}
    guesses = guessed("python3", "/opt/app/main.py")
    reasons = {each.path: each.reason for each in guesses}
    assert reasons[b"usr/bin/python3.11"] == "program"
    assert reasons[b"opt/app/main.py"] == "imports"
    assert any(path.startswith(b"usr/local/lib/python3.11/dist-packages/requests/") for path in reasons)
    profile = guessed_profile(guesses, Chunks(image.index), [pack.hex for pack in image.packs], "main")
    assert sum(each.length for each in guesses) * 0.95 < profile.size < sum(each.length for each in guesses) * 1.1
