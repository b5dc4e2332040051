"""The Makefile and the set-up script do what they say, without a terminal, twice."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


def make(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "ARGS", "PYTHON"))}
    return subprocess.run(
        ["make", "--no-print-directory", *arguments],
        cwd=REPOSITORY,
        env={**inherited, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )


@pytest.fixture
def no_apt(tmp_path):
    """A PATH on which apt-get, sudo and pip's way to the network do nothing but tell on whoever calls them."""
    tripwires = tmp_path / "bin"
    tripwires.mkdir()
    log = tmp_path / "called"
    for name in ("apt-get", "sudo", "systemctl"):
        (tripwires / name).write_text(f'#!/bin/sh\necho "{name} $*" >> {log}\nexit 1\n')
        (tripwires / name).chmod(0o755)
    return {"PATH": f"{tripwires}:{os.environ['PATH']}"}, log


def test_help_lists_every_target():
    phony = re.search(r"^\.PHONY: (.*)$", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    listed = re.findall(r"^  make ([a-z-]+) +\S", make("help").stdout, re.MULTILINE)
    assert sorted(listed) == sorted(phony[1].split())


def test_second_setup_installs_nothing(no_apt):
    environment, log = no_apt
    if not (REPOSITORY / ".venv/.setup-stamp").exists():
        pytest.skip("this tree was not set up with make setup")
    before = (REPOSITORY / ".venv/.setup-stamp").stat().st_mtime_ns
    started = time.monotonic()
    result = make("setup", **environment)
    took = time.monotonic() - started
    assert result.returncode == 0, result.stderr
    assert (result.stdout, result.stderr) == ("", "")
    assert not log.exists(), log.read_text()
    assert (REPOSITORY / ".venv/.setup-stamp").stat().st_mtime_ns == before
    assert took < 10  # a fifth of a second on an idle machine


def test_setup_says_what_is_missing_when_it_cannot_install(no_apt, tmp_path):
    """A tool that is not there is installed with apt-get; failing is retried, reported, and leaves no policy."""
    environment, log = no_apt
    if os.geteuid() != 0:
        pytest.skip("a plain user's way to apt-get is sudo")
    # A PATH that has everything but umoci.
    tools = tmp_path / "tools"
    tools.mkdir()
    for directory in os.environ["PATH"].split(":"):
        for name in os.listdir(directory) if os.path.isdir(directory) else ():
            if name != "umoci" and not (tools / name).exists():
                (tools / name).symlink_to(os.path.join(directory, name))
    (tools / "sleep").unlink()
    (tools / "sleep").symlink_to("/bin/true")
    path = f"{environment['PATH'].split(':')[0]}:{tools}"
    policy = Path("/usr/sbin/policy-rc.d")
    before = policy.read_bytes() if policy.exists() else None

    result = make("setup", PATH=path)

    assert result.returncode != 0
    assert "setup: installing umoci\n" in result.stderr
    assert log.read_text().count("install umoci\n") == 3
    assert (policy.read_bytes() if policy.exists() else None) == before
    assert not Path("/usr/sbin/policy-rc.d.before-erofsgen").exists()


def test_setup_refuses_an_old_python(tmp_path):
    old = tmp_path / "python3"
    old.write_text('#!/bin/sh\ncase "$*" in *version_info*) exit 1;; *--version*) echo Python 3.9.2;; esac\nexit 0\n')
    old.chmod(0o755)
    result = make("setup", f"PYTHON={old}")
    assert result.returncode != 0
    assert "Python 3.9.2 is too old, 3.11 or newer is needed" in result.stderr


def test_vagrant_takes_the_vagrantfile(tmp_path):
    """Where Vagrant is installed; without a provider it can still read the file."""
    if not shutil.which("vagrant"):
        pytest.skip("vagrant is not installed")
    (tmp_path / "Vagrantfile").write_bytes((REPOSITORY / "Vagrantfile").read_bytes())
    environment = {**os.environ, "VAGRANT_HOME": str(tmp_path / "home"), "VAGRANT_CHECKPOINT_DISABLE": "1"}
    result = subprocess.run(
        ["vagrant", "validate", "--ignore-provider"],
        cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture
def ci(tmp_path):
    """.ci/run in a tree of its own, with a make that writes down what it is called for and fails as told."""
    (tmp_path / "tree/.ci").mkdir(parents=True)
    script = tmp_path / "tree/.ci/run"
    script.write_bytes((REPOSITORY / ".ci/run").read_bytes())
    script.chmod(0o755)
    called = tmp_path / "called"

    def run(**exit_codes: int) -> tuple[int, list[str], str]:
        cases = "".join(f'*" {target}"|*" {target} "*) exit {code};; ' for target, code in exit_codes.items())
        fake = tmp_path / "bin/make"
        fake.parent.mkdir(exist_ok=True)
        fake.write_text(f'#!/bin/sh\necho "$*|$EROFSGEN_KERNEL_CACHE" >> {called}\ncase "$*" in {cases}esac\n')
        fake.chmod(0o755)
        called.unlink(missing_ok=True)
        environment = {**os.environ, "PATH": f"{fake.parent}:{os.environ['PATH']}"}
        environment.pop("EROFSGEN_KERNEL_CACHE", None)
        result = subprocess.run([script], env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        lines = [line.split("|") for line in called.read_text().splitlines()]
        return result.returncode, [words[0].split()[1] for words in lines], lines[0][1]

    return run


def test_ci_runs_the_whole_suite_and_the_kernel_tests(ci):
    assert ci() == (0, ["test", "vmtest"], "")
    recipe = make("--dry-run", "test").stdout
    assert re.search(r"python -m pytest -n 2 --dist loadfile\s*$", recipe), "make test must not leave any test out"


def test_ci_runs_both_and_the_first_failure_decides(ci):
    assert ci(test=3)[:2] == (3, ["test", "vmtest"])
    assert ci(vmtest=4)[:2] == (4, ["test", "vmtest"])
    assert ci(test=3, vmtest=4)[:2] == (3, ["test", "vmtest"])


def test_setup_knows_what_the_kernel_tests_need(no_apt):
    """Where everything is there, nothing is installed; what there is not to set up is refused."""
    environment, log = no_apt
    script = REPOSITORY / "packaging/setup"
    assert subprocess.run([script, "nonsense"], stdin=subprocess.DEVNULL, capture_output=True).returncode == 2
    if not all(shutil.which(tool) for tool in ("qemu-system-x86_64", "busybox", "flex", "bison", "bc", "file")):
        pytest.skip("this machine was not set up for the kernel tests")
    result = subprocess.run([script, "vm"], env={**os.environ, **environment}, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert not log.exists()
