"""Who finds the image of a mount: the daemon that runs, and the command itself where that cannot."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from servers.s3 import S3Server

from erofsgen.host.daemon.client import Client

from .conftest import Erofsgen

pytestmark = pytest.mark.mount


@pytest.fixture
def daemon(mount_point: Path) -> Callable[[Erofsgen], None]:
    """Starts the daemon as a mount does, without any image in the cache."""
    return lambda program: Client.start(program.root, ["--plane", "fanotify"]).close()


def imported(program: Erofsgen, *arguments: str | Path) -> str:
    """The modules that a command, which succeeds, imports."""
    environment = {**os.environ, "PYTHONPROFILEIMPORTTIME": "1"}
    process = program.process(*arguments, env=environment)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said.decode()[-2000:]
    return said.decode()


@pytest.fixture
def in_s3(
    sample_tars: tuple[Path, Path], erofsgen: Erofsgen, moto_s3: S3Server, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Erofsgen:  # fmt: skip
    """The program with ``sample:1`` in S3, and with what it takes to get it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name, value in moto_s3.environment().items():
        monkeypatch.setenv(name, value)
    erofsgen.options[1] = f"s3://{moto_s3.bucket()}/images"
    erofsgen("build", f"tar:{sample_tars[0]}", "--tag", "sample:1")
    return erofsgen


def test_a_daemon_finds_it(in_s3: Erofsgen, daemon: Callable[[Erofsgen], None], mount_point: Path):
    """What takes longest is not even imported by the command."""
    daemon(in_s3)
    modules = imported(in_s3, "mount", "sample:1", mount_point)
    assert "erofsgen.host.finding" in modules
    assert "numpy" not in modules
    assert "botocore" not in modules
    assert any(path.is_file() and path.read_bytes() for path in mount_point.rglob("*"))
    in_s3("umount", mount_point)


def test_where_none_runs_the_command_does(sample: Erofsgen, mount_point: Path):
    assert "erofsgen.store.directory" in imported(sample, "mount", "sample:1", mount_point)
    assert any(path.is_file() and path.read_bytes() for path in mount_point.rglob("*"))
    sample("umount", mount_point)


def test_directories_that_a_command_names_are_known_to_the_daemon(
    sample: Erofsgen, daemon: Callable[[Erofsgen], None], mount_point: Path, tmp_path: Path
):
    daemon(sample)
    sample("mount", "--cache-dir", tmp_path / "disk", "sample:1", mount_point)
    assert list((tmp_path / "disk").rglob("*.data"))
    assert any(path.is_file() and path.read_bytes() for path in mount_point.rglob("*"))
    sample("umount", mount_point)


def test_what_is_nowhere(sample: Erofsgen, daemon: Callable[[Erofsgen], None], mount_point: Path, tmp_path: Path):
    daemon(sample)
    assert "no image 'other'" in sample("mount", "other", mount_point, code=3).err
    assert (
        "no store" in Erofsgen(tmp_path / "none", sample.root, sample._capture)("mount", "x", mount_point, code=3).err
    )


def test_a_daemon_without_credentials(
    in_s3: Erofsgen, moto_s3: S3Server, daemon: Callable[[Erofsgen], None], mount_point: Path,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    """It was started by somebody else. The command has them, so there is a mount; its data is the daemon's to bring."""
    with monkeypatch.context() as without:
        for name in moto_s3.environment():
            without.delenv(name)
        daemon(in_s3)
    assert "botocore" in imported(in_s3, "mount", "sample:1", mount_point)
    assert list(mount_point.iterdir())
    in_s3("umount", mount_point)
