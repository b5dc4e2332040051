"""The program as a user runs it, and a store with the sample images."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import samples
from lazykit import Host

from erofsgen.cli.main import run
from erofsgen.store.directory import DirectoryStore

PROGRAM = Path(sys.executable).with_name("erofsgen")


@dataclass(frozen=True)
class Outcome:
    code: int
    out: bytes
    err: str

    @property
    def lines(self) -> list[str]:
        return self.out.decode().splitlines()

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class Erofsgen:
    """Runs ``erofsgen --store … --root …`` in this process, which is quick; :meth:`process` starts it for real.

    However a run ends, it prints no traceback, and an error is one line and perhaps a hint.
    """

    def __init__(self, store: Path, root: Path, capture: pytest.CaptureFixture[bytes]) -> None:
        self.store = store
        self.root = root
        self._capture = capture
        self.options = ["--store", str(store), "--root", str(root)]

    def __call__(self, *arguments: str | Path, code: int = 0) -> Outcome:
        """Run, and insist on the exit code."""
        outcome = self.any(*arguments)
        assert outcome.code == code, outcome
        return outcome

    def any(self, *arguments: str | Path) -> Outcome:
        """Run, whatever comes of it."""
        self._capture.readouterr()
        code = run([*self.options, *map(str, arguments)])
        out, err = self._capture.readouterr()
        outcome = Outcome(code, out, err.decode())
        assert "Traceback" not in outcome.err
        assert "internal error" not in outcome.err or "ValueError: odd" in outcome.err, outcome
        said = [line for line in outcome.err.splitlines() if line.startswith("erofsgen: error: ")]
        assert len(said) == (0 if code in (0, 1, 5) and not said else 1), outcome.err
        return outcome

    def process(self, *arguments: str | Path, **options: Any) -> subprocess.Popen[bytes]:
        options.setdefault("stdout", subprocess.PIPE)
        options.setdefault("stderr", subprocess.PIPE)
        return subprocess.Popen([PROGRAM, *self.options, *arguments], **options)


@pytest.fixture(autouse=True)
def no_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither this machine's nor, since ``--config`` is told by the environment, another test's. The same for metrics
    and the log."""
    monkeypatch.setenv("EROFSGEN_CONFIG", os.devnull)
    monkeypatch.setenv("EROFSGEN_METRICS", "")
    monkeypatch.setenv("EROFSGEN_LOG_FORMAT", "")


@pytest.fixture(autouse=True)
def no_daemon_left(tmp_path: Path) -> Iterator[None]:
    """Ends the daemon that a test's commands have started."""
    yield
    Host(tmp_path / "host").end()


@pytest.fixture
def erofsgen(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> Erofsgen:
    """The program with a store of its own, empty yet."""
    return Erofsgen(tmp_path / "store", tmp_path / "host", capfdbinary)


@pytest.fixture(scope="session")
def sample_tars(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The two versions of the sample as tars."""
    place = tmp_path_factory.mktemp("samples")
    return samples.write_sample(place / "one.tar", 1), samples.write_sample(place / "two.tar", 2)


@pytest.fixture(scope="session")
def sample_store(sample_tars: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with ``sample:1`` and ``sample:2``. Read only!"""
    store = tmp_path_factory.mktemp("stores") / "sample"
    for number, tar in enumerate(sample_tars, 1):
        command = [PROGRAM, "--store", store, "--quiet", "build", f"tar:{tar}", "--tag", f"sample:{number}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return store


@pytest.fixture
def sample(sample_store: Path, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> Erofsgen:
    """The program with the store of the samples. Read only!"""
    return Erofsgen(sample_store, tmp_path / "host", capfdbinary)


@pytest.fixture
def own_sample(sample_store: Path, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> Erofsgen:
    """The same with a copy of the store that the test may change."""
    shutil.copytree(sample_store, tmp_path / "store")
    return Erofsgen(tmp_path / "store", tmp_path / "host", capfdbinary)


@pytest.fixture(scope="session")
def demo_places(
    demo_store: DirectoryStore, require_root: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, Path]]:
    """A store with ``demo``, the demo image, and a root whose host cache is filled once."""
    root = tmp_path_factory.mktemp("demo") / "host"
    yield demo_store.path, root
    Host(root).end()


@pytest.fixture
def demo(demo_places: tuple[Path, Path], capfdbinary: pytest.CaptureFixture[bytes]) -> Erofsgen:
    """The program with the store of the demo image. Add images to it, but remove none."""
    return Erofsgen(*demo_places, capfdbinary)


@pytest.fixture(scope="session")
def unpacked(sample_tars: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Both samples as GNU tar unpacks them. Read only!"""
    if os.geteuid() != 0:
        pytest.skip("owners and devices need root")
    places = []
    for number, tar in enumerate(sample_tars, 1):
        places.append(tmp_path_factory.mktemp(f"unpacked-{number}"))
        untar(tar, places[-1])
    return places[0], places[1]


def untar(tar: Path, place: Path) -> None:
    """Let GNU tar unpack everything it can."""
    options = ["--xattrs", "--xattrs-include=*", "--numeric-owner", "--same-owner", "--same-permissions"]
    subprocess.run(["tar", "--extract", "--file", tar, "--directory", place, *options], check=True)
