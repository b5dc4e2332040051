"""Fixtures of the host's tests. Test modules import ``handmade``, which is beside this file."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from handmade import CHUNK, ImageMaker, Sample, chunks_of, contents

from erofsgen.store.directory import DirectoryStore


def make_sample(maker: ImageMaker) -> Sample:
    """An image with three packs, one of them raw, whose files take their chunks from all of them; ``big`` has a hole,
    and neighbouring chunks at neighbouring blocks of different packs."""
    first, second, third = contents(1, 6 * CHUNK, 6 * CHUNK, 9 * CHUNK + 5000)
    a, b, c = chunks_of(first), chunks_of(second), chunks_of(third)
    packs = [maker.pack(a), maker.pack(b), maker.pack(c, raw=True)]
    files: dict[str, bytes | str | None] = {
        "etc/small": b"a few bytes",
        "etc/empty": b"",
        "big": a[0] + b[1] + c[2] + bytes(CHUNK) + a[3] + b[4] + c[5] + c[6] + a[5],
        "usr/lib/one": first,
        "usr/lib/two": second,
        "usr/lib/three": third,
        "usr/lib/link": "../../etc/small",
        "tmp": None,
    }
    return Sample(maker.image("sample", files, packs), files, packs)


@pytest.fixture
def sample(maker: ImageMaker) -> Sample:
    return make_sample(maker)


@pytest.fixture
def maker_on() -> Callable[[Path], Sample]:
    """Makes the sample in a store of the test's choice."""
    return lambda path: make_sample(ImageMaker(DirectoryStore(path)))


@pytest.fixture
def make_file_system(tmp_path: Path, root: Path) -> Callable[[str, int], Path]:
    """A new file system of a kind and size in MiB, on a loop device, mounted below the test's directory."""

    def make(kind: str, size: int) -> Path:
        place = tmp_path / f"{kind}-{size}"
        place.mkdir()
        backing = tmp_path / f"{kind}-{size}.img"
        with backing.open("wb") as file:
            file.truncate(size << 20)
        subprocess.run([f"mkfs.{kind}", "-q", str(backing)], check=True, stdout=subprocess.DEVNULL)
        subprocess.run(["mount", "-o", "loop", str(backing), str(place)], check=True)
        return place

    return make


@pytest.fixture
def overlay(tmp_path: Path, root: Path) -> Path:
    """An overlayfs that is none of ours."""
    for name in ("lower", "upper", "work", "merged"):
        (tmp_path / name).mkdir()
    options = f"lowerdir={tmp_path}/lower,upperdir={tmp_path}/upper,workdir={tmp_path}/work"
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, str(tmp_path / "merged")], check=True)
    return tmp_path / "merged"
